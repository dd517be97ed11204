//! The dirty log: a bit for each page of guest memory, which a frontend reads while it moves its guest.
//!
//! Owns:        the log's mapping; the marks of one ring until they are set in it; which logs are large enough.
//! Never sees:  what is written to guest memory, and when.
//! Read next:   `writer`, which writes guest memory and marks here what it wrote.
//!
//! Page `p` is bit `p % 8` of byte `p / 8`, by guest addresses (vhost-user, "Migration"). The frontend takes whole words
//! out of the log while other backends set bits in them, so a bit is set by an atomic OR, and only after the page was
//! written: a frontend that takes the bit reads the new content, and one that came before finds the bit next time. An OR
//! that is left out because the bit is set already would break that, because the frontend may have read the page before.
//!
//! **Invariant**: a ring that has a log marks each page it writes, or it fails. No mark is dropped.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::memory::{GuestMemory, Mapping, MemoryError, RegionSpec};

/// Bytes of guest memory that a bit stands for (VHOST_LOG_PAGE).
pub const LOG_PAGE_SIZE: u64 = 0x1000;

const PAGES_PER_WORD: u64 = 64;

/// Bytes of the largest log: guest addresses up to 16 TiB, twice what a frontend may share. A file without pages costs a
/// frontend nothing, and must not take this process's addresses.
const LOG_SIZE_MAX: u64 = 512 << 20;

/// Words whose marks are gathered. A frame of 64 KiB lies in two or three, in as many as it has buffers at worst.
const GATHERED_MAX: usize = 16;

/// Why a ring cannot mark what it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogProblem {
    /// It could not be mapped.
    Unusable(String),
    /// It cannot be written any more.
    Lost {
        size: u64,
    },
    MemoryOutside {
        size: u64,
        end: u64,
    },
    DeviceAreaOutside {
        size: u64,
        address: u64,
        length: u64,
    },
}

impl fmt::Display for LogProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ADVICE: &str = "let the frontend send SET_LOG_BASE with a larger log";
        match self {
            Self::Unusable(reason) => f.write_str(reason),
            Self::Lost { size } => write!(
                f,
                "the dirty log, {size:#x} bytes, is lost: its file became smaller than announced or has no page to give; \
                 let the frontend send SET_LOG_BASE with another file"
            ),
            Self::MemoryOutside { size, end } => write!(
                f,
                "the dirty log has {size:#x} bytes, guest memory up to {end:#x} needs {:#x}; {ADVICE}",
                size_for(*end)
            ),
            Self::DeviceAreaOutside { size, address, length } => {
                write!(f, "the dirty log has {size:#x} bytes, the ring is logged at {address:#x}, {length:#x} bytes, ")?;
                match address.checked_add(*length) {
                    Some(end) => write!(f, "which needs {:#x}; {ADVICE}", size_for(end)),
                    None => f.write_str("which wraps around"),
                }
            }
        }
    }
}

/// Bytes of a log for guest addresses below `end`.
fn size_for(end: u64) -> u64 {
    end.div_ceil(LOG_PAGE_SIZE).div_ceil(8)
}

/// A log as a frontend announced it. Unmapped when dropped.
#[derive(Debug)]
pub struct DirtyLog {
    size: u64,
    words: Result<Mapping, LogProblem>,
}

impl DirtyLog {
    /// Maps `size` bytes of a file from `mmap_offset` on; `fd` is only used during the call. A log that cannot be mapped
    /// is one that no ring can run with; see `reason`.
    #[must_use]
    pub fn new(size: u64, mmap_offset: u64, fd: RawFd) -> Self {
        Self::of(size, mmap_offset, fd, Mapping::new).unwrap_or_else(|error| Self {
            size,
            words: Err(LogProblem::Unusable(format!(
                "the dirty log, {size:#x} bytes, cannot be mapped: {error}"
            ))),
        })
    }

    /// Maps the log of a frontend that another process served: as `new`, but what the frontend has spoilt since then is
    /// lost.
    ///
    /// # Errors
    /// This process has no room for it.
    pub fn adopt(size: u64, mmap_offset: u64, fd: RawFd) -> io::Result<Self> {
        Self::of(size, mmap_offset, fd, Mapping::adopt)
    }

    fn of(
        size: u64,
        mmap_offset: u64,
        fd: RawFd,
        map: fn(&RegionSpec) -> Result<Mapping, MemoryError>,
    ) -> io::Result<Self> {
        let spec = RegionSpec { guest_address: 0, size, user_address: 0, mmap_offset, fd };
        let unusable = |reason| {
            LogProblem::Unusable(format!(
                "the dirty log at offset {mmap_offset:#x}, {size:#x} bytes: {reason}"
            ))
        };
        let words = if size > LOG_SIZE_MAX {
            Err(unusable(format!("limit is {LOG_SIZE_MAX:#x} bytes")))
        } else {
            match map(&spec) {
                Ok(mapping) => Ok(mapping),
                Err(MemoryError::Invalid(reason)) => Err(unusable(reason)),
                Err(MemoryError::System(error)) => return Err(error),
            }
        };
        Ok(Self { size, words })
    }

    /// Why no ring can run with it, None where one can.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        self.check().err().map(|problem| problem.to_string())
    }

    #[inline]
    fn check(&self) -> Result<(), LogProblem> {
        match &self.words {
            Err(problem) => Err(problem.clone()),
            Ok(mapping) if mapping.lost().is_some() => Err(LogProblem::Lost { size: self.size }),
            Ok(_) => Ok(()),
        }
    }

    /// Whether it has a bit for each page below `end`.
    fn covers(&self, end: u64) -> bool {
        size_for(end) <= self.size
    }

    #[inline]
    fn set(&self, word: u64, mask: u64) {
        assert!(word < self.size.div_ceil(8), "who marks has checked that the log is large enough");
        let mapping = self.words.as_ref().expect("who marks has checked that it can be written");
        // SAFETY: the mapping has whole pages, so all of the word that has a byte below `size`, aligned as the mapping is.
        let place = unsafe { AtomicU64::from_ptr(mapping.host().cast::<u64>().add(word as usize)) };
        // After what is marked.
        place.fetch_or(mask.to_le(), Ordering::Release);
    }
}

/// The log of a ring that has to log.
#[derive(Clone, Debug)]
pub struct RingLog {
    pub log: Arc<DirtyLog>,
    /// Where what is written to the ring itself is logged: the guest address that stands for the first byte of the device
    /// area, which is the used ring, or the device's event suppression; descriptors of a packed ring are logged where they
    /// are. None: the frontend wants none of it logged.
    pub device_area: Option<u64>,
}

/// A part of a ring that a device writes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Area {
    Device,
    /// The descriptors of a packed ring.
    Descriptors,
}

/// What one ring has to mark.
#[derive(Debug)]
pub(crate) struct Marks {
    log: RingLog,
    /// Words of the log, and bits to be set in them.
    gathered: [(u64, u64); GATHERED_MAX],
    count: usize,
}

impl Marks {
    pub(crate) fn new(log: RingLog) -> Self {
        Self { log, gathered: [(0, 0); GATHERED_MAX], count: 0 }
    }

    /// Whether whatever the ring writes can be marked. `device_length` is its device area's.
    pub(crate) fn check(&self, memory: &GuestMemory, device_length: u64) -> Result<(), LogProblem> {
        let RingLog { log, device_area } = &self.log;
        let size = log.size;
        log.check()?;
        if !log.covers(memory.end()) {
            return Err(LogProblem::MemoryOutside { size, end: memory.end() });
        }
        match *device_area {
            Some(address) if !address.checked_add(device_length).is_some_and(|end| log.covers(end)) => {
                Err(LogProblem::DeviceAreaOutside { size, address, length: device_length })
            }
            _ => Ok(()),
        }
    }

    /// Whether the log is lost since it was checked.
    #[inline]
    pub(crate) fn check_lost(&self) -> Result<(), LogProblem> {
        self.log.log.check()
    }

    /// `length` bytes behind the first `offset` ones of these buffers were written.
    #[inline(never)]
    pub(crate) fn buffers(
        &mut self,
        memory: &GuestMemory,
        buffers: &[libc::iovec],
        mut offset: usize,
        mut length: usize,
    ) {
        for buffer in buffers {
            let here = buffer.iov_len.saturating_sub(offset).min(length);
            if here > 0 {
                let start =
                    memory.guest_address(buffer.iov_base.cast()).expect("buffers lie in guest memory");
                self.range(start + offset as u64, here as u64);
                length -= here;
            }
            if length == 0 {
                return;
            }
            offset = offset.saturating_sub(buffer.iov_len);
        }
    }

    /// `length` bytes of a part of the ring were written, from `offset` on. `descriptors` is where its descriptors are.
    #[inline(never)] // a ring that logs nothing has less code on its way
    pub(crate) fn area(&mut self, area: Area, descriptors: u64, offset: usize, length: usize) {
        let Some(device) = self.log.device_area else { return };
        let start = match area {
            Area::Device => device,
            Area::Descriptors => descriptors,
        };
        self.range(start + offset as u64, length as u64);
    }

    /// `length` bytes, which are some, were written at a guest address.
    #[inline]
    fn range(&mut self, address: u64, length: u64) {
        for page in address / LOG_PAGE_SIZE..=(address + length - 1) / LOG_PAGE_SIZE {
            self.page(page);
        }
    }

    #[inline]
    fn page(&mut self, page: u64) {
        let (word, mask) = (page / PAGES_PER_WORD, 1 << (page % PAGES_PER_WORD));
        if let Some(known) = self.gathered[..self.count].iter_mut().find(|known| known.0 == word) {
            known.1 |= mask;
            return;
        }
        if self.count == GATHERED_MAX {
            self.flush();
        }
        self.gathered[self.count] = (word, mask);
        self.count += 1;
    }

    /// Sets in the log what was gathered.
    #[inline(never)]
    pub(crate) fn flush(&mut self) {
        for (word, mask) in &self.gathered[..std::mem::take(&mut self.count)] {
            self.log.log.set(*word, *mask);
        }
    }
}

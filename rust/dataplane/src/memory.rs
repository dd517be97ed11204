//! Guest memory: files that the frontend shares, mapped writable into this process.
//!
//! Owns:        the mappings, the two address spaces that lead to them (guest and frontend addresses); which are lost.
//! Never sees:  rings, packets.
//! Read next:   `backing`, which files are accepted; `fault`, by which a mapping survives a file that shrinks; `chain`,
//!              which turns guest addresses into host pointers here, once a chain.
//!
//! A frontend adds and removes regions while its rings run. Each table is a `GuestMemory` of its own; two that follow
//! each other share the mappings of the regions that both have, page tables and all, and a mapping goes with the last
//! table that has it.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backing::{Backing, Identity, PAGE_SIZE};
use crate::fault::{self, Watch};

/// Pages one mincore(2) call is asked about: its answer is a byte a page, so the buffer stays at 64 KiB.
const RESIDENCE_PAGES: usize = 65536;

/// One region as the frontend announces it; untrusted. `fd` is borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    pub guest_address: u64,
    pub size: u64,
    pub user_address: u64,
    pub mmap_offset: u64,
    pub fd: RawFd,
}

/// Why guest memory could not be mapped.
#[derive(Debug)]
pub enum MemoryError {
    /// The regions cannot be what they claim: the frontend's fault.
    Invalid(String),
    /// The kernel refused.
    System(io::Error),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(reason) => f.write_str(reason),
            Self::System(error) => write!(f, "mapping guest memory failed: {error}"),
        }
    }
}

impl std::error::Error for MemoryError {}

/// Why guest memory could not be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// Not all of it is inside guest memory.
    Outside,
    /// A region of this memory cannot be accessed any more.
    Lost(Lost),
}

/// A region that cannot be accessed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    pub guest_address: u64,
    pub size: u64,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { guest_address, size } = self;
        write!(
            f,
            "guest memory at {guest_address:#x}, {size:#x} bytes, is lost: its file became smaller than announced, \
             has no page to give, or cannot be mapped"
        )
    }
}

/// One mapped region. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// What it was asked for by; the descriptor is the caller's and may be closed.
    spec: RegionSpec,
    file: Identity,
    /// Where the region's first byte is.
    host: *mut u8,
    size: usize,
    /// What is really mapped: whole pages of the file, of which the first holds the region's first byte.
    start: *mut u8,
    length: usize,
    /// Its pages were looked for to the end.
    populated: AtomicBool,
    /// None only while it is being dropped.
    watch: Option<Watch>,
}

// SAFETY: the pages are the guest's to change at any time: every access is through raw pointers, volatile or atomic, or
// by the kernel, whichever thread makes it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a region that a frontend announces.
    pub(crate) fn new(spec: &RegionSpec) -> Result<Self, MemoryError> {
        let end = check(spec)?;
        let file = Backing::of(spec.fd).map_err(MemoryError::System)?;
        if let Some(reason) = file.refusal() {
            return Err(MemoryError::Invalid(reason));
        }
        if let Some(size) = file.size().map_err(MemoryError::System)?.filter(|size| *size < end) {
            return Err(invalid(format!("needs a file of {end:#x} bytes, it has {size:#x}")));
        }
        Self::of(spec, &file, spec.fd)
    }

    /// Maps a region that another process had mapped; what its frontend has spoilt since is lost, and no error.
    pub(crate) fn adopt(spec: &RegionSpec) -> Result<Self, MemoryError> {
        check(spec)?;
        let file = Backing::of(spec.fd).map_err(MemoryError::System)?;
        match Self::of(spec, &file, spec.fd) {
            // What lacks here is ours, and then the other process had better keep the guest.
            Err(MemoryError::System(error))
                if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN | libc::ENFILE)) =>
            {
                Err(MemoryError::System(error))
            }
            Err(MemoryError::System(_)) => {
                let mapping = Self::of(spec, &file, NO_FILE)?;
                mapping.lose();
                Ok(mapping)
            }
            result => result,
        }
    }

    /// Maps the region of a file, by its descriptor, or of nothing.
    fn of(spec: &RegionSpec, file: &Backing, fd: RawFd) -> Result<Self, MemoryError> {
        let (start, length, offset) = map(spec, file.page_size, fd)?;
        Ok(Self {
            spec: *spec,
            file: file.identity,
            // SAFETY: the mapping holds the region, which begins at this offset.
            host: unsafe { start.add(offset) },
            size: length_of(spec)?,
            start,
            length,
            populated: AtomicBool::new(false),
            watch: Some(Watch::new(start, length)),
        })
    }

    /// Whether a region that is announced now is this one: the same bytes of the same file at the same addresses.
    fn is_of(&self, spec: &RegionSpec) -> bool {
        RegionSpec { fd: self.spec.fd, ..*spec } == self.spec
            && Backing::of(spec.fd).is_ok_and(|file| file.identity == self.file)
    }

    #[inline]
    pub(crate) fn lost(&self) -> Option<Lost> {
        let is_lost = self.watch.as_ref().is_some_and(Watch::is_lost);
        is_lost.then_some(Lost { guest_address: self.spec.guest_address, size: self.spec.size })
    }

    /// Where its first byte is; the mapping has whole pages.
    #[inline]
    pub(crate) fn host(&self) -> *mut u8 {
        self.host
    }

    fn lose(&self) {
        if let Some(watch) = &self.watch {
            watch.lose();
        }
    }

    fn holds(&self, host: *const u8) -> bool {
        (self.host.addr()..self.host.addr() + self.size).contains(&host.addr())
    }

    /// Maps the pages of this region that are resident, unless that was done, until `deadline`; gives the bytes mapped.
    fn populate(&self, deadline: Instant) -> io::Result<u64> {
        if self.populated.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let mut residence = vec![0u8; RESIDENCE_PAGES.min(self.length.div_ceil(PAGE_SIZE))];
        let mut populated = 0;
        for start in (0..self.length).step_by(RESIDENCE_PAGES * PAGE_SIZE) {
            if Instant::now() >= deadline {
                return Ok(populated);
            }
            let length = (self.length - start).min(RESIDENCE_PAGES * PAGE_SIZE);
            let pages = &mut residence[..length.div_ceil(PAGE_SIZE)];
            // SAFETY: `start + length` stays inside the mapping, and `pages` has a byte for each of its pages.
            let failed = unsafe { libc::mincore(self.start.add(start).cast(), length, pages.as_mut_ptr()) };
            if failed != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut page = 0;
            for run in pages.chunk_by(|a, b| a & 1 == b & 1) {
                let run_start = start + page * PAGE_SIZE;
                let run_length = run.len() * PAGE_SIZE;
                page += run.len();
                if run[0] & 1 == 0 {
                    continue;
                }
                // Reading is enough: in a shared mapping of memory files the pages come in writable, and the
                // kernel maps them in larger steps than it would for writing.
                // SAFETY: the run lies inside the mapping; populating changes no content.
                let failed = unsafe {
                    libc::madvise(self.start.add(run_start).cast(), run_length, libc::MADV_POPULATE_READ)
                };
                if failed != 0 {
                    return Err(io::Error::last_os_error());
                }
                populated += run_length as u64;
            }
        }
        self.populated.store(true, Ordering::Relaxed);
        Ok(populated)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the address is free for another mapping.
        drop(self.watch.take());
        // SAFETY: this mapping was made in `map` and nobody else unmaps it.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

fn invalid(reason: impl Into<String>) -> MemoryError {
    MemoryError::Invalid(reason.into())
}

/// Says of which region an error is.
fn named(spec: &RegionSpec, error: MemoryError) -> MemoryError {
    let RegionSpec { guest_address, size, .. } = spec;
    match error {
        MemoryError::Invalid(reason) => {
            invalid(format!("memory region at {guest_address:#x}, {size:#x} bytes: {reason}"))
        }
        error @ MemoryError::System(_) => error,
    }
}

/// Whether the numbers can be; gives where the region ends in its file.
fn check(spec: &RegionSpec) -> Result<u64, MemoryError> {
    let RegionSpec { guest_address, size, user_address, mmap_offset, .. } = *spec;
    if size == 0 {
        return Err(invalid("is empty"));
    }
    for (space, start) in [("guest address", guest_address), ("user address", user_address)] {
        if start.checked_add(size).is_none() {
            return Err(invalid(format!("{space} {start:#x} wraps around")));
        }
    }
    // mmap(2) takes no others, whatever pages the file itself has.
    if mmap_offset % PAGE_SIZE as u64 != 0 {
        return Err(invalid(format!("mmap offset {mmap_offset:#x} is not a multiple of {PAGE_SIZE:#x}")));
    }
    mmap_offset.checked_add(size).ok_or_else(|| invalid("mmap offset wraps around"))
}

/// In the place of a descriptor: empty pages.
const NO_FILE: RawFd = -1;

fn length_of(spec: &RegionSpec) -> Result<usize, MemoryError> {
    usize::try_from(spec.size).map_err(|_| invalid("is larger than this process can map"))
}

/// Maps the whole pages that hold a region; gives where, how much, and where in it the region begins.
fn map(spec: &RegionSpec, page_size: usize, fd: RawFd) -> Result<(*mut u8, usize, usize), MemoryError> {
    // QEMU's second region of a hugetlbfs file begins at 0xc0000, in the middle of a page.
    let offset = (spec.mmap_offset % page_size as u64) as usize; // less than a page
    let length = length_of(spec)?.checked_add(offset);
    let length = length.and_then(|length| length.checked_next_multiple_of(page_size));
    let (Some(length), Ok(from)) = (length, libc::off_t::try_from(spec.mmap_offset - offset as u64)) else {
        return Err(invalid("is larger than this process can map"));
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let (kind, from) = match fd {
        NO_FILE => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, 0),
        _ => (libc::MAP_SHARED, from),
    };
    let flags = kind | libc::MAP_NORESERVE;
    // SAFETY: no fixed address is asked for, so the new mapping replaces nothing.
    let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd, from) };
    if start == libc::MAP_FAILED {
        return Err(MemoryError::System(io::Error::last_os_error()));
    }
    // A core dump of this process must not carry the guest's memory. Refusal changes nothing else.
    // SAFETY: the range was mapped just above.
    unsafe { libc::madvise(start, length, libc::MADV_DONTDUMP) };
    Ok((start.cast(), length, offset))
}

/// Where guest addresses lead: all that a look-up touches of a mapping.
#[derive(Clone, Copy, Debug)]
struct Span {
    guest_address: u64,
    size: usize,
    host: *mut u8,
}

/// Guest memory. Immutable: another memory table is another object.
#[derive(Debug)]
pub struct GuestMemory {
    /// Sorted by guest address.
    spans: Box<[Span]>,
    /// The same, sorted by host address.
    spans_by_host: Box<[Span]>,
    /// The mapping of each span.
    mappings: Box<[Arc<Mapping>]>,
    /// What `fault::losses` said when none of the mappings was lost.
    intact_at: AtomicU64,
}

// SAFETY: spans point into the mappings, of which the same is true.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps every region. The descriptors are only used during the call.
    ///
    /// # Errors
    /// A region cannot be mapped. Nothing stays mapped.
    pub fn new(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        Self::map(specs, None, Mapping::new)
    }

    /// The memory that comes after this one: as `new`, but regions that this one has as well, which are the same bytes of
    /// the same file at the same addresses, keep their mapping. One of those that is lost is mapped again; if that fails
    /// it stays lost.
    ///
    /// # Errors
    /// A region cannot be mapped. This memory is as before, and nothing else stays mapped.
    pub fn next(&self, specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        Self::map(specs, Some(self), Mapping::new)
    }

    /// Maps the regions of a frontend that another process served: as `new`, but what the frontend has spoilt since
    /// then, by making its files smaller or unfit, is lost memory and no error.
    ///
    /// # Errors
    /// The regions cannot be what they claim, or this process has no room. Nothing stays mapped.
    pub fn adopt(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        Self::map(specs, None, Mapping::adopt)
    }

    /// As `adopt`, with the mappings of this memory kept as `next` keeps them.
    ///
    /// # Errors
    /// As `adopt`. This memory is as before.
    pub fn adopt_next(&self, specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        Self::map(specs, Some(self), Mapping::adopt)
    }

    fn map(
        specs: &[RegionSpec],
        former: Option<&Self>,
        make: fn(&RegionSpec) -> Result<Mapping, MemoryError>,
    ) -> Result<Self, MemoryError> {
        let make = |spec: &RegionSpec| make(spec).map_err(|error| named(spec, error));
        let mapping = |spec: &RegionSpec| {
            let known = former.and_then(|former| former.mapping_at(spec.guest_address));
            match known.filter(|mapping| mapping.is_of(spec)) {
                Some(mapping) if mapping.lost().is_none() => Ok(Arc::clone(mapping)),
                Some(mapping) => Ok(make(spec).map_or_else(|_| Arc::clone(mapping), Arc::new)),
                None => make(spec).map(Arc::new),
            }
        };
        Self::of(specs.iter().map(mapping).collect::<Result<_, _>>()?)
    }

    fn of(mut mappings: Vec<Arc<Mapping>>) -> Result<Self, MemoryError> {
        mappings.sort_by_key(|mapping| mapping.spec.guest_address);
        for pair in mappings.windows(2) {
            let (lower, upper) = (pair[0].spec, pair[1].spec);
            if upper.guest_address < lower.guest_address + lower.size {
                return Err(MemoryError::Invalid(format!(
                    "memory regions at {:#x} and {:#x} overlap: the first has {:#x} bytes",
                    lower.guest_address, upper.guest_address, lower.size
                )));
            }
        }
        let span = |mapping: &Arc<Mapping>| Span {
            guest_address: mapping.spec.guest_address,
            size: mapping.size,
            host: mapping.host,
        };
        let spans: Box<[Span]> = mappings.iter().map(span).collect();
        let mut spans_by_host = spans.clone();
        spans_by_host.sort_by_key(|span| span.host.addr());
        Ok(Self { spans, spans_by_host, mappings: mappings.into(), intact_at: AtomicU64::new(fault::NEVER) })
    }

    /// The mapping of the region that begins there.
    fn mapping_at(&self, guest_address: u64) -> Option<&Arc<Mapping>> {
        let index = self.spans.binary_search_by_key(&guest_address, |span| span.guest_address).ok()?;
        Some(&self.mappings[index])
    }

    /// Maps the pages that exist already and creates none, for no longer than `time`; gives the number of bytes mapped.
    /// Mappings that this was done for before, which is those kept from a former table, take no time.
    ///
    /// A kernel without MADV_POPULATE_READ (before 5.14) populates nothing; hugetlbfs tells of no page that this
    /// process has not touched, and needs few faults anyway.
    pub fn populate(&self, time: Duration) -> u64 {
        let deadline = Instant::now() + time;
        self.mappings.iter().map(|mapping| mapping.populate(deadline).unwrap_or(0)).sum()
    }

    /// A region that cannot be accessed any more, if there is one. Looks at no memory of the guest's.
    #[inline]
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        let losses = fault::losses();
        if self.intact_at.load(Ordering::Relaxed) == losses {
            return None;
        }
        self.find_lost(losses)
    }

    /// Looks at every mapping, because somebody lost one since.
    #[cold]
    fn find_lost(&self, losses: u64) -> Option<Lost> {
        let lost = self.mappings.iter().find_map(|mapping| mapping.lost());
        if lost.is_none() {
            self.intact_at.store(losses, Ordering::Relaxed);
        }
        lost
    }

    /// The kernel could not access these buffers in guest memory (EFAULT, which would have been SIGBUS here): the
    /// regions they are in are lost.
    ///
    /// # Panics
    /// None of them is in guest memory.
    #[cold]
    pub fn lose(&self, buffers: &[libc::iovec]) -> Lost {
        let spoilt =
            |mapping: &&Arc<Mapping>| buffers.iter().any(|buffer| mapping.holds(buffer.iov_base.cast()));
        self.mappings.iter().filter(spoilt).for_each(|mapping| mapping.lose());
        self.lost().expect("buffers lie in guest memory")
    }

    /// Gives `copy` each stretch of host memory at a guest address, with where it is in the `length` bytes.
    fn access(
        &self,
        guest_address: u64,
        length: usize,
        copy: impl Fn(*mut u8, std::ops::Range<usize>),
    ) -> Result<(), AccessError> {
        let mut done = 0;
        while done < length {
            let address = guest_address.checked_add(done as u64).ok_or(AccessError::Outside)?;
            let (host, found) = self.host(address, length - done).ok_or(AccessError::Outside)?;
            copy(host, done..done + found);
            done += found;
        }
        self.lost().map_or(Ok(()), |lost| Err(AccessError::Lost(lost)))
    }

    /// Copies out.
    ///
    /// # Errors
    /// Not all of it is inside guest memory, or some guest memory is lost.
    pub fn read(&self, guest_address: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let target = data.as_mut_ptr();
        self.access(guest_address, data.len(), |host, range| {
            // SAFETY: `host` and `target` have as many bytes as the range, which lies in `data`.
            unsafe { copy(host, target.add(range.start), range.len()) };
        })
    }

    /// Copies in.
    ///
    /// # Errors
    /// As `read`; a part may have been written.
    pub fn write(&self, guest_address: u64, data: &[u8]) -> Result<(), AccessError> {
        self.access(guest_address, data.len(), |host, range| {
            // SAFETY: `host` and `data` have as many bytes as the range, which lies in `data`.
            unsafe { copy(data.as_ptr().add(range.start), host, range.len()) };
        })
    }

    /// The longest stretch of host memory at a guest address, up to `length` bytes; None outside guest memory.
    ///
    /// The pointer is valid for as long as `self`; the guest changes what it points to at any time.
    #[inline]
    #[must_use]
    pub fn host(&self, guest_address: u64, length: usize) -> Option<(*mut u8, usize)> {
        let index = self.spans.partition_point(|span| span.guest_address <= guest_address);
        let span = &self.spans[index.checked_sub(1)?];
        let offset = usize::try_from(guest_address - span.guest_address).ok()?;
        let left = span.size.checked_sub(offset).filter(|left| *left > 0)?;
        // SAFETY: `offset` is below the span's size.
        Some((unsafe { span.host.add(offset) }, left.min(length)))
    }

    /// The guest address of host memory that `host` gave.
    pub(crate) fn guest_address(&self, host: *const u8) -> Option<u64> {
        let index = self.spans_by_host.partition_point(|span| span.host.addr() <= host.addr());
        let span = &self.spans_by_host[index.checked_sub(1)?];
        let offset = host.addr() - span.host.addr();
        (offset < span.size).then(|| span.guest_address + offset as u64)
    }

    /// Where the last region ends, by guest addresses; 0 without one.
    pub(crate) fn end(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.guest_address + span.size as u64)
    }

    /// As `host`, for all of `length` bytes or nothing: what a ring needs, which may not lie across regions.
    #[must_use]
    pub fn host_exact(&self, guest_address: u64, length: usize) -> Option<*mut u8> {
        self.host(guest_address, length).filter(|(_, found)| *found == length).map(|(host, _)| host)
    }
}

/// Copies between guest memory and ours. A field of 2, 4 or 8 bytes is read or written as a whole.
///
/// # Safety
/// Both have `length` bytes.
pub(crate) unsafe fn copy(source: *const u8, target: *mut u8, length: usize) {
    /// As one word, if both are aligned for one.
    unsafe fn word<T: Copy>(source: *const u8, target: *mut u8) -> bool {
        let (source, target) = (source.cast::<T>(), target.cast::<T>());
        let fits = source.is_aligned() && target.is_aligned();
        if fits {
            // SAFETY: both are aligned, and the caller says that they have as many bytes.
            unsafe { target.write_volatile(source.read_volatile()) };
        }
        fits
    }
    // SAFETY: the caller's.
    let done = unsafe {
        match length {
            2 => word::<u16>(source, target),
            4 => word::<u32>(source, target),
            8 => word::<u64>(source, target),
            _ => false,
        }
    };
    if !done {
        // SAFETY: the caller's; memory of ours and memory of the guest's do not overlap.
        unsafe { ptr::copy_nonoverlapping(source, target, length) };
    }
}

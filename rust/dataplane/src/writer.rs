//! Writing guest memory: nothing else in the packet path does, but for the kernel, when it is told to here.
//!
//! Owns:        the guest memory of one ring; each store and copy into it; that each of them is marked in the dirty log.
//! Never sees:  what is written, and why.
//! Read next:   `log`, where marks go; `split` and `packed`, which write rings by this; `window` and `callback`, which
//!              write buffers.
//!
//! A ring that logs nothing pays a comparison for each call, whatever its length.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::Arc;

use crate::chain::RingError;
use crate::log::{Area, Marks, RingLog};
use crate::memory::{copy, GuestMemory};
use crate::sys;

/// Writes into the memory of one ring and its buffers, and keeps it mapped.
#[derive(Debug)]
pub(crate) struct Writer {
    memory: Arc<GuestMemory>,
    /// Where the ring's descriptors are, and how many bytes they have.
    descriptors: (u64, usize),
    /// Bytes of its device area.
    device_length: usize,
    marks: Option<Box<Marks>>,
}

impl Writer {
    pub(crate) fn new(memory: &Arc<GuestMemory>, descriptors: (u64, usize), device_length: usize) -> Self {
        Self { memory: Arc::clone(memory), descriptors, device_length, marks: None }
    }

    #[inline]
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(crate) fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        self.memory = Arc::clone(memory);
    }

    /// From now on marks go to another log, or to none. What was marked until now is in the former one.
    pub(crate) fn set_log(&mut self, log: Option<RingLog>) {
        self.flush();
        self.marks = log.map(|log| Box::new(Marks::new(log)));
    }

    /// Whether whatever is written can be marked: asked before the first write, and with each change of log or memory.
    pub(crate) fn check_log(&self) -> Result<(), RingError> {
        let check = |marks: &Marks| marks.check(&self.memory, self.device_length as u64);
        self.marks.as_deref().map_or(Ok(()), check).map_err(RingError::Log)
    }

    /// Whether the log is lost since then.
    #[inline]
    pub(crate) fn check_log_lost(&self) -> Result<(), RingError> {
        self.marks.as_deref().map_or(Ok(()), Marks::check_lost).map_err(RingError::Log)
    }

    /// Sets in the log what was written until now.
    #[inline]
    pub(crate) fn flush(&mut self) {
        if let Some(marks) = &mut self.marks {
            marks.flush();
        }
    }

    /// Marks a whole part of the ring, as if all of it was written.
    pub(crate) fn mark_area(&mut self, area: Area) {
        let length = match area {
            Area::Device => self.device_length,
            Area::Descriptors => self.descriptors.1,
        };
        self.wrote(area, 0, length);
    }

    #[inline]
    fn wrote(&mut self, area: Area, offset: usize, length: usize) {
        if let Some(marks) = &mut self.marks {
            marks.area(area, self.descriptors.0, offset, length);
        }
    }

    /// Stores a word of the device area, `offset` bytes behind its beginning.
    ///
    /// # Safety
    /// `place` is that word, aligned, in this memory.
    #[inline]
    pub(crate) unsafe fn store(&mut self, place: *mut u16, offset: usize, value: u16, order: Ordering) {
        // SAFETY: the caller's.
        unsafe { AtomicU16::from_ptr(place) }.store(value.to_le(), order);
        self.wrote(Area::Device, offset, size_of::<u16>());
    }

    /// Stores an element of a used ring, `offset` bytes behind the ring's beginning.
    ///
    /// # Safety
    /// `place` are its two words, aligned, in this memory.
    #[inline]
    pub(crate) unsafe fn store_element(&mut self, place: *mut u32, offset: usize, element: [u32; 2]) {
        for (index, word) in element.into_iter().enumerate() {
            // SAFETY: the caller's. Nobody reads the element before the used index is published.
            unsafe { AtomicU32::from_ptr(place.add(index)) }.store(word.to_le(), Ordering::Relaxed);
        }
        self.wrote(Area::Device, offset, size_of::<[u32; 2]>());
    }

    /// Stores what the device writes into a descriptor of a packed ring, `offset` bytes behind the first one, its flags last.
    ///
    /// # Safety
    /// `place` is a descriptor, aligned to 16, in this memory.
    #[inline]
    pub(crate) unsafe fn store_descriptor(
        &mut self,
        place: *mut u8,
        offset: usize,
        length: u32,
        id: u16,
        flags: u16,
    ) {
        // SAFETY: the caller's: all three lie in the descriptor, aligned as it is.
        let (length_word, id_word, flags_word) = unsafe {
            (
                AtomicU32::from_ptr(place.add(8).cast()),
                AtomicU16::from_ptr(place.add(12).cast()),
                AtomicU16::from_ptr(place.add(14).cast()),
            )
        };
        length_word.store(length.to_le(), Ordering::Relaxed);
        id_word.store(id.to_le(), Ordering::Relaxed);
        flags_word.store(flags.to_le(), Ordering::Release);
        self.wrote(Area::Descriptors, offset, crate::chain::DESCRIPTOR_SIZE);
    }

    /// Writes `data` behind the first `offset` bytes of `buffers`, which have room for it.
    ///
    /// # Safety
    /// The buffers lie in this memory.
    pub(crate) unsafe fn fill(&mut self, buffers: &[libc::iovec], offset: usize, data: &[u8]) {
        let (mut behind, mut rest) = (offset, data);
        for buffer in buffers {
            let length = buffer.iov_len.saturating_sub(behind).min(rest.len());
            if length > 0 {
                let (here, others) = rest.split_at(length);
                // SAFETY: as many bytes behind `behind` are inside the buffer, which is mapped.
                unsafe { copy(here.as_ptr(), buffer.iov_base.cast::<u8>().add(behind), length) };
                rest = others;
            }
            if rest.is_empty() {
                break;
            }
            behind = behind.saturating_sub(buffer.iov_len);
        }
        assert!(rest.is_empty(), "the buffers have room for it");
        if let Some(marks) = &mut self.marks {
            marks.buffers(&self.memory, buffers, offset, data.len());
        }
    }

    /// Lets the kernel read one frame into `buffers`, of which the last `ours` are not the guest's; gives its length.
    ///
    /// # Errors
    /// As readv(2), but never EINTR.
    ///
    /// # Safety
    /// The others lie in this memory; ours may be written.
    #[inline]
    pub(crate) unsafe fn read(&mut self, fd: RawFd, buffers: &[libc::iovec], ours: usize) -> io::Result<u64> {
        // SAFETY: the caller's.
        let length = unsafe { sys::readv(fd, buffers) }?;
        if let Some(marks) = &mut self.marks {
            marks.buffers(&self.memory, &buffers[..buffers.len() - ours], 0, length as usize);
        }
        Ok(length)
    }
}

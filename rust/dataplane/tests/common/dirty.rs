//! A dirty log as a frontend has it, and what must be in it: each page that changed.
#![allow(dead_code)] // each test file uses a part

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use dataplane::chain::Layout;
use dataplane::log::{DirtyLog, RingLog, LOG_PAGE_SIZE};
use dataplane::memory::GuestMemory;

use crate::common::memfd;

/// A log for guest memory of these regions.
pub struct Dirty {
    pub file: OwnedFd,
    pub log: Arc<DirtyLog>,
    regions: Vec<(u64, u64)>,
    size: usize,
}

/// What was in each page.
pub struct Snapshot(Vec<(u64, Vec<u8>)>);

impl Dirty {
    pub fn new(regions: &[(u64, u64)]) -> Self {
        let end = regions.iter().map(|(start, size)| start + size).max().unwrap();
        let size = (end / LOG_PAGE_SIZE / 64 + 1) * 8;
        let file = memfd(size);
        let log = Arc::new(DirtyLog::new(size, 0, file.as_raw_fd()));
        assert_eq!(log.reason(), None);
        Self { file, log, regions: regions.to_vec(), size: size as usize }
    }

    /// For a ring that is logged where it is.
    pub fn of(&self, layout: &Layout) -> RingLog {
        RingLog { log: Arc::clone(&self.log), device_area: Some(layout.device_area) }
    }

    /// The pages that are marked.
    pub fn pages(&self) -> BTreeSet<u64> {
        let mut bits = vec![0u8; self.size];
        // SAFETY: the buffer is as long as we say.
        let got = unsafe { libc::pread(self.file.as_raw_fd(), bits.as_mut_ptr().cast(), bits.len(), 0) };
        assert_eq!(got, bits.len() as isize);
        (0..8 * self.size as u64).filter(|page| bits[*page as usize / 8] >> (page % 8) & 1 != 0).collect()
    }

    /// As the frontend does that takes them.
    pub fn clear(&self) {
        let zeros = vec![0u8; self.size];
        // SAFETY: the buffer is as long as we say.
        let put = unsafe { libc::pwrite(self.file.as_raw_fd(), zeros.as_ptr().cast(), zeros.len(), 0) };
        assert_eq!(put, zeros.len() as isize);
    }

    pub fn look(&self, memory: &GuestMemory) -> Snapshot {
        let page = |address| {
            let mut data = vec![0; LOG_PAGE_SIZE as usize];
            memory.read(address, &mut data).unwrap();
            (address / LOG_PAGE_SIZE, data)
        };
        let pages = self
            .regions
            .iter()
            .flat_map(|&(start, size)| (start..start + size).step_by(LOG_PAGE_SIZE as usize).map(page));
        Snapshot(pages.collect())
    }

    /// The pages that changed since; a guest's own writes change `others`.
    pub fn changed(&self, before: &Snapshot, memory: &GuestMemory) -> BTreeSet<u64> {
        let after = self.look(memory);
        let pairs = before.0.iter().zip(&after.0).filter(|(before, after)| before != after);
        pairs.map(|((page, _), _)| *page).collect()
    }

    /// Each page that changed since is marked, but for those that a guest wrote itself.
    pub fn check(&self, before: &Snapshot, memory: &GuestMemory, others: &BTreeSet<u64>) {
        let marked = self.pages();
        let missing: Vec<_> = self
            .changed(before, memory)
            .into_iter()
            .filter(|page| !others.contains(page) && !marked.contains(page))
            .collect();
        assert!(missing.is_empty(), "pages {missing:#x?} changed and are not marked, {marked:#x?} are");
    }
}

/// The pages of `length` bytes at an address.
pub fn pages_of(address: u64, length: usize) -> impl Iterator<Item = u64> {
    let last = address.saturating_add((length as u64).saturating_sub(1));
    (address / LOG_PAGE_SIZE..=last / LOG_PAGE_SIZE).take(if length == 0 { 0 } else { usize::MAX })
}

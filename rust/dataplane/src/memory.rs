//! Guest memory: files that the frontend shares, mapped writable into this process.
//!
//! Owns:        the mappings, the two address spaces that lead to them (guest and frontend addresses).
//! Never sees:  rings, packets.
//! Read next:   `split`, which turns guest addresses into host pointers here, once a chain.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// The page size that offsets must keep: mmap(2) takes no others, whatever pages the file itself has.
const PAGE_SIZE: usize = 4096;

/// Pages one mincore(2) call is asked about: its answer is a byte a page, so the buffer stays at 64 KiB.
const RESIDENCE_PAGES: usize = 65536;

/// One region as the frontend announces it; untrusted.
#[derive(Clone, Copy, Debug)]
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

/// One mapped region. Unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    guest_address: u64,
    user_address: u64,
    host: *mut u8,
    size: usize,
}

impl Mapping {
    fn new(spec: &RegionSpec) -> Result<Self, MemoryError> {
        let RegionSpec { guest_address, size, user_address, mmap_offset, fd } = *spec;
        let invalid = |reason: String| {
            MemoryError::Invalid(format!("memory region at {guest_address:#x}, {size:#x} bytes: {reason}"))
        };
        if size == 0 {
            return Err(invalid("is empty".into()));
        }
        for (space, start) in [("guest address", guest_address), ("user address", user_address)] {
            if start.checked_add(size).is_none() {
                return Err(invalid(format!("{space} {start:#x} wraps around")));
            }
        }
        if mmap_offset % PAGE_SIZE as u64 != 0 {
            return Err(invalid(format!("mmap offset {mmap_offset:#x} is not a multiple of {PAGE_SIZE:#x}")));
        }
        let end = mmap_offset.checked_add(size).ok_or_else(|| invalid("mmap offset wraps around".into()))?;
        let file_size = file_size(fd).map_err(MemoryError::System)?;
        if file_size < end {
            // Touching what lies behind the end of the file would kill this process (SIGBUS).
            return Err(invalid(format!("needs a file of {end:#x} bytes, it has {file_size:#x}")));
        }
        let (Ok(length), Ok(offset)) = (usize::try_from(size), libc::off_t::try_from(mmap_offset)) else {
            return Err(invalid("is larger than this process can map".into()));
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: no fixed address is asked for, so the new mapping replaces nothing.
        let host = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd, offset) };
        if host == libc::MAP_FAILED {
            return Err(MemoryError::System(io::Error::last_os_error()));
        }
        // A core dump of this process must not carry the guest's memory. Refusal changes nothing else.
        // SAFETY: the range was mapped just above.
        unsafe { libc::madvise(host, length, libc::MADV_DONTDUMP) };
        Ok(Self { guest_address, user_address, host: host.cast(), size: length })
    }

    fn guest_end(&self) -> u64 {
        self.guest_address + self.size as u64
    }

    /// Maps the resident pages of this region; gives the bytes mapped.
    fn populate(&self) -> io::Result<u64> {
        let mut residence = vec![0u8; RESIDENCE_PAGES.min(self.size.div_ceil(PAGE_SIZE))];
        let mut populated = 0;
        for start in (0..self.size).step_by(RESIDENCE_PAGES * PAGE_SIZE) {
            let length = (self.size - start).min(RESIDENCE_PAGES * PAGE_SIZE);
            let pages = &mut residence[..length.div_ceil(PAGE_SIZE)];
            // SAFETY: `start + length` stays inside the mapping, and `pages` has a byte for each of its pages.
            let failed = unsafe { libc::mincore(self.host.add(start).cast(), length, pages.as_mut_ptr()) };
            if failed != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut page = 0;
            for run in pages.chunk_by(|a, b| a & 1 == b & 1) {
                let run_start = start + page * PAGE_SIZE;
                let run_length = (run.len() * PAGE_SIZE).min(self.size - run_start);
                page += run.len();
                if run[0] & 1 == 0 {
                    continue;
                }
                // Reading is enough: in a shared mapping of memory files the pages come in writable, and the
                // kernel maps them in larger steps than it would for writing.
                // SAFETY: the run lies inside the mapping; populating changes no content.
                let failed = unsafe {
                    libc::madvise(self.host.add(run_start).cast(), run_length, libc::MADV_POPULATE_READ)
                };
                if failed != 0 {
                    return Err(io::Error::last_os_error());
                }
                populated += run_length as u64;
            }
        }
        Ok(populated)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping was made in `new` and nobody else unmaps it.
        unsafe { libc::munmap(self.host.cast(), self.size) };
    }
}

fn file_size(fd: RawFd) -> io::Result<u64> {
    // SAFETY: an all-zero stat is a valid one to be filled in.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is valid for writing.
    if unsafe { libc::fstat(fd, &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// Guest memory. Immutable: another memory table is another object.
#[derive(Debug)]
pub struct GuestMemory {
    /// The mappings as vm-memory knows them, for copies in and out. Declared, and so dropped, before `mappings`.
    memory: GuestMemoryMmap,
    /// Sorted by guest address.
    mappings: Vec<Mapping>,
}

// SAFETY: the mappings live as long as the object and are the guest's to change at any time: every access is
// through raw pointers, volatile or atomic, or by the kernel, whichever thread makes it.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps every region. The descriptors are only used during the call.
    ///
    /// # Errors
    /// Nothing stays mapped.
    pub fn new(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        let mut mappings = specs.iter().map(Mapping::new).collect::<Result<Vec<_>, _>>()?;
        mappings.sort_by_key(|mapping| mapping.guest_address);
        for pair in mappings.windows(2) {
            if pair[1].guest_address < pair[0].guest_end() {
                return Err(MemoryError::Invalid(format!(
                    "memory regions at {:#x} and {:#x} overlap: the first has {:#x} bytes",
                    pair[0].guest_address, pair[1].guest_address, pair[0].size
                )));
            }
        }
        let region = |mapping: &Mapping| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the range is mapped, and outlives the region, which is dropped first.
            let region =
                unsafe { MmapRegion::build_raw(mapping.host, mapping.size, protection, libc::MAP_SHARED) };
            let region = region.expect("mmap gives aligned addresses");
            GuestRegionMmap::new(region, GuestAddress(mapping.guest_address)).expect("does not wrap around")
        };
        let regions: Vec<_> = mappings.iter().map(region).collect();
        // A frontend may take its last region away; what is left is memory that holds nothing.
        let memory = if regions.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Invalid(error.to_string()))?
        };
        Ok(Self { memory, mappings })
    }

    /// Maps the pages that exist already and creates none; gives the number of bytes mapped.
    ///
    /// A kernel without MADV_POPULATE_READ (before 5.14) populates nothing; hugetlbfs tells of no page that this
    /// process has not touched, and needs few faults anyway.
    #[must_use]
    pub fn populate(&self) -> u64 {
        self.mappings.iter().map(|mapping| mapping.populate().unwrap_or(0)).sum()
    }

    /// The guest address of `size` bytes at a frontend's user address, if one region holds all of them.
    #[must_use]
    pub fn translate(&self, user_address: u64, size: u64) -> Option<u64> {
        let holds = |mapping: &&Mapping| {
            user_address >= mapping.user_address
                && user_address
                    .checked_add(size)
                    .is_some_and(|end| end <= mapping.user_address + mapping.size as u64)
        };
        let mapping = self.mappings.iter().find(holds)?;
        Some(mapping.guest_address + (user_address - mapping.user_address))
    }

    /// Copies out; false if not all of it is inside guest memory.
    #[must_use]
    pub fn read(&self, guest_address: u64, data: &mut [u8]) -> bool {
        self.memory.read_slice(data, GuestAddress(guest_address)).is_ok()
    }

    /// Copies in; false if not all of it is inside guest memory, and then a part may have been written.
    #[must_use]
    pub fn write(&self, guest_address: u64, data: &[u8]) -> bool {
        self.memory.write_slice(data, GuestAddress(guest_address)).is_ok()
    }

    /// The longest stretch of host memory at a guest address, up to `length` bytes; None outside guest memory.
    ///
    /// The pointer is valid for as long as `self`; the guest changes what it points to at any time.
    #[inline]
    #[must_use]
    pub fn host(&self, guest_address: u64, length: usize) -> Option<(*mut u8, usize)> {
        let index = self.mappings.partition_point(|mapping| mapping.guest_address <= guest_address);
        let mapping = &self.mappings[index.checked_sub(1)?];
        let offset = usize::try_from(guest_address - mapping.guest_address).ok()?;
        let left = mapping.size.checked_sub(offset).filter(|left| *left > 0)?;
        // SAFETY: `offset` is below the mapping's size.
        Some((unsafe { mapping.host.add(offset) }, left.min(length)))
    }

    /// As `host`, for all of `length` bytes or nothing: what a ring needs, which may not lie across regions.
    #[must_use]
    pub fn host_exact(&self, guest_address: u64, length: usize) -> Option<*mut u8> {
        self.host(guest_address, length).filter(|(_, found)| *found == length).map(|(host, _)| host)
    }
}

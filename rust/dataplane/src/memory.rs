//! Guest memory: files that the frontend shares, mapped writable into this process.
//!
//! Owns:        the mappings, the two address spaces that lead to them (guest and frontend addresses); which are lost.
//! Never sees:  rings, packets.
//! Read next:   `fault`, by which a mapping survives a file that shrinks; `chain`, which turns guest addresses into host pointers here, once a chain.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::time::{Duration, Instant};

use crate::fault::Watch;
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
struct Mapping {
    guest_address: u64,
    user_address: u64,
    host: *mut u8,
    size: usize,
    /// The size in whole pages of the file: what is really mapped.
    mapped: usize,
    /// None only while it is being dropped.
    watch: Option<Watch>,
}

impl Mapping {
    /// Maps a region that a frontend announces.
    fn new(spec: &RegionSpec) -> Result<Self, MemoryError> {
        let end = check(spec)?;
        let file = File::of(spec.fd).map_err(MemoryError::System)?;
        if file.is_foreign {
            // A FUSE file system, for one, whose server may be the frontend's: a page that it never gives would hold a
            // queue pair for ever.
            return Err(invalid(
                spec,
                "its file is neither memory (memfd, tmpfs, hugetlbfs) nor on a block device",
            ));
        }
        if file.size < end {
            let size = file.size;
            return Err(invalid(spec, &format!("needs a file of {end:#x} bytes, it has {size:#x}")));
        }
        let (host, mapped) = map(spec, file.page_size)?;
        Ok(Self::of(spec, host, mapped))
    }

    /// Maps a region that another process had mapped; what its frontend has spoilt since is lost, and no error.
    fn adopt(spec: &RegionSpec) -> Result<Self, MemoryError> {
        check(spec)?;
        let file = File::of(spec.fd).map_err(MemoryError::System)?;
        match map(spec, file.page_size) {
            Ok((host, mapped)) => Ok(Self::of(spec, host, mapped)),
            // What lacks here is ours, and then the other process had better keep the guest.
            Err(MemoryError::System(error))
                if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN | libc::ENFILE)) =>
            {
                Err(MemoryError::System(error))
            }
            Err(MemoryError::System(_)) => {
                let anonymous = RegionSpec { fd: -1, mmap_offset: 0, ..*spec };
                let (host, mapped) = map(&anonymous, PAGE_SIZE)?;
                let mapping = Self::of(spec, host, mapped);
                mapping.lose();
                Ok(mapping)
            }
            Err(error) => Err(error),
        }
    }

    fn of(spec: &RegionSpec, host: *mut u8, mapped: usize) -> Self {
        Self {
            guest_address: spec.guest_address,
            user_address: spec.user_address,
            host,
            size: usize::try_from(spec.size).expect("it was mapped"),
            mapped,
            watch: Some(Watch::new(host, mapped)),
        }
    }

    fn lost(&self) -> Option<Lost> {
        let is_lost = self.watch.as_ref().is_some_and(Watch::is_lost);
        is_lost.then_some(Lost { guest_address: self.guest_address, size: self.size as u64 })
    }

    fn lose(&self) {
        if let Some(watch) = &self.watch {
            watch.lose();
        }
    }

    fn holds(&self, host: *const u8) -> bool {
        (self.host.addr()..self.host.addr() + self.mapped).contains(&host.addr())
    }

    fn guest_end(&self) -> u64 {
        self.guest_address + self.size as u64
    }

    /// Maps the resident pages of this region, until `deadline`; gives the bytes mapped.
    fn populate(&self, deadline: Instant) -> io::Result<u64> {
        let mut residence = vec![0u8; RESIDENCE_PAGES.min(self.size.div_ceil(PAGE_SIZE))];
        let mut populated = 0;
        for start in (0..self.size).step_by(RESIDENCE_PAGES * PAGE_SIZE) {
            if Instant::now() >= deadline {
                break;
            }
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
        // Before the address is free for another mapping.
        drop(self.watch.take());
        // SAFETY: this mapping was made in `map` and nobody else unmaps it.
        unsafe { libc::munmap(self.host.cast(), self.mapped) };
    }
}

fn invalid(spec: &RegionSpec, reason: &str) -> MemoryError {
    let RegionSpec { guest_address, size, .. } = spec;
    MemoryError::Invalid(format!("memory region at {guest_address:#x}, {size:#x} bytes: {reason}"))
}

/// Whether the numbers can be; gives where the region ends in its file.
fn check(spec: &RegionSpec) -> Result<u64, MemoryError> {
    let RegionSpec { guest_address, size, user_address, mmap_offset, .. } = *spec;
    if size == 0 {
        return Err(invalid(spec, "is empty"));
    }
    for (space, start) in [("guest address", guest_address), ("user address", user_address)] {
        if start.checked_add(size).is_none() {
            return Err(invalid(spec, &format!("{space} {start:#x} wraps around")));
        }
    }
    if mmap_offset % PAGE_SIZE as u64 != 0 {
        return Err(invalid(
            spec,
            &format!("mmap offset {mmap_offset:#x} is not a multiple of {PAGE_SIZE:#x}"),
        ));
    }
    mmap_offset.checked_add(size).ok_or_else(|| invalid(spec, "mmap offset wraps around"))
}

/// Maps a region, of its file or, with -1 for one, of nothing; gives where and how much.
fn map(spec: &RegionSpec, page_size: usize) -> Result<(*mut u8, usize), MemoryError> {
    let length = usize::try_from(spec.size).ok().and_then(|size| size.checked_next_multiple_of(page_size));
    let (Some(length), Ok(offset)) = (length, libc::off_t::try_from(spec.mmap_offset)) else {
        return Err(invalid(spec, "is larger than this process can map"));
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let kind = if spec.fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    let flags = kind | libc::MAP_NORESERVE;
    // SAFETY: no fixed address is asked for, so the new mapping replaces nothing.
    let host = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, spec.fd, offset) };
    if host == libc::MAP_FAILED {
        return Err(MemoryError::System(io::Error::last_os_error()));
    }
    // A core dump of this process must not carry the guest's memory. Refusal changes nothing else.
    // SAFETY: the range was mapped just above.
    unsafe { libc::madvise(host, length, libc::MADV_DONTDUMP) };
    Ok((host.cast(), length))
}

/// What is to be known of a file before it is mapped. Nobody outside the kernel is asked for it.
struct File {
    size: u64,
    page_size: usize,
    /// Its pages may come from somebody who need not give any.
    is_foreign: bool,
}

impl File {
    fn of(fd: RawFd) -> io::Result<Self> {
        let checked = |result: libc::c_int| (result >= 0).then_some(()).ok_or_else(io::Error::last_os_error);
        // SAFETY: an all-zero statx is a valid one to be filled in.
        let mut status: libc::statx = unsafe { std::mem::zeroed() };
        // What the kernel knows already: a FUSE file system's server may take its time to say more.
        let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
        // SAFETY: the path is a C string, `status` is valid for writing.
        checked(unsafe { libc::statx(fd, c"".as_ptr(), flags, libc::STATX_BASIC_STATS, &raw mut status) })?;
        // Only memory has seals, whether they can be set or not.
        // SAFETY: plain system call.
        let is_memory = unsafe { libc::fcntl(fd, libc::F_GET_SEALS) } >= 0;
        let is_device = u32::from(status.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
        let mut page_size = PAGE_SIZE;
        if is_memory {
            // SAFETY: an all-zero statfs is a valid one to be filled in.
            let mut system: libc::statfs = unsafe { std::mem::zeroed() };
            // SAFETY: `system` is valid for writing.
            checked(unsafe { libc::fstatfs(fd, &raw mut system) })?;
            // Only hugetlbfs has pages of its own size, which mappings are made and removed in.
            if system.f_type == libc::HUGETLBFS_MAGIC {
                page_size = usize::try_from(system.f_bsize).unwrap_or(PAGE_SIZE);
            }
        }
        let is_foreign = !is_memory && !is_device && status.stx_dev_major == 0;
        Ok(Self { size: status.stx_size, page_size, is_foreign })
    }
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
        Self::of(specs.iter().map(Mapping::new).collect::<Result<_, _>>()?)
    }

    /// Maps the regions of a frontend that another process served: as `new`, but what the frontend has spoilt since
    /// then, by making its files smaller or unfit, is lost memory and no error.
    ///
    /// # Errors
    /// The regions cannot be what they claim, or this process has no room. Nothing stays mapped.
    pub fn adopt(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        Self::of(specs.iter().map(Mapping::adopt).collect::<Result<_, _>>()?)
    }

    fn of(mut mappings: Vec<Mapping>) -> Result<Self, MemoryError> {
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

    /// Maps the pages that exist already and creates none, for no longer than `time`; gives the number of bytes mapped.
    ///
    /// A kernel without MADV_POPULATE_READ (before 5.14) populates nothing; hugetlbfs tells of no page that this
    /// process has not touched, and needs few faults anyway.
    #[must_use]
    pub fn populate(&self, time: Duration) -> u64 {
        let deadline = Instant::now() + time;
        self.mappings.iter().map(|mapping| mapping.populate(deadline).unwrap_or(0)).sum()
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

    /// A region that cannot be accessed any more, if there is one. Looks at no memory of the guest's.
    #[inline]
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        self.mappings.iter().find_map(Mapping::lost)
    }

    /// The kernel could not access these buffers in guest memory (EFAULT, which would have been SIGBUS here): the
    /// regions they are in are lost.
    ///
    /// # Panics
    /// None of them is in guest memory.
    #[cold]
    pub fn lose(&self, buffers: &[libc::iovec]) -> Lost {
        let spoilt = |mapping: &&Mapping| buffers.iter().any(|buffer| mapping.holds(buffer.iov_base.cast()));
        self.mappings.iter().filter(spoilt).for_each(Mapping::lose);
        self.lost().expect("buffers lie in guest memory")
    }

    fn accessed(&self, result: Result<(), vm_memory::GuestMemoryError>) -> Result<(), AccessError> {
        result.map_err(|_| AccessError::Outside)?;
        self.lost().map_or(Ok(()), |lost| Err(AccessError::Lost(lost)))
    }

    /// Copies out.
    ///
    /// # Errors
    /// Not all of it is inside guest memory, or some guest memory is lost.
    pub fn read(&self, guest_address: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.accessed(self.memory.read_slice(data, GuestAddress(guest_address)))
    }

    /// Copies in.
    ///
    /// # Errors
    /// As `read`; a part may have been written.
    pub fn write(&self, guest_address: u64, data: &[u8]) -> Result<(), AccessError> {
        self.accessed(self.memory.write_slice(data, GuestAddress(guest_address)))
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

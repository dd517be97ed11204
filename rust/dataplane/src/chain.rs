//! Chains of buffers: what split and packed virtqueues have in common.
//!
//! Owns:        where a ring is, the strict reading of one descriptor, why a ring cannot go on.
//! Never sees:  a ring's order, positions, notifications.
//! Read next:   `split` and `packed`, which find chains in rings.
//!
//! Everything the guest writes is read once, checked, and never trusted to stay.

use std::fmt;
use std::ptr;

use crate::log::LogProblem;
use crate::memory::{GuestMemory, Lost};
use crate::refusal::{Refusal, RefusalKind};

/// Entries a virtqueue may have: virtio 1.2, sections 2.7 and 2.8.
pub const RING_SIZE_MAX: u16 = 32768;

/// Buffers one chain may have: readv(2) takes 1024 (UIO_MAXIOV), and receiving adds one of its own.
pub const CHAIN_BUFFERS_MAX: usize = 1023;

pub(crate) const DESCRIPTOR_SIZE: usize = 16;
pub(crate) const DESCRIPTOR_NEXT: u16 = 1;
pub(crate) const DESCRIPTOR_WRITE: u16 = 2;
pub(crate) const DESCRIPTOR_INDIRECT: u16 = 4;

/// Who writes into a chain's buffers. Network queues have one direction each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device fills them (receive).
    ToGuest,
    /// The driver filled them (transmit).
    FromGuest,
    /// First those that the driver filled, then those that the device fills; there may be none of either.
    Both,
}

/// Why a ring cannot go on: what the guest wrote cannot be, or its memory is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RingError {
    AvailIndex { index: u16, next: u16, size: u16 },
    Index { index: u16, size: u32 },
    ChainLength { limit: usize },
    OutsideMemory { address: u64, length: u64 },
    EmptyBuffer { index: u16 },
    WrongDirection { index: u16, expected: Direction },
    IndirectNotNegotiated { index: u16 },
    IndirectNested { index: u16 },
    IndirectWithNext { index: u16 },
    IndirectLength { length: u32 },
    IndirectInChain { index: u16 },
    ChainTooShort { length: u64, header_length: usize },
    NotAvailable { index: u16 },
    Position { index: u16, size: u16 },
    PositionUnknown,
    LedgerLength { count: u16 },
    LedgerMixed { from: u16 },
    ReadableLength { length: u64, limit: usize },
    ChainChanged { head: u16, length: u64, needed: usize },
    HeadInFlight { head: u16 },
    InFlightSize { found: u64, size: u16 },
    InFlightEntry { head: u16, entry: u64 },
    InFlightOrder { head: u16, other: u16 },
    InFlightUsed { head: u16, told: u16, used: u16 },
    MemoryLost(Lost),
    Log(LogProblem),
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AvailIndex { index, next, size } => {
                write!(f, "available index {index} is more than the ring's {size} entries ahead of {next}")
            }
            Self::Index { index, size } => {
                write!(f, "descriptor index {index} is outside its table of {size}")
            }
            Self::ChainLength { limit } => {
                write!(f, "a descriptor chain loops or is longer than {limit} descriptors")
            }
            Self::OutsideMemory { address, length } => {
                write!(f, "{length:#x} bytes at {address:#x} are not inside guest memory")
            }
            Self::EmptyBuffer { index } => write!(f, "descriptor {index} has length 0"),
            Self::WrongDirection { index, expected: Direction::ToGuest } => {
                write!(f, "descriptor {index} is read-only in a receive queue")
            }
            Self::WrongDirection { index, expected: Direction::FromGuest } => {
                write!(f, "descriptor {index} is write-only in a transmit queue")
            }
            Self::WrongDirection { index, expected: Direction::Both } => {
                write!(f, "descriptor {index} is read-only and stands behind a write-only one of its chain")
            }
            Self::IndirectNotNegotiated { index } => {
                write!(f, "descriptor {index} is indirect, which was not negotiated")
            }
            Self::IndirectNested { index } => {
                write!(f, "descriptor {index} of an indirect table is indirect itself")
            }
            Self::IndirectWithNext { index } => write!(f, "indirect descriptor {index} has a next one"),
            Self::IndirectLength { length } => {
                write!(f, "an indirect table of {length} bytes is not a whole number of descriptors")
            }
            Self::IndirectInChain { index } => {
                write!(f, "descriptor {index} is indirect and stands behind others of its chain")
            }
            Self::NotAvailable { index } => {
                write!(f, "a descriptor chain goes on at descriptor {index}, which was not made available")
            }
            Self::Position { index, size } => {
                write!(f, "position {index} is outside the ring's {size} entries")
            }
            Self::PositionUnknown => {
                f.write_str("nothing tells where the packed ring stands: no ledger has an entry for it")
            }
            Self::LedgerLength { count } => {
                write!(f, "the ring's ledger lists {count} used buffers, limit is {CHAIN_BUFFERS_MAX}")
            }
            Self::LedgerMixed { from } => {
                write!(f, "the ring's ledger tells of used buffers from {from:#x} on and lists others")
            }
            Self::ReadableLength { length, limit } => {
                write!(f, "a descriptor chain has {length} bytes for the device to read, limit is {limit}")
            }
            Self::ChainChanged { head, length, needed } => {
                write!(
                    f,
                    "the chain at descriptor {head} changed while it was in flight: it has {length} bytes left to \
                     write to, {needed} are to be written"
                )
            }
            Self::HeadInFlight { head } => {
                write!(f, "the chain at descriptor {head} is made available again while it is in flight")
            }
            Self::InFlightSize { found, size } => {
                write!(f, "the in-flight file is about a ring of {found} entries, this one has {size}")
            }
            Self::InFlightEntry { head, entry } => {
                write!(f, "the in-flight file has {entry:#x} for descriptor {head}, which cannot be")
            }
            Self::InFlightOrder { head, other } => {
                write!(f, "the in-flight file has the same place in order for descriptors {head} and {other}")
            }
            Self::InFlightUsed { head, told, used } => {
                write!(
                    f,
                    "the in-flight file has descriptor {head} completed at used index {told}, the ring stands at {used}"
                )
            }
            Self::MemoryLost(lost) => lost.fmt(f),
            Self::Log(problem) => problem.fmt(f),
            Self::ChainTooShort { length, header_length } => {
                write!(
                    f,
                    "a descriptor chain of {length} bytes has no room for the {header_length} byte header"
                )
            }
        }
    }
}

/// Where a ring is, as told by the frontend; untrusted. Addresses are the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub size: u32,
    /// The descriptor table, or the ring of descriptors.
    pub descriptor_area: u64,
    /// The available ring, or the driver's event suppression.
    pub driver_area: u64,
    /// The used ring, or the device's event suppression.
    pub device_area: u64,
}

/// The features that change how a ring is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    pub event_index: bool,
    pub indirect: bool,
}

/// A chain taken from a ring; its buffers went to the caller's vector.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// What the guest knows it by.
    pub(crate) id: u16,
    /// Entries of the ring's own descriptors it occupies.
    pub slots: u16,
    /// Buffers it added to the caller's vector.
    pub buffers: usize,
    /// How many of them, the first ones, the driver filled.
    pub readable_buffers: usize,
    /// Bytes in those buffers.
    pub length: u64,
}

/// Finds a part of a ring in guest memory and touches none of it.
pub(crate) fn find_part(
    memory: &GuestMemory,
    what: &str,
    address: u64,
    length: usize,
    alignment: u64,
) -> Result<*mut u8, Refusal> {
    let refused = |text| Refusal::new(RefusalKind::Layout, text);
    if address % alignment != 0 {
        return Err(refused(format!("{what} at {address:#x} is not aligned to {alignment}")));
    }
    let host = memory.host_exact(address, length).ok_or_else(|| {
        refused(format!("{what} at {address:#x}, {length:#x} bytes, is not inside one guest memory region"))
    })?;
    if host.addr() as u64 % alignment != 0 {
        // Guest and host addresses agree below the page size only where the region starts on a page.
        return Err(refused(format!(
            "{what} at {address:#x} lies in a memory region that starts off a page"
        )));
    }
    Ok(host)
}

/// One descriptor as it was read. The halves of its last four bytes are named by the format.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) tail: [u16; 2],
}

impl Descriptor {
    /// Reads one descriptor, once: the guest may write to it at any time, and what was checked must be what is used.
    ///
    /// # Safety
    /// 16 bytes at `place` are mapped.
    #[inline]
    pub(crate) unsafe fn read(place: *const u8) -> Self {
        // SAFETY: the caller's. Bytes need no alignment: an indirect table may lie anywhere.
        let raw = unsafe { ptr::read_volatile(place.cast::<Unaligned>()).0 };
        let [address, rest] = raw.map(u64::from_le);
        Self {
            address,
            length: (rest & 0xffff_ffff) as u32,
            tail: [(rest >> 32 & 0xffff) as u16, (rest >> 48) as u16],
        }
    }
}

/// Two words at any address.
#[repr(C, packed)]
struct Unaligned([u64; 2]);

/// A table of descriptors: a split ring's own or an indirect one. `start` has `size` of them in guest memory.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    pub(crate) start: *const u8,
    pub(crate) size: u32,
}

impl Table {
    /// The table that the indirect descriptor `index` leads to.
    pub(crate) fn indirect(
        index: u16,
        descriptor: &Descriptor,
        has_next: bool,
        features: Features,
        memory: &GuestMemory,
    ) -> Result<Self, RingError> {
        if !features.indirect {
            return Err(RingError::IndirectNotNegotiated { index });
        }
        if has_next {
            return Err(RingError::IndirectWithNext { index });
        }
        let length = descriptor.length;
        if length == 0 || length as usize % DESCRIPTOR_SIZE != 0 {
            return Err(RingError::IndirectLength { length });
        }
        // The table may not lie across two regions: no driver allocates one that does.
        let outside = RingError::OutsideMemory { address: descriptor.address, length: length.into() };
        let start = memory.host_exact(descriptor.address, length as usize).ok_or(outside)?;
        Ok(Self { start, size: length / DESCRIPTOR_SIZE as u32 })
    }

    #[inline]
    pub(crate) fn read(&self, index: u16) -> Result<Descriptor, RingError> {
        if u32::from(index) >= self.size {
            return Err(RingError::Index { index, size: self.size });
        }
        // SAFETY: the index is inside the table.
        Ok(unsafe { Descriptor::read(self.start.add(DESCRIPTOR_SIZE * usize::from(index))) })
    }
}

/// A chain's buffers while they are found.
pub(crate) struct Gathering<'a> {
    memory: &'a GuestMemory,
    direction: Direction,
    /// The device may write to the next one. A chain of both directions turns once.
    writable: bool,
    buffers: &'a mut Vec<libc::iovec>,
    before: usize,
    readable_buffers: usize,
    pub(crate) length: u64,
}

impl<'a> Gathering<'a> {
    pub(crate) fn new(
        memory: &'a GuestMemory,
        direction: Direction,
        buffers: &'a mut Vec<libc::iovec>,
    ) -> Self {
        let before = buffers.len();
        let writable = direction == Direction::ToGuest;
        Self { memory, direction, writable, buffers, before, readable_buffers: 0, length: 0 }
    }

    pub(crate) fn count(&self) -> usize {
        self.buffers.len() - self.before
    }

    /// Appends a descriptor's bytes as host memory: one buffer, or several where it lies across regions.
    #[inline]
    pub(crate) fn push(&mut self, index: u16, descriptor: &Descriptor, flags: u16) -> Result<(), RingError> {
        if (flags & DESCRIPTOR_WRITE != 0) != self.writable {
            self.turn(index)?;
        }
        if descriptor.length == 0 {
            return Err(RingError::EmptyBuffer { index });
        }
        let mut address = descriptor.address;
        let mut left = descriptor.length as usize;
        let outside =
            || RingError::OutsideMemory { address: descriptor.address, length: descriptor.length.into() };
        while left > 0 {
            let (host, length) = self.memory.host(address, left).ok_or_else(outside)?;
            self.buffers.push(libc::iovec { iov_base: host.cast(), iov_len: length });
            left -= length;
            address = address.checked_add(length as u64).ok_or_else(outside)?;
        }
        self.length += u64::from(descriptor.length);
        if self.count() > CHAIN_BUFFERS_MAX {
            return Err(RingError::ChainLength { limit: CHAIN_BUFFERS_MAX });
        }
        Ok(())
    }

    /// Goes on with buffers that the device may write to, where that can be.
    #[cold]
    fn turn(&mut self, index: u16) -> Result<(), RingError> {
        if self.direction != Direction::Both || self.writable {
            return Err(RingError::WrongDirection { index, expected: self.direction });
        }
        self.readable_buffers = self.count();
        self.writable = true;
        Ok(())
    }

    /// The chain, complete. It must have room for a header.
    pub(crate) fn chain(&self, id: u16, slots: u16, header_length: usize) -> Result<Chain, RingError> {
        let length = self.length;
        if length < header_length as u64 {
            return Err(RingError::ChainTooShort { length, header_length });
        }
        let buffers = self.count();
        let readable_buffers = if self.writable { self.readable_buffers } else { buffers };
        Ok(Chain { id, slots, buffers, readable_buffers, length })
    }
}

//! One ring of either format, from the driver's side.
//!
//! Owns:        nothing but the choice; what a piece of a chain and a used buffer are.
//! Never sees:  packets, threads.
//! Read next:   `split`, `packed`.

use crate::error::Error;
use crate::packed::PackedRing;
use crate::pair::DriverConfig;
use crate::split::SplitRing;

pub(crate) const FEATURE_EVENT_INDEX: u64 = 1 << 29;
const FEATURE_PACKED: u64 = 1 << 34;

pub(crate) const DESCRIPTOR_NEXT: u16 = 1;
pub(crate) const DESCRIPTOR_WRITE: u16 = 2;

/// A used buffer, checked: `head` was with the device and `length` fits what it offered.
#[derive(Clone, Copy)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) length: usize,
}

/// A piece of a chain: the number of its buffer, which names the chain where it is the first, and the buffer itself.
pub(crate) struct Piece {
    pub(crate) index: u16,
    pub(crate) address: u64,
    pub(crate) length: usize,
}

/// The driver's end of one ring of either format.
pub(crate) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    /// # Safety
    ///
    /// Each pointer is aligned to a page and valid for a split ring's part of that place for as long as the ring lives.
    pub(crate) unsafe fn new(name: &'static str, config: &DriverConfig, parts: [*mut u8; 3]) -> Self {
        // SAFETY: the caller's; a packed ring's parts are no larger.
        unsafe {
            if config.features & FEATURE_PACKED != 0 {
                Self::Packed(PackedRing::new(name, config, parts))
            } else {
                Self::Split(SplitRing::new(name, config, parts))
            }
        }
    }

    /// Gives a chain to the device, known by its first piece. `writable`: bytes the device may write into it.
    pub(crate) fn offer(&mut self, pieces: &[Piece], writable: usize) {
        match self {
            Self::Split(ring) => ring.offer(pieces, writable),
            Self::Packed(ring) => ring.offer(pieces, writable),
        }
    }

    /// Whether the chain of that number is with the device.
    pub(crate) fn is_offered(&self, head: u16) -> bool {
        match self {
            Self::Split(ring) => ring.is_offered(head),
            Self::Packed(ring) => ring.is_offered(head),
        }
    }

    /// How many used chains wait.
    pub(crate) fn waiting(&mut self) -> Result<u16, Error> {
        match self {
            Self::Split(ring) => ring.waiting(),
            Self::Packed(ring) => ring.waiting(),
        }
    }

    /// Looks at a waiting used chain, `ahead` of the next one.
    pub(crate) fn peek(&self, ahead: u16) -> Result<Used, Error> {
        match self {
            Self::Split(ring) => ring.peek(ahead),
            Self::Packed(ring) => Ok(ring.peek(ahead)),
        }
    }

    /// Takes the next used chain, which `peek(0)` gave, back from the device.
    pub(crate) fn take(&mut self, head: u16) {
        match self {
            Self::Split(ring) => ring.take(head),
            Self::Packed(ring) => ring.take(head),
        }
    }

    /// Whether the device wants to hear of what was offered since the last look.
    pub(crate) fn wants_kick(&mut self) -> Result<bool, Error> {
        match self {
            Self::Split(ring) => Ok(ring.wants_kick()),
            Self::Packed(ring) => ring.wants_kick(),
        }
    }

    /// Asks for a call at the next used chain; true if one came meanwhile, so that sleeping would miss it.
    pub(crate) fn ask_for_call(&mut self) -> Result<bool, Error> {
        match self {
            Self::Split(ring) => ring.ask_for_call(),
            Self::Packed(ring) => ring.ask_for_call(),
        }
    }

    /// Wants no call until the next `ask_for_call`.
    pub(crate) fn suppress_calls(&mut self) {
        match self {
            Self::Split(ring) => ring.suppress_calls(),
            Self::Packed(ring) => ring.suppress_calls(),
        }
    }
}

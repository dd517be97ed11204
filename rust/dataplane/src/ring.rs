//! A virtqueue of either format, as the pump sees it.
//!
//! Owns:        nothing but the choice. A match per call, which every ring answers the same way all its life.
//! Read next:   `split`, `packed`.

use std::sync::Arc;

use crate::chain::{Chain, Direction, Features, Layout, RingError};
use crate::ledger::Slot;
use crate::log::RingLog;
use crate::memory::GuestMemory;
use crate::packed::{PackedRing, Position};
use crate::refusal::Refusal;
use crate::split::SplitRing;
use crate::writer::Writer;

#[derive(Debug)]
pub(crate) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// Which virtqueues a device has: all of them are of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Split,
    Packed,
}

impl Ring {
    /// As the formats' own `new`.
    pub(crate) fn new(
        format: Format,
        layout: &Layout,
        features: Features,
        memory: &Arc<GuestMemory>,
        ledger: Option<Slot>,
        log: Option<RingLog>,
    ) -> Result<Self, Refusal> {
        let mut ring = match format {
            Format::Split => Self::Split(SplitRing::new(layout, features, memory)?),
            Format::Packed => Self::Packed(PackedRing::new(layout, features, memory, ledger)?),
        };
        ring.writer().set_log(log);
        Ok(ring)
    }

    #[inline]
    pub(crate) fn writer(&mut self) -> &mut Writer {
        match self {
            Self::Split(ring) => ring.writer(),
            Self::Packed(ring) => ring.writer(),
        }
    }

    /// As the formats' own.
    pub(crate) fn check_log(&self) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.check_log(),
            Self::Packed(ring) => ring.check_log(),
        }
    }

    /// Goes on in other memory, which it `is_in`.
    pub(crate) fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        match self {
            Self::Split(ring) => ring.set_memory(memory),
            Self::Packed(ring) => ring.set_memory(memory),
        }
    }

    /// Whether the ring, which was made from this layout, is in the same place of another memory.
    pub(crate) fn is_in(&self, memory: &Arc<GuestMemory>, layout: &Layout) -> bool {
        match self {
            Self::Split(ring) => ring.is_in(memory, layout),
            Self::Packed(ring) => ring.is_in(memory, layout),
        }
    }

    pub(crate) fn size(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.size(),
            Self::Packed(ring) => ring.size(),
        }
    }

    /// Starts at `position`; None is where guest memory, or the ledger, says that the ring stands.
    pub(crate) fn begin(&mut self, position: Option<u16>, call: bool) -> Result<(), RingError> {
        self.check_log()?;
        match self {
            Self::Split(ring) => {
                ring.begin(position, call);
                Ok(())
            }
            Self::Packed(ring) => ring.begin(position, call),
        }
    }

    /// Whether the ring can stand at `position`.
    pub(crate) fn check_position(&self, position: u16) -> Result<(), RingError> {
        match self {
            // Its indices count on beyond its size.
            Self::Split(_) => Ok(()),
            Self::Packed(ring) => ring.check_position(position),
        }
    }

    /// Where the ring goes on behind a process that died; what that was telling the guest is told to the end.
    pub(crate) fn recover(&mut self) -> Result<u16, RingError> {
        self.check_log()?;
        match self {
            Self::Split(ring) => Ok(ring.used_index()),
            Self::Packed(ring) => ring.recover().map(Position::bits),
        }
    }

    /// The used index in guest memory; None for a packed ring, which has none.
    pub(crate) fn used_index(&self) -> Option<u16> {
        match self {
            Self::Split(ring) => Some(ring.used_index()),
            Self::Packed(_) => None,
        }
    }

    /// Where a ring that was told no position would begin. One that cannot tell has not begun.
    pub(crate) fn standing(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.used_index(),
            Self::Packed(ring) => ring.position_in_ledger().unwrap_or(Position::START).bits(),
        }
    }

    /// Where the ring would go on if the last `chains` chains, of `slots` together, had not been taken.
    pub(crate) fn position_before(&self, chains: u16, slots: u16) -> u16 {
        match self {
            Self::Split(ring) => ring.next_avail().wrapping_sub(chains),
            Self::Packed(ring) => ring.position_before(slots),
        }
    }

    #[inline]
    pub(crate) fn take(
        &mut self,
        direction: Direction,
        header_length: usize,
        buffers: &mut Vec<libc::iovec>,
    ) -> Result<Option<Chain>, RingError> {
        match self {
            Self::Split(ring) => ring.take(direction, header_length, buffers),
            Self::Packed(ring) => ring.take(direction, header_length, buffers),
        }
    }

    /// Gives the last `chains` taken chains, of `slots` together, back.
    pub(crate) fn untake(&mut self, chains: u16, slots: u16) {
        match self {
            Self::Split(ring) => ring.untake(chains),
            Self::Packed(ring) => ring.untake(slots),
        }
    }

    #[inline]
    pub(crate) fn complete(&mut self, chain: &Chain, written: u32) {
        match self {
            Self::Split(ring) => ring.complete(chain, written),
            Self::Packed(ring) => ring.complete(chain, written),
        }
    }

    #[inline]
    pub(crate) fn publish(&mut self) {
        match self {
            Self::Split(ring) => ring.publish(),
            Self::Packed(ring) => ring.publish(),
        }
    }

    pub(crate) fn call_due(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.call_due(),
            Self::Packed(ring) => ring.call_due(),
        }
    }

    pub(crate) fn arm(&mut self) -> Result<bool, RingError> {
        match self {
            Self::Split(ring) => ring.arm(),
            Self::Packed(ring) => Ok(ring.arm()),
        }
    }

    pub(crate) fn disarm(&mut self) {
        match self {
            Self::Split(ring) => ring.disarm(),
            Self::Packed(ring) => ring.disarm(),
        }
    }
}

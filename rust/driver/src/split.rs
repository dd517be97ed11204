//! The driver's end of one split virtqueue (virtio 1.2, section 2.7).
//!
//! Owns:        its indices, what is with the device, when to kick and when to be called.
//! Never sees:  packets.

use std::sync::atomic::{fence, AtomicU16, Ordering};

use crate::error::Error;
use crate::pair::DriverConfig;
use crate::ring::{Piece, Used, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, FEATURE_EVENT_INDEX};

/// In the avail ring's flags: no call wanted. Virtio 1.2, 2.7.7.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: no kick wanted. Virtio 1.2, 2.7.10.
const USED_NO_NOTIFY: u16 = 1;

/// The driver's end of one split ring.
pub(crate) struct SplitRing {
    name: &'static str,
    size: u16,
    event_index: bool,
    descriptors: *mut [u64; 2],
    avail: *mut u16,
    used: *mut u16,
    /// The avail index as published.
    next_avail: u16,
    /// The avail index at the last look whether a kick is wanted.
    kicked_at: u16,
    next_used: u16,
    /// How many bytes the device may write into the chain of each head; None: that head is not with the device.
    writable: Vec<Option<usize>>,
}

impl SplitRing {
    /// # Safety
    ///
    /// Each pointer is aligned to a page and valid for the ring's part of that name for as long as the ring lives.
    pub(crate) unsafe fn new(name: &'static str, config: &DriverConfig, parts: [*mut u8; 3]) -> Self {
        let [descriptors, avail, used] = parts;
        Self {
            name,
            size: config.queue_size,
            event_index: config.features & FEATURE_EVENT_INDEX != 0,
            descriptors: descriptors.cast(),
            avail: avail.cast(),
            used: used.cast(),
            next_avail: 0,
            kicked_at: 0,
            next_used: 0,
            writable: vec![None; usize::from(config.queue_size)],
        }
    }

    /// A 16-bit word of the avail ring (flags, index, ring, used_event), by its position.
    fn avail_word(&self, position: usize) -> &AtomicU16 {
        assert!(position < 3 + usize::from(self.size));
        // SAFETY: inside the avail ring, which is valid for 6 + 2 * size bytes (see `new`), and aligned to 2.
        unsafe { AtomicU16::from_ptr(self.avail.add(position)) }
    }

    /// A 16-bit word of the used ring (flags, index, elements, avail_event), by its position.
    fn used_word(&self, position: usize) -> &AtomicU16 {
        assert!(position < 3 + 4 * usize::from(self.size));
        // SAFETY: inside the used ring, which is valid for 6 + 8 * size bytes (see `new`), and aligned to 2.
        unsafe { AtomicU16::from_ptr(self.used.add(position)) }
    }

    fn used_event(&self) -> &AtomicU16 {
        self.avail_word(2 + usize::from(self.size))
    }

    fn avail_event(&self) -> &AtomicU16 {
        self.used_word(2 + 4 * usize::from(self.size))
    }

    fn write_descriptor(&mut self, index: u16, address: u64, length: usize, flags: u16, next: u16) {
        assert!(index < self.size);
        let tail = (length as u64) | u64::from(flags) << 32 | u64::from(next) << 48;
        // SAFETY: inside the descriptor table (see `new`). The device reads it only after the avail index, which is
        // stored with Release, covers it.
        unsafe { self.descriptors.add(usize::from(index)).write_volatile([address.to_le(), tail.to_le()]) };
    }

    /// See `Ring::offer`. Each piece has the descriptor of its number.
    pub(crate) fn offer(&mut self, pieces: &[Piece], writable: usize) {
        let head = pieces[0].index;
        debug_assert!(self.writable[usize::from(head)].is_none());
        self.writable[usize::from(head)] = Some(writable);
        for (number, piece) in pieces.iter().enumerate() {
            let next = pieces.get(number + 1).map(|next| next.index);
            let flags = next.map_or(0, |_| DESCRIPTOR_NEXT) | if writable > 0 { DESCRIPTOR_WRITE } else { 0 };
            self.write_descriptor(piece.index, piece.address, piece.length, flags, next.unwrap_or(0));
        }
        self.avail_word(2 + usize::from(self.next_avail % self.size)).store(head.to_le(), Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.avail_word(1).store(self.next_avail.to_le(), Ordering::Release);
    }

    /// Whether the buffer of that number is with the device.
    pub(crate) fn is_offered(&self, head: u16) -> bool {
        self.writable[usize::from(head)].is_some()
    }

    /// How many used elements wait.
    pub(crate) fn waiting(&self) -> Result<u16, Error> {
        let index = u16::from_le(self.used_word(1).load(Ordering::Acquire));
        let waiting = index.wrapping_sub(self.next_used);
        let outstanding = self.next_avail.wrapping_sub(self.next_used);
        if waiting > outstanding {
            return Err(Error::Device(format!(
                "{}: used index {index} says {waiting} buffers came back, only {outstanding} are with the device",
                self.name
            )));
        }
        Ok(waiting)
    }

    /// Looks at a waiting used element, `ahead` of the next one.
    pub(crate) fn peek(&self, ahead: u16) -> Result<Used, Error> {
        let position = 2 + 4 * usize::from(self.next_used.wrapping_add(ahead) % self.size);
        let word = |at: usize| u32::from(u16::from_le(self.used_word(position + at).load(Ordering::Relaxed)));
        let (id, length) = (word(0) | word(1) << 16, word(2) | word(3) << 16);
        let writable = usize::try_from(id).ok().and_then(|id| self.writable.get(id).copied().flatten());
        let Some(writable) = writable else {
            return Err(Error::Device(format!(
                "{}: used element names buffer {id}, which is not with the device",
                self.name
            )));
        };
        if length as usize > writable {
            return Err(Error::Device(format!(
                "{}: device says it wrote {length} bytes into buffer {id}, which has {writable}",
                self.name
            )));
        }
        Ok(Used { head: id as u16, length: length as usize })
    }

    /// Takes the next used element, which `peek(0)` gave, back from the device.
    pub(crate) fn take(&mut self, head: u16) {
        self.writable[usize::from(head)] = None;
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Whether the device wants to hear of what was offered since the last look. Virtio 1.2, 2.7.13.3.
    pub(crate) fn wants_kick(&mut self) -> bool {
        if self.kicked_at == self.next_avail {
            return false;
        }
        // The index must be visible before the wish is read: the device writes its wish, then looks at the index.
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = u16::from_le(self.avail_event().load(Ordering::Relaxed));
            let new = self.next_avail;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.kicked_at)
        } else {
            u16::from_le(self.used_word(0).load(Ordering::Relaxed)) & USED_NO_NOTIFY == 0
        };
        self.kicked_at = self.next_avail;
        wanted
    }

    /// Asks for a call at the next used element; true if one came meanwhile, so that sleeping would miss it.
    pub(crate) fn ask_for_call(&mut self) -> Result<bool, Error> {
        if self.event_index {
            self.used_event().store(self.next_used.to_le(), Ordering::Relaxed);
        } else {
            self.avail_word(0).store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read: the device writes the index, then reads the wish.
        fence(Ordering::SeqCst);
        Ok(self.waiting()? != 0)
    }

    /// Wants no call until the next `ask_for_call`. With the event index a wish holds for one crossing only.
    pub(crate) fn suppress_calls(&mut self) {
        if !self.event_index {
            self.avail_word(0).store(AVAIL_NO_INTERRUPT.to_le(), Ordering::Relaxed);
        }
    }
}

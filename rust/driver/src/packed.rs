//! The driver's end of one packed virtqueue (virtio 1.2, section 2.8).
//!
//! Owns:        its positions, what is with the device, when to kick and when to be called.
//! Never sees:  packets; the device's own code, whose arithmetic it checks by doing its own.

use std::collections::VecDeque;
use std::sync::atomic::{fence, AtomicU16, AtomicU32, Ordering};

use crate::error::Error;
use crate::pair::DriverConfig;
use crate::ring::{Piece, Used, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, FEATURE_EVENT_INDEX};

const DESCRIPTOR_AVAIL: u16 = 1 << 7;
const DESCRIPTOR_USED: u16 = 1 << 15;

/// Flags of an event suppression. Virtio 1.2, 2.8.14.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESCRIPTOR: u16 = 2;

/// A chain that is with the device.
#[derive(Clone, Copy)]
struct Offered {
    slots: u16,
    /// Bytes the device may write.
    writable: usize,
    /// It was found used; `take` has not come yet.
    is_back: bool,
}

/// The driver's end of one packed ring.
///
/// Positions count slots from the beginning and never wrap: the place is what remains by the size, the lap what divides.
pub(crate) struct PackedRing {
    name: &'static str,
    size: u16,
    event_index: bool,
    descriptors: *mut u8,
    driver_event: *mut u16,
    device_event: *mut u16,
    /// Slots ever made available.
    made_available: u64,
    /// Those at the last look whether a kick is wanted.
    kicked_at: u64,
    /// Slots ever found used.
    found_used: u64,
    /// Chains with the device, by their number.
    offered: Vec<Option<Offered>>,
    /// Used chains that `take` has not taken.
    back: VecDeque<Used>,
}

impl PackedRing {
    /// # Safety
    ///
    /// Each pointer is aligned to a page and valid for the ring's part of that place for as long as the ring lives.
    pub(crate) unsafe fn new(name: &'static str, config: &DriverConfig, parts: [*mut u8; 3]) -> Self {
        let [descriptors, driver_event, device_event] = parts;
        Self {
            name,
            size: config.queue_size,
            event_index: config.features & FEATURE_EVENT_INDEX != 0,
            descriptors,
            driver_event: driver_event.cast(),
            device_event: device_event.cast(),
            made_available: 0,
            kicked_at: 0,
            found_used: 0,
            offered: vec![None; usize::from(config.queue_size)],
            back: VecDeque::new(),
        }
    }

    /// Where a slot stands, and its wrap counter, which begins at 1.
    fn place(&self, slot: u64) -> (u16, bool) {
        let size = u64::from(self.size);
        ((slot % size) as u16, slot / size % 2 == 0)
    }

    /// A position as an event suppression has it.
    fn position(&self, slot: u64) -> u16 {
        let (index, wrap) = self.place(slot);
        index | u16::from(wrap) << 15
    }

    fn descriptor(&self, index: u16) -> *mut u8 {
        assert!(index < self.size);
        // SAFETY: inside the descriptor ring, which is valid for 16 * size bytes (see `new`).
        unsafe { self.descriptors.add(16 * usize::from(index)) }
    }

    fn flags(&self, index: u16) -> &AtomicU16 {
        // SAFETY: the last two bytes of a descriptor, aligned to 2.
        unsafe { AtomicU16::from_ptr(self.descriptor(index).add(14).cast()) }
    }

    /// The driver's event suppression: position, flags.
    fn driver_word(&self, offset: usize) -> &AtomicU16 {
        assert!(offset < 2);
        // SAFETY: valid for 4 bytes (see `new`), and aligned.
        unsafe { AtomicU16::from_ptr(self.driver_event.add(offset)) }
    }

    /// The device's event suppression: position, flags.
    fn device_word(&self, offset: usize) -> &AtomicU16 {
        assert!(offset < 2);
        // SAFETY: valid for 4 bytes (see `new`), and aligned.
        unsafe { AtomicU16::from_ptr(self.device_event.add(offset)) }
    }

    /// See `Ring::offer`. Pieces take the next slots, the first of them is made available last.
    pub(crate) fn offer(&mut self, pieces: &[Piece], writable: usize) {
        let id = pieces[0].index;
        let slots = u16::try_from(pieces.len()).expect("a chain is no longer than its ring");
        debug_assert!(self.offered[usize::from(id)].is_none());
        self.offered[usize::from(id)] = Some(Offered { slots, writable, is_back: false });
        for (number, piece) in pieces.iter().enumerate().rev() {
            let (index, wrap) = self.place(self.made_available + number as u64);
            let place = self.descriptor(index);
            let tail = (piece.length as u64) | u64::from(id) << 32;
            // SAFETY: the first 14 bytes of a descriptor, which the device reads only once the flags say so.
            unsafe {
                place.cast::<u64>().write_volatile(piece.address.to_le());
                AtomicU32::from_ptr(place.add(8).cast())
                    .store(((tail & 0xffff_ffff) as u32).to_le(), Ordering::Relaxed);
                AtomicU16::from_ptr(place.add(12).cast())
                    .store(((tail >> 32) as u16).to_le(), Ordering::Relaxed);
            }
            let turn = if wrap { DESCRIPTOR_AVAIL } else { DESCRIPTOR_USED };
            let next = if number + 1 < pieces.len() { DESCRIPTOR_NEXT } else { 0 };
            let write = if writable > 0 { DESCRIPTOR_WRITE } else { 0 };
            self.flags(index).store((turn | next | write).to_le(), Ordering::Release);
        }
        self.made_available += u64::from(slots);
        assert!(self.made_available - self.found_used <= u64::from(self.size), "{}: no room", self.name);
    }

    /// Whether the chain of that number is with the device.
    pub(crate) fn is_offered(&self, head: u16) -> bool {
        self.offered[usize::from(head)].is_some()
    }

    /// How many used chains wait, after a look at the ring.
    pub(crate) fn waiting(&mut self) -> Result<u16, Error> {
        while self.look()? {}
        Ok(self.back.len() as u16)
    }

    /// Looks at the next slot that the device uses; true if it did.
    fn look(&mut self) -> Result<bool, Error> {
        let (name, (index, wrap)) = (self.name, self.place(self.found_used));
        let flags = u16::from_le(self.flags(index).load(Ordering::Acquire));
        let (avail, used) = (flags & DESCRIPTOR_AVAIL != 0, flags & DESCRIPTOR_USED != 0);
        if self.found_used == self.made_available {
            // Nothing is with the device, so nothing may come back.
            return if (avail, used) == (wrap, wrap) {
                Err(Error::Device(format!(
                    "{name}: descriptor {index} is marked used, nothing is with the device"
                )))
            } else {
                Ok(false)
            };
        }
        if (avail, used) == (wrap, !wrap) {
            return Ok(false);
        }
        if (avail, used) != (wrap, wrap) {
            return Err(Error::Device(format!(
                "{name}: descriptor {index} has flags {flags:#x}, of no use in this lap"
            )));
        }
        let place = self.descriptor(index);
        // SAFETY: inside a descriptor, aligned as it is.
        let (length, id) =
            unsafe { (AtomicU32::from_ptr(place.add(8).cast()), AtomicU16::from_ptr(place.add(12).cast())) };
        let length = u32::from_le(length.load(Ordering::Relaxed)) as usize;
        let id = u16::from_le(id.load(Ordering::Relaxed));
        let chain = self.offered.get_mut(usize::from(id)).and_then(Option::as_mut);
        let Some(chain) = chain.filter(|chain| !chain.is_back) else {
            return Err(Error::Device(format!(
                "{name}: used descriptor names buffer {id}, which is not with the device"
            )));
        };
        let expected = if chain.writable > 0 { DESCRIPTOR_WRITE } else { 0 };
        let others = flags & !(DESCRIPTOR_AVAIL | DESCRIPTOR_USED);
        if others != expected {
            return Err(Error::Device(format!(
                "{name}: used descriptor of buffer {id} has flags {others:#x}, not {expected:#x}"
            )));
        }
        if length > chain.writable {
            let writable = chain.writable;
            return Err(Error::Device(format!(
                "{name}: device says it wrote {length} bytes into buffer {id}, which has {writable}"
            )));
        }
        chain.is_back = true;
        self.found_used += u64::from(chain.slots);
        if self.found_used > self.made_available {
            return Err(Error::Device(format!("{name}: more slots came back than are with the device")));
        }
        self.back.push_back(Used { head: id, length });
        Ok(true)
    }

    /// A waiting used chain, `ahead` of the next one: one of those that `waiting` counted.
    pub(crate) fn peek(&self, ahead: u16) -> Used {
        self.back[usize::from(ahead)]
    }

    /// Takes the next used chain back from the device.
    pub(crate) fn take(&mut self, head: u16) {
        let used = self.back.pop_front();
        debug_assert_eq!(used.map(|used| used.head), Some(head));
        self.offered[usize::from(head)] = None;
    }

    /// Whether the device wants to hear of what was offered since the last look. Virtio 1.2, 2.8.14.
    pub(crate) fn wants_kick(&mut self) -> Result<bool, Error> {
        let before = std::mem::replace(&mut self.kicked_at, self.made_available);
        if before == self.made_available {
            return Ok(false);
        }
        // The descriptors must be visible before the wish is read: the device writes its wish, then looks at them.
        fence(Ordering::SeqCst);
        match u16::from_le(self.device_word(1).load(Ordering::Acquire)) {
            EVENT_ENABLE => Ok(true),
            EVENT_DISABLE => Ok(false),
            EVENT_DESCRIPTOR if self.event_index => {
                let event = u16::from_le(self.device_word(0).load(Ordering::Relaxed));
                if event & 0x7fff >= self.size {
                    return Err(Error::Device(format!(
                        "{}: device wants a kick at {event:#x}, outside {} entries",
                        self.name, self.size
                    )));
                }
                // A small ring may have gone round since: a position comes again two laps later.
                Ok((before..self.made_available).any(|slot| self.position(slot) == event))
            }
            flags => {
                Err(Error::Device(format!("{}: device's event suppression has flags {flags:#x}", self.name)))
            }
        }
    }

    /// Asks for a call at the next used chain; true if one came meanwhile, so that sleeping would miss it.
    pub(crate) fn ask_for_call(&mut self) -> Result<bool, Error> {
        if self.event_index {
            let position = self.position(self.found_used);
            self.driver_word(0).store(position.to_le(), Ordering::Relaxed);
            self.driver_word(1).store(EVENT_DESCRIPTOR.to_le(), Ordering::Release);
        } else {
            self.driver_word(1).store(EVENT_ENABLE, Ordering::Relaxed);
        }
        // The wish must be visible before the descriptor is read: the device writes that, then reads the wish.
        fence(Ordering::SeqCst);
        Ok(self.waiting()? != 0)
    }

    /// Wants no call until the next `ask_for_call`.
    pub(crate) fn suppress_calls(&mut self) {
        self.driver_word(1).store(EVENT_DISABLE.to_le(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 4;
    const LAP_1_USED: u16 = DESCRIPTOR_AVAIL | DESCRIPTOR_USED;

    /// A ring in memory of the test's own, and the device's hands on it.
    struct Bench {
        /// Three pages, only touched through the ring's pointers.
        _memory: Box<[[u64; 512]; 3]>,
        ring: PackedRing,
    }

    impl Bench {
        fn new(features: u64) -> Self {
            let mut memory = Box::new([[0; 512]; 3]);
            let config = DriverConfig {
                name: String::new(),
                guest_address: 0,
                queue_size: SIZE,
                features,
                rx_kick: -1,
                rx_call: -1,
                tx_kick: -1,
                tx_call: -1,
                tap: None,
            };
            let base: *mut [u64; 512] = memory.as_mut_ptr();
            // SAFETY: each part is a page of the box, which lives as long as the ring.
            let ring = unsafe {
                PackedRing::new("rx", &config, [base.cast(), base.add(1).cast(), base.add(2).cast()])
            };
            Self { _memory: memory, ring }
        }

        fn offer(&mut self, index: u16) {
            self.ring.offer(&[Piece { index, address: 0x1000, length: 100 }], 100);
        }

        fn put(&mut self, place: u16, id: u16, length: u32, flags: u16) {
            let descriptor = self.ring.descriptor(place);
            // SAFETY: inside a descriptor, aligned as it is.
            unsafe {
                descriptor.add(8).cast::<u32>().write(length.to_le());
                descriptor.add(12).cast::<u16>().write(id.to_le());
            }
            self.ring.flags(place).store(flags.to_le(), Ordering::Relaxed);
        }

        fn want(&mut self, position: u16, flags: u16) {
            self.ring.device_word(0).store(position.to_le(), Ordering::Relaxed);
            self.ring.device_word(1).store(flags.to_le(), Ordering::Relaxed);
        }
    }

    #[test]
    fn what_comes_back_in_any_order_is_taken_and_offered_again() {
        let mut bench = Bench::new(0);
        (0..4).for_each(|index| bench.offer(index));
        for (place, id) in [(0, 2), (1, 0), (2, 3), (3, 1)] {
            bench.put(place, id, 60, LAP_1_USED | DESCRIPTOR_WRITE);
        }
        assert_eq!(bench.ring.waiting().unwrap(), 4);
        for id in [2, 0, 3, 1] {
            assert_eq!((bench.ring.peek(0).head, bench.ring.peek(0).length), (id, 60));
            bench.ring.take(id);
            bench.offer(id);
        }
        assert_eq!(bench.ring.waiting().unwrap(), 0);
        bench.put(0, 2, 60, DESCRIPTOR_WRITE);
        assert_eq!(bench.ring.waiting().unwrap(), 1, "in the second lap both bits are 0");
    }

    #[test]
    fn a_device_that_breaks_the_ring_is_found_out() {
        type Spoil = fn(&mut Bench);
        const USED: u16 = LAP_1_USED | DESCRIPTOR_WRITE;
        let cases: [(&str, Spoil); 8] = [
            ("names buffer 3, which is not with the device", |bench| bench.put(0, 3, 60, USED)),
            ("names buffer 9, which is not with the device", |bench| bench.put(0, 9, 60, USED)),
            ("names buffer 0, which is not with the device", |bench| {
                bench.put(0, 0, 60, USED);
                bench.put(1, 0, 60, USED);
            }),
            ("wrote 101 bytes into buffer 0, which has 100", |bench| bench.put(0, 0, 101, USED)),
            ("of buffer 0 has flags 0x0, not 0x2", |bench| bench.put(0, 0, 60, LAP_1_USED)),
            ("of buffer 0 has flags 0x3, not 0x2", |bench| bench.put(0, 0, 60, USED | DESCRIPTOR_NEXT)),
            ("descriptor 0 has flags 0x2, of no use in this lap", |bench| {
                bench.put(0, 0, 60, DESCRIPTOR_WRITE)
            }),
            ("descriptor 2 is marked used, nothing is with the device", |bench| {
                bench.put(0, 0, 60, USED);
                bench.put(1, 1, 60, USED);
                bench.put(2, 0, 60, USED);
            }),
        ];
        for (expected, spoil) in cases {
            let mut bench = Bench::new(0);
            bench.offer(0);
            bench.offer(1);
            spoil(&mut bench);
            let wrong = bench.ring.waiting().unwrap_err().to_string();
            assert!(wrong.contains(expected), "{expected}: {wrong}");
        }
    }

    #[test]
    fn a_kick_is_wanted_where_the_device_says_so() {
        for (features, position, flags, expected) in [
            (0, 0, EVENT_ENABLE, Ok(true)),
            (0, 0, EVENT_DISABLE, Ok(false)),
            (0, 0x8000, EVENT_DESCRIPTOR, Err("flags 0x2")),
            (FEATURE_EVENT_INDEX, 0x8001, EVENT_DESCRIPTOR, Ok(true)),
            (FEATURE_EVENT_INDEX, 0x8002, EVENT_DESCRIPTOR, Ok(false)),
            (FEATURE_EVENT_INDEX, 0x0001, EVENT_DESCRIPTOR, Ok(false)),
            (FEATURE_EVENT_INDEX, 0x8004, EVENT_DESCRIPTOR, Err("outside 4 entries")),
            (FEATURE_EVENT_INDEX, 0, 3, Err("flags 0x3")),
        ] {
            let mut bench = Bench::new(features);
            bench.want(position, flags);
            assert!(!bench.ring.wants_kick().unwrap(), "nothing was offered");
            bench.offer(0);
            bench.offer(1);
            match (bench.ring.wants_kick(), expected) {
                (Ok(wanted), Ok(expected)) => assert_eq!(wanted, expected, "{position:#x} {flags}"),
                (Err(wrong), Err(expected)) => assert!(wrong.to_string().contains(expected), "{wrong}"),
                (outcome, _) => panic!("{position:#x} {flags}: {outcome:?}"),
            }
        }
    }
}

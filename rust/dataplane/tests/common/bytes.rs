//! Bytes as a guest with one ring: how the ring is announced, then what the guest writes and the device does, in turn.
//!
//! ```text
//! flags, size, start (2 bytes), ledger length, ledger words (8 bytes each), then steps, each behind its kind
//! ```
//!
//! `tests/mutated.rs` gives it mutations of real rings, `fuzz/` whatever a fuzzer finds.
#![allow(dead_code)] // each fuzz target is one of the two

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::LazyLock;

use dataplane::chain::{Features, Layout};
use dataplane::ledger::{Ledger, Slot};
use dataplane::log::{RingLog, LOG_PAGE_SIZE};
use dataplane::memory::GuestMemory;
use dataplane::packed::{PackedRing, Position};
use dataplane::split::SplitRing;

use crate::dirty::{Dirty, Snapshot};
use crate::walk::{
    direction, guests_pages, memory, walk_packed, walk_split, Step, Write, DEVICE_AREA, DRIVER_AREA,
    ENTRIES_MAX, REGIONS, RX_RING, TX_RING,
};

/// Bits of the first byte.
const EVENT_INDEX: u8 = 1;
const INDIRECT: u8 = 2;
const FROM_GUEST: u8 = 4;
/// The ring begins where memory or the ledger says, not where the input does.
const RECOVERS: u8 = 8;
/// What the ring writes is logged, and its own writes as if it was elsewhere.
const LOGS_ELSEWHERE: u8 = 16;

/// An address behind the last region, which the log has a bit for.
const ELSEWHERE: u64 = REGIONS[2].0 + REGIONS[2].1;

/// Words of the ledger an input may set: the intent, and as many completions as a small batch has.
const LEDGER_WORDS_MAX: usize = 9;

/// Steps, by their kind; the lowest ones take a chain.
const KINDS: u8 = 16;
const COMPLETE: u8 = 6;
const UNTAKE: u8 = 7;
const PUBLISH: u8 = 8;
const CALL: u8 = 9;
const ARM: u8 = 10;
const DISARM: u8 = 11;
const WRITE: u8 = 12;
/// What guests write most, in fewer bytes: a descriptor of the ring, one of a table, a word beside the descriptors.
const RING_DESCRIPTOR: u8 = 13;
const TABLE_DESCRIPTOR: u8 = 14;
const WORD: u8 = 15;

/// Guest memory has two parts, told apart by the highest bit of a place.
const PARTS: [u64; 2] = [0x1_0000, 0x2_0000];
const PLACE_UPPER: u16 = 1 << 15;

/// An input as it was read.
#[derive(Debug)]
struct Guest {
    ring: u64,
    features: Features,
    size: u8,
    start: u16,
    recovers: bool,
    logs_elsewhere: bool,
    ledger: Vec<u64>,
    steps: Vec<Step>,
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn step(&mut self, ring: u64) -> Option<Step> {
        Some(match self.byte()? % KINDS {
            COMPLETE => Step::Complete { written: u32::from_le_bytes(self.array()?) },
            UNTAKE => Step::Untake { count: usize::from(self.byte()? % 4) },
            PUBLISH => Step::Publish,
            CALL => Step::Call,
            ARM => Step::Arm,
            DISARM => Step::Disarm,
            WRITE => {
                let address = self.place()?;
                let length = self.byte()?;
                Step::Write(Write { address, data: self.take(length.into())?.to_vec() })
            }
            RING_DESCRIPTOR => self.descriptor(ring)?,
            TABLE_DESCRIPTOR => self.descriptor(PARTS[1])?,
            WORD => {
                let field = self.byte()?;
                let area = if field & 0x80 == 0 { DRIVER_AREA } else { DEVICE_AREA };
                let address = ring + area + 2 * u64::from(field & 0x7f);
                Step::Write(Write { address, data: self.take(2)?.to_vec() })
            }
            _ => Step::Take,
        })
    }

    fn place(&mut self) -> Option<u64> {
        let place = u16::from_le_bytes(self.array()?);
        let part = PARTS[usize::from(place & PLACE_UPPER != 0)];
        Some(part + u64::from(place & !PLACE_UPPER))
    }

    /// A descriptor of one of the first entries behind `start`: its number, a place, a length, its last two words.
    fn descriptor(&mut self, start: u64) -> Option<Step> {
        let index = u64::from(self.byte()? % ENTRIES_MAX as u8);
        let mut data = self.place()?.to_le_bytes().to_vec();
        data.extend(u32::from(u16::from_le_bytes(self.array()?)).to_le_bytes());
        data.extend(self.take(4)?);
        Some(Step::Write(Write { address: start + 16 * index, data }))
    }
}

impl Guest {
    /// All bytes are a guest, but for those that are too few.
    fn read(data: &[u8]) -> Option<Self> {
        let mut bytes = Bytes(data);
        let [flags, size] = bytes.array()?;
        let start = u16::from_le_bytes(bytes.array()?);
        let words = usize::from(bytes.byte()?) % (LEDGER_WORDS_MAX + 1);
        let ledger = (0..words).map(|_| bytes.array().map(u64::from_le_bytes)).collect::<Option<_>>()?;
        let ring = if flags & FROM_GUEST == 0 { RX_RING } else { TX_RING };
        Some(Self {
            ring,
            features: Features { event_index: flags & EVENT_INDEX != 0, indirect: flags & INDIRECT != 0 },
            size,
            start,
            recovers: flags & RECOVERS != 0,
            logs_elsewhere: flags & LOGS_ELSEWHERE != 0,
            ledger,
            steps: std::iter::from_fn(|| bytes.step(ring)).collect(),
        })
    }

    /// Where its ring marks what it writes.
    fn ring_log(&self, dirty: &Dirty, layout: &Layout) -> RingLog {
        let here = dirty.of(layout);
        RingLog { device_area: if self.logs_elsewhere { Some(ELSEWHERE) } else { here.device_area }, ..here }
    }

    /// All that changed is marked, and the device area where it is said to be.
    fn check(&self, dirty: &Dirty, before: &Snapshot, memory: &GuestMemory, layout: &Layout) {
        let mut others = guests_pages(&self.steps);
        let page = layout.device_area / LOG_PAGE_SIZE;
        if self.logs_elsewhere {
            let is_changed = dirty.changed(before, memory).contains(&page) && !others.contains(&page);
            assert!(!is_changed || dirty.pages().contains(&(ELSEWHERE / LOG_PAGE_SIZE)));
            others.insert(page);
        }
        dirty.check(before, memory, &others);
    }

    /// Where a ring of `size` entries is.
    fn layout(&self, size: u16) -> Layout {
        assert!(size <= ENTRIES_MAX);
        Layout {
            size: size.into(),
            descriptor_area: self.ring,
            driver_area: self.ring + DRIVER_AREA,
            device_area: self.ring + DEVICE_AREA,
        }
    }
}

/// A split ring whose guest writes what it likes.
pub fn split(data: &[u8]) {
    let Some(guest) = Guest::read(data) else { return };
    let memory = memory();
    let size = 1 << (u32::from(guest.size) % (ENTRIES_MAX.ilog2() + 1));
    let mut ring = SplitRing::new(&guest.layout(size), guest.features, &memory).expect("the layout is right");
    let dirty = Dirty::new(&REGIONS);
    let before = dirty.look(&memory);
    let layout = guest.layout(size);
    ring.set_log(Some(guest.ring_log(&dirty, &layout)));
    assert_eq!(ring.check_log(), Ok(()));
    ring.begin((!guest.recovers).then_some(guest.start), true);
    walk_split(&mut ring, &memory, direction(guest.ring), &guest.steps);
    guest.check(&dirty, &before, &memory, &layout);
}

/// A packed ring whose guest writes what it likes, and whose ledger says what it likes.
pub fn packed(data: &[u8]) {
    let Some(guest) = Guest::read(data) else { return };
    let memory = memory();
    let size = 1 + u16::from(guest.size) % ENTRIES_MAX;
    let ledger = ledger_of(&guest.ledger);
    let dirty = Dirty::new(&REGIONS);
    let layout = guest.layout(size);
    let new = || {
        let mut ring = PackedRing::new(&layout, guest.features, &memory, Some(ledger.clone()))
            .expect("the layout is right");
        ring.set_log(Some(guest.ring_log(&dirty, &layout)));
        assert_eq!(ring.check_log(), Ok(()));
        ring
    };
    let mut ring = new();
    // A guest has written before anybody recovers.
    let (before, after) = guest.steps.split_at(if guest.recovers { guest.steps.len() / 2 } else { 0 });
    for step in before {
        if let Step::Write(write) = step {
            write.make(&memory);
        }
    }
    let looked = dirty.look(&memory);
    let was = guest.recovers.then(|| all_but_ring(&memory, guest.ring, size));
    let start = Position::from_bits(guest.start);
    let start = Position { index: start.index % size, wrap: start.wrap };
    let begun = ring.begin((!guest.recovers).then_some(start.bits()), true);
    if let Some(was) = was {
        assert_eq!(
            all_but_ring(&memory, guest.ring, size),
            was,
            "a recovery tells of used descriptors, no more"
        );
    }
    if begun.is_err() {
        assert!(guest.recovers);
        return;
    }
    assert!(Position::from_bits(ring.position_before(0)).index < size);
    let position = walk_packed(&mut ring, &memory, direction(guest.ring), after);
    // A successor goes on there, whatever the guest wrote meanwhile.
    assert_eq!(new().recover(), Ok(Position::from_bits(position)));
    guest.check(&dirty, &looked, &memory, &layout);
}

/// The ledger of this process, which says what the input wants it to.
fn ledger_of(words: &[u64]) -> Slot {
    static LEDGER: LazyLock<(OwnedFd, Slot)> = LazyLock::new(|| {
        let file = Ledger::create(1).expect("a memfd");
        let slot = Ledger::map(file.as_raw_fd(), 1).expect("it is a ledger").slot(0).expect("it has a slot");
        (file, slot)
    });
    let mut bytes = [0; 8 * LEDGER_WORDS_MAX];
    for (place, word) in bytes.chunks_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    // SAFETY: the buffer is as long as we say.
    let put = unsafe { libc::pwrite(LEDGER.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    assert_eq!(put, bytes.len() as isize);
    LEDGER.1.clone()
}

/// What stands in memory beside the ring of descriptors.
fn all_but_ring(memory: &GuestMemory, ring: u64, size: u16) -> Vec<u8> {
    let mut all = Vec::new();
    for (start, length) in REGIONS {
        let from = if start == ring { 16 * u64::from(size) } else { 0 };
        let mut data = vec![0; (length - from) as usize];
        memory.read(start + from, &mut data).expect("it is memory");
        all.extend(data);
    }
    all
}

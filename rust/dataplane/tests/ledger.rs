//! The ledger: whoever runs a packed ring may die at any instruction, and a successor goes on exactly.

mod common;
#[path = "common/victim.rs"]
mod victim;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use common::{memory, PackedQueue, AVAIL, MEMORY_START, USED, WRITE};
use dataplane::chain::{Direction, Features, RingError, CHAIN_BUFFERS_MAX};
use dataplane::ledger::{Ledger, Slot};
use dataplane::memory::GuestMemory;
use dataplane::packed::{PackedRing, Position};
use victim::Victim;

const HEADER: usize = 12;
const RING: u64 = MEMORY_START;
const BUFFERS: u64 = MEMORY_START + 0x10_0000;
const ALL: Features = Features { event_index: true, indirect: true };

/// Bytes of a slot that these tests reach: the intent and some entries of the log.
const SLOT_BYTES: usize = 8 * 16;

/// What the first process tells of a buffer, and what its successor does.
const WRITTEN_BEFORE: u32 = 70;
const WRITTEN_AFTER: u32 = 50;

/// A ring in guest memory with its ledger.
struct Place {
    memory: Arc<GuestMemory>,
    file: OwnedFd,
    slot: Slot,
}

impl Place {
    fn new() -> Self {
        let file = Ledger::create(1).unwrap();
        let slot = Ledger::map(file.as_raw_fd(), 1).unwrap().slot(0).unwrap();
        Self { memory: memory(), file, slot }
    }

    fn ring(&self, queue: &PackedQueue) -> PackedRing {
        PackedRing::new(&queue.layout, ALL, &self.memory, Some(self.slot.clone())).unwrap()
    }

    fn read_ledger(&self) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        let fd = self.file.as_raw_fd();
        // SAFETY: the buffer is as long as we say.
        assert_eq!(unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), SLOT_BYTES, 0) }, SLOT_BYTES as isize);
        bytes
    }

    fn write_ledger(&self, bytes: &[u8]) {
        let fd = self.file.as_raw_fd();
        // SAFETY: the buffer is as long as we say.
        assert_eq!(unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), 0) }, bytes.len() as isize);
    }
}

/// Takes every chain there is and tells the guest of all of them at once.
fn turn(ring: &mut PackedRing, buffers: &mut Vec<libc::iovec>, written: u32) {
    buffers.clear();
    while let Ok(Some(chain)) = ring.take(Direction::ToGuest, HEADER, buffers) {
        ring.complete(&chain, written);
    }
    ring.publish();
}

/// The chains that the guest offers before each turn, by their slots. All of them go through a ring of five entries,
/// some across its end.
const TURNS: [&[u16]; 11] =
    [&[1], &[2], &[1, 1], &[3], &[1, 2, 1], &[], &[1, 1, 1, 1, 1], &[5], &[2, 3], &[1, 1], &[4]];
const SIZE: u16 = 5;

/// Runs `TURNS` in a child.
fn victim(place: &Place, queue: &PackedQueue) -> Victim {
    let mut ring = place.ring(queue);
    let mut buffers = Vec::with_capacity(64);
    ring.begin(Some(queue.next_avail.bits()), true).unwrap();
    Victim::new(TURNS.len(), move |_| turn(&mut ring, &mut buffers, WRITTEN_BEFORE))
}

/// A successor of a process that left `ring` and `ledger`: the guest gets each of its `chains` back, once and in order.
/// Gives how many the successor served itself.
fn succeed(
    spare: &Place,
    guest: &PackedQueue,
    ring: &[u8],
    ledger: &[u8],
    chains: &[(u16, u16)],
) -> Result<usize, String> {
    spare.memory.write(RING, ring).unwrap();
    spare.write_ledger(ledger);
    let mut successor = spare.ring(guest);
    successor.begin(None, true).map_err(|error| error.to_string())?;
    assert!(successor.call_due(), "a call may have been lost");
    turn(&mut successor, &mut Vec::new(), WRITTEN_AFTER);
    let mut seen = PackedQueue { memory: Arc::clone(&spare.memory), ..*guest };
    let mut served = 0;
    for &(id, slots) in chains {
        let used = seen.next_used(slots).ok_or(format!("{id} never came back"))?;
        match used {
            (told, WRITTEN_BEFORE, WRITE) if told == id && served == 0 => {}
            (told, WRITTEN_AFTER, WRITE) if told == id => served += 1,
            other => return Err(format!("{other:?} came back for {id}")),
        }
    }
    if seen.next_used != seen.next_avail {
        return Err(format!("positions {:?} and {:?}", seen.next_used, seen.next_avail));
    }
    match Position::from_bits(successor.position_before(0)) {
        position if position == seen.next_avail => Ok(served),
        position => Err(format!("the successor stands at {position:?}, the guest at {:?}", seen.next_avail)),
    }
}

#[test]
fn a_process_that_dies_at_any_instruction_is_succeeded_exactly() {
    for start in [Position::START, Position { index: 4, wrap: false }] {
        let (place, spare) = (Place::new(), Place::new());
        let mut guest = PackedQueue::new(&place.memory, RING, SIZE, start);
        let victim = victim(&place, &guest);
        let mut id = 0;
        let mut deaths = 0;
        for (number, offered) in TURNS.iter().enumerate() {
            let mut chains = Vec::new();
            for &slots in *offered {
                id += 1;
                guest.offer_chain(&vec![(BUFFERS, 100); slots.into()], id, WRITE);
                chains.push((id, slots));
            }
            let mut last = None;
            let mut outcomes = Vec::new();
            let mut look = || {
                let now = (guest.get::<{ 16 * SIZE as usize }>(RING), place.read_ledger());
                if last.as_ref() != Some(&now) {
                    deaths += 1;
                    let outcome = succeed(&spare, &guest, &now.0, &now.1, &chains);
                    outcomes.push(
                        outcome.unwrap_or_else(|wrong| panic!("turn {number}, death {deaths}: {wrong}")),
                    );
                    last = Some(now);
                }
            };
            look();
            victim.turn(&mut look);
            look();
            // First the successor serves everything itself; from the intent on it finishes what was begun.
            assert_eq!(outcomes.first(), Some(&chains.len()));
            assert_eq!(outcomes.last(), Some(&0));
            assert!(outcomes.is_sorted_by(|before, after| before >= after), "{outcomes:?}");
            for (id, slots) in chains {
                assert_eq!(guest.next_used(slots), Some((id, WRITTEN_BEFORE, WRITE)));
            }
        }
        // Each chain is four stores at least: its entry in the log, its length, its id, its flags.
        assert!(deaths > 4 * usize::from(id), "{deaths} deaths were tried");
    }
}

#[test]
fn a_guest_that_offers_its_buffers_again_meanwhile_is_served_on() {
    let place = Place::new();
    let mut guest = PackedQueue::new(&place.memory, RING, SIZE, Position::START);
    let mut first = place.ring(&guest);
    first.begin(Some(Position::START.bits()), true).unwrap();
    for lap in 0..5 {
        for id in 0..SIZE {
            guest.offer(BUFFERS, 100, id, WRITE);
        }
        turn(&mut first, &mut Vec::new(), WRITTEN_BEFORE);
        for id in 0..SIZE {
            assert_eq!(guest.next_used(1), Some((id, WRITTEN_BEFORE, WRITE)), "lap {lap}");
        }
    }
    // The whole ring is offered again: the last batch's first descriptor is the next lap's first.
    for id in 0..SIZE {
        guest.offer(BUFFERS, 100, id, WRITE);
    }
    let mut second = place.ring(&guest);
    second.begin(None, true).unwrap();
    turn(&mut second, &mut Vec::new(), WRITTEN_AFTER);
    for id in 0..SIZE {
        assert_eq!(guest.next_used(1), Some((id, WRITTEN_AFTER, WRITE)));
    }
}

#[test]
fn a_ring_that_ran_nowhere_goes_on_where_it_was_settled() {
    let place = Place::new();
    let queue = PackedQueue::new(&place.memory, RING, SIZE, Position::START);
    let mut ring = place.ring(&queue);
    assert_eq!(ring.begin(None, true), Err(RingError::PositionUnknown));
    place.slot.settle(Position { index: 3, wrap: false });
    assert_eq!(ring.position_in_ledger(), Ok(Position { index: 3, wrap: false }));
    ring.begin(None, true).unwrap();
    assert_eq!(ring.position_before(0), 3);
}

/// An intent as the ledger has it.
fn intent(from: u16, to: u16, count: u16) -> [u8; 8] {
    (u64::from(from) | u64::from(to) << 16 | u64::from(count) << 32 | 1 << 63).to_le_bytes()
}

/// An entry of the log.
fn entry(position: u16) -> [u8; 8] {
    u64::from(position).to_le_bytes()
}

#[test]
fn a_ledger_that_cannot_be_is_refused_and_guest_memory_stays_as_it_is() {
    let entries = |first, second| [intent(0x8000, 0x8002, 2), entry(first), entry(second)].concat();
    let count = u16::try_from(CHAIN_BUFFERS_MAX).unwrap() + 1;
    let cases = [
        (vec![0; 8], RingError::PositionUnknown),
        (intent(0x8000, 0x8005, 0).to_vec(), RingError::Position { index: 5, size: SIZE }),
        (intent(0x8005, 0x8000, 0).to_vec(), RingError::Position { index: 5, size: SIZE }),
        (intent(0x8000, 0x8001, count).to_vec(), RingError::LedgerLength { count }),
        (entries(0x8001, 0x8000), RingError::LedgerMixed { from: 0x8000 }),
        (entries(0x8000, 0xffff), RingError::Position { index: 0x7fff, size: SIZE }),
    ];
    for (bytes, expected) in cases {
        let place = Place::new();
        let mut guest = PackedQueue::new(&place.memory, RING, SIZE, Position::START);
        guest.offer(BUFFERS, 100, 7, WRITE);
        guest.offer(BUFFERS, 100, 8, WRITE);
        let before = guest.get::<{ 16 * SIZE as usize }>(RING);
        place.write_ledger(&bytes);
        let mut ring = place.ring(&guest);
        assert_eq!(ring.begin(None, true), Err(expected));
        assert_eq!(guest.get::<{ 16 * SIZE as usize }>(RING), before);
    }
    // The one that can be, for comparison.
    let place = Place::new();
    let mut guest = PackedQueue::new(&place.memory, RING, SIZE, Position::START);
    guest.offer(BUFFERS, 100, 7, WRITE);
    guest.offer(BUFFERS, 100, 8, WRITE);
    place.write_ledger(&entries(0x8000, 0x8001));
    place.ring(&guest).begin(None, true).unwrap();
    let flags = |index: u64| u16::from_le_bytes(guest.get(RING + 16 * index + 14));
    assert_eq!((flags(0), flags(1)), (AVAIL | USED, AVAIL | USED));
}

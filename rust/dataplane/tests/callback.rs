//! Chains that are handed out: completed in any order, kept, given back, and handed out again by a successor.

mod common;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use common::{
    eventfd, is_mapped, memfd, memory, memory_of, pipe, readable, region, truncate, PackedQueue, Queue,
    INDIRECT, MEMORY_SIZE, MEMORY_START, NEXT, WRITE,
};
use dataplane::callback::{
    CallbackConfig, CallbackCorrection, CallbackQueues, Completed, Error, HandedOut, DATA_SIZE_MAX,
};
use dataplane::chain::{Features, Layout};
use dataplane::in_flight::InFlight;
use dataplane::ledger::Ledger;
use dataplane::memory::GuestMemory;
use dataplane::packed::Position;
use dataplane::sys::{drain, signal};
use dataplane::{CallbackCounters, Format, RingSpec};

const RINGS: usize = 2;
const SIZE: u16 = 8;
const RING_DISTANCE: u64 = 0x1_0000;
const BUFFERS: u64 = MEMORY_START + 0x10_0000;

/// Where each chain has its buffers: a page of its own.
fn buffer(ring: usize, head: u16) -> u64 {
    BUFFERS + 0x10_0000 * ring as u64 + 0x1000 * u64::from(head)
}

/// A guest with two split rings, whatever serves them.
struct Guest {
    memory: Arc<GuestMemory>,
    queues: [Queue; RINGS],
    /// Kick, call and error of each ring.
    ends: [[OwnedFd; 3]; RINGS],
    file: OwnedFd,
}

impl Guest {
    fn new() -> Self {
        Self::in_memory(memory())
    }

    fn in_memory(memory: Arc<GuestMemory>) -> Self {
        let queue =
            |ring: usize| Queue::new(&memory, MEMORY_START + RING_DISTANCE * ring as u64, SIZE, 0xfffe);
        let queues = [queue(0), queue(1)];
        let ends = [(); RINGS].map(|()| [(); 3].map(|()| eventfd()));
        Self { memory, queues, ends, file: InFlight::create(RINGS).unwrap() }
    }

    fn spec(&self, ring: usize, in_flight: &Arc<InFlight>) -> RingSpec {
        let [kick, call, error] = self.ends[ring].each_ref().map(AsRawFd::as_raw_fd);
        RingSpec {
            layout: self.queues[ring].layout,
            kick_fd: kick,
            call_fd: Some(call),
            error_fd: Some(error),
            next_avail: None,
            ledger: None,
            in_flight: in_flight.slot(ring),
            log: None,
        }
    }

    /// Offers a chain of a readable buffer with `text` and a writable one of 100 bytes, and kicks.
    fn offer(&mut self, ring: usize, head: u16, text: &[u8]) {
        let address = buffer(ring, head);
        let queue = &mut self.queues[ring];
        queue.put(address, text);
        queue.descriptor(head, address, text.len() as u32, NEXT, head + SIZE / 2);
        queue.descriptor(head + SIZE / 2, address + 0x800, 100, WRITE, 0);
        queue.offer(head);
        signal(self.ends[ring][0].as_raw_fd());
    }

    /// The next chain that the guest has back: its head and what was written into it.
    fn next_used(&mut self, ring: usize) -> Option<(u16, Vec<u8>)> {
        let (head, written) = self.queues[ring].next_used()?;
        let mut data = vec![0; written as usize];
        self.memory.read(buffer(ring, head) + 0x800, &mut data).unwrap();
        Some((head, data))
    }

    fn all_used(&mut self, ring: usize) -> Vec<(u16, Vec<u8>)> {
        std::iter::from_fn(|| self.next_used(ring)).collect()
    }

    fn is_called(&self, ring: usize) -> bool {
        drain(self.ends[ring][1].as_raw_fd()).unwrap()
    }
}

/// A process that serves the guest's rings.
struct Server {
    in_flight: Arc<InFlight>,
    event: OwnedFd,
    queues: CallbackQueues,
}

impl Server {
    fn new(guest: &Guest) -> Self {
        let in_flight = InFlight::map(guest.file.as_raw_fd(), RINGS).unwrap();
        let event = eventfd();
        let queues = CallbackQueues::new(RINGS, event.as_raw_fd());
        let server = Self { in_flight, event, queues };
        server.configure(guest, [true; RINGS]);
        server
    }

    fn started(guest: &Guest) -> Self {
        let server = Self::new(guest);
        server.queues.start().unwrap();
        server
    }

    fn config(&self, guest: &Guest, rings: [bool; RINGS]) -> CallbackConfig {
        CallbackConfig {
            memory: Arc::clone(&guest.memory),
            format: Format::Split,
            features: Features { event_index: false, indirect: true },
            rings: (0..RINGS).map(|ring| rings[ring].then(|| guest.spec(ring, &self.in_flight))).collect(),
        }
    }

    fn configure(&self, guest: &Guest, rings: [bool; RINGS]) {
        self.queues.configure(&self.config(guest, rings)).unwrap();
    }

    fn is_ready(&self) -> bool {
        readable(self.queues.fd().unwrap().unwrap(), Duration::ZERO)
    }

    /// Takes all there is.
    fn take(&self) -> Vec<HandedOut> {
        std::iter::from_fn(|| self.queues.take()).collect()
    }

    fn complete(&self, chain: &HandedOut, data: &[u8]) -> Completed {
        self.queues.complete(chain, data).unwrap()
    }

    /// The reason why the one ring that failed did, which everybody was told.
    fn failure(&self, guest: &Guest, ring: usize) -> String {
        let errors = self.queues.take_ring_errors();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert_eq!(errors[0].0, ring);
        assert!(drain(self.event.as_raw_fd()).unwrap());
        assert!(drain(guest.ends[ring][2].as_raw_fd()).unwrap());
        assert!(self.queues.failed()[ring]);
        errors[0].1.clone()
    }
}

fn texts(chains: &[HandedOut]) -> Vec<(usize, &[u8])> {
    chains.iter().map(|chain| (chain.ring, chain.readable.as_slice())).collect()
}

#[test]
fn chains_are_read_and_completed_in_any_order_and_the_guest_is_called() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    assert!(guest.is_called(0), "a call may have been lost before");
    guest.offer(0, 2, b"first");
    guest.offer(0, 1, b"second");
    guest.offer(0, 3, b"third");
    assert!(server.is_ready());
    let chains = server.take();
    assert_eq!(texts(&chains), [(0, &b"first"[..]), (0, b"second"), (0, b"third")]);
    assert!(chains.iter().all(|chain| chain.writable == 100 && !chain.was_taken));
    assert_eq!(server.queues.positions(), [Some(1), Some(0xfffe)]);
    assert!(!server.is_ready());
    assert_eq!(server.complete(&chains[1], b"two"), Completed::Now);
    assert!(guest.is_called(0));
    assert_eq!(server.complete(&chains[2], b""), Completed::Now);
    assert_eq!(server.complete(&chains[0], &[7; 100]), Completed::Now);
    assert_eq!(guest.all_used(0), [(1, b"two".to_vec()), (3, vec![]), (2, vec![7; 100])]);
    assert_eq!(server.queues.stop(), [Some(1), Some(0xfffe)]);
    let counters = server.queues.counters();
    let expected = CallbackCounters { chains: 3, bytes_read: 16, bytes_written: 103, kicks: 1, calls: 4 };
    assert_eq!(counters, [expected, CallbackCounters { calls: 1, ..CallbackCounters::default() }]);
}

#[test]
fn each_ring_has_its_turn() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    for head in 0..3 {
        guest.offer(0, head, b"zero");
    }
    guest.offer(1, 0, b"one");
    let rings: Vec<_> = server.take().iter().map(|chain| chain.ring).collect();
    assert_eq!(rings, [0, 1, 0, 0]);
}

#[test]
fn what_is_slept_on_is_quiet_until_the_guest_kicks_and_while_the_rings_stand_still() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    assert!(server.is_ready(), "what was there before the start is to be looked for");
    assert_eq!(server.take().len(), 0);
    assert!(!server.is_ready());
    guest.offer(0, 0, b"a");
    assert!(server.is_ready());
    server.queues.stop();
    assert!(!server.is_ready());
    assert_eq!(server.take().len(), 0);
    assert!(readable(guest.ends[0][0].as_raw_fd(), Duration::ZERO), "the kick is left for a successor");
    server.queues.start().unwrap();
    assert_eq!(server.take().len(), 1);
    server.queues.close();
    assert_eq!(server.queues.fd().unwrap(), None);
    assert_eq!(server.queues.start(), Err(Error::Closed));
}

#[test]
fn what_is_completed_while_the_rings_stand_still_is_told_at_the_next_start() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    guest.offer(0, 1, b"b");
    let chains = server.take();
    server.queues.stop();
    assert_eq!(server.complete(&chains[1], b"later"), Completed::AtStart);
    let twice = Error::CompletedTwice { ring: 0, head: 1 };
    assert_eq!(server.queues.complete(&chains[1], b"again"), Err(twice));
    assert_eq!(guest.all_used(0), []);
    server.queues.start().unwrap();
    assert_eq!(guest.all_used(0), [(1, b"later".to_vec())]);
    assert_eq!(server.take().len(), 0, "what was handed out is not handed out again");
    assert_eq!(server.complete(&chains[0], b"now"), Completed::Now);
    assert_eq!(guest.all_used(0), [(0, b"now".to_vec())]);
}

#[test]
fn what_was_kept_is_too_late_after_a_release_and_a_successor_is_handed_the_chain() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    let chains = server.take();
    server.queues.stop();
    assert_eq!(server.complete(&chains[0], b"kept"), Completed::AtStart);
    server.queues.release();
    let successor = Server::started(&guest);
    let again = successor.take();
    assert_eq!((texts(&again), again[0].was_taken), (vec![(0, &b"a"[..])], true));
    assert_eq!(successor.complete(&again[0], b"new"), Completed::Now);
    server.configure(&guest, [true; RINGS]);
    assert_eq!(
        server.queues.complete(&chains[0], b"").unwrap_err().to_string(),
        "the chain at descriptor 0 of ring 0 is completed already"
    );
    assert_eq!(guest.all_used(0), [(0, b"new".to_vec())]);
}

#[test]
fn a_successor_is_handed_chains_in_flight_first_and_in_their_order() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    for (head, text) in [(3, b"a"), (0, b"b"), (2, b"c"), (1, b"d")] {
        guest.offer(0, head, text);
    }
    guest.offer(1, 1, b"z");
    let chains = server.take();
    let second = chains.iter().find(|chain| chain.readable == b"b").unwrap();
    server.complete(second, b"done");
    assert_eq!(guest.all_used(0), [(0, b"done".to_vec())]);
    guest.offer(0, 0, b"e");
    assert_eq!(server.queues.stop(), [Some(2), Some(0xffff)]);

    let successor = Server::new(&guest);
    successor.queues.set_positions(&[Some(2), Some(0xffff)]).unwrap();
    assert_eq!(successor.queues.positions(), [Some(2), Some(0xffff)]);
    successor.queues.start().unwrap();
    let again = successor.take();
    let of_ring_0: Vec<_> = again.iter().filter(|chain| chain.ring == 0).collect();
    let read: Vec<_> = of_ring_0.iter().map(|chain| (chain.readable[0], chain.was_taken)).collect();
    assert_eq!(read, [(b'a', true), (b'c', true), (b'd', true), (b'e', false)]);
    assert_eq!(successor.queues.take_corrections(), []);
    for chain in &again {
        assert_eq!(successor.complete(chain, b"x"), Completed::Now);
    }
    assert_eq!(guest.all_used(0).len(), 4);
    assert_eq!(guest.all_used(1).len(), 1);
    assert_eq!(successor.queues.stop(), [Some(3), Some(0xffff)]);
}

#[test]
fn a_ring_begins_where_its_chains_say_and_tells_of_another_position() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    assert_eq!(server.take().len(), 1);
    server.queues.stop();
    let successor = Server::new(&guest);
    assert_eq!(successor.queues.positions(), [Some(0xffff), Some(0xfffe)], "untold");
    successor.queues.set_positions(&[Some(5), Some(0xfffe)]).unwrap();
    successor.queues.start().unwrap();
    assert!(drain(successor.event.as_raw_fd()).unwrap());
    let correction = CallbackCorrection { ring: 0, told: 5, begun: 0xffff };
    assert_eq!(successor.queues.take_corrections(), [correction]);
}

#[test]
fn whoever_takes_the_rings_back_knows_what_the_other_did() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    for head in 0..3 {
        guest.offer(0, head, &[head as u8]);
    }
    let chains = server.take();
    server.queues.stop();
    server.complete(&chains[2], b"kept");
    {
        let other = Server::started(&guest);
        let again = other.take();
        assert_eq!(again.len(), 3);
        other.complete(&again[0], b"other");
        other.complete(&again[2], b"other");
        assert_eq!(guest.all_used(0).len(), 2);
        // The guest offers the first one again, and the other process takes it.
        guest.offer(0, 0, b"new");
        assert_eq!(other.take().len(), 1);
        // It dies here.
    }
    server.queues.set_positions(&[None; RINGS]).unwrap();
    server.queues.start().unwrap();
    assert_eq!(guest.all_used(0), [], "what was kept here was completed there");
    let again = server.take();
    assert_eq!(texts(&again), [(0, &b"new"[..])], "the second one is still in flight here");
    assert_eq!(server.complete(&chains[0], b"late"), Completed::TooLate);
    assert_eq!(server.complete(&chains[1], b"mine"), Completed::Now);
    assert_eq!(server.complete(&again[0], b"mine"), Completed::Now);
    assert_eq!(guest.all_used(0), [(1, b"mine".to_vec()), (0, b"mine".to_vec())]);
}

#[test]
fn chains_are_given_back_unused_and_in_order_when_the_frontend_stops_a_ring() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    for head in [3, 1, 2] {
        guest.offer(0, head, b"a");
    }
    guest.offer(1, 0, b"stays");
    let chains = server.take();
    assert_eq!(server.queues.give_back(0), Err(Error::Running));
    server.queues.stop();
    let middle = chains.iter().find(|chain| chain.ring == 0 && chain.head == 1).unwrap();
    server.complete(middle, b"kept");
    guest.is_called(0);
    assert_eq!(server.queues.give_back(0), Ok(2));
    assert!(guest.is_called(0));
    assert_eq!(guest.all_used(0), [(1, b"kept".to_vec()), (3, vec![]), (2, vec![])]);
    assert_eq!(server.queues.positions(), [Some(1), Some(0xffff)]);
    assert_eq!(server.queues.give_back(0), Ok(0));
    server.configure(&guest, [false, true]);
    assert_eq!(server.queues.give_back(0), Err(Error::NotConfigured));
    server.queues.start().unwrap();
    let other = chains.iter().find(|chain| chain.ring == 1).unwrap();
    assert_eq!(server.complete(other, b"x"), Completed::Now, "the other ring goes on");
    let late = chains.iter().find(|chain| chain.head == 3).unwrap();
    assert_eq!(server.complete(late, b"x"), Completed::TooLate);
    assert_eq!(guest.all_used(0), []);
}

#[test]
fn a_successor_can_give_back_what_it_never_took() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 3, b"a");
    guest.offer(0, 1, b"b");
    assert_eq!(server.take().len(), 2);
    server.queues.stop();
    let successor = Server::new(&guest);
    assert_eq!(successor.queues.give_back(0), Ok(2));
    assert_eq!(guest.all_used(0), [(3, vec![]), (1, vec![])]);
    assert_eq!(successor.queues.positions()[0], Some(0));
}

#[test]
fn a_ring_that_is_not_served_for_a_while_hands_its_chains_out_again() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    let chains = server.take();
    server.queues.stop();
    server.configure(&guest, [false, true]);
    server.queues.start().unwrap();
    assert_eq!(server.complete(&chains[0], b"x"), Completed::TooLate);
    server.queues.stop();
    server.configure(&guest, [true, true]);
    server.queues.start().unwrap();
    let again = server.take();
    assert_eq!(texts(&again), [(0, &b"a"[..])]);
    assert_eq!(server.complete(&again[0], b"y"), Completed::Now);
    assert_eq!(guest.all_used(0), [(0, b"y".to_vec())]);
}

#[test]
fn a_ring_that_was_set_up_again_has_nothing_in_flight_and_may_have_another_size() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 1, b"a");
    let chains = server.take();
    server.queues.stop();
    guest.queues[0] = Queue::new(&guest.memory, MEMORY_START, 2 * SIZE, 0);
    assert!(server.in_flight.forget(0));
    assert!(!server.in_flight.forget(RINGS));
    server.configure(&guest, [true; RINGS]);
    server.queues.start().unwrap();
    assert_eq!(server.queues.positions()[0], Some(0));
    assert_eq!(server.complete(&chains[0], b"x"), Completed::TooLate);
    guest.offer(0, 1, b"b");
    let chains = server.take();
    assert_eq!(texts(&chains), [(0, &b"b"[..])]);
    server.complete(&chains[0], b"x");
    assert_eq!(guest.all_used(0), [(1, b"x".to_vec())]);
}

#[test]
fn a_chain_has_room_for_what_it_says_and_stays_in_flight_if_that_is_too_little() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 1, b"a");
    let chains = server.take();
    let error = server.queues.complete(&chains[0], &[0; 101]).unwrap_err();
    let text = "101 bytes for the chain at descriptor 1 of ring 0, which has room for 100";
    assert_eq!(error.to_string(), text);
    assert_eq!(server.complete(&chains[0], &[1; 100]), Completed::Now);
    let error = server.queues.complete(&chains[0], b"").unwrap_err();
    assert_eq!(error, Error::CompletedTwice { ring: 0, head: 1 });
    assert_eq!(guest.all_used(0), [(1, vec![1; 100])]);
}

#[test]
fn a_guest_can_neither_fill_this_process_nor_be_offered_endless_room() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    let queue = &mut guest.queues[0];
    let table = BUFFERS + 0x20_0000;
    // The longest chains there may be, all of the same bytes.
    for index in 0..2u64 {
        let (flags, length) = if index == 0 { (NEXT, DATA_SIZE_MAX as u32) } else { (WRITE, 0x20_0000) };
        queue.descriptor_at(table + 16 * index, BUFFERS, length, flags, 1);
    }
    for head in 0..8 {
        queue.descriptor(head, table, 32, INDIRECT, 0);
        queue.offer(head);
    }
    let chains = server.take();
    assert_eq!(chains.len(), 8, "a ring of 8 entries may hold a MiB");
    assert!(chains.iter().all(|chain| chain.writable == DATA_SIZE_MAX));
    server.complete(&chains[0], b"");
    let queue = &mut guest.queues[0];
    queue.offer(0);
    assert_eq!(server.take().len(), 1);
    assert!(!server.is_ready());
    // One byte more than may be read.
    queue.descriptor_at(table, BUFFERS, DATA_SIZE_MAX as u32 + 1, NEXT, 1);
    server.complete(&chains[1], b"");
    guest.queues[0].offer(1);
    assert_eq!(server.take().len(), 0);
    assert_eq!(
        server.failure(&guest, 0),
        "a descriptor chain has 131073 bytes for the device to read, limit is 131072"
    );
}

#[test]
fn a_ring_of_which_enough_is_in_flight_waits_and_goes_on_when_a_chain_is_completed() {
    let mut guest = Guest::in_memory(memory());
    guest.queues[0] = Queue::new(&guest.memory, MEMORY_START, 16, 0);
    let server = Server::started(&guest);
    for head in 0..16 {
        guest.queues[0].descriptor(head, BUFFERS, DATA_SIZE_MAX as u32, 0, 0);
        guest.queues[0].offer(head);
    }
    signal(guest.ends[0][0].as_raw_fd());
    let chains = server.take();
    assert_eq!(chains.len(), 8);
    assert!(!server.is_ready());
    server.complete(&chains[3], b"");
    assert!(server.is_ready());
    assert_eq!(server.take().len(), 1);
}

/// What a guest did, and why its ring failed.
type Hostile = (&'static str, fn(&mut Queue), &'static str);

#[test]
fn a_guest_that_lies_loses_its_ring_and_no_other() {
    const OUTSIDE: u64 = MEMORY_START + MEMORY_SIZE;
    let cases: [Hostile; 8] = [
        (
            "direction",
            |queue| {
                queue.descriptor(0, BUFFERS, 64, WRITE | NEXT, 1);
                queue.descriptor(1, BUFFERS, 64, 0, 0);
                queue.offer(0);
            },
            "descriptor 1 is read-only and stands behind a write-only one of its chain",
        ),
        (
            "loop",
            |queue| {
                queue.descriptor(0, BUFFERS, 64, NEXT, 0);
                queue.offer(0);
            },
            "a descriptor chain loops or is longer than 8 descriptors",
        ),
        (
            "outside",
            |queue| {
                queue.descriptor(0, OUTSIDE - 8, 64, WRITE, 0);
                queue.offer(0);
            },
            "0x40 bytes at 0x4ffff8 are not inside guest memory",
        ),
        ("head", |queue| queue.offer(0xffff), "descriptor index 65535 is outside its table of 8"),
        (
            "index",
            |queue| queue.set_avail_index(0x100),
            "available index 256 is more than the ring's 8 entries ahead of 65534",
        ),
        (
            "in flight",
            |queue| {
                queue.descriptor(2, BUFFERS, 64, 0, 0);
                queue.offer(2);
                queue.offer(2);
            },
            "the chain at descriptor 2 is made available again while it is in flight",
        ),
        (
            "no table",
            |queue| {
                queue.descriptor(0, BUFFERS, 15, INDIRECT, 0);
                queue.offer(0);
            },
            "an indirect table of 15 bytes is not a whole number of descriptors",
        ),
        (
            "empty",
            |queue| {
                queue.descriptor(0, BUFFERS, 0, 0, 0);
                queue.offer(0);
            },
            "descriptor 0 has length 0",
        ),
    ];
    for (name, lie, reason) in cases {
        let mut guest = Guest::new();
        let server = Server::started(&guest);
        lie(&mut guest.queues[0]);
        signal(guest.ends[0][0].as_raw_fd());
        guest.offer(1, 0, b"honest");
        let chains = server.take();
        assert!(texts(&chains).contains(&(1, b"honest")), "{name}");
        assert_eq!(server.failure(&guest, 0), reason, "{name}");
        for chain in chains.iter().filter(|chain| chain.ring == 0) {
            assert_eq!(server.complete(chain, b""), Completed::TooLate, "{name}");
        }
        assert!(!server.is_ready(), "{name}");
        guest.offer(1, 1, b"on");
        assert_eq!(server.take().len(), 1, "{name}");
        server.queues.stop();
        server.queues.start().unwrap();
        assert_eq!(server.queues.failed(), [true, false], "{name}: only another configuration helps");
    }
}

#[test]
fn a_guest_that_changes_a_chain_in_flight_loses_its_ring() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 1, b"a");
    let chains = server.take();
    guest.queues[0].descriptor(1 + SIZE / 2, buffer(0, 1), 3, WRITE, 0);
    assert_eq!(server.complete(&chains[0], b"four"), Completed::TooLate);
    assert_eq!(
        server.failure(&guest, 0),
        "the chain at descriptor 1 changed while it was in flight: it has 3 bytes left to write to, 4 are to be \
         written"
    );
    assert_eq!(guest.all_used(0), []);
}

#[test]
fn a_kick_that_cannot_be_heard_costs_its_ring() {
    let mut guest = Guest::new();
    let (reader, writer) = pipe();
    guest.ends[0][0] = reader;
    let server = Server::started(&guest);
    assert_eq!(server.take().len(), 0);
    drop(writer);
    assert!(server.is_ready());
    assert_eq!(server.take().len(), 0);
    assert_eq!(server.failure(&guest, 0), "kick eventfd: not an eventfd");
    server.take();
    assert!(!server.is_ready());
}

#[test]
fn lost_memory_costs_the_rings_and_nothing_else() {
    let file = memfd(MEMORY_SIZE);
    let mut guest = Guest::in_memory(memory_of(&file));
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    let chains = server.take();
    truncate(&file, 0);
    assert_eq!(server.complete(&chains[0], b"x"), Completed::TooLate);
    assert_eq!(server.take().len(), 0);
    assert_eq!(server.queues.failed(), [true, true]);
    let errors = server.queues.take_ring_errors();
    assert!(
        errors.iter().all(|(_, reason)| reason.contains("is lost: its file became smaller")),
        "{errors:?}"
    );
}

#[test]
fn memory_comes_and_goes_under_chains_in_flight() {
    let file = memfd(MEMORY_SIZE);
    let half = MEMORY_SIZE / 2;
    let low = region(&file, MEMORY_START, half, 0);
    let more = memfd(half);
    let mut guest = Guest::in_memory(Arc::new(GuestMemory::new(&[low]).unwrap()));
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    let chains = server.take();
    let added = region(&more, MEMORY_START + half, half, 0);
    let next = Arc::new(guest.memory.next(&[low, added]).unwrap());
    assert!(server.queues.swap_memory(&next));
    guest.memory = Arc::clone(&next);
    let table = guest.queues[0].layout.descriptor_area;
    guest.queues[0].descriptor_at(table + 16, MEMORY_START + half, 64, WRITE, 0);
    guest.queues[0].offer(1);
    let from_there = server.take();
    assert_eq!(server.complete(&chains[0], b"here"), Completed::Now);
    assert_eq!(guest.all_used(0), [(0, b"here".to_vec())]);
    // The guest unplugs it, and its chain with it.
    let last = Arc::new(next.next(&[low]).unwrap());
    assert!(server.queues.swap_memory(&last));
    guest.memory = Arc::clone(&last);
    guest.queues.iter_mut().for_each(|queue| queue.memory = Arc::clone(&last));
    drop(next);
    assert!(!is_mapped(&more));
    assert_eq!(server.complete(&from_there[0], b"x"), Completed::TooLate);
    assert_eq!(server.failure(&guest, 0), "0x40 bytes at 0x300000 are not inside guest memory");
    let elsewhere = Arc::new(GuestMemory::new(&[region(&file, 0, half, 0)]).unwrap());
    assert!(!server.queues.swap_memory(&elsewhere));
}

#[test]
fn the_device_can_give_a_ring_up_and_another_process_can_be_told() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    let chains = server.take();
    server.queues.fail(0, "the device has had enough").unwrap();
    server.queues.fail(0, "twice").unwrap();
    assert_eq!(server.failure(&guest, 0), "the device has had enough");
    assert_eq!(server.complete(&chains[0], b""), Completed::TooLate);
    assert_eq!(server.queues.fail(9, "").unwrap_err().to_string(), "there is no ring 9");
    server.queues.stop();
    let successor = Server::new(&guest);
    successor.queues.set_failed(0).unwrap();
    successor.queues.start().unwrap();
    guest.offer(1, 0, b"b");
    assert_eq!(texts(&successor.take()), [(1, &b"b"[..])]);
    assert_eq!(successor.queues.take_ring_errors(), [], "everybody was told there");
}

#[test]
fn a_driver_is_called_by_other_descriptors_from_now_on() {
    let mut guest = Guest::new();
    let server = Server::started(&guest);
    guest.offer(0, 0, b"a");
    let chains = server.take();
    guest.ends[0][1] = eventfd();
    server.queues.set_notifiers(0, Some(guest.ends[0][1].as_raw_fd()), None).unwrap();
    assert!(guest.is_called(0), "the former one may not have been heard");
    server.complete(&chains[0], b"");
    assert!(guest.is_called(0));
    let file = memfd(0);
    let error = server.queues.set_notifiers(0, Some(file.as_raw_fd()), None).unwrap_err().to_string();
    assert!(error.starts_with("ring 0: call descriptor is "), "{error}");
}

#[test]
fn what_cannot_be_configured_changes_nothing() {
    let guest = Guest::new();
    let server = Server::new(&guest);
    let refused = |config: CallbackConfig| server.queues.configure(&config).unwrap_err().to_string();
    let mut config = server.config(&guest, [true; RINGS]);
    config.rings.pop();
    assert_eq!(refused(config), "1 rings are configured, there are 2");
    let mut config = server.config(&guest, [true; RINGS]);
    config.rings[0].as_mut().unwrap().in_flight = None;
    assert_eq!(refused(config), "ring 0: there is no in-flight file for it");
    let mut config = server.config(&guest, [true; RINGS]);
    config.rings[1].as_mut().unwrap().layout.size = 6;
    assert_eq!(refused(config), "ring 1: a ring has 6 entries, it must be a power of two up to 32768");
    server.queues.start().unwrap();
    assert_eq!(refused(server.config(&guest, [true; RINGS])), "the rings run");
    assert_eq!(server.queues.start(), Err(Error::Running));
}

#[test]
fn a_packed_ring_hands_out_one_chain_at_a_time_and_a_successor_gets_the_same() {
    const AT: u64 = MEMORY_START;
    let memory = memory();
    let ledger = Ledger::create(1).unwrap();
    let slot = || Ledger::map(ledger.as_raw_fd(), 1).unwrap().slot(0);
    let mut guest = PackedQueue::new(&memory, AT, 4, Position { index: 3, wrap: true });
    let ends = [(); 3].map(|()| eventfd());
    let event = eventfd();
    let server = |position: Option<Position>| {
        let queues = CallbackQueues::new(1, event.as_raw_fd());
        let spec = RingSpec {
            layout: packed_layout(AT),
            kick_fd: ends[0].as_raw_fd(),
            call_fd: Some(ends[1].as_raw_fd()),
            error_fd: Some(ends[2].as_raw_fd()),
            next_avail: position.map(Position::bits),
            ledger: slot(),
            in_flight: None,
            log: None,
        };
        let config = CallbackConfig {
            memory: Arc::clone(&memory),
            format: Format::Packed,
            features: Features { event_index: true, indirect: true },
            rings: vec![Some(spec)],
        };
        queues.configure(&config).unwrap();
        queues.start().unwrap();
        queues
    };
    let first = server(Some(Position { index: 3, wrap: true }));
    guest.put(BUFFERS, b"ab");
    for (id, length) in [(7, 1), (9, 2)] {
        guest.offer(BUFFERS, length, id, NEXT);
        guest.offer(BUFFERS + 0x800, 16, id, WRITE);
    }
    let chain = first.take().unwrap();
    assert_eq!((chain.head, chain.readable.as_slice(), chain.writable), (7, &b"a"[..], 16));
    assert!(first.take().is_none(), "one at a time");
    assert!(!readable(first.fd().unwrap().unwrap(), Duration::ZERO));
    assert_eq!(first.complete(&chain, b"one"), Ok(Completed::Now));
    assert!(readable(first.fd().unwrap().unwrap(), Duration::ZERO));
    assert_eq!(guest.next_used(2), Some((7, 3, WRITE)));
    let chain = first.take().unwrap();
    assert_eq!(chain.readable, b"ab");
    let position = Position { index: 1, wrap: false };
    assert_eq!(first.stop(), [Some(position.bits())]);
    assert_eq!(first.complete(&chain, b"kept"), Ok(Completed::AtStart));
    // Told the position, and told by the ledger that its predecessor died.
    for position in [Some(position), None] {
        let successor = server(position);
        let again = successor.take().unwrap();
        assert_eq!((again.head, again.readable.as_slice()), (9, &b"ab"[..]));
        assert_eq!(successor.stop(), [Some(0x0001)]);
        assert_eq!(successor.give_back(0), Ok(0));
        successor.start().unwrap();
        assert_eq!(successor.complete(&again, b""), Ok(Completed::TooLate), "it was given back");
    }
    first.start().unwrap();
    assert_eq!(guest.next_used(2), Some((9, 4, WRITE)));
    assert_eq!(first.stop(), [Some(0x0003)]);
}

/// As `PackedQueue` lays a ring of four entries.
fn packed_layout(address: u64) -> Layout {
    Layout { size: 4, descriptor_area: address, driver_area: address + 0x8000, device_area: address + 0xc000 }
}

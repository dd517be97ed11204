//! The in-flight file: whoever serves a split ring may die at any instruction, and a successor knows which chains are in
//! flight.

mod common;
#[path = "common/victim.rs"]
mod victim;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use common::{eventfd, memory, Queue, MEMORY_START, NEXT, WRITE};
use dataplane::callback::{CallbackConfig, CallbackQueues, HandedOut};
use dataplane::chain::Features;
use dataplane::in_flight::InFlight;
use dataplane::memory::GuestMemory;
use dataplane::word_file::WordFileError;
use dataplane::{Format, RingSpec};
use victim::Victim;

const SIZE: u16 = 8;
const RING: u64 = MEMORY_START;
const BUFFERS: u64 = MEMORY_START + 0x10_0000;

/// Where the ring begins: its indices wrap around meanwhile.
const START: u16 = 0xfffc;

/// The ring and its buffers, from the first byte on.
const RING_BYTES: usize = 0x1_0000;
/// The ring's size, and an entry for each descriptor.
const FILE_BYTES: usize = 8 * (1 + SIZE as usize);

/// A ring in guest memory with its in-flight file.
struct Place {
    memory: Arc<GuestMemory>,
    queue: Queue,
    file: OwnedFd,
    kick: OwnedFd,
    event: OwnedFd,
}

impl Place {
    fn new() -> Self {
        let memory = memory();
        let queue = Queue::new(&memory, RING, SIZE, START);
        Self { memory, queue, file: InFlight::create(1).unwrap(), kick: eventfd(), event: eventfd() }
    }

    /// Offers a chain whose text is its number, with room for an answer.
    fn offer(&mut self, head: u16, number: u8) {
        let address = buffer(head);
        self.queue.put(address, &[number]);
        self.queue.descriptor(head, address, 1, NEXT, head + SIZE / 2);
        self.queue.descriptor(head + SIZE / 2, address + 0x800, 1, WRITE, 0);
        self.queue.offer(head);
    }

    fn serve(&self) -> CallbackQueues {
        let queues = CallbackQueues::new(1, self.event.as_raw_fd());
        let spec = RingSpec {
            layout: self.queue.layout,
            kick_fd: self.kick.as_raw_fd(),
            call_fd: None,
            error_fd: None,
            next_avail: None,
            ledger: None,
            in_flight: InFlight::map(self.file.as_raw_fd(), 1).unwrap().slot(0),
            log: None,
        };
        let config = CallbackConfig {
            memory: Arc::clone(&self.memory),
            format: Format::Split,
            features: Features { event_index: true, indirect: true },
            rings: vec![Some(spec)],
        };
        queues.configure(&config).unwrap();
        queues.start().unwrap();
        queues
    }

    fn read_ring(&self) -> Vec<u8> {
        let mut bytes = vec![0; RING_BYTES];
        self.memory.read(RING, &mut bytes).unwrap();
        bytes
    }

    fn read_file(&self) -> [u8; FILE_BYTES] {
        let mut bytes = [0; FILE_BYTES];
        let fd = self.file.as_raw_fd();
        // SAFETY: the buffer is as long as we say.
        assert_eq!(unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), FILE_BYTES, 0) }, FILE_BYTES as isize);
        bytes
    }

    fn write_file(&self, bytes: &[u8]) {
        let fd = self.file.as_raw_fd();
        // SAFETY: the buffer is as long as we say.
        assert_eq!(unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), 0) }, bytes.len() as isize);
    }

    /// The words of the file that say something: the ring's size, and an entry for each of the first descriptors.
    fn write_entries(&self, size: u64, entries: &[u64]) {
        let words: Vec<u8> = [&[size], entries].concat().iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write_file(&words);
    }
}

fn buffer(head: u16) -> u64 {
    BUFFERS + 0x1000 * u64::from(head)
}

/// What the device answers: first one process, then its successor.
const BEFORE: u8 = 0xb0;
const AFTER: u8 = 0xa0;

/// What happens before and in a turn: heads that the guest offers; then the process takes all there is, and completes the
/// chains of these numbers, in this order.
const TURNS: [(&[u16], &[u8]); 7] = [
    (&[2], &[]),
    (&[0, 3], &[1]),
    (&[1], &[2, 0]),
    (&[3, 2, 0], &[]),
    (&[], &[6]),
    (&[0], &[4, 5]),
    (&[], &[7, 3]),
];

/// A successor of a process that left `ring` and `file`: it is handed what is in flight and what is available, in order, and
/// the guest gets every one of `outstanding` back, once. Gives how many the first process had told it of.
fn succeed(
    spare: &Place,
    ring: &[u8],
    file: &[u8],
    outstanding: &[(u16, u8)],
    seen: u16,
) -> Result<usize, String> {
    spare.memory.write(RING, ring).unwrap();
    spare.write_file(file);
    for (head, number) in outstanding {
        spare.memory.write(buffer(*head), &[*number]).unwrap();
    }
    let successor = spare.serve();
    let chains: Vec<HandedOut> = std::iter::from_fn(|| successor.take()).collect();
    if let Some((_, reason)) = successor.take_ring_errors().pop() {
        return Err(reason);
    }
    if !chains.is_sorted_by_key(|chain| (!chain.was_taken, chain.readable[0])) {
        return Err("they come out of order".into());
    }
    for chain in &chains {
        successor.complete(chain, &[AFTER]).unwrap();
    }
    let mut queue = Queue::reader(&spare.memory, spare.queue.layout, seen);
    let mut left: Vec<u16> = outstanding.iter().map(|(head, _)| *head).collect();
    let mut told_before = 0;
    while let Some((head, length)) = queue.next_used() {
        let place =
            left.iter().position(|other| *other == head).ok_or(format!("{head} came back, wrongly"))?;
        left.remove(place);
        let was_handed_out = chains.iter().any(|chain| chain.head == head);
        told_before += usize::from(!was_handed_out);
        let [answer] = queue.get(buffer(head) + 0x800);
        if length != 1 || was_handed_out && answer != AFTER {
            return Err(format!("{head} came back with {length} bytes, {answer:#x}"));
        }
    }
    if !left.is_empty() {
        return Err(format!("{left:?} never came back"));
    }
    let position = successor.stop()[0].expect("it is configured");
    if position != queue.used_index() {
        return Err(format!("the successor stands at {position}, the guest at {}", queue.used_index()));
    }
    Ok(told_before)
}

#[test]
fn a_process_that_dies_at_any_instruction_is_succeeded_with_each_chain_once() {
    let (mut place, spare) = (Place::new(), Place::new());
    let served = place.serve();
    let mut taken: Vec<HandedOut> = Vec::new();
    let victim = Victim::new(TURNS.len(), move |number| {
        while let Some(chain) = served.take() {
            taken.push(chain);
        }
        for number in TURNS[number].1 {
            let chain = taken.iter().find(|chain| chain.readable == [*number]).unwrap();
            served.complete(chain, &[BEFORE]).unwrap();
        }
    });
    let mut outstanding: Vec<(u16, u8)> = Vec::new();
    let mut number = 0;
    let mut seen = START;
    let mut deaths = 0;
    for (offered, completed) in TURNS {
        for &head in offered {
            place.offer(head, number);
            outstanding.push((head, number));
            number += 1;
        }
        let mut last = None;
        let mut outcomes = Vec::new();
        let mut look = || {
            let file = place.read_file();
            let used: [u8; 6 + 8 * SIZE as usize] = place.queue.get(place.queue.layout.device_area);
            if last != Some((file, used)) {
                deaths += 1;
                let outcome = succeed(&spare, &place.read_ring(), &file, &outstanding, seen);
                outcomes.push(outcome.unwrap_or_else(|wrong| panic!("death {deaths}: {wrong}")));
                last = Some((file, used));
            }
        };
        look();
        victim.turn(&mut look);
        look();
        assert_eq!(outcomes.first(), Some(&0));
        assert_eq!(outcomes.last(), Some(&completed.len()));
        assert!(outcomes.is_sorted(), "{outcomes:?}");
        for number in completed {
            let (head, length) = place.queue.next_used().unwrap();
            let index = outstanding.iter().position(|other| *other == (head, *number)).unwrap();
            outstanding.remove(index);
            assert_eq!((length, place.queue.get(buffer(head) + 0x800)), (1, [BEFORE]));
            seen = seen.wrapping_add(1);
        }
    }
    assert!(outstanding.is_empty());
    // A store for each chain that is taken, and five for each that is completed: an element is two.
    assert!(deaths > 6 * usize::from(number), "{deaths} deaths were tried");
}

const COMPLETING: u64 = 1 << 47;

fn completing(order: u64, used: u16) -> u64 {
    order | COMPLETING | u64::from(used) << 48
}

#[test]
fn a_file_that_cannot_be_costs_its_ring_and_writes_nothing() {
    let cases: [(&str, u64, Vec<u64>, &str); 8] = [
        ("size", 16, vec![], "the in-flight file is about a ring of 16 entries, this one has 8"),
        ("order", 8, vec![7, 0, 7], "the in-flight file has the same place in order for descriptors 0 and 2"),
        (
            "no order",
            8,
            vec![COMPLETING],
            "the in-flight file has 0x800000000000 for descriptor 0, which cannot be",
        ),
        (
            "index",
            8,
            vec![1 << 48 | 1],
            "the in-flight file has 0x1000000000001 for descriptor 0, which cannot be",
        ),
        (
            "two at once",
            8,
            vec![completing(1, START), completing(2, START)],
            "the in-flight file has 0xfffc800000000002 for descriptor 1, which cannot be",
        ),
        (
            "ahead",
            8,
            vec![completing(1, START + 1)],
            "the in-flight file has descriptor 0 completed at used index 65533, the ring stands at 65532",
        ),
        (
            "behind",
            8,
            vec![0, completing(1, START - 2)],
            "the in-flight file has descriptor 1 completed at used index 65530, the ring stands at 65532",
        ),
        (
            "not available",
            8,
            vec![1, 2],
            "available index 65533 is more than the ring's 8 entries ahead of 65534",
        ),
    ];
    for (name, size, entries, reason) in cases {
        let mut place = Place::new();
        place.offer(0, 0);
        place.queue.descriptor(1, buffer(1), 1, 0, 0);
        place.write_entries(size, &entries);
        let (ring, file) = (place.read_ring(), place.read_file());
        let served = place.serve();
        let mut chains = Vec::new();
        while let Some(chain) = served.take() {
            chains.push(chain);
        }
        assert_eq!(served.take_ring_errors(), [(0, reason.to_string())], "{name}");
        if name != "not available" {
            assert_eq!((place.read_ring(), place.read_file()), (ring, file), "{name}");
            assert_eq!(chains.len(), 0, "{name}");
        }
    }
}

#[test]
fn the_last_place_in_order_is_the_last() {
    let mut place = Place::new();
    place.offer(0, 0);
    place.offer(1, 1);
    place.write_entries(8, &[COMPLETING - 1]);
    let served = place.serve();
    assert!(served.take().is_some_and(|chain| chain.was_taken && chain.head == 0));
    assert!(served.take().is_none());
    let reason = "the in-flight file has 0x800000000000 for descriptor 1, which cannot be";
    assert_eq!(served.take_ring_errors(), [(0, reason.to_string())]);
}

#[test]
fn a_file_for_another_number_of_rings_or_none_at_all_is_refused() {
    let file = InFlight::create(2).unwrap();
    let refused = |fd, count| match InFlight::map(fd, count).unwrap_err() {
        WordFileError::Invalid(reason) => reason,
        other => panic!("{other}"),
    };
    assert_eq!(refused(file.as_raw_fd(), 3), "in-flight file: has 524304 bytes, 3 rings need 786456");
    assert_eq!(refused(file.as_raw_fd(), 0), "in-flight file: is for 0 rings, must be for 1 to 256");
    assert_eq!(refused(file.as_raw_fd(), 257), "in-flight file: is for 257 rings, must be for 1 to 256");
    let unsealed = common::memfd(524_304);
    assert_eq!(refused(unsealed.as_raw_fd(), 2), "in-flight file: is not sealed against shrinking");
    let other = std::fs::File::open("/dev/null").unwrap();
    assert!(InFlight::map(other.as_raw_fd(), 1).is_err());
}

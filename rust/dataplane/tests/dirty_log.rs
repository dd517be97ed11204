//! What is in the dirty log while frames move, and what becomes of a ring whose log cannot have all marks.

mod common;
#[path = "common/dirty.rs"]
mod dirty;

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use common::{
    await_frame, await_rung, eventfd, memfd, memory, region, send, truncate, wire, PackedQueue, Queue,
    ALL_OFFLOADS, MEMORY_SIZE, MEMORY_START, WRITE,
};
use dataplane::callback::{CallbackConfig, CallbackQueues, Completed};
use dataplane::chain::{Features, Layout};
use dataplane::in_flight::InFlight;
use dataplane::ledger::Ledger;
use dataplane::log::{DirtyLog, RingLog, LOG_PAGE_SIZE};
use dataplane::memory::GuestMemory;
use dataplane::packed::Position;
use dataplane::queue_pair::{swap_memory, QueuePair};
use dataplane::stream::Stream;
use dataplane::sys::signal;
use dataplane::{Config, Format, HostSide, RingSpec, Side};
use dirty::{pages_of, Dirty};

const HEADER: usize = 12;
const SIZE: u16 = 64;
const MEMORY: [(u64, u64); 1] = [(MEMORY_START, MEMORY_SIZE)];
const RX_RING: u64 = MEMORY_START;
const TX_RING: u64 = MEMORY_START + 0x1_0000;
const BUFFERS: u64 = MEMORY_START + 0x10_0000;
const BUFFER_SIZE: u32 = 2048;
const FRAME: [u8; 60] = [0x5a; 60];

enum AnyQueue {
    Split(Queue),
    Packed(PackedQueue),
}

impl AnyQueue {
    fn new(format: Format, memory: &Arc<GuestMemory>, address: u64) -> Self {
        match format {
            Format::Split => Self::Split(Queue::new(memory, address, SIZE, 0)),
            Format::Packed => Self::Packed(PackedQueue::new(memory, address, SIZE, Position::START)),
        }
    }

    fn layout(&self) -> Layout {
        match self {
            Self::Split(queue) => queue.layout,
            Self::Packed(queue) => queue.layout,
        }
    }

    fn offer(&mut self, head: u16, address: u64, length: u32, flags: u16) {
        match self {
            Self::Split(queue) => {
                queue.descriptor(head, address, length, flags, 0);
                queue.offer(head);
            }
            Self::Packed(queue) => queue.offer(address, length, head, flags),
        }
    }

    fn next_used(&mut self) -> Option<(u16, u32)> {
        match self {
            Self::Split(queue) => queue.next_used(),
            Self::Packed(queue) => queue.next_used(1).map(|(id, written, _)| (id, written)),
        }
    }
}

/// A NIC whose pair logs, and its guest.
struct Nic {
    memory: Arc<GuestMemory>,
    format: Format,
    rx: AnyQueue,
    tx: AnyQueue,
    /// Kick, call and error of each ring.
    ends: [[OwnedFd; 3]; 2],
    ledger: Arc<Ledger>,
    wire: OwnedFd,
    tap: OwnedFd,
    event: OwnedFd,
    pair: QueuePair,
}

impl Nic {
    fn new(format: Format) -> Self {
        let memory = memory();
        let ledger = Ledger::create(2).unwrap();
        let (wire, tap) = wire();
        let event = eventfd();
        Self {
            format,
            rx: AnyQueue::new(format, &memory, RX_RING),
            tx: AnyQueue::new(format, &memory, TX_RING),
            ends: [(); 2].map(|()| [(); 3].map(|()| eventfd())),
            ledger: Ledger::map(ledger.as_raw_fd(), 2).unwrap(),
            wire,
            tap,
            pair: QueuePair::new("test", event.as_raw_fd()).unwrap(),
            event,
            memory,
        }
    }

    fn spec(&self, ring: usize, log: Option<RingLog>) -> RingSpec {
        let [kick, call, error] = self.ends[ring].each_ref().map(AsRawFd::as_raw_fd);
        RingSpec {
            layout: [&self.rx, &self.tx][ring].layout(),
            kick_fd: kick,
            call_fd: Some(call),
            error_fd: Some(error),
            next_avail: (self.format == Format::Packed).then_some(Position::START.bits()),
            ledger: self.ledger.slot(ring),
            in_flight: None,
            log,
        }
    }

    fn configure(&self, logs: [Option<RingLog>; 2], change: impl FnOnce(&mut Config)) {
        let [rx, tx] = logs;
        let mut config = Config {
            memory: Arc::clone(&self.memory),
            host: HostSide::Tap(self.tap.as_raw_fd()),
            header_length: HEADER,
            frame_length_max: 1514,
            offloads: ALL_OFFLOADS,
            format: self.format,
            features: Features { event_index: false, indirect: true },
            mergeable: true,
            rx: Some(self.spec(0, rx)),
            tx: Some(self.spec(1, tx)),
        };
        change(&mut config);
        self.pair.configure(&config).unwrap();
    }

    fn logs(&self, dirty: &Dirty) -> [Option<RingLog>; 2] {
        [Some(dirty.of(&self.rx.layout())), Some(dirty.of(&self.tx.layout()))]
    }

    fn set_log(&self, dirty: &Dirty) {
        let [rx, tx] = self.logs(dirty);
        self.pair.set_log(Side::Rx, rx);
        self.pair.set_log(Side::Tx, tx);
    }

    fn kick(&self, ring: usize) {
        signal(self.ends[ring][0].as_raw_fd());
    }

    fn post(&mut self, head: u16) {
        self.rx.offer(head, buffer(head), BUFFER_SIZE, WRITE);
        self.kick(0);
    }

    fn await_received(&mut self) -> (u16, u32) {
        let rx = &mut self.rx;
        await_rung(&self.ends[0][1], || rx.next_used())
    }

    fn receive(&mut self, head: u16) {
        self.post(head);
        assert!(send(&self.wire, &[&[0; HEADER], &FRAME[..]].concat()));
        assert_eq!(self.await_received(), (head, (HEADER + FRAME.len()) as u32));
    }

    /// Sends a frame and waits until its buffer is back.
    fn transmit(&mut self, head: u16) {
        let address = buffer(head);
        self.memory.write(address, &[&[0; HEADER], &FRAME[..]].concat()).unwrap();
        self.tx.offer(head, address, (HEADER + FRAME.len()) as u32, 0);
        self.kick(1);
        assert_eq!(await_frame(&self.wire).len(), HEADER + FRAME.len());
        let tx = &mut self.tx;
        assert_eq!(await_rung(&self.ends[1][1], || tx.next_used()), (head, 0));
    }

    fn await_errors(&self) -> Vec<(Side, String)> {
        await_rung(&self.event, || Some(self.pair.take_ring_errors()).filter(|errors| !errors.is_empty()))
    }
}

fn buffer(head: u16) -> u64 {
    BUFFERS + u64::from(head) * u64::from(BUFFER_SIZE)
}

fn page(address: u64) -> u64 {
    address / LOG_PAGE_SIZE
}

const FORMATS: [Format; 2] = [Format::Split, Format::Packed];

#[test]
fn whoever_sees_a_frame_finds_its_pages_marked() {
    for format in FORMATS {
        let mut nic = Nic::new(format);
        let dirty = Dirty::new(&MEMORY);
        nic.configure(nic.logs(&dirty), |_| {});
        nic.pair.start().unwrap();
        for head in 0..SIZE {
            dirty.clear();
            nic.receive(head);
            // While the ring runs: marks are there before the guest is told.
            assert!(dirty.pages().contains(&page(buffer(head))), "{format:?} {head}");
        }
        nic.pair.stop();
    }
}

#[test]
fn all_that_changed_is_marked_and_nothing_that_nobody_writes() {
    for format in FORMATS {
        let mut nic = Nic::new(format);
        let dirty = Dirty::new(&MEMORY);
        nic.configure(nic.logs(&dirty), |_| {});
        let mut guests = BTreeSet::new();
        let before = dirty.look(&nic.memory);
        nic.pair.start().unwrap();
        for head in 0..SIZE / 2 {
            nic.receive(head);
            nic.transmit(SIZE / 2 + head);
            guests.extend(pages_of(buffer(SIZE / 2 + head), 72));
        }
        nic.pair.stop();
        for ring in [RX_RING, TX_RING] {
            // The available ring, the driver's event suppression, and what a driver writes of descriptors.
            guests.extend(pages_of(ring + 0x8000, 0x1000));
            if format == Format::Split {
                guests.extend(pages_of(ring, 16 * usize::from(SIZE)));
            }
        }
        dirty.check(&before, &nic.memory, &guests);
        let written = [RX_RING, TX_RING].map(|ring| [ring, ring + 0xc000].map(page)).concat();
        let received = (0..SIZE / 2).map(|head| page(buffer(head)));
        let possible: BTreeSet<u64> = received.chain(written).collect();
        let marked = dirty.pages();
        assert!(marked.is_subset(&possible), "{format:?}: {:#x?}", marked.difference(&possible));
    }
}

#[test]
fn a_frame_that_was_read_and_dropped_has_changed_its_buffer() {
    for format in FORMATS {
        let mut nic = Nic::new(format);
        let dirty = Dirty::new(&MEMORY);
        // A driver that took no checksums over.
        nic.configure(nic.logs(&dirty), |config| config.offloads = dataplane::Offloads(0));
        nic.pair.start().unwrap();
        nic.post(3);
        let mut packet = vec![0x5a; 200];
        packet[..HEADER].fill(0);
        packet[0] = 1; // its checksum is missing
        assert!(send(&nic.wire, &packet));
        assert!(send(&nic.wire, &[&[0; HEADER], &FRAME[..]].concat()));
        assert_eq!(nic.await_received().0, 3);
        nic.pair.stop();
        assert_eq!(nic.pair.counters().rx_dropped_stale, 1);
        assert!(dirty.pages().contains(&page(buffer(3))));
    }
}

#[test]
fn frames_of_a_stream_and_frames_that_waited_are_marked() {
    for format in FORMATS {
        let mut nic = Nic::new(format);
        let dirty = Dirty::new(&MEMORY);
        let mut ends = [-1; 2];
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
        // SAFETY: `ends` has room for two descriptors.
        assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) }, 0);
        let stream = Arc::new(Stream::new(Some(ends[0])));
        nic.configure(nic.logs(&dirty), |config| config.host = HostSide::Stream(Arc::clone(&stream)));
        nic.pair.start().unwrap();
        nic.post(5);
        let frame = [&(FRAME.len() as u32).to_be_bytes()[..], &FRAME].concat();
        // SAFETY: the slice is valid for its length.
        let sent = unsafe { libc::send(ends[1], frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize);
        assert_eq!(nic.await_received().0, 5);
        assert!(dirty.pages().contains(&page(buffer(5))));
        nic.pair.close();
        for end in ends {
            // SAFETY: both are ours, and nobody uses them any more.
            unsafe { libc::close(end) };
        }

        // A frame of which the second half waits for buffers on other pages.
        let mut nic = Nic::new(format);
        nic.configure(nic.logs(&dirty), |config| config.frame_length_max = 65554);
        nic.post(8);
        assert!(send(&nic.wire, &[0; 3000]));
        // All that can be done is done when this returns.
        nic.pair.start().unwrap();
        assert_eq!(nic.pair.counters().rx_packets, 0);
        dirty.clear();
        nic.post(10);
        assert_eq!([nic.await_received().0, nic.await_received().0], [8, 10]);
        assert!(dirty.pages().is_superset(&[8, 10].map(|head| page(buffer(head))).into()));
        nic.pair.stop();
    }
}

#[test]
fn logging_is_switched_while_frames_move_and_the_former_log_is_left_alone() {
    for format in FORMATS {
        let mut nic = Nic::new(format);
        nic.configure([None, None], |_| {});
        nic.pair.start().unwrap();
        nic.receive(0);
        let mut former: Option<Dirty> = None;
        for head in (2..SIZE).step_by(2) {
            let dirty = Dirty::new(&MEMORY);
            nic.set_log(&dirty);
            if let Some(former) = &former {
                // What a frontend does behind the reply: it takes the last marks, and gives the memory to something else.
                former.clear();
            }
            nic.receive(head);
            assert!(dirty.pages().contains(&page(buffer(head))));
            assert!(former.is_none_or(|former| former.pages().is_empty()), "{format:?} {head}");
            former = Some(dirty);
        }
        nic.pair.set_log(Side::Rx, None);
        nic.pair.set_log(Side::Tx, None);
        let former = former.unwrap();
        former.clear();
        nic.receive(1);
        nic.pair.stop();
        assert_eq!(former.pages(), BTreeSet::new());
        assert_eq!(nic.pair.failed(), (false, false));
    }
}

#[test]
fn the_ring_itself_is_logged_where_the_frontend_says_or_not_at_all() {
    const ELSEWHERE: u64 = MEMORY_START + MEMORY_SIZE; // in no region; the log has a bit for it
    for (format, place) in FORMATS.into_iter().flat_map(|format| [(format, Some(ELSEWHERE)), (format, None)])
    {
        let mut nic = Nic::new(format);
        let dirty = Dirty::new(&MEMORY);
        let log = RingLog { log: Arc::clone(&dirty.log), device_area: place };
        nic.configure([Some(log), None], |_| {});
        nic.pair.start().unwrap();
        nic.receive(7);
        nic.pair.stop();
        let mut expected = BTreeSet::from([page(buffer(7))]);
        if let Some(address) = place {
            expected.insert(page(address));
            if format == Format::Packed {
                expected.insert(page(RX_RING));
            }
        }
        assert_eq!(dirty.pages(), expected, "{format:?} {place:?}");
    }
}

#[test]
fn a_log_begins_at_its_offset_in_its_file() {
    let mut nic = Nic::new(Format::Split);
    let file = memfd(0x3000);
    let log = Arc::new(DirtyLog::new(0x1000, 0x1000, file.as_raw_fd()));
    let all = RingLog { log, device_area: Some(nic.rx.layout().device_area) };
    nic.configure([Some(all), None], |_| {});
    nic.pair.start().unwrap();
    nic.receive(0);
    nic.pair.stop();
    let mut bytes = [0u8; 0x3000];
    // SAFETY: the buffer is as long as we say.
    assert_eq!(unsafe { libc::pread(file.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) }, 0x3000);
    let place = page(buffer(0)) as usize;
    assert_ne!(bytes[0x1000 + place / 8] & 1 << (place % 8), 0);
    assert!(bytes[..0x1000].iter().chain(&bytes[0x2000..]).all(|byte| *byte == 0));
}

#[test]
fn a_log_that_has_no_bit_for_something_stops_its_rings_and_says_so() {
    let small = memfd(0x1000);
    let log = Arc::new(DirtyLog::new(8, 0, small.as_raw_fd()));
    for format in FORMATS {
        // Too small for guest memory.
        let nic = Nic::new(format);
        let short = RingLog { log: Arc::clone(&log), device_area: None };
        nic.configure([Some(short.clone()), None], |_| {});
        nic.pair.start().unwrap();
        let needed = "the dirty log has 0x8 bytes, guest memory up to 0x500000 needs 0xa0; ";
        let [(Side::Rx, reason)] = &nic.await_errors()[..] else { panic!("one ring fails") };
        assert!(reason.starts_with(needed), "{reason}");
        assert_eq!(nic.pair.failed(), (true, false));
        nic.pair.stop();
        // The same while it runs.
        let dirty = Dirty::new(&MEMORY);
        nic.configure(nic.logs(&dirty), |_| {});
        nic.pair.start().unwrap();
        nic.pair.set_log(Side::Tx, Some(short));
        let [(Side::Tx, reason)] = &nic.await_errors()[..] else { panic!("one ring fails") };
        assert!(reason.starts_with(needed), "{reason}");
        assert_eq!(nic.pair.failed(), (false, true));
        nic.pair.stop();
        // Too small for where the ring is logged.
        for (address, text) in [(0x10_0000_0000, "is logged at 0x1000000000"), (u64::MAX, "wraps around")] {
            let nic = Nic::new(format);
            let far = RingLog { log: Arc::clone(&dirty.log), device_area: Some(address) };
            nic.configure([Some(far), None], |_| {});
            nic.pair.start().unwrap();
            let errors = nic.await_errors();
            assert!(errors[0].1.contains(text), "{errors:?}");
            nic.pair.stop();
        }
    }
}

#[test]
fn memory_that_outgrows_its_log_stops_the_rings_and_a_larger_log_before_it_does_not() {
    let file = memfd(MEMORY_SIZE + 0x100_0000);
    let table = |size| {
        let regions =
            [region(&file, MEMORY_START, MEMORY_SIZE, 0), region(&file, 0x4000_0000, size, MEMORY_SIZE)];
        regions[..if size == 0 { 1 } else { 2 }].to_vec()
    };
    for is_right in [true, false] {
        let memory = Arc::new(GuestMemory::new(&table(0)).unwrap());
        let mut nic = Nic::new(Format::Split);
        nic.memory = Arc::clone(&memory);
        nic.rx = AnyQueue::new(Format::Split, &memory, RX_RING);
        nic.tx = AnyQueue::new(Format::Split, &memory, TX_RING);
        let dirty = Dirty::new(&MEMORY);
        nic.configure(nic.logs(&dirty), |_| {});
        nic.pair.start().unwrap();
        nic.receive(0);
        let grown = Dirty::new(&[(0x4000_0000, 0x100_0000)]);
        if is_right {
            nic.set_log(&grown);
        }
        let memory = Arc::new(memory.next(&table(0x100_0000)).unwrap());
        assert_eq!(swap_memory(&[&nic.pair], &memory), [true]);
        assert_eq!(nic.pair.failed(), (!is_right, !is_right));
        if is_right {
            nic.rx.offer(1, 0x4000_0000, BUFFER_SIZE, WRITE);
            nic.kick(0);
            assert!(send(&nic.wire, &[0; 72]));
            assert_eq!(nic.await_received(), (1, 72));
            assert!(grown.pages().contains(&0x4_0000));
        } else {
            let errors = nic.await_errors();
            assert!(errors[0].1.contains("guest memory up to 0x41000000 needs 0x8200"), "{errors:?}");
        }
        nic.pair.stop();
    }
}

#[test]
fn a_log_that_becomes_smaller_stops_its_rings_and_no_others() {
    let mut others = Nic::new(Format::Split);
    let theirs = Dirty::new(&MEMORY);
    others.configure(others.logs(&theirs), |_| {});
    others.pair.start().unwrap();
    for format in FORMATS {
        let mut nic = Nic::new(format);
        let dirty = Dirty::new(&MEMORY);
        nic.configure(nic.logs(&dirty), |_| {});
        nic.pair.start().unwrap();
        nic.receive(0);
        truncate(&dirty.file, 0);
        nic.post(1);
        assert!(send(&nic.wire, &[0; 72]));
        let mut errors = nic.await_errors();
        while errors.len() < 2 {
            errors.extend(nic.await_errors());
        }
        assert!(
            errors.iter().all(|(_, reason)| reason.starts_with("the dirty log, 0xa8 bytes, is lost")),
            "{errors:?}"
        );
        assert_eq!(nic.pair.failed(), (true, true));
        nic.pair.stop();
        // A larger file does not bring it back; another log does.
        truncate(&dirty.file, 0x1000);
        assert!(dirty.log.reason().is_some());
        let again = Dirty::new(&MEMORY);
        nic.configure(nic.logs(&again), |_| {});
        nic.pair.start().unwrap();
        assert_eq!(nic.pair.failed(), (false, false));
        nic.pair.stop();
    }
    others.receive(0);
    assert_eq!(others.pair.failed(), (false, false));
}

#[test]
fn what_cannot_be_mapped_is_a_log_that_stops_rings_with_the_reason() {
    let sealed = memfd(0x1000);
    // SAFETY: plain system call.
    assert_eq!(unsafe { libc::fcntl(sealed.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
    let small = memfd(0x800);
    let fds = [
        (&sealed, 0x1000, 0, "Operation not permitted"),
        (&small, 0x1000, 0, "needs a file of 0x1000 bytes, it has 0x800"),
        (&small, 0x100, 0x10, "mmap offset 0x10 is not a multiple of 0x1000"),
        (&small, 0, 0, "is empty"),
        (&small, u64::MAX, 0, "limit is 0x20000000 bytes"),
        (&eventfd(), 0x100, 0, "of which only devdax is memory"),
    ];
    for (fd, size, offset, text) in fds {
        let log = DirtyLog::new(size, offset, fd.as_raw_fd());
        let reason = log.reason().expect(text);
        if !text.contains("devdax") {
            assert!(reason.contains(text), "{reason}");
        }
        let nic = Nic::new(Format::Split);
        nic.configure([Some(RingLog { log: Arc::new(log), device_area: None }), None], |_| {});
        nic.pair.start().unwrap();
        assert_eq!(nic.await_errors(), [(Side::Rx, reason)]);
        nic.pair.stop();
    }
}

#[test]
fn chains_that_somebody_else_answers_are_marked_and_their_rings_too() {
    for format in FORMATS {
        let memory = memory();
        let mut queue = AnyQueue::new(format, &memory, RX_RING);
        let (kick, call, event) = (eventfd(), eventfd(), eventfd());
        let (ledger, in_flight) = (Ledger::create(1).unwrap(), InFlight::create(1).unwrap());
        let dirty = Dirty::new(&MEMORY);
        let queues = CallbackQueues::new(1, event.as_raw_fd());
        let spec = RingSpec {
            layout: queue.layout(),
            kick_fd: kick.as_raw_fd(),
            call_fd: Some(call.as_raw_fd()),
            error_fd: None,
            next_avail: (format == Format::Packed).then_some(Position::START.bits()),
            ledger: Ledger::map(ledger.as_raw_fd(), 1).unwrap().slot(0),
            in_flight: InFlight::map(in_flight.as_raw_fd(), 1).unwrap().slot(0),
            log: Some(dirty.of(&queue.layout())),
        };
        let config = CallbackConfig {
            memory: Arc::clone(&memory),
            format,
            features: Features { event_index: true, indirect: true },
            rings: vec![Some(spec)],
        };
        queues.configure(&config).unwrap();
        queues.start().unwrap();
        let mut guests: BTreeSet<u64> = [RX_RING, RX_RING + 0x8000].map(page).into();
        if format == Format::Packed {
            guests.clear();
        }
        for head in 0..8 {
            queue.offer(head, buffer(2 * head), 8192, WRITE);
            let before = dirty.look(&memory);
            dirty.clear();
            let chain = queues.take().expect("it was offered");
            assert_eq!(queues.complete(&chain, &[1 + head as u8; 5000]).unwrap(), Completed::Now);
            dirty.check(&before, &memory, &guests);
            let changed = dirty.changed(&before, &memory);
            assert!(changed.is_superset(&pages_of(buffer(2 * head), 5000).collect()));
            assert!(queues.take().is_none());
            dirty.check(&before, &memory, &guests);
            assert_eq!(queue.next_used(), Some((head, 5000)));
        }
        // Another log, and one that is none.
        let other = Dirty::new(&MEMORY);
        queues.set_log(0, Some(other.of(&queue.layout())));
        dirty.clear();
        queue.offer(8, buffer(40), 100, WRITE);
        let chain = queues.take().expect("it was offered");
        queues.complete(&chain, b"x").unwrap();
        assert_eq!(dirty.pages(), BTreeSet::new());
        assert!(other.pages().contains(&page(buffer(40))));
        truncate(&other.file, 0);
        queue.offer(9, buffer(42), 100, WRITE);
        if let Some(chain) = queues.take() {
            assert_eq!(queues.complete(&chain, b"x").unwrap(), Completed::TooLate);
        }
        assert!(queues.take().is_none());
        let [(0, reason)] = &queues.take_ring_errors()[..] else { panic!("the ring fails") };
        assert!(reason.starts_with("the dirty log, "), "{reason}");
    }
}

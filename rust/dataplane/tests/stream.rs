//! Frames on a stream socket, cut wherever the kernel cuts them.

mod common;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::{await_rung, eventfd, memfd, memory, Queue, ALL_OFFLOADS, MEMORY_START, NEXT, WRITE};
use dataplane::chain::Features;
use dataplane::queue_pair::QueuePair;
use dataplane::stream::{Stream, STREAM_FRAME_LENGTH_MAX, STREAM_IN_HAND_MAX};
use dataplane::sys::signal;
use dataplane::{Config, Format, HostSide, RingSpec};
use std::io::{Read, Write};

const HEADER: usize = 12;
const SIZE: u16 = 16;
const RX_BUFFERS: u64 = MEMORY_START + 0x10_0000;
const TX_BUFFERS: u64 = MEMORY_START + 0x18_0000;
/// Between two buffers.
const STRIDE: u64 = 0x5000;

struct Guest {
    rx: Queue,
    tx: Queue,
    /// Kick and call of each ring.
    ends: [[OwnedFd; 2]; 2],
    peer: UnixStream,
    here: UnixStream,
    stream: Arc<Stream>,
    event: OwnedFd,
    pair: QueuePair,
    sent: u16,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        let (peer, here) = UnixStream::pair().unwrap();
        let event = eventfd();
        Self {
            rx: Queue::new(&memory, MEMORY_START, SIZE, 0),
            tx: Queue::new(&memory, MEMORY_START + 0x1_0000, SIZE, 0),
            ends: [(); 2].map(|()| [(); 2].map(|()| eventfd())),
            stream: Arc::new(Stream::new(Some(here.as_raw_fd()))),
            peer,
            here,
            pair: QueuePair::new("test", event.as_raw_fd()).unwrap(),
            event,
            sent: 0,
        }
    }

    fn start(&self) {
        let spec = |queue: &Queue, [kick, call]: &[OwnedFd; 2]| {
            Some(RingSpec {
                layout: queue.layout,
                kick_fd: kick.as_raw_fd(),
                call_fd: Some(call.as_raw_fd()),
                error_fd: None,
                next_avail: None,
                ledger: None,
                in_flight: None,
                log: None,
            })
        };
        let config = Config {
            memory: Arc::clone(&self.rx.memory),
            host: HostSide::Stream(Arc::clone(&self.stream)),
            header_length: HEADER,
            frame_length_max: STREAM_FRAME_LENGTH_MAX,
            offloads: ALL_OFFLOADS,
            format: Format::Split,
            features: Features { event_index: false, indirect: true },
            mergeable: true,
            rx: spec(&self.rx, &self.ends[0]),
            tx: spec(&self.tx, &self.ends[1]),
        };
        self.pair.configure(&config).unwrap();
        self.pair.start().unwrap();
    }

    /// Another process goes on, with what this one had in hand.
    fn hand_over(&mut self) {
        self.pair.stop();
        let file = memfd(0);
        let (read, unsent) = self.stream.save(file.as_raw_fd()).unwrap();
        self.stream = Arc::new(Stream::new(Some(self.here.as_raw_fd())));
        self.stream.load(file.as_raw_fd(), read, unsent).unwrap();
        self.start();
    }

    fn post(&mut self, id: u16, length: u32) {
        self.rx.descriptor(id, RX_BUFFERS + u64::from(id) * STRIDE, length, WRITE, 0);
        self.rx.offer(id);
        signal(self.ends[0][0].as_raw_fd());
    }

    /// The next used buffer: its number, and what is in it.
    fn receive(&mut self) -> (u16, Vec<u8>) {
        let queue = &mut self.rx;
        let (id, length) = await_rung(&self.ends[0][1], || queue.next_used());
        let mut data = vec![0; length as usize];
        self.rx.memory.read(RX_BUFFERS + u64::from(id) * STRIDE, &mut data).unwrap();
        (id, data)
    }

    /// Sends a frame that lies in two buffers, with the header across both.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        let (first, second) = (2 * (self.sent % (SIZE / 2)), 2 * (self.sent % (SIZE / 2)) + 1);
        let address = TX_BUFFERS + u64::from(first) * STRIDE / 2;
        let data = [&header[..], frame].concat();
        self.tx.put(address, &data);
        self.tx.descriptor(first, address, 5, NEXT, second);
        self.tx.descriptor(second, address + 5, u32::try_from(data.len()).unwrap() - 5, 0, 0);
        self.tx.offer(first);
        self.sent += 1;
        signal(self.ends[1][0].as_raw_fd());
    }

    fn await_sent(&mut self) {
        let queue = &mut self.tx;
        await_rung(&self.ends[1][1], || queue.next_used());
    }

    fn await_ended(&self) -> String {
        let pair = &self.pair;
        await_rung(&self.event, || pair.interface_gone().then(|| self.stream.ended()).flatten()).to_string()
    }
}

fn frame(number: u8, length: usize) -> Vec<u8> {
    vec![number; length]
}

fn on_the_wire(frame: &[u8]) -> Vec<u8> {
    [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], frame].concat()
}

fn received(frame: &[u8]) -> Vec<u8> {
    [&[0; 10][..], &1u16.to_le_bytes(), frame].concat()
}

#[test]
fn a_frame_arrives_wherever_it_is_cut_and_a_successor_goes_on_there() {
    let mut guest = Guest::new();
    guest.start();
    let wire = [on_the_wire(&frame(1, 60)), on_the_wire(&frame(2, 1500))].concat();
    for cut in (0..70).chain([500, 1560]) {
        guest.post(0, 2048);
        guest.post(1, 2048);
        guest.peer.write_all(&wire[..cut]).unwrap();
        guest.hand_over();
        guest.peer.write_all(&wire[cut..]).unwrap();
        assert_eq!(guest.receive(), (0, received(&frame(1, 60))));
        assert_eq!(guest.receive(), (1, received(&frame(2, 1500))));
    }
}

#[test]
fn a_frame_that_waits_for_buffers_waits_in_a_successor() {
    let mut guest = Guest::new();
    guest.start();
    guest.post(0, 1000);
    guest.peer.write_all(&on_the_wire(&frame(1, 1500))).unwrap();
    guest.peer.write_all(&on_the_wire(&frame(2, 60))).unwrap();
    guest.hand_over();
    guest.post(1, 1000);
    guest.post(2, 1000);
    let (first, start) = guest.receive();
    let (second, rest) = guest.receive();
    assert_eq!((first, second, start[10], start.len() + rest.len()), (0, 1, 2, HEADER + 1500));
    assert_eq!(guest.receive(), (2, received(&frame(2, 60))));
}

#[test]
fn what_a_full_socket_took_half_of_is_finished_before_anything_else() {
    let mut guest = Guest::new();
    guest.start();
    let mut sent = 0u8;
    // The peer reads nothing: this goes on until a frame is not taken any more.
    let (read, unsent) = loop {
        guest.send([0; HEADER], &frame(sent, 40_000));
        guest.await_sent();
        sent += 1;
        let file = memfd(0);
        let in_hand = guest.stream.save(file.as_raw_fd()).unwrap();
        if in_hand.1 > 0 {
            break in_hand;
        }
    };
    assert!(read == 0 && unsent <= 40_004);
    guest.send([0; HEADER], &frame(sent, 100));
    guest.hand_over();
    guest.stream.inject(&frame(200, 42)).unwrap();
    let mut buffer = vec![0; 40_004];
    for number in 0..sent {
        guest.peer.read_exact(&mut buffer).unwrap();
        assert!(buffer == on_the_wire(&frame(number, 40_000)), "{number}");
    }
    guest.peer.read_exact(&mut buffer[..46]).unwrap();
    assert_eq!(buffer[..46], on_the_wire(&frame(200, 42)));
    guest.peer.read_exact(&mut buffer[..104]).unwrap();
    assert_eq!(buffer[..104], on_the_wire(&frame(sent, 100)));
}

#[test]
fn what_cannot_be_on_a_stream_is_not_sent() {
    let mut guest = Guest::new();
    guest.start();
    let (checksum, segments) = ([1, 0], [0, 1]);
    for [flags, gso_type] in [checksum, segments] {
        let mut header = [0; HEADER];
        header[..2].copy_from_slice(&[flags, gso_type]);
        guest.send(header, &frame(1, 60));
        guest.await_sent();
    }
    guest.send([0; HEADER], &frame(1, 13));
    guest.await_sent();
    guest.send([0; HEADER], &frame(2, 14));
    guest.await_sent();
    let mut buffer = [0; 18];
    guest.peer.read_exact(&mut buffer).unwrap();
    assert_eq!(buffer[..], on_the_wire(&frame(2, 14)));
    let counters = guest.pair.counters();
    assert_eq!((counters.tx_dropped_header, counters.tx_packets), (3, 1));
}

#[test]
fn a_length_that_cannot_be_ends_the_stream_behind_all_that_came_before() {
    for length in [0, STREAM_FRAME_LENGTH_MAX + 1, u32::MAX as usize] {
        let mut guest = Guest::new();
        guest.post(0, 2048);
        guest.post(1, 2048);
        guest.start();
        guest.peer.write_all(&on_the_wire(&frame(1, 60))).unwrap();
        guest.peer.write_all(&u32::try_from(length).unwrap().to_be_bytes()).unwrap();
        assert_eq!(guest.receive(), (0, received(&frame(1, 60))));
        let reason = format!("it announces a frame of {length} bytes, possible are 1 to 65553");
        assert_eq!(guest.await_ended(), reason);
        guest.send([0; HEADER], &frame(2, 60));
        guest.await_sent();
        assert_eq!(guest.pair.counters().tx_dropped_interface, 1);
        assert_eq!(guest.pair.failed(), (false, false));
    }
}

#[test]
fn a_peer_that_left_is_heard_to_the_end() {
    let mut guest = Guest::new();
    guest.start();
    guest.peer.write_all(&on_the_wire(&frame(1, 60))).unwrap();
    guest.peer.write_all(&on_the_wire(&frame(2, 60))[..30]).unwrap();
    guest.peer = UnixStream::pair().unwrap().0;
    guest.send([0; HEADER], &frame(3, 60));
    guest.await_sent();
    guest.post(0, 2048);
    guest.post(1, 2048);
    assert_eq!(guest.receive(), (0, received(&frame(1, 60))));
    assert_eq!(guest.await_ended(), "it left in the middle of a frame, 30 bytes of it came");
}

#[test]
fn more_than_can_be_in_hand_is_not_taken() {
    let stream = Stream::new(None);
    let file = memfd(0);
    assert!(stream.load(file.as_raw_fd(), STREAM_IN_HAND_MAX + 1, 0).is_err());
    assert!(stream.load(file.as_raw_fd(), 1, 0).is_err(), "the file is shorter");
    assert!(stream.load(file.as_raw_fd(), 0, 1).is_err(), "the file is shorter");
    assert_eq!(stream.save(file.as_raw_fd()).unwrap(), (0, 0));
    assert_eq!(stream.inject(&[0; 60]).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
}

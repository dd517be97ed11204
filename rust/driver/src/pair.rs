//! A driver with its thread.
//!
//! Owns:        what a driver is told, where its rings lie, starting and stopping.
//! Never sees:  what moves frames.
//! Read next:   `pump`, which the thread runs.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use dataplane::memory::GuestMemory;
use dataplane::sys::{drain, signal};

use crate::counters::{DriverCounters, LiveDriverCounters};
use crate::error::Error;
use crate::pump::{Driver, Shared, BUFFER_SIZE, FRAME_LENGTH_MAX};
use crate::ring::Ring;

const FEATURE_MERGEABLE_RX: u64 = 1 << 15;
const FEATURE_VERSION_1: u64 = 1 << 32;

const QUEUE_SIZE_MAX: u16 = 1024;
const PAGE: u64 = 4096;

/// What a driver needs to know. The descriptors are borrowed until `stop`.
#[derive(Clone, Debug)]
pub struct DriverConfig {
    pub name: String,
    /// Rings and buffers are laid from here on, a multiple of 4096; `DriverPair::layout_size` bytes are used.
    pub guest_address: u64,
    pub queue_size: u16,
    /// The acknowledged virtio feature bits.
    pub features: u64,
    pub rx_kick: RawFd,
    pub rx_call: RawFd,
    pub tx_kick: RawFd,
    pub tx_call: RawFd,
    /// Non-blocking, with a vnet header as long as `features` say. None: what arrives is counted and dropped.
    pub tap: Option<RawFd>,
}

/// Guest addresses of one ring's three parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    pub descriptor_area: u64,
    pub driver_area: u64,
    pub device_area: u64,
}

/// Where everything of a pair lies, as offsets from its first byte.
struct Layout {
    rx: RingAddresses,
    rx_buffers: u64,
    tx: RingAddresses,
    tx_buffers: u64,
    size: u64,
}

impl Layout {
    fn new(queue_size: u16) -> Self {
        let entries = u64::from(queue_size);
        let mut end = 0;
        let mut place = |size: u64| {
            let start = end;
            end += size.next_multiple_of(PAGE);
            start
        };
        let mut ring = || RingAddresses {
            descriptor_area: place(16 * entries),
            driver_area: place(6 + 2 * entries),
            device_area: place(6 + 8 * entries),
        };
        let (rx, tx) = (ring(), ring());
        let buffers = entries * BUFFER_SIZE as u64;
        let (rx_buffers, tx_buffers) = (place(buffers), place(buffers));
        Self { rx, rx_buffers, tx, tx_buffers, size: end }
    }
}

enum Pump {
    Parked(Box<Driver>),
    Running(JoinHandle<Box<Driver>>),
    /// The thread panicked, and the driver went with it.
    Lost,
}

/// A virtio-net driver with its thread. It may be stopped and started again: rings and packets stay as they are.
pub struct DriverPair {
    rx: RingAddresses,
    tx: RingAddresses,
    name: String,
    shared: Arc<Shared>,
    pump: Pump,
}

impl DriverPair {
    /// Bytes of guest memory one pair uses, a multiple of 4096.
    pub fn layout_size(queue_size: u16) -> u64 {
        Layout::new(queue_size).size
    }

    /// Lays empty rings into guest memory.
    ///
    /// # Errors
    ///
    /// `Invalid` if the queue size is no power of two up to 1024, the address is not aligned, or it does not all lie in
    /// one region of guest memory. Nothing was written.
    pub fn new(memory: Arc<GuestMemory>, config: DriverConfig) -> Result<Self, Error> {
        let size = config.queue_size;
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(Error::Invalid(format!(
                "queue size {size} is not a power of two from 1 to {QUEUE_SIZE_MAX}"
            )));
        }
        let base = config.guest_address;
        if base % PAGE != 0 {
            return Err(Error::Invalid(format!("guest address {base:#x} is not a multiple of {PAGE}")));
        }
        let layout = Layout::new(size);
        let Some(host) = memory.host_exact(base, layout.size as usize) else {
            return Err(Error::Invalid(format!(
                "{} bytes at {base:#x} do not lie in one region of guest memory",
                layout.size
            )));
        };
        // SAFETY: `layout.size` bytes are mapped at `host`, and every offset of the layout lies inside them.
        let at = |offset: u64| unsafe { host.add(offset as usize) };
        let ring = |name, part: &RingAddresses| {
            let parts = [part.descriptor_area, part.driver_area, part.device_area].map(at);
            // SAFETY: the layout gives each part whole pages, as many as it needs; `_memory` keeps them mapped.
            unsafe { Ring::new(name, &config, parts) }
        };
        let (rx, tx) = (ring("rx", &layout.rx), ring("tx", &layout.tx));
        // A ring begins with zeroed indices, whatever lay there before. The rings come before all buffers.
        // SAFETY: inside the mapping (see `at`).
        unsafe { host.write_bytes(0, layout.rx_buffers as usize) };
        // SAFETY: no argument but the flags; the descriptor it gives is nobody else's.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(Error::System { what: "eventfd", error: io::Error::last_os_error() });
        }
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            // SAFETY: just created, and owned by nobody yet.
            wake: unsafe { OwnedFd::from_raw_fd(wake) },
            counters: LiveDriverCounters::default(),
            failure: Mutex::new(None),
        });
        let mergeable = config.features & FEATURE_MERGEABLE_RX != 0;
        let long_header = mergeable || config.features & FEATURE_VERSION_1 != 0;
        let header_length = if long_header { 12 } else { 10 };
        let absolute = |ring: &RingAddresses| RingAddresses {
            descriptor_area: base + ring.descriptor_area,
            driver_area: base + ring.driver_area,
            device_area: base + ring.device_area,
        };
        Ok(Self {
            rx: absolute(&layout.rx),
            tx: absolute(&layout.tx),
            name: config.name.clone(),
            shared: Arc::clone(&shared),
            pump: Pump::Parked(Box::new(Driver {
                _memory: memory,
                header_length,
                mergeable,
                rx,
                rx_buffers: at(layout.rx_buffers),
                rx_buffers_address: base + layout.rx_buffers,
                tx,
                tx_buffers: at(layout.tx_buffers),
                tx_buffers_address: base + layout.tx_buffers,
                tx_free: (0..size).rev().collect(),
                tx_chains: vec![Vec::new(); usize::from(size)],
                frame: vec![0; FRAME_LENGTH_MAX + header_length].into(),
                frame_length: 0,
                shared,
                config,
            })),
        })
    }

    /// Where the rings lie: (rx, tx).
    pub fn ring_addresses(&self) -> (RingAddresses, RingAddresses) {
        (self.rx, self.tx)
    }

    /// Fills the receive ring and lets the thread pump. Does nothing while it runs.
    ///
    /// # Errors
    ///
    /// The system refused the thread.
    pub fn start(&mut self) -> io::Result<()> {
        let mut driver = match std::mem::replace(&mut self.pump, Pump::Lost) {
            Pump::Parked(driver) => driver,
            other => {
                self.pump = other;
                return Ok(());
            }
        };
        self.shared.stopping.store(false, Ordering::Release);
        let filled = driver.fill();
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(self.name.clone()).spawn(move || {
            if let Err(reason) = filled.and_then(|()| driver.pump()) {
                *shared.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(reason));
            }
            driver
        })?;
        self.pump = Pump::Running(thread);
        Ok(())
    }

    /// Stops pumping and joins the thread. Idempotent.
    pub fn stop(&mut self) {
        match std::mem::replace(&mut self.pump, Pump::Lost) {
            Pump::Running(thread) => {
                self.shared.stopping.store(true, Ordering::Release);
                signal(self.shared.wake.as_raw_fd());
                if let Ok(driver) = thread.join() {
                    drain(self.shared.wake.as_raw_fd()).expect("our own eventfd");
                    self.pump = Pump::Parked(driver);
                }
            }
            other => self.pump = other,
        }
    }

    /// Why the thread gave up: the device broke a ring, or the TAP is gone. None while all is well.
    pub fn failure(&self) -> Option<Arc<Error>> {
        if matches!(self.pump, Pump::Lost) {
            return Some(Arc::new(Error::Panicked));
        }
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What moved so far: rx is what came from the backend, tx what went to it.
    pub fn counters(&self) -> DriverCounters {
        self.shared.counters.get()
    }
}

impl Drop for DriverPair {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::fence;

    use super::*;
    use dataplane::memory::RegionSpec;

    use crate::pump::HEADER_NUM_BUFFERS_OFFSET;
    use crate::ring::{DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, FEATURE_EVENT_INDEX};

    const HEADER: usize = 12;
    const FEATURES: u64 = FEATURE_VERSION_1 | FEATURE_MERGEABLE_RX | FEATURE_EVENT_INDEX;
    /// Far beyond what a healthy run takes: it only keeps a broken one from hanging.
    const PATIENCE_MS: i32 = 10_000;

    fn owned(fd: RawFd) -> OwnedFd {
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: just created by the caller.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    fn eventfd() -> OwnedFd {
        // SAFETY: no pointers.
        owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
    }

    fn readable(fd: &OwnedFd, timeout_ms: i32) -> bool {
        let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, as we say.
        unsafe { libc::poll(&raw mut polled, 1, timeout_ms) > 0 }
    }

    /// A device made by hand: one end of the rings, and the far end of the "TAP", which keeps frame boundaries.
    struct Bench {
        memory: Arc<GuestMemory>,
        pair: DriverPair,
        _tap: OwnedFd,
        far: OwnedFd,
        rx_kick: OwnedFd,
        rx_call: OwnedFd,
        tx_kick: OwnedFd,
        tx_call: OwnedFd,
        size: u16,
        seen: [u16; 2],
        completed: [u16; 2],
    }

    #[derive(Clone, Copy)]
    enum Side {
        Rx,
        Tx,
    }

    impl Bench {
        fn new(size: u16, features: u64) -> Self {
            let length = DriverPair::layout_size(size);
            // SAFETY: the name is a C string.
            let file = owned(unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) });
            // SAFETY: no pointers.
            assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), length as i64) }, 0);
            let spec = RegionSpec {
                guest_address: 0x10000,
                size: length,
                user_address: 0,
                mmap_offset: 0,
                fd: file.as_raw_fd(),
            };
            let memory = Arc::new(GuestMemory::new(&[spec]).unwrap());
            let mut ends = [-1; 2];
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            // SAFETY: `ends` has room for two.
            assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) }, 0);
            let [tap, far] = ends.map(owned);
            let [rx_kick, rx_call, tx_kick, tx_call] = std::array::from_fn(|_| eventfd());
            let config = DriverConfig {
                name: "driver".into(),
                guest_address: 0x10000,
                queue_size: size,
                features,
                rx_kick: rx_kick.as_raw_fd(),
                rx_call: rx_call.as_raw_fd(),
                tx_kick: tx_kick.as_raw_fd(),
                tx_call: tx_call.as_raw_fd(),
                tap: Some(tap.as_raw_fd()),
            };
            let pair = DriverPair::new(Arc::clone(&memory), config).unwrap();
            let (seen, completed) = ([0; 2], [0; 2]);
            Self { memory, pair, _tap: tap, far, rx_kick, rx_call, tx_kick, tx_call, size, seen, completed }
        }

        fn ring(&self, side: Side) -> RingAddresses {
            let (rx, tx) = self.pair.ring_addresses();
            match side {
                Side::Rx => rx,
                Side::Tx => tx,
            }
        }

        fn get<const N: usize>(&self, address: u64) -> [u8; N] {
            let mut data = [0; N];
            self.memory.read(address, &mut data).unwrap();
            data
        }

        fn put(&self, address: u64, data: &[u8]) {
            self.memory.write(address, data).unwrap();
        }

        /// The next chain offered, waiting for a kick if there is none: its head and its (address, length, flags).
        fn chain(&mut self, side: Side) -> (u16, Vec<(u64, u32, u16)>) {
            let ring = self.ring(side);
            let seen = self.seen[side as usize];
            while u16::from_le_bytes(self.get(ring.driver_area + 2)) == seen {
                let event = ring.device_area + 4 + 8 * u64::from(self.size);
                self.put(event, &seen.to_le_bytes());
                fence(Ordering::SeqCst);
                if u16::from_le_bytes(self.get(ring.driver_area + 2)) != seen {
                    break;
                }
                let kick = match side {
                    Side::Rx => &self.rx_kick,
                    Side::Tx => &self.tx_kick,
                };
                assert!(readable(kick, PATIENCE_MS), "no kick came");
                drain(kick.as_raw_fd()).unwrap();
            }
            let slot = ring.driver_area + 4 + 2 * u64::from(seen % self.size);
            let head = u16::from_le_bytes(self.get(slot));
            self.seen[side as usize] = seen.wrapping_add(1);
            let mut chain = Vec::new();
            let mut index = head;
            loop {
                let entry: [u8; 16] = self.get(ring.descriptor_area + 16 * u64::from(index));
                let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
                let address = u64::from_le_bytes(entry[..8].try_into().unwrap());
                let length = u32::from_le_bytes(entry[8..12].try_into().unwrap());
                chain.push((address, length, word(12)));
                if word(12) & DESCRIPTOR_NEXT == 0 {
                    return (head, chain);
                }
                index = word(14);
            }
        }

        fn bytes(&self, chain: &[(u64, u32, u16)]) -> Vec<u8> {
            let mut data = Vec::new();
            for &(address, length, _) in chain {
                let start = data.len();
                data.resize(start + length as usize, 0);
                self.memory.read(address, &mut data[start..]).unwrap();
            }
            data
        }

        /// Writes used elements, then the index, then calls.
        fn complete(&mut self, side: Side, elements: &[(u32, u32)]) {
            let ring = self.ring(side);
            for &(id, length) in elements {
                let completed = &mut self.completed[side as usize];
                let slot = ring.device_area + 4 + 8 * u64::from(*completed % self.size);
                *completed = completed.wrapping_add(1);
                self.put(slot, &(u64::from(id) | u64::from(length) << 32).to_le_bytes());
            }
            fence(Ordering::Release);
            self.put(ring.device_area + 2, &self.completed[side as usize].to_le_bytes());
            signal(match side {
                Side::Rx => self.rx_call.as_raw_fd(),
                Side::Tx => self.tx_call.as_raw_fd(),
            });
        }

        /// Puts a frame, header included, on the network side of the guest's TAP.
        fn send(&self, data: &[u8]) -> bool {
            // SAFETY: `data` is as long as we say.
            unsafe {
                libc::send(self.far.as_raw_fd(), data.as_ptr().cast(), data.len(), 0) == data.len() as isize
            }
        }

        fn receive(&self) -> Vec<u8> {
            assert!(readable(&self.far, PATIENCE_MS), "no frame came");
            let mut data = vec![0; 70_000];
            // SAFETY: `data` is as long as we say.
            let length = unsafe { libc::recv(self.far.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), 0) };
            data.truncate(usize::try_from(length).unwrap());
            data
        }
    }

    fn frame(number: u8, length: usize) -> Vec<u8> {
        let mut data = vec![0; HEADER];
        data.resize(HEADER + length, number);
        data
    }

    #[test]
    fn every_receive_buffer_is_offered_at_the_start() {
        let mut bench = Bench::new(8, FEATURES);
        bench.pair.start().unwrap();
        for head in 0..8 {
            let (offered, chain) = bench.chain(Side::Rx);
            assert_eq!(offered, head);
            assert_eq!((chain[0].1, chain[0].2), (BUFFER_SIZE as u32, DESCRIPTOR_WRITE));
        }
    }

    #[test]
    fn a_full_transmit_ring_loses_nothing_and_keeps_the_order() {
        for features in [FEATURES, FEATURE_VERSION_1] {
            let mut bench = Bench::new(4, features);
            bench.pair.start().unwrap();
            for number in 0..20 {
                assert!(bench.send(&frame(number, 100)));
            }
            for number in 0..20 {
                let (head, chain) = bench.chain(Side::Tx);
                assert_eq!(bench.bytes(&chain), frame(number, 100));
                bench.complete(Side::Tx, &[(head.into(), 0)]);
            }
            bench.pair.stop();
            assert!(bench.pair.failure().is_none(), "{:?}", bench.pair.failure());
            assert_eq!(bench.pair.counters().tx_packets, 20);
            assert_eq!(bench.pair.counters().tx_bytes, 2000);
        }
    }

    #[test]
    fn a_long_frame_is_sent_as_one_chain() {
        let mut bench = Bench::new(8, FEATURES);
        bench.pair.start().unwrap();
        let long = frame(7, 3 * BUFFER_SIZE);
        assert!(bench.send(&long));
        let (_, chain) = bench.chain(Side::Tx);
        assert_eq!(chain.len(), 4);
        assert_eq!(bench.bytes(&chain), long);
    }

    #[test]
    fn a_frame_that_fits_no_ring_is_dropped_and_counted() {
        let mut bench = Bench::new(2, FEATURES);
        bench.pair.start().unwrap();
        assert!(bench.send(&frame(1, 2 * BUFFER_SIZE)));
        assert!(bench.send(&frame(2, 10)));
        let (_, chain) = bench.chain(Side::Tx);
        assert_eq!(bench.bytes(&chain), frame(2, 10));
        assert_eq!(bench.pair.counters().tx_dropped, 1);
    }

    #[test]
    fn buffers_of_one_frame_are_put_together_and_offered_again() {
        let mut bench = Bench::new(4, FEATURES);
        bench.pair.start().unwrap();
        let mut expected = frame(9, 3000);
        expected[HEADER_NUM_BUFFERS_OFFSET] = 2;
        for _ in 0..5 {
            let (first, head) = bench.chain(Side::Rx);
            let (second, tail) = bench.chain(Side::Rx);
            bench.put(head[0].0, &expected[..BUFFER_SIZE]);
            bench.put(tail[0].0, &expected[BUFFER_SIZE..]);
            let rest = (expected.len() - BUFFER_SIZE) as u32;
            bench.complete(Side::Rx, &[(first.into(), BUFFER_SIZE as u32), (second.into(), rest)]);
            assert_eq!(bench.receive(), expected);
        }
        bench.pair.stop();
        assert_eq!(bench.pair.counters().rx_packets, 5);
    }

    #[test]
    fn a_full_tap_delays_frames_and_drops_none() {
        let mut bench = Bench::new(256, FEATURES);
        let mut data = frame(3, 1500);
        data[HEADER_NUM_BUFFERS_OFFSET] = 1;
        bench.pair.start().unwrap();
        let mut elements = Vec::new();
        for _ in 0..256 {
            let (head, chain) = bench.chain(Side::Rx);
            bench.put(chain[0].0, &data);
            elements.push((u32::from(head), data.len() as u32));
        }
        // More than the socket takes at once: the driver must wait for room.
        bench.complete(Side::Rx, &elements);
        for _ in 0..256 {
            assert_eq!(bench.receive(), data);
        }
        bench.pair.stop();
        assert_eq!(bench.pair.counters().rx_packets, 256);
        assert_eq!(bench.pair.counters().rx_dropped, 0);
    }

    #[test]
    fn a_device_that_wants_no_kick_gets_none() {
        let mut bench = Bench::new(8, FEATURES);
        bench.pair.start().unwrap();
        for _ in 0..8 {
            bench.chain(Side::Rx);
        }
        let (first, _) = {
            assert!(bench.send(&frame(0, 10)));
            bench.chain(Side::Tx)
        };
        // The event stands where the device last asked: behind what follows.
        let _ = drain(bench.tx_kick.as_raw_fd());
        let event = bench.ring(Side::Tx).device_area + 4 + 8 * 8;
        bench.put(event, &0x8000_u16.to_le_bytes());
        assert!(bench.send(&frame(1, 10)));
        bench.complete(Side::Tx, &[(first.into(), 0)]);
        // The last pass of `stop` has sent the frame.
        bench.pair.stop();
        assert_eq!(bench.pair.counters().tx_packets, 2);
        assert!(!readable(&bench.tx_kick, 0));
    }

    #[test]
    fn stopping_and_starting_again_loses_nothing() {
        let mut bench = Bench::new(4, FEATURES);
        for number in 0..12 {
            bench.pair.start().unwrap();
            assert!(bench.send(&frame(number, 60)));
            bench.pair.stop();
            bench.pair.stop();
            let (head, chain) = bench.chain(Side::Tx);
            assert_eq!(bench.bytes(&chain), frame(number, 60));
            bench.complete(Side::Tx, &[(head.into(), 0)]);
        }
        assert_eq!(bench.pair.counters().tx_packets, 12);
    }

    #[test]
    fn a_device_that_breaks_a_ring_stops_the_driver_with_a_reason() {
        type Spoil = fn(&mut Bench);
        let cases: [(&str, Spoil); 5] = [
            ("names buffer 9, which is not with the device", |bench| bench.complete(Side::Rx, &[(9, 100)])),
            ("wrote 5000 bytes into buffer 0, which has 2048", |bench| {
                bench.complete(Side::Rx, &[(0, 5000)])
            }),
            ("used 5 bytes of a buffer, the header alone has 12", |bench| {
                bench.complete(Side::Rx, &[(0, 5)])
            }),
            ("only 4 are with the device", |bench| bench.complete(Side::Rx, &[(0, 12); 5])),
            ("only 0 are with the device", |bench| bench.complete(Side::Tx, &[(0, 0)])),
        ];
        for (expected, spoil) in cases {
            let mut bench = Bench::new(4, FEATURES);
            for index in 0..4 {
                // As a sane device would: every frame has one buffer.
                let address = 0x10000 + Layout::new(4).rx_buffers + index * BUFFER_SIZE as u64;
                bench.put(address + HEADER_NUM_BUFFERS_OFFSET as u64, &1_u16.to_le_bytes());
            }
            spoil(&mut bench);
            bench.pair.start().unwrap();
            bench.pair.stop();
            let failure = bench.pair.failure().expect("it stops");
            assert!(matches!(*failure, Error::Device(_)), "{failure:?}");
            assert!(failure.to_string().contains(expected), "{expected}: {failure}");
        }
    }

    #[test]
    fn a_tap_that_went_away_stops_the_driver_with_a_reason() {
        let mut bench = Bench::new(4, FEATURES);
        drop(std::mem::replace(&mut bench.far, eventfd()));
        bench.pair.start().unwrap();
        bench.pair.stop();
        let failure = bench.pair.failure().expect("it stops");
        assert!(matches!(*failure, Error::Tap(_)), "{failure:?}");
    }

    #[test]
    fn what_cannot_be_laid_out_is_refused() {
        let bench = Bench::new(4, FEATURES);
        let config = |guest_address, queue_size| DriverConfig {
            name: String::new(),
            guest_address,
            queue_size,
            features: FEATURES,
            rx_kick: -1,
            rx_call: -1,
            tx_kick: -1,
            tx_call: -1,
            tap: None,
        };
        for (address, size, expected) in [
            (0x10000, 3, "power of two"),
            (0x10000, 0, "power of two"),
            (0x10000, 2048, "power of two"),
            (0x10001, 4, "multiple"),
            (0x11000, 4, "one region"),
            (0x10000, 8, "one region"),
        ] {
            let refusal = DriverPair::new(Arc::clone(&bench.memory), config(address, size)).err();
            let Some(Error::Invalid(reason)) = refusal else { panic!("{refusal:?}") };
            assert!(reason.contains(expected), "{reason}");
        }
    }
}

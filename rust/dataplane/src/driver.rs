//! The other side of a queue pair: a virtio-net driver (the guest's part) between its rings and a TAP.
//!
//! Owns:        two rings laid into guest memory, their buffers, the thread that pumps.
//! Never sees:  vhost-user, or any code of the backend: it meets the device in guest memory alone.
//! Read next:   driver/split.rs and driver/packed.rs, a ring from the driver's side; queue_pair.rs, the side this one
//!              talks to.
//!
//! For tests, demonstrations and benchmarks. It loses no packet of its own: the TAP is read only while the transmit
//! ring has room, a frame the TAP does not take yet stays in its buffers. And it is a witness: a device that answers
//! what it was not asked (two processes serving one ring do) stops it with a reason.

mod packed;
mod split;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::counters::{DriverCounters, LiveDriverCounters};
use crate::memory::GuestMemory;
use crate::sys::{drain, poll, signal};

use packed::PackedRing;
use split::SplitRing;

const FEATURE_MERGEABLE_RX: u64 = 1 << 15;
const FEATURE_EVENT_INDEX: u64 = 1 << 29;
const FEATURE_VERSION_1: u64 = 1 << 32;
const FEATURE_PACKED: u64 = 1 << 34;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
/// Where `num_buffers` stands in the header. Virtio 1.2, 5.1.6.
const HEADER_NUM_BUFFERS_OFFSET: usize = 10;

/// One buffer of either ring: a full Ethernet frame at MTU 1500 with its header, in a power of two so that none
/// crosses a page.
const BUFFER_SIZE: usize = 2048;

/// The longest frame one descriptor chain may carry: 64 KiB, the most an IP packet can be, and an Ethernet header.
const FRAME_LENGTH_MAX: usize = 65536 + 18;

/// Packets one ring moves before the other has its turn: long enough to spread a kick, short enough for latency.
const BATCH: usize = 64;

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

/// A used buffer, checked: `head` was with the device and `length` fits what it offered.
#[derive(Clone, Copy)]
struct Used {
    head: u16,
    length: usize,
}

/// A piece of a chain: the number of its buffer, which names the chain where it is the first, and the buffer itself.
struct Piece {
    index: u16,
    address: u64,
    length: usize,
}

/// The driver's end of one ring of either format.
enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    /// # Safety
    ///
    /// Each pointer is aligned to a page and valid for a split ring's part of that place for as long as the ring lives.
    unsafe fn new(name: &'static str, config: &DriverConfig, parts: [*mut u8; 3]) -> Self {
        // SAFETY: the caller's; a packed ring's parts are no larger.
        unsafe {
            if config.features & FEATURE_PACKED != 0 {
                Self::Packed(PackedRing::new(name, config, parts))
            } else {
                Self::Split(SplitRing::new(name, config, parts))
            }
        }
    }

    /// Gives a chain to the device, known by its first piece. `writable`: bytes the device may write into it.
    fn offer(&mut self, pieces: &[Piece], writable: usize) {
        match self {
            Self::Split(ring) => ring.offer(pieces, writable),
            Self::Packed(ring) => ring.offer(pieces, writable),
        }
    }

    /// Whether the chain of that number is with the device.
    fn is_offered(&self, head: u16) -> bool {
        match self {
            Self::Split(ring) => ring.is_offered(head),
            Self::Packed(ring) => ring.is_offered(head),
        }
    }

    /// How many used chains wait.
    fn waiting(&mut self) -> Result<u16, String> {
        match self {
            Self::Split(ring) => ring.waiting(),
            Self::Packed(ring) => ring.waiting(),
        }
    }

    /// Looks at a waiting used chain, `ahead` of the next one.
    fn peek(&self, ahead: u16) -> Result<Used, String> {
        match self {
            Self::Split(ring) => ring.peek(ahead),
            Self::Packed(ring) => Ok(ring.peek(ahead)),
        }
    }

    /// Takes the next used chain, which `peek(0)` gave, back from the device.
    fn take(&mut self, head: u16) {
        match self {
            Self::Split(ring) => ring.take(head),
            Self::Packed(ring) => ring.take(head),
        }
    }

    /// Whether the device wants to hear of what was offered since the last look.
    fn wants_kick(&mut self) -> Result<bool, String> {
        match self {
            Self::Split(ring) => Ok(ring.wants_kick()),
            Self::Packed(ring) => ring.wants_kick(),
        }
    }

    /// Asks for a call at the next used chain; true if one came meanwhile, so that sleeping would miss it.
    fn ask_for_call(&mut self) -> Result<bool, String> {
        match self {
            Self::Split(ring) => ring.ask_for_call(),
            Self::Packed(ring) => ring.ask_for_call(),
        }
    }

    /// Wants no call until the next `ask_for_call`.
    fn suppress_calls(&mut self) {
        match self {
            Self::Split(ring) => ring.suppress_calls(),
            Self::Packed(ring) => ring.suppress_calls(),
        }
    }
}

/// Where one direction stands after its batch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// The batch ended, there may be more.
    More,
    /// Nothing to move.
    Idle,
    /// There is something to move, and no room where it goes.
    Blocked,
}

/// What the thread shares with its owner.
struct Shared {
    stopping: AtomicBool,
    wake: OwnedFd,
    counters: LiveDriverCounters,
    failure: Mutex<Option<String>>,
}

/// Both rings and what moves between them and the TAP.
struct Driver {
    config: DriverConfig,
    /// Keeps the mapping alive that the rings and buffers point into.
    _memory: Arc<GuestMemory>,
    header_length: usize,
    mergeable: bool,
    rx: Ring,
    rx_buffers: *mut u8,
    rx_buffers_address: u64,
    tx: Ring,
    tx_buffers: *mut u8,
    tx_buffers_address: u64,
    /// Transmit descriptors that belong to no chain.
    tx_free: Vec<u16>,
    /// The descriptors of each transmit chain, by its head.
    tx_chains: Vec<Vec<u16>>,
    /// One frame from the TAP, with its header.
    frame: Box<[u8]>,
    /// How much of `frame` waits for room in the transmit ring; 0: nothing.
    frame_length: usize,
    shared: Arc<Shared>,
}

// SAFETY: the raw pointers point into `_memory`, which moves along; nothing else in this process uses them.
unsafe impl Send for Driver {}

impl Driver {
    fn rx_buffer(&self, head: u16) -> *mut u8 {
        assert!(head < self.config.queue_size);
        // SAFETY: buffer `head` of `size` lies inside the receive buffers.
        unsafe { self.rx_buffers.add(usize::from(head) * BUFFER_SIZE) }
    }

    fn tx_buffer(&self, index: u16) -> *mut u8 {
        assert!(index < self.config.queue_size);
        // SAFETY: buffer `index` of `size` lies inside the transmit buffers.
        unsafe { self.tx_buffers.add(usize::from(index) * BUFFER_SIZE) }
    }

    /// Gives every receive buffer that is here to the device.
    fn fill(&mut self) -> Result<(), String> {
        for head in 0..self.config.queue_size {
            if !self.rx.is_offered(head) {
                self.offer_buffer(head);
            }
        }
        self.kick_rx()
    }

    /// Gives one receive buffer to the device.
    fn offer_buffer(&mut self, head: u16) {
        let address = self.rx_buffers_address + u64::from(head) * BUFFER_SIZE as u64;
        self.rx.offer(&[Piece { index: head, address, length: BUFFER_SIZE }], BUFFER_SIZE);
    }

    fn kick_rx(&mut self) -> Result<(), String> {
        if self.rx.wants_kick()? {
            signal(self.config.rx_kick);
        }
        Ok(())
    }

    fn kick_tx(&mut self) -> Result<(), String> {
        if self.tx.wants_kick()? {
            signal(self.config.tx_kick);
        }
        Ok(())
    }

    /// Device to TAP, one batch.
    fn receive(&mut self) -> Result<Flow, String> {
        let mut flow = Flow::More;
        for _ in 0..BATCH {
            let waiting = self.rx.waiting()?;
            if waiting == 0 {
                flow = Flow::Idle;
                break;
            }
            let (buffers, count, length) = self.received_frame(waiting)?;
            if !self.deliver(&buffers[..count], length)? {
                flow = Flow::Blocked;
                break;
            }
            for _ in 0..count {
                let head = self.rx.peek(0)?.head;
                self.rx.take(head);
                self.offer_buffer(head);
            }
        }
        self.kick_rx()?;
        Ok(flow)
    }

    /// The next frame the device finished: its pieces, how many, and how many bytes in all, header included.
    fn received_frame(&self, waiting: u16) -> Result<([libc::iovec; PIECES_MAX], usize, usize), String> {
        let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES_MAX];
        let first = self.rx.peek(0)?;
        if first.length < self.header_length {
            return Err(format!(
                "rx: device used {} bytes of a buffer, the header alone has {}",
                first.length, self.header_length
            ));
        }
        let mut count = 1;
        if self.mergeable {
            // SAFETY: the header lies inside the buffer; the device is done with it (Acquire in `waiting`).
            let field = unsafe {
                self.rx_buffer(first.head).add(HEADER_NUM_BUFFERS_OFFSET).cast::<[u8; 2]>().read_volatile()
            };
            count = usize::from(u16::from_le_bytes(field));
            if count == 0 || count > PIECES_MAX {
                return Err(format!("rx: header says {count} buffers, 1 to {PIECES_MAX} are possible"));
            }
            // All buffers of a frame come back at once. Virtio 1.2, 5.1.6.4.
            if count > usize::from(waiting) {
                return Err(format!("rx: header says {count} buffers, only {waiting} came back"));
            }
        }
        let mut length = 0;
        for (ahead, piece) in pieces.iter_mut().enumerate().take(count) {
            let used = self.rx.peek(ahead as u16)?;
            *piece = libc::iovec { iov_base: self.rx_buffer(used.head).cast(), iov_len: used.length };
            length += used.length;
        }
        Ok((pieces, count, length))
    }

    /// Writes one frame to the TAP; false if the TAP has no room now.
    fn deliver(&self, pieces: &[libc::iovec], length: usize) -> Result<bool, String> {
        if let Some(tap) = self.config.tap {
            // SAFETY: each piece lies inside the receive buffers, which stay mapped.
            let written = retry(|| unsafe { libc::writev(tap, pieces.as_ptr(), pieces.len() as i32) });
            if let Err(error) = written {
                match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(false),
                    // Interface down; or a header the kernel refuses: a guest drops such a frame too.
                    Some(libc::EIO | libc::EINVAL) => {
                        self.shared.counters.rx_dropped.add(1);
                        return Ok(true);
                    }
                    _ => return Err(format!("writing the guest's TAP: {error}")),
                }
            }
        }
        self.shared.counters.rx_packets.add(1);
        self.shared.counters.rx_bytes.add((length - self.header_length) as u64);
        Ok(true)
    }

    /// TAP to device, one batch.
    fn transmit(&mut self) -> Result<Flow, String> {
        let mut flow = Flow::More;
        for _ in 0..BATCH {
            self.reclaim()?;
            if self.tx_free.is_empty() {
                flow = Flow::Blocked;
                break;
            }
            if self.frame_length == 0 && !self.fetch()? {
                flow = Flow::Idle;
                break;
            }
            if !self.send_frame() {
                flow = Flow::Blocked;
                break;
            }
        }
        self.kick_tx()?;
        Ok(flow)
    }

    /// Takes back what the device has sent.
    fn reclaim(&mut self) -> Result<(), String> {
        for _ in 0..self.tx.waiting()? {
            let head = self.tx.peek(0)?.head;
            self.tx.take(head);
            self.tx_free.append(&mut self.tx_chains[usize::from(head)]);
        }
        Ok(())
    }

    /// Reads one frame from the TAP; false if there is none.
    fn fetch(&mut self) -> Result<bool, String> {
        let Some(tap) = self.config.tap else { return Ok(false) };
        // SAFETY: `frame` is ours and as long as we say.
        let read = retry(|| unsafe { libc::read(tap, self.frame.as_mut_ptr().cast(), self.frame.len()) });
        match read {
            Ok(length) if length >= self.header_length => self.frame_length = length,
            Ok(length) => {
                return Err(format!("the guest's TAP gave {length} bytes: it is gone, or has no vnet header"))
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
            Err(error) => return Err(format!("reading the guest's TAP: {error}")),
        }
        Ok(true)
    }

    /// Puts the waiting frame into the transmit ring; false if there is no room yet.
    fn send_frame(&mut self) -> bool {
        let needed = self.frame_length.div_ceil(BUFFER_SIZE);
        if needed > usize::from(self.config.queue_size) {
            self.shared.counters.tx_dropped.add(1); // never will there be room
            self.frame_length = 0;
            return true;
        }
        if needed > self.tx_free.len() {
            return false;
        }
        let chain = self.tx_free.split_off(self.tx_free.len() - needed);
        let mut pieces = Vec::with_capacity(needed);
        for (&index, piece) in chain.iter().zip(self.frame[..self.frame_length].chunks(BUFFER_SIZE)) {
            // SAFETY: the buffer holds BUFFER_SIZE bytes, a piece is no longer, and the device does not have it.
            unsafe { self.tx_buffer(index).copy_from_nonoverlapping(piece.as_ptr(), piece.len()) };
            let address = self.tx_buffers_address + u64::from(index) * BUFFER_SIZE as u64;
            pieces.push(Piece { index, address, length: piece.len() });
        }
        let head = chain[0];
        self.tx_chains[usize::from(head)] = chain;
        self.tx.offer(&pieces, 0);
        self.shared.counters.tx_packets.add(1);
        self.shared.counters.tx_bytes.add((self.frame_length - self.header_length) as u64);
        self.frame_length = 0;
        true
    }

    /// The thread: moves packets until it is told to stop.
    fn pump(&mut self) -> Result<(), String> {
        loop {
            // Looked at first, so that a whole pass follows `stop`.
            let stopping = self.shared.stopping.load(Ordering::Acquire);
            let (rx, tx) = (self.receive()?, self.transmit()?);
            if stopping {
                return Ok(());
            }
            if rx == Flow::More || tx == Flow::More {
                continue;
            }
            // A TAP that is full is what the receive side waits for, a transmit ring that is full the device.
            if rx == Flow::Idle && self.rx.ask_for_call()? {
                continue;
            }
            if tx == Flow::Blocked && self.tx.ask_for_call()? {
                continue;
            }
            self.sleep(rx, tx)?;
            self.rx.suppress_calls();
            self.tx.suppress_calls();
        }
    }

    fn sleep(&self, rx: Flow, tx: Flow) -> Result<(), String> {
        let mut tap_events = 0;
        if tx == Flow::Idle {
            tap_events |= libc::POLLIN;
        }
        if rx == Flow::Blocked {
            tap_events |= libc::POLLOUT;
        }
        // Without events a broken TAP would still report POLLERR, again and again: leave it out.
        let tap = self.config.tap.filter(|_| tap_events != 0).unwrap_or(-1);
        let watch = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut polled = [
            watch(self.shared.wake.as_raw_fd(), libc::POLLIN),
            watch(self.config.rx_call, libc::POLLIN),
            watch(self.config.tx_call, libc::POLLIN),
            watch(tap, tap_events),
        ];
        poll(&mut polled, None).map_err(|error| format!("poll: {error}"))?;
        for call in &polled[1..3] {
            if call.revents != 0 {
                drain(call.fd).map_err(|error| format!("call eventfd: {error}"))?;
            }
        }
        Ok(())
    }
}

/// Pieces the longest frame has.
const PIECES_MAX: usize = (FRAME_LENGTH_MAX + 12).div_ceil(BUFFER_SIZE);

/// Calls again what a signal interrupted; a negative answer becomes the error it stands for.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(answer) = usize::try_from(call()) {
            return Ok(answer);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
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
    /// A text if the queue size is no power of two up to 1024, the address is not aligned, or it does not all lie in
    /// one region of guest memory. Nothing was written.
    pub fn new(memory: Arc<GuestMemory>, config: DriverConfig) -> Result<Self, String> {
        let size = config.queue_size;
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(format!("queue size {size} is not a power of two from 1 to {QUEUE_SIZE_MAX}"));
        }
        let base = config.guest_address;
        if base % PAGE != 0 {
            return Err(format!("guest address {base:#x} is not a multiple of {PAGE}"));
        }
        let layout = Layout::new(size);
        let Some(host) = memory.host_exact(base, layout.size as usize) else {
            return Err(format!(
                "{} bytes at {base:#x} do not lie in one region of guest memory",
                layout.size
            ));
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
            return Err(format!("eventfd: {}", io::Error::last_os_error()));
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
                *shared.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(reason);
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
    pub fn failure(&self) -> Option<String> {
        if matches!(self.pump, Pump::Lost) {
            return Some("the driver's thread panicked".into());
        }
        self.shared.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
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
    use crate::memory::RegionSpec;

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
            assert_eq!(bench.pair.failure(), None);
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
            let failure = bench.pair.failure().unwrap_or_default();
            assert!(failure.contains(expected), "{expected}: {failure}");
        }
    }

    #[test]
    fn a_tap_that_went_away_stops_the_driver_with_a_reason() {
        let mut bench = Bench::new(4, FEATURES);
        drop(std::mem::replace(&mut bench.far, eventfd()));
        bench.pair.start().unwrap();
        bench.pair.stop();
        assert!(bench.pair.failure().unwrap().contains("TAP"), "{:?}", bench.pair.failure());
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
            assert!(refusal.as_deref().is_some_and(|text| text.contains(expected)), "{refusal:?}");
        }
    }
}

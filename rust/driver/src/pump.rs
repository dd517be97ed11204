//! What moves frames between a driver's two rings and the guest's own TAP.
//!
//! Owns:        both rings, the buffers they lead to, the frame that waits for room.
//! Never sees:  how the rings were laid out; threads.
//! Read next:   `ring`; `pair`, whose thread runs this.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use dataplane::memory::GuestMemory;
use dataplane::sys::{drain, poll, signal};

use crate::counters::LiveDriverCounters;
use crate::error::Error;
use crate::pair::DriverConfig;
use crate::ring::{Piece, Ring};

/// Where `num_buffers` stands in the header. Virtio 1.2, 5.1.6.
pub(crate) const HEADER_NUM_BUFFERS_OFFSET: usize = 10;

/// One buffer of either ring: a full Ethernet frame at MTU 1500 with its header, in a power of two so that none
/// crosses a page.
pub(crate) const BUFFER_SIZE: usize = 2048;

/// The longest frame one descriptor chain may carry: 64 KiB, the most an IP packet can be, and an Ethernet header.
pub(crate) const FRAME_LENGTH_MAX: usize = 65536 + 18;

/// Packets one ring moves before the other has its turn: long enough to spread a kick, short enough for latency.
const BATCH: usize = 64;

/// Pieces the longest frame has.
const PIECES_MAX: usize = (FRAME_LENGTH_MAX + 12).div_ceil(BUFFER_SIZE);

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
pub(crate) struct Shared {
    pub(crate) stopping: AtomicBool,
    pub(crate) wake: OwnedFd,
    pub(crate) counters: LiveDriverCounters,
    pub(crate) failure: Mutex<Option<Arc<Error>>>,
}

/// Both rings and what moves between them and the TAP.
pub(crate) struct Driver {
    pub(crate) config: DriverConfig,
    /// Keeps the mapping alive that the rings and buffers point into.
    pub(crate) _memory: Arc<GuestMemory>,
    pub(crate) header_length: usize,
    pub(crate) mergeable: bool,
    pub(crate) rx: Ring,
    pub(crate) rx_buffers: *mut u8,
    pub(crate) rx_buffers_address: u64,
    pub(crate) tx: Ring,
    pub(crate) tx_buffers: *mut u8,
    pub(crate) tx_buffers_address: u64,
    /// Transmit descriptors that belong to no chain.
    pub(crate) tx_free: Vec<u16>,
    /// The descriptors of each transmit chain, by its head.
    pub(crate) tx_chains: Vec<Vec<u16>>,
    /// One frame from the TAP, with its header.
    pub(crate) frame: Box<[u8]>,
    /// How much of `frame` waits for room in the transmit ring; 0: nothing.
    pub(crate) frame_length: usize,
    pub(crate) shared: Arc<Shared>,
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
    pub(crate) fn fill(&mut self) -> Result<(), Error> {
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

    fn kick_rx(&mut self) -> Result<(), Error> {
        if self.rx.wants_kick()? {
            signal(self.config.rx_kick);
        }
        Ok(())
    }

    fn kick_tx(&mut self) -> Result<(), Error> {
        if self.tx.wants_kick()? {
            signal(self.config.tx_kick);
        }
        Ok(())
    }

    /// Device to TAP, one batch.
    fn receive(&mut self) -> Result<Flow, Error> {
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
    fn received_frame(&self, waiting: u16) -> Result<([libc::iovec; PIECES_MAX], usize, usize), Error> {
        let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES_MAX];
        let first = self.rx.peek(0)?;
        if first.length < self.header_length {
            return Err(Error::Device(format!(
                "rx: device used {} bytes of a buffer, the header alone has {}",
                first.length, self.header_length
            )));
        }
        let mut count = 1;
        if self.mergeable {
            // SAFETY: the header lies inside the buffer; the device is done with it (Acquire in `waiting`).
            let field = unsafe {
                self.rx_buffer(first.head).add(HEADER_NUM_BUFFERS_OFFSET).cast::<[u8; 2]>().read_volatile()
            };
            count = usize::from(u16::from_le_bytes(field));
            if count == 0 || count > PIECES_MAX {
                return Err(Error::Device(format!(
                    "rx: header says {count} buffers, 1 to {PIECES_MAX} are possible"
                )));
            }
            // All buffers of a frame come back at once. Virtio 1.2, 5.1.6.4.
            if count > usize::from(waiting) {
                return Err(Error::Device(format!(
                    "rx: header says {count} buffers, only {waiting} came back"
                )));
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
    fn deliver(&self, pieces: &[libc::iovec], length: usize) -> Result<bool, Error> {
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
                    _ => return Err(Error::Tap(format!("writing the guest's TAP: {error}"))),
                }
            }
        }
        self.shared.counters.rx_packets.add(1);
        self.shared.counters.rx_bytes.add((length - self.header_length) as u64);
        Ok(true)
    }

    /// TAP to device, one batch.
    fn transmit(&mut self) -> Result<Flow, Error> {
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
    fn reclaim(&mut self) -> Result<(), Error> {
        for _ in 0..self.tx.waiting()? {
            let head = self.tx.peek(0)?.head;
            self.tx.take(head);
            self.tx_free.append(&mut self.tx_chains[usize::from(head)]);
        }
        Ok(())
    }

    /// Reads one frame from the TAP; false if there is none.
    fn fetch(&mut self) -> Result<bool, Error> {
        let Some(tap) = self.config.tap else { return Ok(false) };
        // SAFETY: `frame` is ours and as long as we say.
        let read = retry(|| unsafe { libc::read(tap, self.frame.as_mut_ptr().cast(), self.frame.len()) });
        match read {
            Ok(length) if length >= self.header_length => self.frame_length = length,
            Ok(length) => {
                return Err(Error::Tap(format!(
                    "the guest's TAP gave {length} bytes: it is gone, or has no vnet header"
                )))
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
            Err(error) => return Err(Error::Tap(format!("reading the guest's TAP: {error}"))),
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
    pub(crate) fn pump(&mut self) -> Result<(), Error> {
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

    fn sleep(&self, rx: Flow, tx: Flow) -> Result<(), Error> {
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
        poll(&mut polled, None).map_err(|error| Error::System { what: "poll", error })?;
        for call in &polled[1..3] {
            if call.revents != 0 {
                drain(call.fd).map_err(|error| Error::System { what: "call eventfd", error })?;
            }
        }
        Ok(())
    }
}

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

//! Moving packets between a TAP and two rings, a bounded batch at a time.
//!
//! Owns:        receiving into the guest's buffers, transmitting from them, what is waited for when neither can go on.
//! Never sees:  threads and locks, and when to stop but for a flag it looks at between packets.
//! Read next:   `queue_pair`, the thread that calls this.
//!
//! Nothing is copied here: the TAP reads and writes guest memory. A frame that was read is always delivered before
//! anything else happens, because a read from a TAP cannot be undone.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use crate::bell::{check_kick, Bell};
use crate::chain::{Chain, Direction, Features, Layout, RingError, CHAIN_BUFFERS_MAX};
use crate::counters::{Counter, LiveCounters};
use crate::ledger::Slot;
use crate::memory::GuestMemory;
use crate::ring::{Format, Ring};
use crate::sys;

/// What one direction may move before the other gets its turn. The packet that reaches the limit of bytes is moved whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) packets: usize,
    pub(crate) bytes: u64,
}

/// Some tens of microseconds of TAP work. For small packets the count decides: a call of the TAP takes its time whatever it
/// moves. For large ones the bytes do: 64 frames of 64 KiB would be 4 MiB to copy, which is a millisecond; frames of an
/// Ethernet's MTU never get there.
pub(crate) const BATCH: Budget = Budget { packets: 64, bytes: 256 << 10 };

/// The length of a virtio-net header with `num_buffers`, its last field.
const HEADER_LENGTH_WITH_BUFFERS: usize = 12;

/// Where in that header `num_buffers` stands.
const NUM_BUFFERS_OFFSET: usize = 10;

/// What is said of a TAP that polls as an error, or reads as an end of file.
const TAP_GONE: &str = "TAP: the interface is gone";

/// One of the two rings of a pair, in the guest's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Rx,
    Tx,
}

impl Side {
    fn kicks(self, counters: &LiveCounters) -> &Counter {
        match self {
            Self::Rx => &counters.rx_kicks,
            Self::Tx => &counters.tx_kicks,
        }
    }

    fn calls(self, counters: &LiveCounters) -> &Counter {
        match self {
            Self::Rx => &counters.rx_calls,
            Self::Tx => &counters.tx_calls,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rx => "rx",
            Self::Tx => "tx",
        })
    }
}

/// A ring as the frontend describes it; untrusted. Descriptors are borrowed.
#[derive(Clone, Debug)]
pub struct RingSpec {
    pub layout: Layout,
    pub kick_fd: RawFd,
    pub call_fd: Option<RawFd>,
    pub error_fd: Option<RawFd>,
    /// Where it was told to start; None is what the ledger says. A split ring starts at the used index in guest memory.
    pub next_avail: Option<u16>,
    /// Where a packed ring keeps its position for a successor.
    pub ledger: Option<Slot>,
}

/// All there is to know to run a pair.
#[derive(Debug)]
pub struct Config {
    pub memory: Arc<GuestMemory>,
    /// Borrowed, in non-blocking mode, with a vnet header of `header_length`.
    pub tap_fd: RawFd,
    /// The virtio-net header's length, 10 or 12.
    pub header_length: usize,
    /// The longest frame the TAP may deliver, without the header.
    pub frame_length_max: usize,
    pub format: Format,
    pub features: Features,
    pub mergeable: bool,
    pub rx: Option<RingSpec>,
    pub tx: Option<RingSpec>,
}

/// Where the two rings go on; None is a ring that is not configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    pub rx: Option<u16>,
    pub tx: Option<u16>,
}

/// A ring that began elsewhere than it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    pub side: Side,
    pub told: u16,
    pub begun: u16,
}

/// What one direction waits for after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Its next turn.
    Nothing,
    /// The guest: buffers to receive into, or packets to send.
    Guest,
    /// The TAP: a frame, or room for one.
    Tap,
    /// It cannot go on.
    Forever,
}

/// A ring with its descriptors, and whether it still runs.
#[derive(Debug)]
struct RingEnd {
    side: Side,
    ring: Ring,
    kick_fd: RawFd,
    call: Option<Bell>,
    error: Option<Bell>,
    /// Where it was told to begin, or where it stopped.
    start: Option<u16>,
    /// Whether `ring` has a position of its own.
    begun: bool,
    /// Whether `begin` calls the guest, for a call may have been lost.
    call_at_start: bool,
    failed: bool,
    wait: Wait,
}

impl RingEnd {
    fn new(side: Side, spec: &RingSpec, config: &Config) -> Result<Self, String> {
        let (layout, ledger) = (&spec.layout, spec.ledger.clone());
        let ring = Ring::new(config.format, layout, config.features, &config.memory, ledger);
        let ring = ring.map_err(|reason| format!("{side} ring: {reason}"))?;
        let bell =
            |what, fd| Bell::of(fd).map_err(|reason| format!("{side} ring: {what} descriptor {reason}"));
        check_kick(spec.kick_fd).map_err(|reason| format!("{side} ring: kick descriptor {reason}"))?;
        Ok(Self {
            side,
            ring,
            kick_fd: spec.kick_fd,
            call: spec.call_fd.map(|fd| bell("call", fd)).transpose()?,
            error: spec.error_fd.map(|fd| bell("error", fd)).transpose()?,
            start: spec.next_avail,
            begun: false,
            call_at_start: true,
            failed: false,
            wait: Wait::Nothing,
        })
    }

    /// Lets a ring that did not fail run from its position. Says where a split ring began if it was told elsewhere.
    ///
    /// Nothing is in flight here between two turns, so a split ring goes on at the used index in guest memory, whatever
    /// a frontend, a stream or this process says: Cloud Hypervisor tells the avail index, and a driver that fills its
    /// receive ring before it is ready would then never see a buffer of it used.
    fn begin(&mut self) -> Result<Option<Correction>, RingError> {
        self.wait = Wait::Forever;
        if self.failed {
            return Ok(None);
        }
        let told = self.start;
        if let Some(used) = self.ring.used_index() {
            self.start = Some(used);
        }
        self.ring.begin(self.start, self.call_at_start)?;
        self.begun = true;
        self.wait = Wait::Nothing;
        let correction = told.zip(self.start).filter(|(told, begun)| told != begun);
        Ok(correction.map(|(told, begun)| Correction { side: self.side, told, begun }))
    }

    /// Where `begin` would go on.
    fn position(&self) -> u16 {
        self.start.unwrap_or_else(|| self.ring.standing())
    }

    /// Where it would go on if the last `chains` chains, of `slots` together, had not been taken.
    fn position_before(&self, chains: u16, slots: u16) -> u16 {
        if self.begun {
            self.ring.position_before(chains, slots)
        } else {
            self.position()
        }
    }

    fn call_if_due(&mut self, counters: &LiveCounters) {
        if self.ring.call_due() {
            if let Some(call) = self.call {
                call.ring();
                self.side.calls(counters).add(1);
            }
        }
    }

    /// Stops this ring for good: only another configuration makes it run again. Gives what is to be told of it.
    fn fail(&mut self, reason: &impl fmt::Display) -> (Side, String) {
        self.failed = true;
        self.wait = Wait::Forever;
        if let Some(error) = self.error {
            error.ring();
        }
        (self.side, reason.to_string())
    }
}

/// Chains taken from the receive ring that no frame was put into yet. They count as available until one is.
#[derive(Debug, Default)]
struct Window {
    /// The buffers of the chains, in order, behind `used` ones of chains that are gone.
    buffers: Vec<libc::iovec>,
    used: usize,
    chains: VecDeque<Chain>,
    length: u64,
    slots: usize,
}

impl Window {
    fn push(&mut self, chain: Chain) {
        self.length += chain.length;
        self.slots += usize::from(chain.slots);
        self.chains.push_back(chain);
    }

    fn pop(&mut self) -> Option<Chain> {
        let chain = self.chains.pop_front()?;
        self.length -= chain.length;
        self.slots -= usize::from(chain.slots);
        self.used += chain.buffers;
        Some(chain)
    }

    /// The chains and the slots of the ring that they occupy.
    fn held(&self) -> (u16, u16) {
        let count = |number| u16::try_from(number).expect("no more than a ring has");
        (count(self.chains.len()), count(self.slots))
    }

    /// Forgets used buffers where that is cheap: when none is left behind them, or when they are many.
    fn tidy(&mut self) {
        if self.used == self.buffers.len() || self.used > CHAIN_BUFFERS_MAX {
            self.buffers.drain(..self.used);
            self.used = 0;
        }
    }

    fn clear(&mut self) {
        self.buffers.clear();
        self.chains.clear();
        (self.used, self.length, self.slots) = (0, 0, 0);
    }
}

/// The descriptors a pair sleeps on, in this order.
pub(crate) const WATCHED: usize = 3;
const WATCH_TAP: usize = 0;
const WATCH_RX_KICK: usize = 1;
const WATCH_TX_KICK: usize = 2;

/// A configured pair. Its memory stays mapped as long as it lives.
#[derive(Debug)]
pub(crate) struct Pump {
    tap_fd: RawFd,
    tap_gone: bool,
    header_length: usize,
    /// Bytes a frame and its header may need.
    room: u64,
    mergeable: bool,
    rx: Option<RingEnd>,
    tx: Option<RingEnd>,
    window: Window,
    /// The buffers of the chain being transmitted.
    outgoing: Vec<libc::iovec>,
    /// What went wrong since it was last taken.
    failures: Vec<(Side, String)>,
    memory: Arc<GuestMemory>,
}

// SAFETY: every pointer in it leads to guest memory, which its rings keep mapped and any thread may access.
unsafe impl Send for Pump {}

impl Pump {
    /// Checks the configuration and touches neither the TAP nor guest memory.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub(crate) fn new(config: &Config) -> Result<Self, String> {
        if ![NUM_BUFFERS_OFFSET, HEADER_LENGTH_WITH_BUFFERS].contains(&config.header_length) {
            return Err(format!("a virtio-net header has 10 or 12 bytes, not {}", config.header_length));
        }
        if config.mergeable && config.header_length != HEADER_LENGTH_WITH_BUFFERS {
            return Err(format!("mergeable buffers need a header of 12 bytes, not {}", config.header_length));
        }
        let end = |side, spec: &Option<RingSpec>| {
            spec.as_ref().map(|spec| RingEnd::new(side, spec, config)).transpose()
        };
        Ok(Self {
            tap_fd: config.tap_fd,
            tap_gone: false,
            header_length: config.header_length,
            room: config.header_length as u64 + config.frame_length_max as u64,
            mergeable: config.mergeable,
            rx: end(Side::Rx, &config.rx)?,
            tx: end(Side::Tx, &config.tx)?,
            window: Window::default(),
            outgoing: Vec::new(),
            failures: Vec::new(),
            memory: Arc::clone(&config.memory),
        })
    }

    /// Makes both rings ready to run from their positions. Gives those that began elsewhere than they were told.
    pub(crate) fn begin(&mut self) -> Vec<Correction> {
        self.tap_gone = false;
        let mut corrections = Vec::new();
        for end in self.rx.iter_mut().chain(&mut self.tx) {
            match end.begin() {
                Ok(correction) => corrections.extend(correction),
                Err(error) => self.failures.push(end.fail(&explain(error, &self.memory))),
            }
        }
        corrections
    }

    /// Ends what `begin` began: no chain is held, the guest knows of every used one.
    pub(crate) fn settle(&mut self, counters: &LiveCounters) {
        if let Some(rx) = &mut self.rx {
            let (chains, slots) = self.window.held();
            rx.ring.untake(chains, slots);
        }
        self.window.clear();
        for end in self.rx.iter_mut().chain(&mut self.tx) {
            end.call_if_due(counters);
            end.start = Some(end.position_before(0, 0));
        }
    }

    /// Where running rings would go on if they were stopped now.
    pub(crate) fn next_positions(&self) -> Positions {
        let (chains, slots) = self.window.held();
        Positions {
            rx: self.rx.as_ref().map(|rx| rx.position_before(chains, slots)),
            tx: self.tx.as_ref().map(|tx| tx.position_before(0, 0)),
        }
    }

    /// Where rings that do not run begin.
    pub(crate) fn positions(&self) -> Positions {
        Positions { rx: self.rx.as_ref().map(RingEnd::position), tx: self.tx.as_ref().map(RingEnd::position) }
    }

    /// Whether configured rings can begin there.
    pub(crate) fn check_positions(&self, rx: u16, tx: u16) -> Result<(), String> {
        for (end, position) in [(&self.rx, rx), (&self.tx, tx)] {
            let Some(end) = end else { continue };
            end.ring.check_position(position).map_err(|error| format!("{} ring: {error}", end.side))?;
        }
        Ok(())
    }

    /// Sets where configured rings begin; None is where whoever ran them before was interrupted.
    pub(crate) fn set_positions(&mut self, rx: Option<u16>, tx: Option<u16>) {
        for (end, position) in [(&mut self.rx, rx), (&mut self.tx, tx)] {
            let Some(end) = end else { continue };
            // Whoever knows the position stopped the ring in order, and called where that was due.
            end.call_at_start = position.is_none();
            match position.map_or_else(|| end.ring.recover(), Ok) {
                Ok(position) => end.start = Some(position),
                Err(error) => self.failures.push(end.fail(&error)),
            }
        }
    }

    /// Whether each ring, rx first, stopped for good.
    pub(crate) fn failed(&self) -> (bool, bool) {
        let failed = |end: &Option<RingEnd>| end.as_ref().is_some_and(|end| end.failed);
        (failed(&self.rx), failed(&self.tx))
    }

    /// Takes note that a ring, where it is configured, stopped for good elsewhere, and everybody was told.
    pub(crate) fn set_failed(&mut self, side: Side) {
        let end = match side {
            Side::Rx => &mut self.rx,
            Side::Tx => &mut self.tx,
        };
        if let Some(end) = end {
            end.failed = true;
        }
    }

    pub(crate) fn take_failures(&mut self) -> Vec<(Side, String)> {
        std::mem::take(&mut self.failures)
    }

    /// One turn for each direction. False if both have to wait.
    pub(crate) fn turn(&mut self, budget: Budget, stop: &AtomicBool, counters: &LiveCounters) -> bool {
        self.give_up_if_lost();
        self.transmit(budget, stop, counters);
        self.receive(budget, stop, counters);
        self.give_up_if_lost();
        self.rx.iter().chain(&self.tx).any(|end| end.wait == Wait::Nothing)
    }

    /// Stops both rings after a panic, which is a bug of ours, and lets go of what they had begun. They stand where the
    /// guest was told that they do.
    pub(crate) fn abandon(&mut self, reason: &str) {
        self.window.clear();
        for end in self.rx.iter_mut().chain(&mut self.tx).filter(|end| !end.failed) {
            // What cannot begin there is failed anyhow.
            let _ = end.ring.begin(None, true);
            end.start = Some(end.ring.position_before(0, 0));
            self.failures.push(end.fail(&format_args!("bug in the packet path: {reason}")));
        }
    }

    /// Stops both rings where guest memory is lost, whichever ring or pair met it.
    fn give_up_if_lost(&mut self) {
        let Some(lost) = self.memory.lost() else { return };
        for end in self.rx.iter_mut().chain(&mut self.tx).filter(|end| !end.failed) {
            self.failures.push(end.fail(&lost));
        }
    }

    fn transmit(&mut self, budget: Budget, stop: &AtomicBool, counters: &LiveCounters) {
        let Some(tx) = self.tx.as_mut().filter(|end| !end.failed) else { return };
        let buffers = &mut self.outgoing;
        tx.ring.disarm();
        tx.wait = Wait::Nothing;
        let mut bytes = 0;
        for _ in 0..budget.packets {
            if bytes >= budget.bytes || stop.load(Ordering::Relaxed) {
                break;
            }
            buffers.clear();
            let taken = tx.ring.take(Direction::FromGuest, self.header_length, buffers);
            let chain = match taken {
                Ok(Some(chain)) => chain,
                Ok(None) => {
                    tx.wait = Wait::Guest;
                    break;
                }
                Err(error) => {
                    self.failures.push(tx.fail(&explain(error, &self.memory)));
                    break;
                }
            };
            let sent = if self.tap_gone {
                Err(io::Error::from_raw_os_error(libc::ENODEV))
            } else {
                // SAFETY: the buffers lie in guest memory, which the ring keeps mapped.
                unsafe { sys::writev(self.tap_fd, buffers) }
            };
            match sent {
                Ok(_) => {
                    counters.tx_packets.add(1);
                    counters.tx_bytes.add(chain.length - self.header_length as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tx.ring.untake(1, chain.slots);
                    tx.wait = Wait::Tap;
                    break;
                }
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    tx.ring.untake(1, chain.slots);
                    self.failures.push(tx.fail(&self.memory.lose(buffers)));
                    break;
                }
                // A packet is lost, as on any wire. A TAP that is gone for good is found by whoever waits for it.
                Err(error) => dropped(&error, counters).add(1),
            }
            bytes += chain.length;
            tx.ring.complete(&chain, 0);
            tx.ring.publish();
        }
        tx.call_if_due(counters);
    }

    fn receive(&mut self, budget: Budget, stop: &AtomicBool, counters: &LiveCounters) {
        let Some(rx) = self.rx.as_mut().filter(|end| !end.failed) else { return };
        if self.tap_gone {
            rx.wait = Wait::Forever;
            rx.call_if_due(counters);
            return;
        }
        rx.ring.disarm();
        rx.wait = Wait::Nothing;
        let window = &mut self.window;
        let mut bytes = 0;
        for _ in 0..budget.packets {
            if bytes >= budget.bytes || stop.load(Ordering::Relaxed) {
                break;
            }
            match gather(rx, window, self.mergeable, self.header_length, self.room) {
                Ok(true) => {}
                Ok(false) => {
                    rx.wait = Wait::Guest;
                    break;
                }
                Err(error) => {
                    self.failures.push(rx.fail(&explain(error, &self.memory)));
                    break;
                }
            }
            let length = match read_frame(self.tap_fd, window) {
                Ok(length) if length > 0 => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    rx.wait = Wait::Tap;
                    break;
                }
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    self.failures.push(rx.fail(&self.memory.lose(&window.buffers)));
                    break;
                }
                result => {
                    let reason = result.err().map_or(TAP_GONE.into(), |error| format!("TAP: {error}"));
                    self.failures.push((Side::Rx, reason));
                    self.tap_gone = true;
                    rx.wait = Wait::Forever;
                    break;
                }
            };
            bytes += length;
            // A frame that reached the spare byte is longer than its room, and was cut by the kernel.
            if length > window.length || length < self.header_length as u64 {
                counters.rx_dropped_length.add(1);
                continue;
            }
            deliver(rx, window, length, self.header_length);
            counters.rx_packets.add(1);
            counters.rx_bytes.add(length - self.header_length as u64);
        }
        rx.call_if_due(counters);
    }

    /// Says what to sleep on. False if there is work after all.
    pub(crate) fn watch(&mut self, fds: &mut [libc::pollfd]) -> bool {
        fds.fill(libc::pollfd { fd: -1, events: 0, revents: 0 });
        let mut tap_events = 0;
        let mut idle = true;
        let ends =
            [(&mut self.rx, WATCH_RX_KICK, libc::POLLIN), (&mut self.tx, WATCH_TX_KICK, libc::POLLOUT)];
        for (end, kick, tap_event) in ends {
            let Some(end) = end else { continue };
            match end.wait {
                Wait::Nothing => idle = false,
                Wait::Tap => tap_events |= tap_event,
                Wait::Forever => {}
                Wait::Guest => match end.ring.arm() {
                    Ok(more) => {
                        idle &= !more;
                        fds[kick].fd = end.kick_fd;
                        fds[kick].events = libc::POLLIN;
                    }
                    Err(error) => self.failures.push(end.fail(&explain(error, &self.memory))),
                },
            }
        }
        if !self.tap_gone {
            // Also where nothing is asked of it: that it goes away is always told.
            fds[WATCH_TAP].fd = self.tap_fd;
            fds[WATCH_TAP].events = tap_events;
        }
        idle
    }

    /// Takes note of what ended the sleep.
    pub(crate) fn woken(&mut self, fds: &[libc::pollfd], counters: &LiveCounters) {
        let tap = fds[WATCH_TAP].revents;
        if tap & libc::POLLIN == 0 && tap & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0 {
            self.tap_gone = true;
            self.failures.push((Side::Rx, TAP_GONE.into()));
        }
        for (end, kick) in [(&mut self.rx, WATCH_RX_KICK), (&mut self.tx, WATCH_TX_KICK)] {
            let Some(end) = end.as_mut().filter(|_| fds[kick].revents != 0) else { continue };
            match sys::drain(end.kick_fd) {
                Ok(rung) => end.side.kicks(counters).add(rung.into()),
                // Whatever the frontend sent as a kick eventfd, it would wake us for ever.
                Err(error) => self.failures.push(end.fail(&format_args!("kick eventfd: {error}"))),
            }
        }
    }
}

/// Why a ring cannot go on: zeros in the place of lost memory explain nothing.
fn explain(error: RingError, memory: &GuestMemory) -> RingError {
    memory.lost().map_or(error, RingError::MemoryLost)
}

/// Which counter counts a packet that the TAP did not take.
fn dropped<'a>(error: &io::Error, counters: &'a LiveCounters) -> &'a Counter {
    match error.raw_os_error() {
        // Down (EIO), detached or gone (EBADFD).
        Some(libc::EIO | libc::EBADFD | libc::ENODEV | libc::ENXIO | libc::ENETDOWN) => {
            &counters.tx_dropped_interface
        }
        Some(libc::ENOMEM | libc::ENOBUFS) => &counters.tx_dropped_memory,
        // EINVAL for the most part: whatever it is, it is about this packet.
        _ => &counters.tx_dropped_header,
    }
}

/// Fills the window until a frame may be read into it; false if the guest has to make more available first.
fn gather(
    rx: &mut RingEnd,
    window: &mut Window,
    mergeable: bool,
    header_length: usize,
    room: u64,
) -> Result<bool, RingError> {
    loop {
        let enough = if mergeable {
            // A small ring may never have room for the longest frame: Linux fills it up again only as packets come
            // out of it, though always before half of it is used. Half a ring must do then.
            window.length >= room || window.slots >= usize::from(rx.ring.size()).div_ceil(2)
        } else {
            !window.chains.is_empty()
        };
        if enough {
            return Ok(true);
        }
        let before = window.buffers.len();
        let taken = rx.ring.take(Direction::ToGuest, header_length, &mut window.buffers);
        let Some(chain) = taken? else { return Ok(false) };
        if window.buffers.len() - window.used > CHAIN_BUFFERS_MAX {
            // As many buffers as one read takes; the chain just taken is not the only one, so some remain.
            window.buffers.truncate(before);
            rx.ring.untake(1, chain.slots);
            return Ok(true);
        }
        window.push(chain);
    }
}

/// Reads one frame into the window; more bytes than the window has tell of a frame that did not fit.
fn read_frame(tap_fd: RawFd, window: &mut Window) -> io::Result<u64> {
    let mut spare = 0u8;
    window.buffers.push(libc::iovec { iov_base: (&raw mut spare).cast(), iov_len: 1 });
    // SAFETY: the buffers lie in guest memory, which the ring keeps mapped, but for the last one, which is `spare`.
    let length = unsafe { sys::readv(tap_fd, &window.buffers[window.used..]) };
    window.buffers.pop();
    length
}

/// Gives the guest the frame of `length` bytes, header included, that stands in the window's first chains.
fn deliver(rx: &mut RingEnd, window: &mut Window, length: u64, header_length: usize) {
    let first = window.used;
    let mut left = length;
    let mut count = 0u16;
    while left > 0 {
        let chain = window.pop().expect("the caller checked that the frame fits");
        let written = left.min(chain.length);
        rx.ring.complete(&chain, u32::try_from(written).expect("a read gives less than 2 GiB"));
        left -= written;
        count += 1;
    }
    if header_length == HEADER_LENGTH_WITH_BUFFERS {
        // The kernel leaves this field alone, and it must be 1 also where buffers are not merged.
        write_num_buffers(&window.buffers[first..window.used], count);
    }
    window.tidy();
    rx.ring.publish();
}

/// Writes `num_buffers` into the header at the start of `buffers`, which may lie across several.
fn write_num_buffers(buffers: &[libc::iovec], count: u16) {
    let mut offset = NUM_BUFFERS_OFFSET;
    let mut bytes = count.to_le_bytes().into_iter();
    for buffer in buffers {
        while offset < buffer.iov_len {
            let Some(byte) = bytes.next() else { return };
            // SAFETY: `offset` is inside the buffer, which is mapped guest memory.
            unsafe { buffer.iov_base.cast::<u8>().add(offset).write_volatile(byte) };
            offset += 1;
        }
        offset -= buffer.iov_len;
    }
}

#[cfg(test)]
impl Pump {
    /// Breaks an invariant: there is room for a frame, and no chain that it could be delivered by.
    pub(crate) fn break_window(&mut self) {
        let room = vec![0u8; 2048].leak();
        self.window.buffers.push(libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() });
        self.window.length = room.len() as u64;
    }
}

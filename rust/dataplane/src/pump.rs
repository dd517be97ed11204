//! Moving packets between a TAP or a stream and two rings, a bounded batch at a time.
//!
//! Owns:        receiving into the guest's buffers, transmitting from them, what is waited for when neither can go on.
//! Never sees:  threads and locks, and when to stop but for a flag it looks at between packets.
//! Read next:   `window` and `backlog`, for what is received; `tap` and `stream`, for where it comes from; `queue_pair`, the
//!              thread that calls this.
//!
//! The TAP reads and writes guest memory. A read from it cannot be undone: a frame that was read is delivered before
//! anything else happens, or waits in the backlog. What is read of a stream waits there.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use crate::backlog::Backlog;
use crate::bell::{check_kick, Bell};
use crate::chain::{Direction, Features, Layout, RingError};
use crate::counters::{Counter, LiveCounters};
use crate::in_flight;
use crate::ledger::Slot;
use crate::log::RingLog;
use crate::memory::GuestMemory;
use crate::refusal::{Refusal, RefusalKind};
use crate::ring::{Format, Ring};
use crate::stream::{self, Stream};
use crate::sys;
use crate::tap::{NoFrame, Read, Tap};
use crate::window::{
    asks_for_offload, Framing, Offloads, Room, Window, HEADER_LENGTH_WITH_BUFFERS, NUM_BUFFERS_OFFSET,
};

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
    /// Where a split ring whose chains are handed out keeps those in flight for a successor.
    pub in_flight: Option<in_flight::Slot>,
    /// Where it marks what it writes; None where nobody wants to know.
    pub log: Option<RingLog>,
}

/// Where the frames come from that a guest receives, and where those go that it sends.
#[derive(Clone, Debug)]
pub enum HostSide {
    /// A TAP: borrowed, in non-blocking mode, with a vnet header of `Config::header_length`.
    Tap(RawFd),
    /// A stream, on which frames have no header. What asks for an offload is dropped.
    Stream(Arc<Stream>),
}

/// All there is to know to run a pair.
#[derive(Debug)]
pub struct Config {
    pub memory: Arc<GuestMemory>,
    pub host: HostSide,
    /// The virtio-net header's length, 10 or 12.
    pub header_length: usize,
    /// The longest frame a TAP is expected to deliver, and the longest one that is sent on a stream, without the header.
    pub frame_length_max: usize,
    /// What the driver takes over from whoever sends to it. Frames that ask for more are dropped.
    pub offloads: Offloads,
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
    /// The host's side: a frame, or room for one.
    Host,
    /// It cannot go on.
    Forever,
}

/// A ring with its descriptors, and whether it still runs.
#[derive(Debug)]
struct RingEnd {
    side: Side,
    layout: Layout,
    ring: Ring,
    kick_fd: RawFd,
    notifiers: Notifiers,
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
    fn new(side: Side, spec: &RingSpec, config: &Config) -> Result<Self, Refusal> {
        let (layout, ledger, log) = (&spec.layout, spec.ledger.clone(), spec.log.clone());
        let ring = Ring::new(config.format, layout, config.features, &config.memory, ledger, log);
        let name = format_args!("{side} ring");
        let ring = ring.map_err(|refusal| refusal.of(&name))?;
        let notifiers = Notifiers::of(&name, spec.call_fd, spec.error_fd)?;
        check_kick(spec.kick_fd).map_err(|refusal| refusal.named("kick descriptor").of(&name))?;
        Ok(Self {
            side,
            layout: *layout,
            ring,
            kick_fd: spec.kick_fd,
            notifiers,
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
            if let Some(call) = self.notifiers.call {
                call.ring();
                self.side.calls(counters).add(1);
            }
        }
    }

    /// As the ring's own; what it wrote is marked, because a sleep may come next.
    fn arm(&mut self) -> Result<bool, RingError> {
        let more = self.ring.arm();
        self.ring.writer().flush();
        more
    }

    /// Stops this ring for good: only another configuration makes it run again. Gives what is to be told of it.
    fn fail(&mut self, reason: &impl fmt::Display) -> (Side, String) {
        self.failed = true;
        self.wait = Wait::Forever;
        if let Some(error) = self.notifiers.error {
            error.ring();
        }
        (self.side, reason.to_string())
    }
}

/// By what a ring's driver is called, and told that the ring failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notifiers {
    pub(crate) call: Option<Bell>,
    pub(crate) error: Option<Bell>,
}

impl Notifiers {
    /// Looks at what the borrowed descriptors are of `ring`, as errors call it.
    ///
    /// # Errors
    /// One of them cannot be one.
    pub(crate) fn of(
        ring: &impl fmt::Display,
        call_fd: Option<RawFd>,
        error_fd: Option<RawFd>,
    ) -> Result<Self, Refusal> {
        let bell = |what, fd: Option<RawFd>| {
            let refused = |refusal: Refusal| refusal.named(what).of(ring);
            fd.map(|fd| Bell::of(fd).map_err(refused)).transpose()
        };
        Ok(Self { call: bell("call descriptor", call_fd)?, error: bell("error descriptor", error_fd)? })
    }
}

/// A `HostSide` in use.
#[derive(Debug)]
enum Host {
    Tap(Tap),
    Stream { stream: Arc<Stream>, frame_length_max: usize },
}

impl Host {
    fn new(config: &Config) -> Self {
        match &config.host {
            HostSide::Tap(fd) => Self::Tap(Tap::new(*fd)),
            HostSide::Stream(stream) => {
                Self::Stream { stream: Arc::clone(stream), frame_length_max: config.frame_length_max }
            }
        }
    }

    fn begin(&mut self) {
        if let Self::Stream { stream, .. } = self {
            stream.hand().begin();
        }
    }

    /// Whether nothing will come from it, and nothing goes to it.
    fn is_gone(&self) -> bool {
        match self {
            Self::Tap(tap) => tap.is_gone(),
            Self::Stream { stream, .. } => stream.ended().is_some(),
        }
    }

    /// Sends what was begun. False where not all of it went out.
    fn flush(&mut self) -> bool {
        match self {
            Self::Tap(_) => true,
            Self::Stream { stream, .. } => {
                let mut hand = stream.hand();
                // Any other error is the next frame's.
                hand.has_unsent()
                    .then(|| stream.flush(&mut hand))
                    .is_none_or(|sent| !sent.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock))
            }
        }
    }

    /// Whether something that was begun waits for room.
    fn has_unsent(&self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Stream { stream, .. } => !stream.is_over() && stream.hand().has_unsent(),
        }
    }

    /// Sends a frame of `length` bytes, its header included.
    ///
    /// # Errors
    /// As `Tap::write` and `Stream::send`.
    ///
    /// # Safety
    /// Each buffer is mapped for the time of the call.
    #[inline]
    unsafe fn write(&mut self, buffers: &[libc::iovec], header_length: usize, length: u64) -> io::Result<()> {
        match self {
            // SAFETY: the caller's.
            Self::Tap(tap) => unsafe { tap.write(buffers) }.map(drop),
            Self::Stream { .. } if asks_for_offload(buffers) => {
                Err(io::Error::from_raw_os_error(libc::EINVAL))
            }
            // SAFETY: the caller's.
            Self::Stream { stream, frame_length_max } => unsafe {
                stream.send(buffers, header_length, length, *frame_length_max)
            },
        }
    }

    /// How much longer it is left alone; None if it is not.
    fn pause(&mut self) -> Option<Duration> {
        match self {
            Self::Tap(tap) => tap.pause(),
            Self::Stream { .. } => None,
        }
    }

    fn watch(&mut self, events: libc::c_short) -> libc::pollfd {
        match self {
            Self::Tap(tap) => tap.watch(events),
            Self::Stream { stream, .. } => stream.watch(events),
        }
    }

    /// Takes note that it polls as if it were gone.
    fn look(&mut self) {
        if let Self::Tap(tap) = self {
            tap.look_for_interface();
        }
    }

    /// How much longer a frame may wait for buffers; None if none does.
    fn patience(&self, backlog: &Backlog) -> Option<Duration> {
        match self {
            Self::Tap(_) => backlog.patience(),
            Self::Stream { stream, .. } => stream.hand().patience(),
        }
    }
}

/// How a pair sleeps; None for ever.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sleep {
    pub(crate) longest: Option<Duration>,
}

/// The descriptors a pair sleeps on, in this order.
pub(crate) const WATCHED: usize = 3;
const WATCH_HOST: usize = 0;
const WATCH_RX_KICK: usize = 1;
const WATCH_TX_KICK: usize = 2;

/// A configured pair. Its memory stays mapped as long as it lives.
#[derive(Debug)]
pub(crate) struct Pump {
    host: Host,
    /// It was asked by poll(2) since it was read, and has no frame.
    host_is_empty: bool,
    header_length: usize,
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
    /// Checks the configuration and touches neither the host's side nor guest memory.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn new(config: &Config) -> Result<Self, Refusal> {
        let refused = |text| Err(Refusal::new(RefusalKind::Setting, text));
        if ![NUM_BUFFERS_OFFSET, HEADER_LENGTH_WITH_BUFFERS].contains(&config.header_length) {
            return refused(format!("a virtio-net header has 10 or 12 bytes, not {}", config.header_length));
        }
        if config.mergeable && config.header_length != HEADER_LENGTH_WITH_BUFFERS {
            return refused(format!(
                "mergeable buffers need a header of 12 bytes, not {}",
                config.header_length
            ));
        }
        let end = |side, spec: &Option<RingSpec>| {
            spec.as_ref().map(|spec| RingEnd::new(side, spec, config)).transpose()
        };
        let framing = Framing {
            header_length: config.header_length,
            mergeable: config.mergeable,
            room: config.header_length as u64 + config.frame_length_max as u64,
            offloads: config.offloads,
        };
        Ok(Self {
            host: Host::new(config),
            host_is_empty: false,
            header_length: config.header_length,
            rx: end(Side::Rx, &config.rx)?,
            tx: end(Side::Tx, &config.tx)?,
            window: Window::new(framing),
            outgoing: Vec::new(),
            failures: Vec::new(),
            memory: Arc::clone(&config.memory),
        })
    }

    /// Makes both rings ready to run from their positions. Gives those that began elsewhere than they were told.
    pub(crate) fn begin(&mut self) -> Vec<Correction> {
        self.host_is_empty = false;
        self.host.begin();
        let mut corrections = Vec::new();
        for end in self.rx.iter_mut().chain(&mut self.tx) {
            match end.begin() {
                Ok(correction) => corrections.extend(correction),
                Err(error) => self.failures.push(end.fail(&explain(error, &self.memory))),
            }
        }
        corrections
    }

    /// Gives chains back that wait for a frame: nothing points into their buffers any more.
    fn empty_window(&mut self) {
        if let Some(rx) = &mut self.rx {
            let (chains, slots) = self.window.held();
            rx.ring.untake(chains, slots);
        }
        self.window.clear();
    }

    /// Ends what `begin` began: no chain is held, the guest knows of every used one.
    pub(crate) fn settle(&mut self, counters: &LiveCounters) {
        self.empty_window();
        for end in self.rx.iter_mut().chain(&mut self.tx) {
            end.call_if_due(counters);
            end.start = Some(end.position_before(0, 0));
            end.ring.writer().flush();
        }
    }

    /// Goes on with other memory, if the rings are in the same place there; gives the memory that is no longer used, which
    /// is the other one if they are not.
    pub(crate) fn swap_memory(
        &mut self,
        memory: Arc<GuestMemory>,
    ) -> Result<Arc<GuestMemory>, Arc<GuestMemory>> {
        if !self.rx.iter().chain(&self.tx).all(|end| end.ring.is_in(&memory, &end.layout)) {
            return Err(memory);
        }
        self.empty_window();
        self.rx.iter_mut().chain(&mut self.tx).for_each(|end| end.ring.set_memory(&memory));
        let former = std::mem::replace(&mut self.memory, memory);
        self.give_up_without_log(|end| end.ring.check_log());
        Ok(former)
    }

    /// A configured ring marks what it writes in another log from now on, or in none; what it wrote until now is marked in
    /// the former one, which is used no more. One that cannot mark all that it may write fails.
    pub(crate) fn set_log(&mut self, side: Side, log: Option<RingLog>) {
        let Some(end) = self.end_mut(side) else { return };
        end.ring.writer().set_log(log);
        self.give_up_without_log(|end| end.ring.check_log());
    }

    /// Stops each ring that cannot mark what it writes.
    fn give_up_without_log(&mut self, check: impl Fn(&mut RingEnd) -> Result<(), RingError>) {
        for end in self.rx.iter_mut().chain(&mut self.tx).filter(|end| !end.failed) {
            if let Err(problem) = check(end) {
                self.failures.push(end.fail(&problem));
            }
        }
    }

    /// Calls a configured ring's driver by other descriptors from now on. A call that went to the former one may not have
    /// been heard, or there was none, so the new one is called at once, or by `begin`.
    pub(crate) fn set_notifiers(
        &mut self,
        side: Side,
        notifiers: Notifiers,
        is_running: bool,
        counters: &LiveCounters,
    ) {
        let Some(end) = self.end_mut(side) else { return };
        let former = std::mem::replace(&mut end.notifiers, notifiers);
        if former.call == notifiers.call {
            return;
        }
        end.call_at_start = true;
        if let Some(call) = notifiers.call.filter(|_| is_running && !end.failed) {
            call.ring();
            side.calls(counters).add(1);
        }
    }

    fn end_mut(&mut self, side: Side) -> Option<&mut RingEnd> {
        match side {
            Side::Rx => self.rx.as_mut(),
            Side::Tx => self.tx.as_mut(),
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
    pub(crate) fn check_positions(&self, rx: u16, tx: u16) -> Result<(), Refusal> {
        for (end, position) in [(&self.rx, rx), (&self.tx, tx)] {
            let Some(end) = end else { continue };
            let refused = |error: RingError| Refusal::new(RefusalKind::Position, error.to_string());
            let checked = end.ring.check_position(position).map_err(refused);
            checked.map_err(|refusal| refusal.of(&format_args!("{} ring", end.side)))?;
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
        if let Some(end) = self.end_mut(side) {
            end.failed = true;
        }
    }

    /// Whether the interface of the TAP is gone, as the kernel confirmed, or the stream has ended.
    pub(crate) fn host_gone(&self) -> bool {
        self.host.is_gone()
    }

    pub(crate) fn take_failures(&mut self) -> Vec<(Side, String)> {
        std::mem::take(&mut self.failures)
    }

    /// One turn for each direction. False if both have to wait.
    pub(crate) fn turn(
        &mut self,
        budget: Budget,
        backlog: &mut Backlog,
        stop: &AtomicBool,
        counters: &LiveCounters,
    ) -> bool {
        self.give_up_if_lost();
        self.transmit(budget, stop, counters);
        self.receive(budget, backlog, stop, counters);
        self.rx.iter_mut().chain(&mut self.tx).for_each(|end| end.ring.writer().flush());
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

    /// Stops both rings where guest memory is lost, whichever ring or pair met it, and each ring whose log is.
    fn give_up_if_lost(&mut self) {
        self.give_up_without_log(|end| end.ring.writer().check_log_lost());
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
        if !self.host.flush() {
            tx.wait = Wait::Host;
            return;
        }
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
            // SAFETY: the buffers lie in guest memory, which the ring keeps mapped.
            let sent = unsafe { self.host.write(buffers, self.header_length, chain.length) };
            match sent {
                Ok(()) => {
                    counters.tx_packets.add(1);
                    counters.tx_bytes.add(chain.length - self.header_length as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tx.ring.untake(1, chain.slots);
                    tx.wait = Wait::Host;
                    break;
                }
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    tx.ring.untake(1, chain.slots);
                    self.failures.push(tx.fail(&self.memory.lose(buffers)));
                    break;
                }
                // A packet is lost, as on any wire.
                Err(error) => dropped(&error, counters).add(1),
            }
            bytes += chain.length;
            tx.ring.complete(&chain, 0);
            tx.ring.publish();
        }
        if tx.wait == Wait::Guest && self.host.has_unsent() {
            tx.wait = Wait::Host;
        }
        tx.call_if_due(counters);
    }

    fn receive(&mut self, budget: Budget, backlog: &mut Backlog, stop: &AtomicBool, counters: &LiveCounters) {
        let is_empty = std::mem::take(&mut self.host_is_empty);
        let Some(rx) = self.rx.as_mut().filter(|end| !end.failed && !is_empty) else { return };
        rx.ring.disarm();
        rx.wait = Wait::Nothing;
        let mut bytes = 0;
        for _ in 0..budget.packets {
            if bytes >= budget.bytes || stop.load(Ordering::Relaxed) {
                break;
            }
            let (ring, window) = (&mut rx.ring, &mut self.window);
            let received = match &mut self.host {
                Host::Tap(tap) => receive_one(ring, window, tap, backlog, counters),
                Host::Stream { stream, .. } => receive_from_stream(ring, window, stream, backlog, counters),
            };
            match received {
                Ok(length) => bytes += length,
                Err(Halt::Wait(wait)) => {
                    rx.wait = wait;
                    break;
                }
                Err(Halt::Fault) => {
                    self.failures.push(rx.fail(&self.memory.lose(self.window.buffers())));
                    break;
                }
                Err(Halt::Broken(error)) => {
                    self.failures.push(rx.fail(&explain(error, &self.memory)));
                    break;
                }
            }
        }
        rx.call_if_due(counters);
    }

    /// Says what to sleep on, and for how long at most. None if there is work after all.
    pub(crate) fn watch(&mut self, fds: &mut [libc::pollfd], backlog: &Backlog) -> Option<Sleep> {
        fds.fill(libc::pollfd { fd: -1, events: 0, revents: 0 });
        let mut host_events = 0;
        let mut idle = true;
        let ends =
            [(&mut self.rx, WATCH_RX_KICK, libc::POLLIN), (&mut self.tx, WATCH_TX_KICK, libc::POLLOUT)];
        for (end, kick, host_event) in ends {
            let Some(end) = end else { continue };
            match end.wait {
                Wait::Nothing => idle = false,
                Wait::Host => host_events |= host_event,
                Wait::Forever => {}
                Wait::Guest => match end.arm() {
                    Ok(more) => {
                        idle &= !more;
                        fds[kick].fd = end.kick_fd;
                        fds[kick].events = libc::POLLIN;
                    }
                    Err(error) => self.failures.push(end.fail(&explain(error, &self.memory))),
                },
            }
        }
        fds[WATCH_HOST] = self.host.watch(host_events);
        let waits = self.rx.as_ref().is_some_and(|rx| rx.wait == Wait::Guest);
        let patience = self.host.patience(backlog).filter(|_| waits);
        let longest = [self.host.pause(), patience].into_iter().flatten().min();
        idle.then_some(Sleep { longest })
    }

    /// Takes note of what ended the sleep.
    pub(crate) fn woken(&mut self, fds: &[libc::pollfd], counters: &LiveCounters) {
        let host = fds[WATCH_HOST];
        if host.revents & libc::POLLIN == 0
            && host.revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0
        {
            self.host.look();
        }
        self.host_is_empty = host.events & !host.revents & libc::POLLIN != 0;
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
pub(crate) fn explain(error: RingError, memory: &GuestMemory) -> RingError {
    memory.lost().map_or(error, RingError::MemoryLost)
}

/// Which counter counts a packet that the host's side did not take.
fn dropped<'a>(error: &io::Error, counters: &'a LiveCounters) -> &'a Counter {
    match error.raw_os_error() {
        // Down (EIO), detached or gone (EBADFD); a stream that nobody reads (ENODEV).
        Some(libc::EIO | libc::EBADFD | libc::ENODEV | libc::ENXIO | libc::ENETDOWN) => {
            &counters.tx_dropped_interface
        }
        Some(libc::ENOMEM | libc::ENOBUFS) => &counters.tx_dropped_memory,
        // EINVAL for the most part: whatever it is, it is about this packet.
        _ => &counters.tx_dropped_header,
    }
}

/// Why no more is received for now.
#[derive(Debug)]
enum Halt {
    Wait(Wait),
    Broken(RingError),
    /// The kernel could not write into the window.
    Fault,
}

impl From<RingError> for Halt {
    fn from(error: RingError) -> Self {
        Self::Broken(error)
    }
}

/// Receives one frame, or drops one; gives the bytes that were moved.
#[inline]
fn receive_one(
    ring: &mut Ring,
    window: &mut Window,
    tap: &mut Tap,
    backlog: &mut Backlog,
    counters: &LiveCounters,
) -> Result<u64, Halt> {
    if backlog.is_stale() {
        return drop_stale(tap, backlog, counters);
    }
    if backlog.frame().is_some() {
        return receive_waiting(ring, window, backlog, counters);
    }
    window.gather_expected(ring)?;
    if window.is_empty() {
        return Err(Halt::Wait(Wait::Guest));
    }
    let Read { length, is_cut } = match tap.read(|fd| window.read(ring.writer(), fd, backlog)) {
        Ok(read) => read,
        Err(reason) => return no_frame(reason, counters),
    };
    if is_cut || length < window.framing().header_length as u64 {
        counters.rx_dropped_length.add(1);
        return Ok(length);
    }
    window.learn(length);
    if length > window.length() {
        overrun(ring, window, backlog, length, counters)?;
    } else {
        deliver(ring, window, length, counters);
    }
    Ok(length)
}

/// Receives one frame of a stream, or drops one; gives the bytes that were moved.
#[inline]
fn receive_from_stream(
    ring: &mut Ring,
    window: &mut Window,
    stream: &Stream,
    backlog: &mut Backlog,
    counters: &LiveCounters,
) -> Result<u64, Halt> {
    let mut hand = stream.hand();
    let is_stale = backlog.is_stale();
    if !is_stale {
        // Read only for a guest that has buffers: what it has not is the socket's to keep.
        window.gather(ring, 1)?;
        if window.is_empty() {
            return Err(Halt::Wait(Wait::Guest));
        }
    }
    let frame = match stream.next_frame(&mut hand) {
        Ok(frame) => frame,
        // All that waited is out; what a peer that is still to come sends is for the driver that is there.
        Err(_) if is_stale => {
            backlog.end_stale();
            return Ok(0);
        }
        Err(stream::NoFrame::Empty) => return Err(Halt::Wait(Wait::Host)),
        Err(stream::NoFrame::Ended) => return Err(Halt::Wait(Wait::Forever)),
    };
    let header_length = window.framing().header_length;
    let length = (header_length + frame.len()) as u64;
    let dropped = if is_stale {
        backlog.note_stale();
        Some(&counters.rx_dropped_stale)
    } else if frame.len() < stream::FRAME_LENGTH_MIN {
        Some(&counters.rx_dropped_length)
    } else {
        match window.gather(ring, length)? {
            Room::Enough => None,
            Room::NotYet if hand.waits() => return Err(Halt::Wait(Wait::Guest)),
            _ => Some(&counters.rx_dropped_length),
        }
    };
    if let Some(counter) = dropped {
        counter.add(1);
    } else {
        // All zero is a header that asks for nothing.
        window.fill(ring.writer(), 0, &[0; HEADER_LENGTH_WITH_BUFFERS][..header_length]);
        window.fill(ring.writer(), header_length, hand.bytes(frame.clone()));
        deliver(ring, window, length, counters);
    }
    hand.pass(&frame);
    Ok(length)
}

/// What comes of a read without a frame.
#[cold]
fn no_frame(reason: NoFrame, counters: &LiveCounters) -> Result<u64, Halt> {
    match reason {
        NoFrame::Empty => Err(Halt::Wait(Wait::Host)),
        NoFrame::Gone => Err(Halt::Wait(Wait::Forever)),
        NoFrame::Fault => Err(Halt::Fault),
        NoFrame::Dropped => {
            counters.rx_dropped_error.add(1);
            Ok(0)
        }
    }
}

/// Finds room for the rest of a frame that is longer than the window, or lets it wait.
#[cold]
fn overrun(
    ring: &mut Ring,
    window: &mut Window,
    backlog: &mut Backlog,
    length: u64,
    counters: &LiveCounters,
) -> Result<(), Halt> {
    let (placed, end) = (window.end(), usize::try_from(length).expect("no frame is so long"));
    match window.gather(ring, length).inspect_err(|_| counters.rx_dropped_length.add(1))? {
        Room::Enough => {
            // SAFETY: the frame was not cut, so all of it behind the window's end was read to there.
            window.fill(ring.writer(), placed, unsafe { backlog.rest(placed, end) });
            deliver(ring, window, length, counters);
        }
        Room::NotYet if window.framing().mergeable => {
            window.move_out(placed, backlog);
            // SAFETY: as above; the bytes before it were just written.
            unsafe { backlog.hold(end) };
            return Err(Halt::Wait(Wait::Guest));
        }
        _ => counters.rx_dropped_length.add(1),
    }
    Ok(())
}

/// Delivers the frame that waits, if the guest has made enough available meanwhile.
#[cold]
fn receive_waiting(
    ring: &mut Ring,
    window: &mut Window,
    backlog: &mut Backlog,
    counters: &LiveCounters,
) -> Result<u64, Halt> {
    let length = backlog.frame().map_or(0, |frame| frame.len() as u64);
    // Another driver than the one it came for may have a shorter header.
    let fits = window.framing().header_length == HEADER_LENGTH_WITH_BUFFERS;
    match window.gather(ring, length)? {
        Room::Enough if fits => {
            window.fill(ring.writer(), 0, backlog.frame().unwrap_or_default());
            deliver(ring, window, length, counters);
        }
        Room::NotYet if backlog.patience() > Some(Duration::ZERO) => return Err(Halt::Wait(Wait::Guest)),
        _ => counters.rx_dropped_length.add(1),
    }
    backlog.clear();
    Ok(length)
}

/// Gives the guest the frame that stands in the window, if the driver takes what it asks for.
#[inline]
fn deliver(ring: &mut Ring, window: &mut Window, length: u64, counters: &LiveCounters) {
    if window.admit(ring.writer()) {
        window.deliver(ring, length);
        counters.rx_packets.add(1);
        counters.rx_bytes.add(length - window.framing().header_length as u64);
    } else {
        counters.rx_dropped_stale.add(1);
    }
}

/// Reads out a frame that is for another driver.
#[cold]
fn drop_stale(tap: &mut Tap, backlog: &mut Backlog, counters: &LiveCounters) -> Result<u64, Halt> {
    // The kernel drops what does not fit, but wants room for the header.
    let mut header = [0u8; HEADER_LENGTH_WITH_BUFFERS];
    let buffer = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() };
    // SAFETY: the buffer is `header`, which lives across the call.
    let read = |fd| unsafe { sys::readv(fd, &[buffer]) }.map(|length| Read { length, is_cut: true });
    match tap.read(read) {
        Ok(Read { length, .. }) => {
            backlog.note_stale();
            counters.rx_dropped_stale.add(1);
            Ok(length)
        }
        // All that waited is out.
        Err(NoFrame::Empty) => {
            backlog.end_stale();
            Ok(0)
        }
        Err(reason) => no_frame(reason, counters),
    }
}

#[cfg(test)]
impl Pump {
    pub(crate) fn break_window(&mut self) {
        self.window.break_invariant();
    }
}

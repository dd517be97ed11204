//! The rings of a device whose chains somebody else answers: code that may take its time, such as Python.
//!
//! Owns:        which chains are handed out, what is copied from and to guest memory, what is waited on.
//! Never sees:  what a chain means; threads: whoever calls is the device.
//! Read next:   `in_flight`, which remembers the chains for a successor; `split`, `packed`.
//!
//! A device that moves little data and answers when it likes: a random number generator, a console, a NIC's control queue.
//! It sleeps on `fd`, takes chains, and completes each of them when it can, in any order. A chain that is taken and not
//! completed is *in flight*; a device may keep it so for hours.
//!
//! A chain is walked when it is taken and again when it is completed. In between nothing points into guest memory, so that
//! memory may come and go meanwhile. A guest that changes a chain in flight changes where its own bytes go.
//!
//! Split rings complete in any order. Of a packed ring one chain is in flight at a time, and it is taken out of the ring
//! when it is completed: the entries of a packed ring are written over by used ones, in order, so a device that kept several
//! would have to remember all descriptors of each.
//!
//! **Invariant**: rings and kick descriptors are touched only while `running`, or by a call that the owner makes for that.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::bell::{self, check_kick};
use crate::chain::{Chain, Direction, Features, Layout, RingError};
use crate::counters::{CallbackCounters, LiveCallbackCounters};
use crate::in_flight::{Parked, Slot, RING_COUNT_MAX};
use crate::log::RingLog;
use crate::memory::{copy, GuestMemory};
use crate::pump::{explain, Notifiers, RingSpec};
use crate::queue_pair::lock;
use crate::refusal::{Refusal, RefusalKind};
use crate::ring::{Format, Ring};
use crate::sys;
use crate::writer::Writer;

/// Bytes of one chain that a device reads, and bytes that it writes. The longest that such devices move at once are 64 KiB
/// and a header (I2C, sockets, a console that is spliced to). It takes some tens of microseconds to copy them, which is
/// what a stop may have to wait for.
pub const DATA_SIZE_MAX: usize = 128 << 10;

/// Bytes that were read from the chains of one ring in flight, after which no further one is taken. A guest could
/// otherwise fill this process's memory with them, by thousands of chains that all lead to the same page.
const HELD_SIZE_MAX: usize = 8 * DATA_SIZE_MAX;

/// Corrections kept for `take_corrections`: more than one for each ring can only come for an owner that never takes them.
const CORRECTIONS_MAX: usize = RING_COUNT_MAX;

/// Ring errors kept for `take_ring_errors`, likewise.
const RING_ERRORS_MAX: usize = RING_COUNT_MAX;

/// Descriptors that one look at `fd` tells of. Those that are left are told of by the next.
const READY_MAX: usize = 32;

/// What `Poll` calls its own eventfd, where a ring has its number.
const WAKE: u64 = u64::MAX;

/// Why a call was refused; nothing was changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    Running,
    NotConfigured,
    Closed,
    CompletedTwice { ring: usize, head: u16 },
    Invalid(Refusal),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("the rings run"),
            Self::NotConfigured => f.write_str("the rings are not configured"),
            Self::Closed => f.write_str("the rings are closed"),
            Self::CompletedTwice { ring, head } => {
                write!(f, "the chain at descriptor {head} of ring {ring} is completed already")
            }
            Self::Invalid(refusal) => refusal.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// All there is to know to serve the rings.
#[derive(Debug)]
pub struct CallbackConfig {
    pub memory: Arc<GuestMemory>,
    pub format: Format,
    pub features: Features,
    /// A place for each ring; None is one that is not served.
    pub rings: Vec<Option<RingSpec>>,
}

/// A ring that began elsewhere than it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallbackCorrection {
    pub ring: usize,
    pub told: u16,
    pub begun: u16,
}

/// A chain that was handed out. It stays in flight until it is completed, whatever becomes of this.
#[derive(Debug)]
pub struct HandedOut {
    pub ring: usize,
    /// What the guest knows it by.
    pub head: u16,
    /// What the driver wrote.
    pub readable: Vec<u8>,
    /// Bytes that the device may write, at most `DATA_SIZE_MAX`.
    pub writable: usize,
    /// Whoever served the ring before had taken it and did not complete it.
    pub was_taken: bool,
    order: u64,
    completed: AtomicBool,
}

/// What became of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completed {
    /// The guest has it.
    Now,
    /// The rings stand still; the next start tells the guest.
    AtStart,
    /// The chain is in flight here no more: the ring failed, was set up again, or is served elsewhere.
    TooLate,
}

/// What the rings sleep on.
#[derive(Debug)]
struct Poll {
    epoll: OwnedFd,
    wake: OwnedFd,
}

impl Poll {
    fn new() -> io::Result<Self> {
        let owned = |fd| match fd {
            // SAFETY: the descriptor is new and has no other owner.
            0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        };
        // SAFETY: plain system call.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: as above.
        let wake = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let poll = Self { epoll, wake };
        poll.add(poll.wake.as_raw_fd(), WAKE)?;
        Ok(poll)
    }

    fn add(&self, fd: RawFd, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN.unsigned_abs(), u64: data };
        // SAFETY: `event` is valid for the call.
        let failed =
            unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Before `fd` may be closed: its open file lives on elsewhere, and would be told of for ever.
    fn remove(&self, fd: RawFd) {
        // SAFETY: plain system call; no event is needed to remove one.
        unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// Calls `act` with each that is readable now.
    fn ready(&self, mut act: impl FnMut(u64)) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; READY_MAX];
        // SAFETY: the array is valid for so many events; a timeout of 0 does not wait.
        let count = unsafe {
            libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), READY_MAX as libc::c_int, 0)
        };
        for event in &events[..usize::try_from(count).unwrap_or(0)] {
            act(event.u64);
        }
    }

    fn wake(&self) {
        sys::wake(self.wake.as_raw_fd());
    }
}

/// A chain in flight that was handed out here.
#[derive(Debug)]
struct Taken {
    order: u64,
    /// Bytes that were read from it.
    length: usize,
}

/// A completion that came while the rings stood still.
#[derive(Debug)]
struct Kept {
    head: u16,
    data: Vec<u8>,
}

/// A ring with its descriptors and its chains.
#[derive(Debug)]
struct End {
    number: usize,
    layout: Layout,
    features: Features,
    ring: Ring,
    /// None for a packed ring.
    slot: Option<Slot>,
    kick_fd: RawFd,
    notifiers: Notifiers,
    /// Where it was told to begin, or where it stopped.
    start: Option<u16>,
    /// Whether `ring` has a position of its own.
    begun: bool,
    /// Whether `begin` calls the guest, for a call may have been lost.
    call_at_start: bool,
    failed: bool,
    /// Handed out here and in flight, by their heads.
    taken: BTreeMap<u16, Taken>,
    /// Bytes that were read from them.
    held: usize,
    /// In flight, and to be handed out here, in order.
    again: VecDeque<Parked>,
    kept: Vec<Kept>,
}

/// What steps of a ring share.
struct Bench<'a> {
    memory: &'a GuestMemory,
    buffers: &'a mut Vec<libc::iovec>,
    /// The place in order of the next chain that this ring takes: never used twice in this process, so that a chain that was
    /// handed out is told from every later one.
    next_order: &'a mut u64,
    counters: &'a LiveCallbackCounters,
}

impl End {
    fn new(number: usize, spec: &RingSpec, config: &CallbackConfig) -> Result<Self, Refusal> {
        let name = format_args!("ring {number}");
        let (ledger, log) = (spec.ledger.clone(), spec.log.clone());
        let ring = Ring::new(config.format, &spec.layout, config.features, &config.memory, ledger, log);
        let ring = ring.map_err(|refusal| refusal.of(&name))?;
        let slot = match config.format {
            Format::Packed => None,
            Format::Split => {
                let slot = spec.in_flight.clone();
                Some(slot.ok_or_else(|| {
                    Refusal::new(RefusalKind::Descriptor, "there is no in-flight file for it").of(&name)
                })?)
            }
        };
        let notifiers = Notifiers::of(&name, spec.call_fd, spec.error_fd)?;
        check_kick(spec.kick_fd).map_err(|refusal| refusal.named("kick descriptor").of(&name))?;
        Ok(Self {
            number,
            layout: spec.layout,
            features: config.features,
            ring,
            slot,
            kick_fd: spec.kick_fd,
            notifiers,
            start: spec.next_avail,
            begun: false,
            call_at_start: true,
            failed: false,
            taken: BTreeMap::new(),
            held: 0,
            again: VecDeque::new(),
            kept: Vec::new(),
        })
    }

    /// Whether this is the ring that `former` was: the same chains are in flight.
    fn continues(&self, former: &Self) -> bool {
        let same_slot = match (&self.slot, &former.slot) {
            (Some(slot), Some(former)) => slot.is(former),
            (None, None) => self.start == former.start,
            _ => false,
        };
        same_slot && !former.failed && self.layout == former.layout && self.features == former.features
    }

    /// Goes on with the chains of `former`, which this ring continues.
    fn inherit(&mut self, former: &mut Self) {
        self.taken = std::mem::take(&mut former.taken);
        self.held = former.held;
        self.kept = std::mem::take(&mut former.kept);
    }

    /// Whatever was handed out is not in flight here any more.
    fn drop_taken(&mut self) {
        self.taken.clear();
        self.held = 0;
        self.kept.clear();
    }

    /// Whether no further chain is handed out before one is completed.
    fn is_full(&self) -> bool {
        match self.ring {
            Ring::Split(_) => self.held >= HELD_SIZE_MAX,
            Ring::Packed(_) => !self.taken.is_empty(),
        }
    }

    /// Lets a ring that did not fail run from its position. Says where it began if it was told elsewhere.
    ///
    /// A split ring goes on at the used index in guest memory and as many chains as are in flight, whatever a frontend, a
    /// stream or this process says.
    fn begin(&mut self, bench: &mut Bench<'_>) -> Result<Option<CallbackCorrection>, RingError> {
        let told = self.start;
        self.ring.check_log()?;
        if let (Ring::Split(ring), Some(slot)) = (&self.ring, &self.slot) {
            let used = ring.used_index();
            let parked = slot.recover(ring.size(), used)?;
            self.start = Some(used.wrapping_add(u16::try_from(parked.len()).expect("as many as entries")));
            self.reconcile(&parked);
            let newest = parked.last().map_or(0, |last| last.order);
            *bench.next_order = (*bench.next_order).max(newest + 1);
        }
        self.ring.begin(self.start, self.call_at_start)?;
        self.begun = true;
        let correction = told.zip(self.start).filter(|(told, begun)| told != begun);
        Ok(correction.map(|(told, begun)| CallbackCorrection { ring: self.number, told, begun }))
    }

    /// Lets what is known here agree with what is in flight: another process may have served the ring meanwhile, and what
    /// was in flight may have been forgotten.
    fn reconcile(&mut self, parked: &[Parked]) {
        let orders: BTreeMap<u16, u64> = parked.iter().map(|parked| (parked.head, parked.order)).collect();
        self.taken.retain(|head, taken| orders.get(head) == Some(&taken.order));
        self.held = self.taken.values().map(|taken| taken.length).sum();
        self.again = parked.iter().filter(|parked| !self.taken.contains_key(&parked.head)).copied().collect();
        self.kept.retain(|kept| self.taken.contains_key(&kept.head));
    }

    /// Where `begin` would go on.
    fn position(&self) -> u16 {
        match (self.start, &self.ring, &self.slot) {
            (Some(start), ..) => start,
            (None, Ring::Split(ring), Some(slot)) => ring.used_index().wrapping_add(slot.count(ring.size())),
            (None, ring, _) => ring.standing(),
        }
    }

    /// Where it would go on if it was stopped now.
    fn next_position(&self) -> u16 {
        if self.begun {
            self.ring.position_before(0, 0)
        } else {
            self.position()
        }
    }

    /// Hands out the next chain; None where the guest has made no more available, or none may be.
    fn take(&mut self, bench: &mut Bench<'_>) -> Result<Option<HandedOut>, RingError> {
        if self.failed || self.is_full() {
            return Ok(None);
        }
        let Bench { memory, buffers, next_order, counters } = bench;
        buffers.clear();
        let again = self.again.front().copied();
        let (chain, order) = match (&mut self.ring, &self.slot) {
            (Ring::Split(ring), Some(slot)) => {
                let head = match again {
                    Some(parked) => parked.head,
                    None => match ring.next_head()? {
                        Some(head) => head,
                        None => return Ok(None),
                    },
                };
                let chain = ring.walk(head, Direction::Both, 0, buffers)?;
                if again.is_none() && slot.has(head) {
                    return Err(RingError::HeadInFlight { head });
                }
                (chain, again.map_or(**next_order, |parked| parked.order))
            }
            (ring, _) => match ring.take(Direction::Both, 0, buffers)? {
                Some(chain) => {
                    // It stays in the ring until it is completed.
                    ring.untake(1, chain.slots);
                    (chain, **next_order)
                }
                None => return Ok(None),
            },
        };
        self.ring.disarm();
        let (readable, writable) = buffers.split_at(chain.readable_buffers);
        let readable = copy_out(readable)?;
        let writable = length(writable).min(DATA_SIZE_MAX as u64) as usize;
        if let Some(lost) = memory.lost() {
            return Err(RingError::MemoryLost(lost));
        }
        let head = chain.id;
        if again.is_some() {
            self.again.pop_front();
        } else {
            if let (Ring::Split(ring), Some(slot)) = (&mut self.ring, &self.slot) {
                slot.take(Parked { order, head })?;
                ring.advance();
            }
            **next_order += 1;
        }
        counters.bytes_read.add(readable.len() as u64);
        self.held += readable.len();
        self.taken.insert(head, Taken { order, length: readable.len() });
        Ok(Some(HandedOut {
            ring: self.number,
            head,
            readable,
            writable,
            was_taken: again.is_some(),
            order,
            completed: AtomicBool::new(false),
        }))
    }

    /// Completes a chain that was handed out, with what the device wrote.
    fn complete(&mut self, head: u16, data: &[u8], bench: &mut Bench<'_>) -> Result<(), RingError> {
        let Some(taken) = self.taken.remove(&head) else { return Ok(()) };
        self.held -= taken.length;
        bench.buffers.clear();
        let chain = match &mut self.ring {
            Ring::Split(ring) => ring.walk(head, Direction::Both, 0, bench.buffers)?,
            Ring::Packed(ring) => {
                let chain = ring.take(Direction::Both, 0, bench.buffers)?;
                chain.ok_or(RingError::ChainChanged { head, length: 0, needed: data.len() })?
            }
        };
        if let Err(error) = fill(self.ring.writer(), &chain, head, data, bench) {
            if let Ring::Packed(ring) = &mut self.ring {
                ring.untake(chain.slots);
            }
            return Err(error);
        }
        let written = u32::try_from(data.len()).expect("no more than DATA_SIZE_MAX");
        self.tell(Parked { order: taken.order, head }, written, |ring| ring.complete(&chain, written));
        bench.counters.chains.add(1);
        bench.counters.bytes_written.add(data.len() as u64);
        Ok(())
    }

    /// Tells the guest of one chain, so that a successor knows whether it was told, whatever becomes of this process.
    fn tell(&mut self, parked: Parked, written: u32, complete_packed: impl FnOnce(&mut Ring)) {
        match (&mut self.ring, &self.slot) {
            (Ring::Split(ring), Some(slot)) => {
                slot.begin_completion(parked, ring.next_used());
                ring.complete_head(parked.head, written);
                ring.publish();
                slot.end_completion(parked.head);
            }
            (ring, _) => {
                complete_packed(ring);
                ring.publish();
            }
        }
    }

    /// Does what came while the ring stood still.
    fn complete_kept(&mut self, bench: &mut Bench<'_>) -> Result<(), RingError> {
        for Kept { head, data } in std::mem::take(&mut self.kept) {
            self.complete(head, &data, bench)?;
        }
        Ok(())
    }

    /// Returns every chain in flight unused, in order; gives how many.
    fn give_back(&mut self, bench: &mut Bench<'_>) -> Result<usize, RingError> {
        self.begin(bench)?;
        self.complete_kept(bench)?;
        let mut parked: Vec<Parked> = self.again.drain(..).collect();
        if self.slot.is_some() {
            let taken = self.taken.iter();
            parked.extend(taken.map(|(head, taken)| Parked { order: taken.order, head: *head }));
        }
        self.drop_taken();
        parked.sort_unstable_by_key(|parked| parked.order);
        for parked in &parked {
            self.tell(*parked, 0, |_| ());
            bench.counters.chains.add(1);
        }
        self.start = Some(self.next_position());
        Ok(parked.len())
    }

    fn call_if_due(&mut self, counters: &LiveCallbackCounters) {
        if self.ring.call_due() {
            if let Some(call) = self.notifiers.call {
                call.ring();
                counters.calls.add(1);
            }
        }
    }
}

/// Bytes in buffers.
fn length(buffers: &[libc::iovec]) -> u64 {
    buffers.iter().map(|buffer| buffer.iov_len as u64).sum()
}

/// Writes `data` into a chain that was just found again, if it is still the one that was taken at `head`.
fn fill(
    writer: &mut Writer,
    chain: &Chain,
    head: u16,
    data: &[u8],
    bench: &Bench<'_>,
) -> Result<(), RingError> {
    let writable = &bench.buffers[chain.readable_buffers..];
    let (length, needed) = (length(writable), data.len());
    if chain.id != head || length < needed as u64 {
        return Err(RingError::ChainChanged { head, length, needed });
    }
    // SAFETY: the buffers lie in guest memory, which the ring keeps mapped.
    unsafe { writer.fill(writable, 0, data) };
    bench.memory.lost().map_or(Ok(()), |lost| Err(RingError::MemoryLost(lost)))
}

/// What the driver wrote into buffers that were just found.
fn copy_out(buffers: &[libc::iovec]) -> Result<Vec<u8>, RingError> {
    let length = length(buffers);
    let size = usize::try_from(length).ok().filter(|size| *size <= DATA_SIZE_MAX);
    let size = size.ok_or(RingError::ReadableLength { length, limit: DATA_SIZE_MAX })?;
    let mut data = vec![0; size];
    let mut rest = data.as_mut_slice();
    for buffer in buffers {
        let (part, after) = rest.split_at_mut(buffer.iov_len);
        // SAFETY: the buffer lies in guest memory, which the ring keeps mapped, and `part` is as long.
        unsafe { copy(buffer.iov_base.cast(), part.as_mut_ptr(), part.len()) };
        rest = after;
    }
    Ok(data)
}

/// What the lock guards.
#[derive(Debug)]
struct State {
    closed: bool,
    /// Made when it is first needed: a device may never have a driver that hands these rings over.
    poll: Option<Poll>,
    memory: Option<Arc<GuestMemory>>,
    ends: Vec<Option<End>>,
    /// The place in order of each ring's next chain. They outlive every configuration.
    next_orders: Vec<u64>,
    running: bool,
    /// The ring that is looked at first, so that each gets its turn.
    first: usize,
    buffers: Vec<libc::iovec>,
    errors: Vec<(usize, String)>,
    corrections: Vec<CallbackCorrection>,
    counters: Vec<LiveCallbackCounters>,
    event_fd: RawFd,
}

// SAFETY: every pointer in it leads to guest memory, which its rings keep mapped and any thread may access.
unsafe impl Send for State {}

impl State {
    fn poll(&mut self) -> io::Result<&Poll> {
        if self.poll.is_none() {
            self.poll = Some(Poll::new()?);
        }
        self.poll.as_ref().ok_or_else(|| io::ErrorKind::Other.into())
    }

    /// Does something to a ring that is configured; one that cannot go on fails. None where there is none.
    fn with<T>(
        &mut self,
        number: usize,
        act: impl FnOnce(&mut End, &mut Bench<'_>) -> Result<T, RingError>,
    ) -> Option<T> {
        let memory = self.memory.as_deref()?;
        let end = self.ends[number].as_mut()?;
        let bench = &mut Bench {
            memory,
            buffers: &mut self.buffers,
            next_order: &mut self.next_orders[number],
            counters: &self.counters[number],
        };
        let done = act(end, bench);
        // Nobody may look at this ring again for hours.
        end.ring.writer().flush();
        let reason = match done {
            Ok(result) => return Some(result),
            Err(error) => explain(error, memory).to_string(),
        };
        self.fail(number, reason);
        None
    }

    /// Stops a ring for good: only another configuration makes it run again. Nothing if it has failed before.
    fn fail(&mut self, number: usize, reason: String) {
        let Some(end) = self.ends[number].as_mut().filter(|end| !end.failed) else { return };
        end.failed = true;
        end.drop_taken();
        end.again.clear();
        if let Some(error) = end.notifiers.error {
            error.ring();
        }
        if let Some(poll) = &self.poll {
            poll.remove(end.kick_fd);
            // Whoever sleeps learns that there is one ring less.
            poll.wake();
        }
        self.errors.push((number, reason));
        self.errors.truncate(RING_ERRORS_MAX);
        sys::signal(self.event_fd);
    }

    fn numbers(&self) -> std::ops::Range<usize> {
        0..self.ends.len()
    }

    /// Stops every ring where guest memory is lost, whoever met it, and each ring whose log is.
    fn give_up_if_lost(&mut self) {
        for number in self.numbers() {
            self.with(number, |end, _| end.ring.writer().check_log_lost());
        }
        let Some(lost) = self.memory.as_ref().and_then(|memory| memory.lost()) else { return };
        for number in self.numbers() {
            self.fail(number, lost.to_string());
        }
    }

    /// The next chain of any ring.
    fn take_any(&mut self) -> Option<HandedOut> {
        let count = self.ends.len();
        for offset in 0..count {
            let number = (self.first + offset) % count;
            if let Some(Some(handed_out)) = self.with(number, End::take) {
                self.first = (number + 1) % count;
                return Some(handed_out);
            }
        }
        None
    }

    /// Takes what there is; where that is nothing, asks every guest for a kick.
    fn take(&mut self) -> Option<HandedOut> {
        self.give_up_if_lost();
        if let Some(handed_out) = self.take_any() {
            return Some(handed_out);
        }
        self.hear_kicks();
        let mut more = false;
        for number in self.numbers() {
            let arm = |end: &mut End, _: &mut Bench<'_>| {
                // One that has no room is looked at again when a chain of it is completed.
                if end.failed || end.is_full() {
                    Ok(false)
                } else {
                    end.ring.arm()
                }
            };
            more |= self.with(number, arm).unwrap_or(false);
        }
        self.give_up_if_lost();
        if more {
            self.take_any()
        } else {
            None
        }
    }

    /// Takes what was rung.
    fn hear_kicks(&mut self) {
        let Some(poll) = &self.poll else { return };
        let mut rung = Vec::new();
        poll.ready(|data| match data {
            WAKE => {
                // Our own eventfd cannot fail.
                let _ = sys::drain(poll.wake.as_raw_fd());
            }
            number => rung.push(number as usize),
        });
        for number in rung {
            let Some(end) = &self.ends[number] else { continue };
            match sys::drain(end.kick_fd) {
                Ok(rung) => self.counters[number].kicks.add(rung.into()),
                // Whatever the frontend sent as a kick eventfd, it would wake us for ever.
                Err(error) => self.fail(number, format!("kick eventfd: {error}")),
            }
        }
    }

    /// Completes a chain, now or when the rings are started.
    fn complete(&mut self, chain: &HandedOut, data: &[u8]) -> Result<Completed, Error> {
        let HandedOut { ring: number, head, .. } = *chain;
        if chain.completed.load(Ordering::Relaxed) {
            return Err(Error::CompletedTwice { ring: number, head });
        }
        if data.len() > chain.writable {
            let (given, room) = (data.len(), chain.writable);
            let text = format!(
                "{given} bytes for the chain at descriptor {head} of ring {number}, which has room for {room}"
            );
            return Err(Error::Invalid(Refusal::new(RefusalKind::Length, text)));
        }
        chain.completed.store(true, Ordering::Relaxed);
        let running = self.running;
        let Some(end) = self.ends.get_mut(number).and_then(Option::as_mut) else {
            return Ok(Completed::TooLate);
        };
        if end.taken.get(&head).is_none_or(|taken| taken.order != chain.order) {
            return Ok(Completed::TooLate);
        }
        if !running {
            end.kept.push(Kept { head, data: data.to_vec() });
            return Ok(Completed::AtStart);
        }
        let was_full = end.is_full();
        let done = self.with(number, |end, bench| {
            end.complete(head, data, bench)?;
            end.ring.writer().flush();
            end.ring.writer().check_log_lost()
        });
        if done.is_none() {
            return Ok(Completed::TooLate);
        }
        self.call_if_due(number);
        if let Some(poll) = self.poll.as_ref().filter(|_| was_full) {
            poll.wake();
        }
        Ok(Completed::Now)
    }

    fn call_if_due(&mut self, number: usize) {
        self.with(number, |end, bench| {
            end.call_if_due(bench.counters);
            Ok(())
        });
    }

    /// Lets every ring run.
    fn start(&mut self) {
        self.running = true;
        for number in self.numbers() {
            let begun = self.with(number, |end, bench| if end.failed { Ok(None) } else { end.begin(bench) });
            self.note_correction(begun.flatten());
            self.watch(number);
            self.with(number, End::complete_kept);
            if self.ends[number].as_ref().is_some_and(|end| !end.failed) {
                self.call_if_due(number);
            }
        }
        if let Some(poll) = &self.poll {
            poll.wake();
        }
    }

    fn note_correction(&mut self, correction: Option<CallbackCorrection>) {
        if correction.is_some() {
            self.corrections.extend(correction);
            self.corrections.truncate(CORRECTIONS_MAX);
            sys::signal(self.event_fd);
        }
    }

    /// From now on a kick of a ring that runs wakes whoever sleeps.
    fn watch(&mut self, number: usize) {
        let Some(end) = self.ends[number].as_ref().filter(|end| !end.failed) else { return };
        let Some(poll) = &self.poll else { return };
        if let Err(error) = poll.add(end.kick_fd, number as u64) {
            self.fail(number, format!("kick descriptor cannot be waited on: {error}"));
        }
    }

    fn stop(&mut self) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        for end in self.ends.iter_mut().flatten() {
            end.start = Some(end.next_position());
            if let Some(poll) = self.poll.as_ref().filter(|_| !end.failed) {
                poll.remove(end.kick_fd);
            }
        }
        if let Some(poll) = &self.poll {
            // Nobody is woken for rings that stand still.
            let _ = sys::drain(poll.wake.as_raw_fd());
        }
    }

    fn positions(&self) -> Vec<Option<u16>> {
        let position = if self.running { End::next_position } else { End::position };
        self.ends.iter().map(|end| end.as_ref().map(position)).collect()
    }

    /// Stops every ring after a panic, which is a bug of ours.
    fn abandon(&mut self, reason: &str) {
        for number in self.numbers() {
            self.fail(number, format!("bug in the callback engine: {reason}"));
        }
    }
}

/// The rings of one device. Every call waits for no more than another call's copy of one chain.
#[derive(Debug)]
pub struct CallbackQueues {
    state: Mutex<State>,
}

impl CallbackQueues {
    /// `event_fd` is a borrowed eventfd, signalled when there is a ring error or a correction to take.
    #[must_use]
    pub fn new(ring_count: usize, event_fd: RawFd) -> Self {
        bell::prepare();
        let state = State {
            closed: false,
            poll: None,
            memory: None,
            ends: std::iter::repeat_with(|| None).take(ring_count).collect(),
            next_orders: vec![1; ring_count],
            running: false,
            first: 0,
            buffers: Vec::new(),
            errors: Vec::new(),
            corrections: Vec::new(),
            counters: std::iter::repeat_with(LiveCallbackCounters::default).take(ring_count).collect(),
            event_fd,
        };
        Self { state: Mutex::new(state) }
    }

    /// Locks rings that do not run.
    fn idle(&self) -> Result<MutexGuard<'_, State>, Error> {
        let state = lock(&self.state);
        if state.running {
            return Err(Error::Running);
        }
        if state.closed {
            return Err(Error::Closed);
        }
        Ok(state)
    }

    /// As `idle`, for a ring that is configured.
    fn idle_ring(&self, number: usize) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.idle()?;
        if state.ends.get(number).is_none_or(Option::is_none) {
            return Err(Error::NotConfigured);
        }
        Ok(state)
    }

    /// Sets all there is to know; touches neither guest memory nor the in-flight file.
    ///
    /// A ring that was configured at the same addresses with the same size, features and in-flight file goes on: chains of it
    /// that were handed out stay so. Of any other ring they are handed out again, if they are in flight.
    ///
    /// # Errors
    /// The rings run, or the configuration is wrong. Nothing changed.
    pub fn configure(&self, config: &CallbackConfig) -> Result<(), Error> {
        let mut state = self.idle()?;
        if config.rings.len() != state.ends.len() {
            let (given, expected) = (config.rings.len(), state.ends.len());
            let text = format!("{given} rings are configured, there are {expected}");
            return Err(Error::Invalid(Refusal::new(RefusalKind::Setting, text)));
        }
        let end = |(number, spec): (usize, &Option<RingSpec>)| {
            spec.as_ref().map(|spec| End::new(number, spec, config)).transpose()
        };
        let ends = config.rings.iter().enumerate().map(end).collect::<Result<Vec<_>, _>>();
        let mut ends = ends.map_err(Error::Invalid)?;
        for (end, former) in ends.iter_mut().zip(&mut state.ends) {
            if let (Some(end), Some(former)) = (end, former) {
                if end.continues(former) {
                    end.inherit(former);
                }
            }
        }
        if ends.iter().any(Option::is_some) {
            let refused =
                |error| Refusal::new(RefusalKind::Descriptor, format!("no descriptor to sleep on: {error}"));
            state.poll().map_err(|error| Error::Invalid(refused(error)))?;
        }
        let former =
            (std::mem::replace(&mut state.ends, ends), state.memory.replace(Arc::clone(&config.memory)));
        drop(state);
        drop(former); // this may unmap memory, which takes a while
        Ok(())
    }

    /// How many rings it has, configured or not.
    #[must_use]
    pub fn ring_count(&self) -> usize {
        lock(&self.state).ends.len()
    }

    /// Whether the rings can go on there; those that are not configured can anywhere.
    ///
    /// # Errors
    /// They cannot, or the rings run.
    pub fn check_positions(&self, positions: &[u16]) -> Result<(), Error> {
        let state = self.idle()?;
        for (end, position) in state.ends.iter().zip(positions) {
            let Some(end) = end else { continue };
            let refused = |error: RingError| Refusal::new(RefusalKind::Position, error.to_string());
            let checked = end.ring.check_position(*position).map_err(refused);
            checked.map_err(|refusal| Error::Invalid(refusal.of(&format_args!("ring {}", end.number))))?;
        }
        Ok(())
    }

    /// Sets where the rings go on; None is where guest memory, the in-flight file and the ledger say. Not for rings that are
    /// not configured. A ring whose ledger says what cannot be fails, as told by `take_ring_errors`.
    ///
    /// # Errors
    /// The rings run. Nothing changed.
    pub fn set_positions(&self, positions: &[Option<u16>]) -> Result<(), Error> {
        let mut state = self.idle()?;
        for number in state.numbers() {
            let Some(position) = positions.get(number).copied() else { break };
            state.with(number, |end, _| {
                // Whoever knows the position stopped the ring in order, and called where that was due.
                end.call_at_start = position.is_none();
                let position = match (position, &mut end.ring) {
                    (None, Ring::Packed(ring)) => Some(ring.recover()?.bits()),
                    _ => position,
                };
                if end.slot.is_none() && position != end.start {
                    // What was handed out here has been served elsewhere, as far as one can know.
                    end.drop_taken();
                }
                end.start = position;
                Ok(())
            });
        }
        Ok(())
    }

    /// Lets the rings run: the chains in flight first, then what the guest has made available.
    ///
    /// Gives the `CLOCK_MONOTONIC` nanoseconds at which it began.
    ///
    /// # Errors
    /// The rings run already, or are not configured. Nothing changed.
    pub fn start(&self) -> Result<u64, Error> {
        let mut state = self.idle()?;
        if state.memory.is_none() {
            return Err(Error::NotConfigured);
        }
        let began_ns = sys::monotonic_ns();
        attempt(&mut state, State::start);
        Ok(began_ns)
    }

    /// Stops; gives where the rings would go on, None for one that is not configured.
    ///
    /// Afterwards neither guest memory nor a kick descriptor is touched, and nothing is to be taken. What is in flight
    /// stays so. Stopping stopped rings gives the same answer.
    pub fn stop(&self) -> Vec<Option<u16>> {
        let mut state = lock(&self.state);
        state.stop();
        state.positions()
    }

    /// Returns the chains in flight of a stopped ring to the guest, unused and in the order in which they were taken: for a
    /// frontend that asks where the ring stands, because vhost-user has no word for chains in flight without a file of the
    /// frontend's. Gives how many. What the device does with them from now on is too late.
    ///
    /// # Errors
    /// The rings run, or this one is not configured. Nothing changed.
    pub fn give_back(&self, number: usize) -> Result<usize, Error> {
        let mut state = self.idle_ring(number)?;
        let count = attempt(&mut state, |state| {
            if state.ends[number].as_ref().is_none_or(|end| end.failed) {
                return 0;
            }
            let count = state.with(number, End::give_back);
            state.call_if_due(number);
            count.unwrap_or(0)
        });
        Ok(count)
    }

    /// Where the rings would go on.
    #[must_use]
    pub fn positions(&self) -> Vec<Option<u16>> {
        lock(&self.state).positions()
    }

    #[must_use]
    pub fn is_running(&self) -> bool {
        lock(&self.state).running
    }

    /// Whether each ring failed since it was configured.
    #[must_use]
    pub fn failed(&self) -> Vec<bool> {
        lock(&self.state).ends.iter().map(|end| end.as_ref().is_some_and(|end| end.failed)).collect()
    }

    /// Gives a ring up: the device cannot go on with it. Nothing for one that is not configured, or has failed.
    ///
    /// # Errors
    /// There is no such ring.
    pub fn fail(&self, number: usize, reason: &str) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if number >= state.ends.len() {
            let text = format!("there is no ring {number}");
            return Err(Error::Invalid(Refusal::new(RefusalKind::Setting, text)));
        }
        state.fail(number, reason.to_string());
        Ok(())
    }

    /// Takes note that a ring failed elsewhere, and everybody was told: it stands still until it is configured anew.
    ///
    /// # Errors
    /// The rings run, or this one is not configured. Nothing changed.
    pub fn set_failed(&self, number: usize) -> Result<(), Error> {
        let mut state = self.idle_ring(number)?;
        if let Some(end) = &mut state.ends[number] {
            end.failed = true;
        }
        Ok(())
    }

    /// Each ring that failed since the last call, with the reason.
    #[must_use]
    pub fn take_ring_errors(&self) -> Vec<(usize, String)> {
        std::mem::take(&mut lock(&self.state).errors)
    }

    /// Each ring that began elsewhere than it was told since the last call.
    #[must_use]
    pub fn take_corrections(&self) -> Vec<CallbackCorrection> {
        std::mem::take(&mut lock(&self.state).corrections)
    }

    /// Of each ring.
    #[must_use]
    pub fn counters(&self) -> Vec<CallbackCounters> {
        lock(&self.state).counters.iter().map(LiveCallbackCounters::get).collect()
    }

    /// Counting goes on from `counters`, of as many rings as it has.
    ///
    /// # Errors
    /// The rings run. Nothing changed.
    pub fn set_counters(&self, counters: &[CallbackCounters]) -> Result<(), Error> {
        for (live, counters) in self.idle()?.counters.iter().zip(counters) {
            live.set(counters);
        }
        Ok(())
    }

    /// Calls the driver of a ring, and tells it that the ring failed, by other borrowed descriptors from now on. The former
    /// ones are not used any more; a new call descriptor of a ring that runs is called once. A ring that is not configured
    /// has no descriptors.
    ///
    /// # Errors
    /// A descriptor is of another kind. Nothing changed.
    pub fn set_notifiers(
        &self,
        number: usize,
        call_fd: Option<RawFd>,
        error_fd: Option<RawFd>,
    ) -> Result<(), Error> {
        let notifiers =
            Notifiers::of(&format_args!("ring {number}"), call_fd, error_fd).map_err(Error::Invalid)?;
        let mut state = lock(&self.state);
        let State { ends, counters, running, .. } = &mut *state;
        let Some(end) = ends.get_mut(number).and_then(Option::as_mut) else { return Ok(()) };
        let former = std::mem::replace(&mut end.notifiers, notifiers);
        if former.call == notifiers.call {
            return Ok(());
        }
        end.call_at_start = true;
        if let Some(call) = notifiers.call.filter(|_| *running && !end.failed) {
            call.ring();
            counters[number].calls.add(1);
        }
        Ok(())
    }

    /// A ring marks what it writes in another log from now on, or in none: when this returns, the former log is written no
    /// more, and has the marks of all that was written before. The rings go on; one that cannot mark all that it may write
    /// fails. Nothing for a ring that is not configured.
    pub fn set_log(&self, number: usize, log: Option<RingLog>) {
        let mut state = lock(&self.state);
        if number >= state.ends.len() {
            return;
        }
        state.with(number, |end, _| {
            end.ring.writer().set_log(log);
            end.ring.check_log()
        });
    }

    /// Goes on with other memory, if the rings are in the same place there; false if they are not, or there are none. Chains
    /// in flight disturb nothing: their buffers are looked for when they are completed.
    pub fn swap_memory(&self, memory: &Arc<GuestMemory>) -> bool {
        let mut state = lock(&self.state);
        if state.memory.is_none()
            || !state.ends.iter().flatten().all(|end| end.ring.is_in(memory, &end.layout))
        {
            return false;
        }
        state.ends.iter_mut().flatten().for_each(|end| end.ring.set_memory(memory));
        let former = state.memory.replace(Arc::clone(memory));
        for number in state.numbers() {
            state.with(number, |end, _| end.ring.check_log());
        }
        drop(state);
        drop(former); // this may unmap memory, which takes a while
        true
    }

    /// A borrowed epoll descriptor: readable when there may be a chain to take. None once closed.
    ///
    /// # Errors
    /// The kernel gives none.
    pub fn fd(&self) -> io::Result<Option<RawFd>> {
        let mut state = lock(&self.state);
        if state.closed {
            return Ok(None);
        }
        Ok(Some(state.poll()?.epoll.as_raw_fd()))
    }

    /// Takes the next chain of any ring, each ring in its turn; None if there is none now. Waits for nothing.
    #[must_use]
    pub fn take(&self) -> Option<HandedOut> {
        let mut state = lock(&self.state);
        if !state.running {
            return None;
        }
        attempt(&mut state, State::take)
    }

    /// Completes a chain with what the device wrote: from any thread, in any order. A chain that is refused stays in flight.
    ///
    /// # Errors
    /// It was completed before, or has no room for so much. Nothing changed.
    pub fn complete(&self, chain: &HandedOut, data: &[u8]) -> Result<Completed, Error> {
        let mut state = lock(&self.state);
        attempt(&mut state, |state| Some(state.complete(chain, data))).unwrap_or(Ok(Completed::TooLate))
    }

    /// Stops and forgets rings, memory and descriptors. `configure` makes it usable again.
    pub fn release(&self) {
        let mut state = lock(&self.state);
        state.stop();
        let none = std::iter::repeat_with(|| None).take(state.ends.len()).collect();
        let former = (std::mem::replace(&mut state.ends, none), state.memory.take());
        drop(state);
        drop(former); // this may unmap memory, which takes a while
    }

    /// Stops for good and closes what was slept on. Idempotent.
    pub fn close(&self) {
        self.release();
        let mut state = lock(&self.state);
        state.closed = true;
        state.poll = None;
    }
}

/// Runs one step. A panic is a bug of ours, and costs the rings of this device: others go on, and so does whoever called.
fn attempt<T: Default>(state: &mut State, step: impl FnOnce(&mut State) -> T) -> T {
    // What the step left half-done is thrown away with the rings' progress.
    catch_unwind(AssertUnwindSafe(|| step(state))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        state.abandon(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panic"));
        T::default()
    })
}

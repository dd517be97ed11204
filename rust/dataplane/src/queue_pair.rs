//! One queue pair's thread: started, stopped between two packets, parked, joined.
//!
//! Owns:        the thread and the order of locks and flags that makes a stop quick.
//! Never sees:  what a packet or a ring is; that is `pump`.
//! Read next:   the binding in `rust/dataplane-python`.
//!
//! How a stop stays quick. The thread holds the lock while it moves packets and lets it go before it sleeps in
//! poll(2). Whoever stops raises a flag, which the thread looks at between two packets, and takes the lock: then the
//! rings stand still, be the thread parked, asleep or on its way. A sleeping thread is not even woken; it finds
//! out when something else wakes it, and touches nothing then.
//!
//! How a start stays quick. Whoever starts moves the first packets itself while the thread wakes up, which on a busy
//! machine takes the scheduler milliseconds.
//!
//! **Invariant**: only the holder of the lock touches rings, TAP and eventfds, and only while `running`.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::backlog::Backlog;
use crate::bell;
pub use crate::counters::Counters;
use crate::counters::LiveCounters;
use crate::log::RingLog;
use crate::memory::GuestMemory;
use crate::pump::{Budget, Config, Correction, Notifiers, Positions, Pump, Side, Sleep, BATCH, WATCHED};
use crate::refusal::Refusal;
use crate::sys;

/// Ring errors kept for `take_ring_errors`. Each ring fails once a configuration, the TAP once a start, so more can
/// only come from an owner that never takes them.
const RING_ERRORS_MAX: usize = 16;

/// Corrections kept for `take_corrections`, likewise: two a start.
const CORRECTIONS_MAX: usize = 16;

/// What `start` moves in each direction before it returns: enough for what waited during a handover of a NIC that is not
/// flooded, and some tens of microseconds for one that is.
const START: Budget = Budget { packets: 16, bytes: 64 << 10 };

/// Where poll(2) has no memory to wait with: a guest hardly notices, and a processor does not spin.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(1);

/// Bits of `Shared::failed`.
const RX_FAILED: u8 = 1;
const TX_FAILED: u8 = 2;

/// Why a call was refused; nothing was changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    Running,
    NotConfigured,
    Closed,
    Invalid(Refusal),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("the queue pair runs"),
            Self::NotConfigured => f.write_str("the queue pair is not configured"),
            Self::Closed => f.write_str("the queue pair is closed"),
            Self::Invalid(refusal) => refusal.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// What the lock guards.
#[derive(Debug, Default)]
struct State {
    pump: Option<Pump>,
    /// It outlives every configuration.
    backlog: Backlog,
    running: bool,
    closing: bool,
    /// The thread waits for `resumed` and holds no reference to any descriptor.
    parked: bool,
    /// Counts starts: a thread that slept through a stop and a start must not mistake old news for new.
    starts: u64,
}

/// What the first half of a start tells the second.
#[derive(Debug)]
struct Started {
    began_ns: u64,
    /// The thread was parked when the rings were started: one that was not finds them running by itself, once it wakes.
    parked: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the parked thread.
    resumed: Condvar,
    /// Tells that the thread parked.
    parked: Condvar,
    /// Someone wants the lock to stop the rings.
    stop_requested: AtomicBool,
    /// Copies of `state`, for those who must not wait for the lock.
    running: AtomicBool,
    positions: AtomicU64,
    failed: AtomicU8,
    interface_gone: AtomicBool,
    counters: LiveCounters,
    errors: Mutex<Vec<(Side, String)>>,
    corrections: Mutex<Vec<Correction>>,
    event_fd: RawFd,
    /// An eventfd that ends the thread's sleep.
    wake_fd: OwnedFd,
}

/// A lock whose holder panicked has nothing half-done that matters more than going on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A queue pair. Its thread parks until `start`.
#[derive(Debug)]
pub struct QueuePair {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl QueuePair {
    /// Creates the pair and its thread. `event_fd` is a borrowed eventfd, signalled when there is a ring error
    /// or a correction to take.
    ///
    /// # Errors
    /// The kernel gave no eventfd or no thread.
    pub fn new(name: &str, event_fd: RawFd) -> io::Result<Self> {
        // SAFETY: plain system call.
        let wake_fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake_fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            resumed: Condvar::new(),
            parked: Condvar::new(),
            stop_requested: AtomicBool::new(false),
            running: AtomicBool::new(false),
            positions: AtomicU64::new(pack(Positions::default())),
            failed: AtomicU8::new(0),
            interface_gone: AtomicBool::new(false),
            counters: LiveCounters::default(),
            errors: Mutex::default(),
            corrections: Mutex::default(),
            event_fd,
            // SAFETY: the descriptor was made just above and has no other owner.
            wake_fd: unsafe { OwnedFd::from_raw_fd(wake_fd) },
        });
        bell::prepare(); // a start rings on the thread of whoever starts, who is likely to be this one
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.replace('\0', "")).spawn(move || worker.work())?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Locks a pair that does not run.
    fn idle(&self) -> Result<MutexGuard<'_, State>, Error> {
        // Asked first without the lock, which a running thread hardly ever leaves free.
        if self.is_running() {
            return Err(Error::Running);
        }
        let state = lock(&self.shared.state);
        if state.running {
            return Err(Error::Running);
        }
        if state.closing {
            return Err(Error::Closed);
        }
        Ok(state)
    }

    /// Sets all there is to know; touches neither the host's side nor guest memory.
    ///
    /// # Errors
    /// The pair runs, or the configuration is wrong. Nothing changed.
    pub fn configure(&self, config: &Config) -> Result<(), Error> {
        let mut state = self.idle()?;
        let old = state.pump.replace(Pump::new(config).map_err(Error::Invalid)?);
        self.shared.interface_gone.store(false, Ordering::Relaxed);
        drop(state);
        drop(old); // this may unmap memory, which takes a while
        Ok(())
    }

    /// Whether the rings can go on there; those that are not configured can anywhere.
    ///
    /// # Errors
    /// They cannot, or the pair runs.
    pub fn check_positions(&self, rx: u16, tx: u16) -> Result<(), Error> {
        let state = self.idle()?;
        state.pump.as_ref().map_or(Ok(()), |pump| pump.check_positions(rx, tx).map_err(Error::Invalid))
    }

    /// Sets where the rings go on; None is the used index in guest memory, or what the ledger of a packed ring says.
    /// Not for rings that are not configured. A ring whose ledger says what cannot be fails, as told by `take_ring_errors`.
    ///
    /// # Errors
    /// The pair runs or is not configured. Nothing changed.
    pub fn set_positions(&self, rx: Option<u16>, tx: Option<u16>) -> Result<(), Error> {
        let mut state = self.idle()?;
        let pump = state.pump.as_mut().ok_or(Error::NotConfigured)?;
        pump.set_positions(rx, tx);
        self.shared.report(pump.take_failures());
        Ok(())
    }

    /// Scans both rings and the TAP, and lets the thread go on from there.
    ///
    /// Gives the `CLOCK_MONOTONIC` nanoseconds at which that scan began.
    ///
    /// # Errors
    /// The pair runs already or is not configured. Nothing changed.
    pub fn start(&self) -> Result<u64, Error> {
        let started = self.scan()?;
        self.wake(&started);
        Ok(started.began_ns)
    }

    /// The first half of a start: this thread moves the first packets.
    fn scan(&self) -> Result<Started, Error> {
        let shared = &self.shared;
        let mut state = self.idle()?;
        let parked = state.parked;
        let State { pump, backlog, .. } = &mut *state;
        let pump = pump.as_mut().ok_or(Error::NotConfigured)?;
        shared.note_corrections(attempt(pump, Pump::begin));
        backlog.begin();
        if let Some(position) = pump.next_positions().rx {
            shared.counters.rx_dropped_stale.add(backlog.claim(position).into());
        }
        state.running = true;
        state.starts += 1;
        shared.running.store(true, Ordering::Release);
        let began_ns = sys::monotonic_ns();
        shared.turn(&mut state, START);
        Ok(Started { began_ns, parked })
    }

    /// The second half, which comes after the first: a thread that wakes up takes the processor from the packets the
    /// guest waits for. Without the lock, which a thread that was awake already may hardly ever leave free.
    fn wake(&self, started: &Started) {
        let shared = &self.shared;
        if started.parked {
            shared.resumed.notify_one();
        } else {
            // It never noticed the last stop and sleeps on what mattered then.
            sys::wake(shared.wake_fd.as_raw_fd());
        }
    }

    /// Lets the thread come to its next look between two packets and stay there, until the `stop` that must follow.
    fn ask_to_stop(&self) {
        self.shared.stop_requested.store(true, Ordering::Relaxed);
    }

    /// Does something to a configured pair between two packets. Rings that run go on, for all that anybody sees.
    fn between_packets<T>(&self, act: impl FnOnce(&mut Pump, bool) -> T) -> Option<T> {
        let shared = &self.shared;
        self.ask_to_stop();
        let mut state = lock(&shared.state);
        shared.stop_requested.store(false, Ordering::Relaxed);
        let is_running = state.running;
        let result = state.pump.as_mut().map(|pump| act(pump, is_running));
        if let Some(pump) = &mut state.pump {
            shared.report_failures(pump);
        }
        let is_held_up = is_running && state.parked;
        drop(state);
        if is_held_up {
            shared.resumed.notify_one();
        }
        result
    }

    /// Calls the driver of a ring, and tells it that the ring failed, by other borrowed descriptors from now on. The former
    /// ones are not used any more; a new call descriptor of a ring that runs is called once. The rings go on. A ring that
    /// is not configured has no descriptors.
    ///
    /// # Errors
    /// A descriptor is of another kind. Nothing changed.
    pub fn set_notifiers(
        &self,
        side: Side,
        call_fd: Option<RawFd>,
        error_fd: Option<RawFd>,
    ) -> Result<(), Error> {
        // Looked at before the rings wait.
        let notifiers =
            Notifiers::of(&format_args!("{side} ring"), call_fd, error_fd).map_err(Error::Invalid)?;
        self.between_packets(|pump, is_running| {
            pump.set_notifiers(side, notifiers, is_running, &self.shared.counters);
        });
        Ok(())
    }

    /// A ring marks what it writes in another log from now on, or in none: when this returns, the former log is written no
    /// more, and has the marks of all that was written before. The rings go on; one that cannot mark all that it may write
    /// fails. Nothing for a ring that is not configured.
    pub fn set_log(&self, side: Side, log: Option<RingLog>) {
        self.between_packets(|pump, _| pump.set_log(side, log));
    }

    /// Stops between two packets; gives where the rings would go on.
    ///
    /// Afterwards no ring, no TAP and no eventfd is touched, every used buffer was told to the guest, and no packet
    /// is held. Stopping a stopped pair gives the same answer.
    pub fn stop(&self) -> Positions {
        self.halt();
        lock(&self.shared.state).pump.as_ref().map(Pump::positions).unwrap_or_default()
    }

    /// Stops; whether it ran.
    fn halt(&self) -> bool {
        let shared = &self.shared;
        self.ask_to_stop();
        let mut state = lock(&shared.state);
        shared.stop_requested.store(false, Ordering::Relaxed);
        let running = std::mem::take(&mut state.running);
        shared.running.store(false, Ordering::Release);
        if let Some(pump) = state.pump.as_mut().filter(|_| running) {
            attempt(pump, |pump| pump.settle(&shared.counters));
            shared.report_failures(pump);
        }
        running
    }

    /// Where the rings would go on; exact while stopped, else a moment old.
    #[must_use]
    pub fn positions(&self) -> Positions {
        match self.idle() {
            Ok(state) => state.pump.as_ref().map(Pump::positions).unwrap_or_default(),
            Err(_) => unpack(self.shared.positions.load(Ordering::Relaxed)),
        }
    }

    /// Whether each ring, rx first, failed since it was configured; exact while stopped, else a moment old.
    #[must_use]
    pub fn failed(&self) -> (bool, bool) {
        if self.is_running() {
            let failed = self.shared.failed.load(Ordering::Relaxed);
            return (failed & RX_FAILED != 0, failed & TX_FAILED != 0);
        }
        lock(&self.shared.state).pump.as_ref().map_or((false, false), Pump::failed)
    }

    /// Takes note that a ring failed elsewhere: it stands still until the pair is configured anew.
    ///
    /// # Errors
    /// The pair runs or is not configured. Nothing changed.
    pub fn set_failed(&self, side: Side) -> Result<(), Error> {
        let mut state = self.idle()?;
        state.pump.as_mut().ok_or(Error::NotConfigured)?.set_failed(side);
        Ok(())
    }

    /// Whether the TAP's interface was found to be gone, or the stream to have ended, since the pair was configured.
    #[must_use]
    pub fn interface_gone(&self) -> bool {
        self.shared.interface_gone.load(Ordering::Relaxed)
    }

    /// What waits, here and in the TAP, is for a driver whose receive ring goes on at `position`; None is for no driver that
    /// comes. The next start with a receive ring decides: for another driver it is read out and dropped, without a wait.
    ///
    /// # Errors
    /// The pair runs. Nothing changed.
    pub fn reserve_waiting(&self, position: Option<u16>) -> Result<(), Error> {
        self.idle()?.backlog.reserve(position);
        Ok(())
    }

    /// As `reserve_waiting`, for a driver whose receive ring goes on anywhere but at `position`.
    ///
    /// # Errors
    /// The pair runs. Nothing changed.
    pub fn refuse_waiting(&self, position: u16) -> Result<(), Error> {
        self.idle()?.backlog.refuse(position);
        Ok(())
    }

    /// The frame that was read and waits for buffers, with its header of 12 bytes. None also while the pair runs, which may
    /// deliver it at any time.
    #[must_use]
    pub fn waiting_frame(&self) -> Option<Vec<u8>> {
        self.idle().ok()?.backlog.frame().map(<[u8]>::to_vec)
    }

    /// Lets a frame wait that another process read, in the place of any other; none where it is empty.
    ///
    /// # Errors
    /// The pair runs, or the frame is longer than any. Nothing changed.
    pub fn set_waiting_frame(&self, frame: &[u8]) -> Result<(), Error> {
        self.idle()?.backlog.put(frame).map_err(Error::Invalid)
    }

    #[must_use]
    pub fn is_running(&self) -> bool {
        self.shared.running.load(Ordering::Acquire)
    }

    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counters.get()
    }

    /// Counting goes on from `counters`.
    ///
    /// # Errors
    /// The pair runs. Nothing changed.
    pub fn set_counters(&self, counters: &Counters) -> Result<(), Error> {
        let _state = self.idle()?;
        self.shared.counters.set(counters);
        Ok(())
    }

    /// Each ring that failed since the last call, with the reason.
    #[must_use]
    pub fn take_ring_errors(&self) -> Vec<(Side, String)> {
        std::mem::take(&mut lock(&self.shared.errors))
    }

    /// Each ring that began elsewhere than it was told since the last call.
    #[must_use]
    pub fn take_corrections(&self) -> Vec<Correction> {
        std::mem::take(&mut lock(&self.shared.corrections))
    }

    /// Stops and forgets rings, memory and descriptors; the thread is parked afterwards. `configure` makes the pair
    /// usable again.
    pub fn release(&self) {
        self.stop();
        let shared = &self.shared;
        let mut state = lock(&shared.state);
        if !state.parked && !state.closing {
            // A sleeper keeps what it sleeps on alive in the kernel, a TAP for one.
            sys::wake(shared.wake_fd.as_raw_fd());
            let parked = shared.parked.wait_while(state, |state| !state.parked && !state.closing);
            state = parked.unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        let pump = state.pump.take();
        drop(state);
        drop(pump); // this may unmap memory, which takes a while
    }

    /// Stops, ends the thread and waits for its end. Idempotent.
    pub fn close(&self) {
        self.release();
        lock(&self.shared.state).closing = true;
        self.shared.resumed.notify_one();
        sys::signal(self.shared.wake_fd.as_raw_fd());
        if let Some(thread) = lock(&self.thread).take() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

/// Starts every pair that is configured and does not run: all rings are scanned before the first thread is woken.
///
/// Gives for each pair the `CLOCK_MONOTONIC` nanoseconds at which its scan began, None where it was not started.
pub fn start_all(pairs: &[&QueuePair]) -> Vec<Option<u64>> {
    let started: Vec<_> = pairs.iter().map(|pair| pair.scan().ok()).collect();
    for (pair, started) in pairs.iter().zip(&started) {
        if let Some(started) = started {
            pair.wake(started);
        }
    }
    started.into_iter().map(|started| Some(started?.began_ns)).collect()
}

/// Stops every pair: all threads are asked before the first one is waited for. Gives which of them ran.
pub fn stop_all(pairs: &[&QueuePair]) -> Vec<bool> {
    pairs.iter().for_each(|pair| pair.ask_to_stop());
    pairs.iter().map(|pair| pair.halt()).collect()
}

/// Lets every configured pair whose rings are in the same place of `memory` go on with that: gives which did. The others
/// go on with what they had.
///
/// Rings that run wait for no longer than it takes to compare addresses and swap a pointer. No pair that did uses the former memory any more.
pub fn swap_memory(pairs: &[&QueuePair], memory: &Arc<GuestMemory>) -> Vec<bool> {
    let swap = |pair: &&QueuePair| pair.between_packets(|pump, _| pump.swap_memory(Arc::clone(memory)));
    // What comes back is dropped with no lock held: this may unmap memory, which takes a while.
    pairs.iter().map(|pair| swap(pair).is_some_and(|unused| unused.is_ok())).collect()
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.close();
    }
}

/// The end of the thread, also by a panic: nobody may wait for it to park any more.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).closing = true;
        self.0.parked.notify_all();
    }
}

impl Shared {
    /// The thread.
    fn work(&self) {
        let _ended = Ended(self);
        sys::block_signals();
        bell::prepare();
        let mut fds = [libc::pollfd { fd: -1, events: 0, revents: 0 }; WATCHED + 1];
        let mut state = self.park(lock(&self.state));
        while !state.closing {
            let (wake, watched) = fds.split_first_mut().expect("one more than watched");
            let sleep = if self.turn(&mut state, BATCH) { None } else { self.watch(&mut state, watched) };
            let starts = state.starts;
            if let Some(sleep) = sleep {
                *wake = libc::pollfd { fd: self.wake_fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                drop(state);
                if sys::poll(&mut fds, sleep.longest).is_err() {
                    // Without memory to be woken, it looks by itself, and leaves the processor to whoever frees some.
                    std::thread::sleep(NO_MEMORY_PAUSE);
                }
                state = self.park(lock(&self.state));
                self.after_sleep(&mut state, starts, &fds);
            } else {
                drop(state);
                state = self.park(lock(&self.state));
            }
        }
    }

    /// One turn of the rings; false if there is nothing to do but to wait.
    fn turn(&self, state: &mut State, budget: Budget) -> bool {
        let State { pump, backlog, .. } = state;
        let pump = pump.as_mut().expect("a pair that runs is configured");
        let more = attempt(pump, |pump| pump.turn(budget, backlog, &self.stop_requested, &self.counters));
        self.positions.store(pack(pump.next_positions()), Ordering::Relaxed);
        self.report_failures(pump);
        more
    }

    /// Prepares to sleep; None if there is something to do after all.
    fn watch(&self, state: &mut State, watched: &mut [libc::pollfd]) -> Option<Sleep> {
        let State { pump, backlog, .. } = state;
        let pump = pump.as_mut().expect("a pair that runs is configured");
        let sleep = attempt(pump, |pump| pump.watch(watched, backlog));
        self.report_failures(pump);
        sleep
    }

    /// Waits until the rings are to run and nobody is about to stop them.
    fn park<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while (!state.running || self.stop_requested.load(Ordering::Relaxed)) && !state.closing {
            state.parked = true;
            self.parked.notify_all();
            state = self.resumed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            state.parked = false;
        }
        state
    }

    /// Takes what woke the thread to the pump, unless the rings were stopped meanwhile: then it belongs to whoever
    /// runs them next, and a start scans everything anyway.
    fn after_sleep(&self, state: &mut State, starts: u64, fds: &[libc::pollfd]) {
        if fds[0].revents != 0 {
            // Our own eventfd cannot fail.
            let _ = sys::drain(self.wake_fd.as_raw_fd());
        }
        if let Some(pump) = state.pump.as_mut().filter(|_| state.running && state.starts == starts) {
            attempt(pump, |pump| pump.woken(&fds[1..], &self.counters));
        }
    }

    fn report_failures(&self, pump: &mut Pump) {
        let (rx, tx) = pump.failed();
        let failed = if rx { RX_FAILED } else { 0 } | if tx { TX_FAILED } else { 0 };
        self.failed.store(failed, Ordering::Relaxed);
        if pump.host_gone() && !self.interface_gone.swap(true, Ordering::Relaxed) {
            sys::signal(self.event_fd);
        }
        self.report(pump.take_failures());
    }

    fn note_corrections(&self, new: Vec<Correction>) {
        if new.is_empty() {
            return;
        }
        let mut corrections = lock(&self.corrections);
        corrections.extend(new);
        corrections.truncate(CORRECTIONS_MAX);
        drop(corrections);
        sys::signal(self.event_fd);
    }

    fn report(&self, failures: Vec<(Side, String)>) {
        if failures.is_empty() {
            return;
        }
        let mut errors = lock(&self.errors);
        errors.extend(failures);
        errors.truncate(RING_ERRORS_MAX);
        drop(errors);
        sys::signal(self.event_fd);
    }
}

/// Runs one step of a pump. A panic is a bug of ours, and costs the rings of this pair: other pairs go on, and so does
/// whoever called.
fn attempt<T: Default>(pump: &mut Pump, step: impl FnOnce(&mut Pump) -> T) -> T {
    // What the step left half-done is thrown away with the rings' progress.
    catch_unwind(AssertUnwindSafe(|| step(pump))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        pump.abandon(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panic"));
        T::default()
    })
}

/// Positions as one word: 16 bits each, and a bit above them where there is one.
fn pack(positions: Positions) -> u64 {
    let half = |position: Option<u16>| position.map_or(0, |position| 1 << 16 | u64::from(position));
    half(positions.rx) << 32 | half(positions.tx)
}

fn unpack(word: u64) -> Positions {
    let half = |word: u64| (word >> 16 & 1 != 0).then_some((word & 0xffff) as u16);
    Positions { rx: half(word >> 32), tx: half(word) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Features;
    use crate::common::{await_rung, eventfd, memory, send, wire, Queue, ALL_OFFLOADS, MEMORY_START, WRITE};
    use crate::pump::{HostSide, RingSpec};
    use crate::ring::Format;

    const BUFFER: u64 = MEMORY_START + 0x10_0000;
    const FRAME: [u8; 60] = [0; 60];

    struct Bench {
        queues: [Queue; 2],
        /// Kick, call and error of each ring.
        ends: [[OwnedFd; 3]; 2],
        wire: OwnedFd,
        tap: OwnedFd,
        event: OwnedFd,
        pair: QueuePair,
    }

    impl Bench {
        fn new() -> Self {
            let memory = memory();
            let queue = |address| Queue::new(&memory, address, 64, 5);
            let (wire, tap) = wire();
            let event = eventfd();
            let pair = QueuePair::new("test", event.as_raw_fd()).unwrap();
            let ends = [(); 2].map(|()| [(); 3].map(|()| eventfd()));
            let bench = Self {
                queues: [MEMORY_START, MEMORY_START + 0x1_0000].map(queue),
                ends,
                wire,
                tap,
                event,
                pair,
            };
            bench.configure();
            bench
        }

        fn configure(&self) {
            let spec = |ring: usize| {
                let [kick, call, error] = self.ends[ring].each_ref().map(AsRawFd::as_raw_fd);
                Some(RingSpec {
                    layout: self.queues[ring].layout,
                    kick_fd: kick,
                    call_fd: Some(call),
                    error_fd: Some(error),
                    next_avail: None,
                    ledger: None,
                    in_flight: None,
                    log: None,
                })
            };
            let config = Config {
                memory: Arc::clone(&self.queues[0].memory),
                host: HostSide::Tap(self.tap.as_raw_fd()),
                header_length: 12,
                frame_length_max: 1514,
                offloads: ALL_OFFLOADS,
                format: Format::Split,
                features: Features { event_index: false, indirect: true },
                mergeable: true,
                rx: spec(0),
                tx: spec(1),
            };
            self.pair.configure(&config).unwrap();
        }

        fn offer_rx(&mut self, length: u32) {
            self.queues[0].descriptor(0, BUFFER, length, WRITE, 0);
            self.queues[0].offer(0);
            sys::signal(self.ends[0][0].as_raw_fd());
        }

        /// The next frame panics.
        fn break_window(&mut self) {
            lock(&self.pair.shared.state).pump.as_mut().unwrap().break_window();
            self.offer_rx(20);
            assert!(send(&self.wire, &FRAME));
        }

        /// What is to be seen of a pair that panicked.
        fn await_both_failed(&self) {
            let errors = await_rung(&self.event, || {
                Some(self.pair.take_ring_errors()).filter(|errors| !errors.is_empty())
            });
            let reason = "bug in the packet path: the caller checked that the frame fits".to_string();
            assert_eq!(errors, [(Side::Rx, reason.clone()), (Side::Tx, reason)]);
            assert_eq!(self.pair.failed(), (true, true));
            assert!(self.ends.iter().all(|[.., error]| sys::drain(error.as_raw_fd()).unwrap()));
        }

        fn deliver_one(&mut self) {
            self.offer_rx(2048);
            assert!(send(&self.wire, &FRAME));
            let queue = &mut self.queues[0];
            assert_eq!(await_rung(&self.ends[0][1], || queue.next_used()), (0, 60));
        }
    }

    #[test]
    fn a_panic_costs_the_rings_of_its_pair_until_they_are_configured_again_and_no_other_pair() {
        let mut other = Bench::new();
        other.pair.start().unwrap();
        let mut bench = Bench::new();
        bench.pair.start().unwrap();
        bench.deliver_one();
        bench.break_window();
        bench.await_both_failed();
        let here = Positions { rx: Some(6), tx: Some(5) };
        assert_eq!((bench.pair.positions(), bench.pair.stop()), (here, here));
        bench.pair.start().unwrap();
        assert_eq!(bench.pair.failed(), (true, true), "as any ring that failed");
        other.deliver_one();
        bench.pair.stop();
        bench.configure();
        bench.pair.start().unwrap();
        let queue = &mut bench.queues[0];
        assert!(send(&bench.wire, &FRAME[..20]));
        assert_eq!(await_rung(&bench.ends[0][1], || queue.next_used()), (0, 20), "the buffer is there still");
        bench.deliver_one();
        assert_eq!(bench.pair.failed(), (false, false));
        bench.pair.close();
    }

    #[test]
    fn a_turn_ends_with_the_packet_that_reaches_its_limit_of_bytes() {
        const LENGTH: u32 = 40_000;
        let mut bench = Bench::new();
        for (queue, flags) in bench.queues.iter_mut().zip([WRITE, 0]) {
            for head in 0..4 {
                queue.descriptor(head, BUFFER, LENGTH + u32::from(flags), flags, 0);
                queue.offer(head);
            }
        }
        (0..4).for_each(|_| assert!(send(&bench.wire, &[0; LENGTH as usize])));
        // The first half of a start: the thread is not woken, so nobody else takes a turn.
        bench.pair.scan().unwrap();
        assert_eq!(bench.queues.each_ref().map(Queue::used_index), [5 + 2; 2]);
        assert_eq!(bench.pair.stop(), Positions { rx: Some(7), tx: Some(7) });
    }

    #[test]
    fn a_frame_waits_for_no_driver_that_posts_nothing_for_ever() {
        let mut bench = Bench::new();
        bench.offer_rx(20);
        assert!(send(&bench.wire, &FRAME));
        bench.pair.scan().unwrap();
        assert_eq!(bench.pair.stop().rx, Some(5));
        assert_eq!(bench.pair.waiting_frame().as_deref(), Some(&FRAME[..]));
        bench.pair.scan().unwrap();
        let mut state = lock(&bench.pair.shared.state);
        let mut fds = [libc::pollfd { fd: -1, events: 0, revents: 0 }; WATCHED];
        let sleep = bench.pair.shared.watch(&mut state, &mut fds).expect("there is nothing to do");
        assert!(sleep.longest > Some(Duration::from_secs(9)), "it is waited for from each start on");
        state.backlog.exhaust_patience();
        assert!(!bench.pair.shared.turn(&mut state, BATCH));
        let sleep = bench.pair.shared.watch(&mut state, &mut fds).expect("there is nothing to do");
        assert_eq!(sleep.longest, None);
        drop(state);
        assert_eq!(bench.pair.stop().rx, Some(5));
        assert_eq!(bench.pair.counters().rx_dropped_length, 1);
        assert_eq!(bench.pair.waiting_frame(), None);
    }

    #[test]
    fn a_panic_in_a_start_is_not_the_callers() {
        let mut bench = Bench::new();
        bench.break_window();
        bench.pair.start().unwrap();
        bench.await_both_failed();
        assert_eq!(bench.pair.stop(), Positions { rx: Some(5), tx: Some(5) });
        assert_eq!(bench.pair.take_ring_errors(), []);
    }
}

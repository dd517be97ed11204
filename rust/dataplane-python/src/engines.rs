//! Binding of what is done with the rings of all devices at once, whatever serves them.
//!
//! Numbers go in and out as the migration stream has them, big endian, so that nobody makes Python objects of them while
//! guests wait.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

use dataplane::{callback, queue_pair, CallbackCounters, Counters, Side, FRAME_SIZE_MAX};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::callback::CallbackQueues;
use crate::queue_pair::QueuePair;

/// What serves some rings of a device.
pub enum Engine {
    Pair(Py<QueuePair>),
    Callback(Py<CallbackQueues>),
}

/// By hand: what is derived makes an exception of each type that did not fit, inside the downtime.
impl<'a, 'py> FromPyObject<'a, 'py> for Engine {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(pair) = object.cast::<QueuePair>() {
            return Ok(Self::Pair(pair.to_owned().unbind()));
        }
        Ok(Self::Callback(object.cast::<CallbackQueues>()?.to_owned().unbind()))
    }
}

/// The same, for as long as a call lasts.
#[derive(Clone, Copy)]
enum Lent<'a> {
    Pair(&'a queue_pair::QueuePair),
    Callback(&'a callback::CallbackQueues),
}

impl Engine {
    fn lend(&self) -> Lent<'_> {
        match self {
            Self::Pair(pair) => Lent::Pair(pair.get().inner()),
            Self::Callback(queues) => Lent::Callback(queues.get().inner()),
        }
    }
}

fn lent(engines: &[Engine]) -> Vec<Lent<'_>> {
    engines.iter().map(Engine::lend).collect()
}

fn pairs<'a>(engines: &[Lent<'a>]) -> Vec<&'a queue_pair::QueuePair> {
    let pair = |engine: &Lent<'a>| match engine {
        Lent::Pair(pair) => Some(*pair),
        Lent::Callback(_) => None,
    };
    engines.iter().filter_map(pair).collect()
}

/// Receive and transmit.
const RINGS_OF_A_PAIR: usize = 2;

impl Lent<'_> {
    fn ring_count(self) -> usize {
        match self {
            Self::Pair(_) => RINGS_OF_A_PAIR,
            Self::Callback(queues) => queues.ring_count(),
        }
    }

    fn counter_count(self) -> usize {
        match self {
            Self::Pair(_) => Counters::NAMES.len(),
            Self::Callback(queues) => queues.ring_count() * CallbackCounters::NAMES.len(),
        }
    }

    fn positions(self, mut each: impl FnMut(Option<u16>)) {
        match self {
            Self::Pair(pair) => {
                let positions = pair.positions();
                each(positions.rx);
                each(positions.tx);
            }
            Self::Callback(queues) => queues.positions().into_iter().for_each(each),
        }
    }

    fn failed(self, mut each: impl FnMut(bool)) {
        match self {
            Self::Pair(pair) => {
                let (rx, tx) = pair.failed();
                each(rx);
                each(tx);
            }
            Self::Callback(queues) => queues.failed().into_iter().for_each(each),
        }
    }

    fn counters(self, mut each: impl FnMut(u64)) {
        match self {
            Self::Pair(pair) => pair.counters().values().into_iter().for_each(each),
            Self::Callback(queues) => {
                queues.counters().iter().for_each(|ring| ring.values().into_iter().for_each(&mut each));
            }
        }
    }

    /// Why its rings cannot go on there; `refused` is for an engine that runs.
    fn check_positions(self, positions: &[u16]) -> PyResult<Option<String>> {
        match self {
            Self::Pair(pair) => match pair.check_positions(positions[0], positions[1]) {
                Ok(()) => Ok(None),
                Err(queue_pair::Error::Invalid(refusal)) => Ok(Some(refusal.to_string())),
                Err(error) => Err(crate::queue_pair::refused(error)),
            },
            Self::Callback(queues) => match queues.check_positions(positions) {
                Ok(()) => Ok(None),
                Err(callback::Error::Invalid(refusal)) => Ok(Some(refusal.to_string())),
                Err(error) => Err(crate::callback::refused(error)),
            },
        }
    }

    /// Sets what came from elsewhere. Rings that are not configured are passed over, but for what they counted.
    fn load(self, positions: &[u16], failed: &[u8], counters: &[u64]) -> PyResult<()> {
        match self {
            Self::Pair(pair) => {
                load_pair(pair, positions, failed, counters).map_err(crate::queue_pair::refused)
            }
            Self::Callback(queues) => {
                load_callback(queues, positions, failed, counters).map_err(crate::callback::refused)
            }
        }
    }

    /// Lets the rings go on where guest memory, ledger and in-flight file say, for who knew better is dead.
    fn recover(self) -> PyResult<()> {
        match self {
            Self::Pair(pair) => match pair.set_positions(None, None) {
                Ok(()) | Err(queue_pair::Error::NotConfigured) => Ok(()),
                Err(error) => Err(crate::queue_pair::refused(error)),
            },
            Self::Callback(queues) => {
                queues.set_positions(&vec![None; queues.ring_count()]).map_err(crate::callback::refused)
            }
        }
    }
}

fn load_pair(
    pair: &queue_pair::QueuePair,
    positions: &[u16],
    failed: &[u8],
    counters: &[u64],
) -> Result<(), queue_pair::Error> {
    let values = counters.try_into().expect("as many as it counts");
    pair.set_counters(&Counters::from_values(values))?;
    match pair.set_positions(Some(positions[0]), Some(positions[1])) {
        Err(queue_pair::Error::NotConfigured) => return Ok(()),
        result => result?,
    }
    for (side, failed) in [Side::Rx, Side::Tx].into_iter().zip(failed) {
        if *failed != 0 {
            pair.set_failed(side)?;
        }
    }
    Ok(())
}

fn load_callback(
    queues: &callback::CallbackQueues,
    positions: &[u16],
    failed: &[u8],
    counters: &[u64],
) -> Result<(), callback::Error> {
    let rings = counters.chunks_exact(CallbackCounters::NAMES.len());
    let counters: Vec<_> = rings
        .map(|ring| CallbackCounters::from_values(ring.try_into().expect("a chunk is so long")))
        .collect();
    queues.set_counters(&counters)?;
    let positions: Vec<_> = positions.iter().copied().map(Some).collect();
    queues.set_positions(&positions)?;
    for ring in failed.iter().enumerate().filter_map(|(ring, failed)| (*failed != 0).then_some(ring)) {
        match queues.set_failed(ring) {
            Ok(()) | Err(callback::Error::NotConfigured) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Starts all that is configured and stands still: queue pairs first, because packets wait for them.
#[pyfunction]
pub fn start_all(py: Python<'_>, engines: Vec<Engine>) -> Vec<Option<u64>> {
    let engines = lent(&engines);
    py.detach(|| {
        let mut began = queue_pair::start_all(&pairs(&engines)).into_iter();
        engines
            .iter()
            .map(|engine| match engine {
                Lent::Pair(_) => began.next().flatten(),
                Lent::Callback(queues) => queues.start().ok(),
            })
            .collect()
    })
}

/// Stops all, those that serve no packets first; gives which of them ran.
#[pyfunction]
pub fn stop_all(py: Python<'_>, engines: Vec<Engine>) -> Vec<bool> {
    let engines = lent(&engines);
    py.detach(|| {
        let halt = |engine: &Lent<'_>| match engine {
            Lent::Pair(_) => false,
            Lent::Callback(queues) => {
                let ran = queues.is_running();
                queues.stop();
                ran
            }
        };
        let mut ran: Vec<_> = engines.iter().map(halt).collect();
        let pairs_ran = queue_pair::stop_all(&pairs(&engines));
        let places = engines.iter().zip(&mut ran).filter(|(engine, _)| matches!(engine, Lent::Pair(_)));
        places.zip(pairs_ran).for_each(|((_, place), ran)| *place = ran);
        ran
    })
}

/// Positions, failed rings and counters of all, one after the other.
type Saved<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// What travels of all engines, behind one another.
#[pyfunction]
pub fn save_all(py: Python<'_>, engines: Vec<Engine>) -> Saved<'_> {
    let engines = lent(&engines);
    let (positions, failed, counters) = py.detach(|| {
        let (mut positions, mut failed, mut counters) = (Vec::new(), Vec::new(), Vec::new());
        for engine in &engines {
            engine.positions(|position| positions.extend(position.unwrap_or(0).to_be_bytes()));
            engine.failed(|ring| failed.push(u8::from(ring)));
            engine.counters(|counter| counters.extend(counter.to_be_bytes()));
        }
        (positions, failed, counters)
    });
    (PyBytes::new(py, &positions), PyBytes::new(py, &failed), PyBytes::new(py, &counters))
}

/// Takes numbers apart, of which there must be `count`.
fn numbers<const SIZE: usize, T>(
    what: &str,
    bytes: &[u8],
    count: usize,
    number: impl Fn([u8; SIZE]) -> T,
) -> PyResult<Vec<T>> {
    if bytes.len() != count * SIZE {
        let (came, expected) = (bytes.len(), count * SIZE);
        return Err(PyValueError::new_err(format!("{what} have {came} bytes, expected {expected}")));
    }
    Ok(bytes.chunks_exact(SIZE).map(|chunk| number(chunk.try_into().expect("a chunk is so long"))).collect())
}

fn ring_count(engines: &[Lent<'_>]) -> usize {
    engines.iter().map(|engine| engine.ring_count()).sum()
}

/// The first engine whose rings cannot go on where they are told to, and why.
#[pyfunction]
pub fn check_positions(engines: Vec<Engine>, positions: &[u8]) -> PyResult<Option<(usize, String)>> {
    let engines = lent(&engines);
    let positions = numbers("positions", positions, ring_count(&engines), u16::from_be_bytes)?;
    let mut positions = positions.as_slice();
    for (place, engine) in engines.into_iter().enumerate() {
        let (own, rest) = positions.split_at(engine.ring_count());
        positions = rest;
        if let Some(reason) = engine.check_positions(own)? {
            return Ok(Some((place, reason)));
        }
    }
    Ok(None)
}

/// Sets what `save_all` gave, of engines that stand still.
#[pyfunction]
pub fn load_all(
    py: Python<'_>,
    engines: Vec<Engine>,
    positions: &[u8],
    failed: &[u8],
    counters: &[u8],
) -> PyResult<()> {
    let engines = lent(&engines);
    py.detach(|| {
        let rings = ring_count(&engines);
        let counted = engines.iter().map(|engine| engine.counter_count()).sum();
        let positions = numbers("positions", positions, rings, u16::from_be_bytes)?;
        let failed = numbers("failed rings", failed, rings, u8::from_be_bytes)?;
        let counters = numbers("counters", counters, counted, u64::from_be_bytes)?;
        let (mut positions, mut failed, mut counters) = (&positions[..], &failed[..], &counters[..]);
        for engine in engines {
            let (own_positions, own_failed, own_counters);
            (own_positions, positions) = positions.split_at(engine.ring_count());
            (own_failed, failed) = failed.split_at(engine.ring_count());
            (own_counters, counters) = counters.split_at(engine.counter_count());
            engine.load(own_positions, own_failed, own_counters)?;
        }
        Ok(())
    })
}

/// Lets all rings that stand still go on where a dead process left them.
#[pyfunction]
pub fn recover_all(py: Python<'_>, engines: Vec<Engine>) -> PyResult<()> {
    let engines = lent(&engines);
    py.detach(|| engines.into_iter().try_for_each(Lent::recover))
}

/// Bytes of a file for each pair: the longest frame, in whole pages.
const WAITING_STRIDE: u64 = FRAME_SIZE_MAX.next_multiple_of(4096) as u64;

/// Lends a descriptor as a file.
fn file(fd: RawFd) -> ManuallyDrop<File> {
    // SAFETY: the caller keeps it open during the call, and nobody closes it here.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

/// Writes the frame that waits in each queue pair that stands still into a file; gives their lengths.
#[pyfunction]
pub fn save_waiting(py: Python<'_>, engines: Vec<Engine>, fd: RawFd) -> PyResult<Bound<'_, PyBytes>> {
    let mut lengths = Vec::new();
    for (index, pair) in pairs(&lent(&engines)).into_iter().enumerate() {
        let frame = pair.waiting_frame().unwrap_or_default();
        if !frame.is_empty() {
            file(fd).write_all_at(&frame, WAITING_STRIDE * index as u64)?;
        }
        lengths.extend(u32::try_from(frame.len()).expect("no frame is so long").to_be_bytes());
    }
    Ok(PyBytes::new(py, &lengths))
}

/// The other way round, for pairs that stand still.
#[pyfunction]
pub fn load_waiting(engines: Vec<Engine>, fd: RawFd, lengths: &[u8]) -> PyResult<()> {
    let pairs = pairs(&lent(&engines));
    let lengths = numbers("lengths", lengths, pairs.len(), u32::from_be_bytes)?;
    for (index, (pair, length)) in
        pairs.into_iter().zip(lengths).enumerate().filter(|(_, (_, length))| *length > 0)
    {
        let mut frame = vec![0; (length as usize).min(FRAME_SIZE_MAX + 1)];
        file(fd).read_exact_at(&mut frame, WAITING_STRIDE * index as u64)?;
        pair.set_waiting_frame(&frame).map_err(crate::queue_pair::refused)?;
    }
    Ok(())
}

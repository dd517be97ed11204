//! Binding of the queue pair and its rings.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dataplane::chain::{Features, Layout};
use dataplane::queue_pair::Error;
use dataplane::{Config, Counters, Format, HostSide, Offloads, Positions, RingSpec, Side, FRAME_SIZE_MAX};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::ledger::Ledger;
use crate::memory::GuestMemory;
use crate::stream::FrameStream;

/// Where one virtqueue is.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct Ring {
    spec: RingSpec,
}

#[pymethods]
impl Ring {
    #[new]
    #[pyo3(signature = (*, size, descriptor_area, driver_area, device_area, kick_fd, call_fd, error_fd, next_avail,
                        ledger=None))]
    #[allow(clippy::too_many_arguments)] // keyword-only in Python
    fn new(
        size: u32,
        descriptor_area: u64,
        driver_area: u64,
        device_area: u64,
        kick_fd: RawFd,
        call_fd: Option<RawFd>,
        error_fd: Option<RawFd>,
        next_avail: Option<u16>,
        ledger: Option<(PyRef<'_, Ledger>, usize)>,
    ) -> PyResult<Self> {
        let layout = Layout { size, descriptor_area, driver_area, device_area };
        let ledger = ledger.map(|(ledger, ring)| ledger.slot(ring)).transpose()?;
        Ok(Self { spec: RingSpec { layout, kick_fd, call_fd, error_fd, next_avail, ledger } })
    }
}

/// A TAP's descriptor, or a stream.
#[derive(FromPyObject)]
pub enum Host<'py> {
    Tap(RawFd),
    Stream(PyRef<'py, FrameStream>),
}

impl Host<'_> {
    fn inner(&self) -> HostSide {
        match self {
            Self::Tap(fd) => HostSide::Tap(*fd),
            Self::Stream(stream) => HostSide::Stream(Arc::clone(&stream.inner)),
        }
    }
}

/// One queue pair of a NIC and its thread, which runs without the GIL.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct QueuePair {
    inner: dataplane::queue_pair::QueuePair,
}

fn refused(error: Error) -> PyErr {
    match error {
        Error::Invalid(reason) => PyValueError::new_err(reason),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}

fn pair(positions: Positions) -> (Option<u16>, Option<u16>) {
    (positions.rx, positions.tx)
}

#[pymethods]
impl QueuePair {
    #[new]
    fn new(name: &str, event_fd: RawFd) -> PyResult<Self> {
        dataplane::queue_pair::QueuePair::new(name, event_fd)
            .map(|inner| Self { inner })
            .map_err(|error| PyOSError::new_err((error.raw_os_error(), error.to_string())))
    }

    #[pyo3(signature = (*, memory, host, header_length, frame_length_max, offloads, event_index, indirect, mergeable,
                        rx, tx, packed=false))]
    #[allow(clippy::too_many_arguments)] // keyword-only in Python
    fn configure(
        &self,
        py: Python<'_>,
        memory: &GuestMemory,
        host: Host<'_>,
        header_length: usize,
        frame_length_max: u32,
        offloads: u8,
        event_index: bool,
        indirect: bool,
        mergeable: bool,
        rx: Option<&Ring>,
        tx: Option<&Ring>,
        packed: bool,
    ) -> PyResult<()> {
        let config = Config {
            memory: Arc::clone(&memory.inner),
            host: host.inner(),
            header_length,
            frame_length_max: frame_length_max as usize,
            offloads: Offloads(offloads),
            format: if packed { Format::Packed } else { Format::Split },
            features: Features { event_index, indirect },
            mergeable,
            rx: rx.map(|ring| ring.spec.clone()),
            tx: tx.map(|ring| ring.spec.clone()),
        };
        py.detach(|| self.inner.configure(&config)).map_err(refused)
    }

    fn set_positions(&self, rx_next_avail: Option<u16>, tx_next_avail: Option<u16>) -> PyResult<()> {
        self.inner.set_positions(rx_next_avail, tx_next_avail).map_err(refused)
    }

    fn start(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.inner.start()).map_err(refused)
    }

    fn stop(&self, py: Python<'_>) -> (Option<u16>, Option<u16>) {
        pair(py.detach(|| self.inner.stop()))
    }

    fn positions(&self) -> (Option<u16>, Option<u16>) {
        pair(self.inner.positions())
    }

    fn failed(&self) -> (bool, bool) {
        self.inner.failed()
    }

    fn interface_gone(&self) -> bool {
        self.inner.interface_gone()
    }

    fn reserve_waiting(&self, position: Option<u16>) -> PyResult<()> {
        self.inner.reserve_waiting(position).map_err(refused)
    }

    fn refuse_waiting(&self, position: u16) -> PyResult<()> {
        self.inner.refuse_waiting(position).map_err(refused)
    }

    fn is_running(&self) -> bool {
        self.inner.is_running()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.inner.counters().values())
    }

    fn set_counters(&self, counters: [u64; Counters::NAMES.len()]) -> PyResult<()> {
        self.inner.set_counters(&Counters::from_values(counters)).map_err(refused)
    }

    fn take_ring_errors(&self) -> Vec<(String, String)> {
        self.inner.take_ring_errors().into_iter().map(|(side, reason)| (side.to_string(), reason)).collect()
    }

    fn take_corrections(&self) -> Vec<(String, u16, u16)> {
        let corrections = self.inner.take_corrections().into_iter();
        corrections
            .map(|correction| (correction.side.to_string(), correction.told, correction.begun))
            .collect()
    }

    #[pyo3(signature = (direction, *, call_fd, error_fd))]
    fn set_notifiers(
        &self,
        py: Python<'_>,
        direction: &str,
        call_fd: Option<RawFd>,
        error_fd: Option<RawFd>,
    ) -> PyResult<()> {
        let side = match direction {
            "rx" => Side::Rx,
            "tx" => Side::Tx,
            _ => return Err(PyValueError::new_err(format!("a ring is rx or tx, not {direction}"))),
        };
        py.detach(|| self.inner.set_notifiers(side, call_fd, error_fd)).map_err(refused)
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| self.inner.release());
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

fn lent(pairs: &[Py<QueuePair>]) -> Vec<&dataplane::queue_pair::QueuePair> {
    pairs.iter().map(|pair| &pair.get().inner).collect()
}

/// Starts every pair that is configured and stands still.
#[pyfunction]
pub fn start_all(py: Python<'_>, pairs: Vec<Py<QueuePair>>) -> Vec<Option<u64>> {
    let pairs = lent(&pairs);
    py.detach(|| dataplane::queue_pair::start_all(&pairs))
}

/// Lets every configured pair go on with other memory where its rings are in the same place there; gives which did.
#[pyfunction]
pub fn swap_memory(py: Python<'_>, pairs: Vec<Py<QueuePair>>, memory: &GuestMemory) -> Vec<bool> {
    let pairs = lent(&pairs);
    py.detach(|| dataplane::queue_pair::swap_memory(&pairs, &memory.inner))
}

/// Stops every pair; gives which of them ran.
#[pyfunction]
pub fn stop_all(py: Python<'_>, pairs: Vec<Py<QueuePair>>) -> Vec<bool> {
    let pairs = lent(&pairs);
    py.detach(|| dataplane::queue_pair::stop_all(&pairs))
}

/// A column of positions, one of the other side's, and a column for each counter.
type Columns = (Vec<u16>, Vec<u16>, Vec<Vec<u64>>);

/// Positions and counters of all pairs, a column each.
#[pyfunction]
pub fn save_all(pairs: Vec<Py<QueuePair>>) -> Columns {
    let pairs = lent(&pairs);
    let positions: Vec<_> = pairs.iter().map(|pair| pair.positions()).collect();
    let counters: Vec<_> = pairs.iter().map(|pair| pair.counters().values()).collect();
    let columns = counters.first().map_or(0, |first| first.len());
    (
        positions.iter().map(|positions| positions.rx.unwrap_or(0)).collect(),
        positions.iter().map(|positions| positions.tx.unwrap_or(0)).collect(),
        (0..columns).map(|column| counters.iter().map(|counters| counters[column]).collect()).collect(),
    )
}

/// Whether the rings of each pair can go on where the columns say.
#[pyfunction]
pub fn check_positions(pairs: Vec<Py<QueuePair>>, rx: Vec<u16>, tx: Vec<u16>) -> PyResult<()> {
    for (index, (pair, (rx, tx))) in lent(&pairs).into_iter().zip(rx.into_iter().zip(tx)).enumerate() {
        pair.check_positions(rx, tx).map_err(|error| match error {
            Error::Invalid(reason) => PyValueError::new_err(format!("queue pair {index}: {reason}")),
            error => refused(error),
        })?;
    }
    Ok(())
}

/// The other way round, for pairs that stand still.
#[pyfunction]
pub fn load_all(pairs: Vec<Py<QueuePair>>, columns: Columns) -> PyResult<()> {
    let (rx, tx, counters) = columns;
    let is_full = |length| length == pairs.len();
    if !is_full(rx.len()) || !is_full(tx.len()) || !counters.iter().all(|column| is_full(column.len())) {
        return Err(PyValueError::new_err(format!("a column has not {} values", pairs.len())));
    }
    let counters: [Vec<u64>; Counters::NAMES.len()] =
        counters.try_into().map_err(|_| PyValueError::new_err("there is a column for each counter"))?;
    for (index, pair) in lent(&pairs).into_iter().enumerate() {
        let values = std::array::from_fn(|column| counters[column][index]);
        pair.set_counters(&Counters::from_values(values)).map_err(refused)?;
        match pair.set_positions(Some(rx[index]), Some(tx[index])) {
            Ok(()) | Err(Error::NotConfigured) => {}
            Err(error) => return Err(refused(error)),
        }
    }
    Ok(())
}

/// What stands in a column of failed rings.
const RX_FAILED: u8 = 1;
const TX_FAILED: u8 = 2;

/// Which rings of each pair failed.
#[pyfunction]
pub fn failed_rings(pairs: Vec<Py<QueuePair>>) -> Vec<u8> {
    let failed = |pair: &dataplane::queue_pair::QueuePair| {
        let (rx, tx) = pair.failed();
        (u8::from(rx) * RX_FAILED) | (u8::from(tx) * TX_FAILED)
    };
    lent(&pairs).into_iter().map(failed).collect()
}

/// The other way round, for pairs that stand still.
#[pyfunction]
pub fn fail_rings(pairs: Vec<Py<QueuePair>>, failed: Vec<u8>) -> PyResult<()> {
    let pairs = lent(&pairs);
    if failed.len() != pairs.len() {
        return Err(PyValueError::new_err(format!("the column has not {} values", pairs.len())));
    }
    for (pair, failed) in pairs.into_iter().zip(failed) {
        for (side, bit) in [(Side::Rx, RX_FAILED), (Side::Tx, TX_FAILED)] {
            match if failed & bit == 0 { Ok(()) } else { pair.set_failed(side) } {
                Ok(()) | Err(Error::NotConfigured) => {}
                Err(error) => return Err(refused(error)),
            }
        }
    }
    Ok(())
}

/// Bytes of a file for each pair: the longest frame, in whole pages.
const WAITING_STRIDE: u64 = FRAME_SIZE_MAX.next_multiple_of(4096) as u64;

/// Lends a descriptor as a file.
fn file(fd: RawFd) -> ManuallyDrop<File> {
    // SAFETY: the caller keeps it open during the call, and nobody closes it here.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

/// Writes the frame that waits in each pair that stands still into a file; a column of their lengths.
#[pyfunction]
pub fn save_waiting(pairs: Vec<Py<QueuePair>>, fd: RawFd) -> PyResult<Vec<u32>> {
    let save = |(index, pair): (usize, &dataplane::queue_pair::QueuePair)| -> PyResult<u32> {
        let Some(frame) = pair.waiting_frame() else { return Ok(0) };
        file(fd).write_all_at(&frame, WAITING_STRIDE * index as u64)?;
        Ok(u32::try_from(frame.len()).expect("no frame is so long"))
    };
    lent(&pairs).into_iter().enumerate().map(save).collect()
}

/// The other way round, for pairs that stand still.
#[pyfunction]
pub fn load_waiting(pairs: Vec<Py<QueuePair>>, fd: RawFd, lengths: Vec<u32>) -> PyResult<()> {
    let pairs = lent(&pairs);
    if lengths.len() != pairs.len() {
        return Err(PyValueError::new_err(format!("the column has not {} values", pairs.len())));
    }
    for (index, (pair, length)) in
        pairs.into_iter().zip(lengths).enumerate().filter(|(_, (_, length))| *length > 0)
    {
        let mut frame = vec![0; (length as usize).min(FRAME_SIZE_MAX + 1)];
        file(fd).read_exact_at(&mut frame, WAITING_STRIDE * index as u64)?;
        pair.set_waiting_frame(&frame).map_err(refused)?;
    }
    Ok(())
}

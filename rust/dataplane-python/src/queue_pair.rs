//! Binding of the queue pair and its rings.

use std::os::fd::RawFd;
use std::sync::Arc;

use dataplane::chain::{Features, Layout};
use dataplane::queue_pair::Error;
use dataplane::{Config, Counters, Format, HostSide, Offloads, Positions, RingSpec, Side};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::ledger::{InFlight, Ledger};
use crate::log::{ring_log, LogOf};
use crate::memory::GuestMemory;
use crate::stream::FrameStream;

/// Where one virtqueue is.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct Ring {
    pub spec: RingSpec,
}

#[pymethods]
impl Ring {
    #[new]
    #[pyo3(signature = (*, size, descriptor_area, driver_area, device_area, kick_fd, call_fd, error_fd, next_avail,
                        ledger=None, in_flight=None, log=None))]
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
        in_flight: Option<(PyRef<'_, InFlight>, usize)>,
        log: LogOf<'_>,
    ) -> PyResult<Self> {
        let layout = Layout { size, descriptor_area, driver_area, device_area };
        let ledger = ledger.map(|(ledger, ring)| ledger.slot(ring)).transpose()?;
        let in_flight = in_flight.map(|(in_flight, ring)| in_flight.slot(ring)).transpose()?;
        let log = ring_log(log);
        Ok(Self { spec: RingSpec { layout, kick_fd, call_fd, error_fd, next_avail, ledger, in_flight, log } })
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

pub(crate) fn refused(error: Error) -> PyErr {
    match error {
        Error::Invalid(refusal) => PyValueError::new_err(refusal.to_string()),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}

impl QueuePair {
    pub(crate) fn inner(&self) -> &dataplane::queue_pair::QueuePair {
        &self.inner
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
        let side = side(direction)?;
        py.detach(|| self.inner.set_notifiers(side, call_fd, error_fd)).map_err(refused)
    }

    fn set_log(&self, py: Python<'_>, direction: &str, log: LogOf<'_>) -> PyResult<()> {
        let (side, log) = (side(direction)?, ring_log(log));
        py.detach(|| self.inner.set_log(side, log));
        Ok(())
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| self.inner.release());
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

fn side(direction: &str) -> PyResult<Side> {
    match direction {
        "rx" => Ok(Side::Rx),
        "tx" => Ok(Side::Tx),
        _ => Err(PyValueError::new_err(format!("a ring is rx or tx, not {direction}"))),
    }
}

fn lent(pairs: &[Py<QueuePair>]) -> Vec<&dataplane::queue_pair::QueuePair> {
    pairs.iter().map(|pair| &pair.get().inner).collect()
}

/// Lets every configured pair go on with other memory where its rings are in the same place there; gives which did.
#[pyfunction]
pub fn swap_memory(py: Python<'_>, pairs: Vec<Py<QueuePair>>, memory: &GuestMemory) -> Vec<bool> {
    let pairs = lent(&pairs);
    py.detach(|| dataplane::queue_pair::swap_memory(&pairs, &memory.inner))
}

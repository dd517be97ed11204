//! Binding of rings whose chains Python answers.

use std::os::fd::RawFd;
use std::sync::Arc;

use dataplane::callback::{CallbackConfig, Completed, Error, HandedOut};
use dataplane::chain::Features;
use dataplane::{CallbackCounters, Format};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::log::{ring_log, LogOf};
use crate::memory::GuestMemory;
use crate::queue_pair::Ring;

/// A chain that a device took.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct Chain {
    inner: HandedOut,
    #[pyo3(get)]
    readable: Py<PyBytes>,
}

#[pymethods]
impl Chain {
    #[getter]
    fn ring(&self) -> usize {
        self.inner.ring
    }

    #[getter]
    fn head(&self) -> u16 {
        self.inner.head
    }

    #[getter]
    fn writable(&self) -> usize {
        self.inner.writable
    }

    #[getter]
    fn was_taken(&self) -> bool {
        self.inner.was_taken
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let HandedOut { ring, head, writable, .. } = self.inner;
        let readable = self.readable.bind(py).as_bytes().len();
        Ok(format!(
            "<chain at descriptor {head} of ring {ring}: {readable} bytes to read, {writable} to write>"
        ))
    }
}

/// The rings of one device whose chains Python answers.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct CallbackQueues {
    inner: dataplane::callback::CallbackQueues,
}

pub(crate) fn refused(error: Error) -> PyErr {
    match error {
        Error::Invalid(_) | Error::CompletedTwice { .. } => PyValueError::new_err(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}

impl CallbackQueues {
    pub(crate) fn inner(&self) -> &dataplane::callback::CallbackQueues {
        &self.inner
    }
}

#[pymethods]
impl CallbackQueues {
    #[new]
    fn new(ring_count: usize, event_fd: RawFd) -> Self {
        Self { inner: dataplane::callback::CallbackQueues::new(ring_count, event_fd) }
    }

    #[pyo3(signature = (*, memory, rings, event_index, indirect, packed=false))]
    fn configure(
        &self,
        py: Python<'_>,
        memory: &GuestMemory,
        rings: Vec<Option<Py<Ring>>>,
        event_index: bool,
        indirect: bool,
        packed: bool,
    ) -> PyResult<()> {
        let config = CallbackConfig {
            memory: Arc::clone(&memory.inner),
            format: if packed { Format::Packed } else { Format::Split },
            features: Features { event_index, indirect },
            rings: rings.iter().map(|ring| Some(ring.as_ref()?.get().spec.clone())).collect(),
        };
        py.detach(|| self.inner.configure(&config)).map_err(refused)
    }

    fn set_positions(&self, py: Python<'_>, positions: Vec<Option<u16>>) -> PyResult<()> {
        py.detach(|| self.inner.set_positions(&positions)).map_err(refused)
    }

    fn check_positions(&self, py: Python<'_>, positions: Vec<u16>) -> PyResult<()> {
        py.detach(|| self.inner.check_positions(&positions)).map_err(refused)
    }

    fn start(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.inner.start()).map_err(refused)
    }

    fn stop(&self, py: Python<'_>) -> Vec<Option<u16>> {
        py.detach(|| self.inner.stop())
    }

    fn give_back(&self, py: Python<'_>, ring: usize) -> PyResult<usize> {
        py.detach(|| self.inner.give_back(ring)).map_err(refused)
    }

    fn positions(&self, py: Python<'_>) -> Vec<Option<u16>> {
        py.detach(|| self.inner.positions())
    }

    fn is_running(&self, py: Python<'_>) -> bool {
        py.detach(|| self.inner.is_running())
    }

    fn failed(&self, py: Python<'_>) -> Vec<bool> {
        py.detach(|| self.inner.failed())
    }

    fn fail(&self, py: Python<'_>, ring: usize, reason: &str) -> PyResult<()> {
        py.detach(|| self.inner.fail(ring, reason)).map_err(refused)
    }

    fn set_failed(&self, py: Python<'_>, ring: usize) -> PyResult<()> {
        py.detach(|| self.inner.set_failed(ring)).map_err(refused)
    }

    fn take_ring_errors(&self, py: Python<'_>) -> Vec<(usize, String)> {
        py.detach(|| self.inner.take_ring_errors())
    }

    fn take_corrections(&self, py: Python<'_>) -> Vec<(usize, u16, u16)> {
        let corrections = py.detach(|| self.inner.take_corrections());
        corrections
            .into_iter()
            .map(|correction| (correction.ring, correction.told, correction.begun))
            .collect()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let counters = py.detach(|| self.inner.counters());
        counters.iter().map(|counters| PyTuple::new(py, counters.values())).collect()
    }

    fn set_counters(
        &self,
        py: Python<'_>,
        counters: Vec<[u64; CallbackCounters::NAMES.len()]>,
    ) -> PyResult<()> {
        let counters: Vec<_> = counters.into_iter().map(CallbackCounters::from_values).collect();
        py.detach(|| self.inner.set_counters(&counters)).map_err(refused)
    }

    #[pyo3(signature = (ring, *, call_fd, error_fd))]
    fn set_notifiers(
        &self,
        py: Python<'_>,
        ring: usize,
        call_fd: Option<RawFd>,
        error_fd: Option<RawFd>,
    ) -> PyResult<()> {
        py.detach(|| self.inner.set_notifiers(ring, call_fd, error_fd)).map_err(refused)
    }

    fn set_log(&self, py: Python<'_>, ring: usize, log: LogOf<'_>) {
        let log = ring_log(log);
        py.detach(|| self.inner.set_log(ring, log));
    }

    fn swap_memory(&self, py: Python<'_>, memory: &GuestMemory) -> bool {
        py.detach(|| self.inner.swap_memory(&memory.inner))
    }

    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        py.detach(|| self.inner.fd())
            .map_err(|error| PyOSError::new_err((error.raw_os_error(), error.to_string())))?
            .ok_or_else(|| refused(Error::Closed))
    }

    fn take(&self, py: Python<'_>) -> Option<Chain> {
        let mut inner = py.detach(|| self.inner.take())?;
        let readable = PyBytes::new(py, &std::mem::take(&mut inner.readable)).unbind();
        Some(Chain { inner, readable })
    }

    fn complete(&self, py: Python<'_>, chain: &Chain, data: &[u8]) -> PyResult<bool> {
        let completed = py.detach(|| self.inner.complete(&chain.inner, data)).map_err(refused)?;
        Ok(completed != Completed::TooLate)
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| self.inner.release());
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

//! Binding of the files that outlive whoever runs rings: the ledger of packed ones, the chains in flight of others.

use std::os::fd::{IntoRawFd, RawFd};
use std::sync::Arc;

use dataplane::ledger::Slot;
use dataplane::packed::Position;
use dataplane::word_file::WordFileError;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

/// Where packed rings stand, in memory that a successor shares.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct Ledger {
    inner: Arc<dataplane::ledger::Ledger>,
}

impl Ledger {
    pub fn slot(&self, ring: usize) -> PyResult<Slot> {
        self.inner.slot(ring).ok_or_else(|| PyValueError::new_err(format!("the ledger has no ring {ring}")))
    }
}

fn refused(error: WordFileError) -> PyErr {
    let text = error.to_string();
    match error {
        WordFileError::System(_, error) => PyOSError::new_err((error.raw_os_error(), text)),
        WordFileError::Invalid(_) => PyValueError::new_err(text),
    }
}

#[pymethods]
impl Ledger {
    #[new]
    fn new(fd: RawFd, ring_count: usize) -> PyResult<Self> {
        Ok(Self { inner: dataplane::ledger::Ledger::map(fd, ring_count).map_err(refused)? })
    }

    /// A new file for a ledger.
    #[staticmethod]
    fn create(ring_count: usize) -> PyResult<RawFd> {
        Ok(dataplane::ledger::Ledger::create(ring_count).map_err(refused)?.into_raw_fd())
    }

    /// A ring that does not run goes on at `position`.
    fn settle(&self, ring: usize, position: u16) -> PyResult<()> {
        self.slot(ring)?.settle(Position::from_bits(position));
        Ok(())
    }
}

/// Which chains of split rings are in flight, in memory that a successor shares.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct InFlight {
    inner: Arc<dataplane::in_flight::InFlight>,
}

impl InFlight {
    pub fn slot(&self, ring: usize) -> PyResult<dataplane::in_flight::Slot> {
        self.inner.slot(ring).ok_or_else(|| no_ring(ring))
    }
}

fn no_ring(ring: usize) -> PyErr {
    PyValueError::new_err(format!("the in-flight file has no ring {ring}"))
}

#[pymethods]
impl InFlight {
    #[new]
    fn new(fd: RawFd, ring_count: usize) -> PyResult<Self> {
        Ok(Self { inner: dataplane::in_flight::InFlight::map(fd, ring_count).map_err(refused)? })
    }

    /// A new file.
    #[staticmethod]
    fn create(ring_count: usize) -> PyResult<RawFd> {
        Ok(dataplane::in_flight::InFlight::create(ring_count).map_err(refused)?.into_raw_fd())
    }

    /// Nothing of a ring is in flight any more.
    fn forget(&self, ring: usize) -> PyResult<()> {
        if self.inner.forget(ring) {
            return Ok(());
        }
        Err(no_ring(ring))
    }
}

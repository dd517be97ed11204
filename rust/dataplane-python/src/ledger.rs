//! Binding of the ledger of packed rings.

use std::os::fd::{IntoRawFd, RawFd};
use std::sync::Arc;

use dataplane::ledger::{LedgerError, Slot};
use dataplane::packed::Position;
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

fn refused(error: LedgerError) -> PyErr {
    match error {
        LedgerError::System(error) => PyOSError::new_err((error.raw_os_error(), error.to_string())),
        error => PyValueError::new_err(error.to_string()),
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

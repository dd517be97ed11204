//! Binding of the dirty log.

use std::os::fd::RawFd;
use std::sync::Arc;

use dataplane::log::RingLog;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

/// Which pages of guest memory were written, in a file that a frontend reads.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct DirtyLog {
    inner: Arc<dataplane::log::DirtyLog>,
}

/// A log, and where writes to the ring itself are logged.
pub type LogOf<'py> = Option<(PyRef<'py, DirtyLog>, Option<u64>)>;

pub fn ring_log(log: LogOf<'_>) -> Option<RingLog> {
    log.map(|(log, device_area)| RingLog { log: Arc::clone(&log.inner), device_area })
}

#[pymethods]
impl DirtyLog {
    #[new]
    fn new(size: u64, mmap_offset: u64, fd: RawFd) -> Self {
        Self { inner: Arc::new(dataplane::log::DirtyLog::new(size, mmap_offset, fd)) }
    }

    /// Maps the log of a frontend that another process served.
    #[staticmethod]
    fn adopt(size: u64, mmap_offset: u64, fd: RawFd) -> PyResult<Self> {
        dataplane::log::DirtyLog::adopt(size, mmap_offset, fd)
            .map(|inner| Self { inner: Arc::new(inner) })
            .map_err(|error| PyOSError::new_err((error.raw_os_error(), error.to_string())))
    }

    /// Why no ring can run with it.
    fn reason(&self) -> Option<String> {
        self.inner.reason()
    }
}

//! Binding of guest memory.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use dataplane::memory::{AccessError, MemoryError, RegionSpec};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Guest memory, mapped shared and writable into this process.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct GuestMemory {
    pub inner: Arc<dataplane::memory::GuestMemory>,
}

fn refused(error: AccessError, guest_address: u64, size: usize) -> PyErr {
    match error {
        AccessError::Outside => PyValueError::new_err(format!(
            "{size:#x} bytes at {guest_address:#x} are not inside guest memory"
        )),
        AccessError::Lost(lost) => PyOSError::new_err((EFAULT, lost.to_string())),
    }
}

/// errno of an access to memory that is not there. Linux has one number for it everywhere.
const EFAULT: i32 = 14;

type Regions = Vec<(u64, u64, u64, u64, RawFd)>;

fn mapped(
    py: Python<'_>,
    regions: Regions,
    map: impl FnOnce(&[RegionSpec]) -> Result<dataplane::memory::GuestMemory, MemoryError> + Send,
) -> PyResult<GuestMemory> {
    let specs: Vec<_> = regions
        .into_iter()
        .map(|(guest_address, size, user_address, mmap_offset, fd)| RegionSpec {
            guest_address,
            size,
            user_address,
            mmap_offset,
            fd,
        })
        .collect();
    match py.detach(|| map(&specs)) {
        Ok(inner) => Ok(GuestMemory { inner: Arc::new(inner) }),
        Err(MemoryError::Invalid(reason)) => Err(PyValueError::new_err(reason)),
        Err(MemoryError::System(error)) => Err(PyOSError::new_err((error.raw_os_error(), error.to_string()))),
    }
}

#[pymethods]
impl GuestMemory {
    #[new]
    #[pyo3(signature = (regions, previous=None))]
    fn new(py: Python<'_>, regions: Regions, previous: Option<&Self>) -> PyResult<Self> {
        match previous {
            None => mapped(py, regions, dataplane::memory::GuestMemory::new),
            Some(previous) => mapped(py, regions, |specs| previous.inner.next(specs)),
        }
    }

    /// Maps what another process had mapped.
    #[staticmethod]
    #[pyo3(signature = (regions, previous=None))]
    fn adopt(py: Python<'_>, regions: Regions, previous: Option<&Self>) -> PyResult<Self> {
        match previous {
            None => mapped(py, regions, dataplane::memory::GuestMemory::adopt),
            Some(previous) => mapped(py, regions, |specs| previous.inner.adopt_next(specs)),
        }
    }

    /// Maps the pages that already exist; gives the number of bytes.
    fn populate(&self, py: Python<'_>, seconds_max: f64) -> PyResult<u64> {
        let time = Duration::try_from_secs_f64(seconds_max)
            .map_err(|error| PyValueError::new_err(format!("{seconds_max} seconds: {error}")))?;
        Ok(py.detach(|| self.inner.populate(time)))
    }

    /// Copies `size` bytes out.
    fn read<'py>(&self, py: Python<'py>, guest_address: u64, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, size, |data| {
            self.inner.read(guest_address, data).map_err(|error| refused(error, guest_address, size))
        })
    }

    /// Copies `data` in.
    fn write(&self, guest_address: u64, data: &[u8]) -> PyResult<()> {
        self.inner.write(guest_address, data).map_err(|error| refused(error, guest_address, data.len()))
    }
}

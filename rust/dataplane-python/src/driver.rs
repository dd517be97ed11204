//! Binding of the guest's side of a queue pair.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use driver::{DriverConfig, Error, RingAddresses};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::memory::GuestMemory;

/// (descriptor table, avail ring, used ring), guest addresses.
type Addresses = (u64, u64, u64);

fn addresses(ring: RingAddresses) -> Addresses {
    (ring.descriptor_area, ring.driver_area, ring.device_area)
}

fn refused(error: &Error) -> PyErr {
    match error {
        Error::Invalid(reason) => PyValueError::new_err(reason.clone()),
        Error::System { error: system, .. } => PyOSError::new_err((system.raw_os_error(), error.to_string())),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}

/// A virtio-net driver between its rings and a TAP.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct DriverPair {
    inner: Mutex<driver::DriverPair>,
}

impl DriverPair {
    fn lock(&self) -> MutexGuard<'_, driver::DriverPair> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl DriverPair {
    #[new]
    #[pyo3(signature = (*, name, memory, guest_address, queue_size, features,
                        rx_kick_fd, rx_call_fd, tx_kick_fd, tx_call_fd, tap_fd))]
    #[expect(clippy::too_many_arguments, reason = "named arguments on the Python side")]
    fn new(
        name: String,
        memory: &GuestMemory,
        guest_address: u64,
        queue_size: u16,
        features: u64,
        rx_kick_fd: RawFd,
        rx_call_fd: RawFd,
        tx_kick_fd: RawFd,
        tx_call_fd: RawFd,
        tap_fd: Option<RawFd>,
    ) -> PyResult<Self> {
        let config = DriverConfig {
            name,
            guest_address,
            queue_size,
            features,
            rx_kick: rx_kick_fd,
            rx_call: rx_call_fd,
            tx_kick: tx_kick_fd,
            tx_call: tx_call_fd,
            tap: tap_fd,
        };
        let pair = driver::DriverPair::new(Arc::clone(&memory.inner), config);
        Ok(Self { inner: Mutex::new(pair.map_err(|error| refused(&error))?) })
    }

    /// Bytes of guest memory that one pair uses.
    #[staticmethod]
    fn layout_size(queue_size: u16) -> u64 {
        driver::DriverPair::layout_size(queue_size)
    }

    /// Guest addresses of the rings, rx first.
    fn ring_addresses(&self) -> (Addresses, Addresses) {
        let (rx, tx) = self.lock().ring_addresses();
        (addresses(rx), addresses(tx))
    }

    /// Fills the receive ring and lets the thread pump.
    fn start(&self) -> PyResult<()> {
        Ok(self.lock().start()?)
    }

    /// Stops pumping and joins the thread.
    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.lock().stop());
    }

    /// What moved so far.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let pair = self.lock();
        match pair.failure() {
            None => PyTuple::new(py, pair.counters().values()),
            Some(error) => Err(PyRuntimeError::new_err(error.to_string())),
        }
    }
}

//! Binding of a stream of frames.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::prelude::*;

/// Frames on a connected socket, or on none, each with its length in front.
#[pyclass(frozen, module = "localmig.dataplane._dataplane")]
pub struct FrameStream {
    pub(crate) inner: Arc<dataplane::stream::Stream>,
}

#[pymethods]
impl FrameStream {
    #[new]
    #[pyo3(signature = (fd=None))]
    fn new(fd: Option<RawFd>) -> Self {
        Self { inner: Arc::new(dataplane::stream::Stream::new(fd)) }
    }

    fn ended(&self) -> Option<&str> {
        self.inner.ended()
    }

    fn end(&self, reason: String) {
        self.inner.end(reason);
    }

    fn inject(&self, py: Python<'_>, frame: &[u8]) -> PyResult<()> {
        Ok(py.detach(|| self.inner.inject(frame))?)
    }

    fn save(&self, py: Python<'_>, file: RawFd) -> PyResult<(usize, usize)> {
        Ok(py.detach(|| self.inner.save(file))?)
    }

    fn load(&self, py: Python<'_>, file: RawFd, read: usize, unsent: usize) -> PyResult<()> {
        Ok(py.detach(|| self.inner.load(file, read, unsent))?)
    }
}

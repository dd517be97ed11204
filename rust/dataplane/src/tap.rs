//! The TAP of a queue pair: what its errors mean, and when it is left alone.
//!
//! Owns:        the borrowed descriptor, whether its interface is gone.
//! Never sees:  rings; where frames come from and go to.
//! Read next:   `pump`, which reads and writes through this.
//!
//! An error is about one frame, unless the kernel confirms that there is no interface any more. A frame that could not be
//! read is gone; errors that go on for ever must cost no processor.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use crate::sys;

/// Reads that may fail one after the other before the TAP is left alone for a while: each took a frame, or none will help.
const READ_ERRORS_MAX: u32 = 64;

/// For how long: the same number of errors again costs less than a hundredth of a processor.
const PAUSE: Duration = Duration::from_millis(10);

/// What a read gave: bytes, and whether there may have been more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read {
    pub(crate) length: u64,
    pub(crate) is_cut: bool,
}

/// Why there is no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoFrame {
    /// None now: the descriptor tells when.
    Empty,
    /// The kernel gave one up: it cannot say how it is segmented, or has no memory.
    Dropped,
    /// The buffers are not there.
    Fault,
    /// There will be none.
    Gone,
}

#[derive(Debug)]
pub(crate) struct Tap {
    fd: RawFd,
    is_gone: bool,
    read_errors: u32,
    pause_ends: Option<Instant>,
}

impl Tap {
    pub(crate) fn new(fd: RawFd) -> Self {
        Self { fd, is_gone: false, read_errors: 0, pause_ends: None }
    }

    /// Whether its interface is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone
    }

    /// Reads a frame by `read`.
    #[inline]
    pub(crate) fn read(&mut self, read: impl FnOnce(RawFd) -> io::Result<Read>) -> Result<Read, NoFrame> {
        if self.is_gone {
            return Err(NoFrame::Gone);
        }
        if self.pause().is_some() {
            return Err(NoFrame::Empty);
        }
        match read(self.fd) {
            Ok(read) if read.length > 0 => {
                self.read_errors = 0;
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(NoFrame::Empty),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Err(NoFrame::Fault),
            Err(error) if !means_gone(&error) => {
                self.read_errors += 1;
                if self.read_errors >= READ_ERRORS_MAX {
                    self.begin_pause();
                }
                Err(NoFrame::Dropped)
            }
            // An error that a TAP without an interface has; or the end of a file, which no TAP has.
            _ => {
                self.look_for_interface();
                Err(if self.is_gone { NoFrame::Gone } else { NoFrame::Empty })
            }
        }
    }

    /// Writes a frame.
    ///
    /// # Errors
    /// As writev(2).
    ///
    /// # Safety
    /// As `sys::writev`.
    #[inline]
    pub(crate) unsafe fn write(&mut self, buffers: &[libc::iovec]) -> io::Result<u64> {
        if self.is_gone {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        // SAFETY: the caller's.
        unsafe { sys::writev(self.fd, buffers) }.inspect_err(|error| {
            self.is_gone = means_gone(error) && sys::interface_is_gone(self.fd);
        })
    }

    /// Something looks as if the interface were gone. If the kernel knows it still, the TAP is left alone for a while.
    #[cold]
    pub(crate) fn look_for_interface(&mut self) {
        self.is_gone = sys::interface_is_gone(self.fd);
        self.begin_pause();
    }

    fn begin_pause(&mut self) {
        self.read_errors = 0;
        self.pause_ends = Some(Instant::now() + PAUSE);
    }

    /// How much longer it is left alone; None if it is not.
    #[inline]
    pub(crate) fn pause(&mut self) -> Option<Duration> {
        let left = self.pause_ends?.checked_duration_since(Instant::now());
        if left.is_none() {
            self.pause_ends = None;
        }
        left
    }

    /// What to sleep on: that it goes away is told also if nothing is asked of it.
    pub(crate) fn watch(&mut self, events: libc::c_short) -> libc::pollfd {
        let is_left_alone = self.is_gone || self.pause().is_some();
        libc::pollfd { fd: if is_left_alone { -1 } else { self.fd }, events, revents: 0 }
    }
}

/// Whether a TAP may have failed so because its interface is gone.
fn means_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::ENXIO))
}

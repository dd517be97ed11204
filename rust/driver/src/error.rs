//! Why a driver cannot begin, or why it stopped.
//!
//! Owns:        the kinds of errors, and the text of each.

use std::fmt;
use std::io;

/// Why a driver cannot begin, or why it stopped.
#[derive(Debug)]
pub enum Error {
    /// What was asked for cannot be. Nothing was written.
    Invalid(String),
    /// The device broke a ring.
    Device(String),
    /// The guest's own TAP is gone, or is none.
    Tap(String),
    /// The kernel refused.
    System { what: &'static str, error: io::Error },
    /// The driver's thread panicked, and the driver went with it.
    Panicked,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(reason) | Self::Device(reason) | Self::Tap(reason) => f.write_str(reason),
            Self::System { what, error } => write!(f, "{what}: {error}"),
            Self::Panicked => f.write_str("the driver's thread panicked"),
        }
    }
}

impl std::error::Error for Error {}

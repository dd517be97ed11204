//! The other side of a queue pair: a virtio-net driver, the guest's part, between its rings and a TAP.
//!
//! Owns:        two rings laid into guest memory, their buffers, the thread that pumps.
//! Never sees:  vhost-user, or the backend's rings and threads: it meets the device in guest memory alone. Of the packet
//!              path's crate it uses mappings of guest memory and system calls on eventfds.
//! Read next:   `pair`, a driver with its thread; `pump`, which moves frames; `ring`, with `split` and `packed`.
//!
//! For the demonstration, the testing kit and benchmarks. It loses no packet of its own: the TAP is read only while the
//! transmit ring has room, a frame the TAP does not take yet stays in its buffers. And it is a witness: a device that
//! answers what it was not asked (two processes serving one ring do) stops it with a reason.

mod counters;
mod error;
mod packed;
mod pair;
mod pump;
mod ring;
mod split;

pub use counters::DriverCounters;
pub use error::Error;
pub use pair::{DriverConfig, DriverPair, RingAddresses};

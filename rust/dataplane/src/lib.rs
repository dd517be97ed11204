//! The packet path: a vhost in miniature, without Python.
//!
//! Given guest memory, ring addresses, starting positions and descriptors it runs one thread a queue pair, which
//! moves packets between a TAP or a stream and the guest's rings; or it hands out the chains of other devices' rings, which somebody
//! else answers. `stop` gives the positions back.
//!
//! Owns:        guest memory as mapped here, rings, the queue pair's thread; which pages were written.
//! Never sees:  vhost-user, migration, Python.
//! Read next:   `memory`, `chain`, `split` and `packed` (one ring), `ledger`, `writer` and `log` (what is written to a
//!              guest), `pump` (packets through two rings), `queue_pair` (the thread); `in_flight`, `callback` (chains
//!              that are handed out). The guest's side is another crate, `localmig-driver`.

mod backing;
mod backlog;
mod bell;
pub mod callback;
pub mod chain;
mod counters;
mod fault;
pub mod in_flight;
pub mod ledger;
pub mod log;
pub mod memory;
pub mod packed;
mod pump;
pub mod queue_pair;
mod refusal;
mod ring;
pub mod split;
pub mod stream;
pub mod sys;
mod tap;
mod window;
pub mod word_file;
mod writer;

#[cfg(test)]
extern crate self as dataplane; // as `tests/common` calls it
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;

pub use backlog::FRAME_SIZE_MAX;
pub use counters::{CallbackCounters, Counters};
pub use pump::{Config, Correction, HostSide, Positions, RingSpec, Side};
pub use refusal::{Refusal, RefusalKind};
pub use ring::Format;
pub use window::Offloads;

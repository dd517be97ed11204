//! The Python face of the packet path: types and errors translated, nothing else.
//!
//! Owns:        argument conversion, which error becomes which exception, where the GIL is let go.
//! Never sees:  how anything works; that is `localmig-dataplane`, and `localmig-driver` for the guest's side.

use pyo3::prelude::*;
use pyo3::types::PyTuple;

mod callback;
mod driver;
mod engines;
mod ledger;
mod log;
mod memory;
mod queue_pair;
mod sandbox;
mod stream;

#[pymodule]
fn _dataplane(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("COUNTER_NAMES", PyTuple::new(module.py(), dataplane::Counters::NAMES)?)?;
    module.add("CALLBACK_COUNTER_NAMES", PyTuple::new(module.py(), dataplane::CallbackCounters::NAMES)?)?;
    module.add("CHAIN_DATA_SIZE_MAX", dataplane::callback::DATA_SIZE_MAX)?;
    module.add("FRAME_SIZE_MAX", dataplane::FRAME_SIZE_MAX)?;
    module.add("STREAM_IN_HAND_MAX", dataplane::stream::STREAM_IN_HAND_MAX)?;
    module.add("DRIVER_COUNTER_NAMES", PyTuple::new(module.py(), ::driver::DriverCounters::NAMES)?)?;
    module.add_class::<callback::CallbackQueues>()?;
    module.add_class::<callback::Chain>()?;
    module.add_class::<driver::DriverPair>()?;
    module.add_class::<log::DirtyLog>()?;
    module.add_class::<ledger::InFlight>()?;
    module.add_class::<ledger::Ledger>()?;
    module.add_class::<memory::GuestMemory>()?;
    module.add_class::<queue_pair::QueuePair>()?;
    module.add_class::<queue_pair::Ring>()?;
    module.add_class::<stream::FrameStream>()?;
    module.add_function(wrap_pyfunction!(queue_pair::swap_memory, module)?)?;
    module.add_function(wrap_pyfunction!(engines::check_positions, module)?)?;
    module.add_function(wrap_pyfunction!(engines::load_all, module)?)?;
    module.add_function(wrap_pyfunction!(engines::load_waiting, module)?)?;
    module.add_function(wrap_pyfunction!(engines::recover_all, module)?)?;
    module.add_function(wrap_pyfunction!(engines::save_all, module)?)?;
    module.add_function(wrap_pyfunction!(engines::save_waiting, module)?)?;
    module.add_function(wrap_pyfunction!(engines::start_all, module)?)?;
    module.add_function(wrap_pyfunction!(engines::stop_all, module)?)?;
    module.add_function(wrap_pyfunction!(sandbox::forbid_programs, module)?)?;
    module.add_function(wrap_pyfunction!(sandbox::forbid_unneeded, module)?)?;
    module.add_function(wrap_pyfunction!(sandbox::keep_capabilities, module)?)?;
    module.add_function(wrap_pyfunction!(sandbox::set_dumpable, module)?)
}

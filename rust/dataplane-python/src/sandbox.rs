//! What the process gives up: no part of the packet path, but of the same Rust core.

use ::sandbox::Forbidden;
use pyo3::prelude::*;

#[pyfunction]
pub fn forbid_unneeded() -> PyResult<()> {
    Ok(::sandbox::forbid(Forbidden::Unneeded)?)
}

#[pyfunction]
pub fn forbid_programs() -> PyResult<()> {
    Ok(::sandbox::forbid(Forbidden::Programs)?)
}

#[pyfunction]
pub fn keep_capabilities(names: Vec<String>) -> PyResult<()> {
    Ok(::sandbox::keep_capabilities(&names)?)
}

#[pyfunction]
pub fn set_dumpable() -> PyResult<()> {
    Ok(::sandbox::set_dumpable()?)
}

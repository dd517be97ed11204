//! What a process gives up for good: capabilities, and system calls that it never needs.
//!
//! Owns:        the two lists of calls, the order of giving up.
//! Never sees:  why a process may need more; what a daemon is.
//! Read next:   `calls.rs` for the lists.
//!
//! A list says what is forbidden, and not what is allowed: libraries learn new calls with every release, and a daemon
//! that cannot hand over because one of them did would be the greater evil. Forbidden is what nothing here has a use
//! for, and what a process that was taken over would want first. A forbidden call fails with EPERM; it kills nobody.
//!
//! The cost. Since Linux 5.11 the kernel finds out once, when a filter is installed, which calls it lets pass whatever
//! their arguments are, and runs no filter for those. All that moves packets is among them.

mod calls;

use std::collections::HashSet;
use std::io;
use std::str::FromStr;

use caps::{CapSet, Capability};
use seccompiler::{sock_filter, BpfProgram};

/// A part of what a process may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forbidden {
    /// What no daemon ever needs.
    Unneeded,
    /// To run another program, or to fork. Threads may be made.
    Programs,
}

/// Forbids system calls to every thread of this process, and to all that it will make or run.
///
/// # Errors
///
/// The kernel knows no filters (ENOSYS, EINVAL), or there is none for this processor (`Unsupported`). Nothing is
/// forbidden then.
pub fn forbid(what: Forbidden) -> io::Result<()> {
    install(&calls::filter(what)?)
}

/// Drops every capability but those named, those that a program could get included.
///
/// Only this thread's and those of threads that it will make: call it before there are others.
///
/// # Errors
///
/// A name is no capability's (`InvalidInput`), or the kernel refuses.
pub fn keep_capabilities(names: &[impl AsRef<str>]) -> io::Result<()> {
    let kept = names
        .iter()
        .map(|name| Capability::from_str(name.as_ref()))
        .collect::<Result<HashSet<_>, _>>()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
    // First, because it takes CAP_SETPCAP. Who has not that one cannot widen what it has either.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(refused)? {
        for capability in caps::runtime::thread_all_supported().difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(refused)?;
        }
    }
    let permitted = caps::read(None, CapSet::Permitted).map_err(refused)?;
    let left: HashSet<_> = permitted.intersection(&kept).copied().collect();
    caps::clear(None, CapSet::Inheritable).map_err(refused)?;
    caps::set(None, CapSet::Effective, &left).map_err(refused)?;
    caps::set(None, CapSet::Permitted, &left).map_err(refused)
}

/// Lets processes of the same user look into this one, as into any other of theirs.
///
/// The kernel forbids that to a process that changed its user, for the sake of what it may know from before.
pub fn set_dumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 1)
}

fn refused(error: caps::errors::CapsError) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, error.to_string())
}

fn install(program: &BpfProgram) -> io::Result<()> {
    // Without it a filter takes CAP_SYS_ADMIN: a set-user-ID program could be fooled by calls that fail.
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    let program = SockFprog {
        length: u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        filter: program.as_ptr(),
    };
    // Before Linux 5.16 a filter switches speculation off for the whole process, for the sake of programs that run
    // foreign code. This one runs none, and a packet would pay for it.
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: `program` describes a slice that outlives the call, in which the kernel only reads.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&program))
    };
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!("thread {thread} has a filter of its own"))),
    }
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    const NOTHING: libc::c_ulong = 0;
    // SAFETY: the options that this file passes take a number and touch no memory of ours.
    match unsafe { libc::prctl(option, value, NOTHING, NOTHING, NOTHING) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct sock_fprog` (linux/filter.h).
#[repr(C)]
struct SockFprog {
    length: u16,
    filter: *const sock_filter,
}

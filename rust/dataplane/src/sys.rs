//! The few system calls the packet path makes on borrowed descriptors.
//!
//! Owns:        eventfds as signal and as doorbell, the monotonic clock, vectored I/O.
//! Never sees:  what a descriptor stands for.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// Adds one to an eventfd: rings it. One that is full was rung already, so it is left alone.
///
/// A peer's eventfd may be in blocking mode and full, and O_NONBLOCK is not ours to set: so only a descriptor that can
/// take the write is written to. (Eventfds know no RWF_NOWAIT for writing.)
pub fn signal(fd: RawFd) {
    if polled(fd, libc::POLLOUT) & libc::POLLOUT != 0 {
        wake(fd);
    }
}

/// As `signal`, for an eventfd that nobody else can have made blocking: nothing needs to be asked first, so nothing can
/// come in between.
pub fn wake(fd: RawFd) {
    let one = 1u64;
    // SAFETY: `one` lives across the call and is 8 bytes long, as an eventfd wants.
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

/// Takes what an eventfd has counted: `Ok(true)` if it had been rung, never blocks.
///
/// Kernels that know no RWF_NOWAIT for eventfds (before 5.8) or pipes (before 6.5) are asked whether there is something to
/// read. Nothing better is left there: a peer that reads its own eventfd just between look and read makes us wait.
///
/// # Errors
/// The descriptor is no eventfd, or is closed.
pub fn drain(fd: RawFd) -> io::Result<bool> {
    let mut count = 0u64;
    let iovec = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 8 };
    // A peer's eventfd may be in blocking mode, and O_NONBLOCK is not ours to set: it belongs to the open file
    // description, which the peer shares. RWF_NOWAIT says the same for one call.
    // SAFETY: the iovec describes `count`, which lives across the call.
    let mut done = unsafe { libc::preadv2(fd, &raw const iovec, 1, -1, libc::RWF_NOWAIT) };
    if done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
        if polled(fd, libc::POLLIN) == 0 {
            return Ok(false);
        }
        // SAFETY: `count` is 8 bytes long and lives across the call.
        done = unsafe { libc::read(fd, (&raw mut count).cast(), 8) };
    }
    match done {
        8 => Ok(true),
        0.. => Err(io::Error::new(io::ErrorKind::InvalidData, "not an eventfd")),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
    }
}

/// What a descriptor polls as now: of `events`, and of errors.
fn polled(fd: RawFd, events: libc::c_short) -> libc::c_short {
    let mut target = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one valid pollfd; a timeout of 0 does not wait.
    unsafe { libc::poll(&raw mut target, 1, 0) };
    target.revents
}

/// Signals are for the threads that handle them; the calling one would only have its sleep cut short.
pub fn block_signals() {
    // SAFETY: the set is filled before it is used, and only this thread's mask changes.
    unsafe {
        let mut asynchronous: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut asynchronous);
        // What this thread itself causes: where it is blocked, the kernel ends the process without asking a handler.
        for signal in [libc::SIGBUS, libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS] {
            libc::sigdelset(&raw mut asynchronous, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const asynchronous, std::ptr::null_mut());
    }
}

/// CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Sleeps until something happens to one of `fds`, or for `longest`; a signal looks like nothing happened.
///
/// # Errors
/// As poll(2), which leaves a correct caller none but lack of memory; then nothing happened either.
pub fn poll(fds: &mut [libc::pollfd], longest: Option<Duration>) -> io::Result<()> {
    // Rounded up: who wakes too early would look in vain until the time has come.
    let timeout = longest.map_or(-1, |longest| libc::c_int::try_from(longest.as_millis() + 1).unwrap_or(-1));
    let count = libc::nfds_t::try_from(fds.len()).expect("a handful of descriptors");
    // SAFETY: the slice is valid for `count` entries.
    if unsafe { libc::poll(fds.as_mut_ptr(), count, timeout) } >= 0 {
        return Ok(());
    }
    fds.iter_mut().for_each(|fd| fd.revents = 0);
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

/// Whether a TAP has no interface any more: it was deleted, or its network namespace was. What is no TAP has none.
pub(crate) fn interface_is_gone(tap_fd: RawFd) -> bool {
    const TUNGETIFF: libc::Ioctl = 0x8004_54d2_u32 as libc::Ioctl; // linux/if_tun.h
                                                                   // SAFETY: an all-zero request is valid to be filled in, and is valid for writing.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        libc::ioctl(tap_fd, TUNGETIFF, &raw mut request) != 0
    }
}

/// Reads one frame into `buffers`, one after the other; gives its length.
///
/// # Errors
/// As readv(2), but never EINTR.
///
/// # Safety
/// Each buffer is mapped for the time of the call, and no reference leads into it.
#[inline]
pub(crate) unsafe fn readv(fd: RawFd, buffers: &[libc::iovec]) -> io::Result<u64> {
    // SAFETY: the caller's.
    unsafe { vectored(libc::SYS_read, libc::SYS_readv, fd, buffers) }
}

/// Writes one frame from `buffers`; gives its length.
///
/// # Errors
/// As writev(2), but never EINTR.
///
/// # Safety
/// Each buffer is mapped for the time of the call.
#[inline]
pub(crate) unsafe fn writev(fd: RawFd, buffers: &[libc::iovec]) -> io::Result<u64> {
    // SAFETY: the caller's.
    unsafe { vectored(libc::SYS_write, libc::SYS_writev, fd, buffers) }
}

/// Reads what a socket has, without waiting; gives how much, 0 at its end. Descriptors that a peer sends along are dropped.
///
/// # Errors
/// As recv(2), but never EINTR.
pub(crate) fn receive(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer is valid for writing during the call.
        let done = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
        match usize::try_from(done) {
            Ok(length) => return Ok(length),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Sends from `buffers` what a socket takes without waiting; gives how much.
///
/// # Errors
/// As sendmsg(2), but never EINTR.
///
/// # Safety
/// Each buffer is mapped for the time of the call.
pub(crate) unsafe fn send(fd: RawFd, buffers: &[libc::iovec]) -> io::Result<usize> {
    loop {
        // SAFETY: the message is zeros but for the buffers, which the caller answers for; they are only read.
        let done = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = buffers.as_ptr().cast_mut();
            message.msg_iovlen = buffers.len() as _;
            libc::sendmsg(fd, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        match usize::try_from(done) {
            Ok(length) => return Ok(length),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// One system call for each frame, and not by libc's functions of these names: those may be cancelled by
/// pthread_cancel(3), which nobody does here, and prepare for it each time, which costs a sixth of a small packet. The
/// kernel has less to do for one buffer where it is not given as a vector.
///
/// # Safety
/// As `readv` or `writev`.
#[inline]
unsafe fn vectored(
    single: libc::c_long,
    vector: libc::c_long,
    fd: RawFd,
    buffers: &[libc::iovec],
) -> io::Result<u64> {
    loop {
        // SAFETY: the caller's.
        let done = unsafe {
            match buffers {
                [buffer] => libc::syscall(single, fd, buffer.iov_base, buffer.iov_len),
                _ => libc::syscall(vector, fd, buffers.as_ptr(), buffers.len()),
            }
        };
        match u64::try_from(done) {
            Ok(length) => return Ok(length),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

//! Telling a peer: its call and error descriptors, which it may have made to hurt.
//!
//! Owns:        what such a descriptor may be, and how it is written to without ever waiting.
//! Never sees:  when somebody is to be told.
//! Read next:   `pump`, which rings these under the queue pair's lock.
//!
//! A write to an eventfd waits while its count is full, unless O_NONBLOCK is set. The count and the flag are the peer's as
//! much as ours: it may fill the one and clear the other between any look of ours and the write. Whoever waits there holds
//! the queue pair's lock, and with the next `stop` the event loop, and so every guest. The kernel's own vhost is safe from
//! that because it signals eventfds from inside. So do we, by an asynchronous operation (io_submit(2)) that is over at
//! once and names the eventfd as the one to be told of it. That costs a seventh of a microsecond more than to look and write.
//! The kernel may refuse the operation when it is short of memory. A lost call hangs a driver that uses the event index, so
//! the eventfd is then looked at and written to.
//!
//! A pipe may stand in for an eventfd, and is asked not to wait, for one write. User-Mode Linux is called through one end
//! of a pair of UNIX sockets, which are asked likewise.
//!
//! Anything else is refused when the ring is laid out: to poll or write to a file of a FUSE file system, for one, waits
//! for a server that may be the peer's.

use std::cell::UnsafeCell;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::backing::file_type;
use crate::refusal::{Refusal, RefusalKind};
use crate::sys;

/// A descriptor of a peer that says: look at the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bell {
    Eventfd(RawFd),
    Pipe(RawFd),
    Socket(RawFd),
}

impl Bell {
    /// Looks at what a borrowed descriptor is.
    ///
    /// # Errors
    /// It is neither eventfd nor pipe nor UNIX socket.
    pub(crate) fn of(fd: RawFd) -> Result<Self, Refusal> {
        let refused = |text| Refusal::new(RefusalKind::Descriptor, text);
        let kind = file_type(fd).map_err(|error| refused(format!("{fd} cannot be looked at: {error}")))?;
        match kind {
            libc::S_IFIFO => return Ok(Self::Pipe(fd)),
            libc::S_IFSOCK if domain(fd) == libc::AF_UNIX => return Ok(Self::Socket(fd)),
            _ => {}
        }
        match std::fs::read_link(format!("/proc/self/fd/{fd}")) {
            Ok(name) if name.as_os_str() == "anon_inode:[eventfd]" => Ok(Self::Eventfd(fd)),
            Ok(name) => {
                Err(refused(format!("is {}, must be an eventfd, a pipe or a UNIX socket", name.display())))
            }
            Err(error) => {
                Err(refused(format!("cannot be told from other descriptors without /proc: {error}")))
            }
        }
    }
}

/// Looks at what a peer is to ring for us: what it may be that can be read without ever waiting.
///
/// # Errors
/// It is neither eventfd nor pipe.
pub(crate) fn check_kick(fd: RawFd) -> Result<(), Refusal> {
    match Bell::of(fd)? {
        Bell::Eventfd(_) | Bell::Pipe(_) => Ok(()),
        Bell::Socket(_) => {
            Err(Refusal::new(RefusalKind::Descriptor, "is a socket, must be an eventfd or a pipe"))
        }
    }
}

/// The address family of a socket, -1 where it cannot be told.
fn domain(fd: RawFd) -> libc::c_int {
    let mut domain = -1;
    let mut size: libc::socklen_t = 4;
    // SAFETY: `domain` and its size are valid for writing.
    unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, (&raw mut domain).cast(), &raw mut size)
    };
    domain
}

thread_local! {
    /// None where the kernel has no asynchronous operations, or no more of them.
    static CONTEXT: Option<Context> = Context::take();
}

/// Gets ready what this thread rings with, so that the first bell takes no longer than others.
pub(crate) fn prepare() {
    CONTEXT.with(|_| {});
}

impl Bell {
    /// Rings, and waits for nothing. One that was rung and not heard yet is left alone where it can take no more.
    pub(crate) fn ring(self) {
        match self {
            Self::Eventfd(fd) => CONTEXT.with(|context| add_to_eventfd(context.as_ref(), fd)),
            Self::Pipe(fd) => write_to_pipe(fd),
            Self::Socket(fd) => send_to_socket(fd),
        }
    }
}

fn add_to_eventfd(context: Option<&Context>, fd: RawFd) {
    if !context.is_some_and(|context| context.signal(fd)) {
        // Nothing better is left: a peer that fills its eventfd just between look and write makes us wait.
        sys::signal(fd);
    }
}

fn write_to_pipe(fd: RawFd) {
    let one = 1u64;
    let iovec = libc::iovec { iov_base: (&raw const one).cast_mut().cast(), iov_len: 8 };
    // Where nobody reads any more this raises SIGPIPE: queue pairs' threads have it blocked, Python ignores it.
    // SAFETY: the iovec describes `one`, which lives across the call and is only read.
    let done = unsafe { libc::pwritev2(fd, &raw const iovec, 1, -1, libc::RWF_NOWAIT) };
    if done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
        // Kernels before 6.5. As for an eventfd without asynchronous operations.
        sys::signal(fd);
    }
}

fn send_to_socket(fd: RawFd) {
    let one = 1u64;
    // SAFETY: 8 bytes that live across the call.
    unsafe { libc::send(fd, (&raw const one).cast(), 8, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
}

/// linux/aio_abi.h: one operation.
#[repr(C)]
#[derive(Debug, Default)]
struct Operation {
    data: u64,
    key_and_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    fd: u32,
    events: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    told_fd: u32,
}

const OPCODE_POLL: u16 = 5;
const FLAG_TELL_EVENTFD: u32 = 1;

/// fs/aio.c: the start of the ring of completions that io_setup(2) maps for us.
#[repr(C)]
struct Completions {
    id: u32,
    count: u32,
    head: UnsafeCell<u32>,
    tail: UnsafeCell<u32>,
    magic: u32,
}

/// What the ring says in `magic`: libraries have relied on it, and on head and tail, since there are completions.
const MAGIC: u32 = 0xa10a_10a1;

/// A place for one operation at a time; each thread has its own.
#[derive(Debug)]
struct Context {
    /// What the kernel calls it: the address of its completions.
    completions: *const Completions,
}

/// Contexts of threads that ended. To destroy one makes the caller wait until every processor has taken note, which is
/// milliseconds; so they are kept, as many as there were threads at once.
static SPARE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

impl Context {
    fn take() -> Option<Self> {
        let mut address = SPARE.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or(0);
        // SAFETY: `address` is valid for writing, and zero as it must be.
        if address == 0 && unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut address) } != 0 {
            return None;
        }
        let context = Self { completions: std::ptr::with_exposed_provenance(address) };
        // SAFETY: the kernel has just mapped it.
        (unsafe { (*context.completions).magic } == MAGIC).then_some(context)
    }

    /// Adds one to an eventfd, or leaves it full. False if the kernel refused the operation: nothing was added.
    #[must_use]
    fn signal(&self, fd: RawFd) -> bool {
        let fd = fd.unsigned_abs();
        let mut operation = Operation {
            opcode: OPCODE_POLL,
            fd,
            // Of an eventfd one of them is true at any time, so this is over at once.
            events: u64::from((libc::POLLIN | libc::POLLOUT).unsigned_abs()),
            flags: FLAG_TELL_EVENTFD,
            told_fd: fd,
            ..Operation::default()
        };
        let mut operations = [&raw mut operation];
        // SAFETY: one valid operation, which the kernel copies.
        let accepted =
            unsafe { libc::syscall(libc::SYS_io_submit, self.completions, 1, operations.as_mut_ptr()) };
        if accepted != 1 {
            return false;
        }
        // What it completed is of no interest, and makes room for the next.
        // SAFETY: both are aligned and mapped; the kernel writes the tail, the head is ours.
        unsafe {
            let tail = AtomicU32::from_ptr((*self.completions).tail.get()).load(Ordering::Acquire);
            AtomicU32::from_ptr((*self.completions).head.get()).store(tail, Ordering::Release);
        }
        true
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        SPARE.lock().unwrap_or_else(PoisonError::into_inner).push(self.completions.expose_provenance());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::ManuallyDrop;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    fn owned(fd: RawFd) -> OwnedFd {
        assert!(fd >= 0);
        // SAFETY: the descriptor is new and ours.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    /// In blocking mode, as a peer may have it.
    fn eventfd(count: u64) -> OwnedFd {
        // SAFETY: plain system call.
        let fd = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) });
        // SAFETY: 8 bytes that live across the call.
        unsafe { libc::write(fd.as_raw_fd(), (&raw const count).cast(), 8) };
        fd
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut count = 0u64;
        // SAFETY: 8 bytes that live across the call.
        assert_eq!(unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) }, 8);
        count
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        let mut fds = [-1; 2];
        // SAFETY: `fds` has room for two descriptors.
        unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) };
        let [reader, writer] = fds.map(owned);
        (reader, writer)
    }

    #[test]
    fn an_eventfd_counts_and_one_that_is_full_holds_nobody_up() {
        assert!(CONTEXT.with(Option::is_some), "this kernel has asynchronous operations");
        let fd = eventfd(0);
        let bell = Bell::of(fd.as_raw_fd()).unwrap();
        // More often than completions have room.
        (0..1000).for_each(|_| bell.ring());
        assert_eq!(count(&fd), 1000);
        let full = eventfd(u64::MAX - 1);
        (0..3).for_each(|_| Bell::of(full.as_raw_fd()).unwrap().ring());
        assert!(count(&full) >= u64::MAX - 1);
        bell.ring();
        assert_eq!(count(&fd), 1);
    }

    #[test]
    fn an_eventfd_is_written_to_if_the_kernel_refuses_the_operation() {
        let fd = eventfd(0);
        let unknown = Completions {
            id: u32::MAX,
            count: 0,
            head: UnsafeCell::new(0),
            tail: UnsafeCell::new(0),
            magic: MAGIC,
        };
        // Other threads must not get it as a spare.
        let context = ManuallyDrop::new(Context { completions: &raw const unknown });
        assert!(!context.signal(fd.as_raw_fd()));
        (0..2).for_each(|_| add_to_eventfd(Some(&context), fd.as_raw_fd()));
        assert_eq!(count(&fd), 2);
    }

    #[test]
    fn a_pipe_is_written_to_and_one_that_is_full_holds_nobody_up() {
        let (reader, writer) = pipe();
        let bell = Bell::of(writer.as_raw_fd()).unwrap();
        assert_eq!(bell, Bell::Pipe(writer.as_raw_fd()));
        bell.ring();
        assert_eq!(count(&reader), 1);
        // SAFETY: plain system call.
        let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETPIPE_SZ) };
        (0..size).for_each(|_| bell.ring());
    }

    #[test]
    fn a_socket_is_sent_to_and_one_that_is_full_or_left_holds_nobody_up() {
        let (mine, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let bell = Bell::of(mine.as_raw_fd()).unwrap();
        assert_eq!(bell, Bell::Socket(mine.as_raw_fd()));
        bell.ring();
        let theirs = OwnedFd::from(theirs);
        assert_eq!(count(&theirs), 1);
        // More than a socket holds; nobody reads.
        (0..1 << 16).for_each(|_| bell.ring());
        drop(theirs);
        bell.ring();
    }

    #[test]
    fn what_is_none_of_these_is_refused_by_its_name() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let reason = "is /dev/null, must be an eventfd, a pipe or a UNIX socket";
        assert_eq!(Bell::of(file.as_raw_fd()).unwrap_err().to_string(), reason);
        let far = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(Bell::of(far.as_raw_fd()).unwrap_err().to_string().starts_with("is socket:["));
        let (mine, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(
            check_kick(mine.as_raw_fd()).unwrap_err().to_string(),
            "is a socket, must be an eventfd or a pipe"
        );
        assert!(Bell::of(-1).unwrap_err().to_string().starts_with("-1 cannot be looked at: "));
    }
}

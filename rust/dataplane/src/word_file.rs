//! A memory file of words that several processes write to: what must be known after the death of any of them.
//!
//! Owns:        the file, its seals, its mapping.
//! Never sees:  what a word means.
//! Read next:   `ledger` and `in_flight`, which are made of such files.
//!
//! Nothing here is waited for or synchronised to a disk: it is about processes of one machine that die.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::AtomicU64;

const WORD_SIZE: usize = 8;

/// Nobody may change the file's size, which would take the mapping away under whoever writes.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Why a file cannot be used.
#[derive(Debug)]
pub enum WordFileError {
    /// It is none of these.
    Invalid(String),
    /// The kernel refused it to the one named.
    System(&'static str, io::Error),
}

impl fmt::Display for WordFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(reason) => f.write_str(reason),
            Self::System(what, error) => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for WordFileError {}

fn checked(what: &'static str, result: libc::c_int) -> Result<libc::c_int, WordFileError> {
    if result < 0 {
        return Err(WordFileError::System(what, io::Error::last_os_error()));
    }
    Ok(result)
}

/// The words, mapped. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct WordFile {
    words: *mut u64,
    count: usize,
}

// SAFETY: the mapping lives as long as the object, and every access to it is atomic.
unsafe impl Send for WordFile {}
// SAFETY: as above.
unsafe impl Sync for WordFile {}

impl WordFile {
    /// A new file of `count` words, all 0, which errors call `what`. It costs memory only where somebody writes.
    pub(crate) fn create(what: &'static str, name: &CStr, count: usize) -> Result<OwnedFd, WordFileError> {
        // SAFETY: the name is a C string; the descriptor has no other owner.
        let file = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            OwnedFd::from_raw_fd(checked(what, libc::memfd_create(name.as_ptr(), flags))?)
        };
        let size = libc::off_t::try_from(WORD_SIZE * count).expect("some MiB at most");
        // SAFETY: plain system calls on our own descriptor.
        unsafe {
            checked(what, libc::ftruncate(file.as_raw_fd(), size))?;
            checked(what, libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS))?;
        }
        Ok(file)
    }

    /// Maps a file that `create` made for `ring_count` rings of so many words each, here or in another process. `fd` is only
    /// used during the call.
    pub(crate) fn map(
        what: &'static str,
        fd: RawFd,
        ring_count: usize,
        ring_words: usize,
    ) -> Result<Self, WordFileError> {
        let count = ring_words * ring_count;
        let size = WORD_SIZE * count;
        // SAFETY: an all-zero stat is a valid one to be filled in.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` is valid for writing.
        checked(what, unsafe { libc::fstat(fd, &raw mut stat) })?;
        if usize::try_from(stat.st_size).ok() != Some(size) || count == 0 {
            let found = stat.st_size;
            return Err(WordFileError::Invalid(format!(
                "{what}: has {found} bytes, {ring_count} rings need {size}"
            )));
        }
        // A file without seals could lose its pages while we write to them (SIGBUS); one of no memory file fails here.
        // SAFETY: plain system call.
        let seals = checked(what, unsafe { libc::fcntl(fd, libc::F_GET_SEALS) })?;
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Err(WordFileError::Invalid(format!("{what}: is not sealed against shrinking")));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: no fixed address is asked for, so the new mapping replaces nothing.
        let host = unsafe { libc::mmap(ptr::null_mut(), size, protection, libc::MAP_SHARED, fd, 0) };
        if host == libc::MAP_FAILED {
            return Err(WordFileError::System(what, io::Error::last_os_error()));
        }
        Ok(Self { words: host.cast(), count })
    }

    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count);
        // SAFETY: inside the mapping, and aligned, because a mapping begins on a page.
        unsafe { AtomicU64::from_ptr(self.words.add(index)) }
    }
}

impl Drop for WordFile {
    fn drop(&mut self) {
        // SAFETY: this mapping was made in `map` and nobody else unmaps it.
        unsafe { libc::munmap(self.words.cast(), WORD_SIZE * self.count) };
    }
}

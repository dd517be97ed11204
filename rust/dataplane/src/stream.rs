//! The stream of a queue pair: frames on a socket, each with its length in front.
//!
//! Owns:        what was read of frames and not delivered, what is unsent of one; whether the stream ended, and why.
//! Never sees:  rings, threads; who is at the other end.
//! Read next:   `pump`, which delivers what is read here and has sent what the guest sends.
//!
//! A length has four bytes, the most significant first (QEMU's `-netdev stream`, passt). The kernel knows no frames here:
//! a read ends in the middle of one, and so does a write. What was read and not delivered stays until the guest has
//! buffers; what a write left over is sent before anything else. Both outlive a stop and other addresses of the rings, and
//! travel to a successor.
//!
//! Once a stream is out of step nothing can be read of it any more, so it ends: on a length that cannot be, and with the
//! process that had the bytes in hand.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::backlog::WAIT_MAX;
use crate::sys;

const LENGTH_SIZE: usize = 4;

/// An Ethernet header: no frame is shorter.
pub(crate) const FRAME_LENGTH_MIN: usize = 14;

/// The longest IP packet, an Ethernet header and a VLAN tag. Nobody segments anything here, so no frame is longer.
pub const STREAM_FRAME_LENGTH_MAX: usize = 65535 + 14 + 4;

/// Bytes in hand in each direction at most: twice the longest frame, in whole pages. So a frame that begins in the first
/// half is never in the way of its end, and one system call reads many small ones.
pub const STREAM_IN_HAND_MAX: usize = (2 * (LENGTH_SIZE + STREAM_FRAME_LENGTH_MAX)).next_multiple_of(4096);

/// Why there is no frame to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoFrame {
    /// None that is whole: the socket tells when there is more.
    Empty,
    /// There will be none.
    Ended,
}

/// Frames on a connected socket, or on none.
#[derive(Debug)]
pub struct Stream {
    /// Borrowed; None while nobody is connected.
    fd: Option<RawFd>,
    hand: Mutex<Hand>,
    ended: OnceLock<String>,
}

/// What is in hand.
#[derive(Debug, Default)]
pub(crate) struct Hand {
    /// Allocated for the first read. What was read and is not delivered stands at `from..to`.
    input: Vec<u8>,
    from: usize,
    to: usize,
    /// The rest of what is being sent, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
    /// The other end reads no more. It may have said something before.
    is_unheard: bool,
    /// Since when the frame at the beginning waits for buffers.
    waits_since: Option<Instant>,
    /// What one system call is given; kept for its memory alone.
    buffers: Vec<libc::iovec>,
}

// SAFETY: the pointers in `buffers` are used only while a call fills it and empties it.
unsafe impl Send for Hand {}

impl Stream {
    /// A stream with nothing in hand on a borrowed socket, which is not touched.
    #[must_use]
    pub fn new(fd: Option<RawFd>) -> Self {
        Self { fd, hand: Mutex::default(), ended: OnceLock::new() }
    }

    /// Why it ended, None while it goes on.
    pub fn ended(&self) -> Option<&str> {
        self.ended.get().map(String::as_str)
    }

    /// Ends it: nothing is read or sent any more, here.
    pub fn end(&self, reason: String) {
        // One reason is enough: the first one caused the others.
        let _ = self.ended.set(reason);
    }

    /// Whether nothing can be read or sent.
    pub(crate) fn is_over(&self) -> bool {
        self.fd.is_none() || self.ended.get().is_some()
    }

    pub(crate) fn hand(&self) -> MutexGuard<'_, Hand> {
        self.hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a frame of this program's, or lets it be sent with the next one of the guest's.
    ///
    /// # Errors
    /// Nobody is connected, or too much is unsent already.
    pub fn inject(&self, frame: &[u8]) -> io::Result<()> {
        let mut hand = self.hand();
        if self.is_over() || hand.is_unheard {
            return Err(io::Error::from_raw_os_error(libc::ENOTCONN));
        }
        if hand.unsent().len() + LENGTH_SIZE + frame.len() > STREAM_IN_HAND_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
        }
        let length = u32::try_from(frame.len()).expect("as much as is in hand");
        hand.unsent.extend_from_slice(&length.to_be_bytes());
        hand.unsent.extend_from_slice(frame);
        match self.flush(&mut hand) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// Writes what is in hand into a file: what was read at its beginning, what is unsent at `STREAM_IN_HAND_MAX`. Gives
    /// the bytes of both. Exact once no queue pair runs on it.
    ///
    /// # Errors
    /// As write(2).
    pub fn save(&self, file: RawFd) -> io::Result<(usize, usize)> {
        let (hand, file) = (self.hand(), lent(file));
        file.write_all_at(hand.read(), 0)?;
        file.write_all_at(hand.unsent(), STREAM_IN_HAND_MAX as u64)?;
        Ok((hand.read().len(), hand.unsent().len()))
    }

    /// Takes in hand what `save` wrote, in the place of anything else.
    ///
    /// # Errors
    /// As read(2), or it is more than can be in hand. Nothing is in hand then.
    pub fn load(&self, file: RawFd, read: usize, unsent: usize) -> io::Result<()> {
        let mut hand = self.hand();
        (hand.from, hand.to, hand.sent) = (0, 0, 0);
        hand.unsent.clear();
        if read.max(unsent) > STREAM_IN_HAND_MAX {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let file = lent(file);
        if read > 0 {
            hand.allocate();
            file.read_exact_at(&mut hand.input[..read], 0)?;
        }
        let mut rest = vec![0; unsent];
        file.read_exact_at(&mut rest, STREAM_IN_HAND_MAX as u64)?;
        (hand.to, hand.unsent) = (read, rest);
        Ok(())
    }

    /// Where in `Hand::input` the next frame stands, which is read if that is necessary.
    pub(crate) fn next_frame(&self, hand: &mut Hand) -> Result<Range<usize>, NoFrame> {
        loop {
            if self.is_over() {
                return Err(NoFrame::Ended);
            }
            if let Some(length) = hand.announced() {
                if length == 0 || length > STREAM_FRAME_LENGTH_MAX {
                    self.end(format!(
                        "it announces a frame of {length} bytes, possible are 1 to {STREAM_FRAME_LENGTH_MAX}"
                    ));
                    continue;
                }
                let start = hand.from + LENGTH_SIZE;
                if start + length <= hand.to {
                    return Ok(start..start + length);
                }
            }
            self.read_more(hand)?;
        }
    }

    fn read_more(&self, hand: &mut Hand) -> Result<(), NoFrame> {
        let Some(fd) = self.fd else { return Err(NoFrame::Ended) };
        hand.make_room();
        match sys::receive(fd, &mut hand.input[hand.to..]) {
            Ok(0) if hand.read().is_empty() => self.end("it left".to_string()),
            Ok(0) => {
                self.end(format!("it left in the middle of a frame, {} bytes of it came", hand.read().len()))
            }
            Ok(count) => hand.to += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(NoFrame::Empty),
            Err(error) => self.end(format!("it cannot be read any more: {error}")),
        }
        Ok(())
    }

    /// Sends a frame that stands in `buffers` behind a header of `header_length` bytes, all `length` bytes long; what the
    /// socket does not take is kept.
    ///
    /// # Errors
    /// `WouldBlock`: what was sent before is not out, and nothing of this frame was taken. EINVAL: it cannot be sent on any
    /// stream. ENODEV: nobody reads. Others as sendmsg(2); nothing of it was taken.
    ///
    /// # Safety
    /// Each buffer is mapped for the time of the call.
    pub(crate) unsafe fn send(
        &self,
        buffers: &[libc::iovec],
        header_length: usize,
        length: u64,
        frame_length_max: usize,
    ) -> io::Result<()> {
        let mut hand = self.hand();
        let hand = &mut *hand;
        self.flush(hand)?;
        let frame_length = length - header_length as u64;
        if !(FRAME_LENGTH_MIN as u64..=frame_length_max as u64).contains(&frame_length) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let prefix = u32::try_from(frame_length).map_err(|_| io::ErrorKind::InvalidInput)?.to_be_bytes();
        let start = libc::iovec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: LENGTH_SIZE };
        hand.buffers.clear();
        hand.buffers.push(start);
        // SAFETY: the caller's.
        hand.buffers.extend(
            behind(buffers, header_length)
                .map(|(base, length)| libc::iovec { iov_base: base.cast(), iov_len: length }),
        );
        // SAFETY: the caller's; `prefix` lives across the call.
        let sent = unsafe { self.write(hand.is_unheard, &hand.buffers) }.map_err(|error| hand.note(error))?;
        // SAFETY: the caller's, and as above.
        unsafe { hand.keep_from(sent) };
        Ok(())
    }

    /// Sends what is unsent.
    ///
    /// # Errors
    /// `WouldBlock`: not all of it. ENODEV: nobody reads.
    pub(crate) fn flush(&self, hand: &mut Hand) -> io::Result<()> {
        while !hand.unsent().is_empty() {
            let rest = hand.unsent();
            let rest = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
            // SAFETY: the buffer is `unsent`, which nobody changes meanwhile.
            match unsafe { self.write(hand.is_unheard, &[rest]) } {
                Ok(count) => hand.sent += count,
                Err(error) => return Err(hand.note(error)),
            }
        }
        hand.unsent.clear();
        hand.sent = 0;
        Ok(())
    }

    /// # Safety
    /// Each buffer is mapped for the time of the call.
    unsafe fn write(&self, is_unheard: bool, buffers: &[libc::iovec]) -> io::Result<usize> {
        let nobody = || io::Error::from_raw_os_error(libc::ENODEV);
        let fd = self.fd.filter(|_| !is_unheard && self.ended.get().is_none()).ok_or_else(nobody)?;
        // SAFETY: the caller's.
        unsafe { sys::send(fd, buffers) }
    }

    /// What to sleep on.
    pub(crate) fn watch(&self, events: libc::c_short) -> libc::pollfd {
        // Where nothing is asked, a peer that left would wake for ever. The owner of the socket sees it.
        let fd = self.fd.filter(|_| events != 0 && self.ended.get().is_none());
        libc::pollfd { fd: fd.unwrap_or(-1), events, revents: 0 }
    }
}

impl Hand {
    fn allocate(&mut self) {
        // Of zeros that the kernel has: it gives pages only once something is read into them.
        if self.input.is_empty() {
            self.input = vec![0; STREAM_IN_HAND_MAX];
        }
    }

    fn read(&self) -> &[u8] {
        self.input.get(self.from..self.to).unwrap_or_default()
    }

    fn unsent(&self) -> &[u8] {
        &self.unsent[self.sent..]
    }

    /// An error of sending. Nothing more is sent to an end that reads no more.
    fn note(&mut self, error: io::Error) -> io::Error {
        if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN)) {
            self.is_unheard = true;
            self.unsent.clear();
            self.sent = 0;
            return io::Error::from_raw_os_error(libc::ENODEV);
        }
        error
    }

    pub(crate) fn has_unsent(&self) -> bool {
        !self.unsent().is_empty()
    }

    /// The length of the frame at the beginning.
    fn announced(&self) -> Option<usize> {
        let length = self.read().first_chunk::<LENGTH_SIZE>()?;
        Some(u32::from_be_bytes(*length) as usize)
    }

    /// Moves what is in hand where the rest of a frame fits behind it.
    fn make_room(&mut self) {
        self.allocate();
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        } else if self.input.len() - self.from < LENGTH_SIZE + STREAM_FRAME_LENGTH_MAX {
            self.input.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
    }

    pub(crate) fn bytes(&self, frame: Range<usize>) -> &[u8] {
        &self.input[frame]
    }

    /// The frame was delivered or dropped.
    pub(crate) fn pass(&mut self, frame: &Range<usize>) {
        self.from = frame.end;
        self.waits_since = None;
    }

    /// Keeps what is in `buffers` behind the first `sent` bytes.
    ///
    /// # Safety
    /// Each buffer is mapped.
    unsafe fn keep_from(&mut self, sent: usize) {
        for (base, length) in behind(&self.buffers, sent) {
            let place = self.unsent.len();
            self.unsent.resize(place + length, 0);
            // SAFETY: the caller's; as much room was just made.
            unsafe { self.unsent[place..].as_mut_ptr().copy_from_nonoverlapping(base, length) };
        }
    }

    /// The frame at the beginning waits for buffers. Whether it may go on.
    pub(crate) fn waits(&mut self) -> bool {
        self.waits_since.get_or_insert_with(Instant::now).elapsed() < WAIT_MAX
    }

    /// Rings begin: whoever waits has waited since now.
    pub(crate) fn begin(&mut self) {
        self.waits_since = None;
    }

    /// How much longer the frame at the beginning may wait; None if none does.
    pub(crate) fn patience(&self) -> Option<Duration> {
        Some(WAIT_MAX.saturating_sub(self.waits_since?.elapsed()))
    }
}

/// The parts of `buffers` behind the first `offset` bytes.
fn behind(buffers: &[libc::iovec], mut offset: usize) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
    buffers.iter().filter_map(move |buffer| {
        let skipped = offset.min(buffer.iov_len);
        offset -= skipped;
        // SAFETY: the place is inside the buffer, or at its end.
        let base = unsafe { buffer.iov_base.cast::<u8>().add(skipped) };
        (skipped < buffer.iov_len).then_some((base, buffer.iov_len - skipped))
    })
}

/// Lends a descriptor as a file.
fn lent(fd: RawFd) -> ManuallyDrop<File> {
    // SAFETY: the caller keeps it open during the call, and nobody closes it here.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

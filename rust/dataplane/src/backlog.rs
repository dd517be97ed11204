//! What came for a driver before it could take it.
//!
//! Owns:        one frame that was read and does not fit yet; whether what stands in the TAP is for another driver.
//! Never sees:  rings, and when a driver is another one.
//! Read next:   `window`, which reads into this behind the guest's buffers; `pump`, which delivers from it.
//!
//! A read from a TAP cannot be undone, and a frame's length is known only after it. So what does not fit into the guest's
//! buffers goes here, and stays here until the driver has posted enough. It outlives a stop, other addresses of the rings
//! and the session, as the frames in the TAP behind it do, and travels to a successor.

use crate::refusal::{Refusal, RefusalKind};
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

/// The longest header, the longest packet that the kernel leaves to others to segment (GSO_LEGACY_MAX_SIZE), an Ethernet
/// header and a VLAN tag. An MTU is less.
pub const FRAME_SIZE_MAX: usize = 12 + 65536 + 14 + 4;

/// One more byte tells of a frame that was cut.
const SPACE: usize = FRAME_SIZE_MAX + 1;

/// How long a frame waits before it is dropped. A Linux driver that is short of memory tries again after half a second.
/// But one with a small ring posts more only after it has received something, and would wait for us as we for it.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(10);

/// Frames that are read out and dropped for a driver that begins. A TAP's queue has a thousand by default (txqueuelen); one
/// that is filled as fast as it is read out must come to an end.
const STALE_MAX: usize = 65536;

/// Whom what waits is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Heir {
    #[default]
    Whoever,
    /// A driver whose receive ring goes on there.
    At(u16),
    /// A driver whose receive ring goes on anywhere else.
    NotAt(u16),
    Nobody,
}

#[derive(Debug, Default)]
pub(crate) struct Backlog {
    /// Allocated for the first receive ring that needs it. The kernel gives it pages only once a frame reaches them.
    space: Option<Box<[MaybeUninit<u8>; SPACE]>>,
    /// Of the frame that waits, with a header of 12 bytes; 0 is none.
    length: usize,
    since: Option<Instant>,
    heir: Heir,
    /// Frames of the TAP that may be for another driver.
    stale: usize,
}

impl Backlog {
    /// Where a read goes on that has filled `offset` bytes of guest memory.
    pub(crate) fn behind(&mut self, offset: usize) -> libc::iovec {
        let space = self.space.get_or_insert_with(|| {
            // SAFETY: bytes that may be uninitialised need no initial value.
            unsafe { Box::<[MaybeUninit<u8>; SPACE]>::new_uninit().assume_init() }
        });
        let rest = &mut space[offset.min(SPACE)..];
        libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() }
    }

    /// What was read there, of a frame that ends at `end`.
    ///
    /// # Safety
    /// As many bytes were written through `behind`.
    pub(crate) unsafe fn rest(&self, offset: usize, end: usize) -> &[u8] {
        let rest = self.space.as_ref().map_or(&[][..], |space| &space[offset..end]);
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(rest.as_ptr().cast(), rest.len()) }
    }

    /// The frame that waits.
    pub(crate) fn frame(&self) -> Option<&[u8]> {
        // SAFETY: `hold` and `put` are told of written bytes.
        (self.length > 0).then(|| unsafe { self.rest(0, self.length) })
    }

    /// The first `length` bytes are a frame from now on, which waits.
    ///
    /// # Safety
    /// They were written through `behind`.
    pub(crate) unsafe fn hold(&mut self, length: usize) {
        assert!(length <= FRAME_SIZE_MAX, "the frame was cut");
        self.length = length;
        self.since = Some(Instant::now());
    }

    /// Lets a frame wait that came from elsewhere, in the place of any other; none where it is empty.
    ///
    /// # Errors
    /// It is longer than any frame.
    pub(crate) fn put(&mut self, frame: &[u8]) -> Result<(), Refusal> {
        if frame.len() > FRAME_SIZE_MAX {
            let text = format!("a frame that waits has {} bytes, limit is {FRAME_SIZE_MAX}", frame.len());
            return Err(Refusal::new(RefusalKind::Length, text));
        }
        let place = self.behind(0).iov_base.cast::<u8>();
        // SAFETY: the place has room for the longest frame, and is nobody else's.
        unsafe { place.copy_from_nonoverlapping(frame.as_ptr(), frame.len()) };
        self.length = frame.len();
        Ok(())
    }

    /// No frame waits any more. Whether one did.
    pub(crate) fn clear(&mut self) -> bool {
        std::mem::take(&mut self.length) > 0
    }

    /// Rings begin: whoever waits has waited since now.
    pub(crate) fn begin(&mut self) {
        self.since = Some(Instant::now());
    }

    /// How much longer the frame may wait; None if none does.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let since = self.since.filter(|_| self.length > 0)?;
        Some(WAIT_MAX.saturating_sub(since.elapsed()))
    }

    /// What waits, here and in the TAP, is for a driver whose receive ring goes on at `position`; None is for none.
    pub(crate) fn reserve(&mut self, position: Option<u16>) {
        self.heir = position.map_or(Heir::Nobody, Heir::At);
    }

    /// It is for a driver whose receive ring goes on anywhere but at `position`.
    pub(crate) fn refuse(&mut self, position: u16) {
        self.heir = Heir::NotAt(position);
    }

    /// A driver comes whose receive ring goes on at `position`. Whether a frame waited that is not for this one.
    pub(crate) fn claim(&mut self, position: u16) -> bool {
        let is_heir = match std::mem::take(&mut self.heir) {
            Heir::Whoever => true,
            Heir::At(place) => place == position,
            Heir::NotAt(place) => place != position,
            Heir::Nobody => false,
        };
        if is_heir {
            return false;
        }
        self.stale = STALE_MAX;
        self.clear()
    }

    /// Whether the next frame of the TAP is for another driver.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale > 0
    }

    /// One such frame was read out.
    pub(crate) fn note_stale(&mut self) {
        self.stale = self.stale.saturating_sub(1);
    }

    /// The TAP is empty, or its queue is another: what comes now is for the driver that is there.
    pub(crate) fn end_stale(&mut self) {
        self.stale = 0;
    }
}

#[cfg(test)]
impl Backlog {
    /// As if it had waited too long.
    pub(crate) fn exhaust_patience(&mut self) {
        self.since = Instant::now().checked_sub(WAIT_MAX);
    }
}

//! The window: chains of the receive ring that no frame was put into yet.
//!
//! Owns:        how many chains a read gets, the frame that stands in them, what its header may ask of the driver.
//! Never sees:  notifications, threads; when a frame is read.
//! Read next:   `backlog`, where the rest of a frame goes that is longer than the window.
//!
//! A window may have room for the longest frame and usually does not need it: with 64 KiB frames to come, each read would
//! get dozens of buffers. So it holds what recent frames needed, and behind it the read has room in the backlog. A frame that
//! turns out longer gets more chains, and the rest of it is copied.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use crate::backlog::{Backlog, FRAME_SIZE_MAX};
use crate::chain::{Chain, Direction, RingError, CHAIN_BUFFERS_MAX};
use crate::ring::Ring;
use crate::tap::Read;
use crate::writer::Writer;

/// The length of a virtio-net header with `num_buffers`, its last field.
pub(crate) const HEADER_LENGTH_WITH_BUFFERS: usize = 12;

/// Where in that header `num_buffers` stands.
pub(crate) const NUM_BUFFERS_OFFSET: usize = 10;

/// The flag of a header whose frame has no checksum yet (virtio 1.2, section 5.1.6).
const NEEDS_CSUM: u8 = 1;

/// After each frame the window shrinks by this part of what the frame did not need. To copy a frame costs as much as
/// hundreds of superfluous buffers, so one large frame in a hundred keeps the window wide.
const SHRINK: u64 = 64;

/// What a driver takes over from whoever sends to it (TUN_F_…, linux/if_tun.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads(pub u8);

impl Offloads {
    const CSUM: u8 = 0x01;
    const TSO4: u8 = 0x02;
    const TSO6: u8 = 0x04;
    const TSO_ECN: u8 = 0x08;
    const USO4: u8 = 0x20;
    const USO6: u8 = 0x40;

    fn has(self, offload: u8) -> bool {
        self.0 & offload != 0
    }

    /// Whether the driver takes a frame of this type (virtio 1.2, section 5.1.6.4).
    fn takes_segmentation(self, gso_type: u8) -> bool {
        const GSO_ECN: u8 = 0x80;
        let kind = match gso_type & !GSO_ECN {
            0 => true,
            1 => self.has(Self::TSO4),
            4 => self.has(Self::TSO6),
            5 => self.has(Self::USO4 | Self::USO6),
            _ => false,
        };
        kind && (gso_type & GSO_ECN == 0 || self.has(Self::TSO_ECN))
    }
}

/// What came of looking for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Enough,
    /// The guest may make more available.
    NotYet,
    /// There is no more, whatever the guest does.
    Never,
}

/// How frames and buffers of a configuration fit together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Framing {
    /// Of the virtio-net header, which stands in front of each frame.
    pub(crate) header_length: usize,
    /// Whether a frame may take several chains.
    pub(crate) mergeable: bool,
    /// Bytes the longest frame is expected to have, with its header.
    pub(crate) room: u64,
    pub(crate) offloads: Offloads,
}

#[derive(Debug)]
pub(crate) struct Window {
    framing: Framing,
    /// The buffers of the chains, in order, behind `used` ones of chains that are gone.
    buffers: Vec<libc::iovec>,
    used: usize,
    chains: VecDeque<Chain>,
    length: u64,
    slots: usize,
    /// Bytes that recent frames needed.
    expected: u64,
}

impl Window {
    pub(crate) fn new(framing: Framing) -> Self {
        let (buffers, chains) = (Vec::new(), VecDeque::new());
        Self { framing, buffers, used: 0, chains, length: 0, slots: 0, expected: 0 }
    }

    fn push(&mut self, chain: Chain) {
        self.length += chain.length;
        self.slots += usize::from(chain.slots);
        self.chains.push_back(chain);
    }

    fn pop(&mut self) -> Option<Chain> {
        let chain = self.chains.pop_front()?;
        self.length -= chain.length;
        self.slots -= usize::from(chain.slots);
        self.used += chain.buffers;
        Some(chain)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    pub(crate) fn framing(&self) -> Framing {
        self.framing
    }

    /// Bytes its chains have room for.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn buffers(&self) -> &[libc::iovec] {
        &self.buffers[self.used..]
    }

    /// The chains and the slots of the ring that they occupy.
    pub(crate) fn held(&self) -> (u16, u16) {
        let count = |number| u16::try_from(number).expect("no more than a ring has");
        (count(self.chains.len()), count(self.slots))
    }

    pub(crate) fn clear(&mut self) {
        self.buffers.clear();
        self.chains.clear();
        (self.used, self.length, self.slots) = (0, 0, 0);
    }

    /// Forgets used buffers where that is cheap: when none is left behind them, or when they are many.
    fn tidy(&mut self) {
        if self.used == self.buffers.len() || self.used > CHAIN_BUFFERS_MAX {
            self.buffers.drain(..self.used);
            self.used = 0;
        }
    }

    /// Takes chains for a frame of as many bytes as recent ones had, if there are so many.
    pub(crate) fn gather_expected(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.gather(ring, self.expected).map(drop)
    }

    /// Takes chains until `bytes` fit.
    pub(crate) fn gather(&mut self, ring: &mut Ring, bytes: u64) -> Result<Room, RingError> {
        let Framing { header_length, mergeable, .. } = self.framing;
        loop {
            if !self.is_empty() {
                if self.length >= bytes {
                    return Ok(Room::Enough);
                }
                if !mergeable {
                    return Ok(Room::Never);
                }
            }
            let before = self.buffers.len();
            let Some(chain) = ring.take(Direction::ToGuest, header_length, &mut self.buffers)? else {
                let is_whole_ring = self.slots >= usize::from(ring.size());
                return Ok(if is_whole_ring { Room::Never } else { Room::NotYet });
            };
            if self.buffers.len() - self.used > CHAIN_BUFFERS_MAX {
                // As many buffers as one read takes; the chain just taken is not the only one, so some remain.
                self.buffers.truncate(before);
                ring.untake(1, chain.slots);
                return Ok(Room::Never);
            }
            self.push(chain);
        }
    }

    /// Reads one frame into the window, and what does not fit there into the backlog.
    pub(crate) fn read(
        &mut self,
        writer: &mut Writer,
        tap_fd: RawFd,
        backlog: &mut Backlog,
    ) -> io::Result<Read> {
        // To read into one buffer takes a tenth less time than into two.
        let has_rest = self.length <= self.framing.room;
        let mut space = self.length;
        if has_rest {
            let rest = backlog.behind(self.end());
            space += rest.iov_len as u64;
            self.buffers.push(rest);
        }
        // SAFETY: the buffers lie in guest memory, which the ring keeps mapped, but for the last one, which is the
        // backlog's.
        let length = unsafe { writer.read(tap_fd, &self.buffers[self.used..], usize::from(has_rest)) };
        if has_rest {
            self.buffers.pop();
        }
        let read = length.map(|length| Read { length, is_cut: length >= space });
        if read.as_ref().is_ok_and(|read| read.is_cut) {
            // The interface's MTU has grown. No other frame is lost by that.
            self.framing.room = FRAME_SIZE_MAX as u64;
        }
        read
    }

    /// Where in a frame that is longer the window ends.
    pub(crate) fn end(&self) -> usize {
        usize::try_from(self.length).expect("guest memory is mapped")
    }

    /// Takes the first `length` bytes of a frame out, so that all of it stands in the backlog.
    pub(crate) fn move_out(&self, length: usize, backlog: &mut Backlog) {
        let mut place = backlog.behind(0).iov_base.cast::<u8>();
        let mut left = length;
        for buffer in self.buffers() {
            let here = buffer.iov_len.min(left);
            // SAFETY: the buffer is mapped guest memory; the backlog has room for all of a frame.
            unsafe {
                place.copy_from_nonoverlapping(buffer.iov_base.cast(), here);
                place = place.add(here);
            }
            left -= here;
        }
    }

    /// Writes a frame, but for its first `offset` bytes, which stand here already.
    pub(crate) fn fill(&self, writer: &mut Writer, offset: usize, rest: &[u8]) {
        // SAFETY: the buffers lie in guest memory, which the ring keeps mapped.
        unsafe { writer.fill(self.buffers(), offset, rest) };
    }

    /// Whether the driver took what the header of the frame here asks of it. One that took no checksums is told of none.
    pub(crate) fn admit(&self, writer: &mut Writer) -> bool {
        let offloads = self.framing.offloads;
        let [flags, gso_type] = read_start(self.buffers());
        if !offloads.has(Offloads::CSUM) && flags != 0 {
            if flags & NEEDS_CSUM != 0 {
                return false;
            }
            // That the checksum was looked at already is no loss (virtio 1.2, section 5.1.6.4.1).
            self.fill(writer, 0, &[0]);
        }
        offloads.takes_segmentation(gso_type)
    }

    /// Gives the guest the frame of `length` bytes, header included, that stands in the first chains.
    pub(crate) fn deliver(&mut self, ring: &mut Ring, length: u64) {
        let first = self.used;
        let mut left = length;
        let mut count = 0u16;
        while left > 0 {
            let chain = self.pop().expect("the caller checked that the frame fits");
            let written = left.min(chain.length);
            ring.complete(&chain, u32::try_from(written).expect("a read gives less than 2 GiB"));
            left -= written;
            count += 1;
        }
        if self.framing.header_length == HEADER_LENGTH_WITH_BUFFERS {
            // The kernel leaves this field alone, and it must be 1 also where buffers are not merged.
            let buffers = &self.buffers[first..self.used];
            // SAFETY: the buffers lie in guest memory, which the ring keeps mapped.
            unsafe { ring.writer().fill(buffers, NUM_BUFFERS_OFFSET, &count.to_le_bytes()) };
        }
        self.tidy();
        ring.publish();
    }

    /// Takes note of what a frame needed.
    pub(crate) fn learn(&mut self, length: u64) {
        self.expected = match self.expected.checked_sub(length) {
            Some(surplus) => self.expected - surplus / SHRINK,
            None => length,
        };
    }
}

/// Whether the header at the beginning of `buffers` wants something done to its frame.
pub(crate) fn asks_for_offload(buffers: &[libc::iovec]) -> bool {
    let [flags, gso_type] = read_start(buffers);
    flags & NEEDS_CSUM != 0 || gso_type != 0
}

/// The first two bytes of a frame, which may lie in two buffers.
#[inline]
fn read_start(buffers: &[libc::iovec]) -> [u8; 2] {
    let mut bytes = buffers.iter().flat_map(|buffer| {
        // SAFETY: the offset is inside the buffer, which is mapped guest memory.
        (0..buffer.iov_len).map(|offset| unsafe { buffer.iov_base.cast::<u8>().add(offset).read_volatile() })
    });
    [(); 2].map(|()| bytes.next().expect("a chain has room for a header"))
}

#[cfg(test)]
impl Window {
    /// Breaks an invariant: there is room for a frame in no chain that it could be delivered by.
    pub(crate) fn break_invariant(&mut self) {
        let room = vec![0u8; 2048].leak();
        self.buffers.push(libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() });
        self.length += room.len() as u64;
    }
}

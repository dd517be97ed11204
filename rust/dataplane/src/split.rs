//! One split virtqueue, from the device's side (virtio 1.2, section 2.7).
//!
//! Owns:        the ring's indices, the strict reading of descriptor chains, notification suppression both ways.
//! Never sees:  descriptors of the process, packets, threads.
//! Read next:   `queue_pair`, which moves packets through two of these; `writer`, which writes what these say.
//!
//! Everything the guest writes is read once, checked, and never trusted to stay. A chain that cannot be is an
//! error, never a short chain: the ring stops there.

use std::sync::atomic::{fence, AtomicU16, Ordering};
use std::sync::Arc;

use crate::chain::{
    find_part, Chain, Direction, Features, Gathering, Layout, RingError, Table, DESCRIPTOR_INDIRECT,
    DESCRIPTOR_NEXT, DESCRIPTOR_SIZE, RING_SIZE_MAX,
};
use crate::log::{Area, RingLog};
use crate::memory::GuestMemory;
use crate::refusal::{Refusal, RefusalKind};
use crate::writer::Writer;

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A split virtqueue. Chains are completed in any order; which ones are in flight is its owner's to know.
///
/// It keeps the memory mapped that it lies in, and that the buffers it finds point into.
#[derive(Debug)]
pub struct SplitRing {
    writer: Writer,
    size: u16,
    features: Features,
    descriptors: *const u8,
    avail: *mut u16,
    used: *mut u16,
    /// The avail ring position of the next chain to take.
    next_avail: u16,
    /// The avail index as last read: up to here chains are known to be there.
    avail_index: u16,
    /// The used ring position of the next chain to complete.
    next_used: u16,
    /// The used index at the last decision whether to call.
    called_used: u16,
    /// The next decision is yes, whatever the guest says.
    call_forced: bool,
    /// The guest was told to kick (only tracked where it is a flag).
    armed: bool,
}

impl SplitRing {
    /// Finds the ring in guest memory and touches none of it.
    ///
    /// # Errors
    /// What is wrong with the layout.
    pub fn new(layout: &Layout, features: Features, memory: &Arc<GuestMemory>) -> Result<Self, Refusal> {
        let size =
            u16::try_from(layout.size).ok().filter(|size| size.is_power_of_two() && *size <= RING_SIZE_MAX);
        let size = size.ok_or_else(|| {
            let text = format!(
                "a ring has {} entries, it must be a power of two up to {RING_SIZE_MAX}",
                layout.size
            );
            Refusal::new(RefusalKind::Layout, text)
        })?;
        let entries = usize::from(size);
        // Six bytes of flags, index and event index around the entries, whether the last is used or not.
        let descriptors =
            find_part(memory, "descriptor table", layout.descriptor_area, DESCRIPTOR_SIZE * entries, 16)?;
        let avail = find_part(memory, "available ring", layout.driver_area, 6 + 2 * entries, 2)?;
        let used_length = 6 + 8 * entries;
        let used = find_part(memory, "used ring", layout.device_area, used_length, 4)?;
        Ok(Self {
            writer: Writer::new(memory, (layout.descriptor_area, DESCRIPTOR_SIZE * entries), used_length),
            size,
            features,
            descriptors,
            avail: avail.cast(),
            used: used.cast(),
            next_avail: 0,
            avail_index: 0,
            next_used: 0,
            called_used: 0,
            call_forced: false,
            armed: false,
        })
    }

    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Goes on in other memory, which it `is_in`.
    pub(crate) fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        self.writer.set_memory(memory);
    }

    /// Marks what is written in another log from now on, or in none. `check_log` comes next.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.writer.set_log(log);
    }

    /// Whether whatever the ring writes can be marked, where it has to be.
    ///
    /// # Errors
    /// It cannot: the ring may not run.
    pub fn check_log(&self) -> Result<(), RingError> {
        self.writer.check_log()
    }

    /// Sets in the log what was written until now.
    #[inline]
    pub fn flush_log(&mut self) {
        self.writer.flush();
    }

    #[inline]
    pub(crate) fn writer(&mut self) -> &mut Writer {
        &mut self.writer
    }

    /// Whether the ring, which was made from this layout, is in the same place of another memory.
    pub(crate) fn is_in(&self, memory: &Arc<GuestMemory>, layout: &Layout) -> bool {
        let there = Self::new(layout, self.features, memory);
        there.is_ok_and(|there| {
            (there.descriptors, there.avail, there.used) == (self.descriptors, self.avail, self.used)
        })
    }

    /// A field of the avail ring, `offset` in units of 16 bits.
    fn avail_field(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < 3 + usize::from(self.size));
        // SAFETY: `new` found the avail ring of 3 + size such fields inside guest memory, aligned.
        unsafe { AtomicU16::from_ptr(self.avail.add(offset)) }
    }

    /// A field of the used ring, `offset` in units of 16 bits.
    fn used_field(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < 3 + 4 * usize::from(self.size));
        // SAFETY: `new` found the used ring of 3 + 4 * size such fields inside guest memory, aligned.
        unsafe { AtomicU16::from_ptr(self.used.add(offset)) }
    }

    /// Writes a field of the used ring, `offset` in units of 16 bits.
    #[inline]
    fn store(&mut self, offset: usize, value: u16, order: Ordering) {
        debug_assert!(offset < 3 + 4 * usize::from(self.size));
        // SAFETY: `new` found the used ring of 3 + 4 * size such fields inside guest memory, aligned.
        unsafe { self.writer.store(self.used.add(offset), 2 * offset, value, order) };
    }

    /// The used index that stands in guest memory.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.used_field(1).load(Ordering::Acquire))
    }

    /// Starts at `next_avail`, or at the used index in guest memory: nothing was in flight there. `call`: the next
    /// decision whether to call is yes, whatever the guest says.
    pub fn begin(&mut self, next_avail: Option<u16>, call: bool) {
        self.next_used = self.used_index();
        self.next_avail = next_avail.unwrap_or(self.next_used);
        self.avail_index = self.next_avail;
        self.called_used = self.next_used;
        self.call_forced = call;
        self.armed = false;
        // Whoever ran the ring before may have died between a store and its mark.
        self.writer.mark_area(Area::Device);
    }

    /// The position of the next chain to complete.
    pub(crate) fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The position of the next chain to take.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Takes the next chain and appends its buffers; None where the guest has made no more available.
    ///
    /// # Errors
    /// The chain cannot be, or has no room for a header: it was not taken, and `buffers` may have grown.
    #[inline]
    pub fn take(
        &mut self,
        direction: Direction,
        header_length: usize,
        buffers: &mut Vec<libc::iovec>,
    ) -> Result<Option<Chain>, RingError> {
        let Some(head) = self.next_head()? else { return Ok(None) };
        let chain = self.walk(head, direction, header_length, buffers)?;
        self.advance();
        Ok(Some(chain))
    }

    /// Where the next chain begins; None where the guest has made no more available.
    #[inline]
    pub(crate) fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if self.next_avail == self.avail_index && !self.read_avail_index()? {
            return Ok(None);
        }
        let slot = 2 + usize::from(self.next_avail & (self.size - 1));
        Ok(Some(u16::from_le(self.avail_field(slot).load(Ordering::Relaxed))))
    }

    /// Takes the chain that `next_head` told of.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Gives the last `count` taken chains back: they are taken again next time, by whoever runs the ring.
    pub fn untake(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_sub(count);
    }

    /// Reads how far the guest has got; false if it is no further than what was taken.
    fn read_avail_index(&mut self) -> Result<bool, RingError> {
        let index = u16::from_le(self.avail_field(1).load(Ordering::Acquire));
        if index.wrapping_sub(self.next_avail) > self.size {
            return Err(RingError::AvailIndex { index, next: self.next_avail, size: self.size });
        }
        self.avail_index = index;
        Ok(index != self.next_avail)
    }

    /// Follows the chain at `head` to its end and appends its buffers.
    pub(crate) fn walk(
        &self,
        head: u16,
        direction: Direction,
        header_length: usize,
        buffers: &mut Vec<libc::iovec>,
    ) -> Result<Chain, RingError> {
        let mut gathering = Gathering::new(self.writer.memory(), direction, buffers);
        let mut table = Table { start: self.descriptors, size: self.size.into() };
        let mut slots = 0;
        let mut indirect = false;
        let mut visited = 0;
        let mut index = head;
        loop {
            // A chain that visits more descriptors than its table has visits one twice.
            if visited == table.size {
                return Err(RingError::ChainLength { limit: table.size as usize });
            }
            visited += 1;
            slots += u16::from(!indirect);
            let descriptor = table.read(index)?;
            let [flags, next] = descriptor.tail;
            let has_next = flags & DESCRIPTOR_NEXT != 0;
            if flags & DESCRIPTOR_INDIRECT != 0 {
                // It may stand behind ordinary ones, but ends them (virtio 1.2, section 2.7.5.3.2).
                if indirect {
                    return Err(RingError::IndirectNested { index });
                }
                table = Table::indirect(index, &descriptor, has_next, self.features, self.writer.memory())?;
                (indirect, visited, index) = (true, 0, 0);
                continue;
            }
            gathering.push(index, &descriptor, flags)?;
            if !has_next {
                return gathering.chain(head, slots, header_length);
            }
            index = next;
        }
    }

    /// Completes a chain that was taken and not completed; the guest learns of it at `publish`.
    #[inline]
    pub fn complete(&mut self, chain: &Chain, written: u32) {
        self.complete_head(chain.id, written);
    }

    /// As `complete`, for the chain that begins at `head`.
    #[inline]
    pub(crate) fn complete_head(&mut self, head: u16, written: u32) {
        let slot = 2 + 4 * usize::from(self.next_used & (self.size - 1));
        // SAFETY: the element's two words lie before the last field of the used ring, aligned to 4 as the ring.
        unsafe { self.writer.store_element(self.used.add(slot).cast(), 2 * slot, [head.into(), written]) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the guest every completed chain.
    #[inline]
    pub fn publish(&mut self) {
        self.writer.flush();
        self.store(1, self.next_used, Ordering::Release);
    }

    /// Whether the guest wants a call for what was published since this was last asked.
    #[must_use]
    pub fn call_due(&mut self) -> bool {
        let called = std::mem::replace(&mut self.called_used, self.next_used);
        if std::mem::take(&mut self.call_forced) {
            return true;
        }
        let published = self.next_used.wrapping_sub(called);
        if published == 0 {
            return false;
        }
        // The guest first says where it wants a call, then looks at the used index; we the other way round. One
        // of the two then sees the other's write.
        fence(Ordering::SeqCst);
        if self.features.event_index {
            let used_event =
                u16::from_le(self.avail_field(2 + usize::from(self.size)).load(Ordering::Relaxed));
            self.next_used.wrapping_sub(used_event).wrapping_sub(1) < published
        } else {
            u16::from_le(self.avail_field(0).load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Asks the guest for a kick at the next chain; true if one came before it could know, and no kick may follow.
    ///
    /// # Errors
    /// The avail index cannot be.
    pub fn arm(&mut self) -> Result<bool, RingError> {
        if self.features.event_index {
            let avail_event = 2 + 4 * usize::from(self.size);
            self.store(avail_event, self.next_avail, Ordering::Relaxed);
        } else if !self.armed {
            self.store(0, 0, Ordering::Relaxed);
            self.armed = true;
        }
        // As in `call_due`, with the roles swapped.
        fence(Ordering::SeqCst);
        self.read_avail_index()
    }

    /// Tells the guest that kicks are not needed now. With the event index, an index left behind says that.
    pub fn disarm(&mut self) {
        if self.armed && !self.features.event_index {
            self.store(0, USED_NO_NOTIFY, Ordering::Relaxed);
            self.armed = false;
        }
    }
}

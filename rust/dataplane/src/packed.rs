//! One packed virtqueue, from the device's side (virtio 1.2, section 2.8).
//!
//! Owns:        the ring's positions, the strict reading of its chains, notification suppression both ways.
//! Never sees:  descriptors of the process, packets, threads.
//! Read next:   `ledger`, which remembers its position for a successor; `ring`, which makes one of this and `split`.
//!
//! Driver and device write to the same descriptors, in turns: two bits of each, compared with a counter that flips
//! with every lap, tell whose it is. Chains are completed in the order they are taken and none is held at a stop, so
//! one position says where the ring stands.

use std::sync::atomic::{fence, AtomicU16, Ordering};
use std::sync::Arc;

use crate::chain::{
    find_part, Chain, Descriptor, Direction, Features, Gathering, Layout, RingError, Table,
    CHAIN_BUFFERS_MAX, DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_SIZE, DESCRIPTOR_WRITE,
    RING_SIZE_MAX,
};
use crate::ledger::Slot;
use crate::log::{Area, RingLog};
use crate::memory::GuestMemory;
use crate::refusal::{Refusal, RefusalKind};
use crate::writer::Writer;

const DESCRIPTOR_AVAIL: u16 = 1 << 7;
const DESCRIPTOR_USED: u16 = 1 << 15;

/// Values of an event suppression's flags (section 2.8.14).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESCRIPTOR: u16 = 2;

/// Bytes of an event suppression.
const EVENT_LENGTH: usize = 4;

/// Where a device's turn is: an entry, and the lap as one bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// Where every ring begins (section 2.8.1).
    pub const START: Self = Self { index: 0, wrap: true };

    const WRAP: u16 = 1 << 15;

    /// As vhost-user and the event suppression write it: the wrap counter is bit 15.
    #[must_use]
    pub fn from_bits(bits: u16) -> Self {
        Self { index: bits & !Self::WRAP, wrap: bits & Self::WRAP != 0 }
    }

    #[must_use]
    pub fn bits(self) -> u16 {
        self.index | if self.wrap { Self::WRAP } else { 0 }
    }

    /// `slots` further on, at most a lap.
    #[inline]
    fn after(self, slots: u16, size: u16) -> Self {
        // Both are at most 2^15.
        match (u32::from(self.index) + u32::from(slots)).checked_sub(size.into()) {
            None => Self { index: self.index + slots, wrap: self.wrap },
            Some(index) => Self { index: index as u16, wrap: !self.wrap },
        }
    }

    /// `slots` back, at most a lap.
    fn before(self, slots: u16, size: u16) -> Self {
        let back = self.after(size - slots, size);
        Self { wrap: !back.wrap, ..back }
    }

    /// Slots from here to `other`, where an event may be up to two laps ahead.
    fn distance(self, other: Self, size: u16) -> u32 {
        let place = |position: Self| u32::from(position.index) + if position.wrap { 0 } else { size.into() };
        let laps = 2 * u32::from(size);
        (place(other) + laps - place(self)) % laps
    }
}

/// What tells the guest that one chain is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completion {
    /// The chain's first descriptor.
    pub(crate) position: Position,
    pub(crate) id: u16,
    pub(crate) written: u32,
}

/// A packed virtqueue. Chains are completed in the order they are taken.
///
/// It keeps the memory mapped that it lies in, and that the buffers it finds point into.
#[derive(Debug)]
pub struct PackedRing {
    writer: Writer,
    size: u16,
    features: Features,
    descriptors: *mut u8,
    driver_event: *mut u16,
    device_event: *mut u16,
    ledger: Option<Slot>,
    /// The first descriptor of the next chain to take.
    next_avail: Position,
    /// The first descriptor of the next chain to complete.
    next_used: Position,
    /// Slots between the two.
    taken: u16,
    /// What `publish` has to tell.
    completed: Vec<Completion>,
    /// Where the next chain to complete was at the last decision whether to call.
    called_used: Position,
    /// Slots used since then: a small ring may have gone round more than once.
    uncalled: u32,
    /// The next decision is yes, whatever the guest says.
    call_forced: bool,
    /// The guest was told to kick.
    armed: bool,
}

impl PackedRing {
    /// Finds the ring in guest memory and touches none of it.
    ///
    /// # Errors
    /// What is wrong with the layout.
    pub fn new(
        layout: &Layout,
        features: Features,
        memory: &Arc<GuestMemory>,
        ledger: Option<Slot>,
    ) -> Result<Self, Refusal> {
        // Unlike a split ring's, its size need not be a power of two.
        let size = u16::try_from(layout.size).ok().filter(|size| (1..=RING_SIZE_MAX).contains(size));
        let size = size.ok_or_else(|| {
            let text =
                format!("a packed ring has {} entries, it must have 1 to {RING_SIZE_MAX}", layout.size);
            Refusal::new(RefusalKind::Layout, text)
        })?;
        let length = DESCRIPTOR_SIZE * usize::from(size);
        let descriptors = find_part(memory, "descriptor ring", layout.descriptor_area, length, 16)?;
        let driver_event =
            find_part(memory, "driver event suppression", layout.driver_area, EVENT_LENGTH, 4)?;
        let device_event =
            find_part(memory, "device event suppression", layout.device_area, EVENT_LENGTH, 4)?;
        Ok(Self {
            writer: Writer::new(memory, (layout.descriptor_area, length), EVENT_LENGTH),
            size,
            features,
            descriptors,
            driver_event: driver_event.cast(),
            device_event: device_event.cast(),
            ledger,
            next_avail: Position::START,
            next_used: Position::START,
            taken: 0,
            completed: Vec::with_capacity(CHAIN_BUFFERS_MAX),
            called_used: Position::START,
            uncalled: 0,
            call_forced: false,
            armed: false,
        })
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
        let there = Self::new(layout, self.features, memory, None);
        there.is_ok_and(|there| {
            (there.descriptors, there.driver_event, there.device_event)
                == (self.descriptors, self.driver_event, self.device_event)
        })
    }

    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    fn place(&self, index: u16) -> *mut u8 {
        debug_assert!(index < self.size);
        // SAFETY: `new` found `size` descriptors, and no position's index reaches it.
        unsafe { self.descriptors.add(DESCRIPTOR_SIZE * usize::from(index)) }
    }

    fn flags(&self, index: u16) -> &AtomicU16 {
        // SAFETY: the last two bytes of a descriptor in guest memory, and descriptors are aligned to 16.
        unsafe { AtomicU16::from_ptr(self.place(index).add(14).cast()) }
    }

    /// A word of the driver's event suppression: position, flags.
    fn driver_word(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < 2);
        // SAFETY: `new` found two such words in guest memory, aligned.
        unsafe { AtomicU16::from_ptr(self.driver_event.add(offset)) }
    }

    /// Writes a word of the device's event suppression: position, flags.
    #[inline]
    fn store_event(&mut self, offset: usize, value: u16, order: Ordering) {
        debug_assert!(offset < 2);
        // SAFETY: `new` found two such words in guest memory, aligned.
        unsafe { self.writer.store(self.device_event.add(offset), 2 * offset, value, order) };
    }

    /// Starts at `position`, or where the ledger says that whoever ran the ring before was interrupted. `call`: the next
    /// decision whether to call is yes, whatever the guest says.
    ///
    /// # Errors
    /// There is no such position. The ring may not run.
    pub fn begin(&mut self, position: Option<u16>, call: bool) -> Result<(), RingError> {
        let position = match position {
            Some(bits) => self.checked(Position::from_bits(bits))?,
            None => self.recover()?,
        };
        if let Some(ledger) = &self.ledger {
            ledger.settle(position);
        }
        (self.next_avail, self.next_used, self.called_used) = (position, position, position);
        self.completed.clear();
        self.taken = 0;
        self.uncalled = 0;
        self.call_forced = call;
        self.armed = false;
        // Whoever ran the ring before may have died between a store and its mark.
        self.writer.mark_area(Area::Device);
        self.writer.mark_area(Area::Descriptors);
        Ok(())
    }

    /// Whether a ring of this size can stand at `position`.
    ///
    /// # Errors
    /// It cannot.
    pub fn check_position(&self, position: u16) -> Result<(), RingError> {
        self.checked(Position::from_bits(position)).map(drop)
    }

    fn checked(&self, position: Position) -> Result<Position, RingError> {
        if position.index >= self.size {
            return Err(RingError::Position { index: position.index, size: self.size });
        }
        Ok(position)
    }

    /// Where the ledger says that the ring goes on.
    ///
    /// # Errors
    /// It says nothing, or nothing that can be.
    pub fn position_in_ledger(&self) -> Result<Position, RingError> {
        let intent = self.ledger.as_ref().and_then(Slot::intent).ok_or(RingError::PositionUnknown)?;
        self.checked(intent.to)
    }

    /// Tells the guest what a process that died was about to tell it; gives where the ring goes on.
    ///
    /// # Errors
    /// The ledger says nothing, or nothing that can be.
    pub fn recover(&mut self) -> Result<Position, RingError> {
        let to = self.position_in_ledger()?;
        let (ledger, intent) = self
            .ledger
            .as_ref()
            .and_then(|ledger| Some((ledger, ledger.intent()?)))
            .ok_or(RingError::PositionUnknown)?;
        // The guest may have taken its buffers back and offered others in the same place, for the next lap: then the
        // used bit still stands as it was left.
        let from = self.checked(intent.from)?;
        let used = u16::from_le(self.flags(from.index).load(Ordering::Acquire)) & DESCRIPTOR_USED != 0;
        if intent.count != 0 && used != from.wrap {
            let completions = ledger.completions(intent.count)?;
            for completion in &completions {
                self.checked(completion.position)?;
            }
            let first = completions.first().map(|first| first.position);
            if first != Some(from) {
                return Err(RingError::LedgerMixed { from: from.bits() });
            }
            self.store_used(&completions);
            self.writer.flush();
        }
        Ok(to)
    }

    /// Where the ring would go on if the last taken chains, which have `slots` together, had not been taken.
    #[must_use]
    pub fn position_before(&self, slots: u16) -> u16 {
        self.next_avail.before(slots, self.size).bits()
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
        // What the driver wrote before it made the chain available is seen behind this.
        let flags = u16::from_le(self.flags(self.next_avail.index).load(Ordering::Acquire));
        // A whole lap behind the first chain that is not complete, a guest could only lie.
        if self.taken == self.size || !is_available(flags, self.next_avail.wrap) {
            return Ok(None);
        }
        let chain = self.walk(flags, direction, header_length, buffers)?;
        self.next_avail = self.next_avail.after(chain.slots, self.size);
        self.taken += chain.slots;
        Ok(Some(chain))
    }

    /// Gives the last taken chains, which have `slots` together, back: they are taken again next time.
    pub fn untake(&mut self, slots: u16) {
        self.taken -= slots;
        self.next_avail = self.next_avail.before(slots, self.size);
    }

    /// Follows the chain that begins at the next available descriptor, whose flags were read.
    fn walk(
        &self,
        mut flags: u16,
        direction: Direction,
        header_length: usize,
        buffers: &mut Vec<libc::iovec>,
    ) -> Result<Chain, RingError> {
        let mut gathering = Gathering::new(self.writer.memory(), direction, buffers);
        let mut position = self.next_avail;
        let mut slots = 1;
        loop {
            let index = position.index;
            // SAFETY: `place` leads to a descriptor in guest memory.
            let descriptor = unsafe { Descriptor::read(self.place(index)) };
            let id = descriptor.tail[0];
            let has_next = flags & DESCRIPTOR_NEXT != 0;
            if flags & DESCRIPTOR_INDIRECT != 0 {
                // Unlike in a split ring it stands alone (section 2.8.19).
                if slots > 1 {
                    return Err(RingError::IndirectInChain { index });
                }
                let table =
                    Table::indirect(index, &descriptor, has_next, self.features, self.writer.memory())?;
                walk_indirect(&table, &mut gathering)?;
                return gathering.chain(id, slots, header_length);
            }
            gathering.push(index, &descriptor, flags)?;
            if !has_next {
                return gathering.chain(id, slots, header_length);
            }
            if self.taken + slots == self.size {
                return Err(RingError::ChainLength { limit: self.size.into() });
            }
            slots += 1;
            position = position.after(1, self.size);
            flags = u16::from_le(self.flags(position.index).load(Ordering::Relaxed));
            if !is_available(flags, position.wrap) {
                return Err(RingError::NotAvailable { index: position.index });
            }
        }
    }

    /// Completes the oldest chain that was taken and not completed; the guest learns of it at `publish`.
    #[inline]
    pub fn complete(&mut self, chain: &Chain, written: u32) {
        self.completed.push(Completion { position: self.next_used, id: chain.id, written });
        self.next_used = self.next_used.after(chain.slots, self.size);
        self.taken -= chain.slots;
        self.uncalled = self.uncalled.saturating_add(chain.slots.into());
    }

    /// Shows the guest every completed chain: all of them at once, and whatever becomes of this process.
    #[inline]
    pub fn publish(&mut self) {
        let Some(first) = self.completed.first() else { return };
        if let Some(ledger) = &self.ledger {
            ledger.intend(first.position, self.next_used, &self.completed);
        }
        self.writer.flush();
        let mut completed = std::mem::take(&mut self.completed);
        self.store_used(&completed);
        completed.clear();
        self.completed = completed; // with its room
    }

    /// Marks chains used, the first of them last: the guest looks at none behind it before.
    #[inline]
    fn store_used(&mut self, completions: &[Completion]) {
        let Some((first, others)) = completions.split_first() else { return };
        for Completion { position, id, written } in others.iter().chain([first]) {
            let place = self.place(position.index);
            let offset = DESCRIPTOR_SIZE * usize::from(position.index);
            let lap = if position.wrap { DESCRIPTOR_AVAIL | DESCRIPTOR_USED } else { 0 };
            // The length means something only with this flag (section 2.8.5).
            let write = if *written > 0 { DESCRIPTOR_WRITE } else { 0 };
            // SAFETY: `place` leads to a descriptor in guest memory, and descriptors are aligned to 16.
            unsafe { self.writer.store_descriptor(place, offset, *written, *id, lap | write) };
        }
    }

    /// Whether the guest wants a call for what was published since this was last asked.
    #[must_use]
    pub fn call_due(&mut self) -> bool {
        let called = std::mem::replace(&mut self.called_used, self.next_used);
        let published = std::mem::take(&mut self.uncalled);
        if std::mem::take(&mut self.call_forced) {
            return true;
        }
        if published == 0 {
            return false;
        }
        // The guest first says where it wants a call, then looks at the descriptor; we the other way round. One of
        // the two then sees the other's write.
        fence(Ordering::SeqCst);
        // The guest writes the position, then the flags that make it count.
        match u16::from_le(self.driver_word(1).load(Ordering::Acquire)) {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if self.features.event_index => {
                let event = Position::from_bits(u16::from_le(self.driver_word(0).load(Ordering::Relaxed)));
                // What is nowhere in the ring cannot be waited for.
                event.index >= self.size || called.distance(event, self.size) < published
            }
            _ => true,
        }
    }

    /// Asks the guest for a kick at the next chain; true if one came before it could know, and no kick may follow.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        if self.features.event_index {
            self.store_event(0, self.next_avail.bits(), Ordering::Relaxed);
            self.store_event(1, EVENT_DESCRIPTOR, Ordering::Release);
        } else if !self.armed {
            self.store_event(1, EVENT_ENABLE, Ordering::Relaxed);
        }
        self.armed = true;
        // As in `call_due`, with the roles swapped.
        fence(Ordering::SeqCst);
        let flags = u16::from_le(self.flags(self.next_avail.index).load(Ordering::Relaxed));
        is_available(flags, self.next_avail.wrap)
    }

    /// Tells the guest that kicks are not needed now. An event left behind would count again two laps later.
    pub fn disarm(&mut self) {
        if self.armed {
            self.store_event(1, EVENT_DISABLE, Ordering::Relaxed);
            self.armed = false;
        }
    }
}

/// Whether the driver made a descriptor available in the lap of `wrap` (section 2.8.1).
#[inline]
fn is_available(flags: u16, wrap: bool) -> bool {
    (flags & DESCRIPTOR_AVAIL != 0) == wrap && (flags & DESCRIPTOR_USED != 0) != wrap
}

/// All descriptors of an indirect table, in their order. Of their flags only the direction counts, and a driver may
/// not make them indirect (section 2.8.19).
fn walk_indirect(table: &Table, gathering: &mut Gathering<'_>) -> Result<(), RingError> {
    for index in 0..table.size {
        // A table may have more descriptors than a chain buffers; the first one too many ends it.
        let index = u16::try_from(index).map_err(|_| RingError::ChainLength { limit: CHAIN_BUFFERS_MAX })?;
        let descriptor = table.read(index)?;
        let flags = descriptor.tail[1];
        if flags & DESCRIPTOR_INDIRECT != 0 {
            return Err(RingError::IndirectNested { index });
        }
        gathering.push(index, &descriptor, flags)?;
    }
    Ok(())
}

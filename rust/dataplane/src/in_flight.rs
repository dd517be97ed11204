//! The in-flight file: which chains of split rings a device has taken and not completed, in memory that outlives
//! whoever serves them.
//!
//! Owns:        an entry for each descriptor of each ring, the order of the stores, what a successor makes of them.
//! Never sees:  guest memory; who serves a ring.
//! Read next:   `callback`, which writes an entry with each step and reads all of them when it starts; `word_file`, which
//!              has the file.
//!
//! An entry is one word, so that each step is one store:
//!
//! ```text
//! 0                                  the descriptor begins no chain that is in flight
//! order                              it does; chains were taken in this order
//! order, COMPLETING, used index      the guest is about to be told, by the used ring's element at that index
//! ```
//!
//! Taking a chain is one store, because nothing else says how many were taken: the available ring goes on at the used
//! index and as many as are in flight. Completing one is four:
//!
//! ```text
//! entry:   order, COMPLETING, used index     step 1
//! guest:   the used element                  step 2
//! guest:   the used index, one more          step 3: the guest knows
//! entry:   0                                 step 4
//! ```
//!
//! A process that is killed leaves a prefix of its stores. A successor compares an entry that is COMPLETING with the used
//! index in guest memory: where that is still the same, the guest knows nothing, and the chain is in flight; where it is one
//! more, step 4 is made up for. Only one chain of a ring is completed at a time, so there is no third case, except in a file
//! or a ring that somebody spoilt: that ring fails.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::chain::{RingError, RING_SIZE_MAX};
use crate::word_file::{WordFile, WordFileError};

/// The ring's size, and its entries. Of 256 KiB a ring touches what its size needs.
const SLOT_WORDS: usize = 1 + RING_SIZE_MAX as usize;

/// Rings a file may have: as many as vhost-user has numbers for.
pub(crate) const RING_COUNT_MAX: usize = 256;

/// The guest is about to be told.
const COMPLETING: u64 = 1 << 47;

/// Where in an entry the used index stands.
const USED_SHIFT: u32 = 48;

/// The last place in order. A million chains a second get there after four years.
const ORDER_MAX: u64 = COMPLETING - 1;

/// The file, mapped. Unmapped when dropped.
#[derive(Debug)]
pub struct InFlight {
    file: WordFile,
    ring_count: usize,
}

impl InFlight {
    /// A new file for `ring_count` rings, 1 to 256: nothing is in flight. It costs memory only where rings write.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn create(ring_count: usize) -> Result<OwnedFd, WordFileError> {
        check_count(ring_count)?;
        WordFile::create("in-flight file", c"chains-in-flight", SLOT_WORDS * ring_count)
    }

    /// Maps a file that `create` made, here or in another process. `fd` is only used during the call.
    ///
    /// # Errors
    /// It is none for as many rings, or the kernel refused.
    pub fn map(fd: RawFd, ring_count: usize) -> Result<Arc<Self>, WordFileError> {
        check_count(ring_count)?;
        Ok(Arc::new(Self { file: WordFile::map("in-flight file", fd, ring_count, SLOT_WORDS)?, ring_count }))
    }

    /// A driver set ring `index` up again: nothing of it is in flight any more. False where the file has no such ring. Only for
    /// whoever may run the ring, and while it does not run.
    pub fn forget(self: &Arc<Self>, index: usize) -> bool {
        self.slot(index).map(|slot| slot.forget()).is_some()
    }

    /// The part of ring `index`; None where the file has none.
    #[must_use]
    pub fn slot(self: &Arc<Self>, index: usize) -> Option<Slot> {
        (index < self.ring_count).then(|| Slot { in_flight: Arc::clone(self), start: index * SLOT_WORDS })
    }
}

fn check_count(ring_count: usize) -> Result<(), WordFileError> {
    if (1..=RING_COUNT_MAX).contains(&ring_count) {
        return Ok(());
    }
    let reason = format!("in-flight file: is for {ring_count} rings, must be for 1 to {RING_COUNT_MAX}");
    Err(WordFileError::Invalid(reason))
}

/// A chain in flight, as the file tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parked {
    /// Chains were taken in this order.
    pub(crate) order: u64,
    pub(crate) head: u16,
}

/// One ring's part of the file. Only whoever serves the ring writes to it.
#[derive(Clone, Debug)]
pub struct Slot {
    in_flight: Arc<InFlight>,
    start: usize,
}

impl Slot {
    /// Whether it is the same ring's part of the same mapping.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.in_flight, &other.in_flight) && self.start == other.start
    }

    /// The size of the ring that the entries are about; 0 where nothing was ever in flight.
    fn size(&self) -> &AtomicU64 {
        self.in_flight.file.word(self.start)
    }

    fn entry(&self, head: u16) -> &AtomicU64 {
        assert!(head < RING_SIZE_MAX);
        self.in_flight.file.word(self.start + 1 + usize::from(head))
    }

    /// Whether a chain that begins at this descriptor is in flight.
    pub(crate) fn has(&self, head: u16) -> bool {
        self.entry(head).load(Ordering::Relaxed) != 0
    }

    /// How many chains of a ring of `size` entries are in flight, whatever they look like.
    pub(crate) fn count(&self, size: u16) -> u16 {
        if self.size().load(Ordering::Acquire) == 0 {
            return 0;
        }
        let count = (0..size).filter(|head| self.has(*head)).count();
        u16::try_from(count).expect("no more than the ring has entries")
    }

    /// A chain is in flight from now on.
    ///
    /// # Errors
    /// There is no further place in order. Nothing changed.
    pub(crate) fn take(&self, parked: Parked) -> Result<(), RingError> {
        let Parked { order, head } = parked;
        if order > ORDER_MAX {
            return Err(RingError::InFlightEntry { head, entry: order });
        }
        self.entry(head).store(order, Ordering::Release);
        Ok(())
    }

    /// The guest is about to be told of a chain in flight, by the used ring's element at `used`.
    pub(crate) fn begin_completion(&self, parked: Parked, used: u16) {
        let entry = parked.order | COMPLETING | u64::from(used) << USED_SHIFT;
        self.entry(parked.head).store(entry, Ordering::Release);
    }

    /// The guest was told of a chain: it is in flight no more.
    pub(crate) fn end_completion(&self, head: u16) {
        // Behind all that the guest was told.
        self.entry(head).store(0, Ordering::Release);
    }

    /// What is in flight of a ring of `size` entries whose used index is `used`, in order. What a process that died was
    /// about to write here is written.
    ///
    /// # Errors
    /// The file says what cannot be.
    pub(crate) fn recover(&self, size: u16, used: u16) -> Result<Vec<Parked>, RingError> {
        let found = self.size().load(Ordering::Acquire);
        if found != u64::from(size) {
            if found != 0 {
                return Err(RingError::InFlightSize { found, size });
            }
            // Of a fresh part every entry is 0.
            self.size().store(size.into(), Ordering::Release);
        }
        let mut all = Vec::new();
        let mut completing = None;
        for head in 0..size {
            let entry = self.entry(head).load(Ordering::Acquire);
            if entry == 0 {
                continue;
            }
            let order = entry & ORDER_MAX;
            let told = (entry >> USED_SHIFT) as u16;
            let is_completing = entry & COMPLETING != 0;
            if order == 0 || !is_completing && told != 0 || is_completing && completing.is_some() {
                return Err(RingError::InFlightEntry { head, entry });
            }
            let parked = Parked { order, head };
            if is_completing {
                completing = Some(parked);
                match used.wrapping_sub(told) {
                    0 => {}
                    1 => continue,
                    _ => return Err(RingError::InFlightUsed { head, told, used }),
                }
            }
            all.push(parked);
        }
        all.sort_unstable_by_key(|parked| parked.order);
        if let Some(pair) = all.windows(2).find(|pair| pair[0].order == pair[1].order) {
            return Err(RingError::InFlightOrder { head: pair[0].head, other: pair[1].head });
        }
        if let Some(parked) = completing {
            if all.contains(&parked) {
                self.entry(parked.head).store(parked.order, Ordering::Release);
            } else {
                self.end_completion(parked.head);
            }
        }
        Ok(all)
    }

    /// Nothing is in flight any more, and the ring's size may be another from now on.
    fn forget(&self) {
        let size = self.size().load(Ordering::Acquire).min(RING_SIZE_MAX.into());
        for head in (0..size as u16).filter(|head| self.has(*head)) {
            self.end_completion(head);
        }
        self.size().store(0, Ordering::Release);
    }
}

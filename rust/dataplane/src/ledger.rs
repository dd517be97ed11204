//! The ledger: where packed rings stand, in memory that outlives whoever runs them.
//!
//! Owns:        a slot for each ring, the order of the stores.
//! Never sees:  guest memory; who runs a ring.
//! Read next:   `packed`, which writes a slot before it tells the guest, and reads it after a death; `word_file`, which
//!              has the file.
//!
//! A split ring has its used index in guest memory. In a packed ring used descriptors are told from others only by
//! one who knows the lap, and chains have several descriptors of which only the first is marked. So before anything
//! is told to the guest, the ring writes down what it is about to tell:
//!
//! ```text
//! log:     each used descriptor of the batch            step 1
//! intent:  from, to, how many                           step 2: one store; the log counts from here on
//! guest:   the used descriptors, the first one last     step 3: its flags are one store, and end the batch
//! ```
//!
//! A process that is killed leaves a prefix of its stores. Killed before step 2, the intent is the previous batch's,
//! which was told whole, and the ring stands at its end. Killed behind it, the first descriptor says whether step 3
//! ended; where it did not, a successor does it (again), from the log. Either way the ring goes on at `to`.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::chain::{RingError, CHAIN_BUFFERS_MAX};
use crate::packed::{Completion, Position};
use crate::word_file::{WordFile, WordFileError};

/// Used descriptors a batch may have: a frame has no more chains than a read has buffers.
const LOG_LENGTH: usize = CHAIN_BUFFERS_MAX;

/// The intent and the log: two pages, of which a ring that merges few buffers touches one.
const SLOT_WORDS: usize = 1 + LOG_LENGTH;

/// Rings a ledger may have: as many as vhost-user has numbers for.
const RING_COUNT_MAX: usize = 256;

/// The intent was written: no other bit of it tells a slot from one that never was.
const WRITTEN: u64 = 1 << 63;

/// A ledger, mapped. Unmapped when dropped.
#[derive(Debug)]
pub struct Ledger {
    file: WordFile,
    ring_count: usize,
}

impl Ledger {
    /// A new file for `ring_count` rings, at most 256. It costs memory only where rings write.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn create(ring_count: usize) -> Result<OwnedFd, WordFileError> {
        assert!((1..=RING_COUNT_MAX).contains(&ring_count), "{ring_count} rings");
        WordFile::create("ledger", c"packed-ring-ledger", SLOT_WORDS * ring_count)
    }

    /// Maps a file that `create` made, here or in another process. `fd` is only used during the call.
    ///
    /// # Errors
    /// It is none for as many rings, or the kernel refused.
    pub fn map(fd: RawFd, ring_count: usize) -> Result<Arc<Self>, WordFileError> {
        Ok(Arc::new(Self { file: WordFile::map("ledger", fd, ring_count, SLOT_WORDS)?, ring_count }))
    }

    /// The slot of ring `index`; None where the ledger has none.
    #[must_use]
    pub fn slot(self: &Arc<Self>, index: usize) -> Option<Slot> {
        (index < self.ring_count).then(|| Slot { ledger: Arc::clone(self), start: index * SLOT_WORDS })
    }
}

/// What a ring was about to tell, as it was found: untrusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Intent {
    pub(crate) from: Position,
    pub(crate) to: Position,
    pub(crate) count: u16,
}

/// One ring's part of a ledger.
#[derive(Clone, Debug)]
pub struct Slot {
    ledger: Arc<Ledger>,
    start: usize,
}

impl Slot {
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset < SLOT_WORDS);
        self.ledger.file.word(self.start + offset)
    }

    fn store_intent(&self, from: Position, to: Position, count: u16) {
        let word = u64::from(from.bits()) | u64::from(to.bits()) << 16 | u64::from(count) << 32 | WRITTEN;
        // Behind all that was told before, and behind the log.
        self.word(0).store(word, Ordering::Release);
    }

    /// The ring stands at `position`, and nothing is being told.
    pub fn settle(&self, position: Position) {
        self.store_intent(position, position, 0);
    }

    /// The ring is about to tell of `completions`, which lie between `from` and `to`.
    #[inline]
    pub(crate) fn intend(&self, from: Position, to: Position, completions: &[Completion]) {
        for (offset, completion) in completions.iter().enumerate() {
            let Completion { position, id, written } = *completion;
            let word = u64::from(position.bits()) | u64::from(id) << 16 | u64::from(written) << 32;
            self.word(1 + offset).store(word, Ordering::Relaxed);
        }
        self.store_intent(from, to, u16::try_from(completions.len()).expect("no more than the log has"));
    }

    /// What was written last; None where nothing was.
    pub(crate) fn intent(&self) -> Option<Intent> {
        let word = self.word(0).load(Ordering::Acquire);
        (word & WRITTEN != 0).then(|| Intent {
            from: Position::from_bits((word & 0xffff) as u16),
            to: Position::from_bits((word >> 16 & 0xffff) as u16),
            count: (word >> 32 & 0xffff) as u16,
        })
    }

    /// The first `count` entries of the log.
    pub(crate) fn completions(&self, count: u16) -> Result<Vec<Completion>, RingError> {
        if usize::from(count) > LOG_LENGTH {
            return Err(RingError::LedgerLength { count });
        }
        let read = |offset| {
            let word = self.word(1 + usize::from(offset)).load(Ordering::Relaxed);
            Completion {
                position: Position::from_bits((word & 0xffff) as u16),
                id: (word >> 16 & 0xffff) as u16,
                written: (word >> 32) as u32,
            }
        };
        Ok((0..count).map(read).collect())
    }
}

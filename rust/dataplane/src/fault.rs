//! What happens when memory that a frontend shares cannot be accessed any more: SIGBUS.
//!
//! Owns:        the process's SIGBUS handler, the registry of mappings it may repair.
//! Never sees:  what a mapping is for.
//! Read next:   `memory`, which registers its mappings and tells the rings on them when one is lost.
//!
//! A frontend may shrink its memory file while we have it mapped, and a file system may have no page to give. Touching
//! such a page raises SIGBUS, which ends a process that does not handle it, and with it every other guest. The
//! handler puts empty pages in the place of the whole mapping and marks it lost: the access that faulted finds zeros,
//! and whoever works there looks at the mark and gives up. A SIGBUS that is not about a registered mapping goes to
//! whoever handled it before, so a crash stays a crash.
//!
//! The handler may run on any thread, in the middle of anything: it takes no lock and allocates nothing. It walks blocks
//! of atomics that are never freed. A slot is written only while its mapping is not accessed, so the slot of the mapping
//! that faulted stands still, and another slot that changes meanwhile is recognised by its start.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

/// Mappings a block holds. A guest has a few, so most daemons stay with a handful of blocks.
const BLOCK_SLOTS: usize = 64;

/// One mapping, or none: then it starts at `NOWHERE` and has no length.
struct Slot {
    start: AtomicUsize,
    length: AtomicUsize,
    lost: AtomicBool,
}

const NOWHERE: usize = usize::MAX;

impl Slot {
    const fn empty() -> Self {
        Self { start: AtomicUsize::new(NOWHERE), length: AtomicUsize::new(0), lost: AtomicBool::new(false) }
    }

    /// The mark first: who sees the number of losses change finds it.
    fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        LOSSES.fetch_add(1, Ordering::SeqCst);
    }

    /// Where the mapping is, if `address` is inside.
    fn range_around(&self, address: usize) -> Option<(usize, usize)> {
        let start = self.start.load(Ordering::SeqCst);
        let length = self.length.load(Ordering::SeqCst);
        // A slot that was emptied and filled in between has another start, or the same one: then this is its length.
        let whole = self.start.load(Ordering::SeqCst) == start;
        (whole && address.checked_sub(start)? < length).then_some((start, length))
    }
}

struct Block {
    slots: [Slot; BLOCK_SLOTS],
    next: AtomicPtr<Block>,
}

/// The newest block; each leads to the one before it.
static BLOCKS: AtomicPtr<Block> = AtomicPtr::new(ptr::null_mut());

/// How many mappings of this process were lost, ever.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// A number of losses that is never reached.
pub(crate) const NEVER: u64 = u64::MAX;

/// How many mappings of this process were lost so far: while it stays the same, no further one was.
#[inline]
pub(crate) fn losses() -> u64 {
    LOSSES.load(Ordering::Acquire)
}

/// Slots that hold no mapping.
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

/// Who handled SIGBUS before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

fn blocks() -> impl Iterator<Item = &'static Block> {
    // SAFETY: a block is complete before it is linked, and is never freed.
    let block = |place: &AtomicPtr<Block>| unsafe { place.load(Ordering::Acquire).as_ref::<'static>() };
    std::iter::successors(block(&BLOCKS), move |last| block(&last.next))
}

/// A mapping that survives the loss of its pages, for as long as this lives.
pub(crate) struct Watch {
    slot: &'static Slot,
}

impl Watch {
    /// Watches a mapping of whole pages. Nobody may access it before, or after the watch is dropped.
    pub(crate) fn new(start: *mut u8, length: usize) -> Self {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(install);
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            let next = AtomicPtr::new(BLOCKS.load(Ordering::Acquire));
            let block = Box::leak(Box::new(Block { slots: [const { Slot::empty() }; BLOCK_SLOTS], next }));
            BLOCKS.store(block, Ordering::Release);
            free.extend(&block.slots);
        }
        let slot = free.pop().expect("a new block has free slots");
        slot.lost.store(false, Ordering::SeqCst);
        slot.length.store(length, Ordering::SeqCst);
        slot.start.store(start.addr(), Ordering::SeqCst);
        Self { slot }
    }

    /// Whether the mapping cannot be trusted any more: what is read there may be zeros.
    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        self.slot.lost.load(Ordering::Acquire)
    }

    /// Marks it lost for another reason, without touching it.
    pub(crate) fn lose(&self) {
        self.slot.lose();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.slot.start.store(NOWHERE, Ordering::SeqCst);
        self.slot.length.store(0, Ordering::SeqCst);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot);
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("is_lost", &self.is_lost()).finish()
    }
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid one: the default action.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks; `previous` is valid for writing.
    unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut previous) };
    // Known before the handler can run.
    PREVIOUS.get_or_init(|| previous);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    // On the alternate stack where a thread has one: the previous handler may be one for stack overflows.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `handle` does only what a signal handler may, and has the type that SA_SIGINFO asks for. SIGBUS can
    // always be handled, so this does not fail.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo; errno is this thread's own.
    let (code, address, errno) =
        unsafe { ((*info).si_code, (*info).si_addr().addr(), *libc::__errno_location()) };
    // Codes above 0 are the kernel's: a fault at an address. Others were sent by a process.
    let repaired = code > 0 && repair(address);
    // SAFETY: as above. What was interrupted must find its errno.
    unsafe { *libc::__errno_location() = errno };
    if !repaired {
        pass_on(signal, code, info, context);
    }
}

/// Puts empty pages in the place of the mapping around `address`, and marks it; false if there is none.
fn repair(address: usize) -> bool {
    for slot in blocks().flat_map(|block| &block.slots) {
        let Some((start, length)) = slot.range_around(address) else { continue };
        // Marked first: who finds zeros finds the mark as well.
        slot.lose();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // The whole mapping: a part of a huge page cannot be replaced, and every further page would fault as well.
        // SAFETY: the range is a mapping whose owner lives, because somebody accesses it just now; afterwards it is
        // mapped as before, readable and writable.
        let host = unsafe { libc::mmap(start as *mut libc::c_void, length, protection, flags, -1, 0) };
        // Where the kernel has no memory for that, the fault is what it was.
        return host != libc::MAP_FAILED;
    }
    false
}

/// Does what would have been done without this module.
fn pass_on(signal: libc::c_int, code: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get().expect("known before the handler is installed");
    match previous.sa_sigaction {
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: an all-zero sigaction is the default action. The instruction that faulted faults again after
            // the return and ends the process; what was sent is sent again.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, ptr::null_mut());
                if code <= 0 {
                    libc::raise(signal);
                }
            }
        }
        // SAFETY: the kernel would have called this function in just this way.
        function if previous.sa_flags & libc::SA_SIGINFO != 0 => unsafe {
            let function: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(function);
            function(signal, info, context);
        },
        // SAFETY: as above.
        function => unsafe {
            let function: extern "C" fn(libc::c_int) = std::mem::transmute(function);
            function(signal);
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that nobody has mapped readable, so that only its place matters.
    fn watch(page: usize) -> Watch {
        Watch::new(ptr::without_provenance_mut(page * 4096), 4096)
    }

    fn holder(address: usize) -> Option<(usize, usize)> {
        blocks().flat_map(|block| &block.slots).find_map(|slot| slot.range_around(address))
    }

    #[test]
    fn a_mapping_is_found_by_every_address_inside_until_it_is_gone() {
        // More than a block holds, in a range that no other test uses.
        let watches: Vec<_> = (0..3 * BLOCK_SLOTS).map(|index| watch(16 + 2 * index)).collect();
        for index in 0..watches.len() {
            let start = (16 + 2 * index) * 4096;
            assert_eq!(holder(start - 1), None);
            assert_eq!(holder(start), Some((start, 4096)));
            assert_eq!(holder(start + 4095), Some((start, 4096)));
            assert_eq!(holder(start + 4096), None);
        }
        drop(watches);
        assert!((0..3 * BLOCK_SLOTS).all(|index| holder((16 + 2 * index) * 4096).is_none()));
    }

    #[test]
    fn a_slot_that_is_used_again_is_not_lost() {
        let first = watch(2);
        first.lose();
        assert!(first.is_lost());
        drop(first);
        assert!(!watch(2).is_lost());
    }
}

//! A ring's walk, step by step: what must hold at each, whatever its guest writes. Whoever draws the steps includes this.
#![allow(dead_code)] // each user needs a part

use std::collections::BTreeSet;
use std::sync::Arc;

use dataplane::chain::{Chain, Direction, CHAIN_BUFFERS_MAX};
use dataplane::memory::GuestMemory;
use dataplane::packed::PackedRing;
use dataplane::split::SplitRing;

use crate::common::{memfd, region};
use crate::dirty::pages_of;

/// Three regions: two that touch, and one behind a gap.
pub const REGIONS: [(u64, u64); 3] = [(0x1_0000, 0x4000), (0x1_4000, 0x4000), (0x2_0000, 0x8000)];

/// The two rings lie in the regions that touch, at distances that leave room for more entries than there are.
pub const RX_RING: u64 = 0x1_0000;
pub const TX_RING: u64 = 0x1_4000;
pub const DRIVER_AREA: u64 = 0x1000;
pub const DEVICE_AREA: u64 = 0x2000;
pub const ENTRIES_MAX: u16 = 64;
pub const HEADER: usize = 12;

pub fn memory() -> Arc<GuestMemory> {
    let fd = memfd(REGIONS.iter().map(|(_, size)| size).sum());
    let mut offset = 0;
    let specs = REGIONS.map(|(start, size)| {
        offset += size;
        region(&fd, start, size, offset - size)
    });
    Arc::new(GuestMemory::new(&specs).unwrap())
}

pub fn holds(memory: &GuestMemory, buffer: &libc::iovec) -> bool {
    let start = buffer.iov_base.addr();
    REGIONS.iter().any(|&(address, size)| {
        let host = memory.host_exact(address, size as usize).unwrap().addr();
        (host..host + size as usize).contains(&start) && buffer.iov_len <= host + size as usize - start
    })
}

/// Which way packets go on the ring at `address`.
pub fn direction(address: u64) -> Direction {
    if address == RX_RING {
        Direction::ToGuest
    } else {
        Direction::FromGuest
    }
}

/// Something a guest writes: where, and what.
#[derive(Clone, Debug)]
pub struct Write {
    pub address: u64,
    pub data: Vec<u8>,
}

impl Write {
    pub fn make(&self, memory: &GuestMemory) {
        let _ = memory.write(self.address, &self.data);
    }
}

/// The pages that a guest writes itself in these steps.
pub fn guests_pages(steps: &[Step]) -> BTreeSet<u64> {
    let pages = |step: &Step| match step {
        Step::Write(write) => Some(pages_of(write.address, write.data.len())),
        _ => None,
    };
    steps.iter().filter_map(pages).flatten().collect()
}

/// What happens to a ring next.
#[derive(Clone, Debug)]
pub enum Step {
    Take,
    /// The oldest chain that was taken.
    Complete {
        written: u32,
    },
    /// The newest ones that were taken.
    Untake {
        count: usize,
    },
    Publish,
    Call,
    Arm,
    Disarm,
    /// By the guest, meanwhile.
    Write(Write),
}

/// Checks a chain that was taken with its buffers.
fn check_chain(chain: &Chain, buffers: &[libc::iovec]) {
    assert_eq!(chain.buffers, buffers.len());
    assert!(chain.buffers <= CHAIN_BUFFERS_MAX);
    let length: usize = buffers.iter().map(|buffer| buffer.iov_len).sum();
    assert_eq!(chain.length, length as u64);
    assert!(length >= HEADER);
}

fn check_buffers(memory: &GuestMemory, buffers: &[libc::iovec]) {
    assert!(buffers.iter().all(|buffer| buffer.iov_len > 0 && holds(memory, buffer)));
}

pub fn held(taken: &[Chain]) -> u16 {
    taken.iter().map(|chain| chain.slots).sum()
}

/// Walks a split ring that has begun.
pub fn walk_split(ring: &mut SplitRing, memory: &GuestMemory, direction: Direction, steps: &[Step]) {
    let mut taken: Vec<Chain> = Vec::new();
    let mut buffers = Vec::new();
    for step in steps {
        match step {
            Step::Take => {
                buffers.clear();
                let position = ring.next_avail();
                if let Ok(Some(chain)) = ring.take(direction, HEADER, &mut buffers) {
                    check_chain(&chain, &buffers);
                    assert!(chain.slots <= ring.size());
                    assert_eq!(ring.next_avail(), position.wrapping_add(1));
                    taken.push(chain);
                } else {
                    assert_eq!(ring.next_avail(), position);
                }
                // Also those of a chain that turned out wrong further on.
                check_buffers(memory, &buffers);
            }
            Step::Complete { written } => {
                if !taken.is_empty() {
                    ring.complete(&taken.remove(0), *written);
                }
            }
            Step::Untake { count } => {
                let count = (*count).min(taken.len());
                taken.truncate(taken.len() - count);
                ring.untake(count as u16);
            }
            Step::Publish => ring.publish(),
            Step::Call => drop(ring.call_due()),
            Step::Arm => drop(ring.arm()),
            Step::Disarm => ring.disarm(),
            Step::Write(write) => write.make(memory),
        }
    }
    ring.flush_log();
}

/// Walks a packed ring that has begun; gives the position where a successor has to go on.
pub fn walk_packed(ring: &mut PackedRing, memory: &GuestMemory, direction: Direction, steps: &[Step]) -> u16 {
    let mut taken: Vec<Chain> = Vec::new();
    let mut buffers = Vec::new();
    for step in steps {
        match step {
            Step::Take => {
                buffers.clear();
                let position = ring.position_before(0);
                if let Ok(Some(chain)) = ring.take(direction, HEADER, &mut buffers) {
                    check_chain(&chain, &buffers);
                    assert_eq!(ring.position_before(chain.slots), position);
                    taken.push(chain);
                    assert!(held(&taken) <= ring.size(), "never more than a lap");
                } else {
                    assert_eq!(ring.position_before(0), position);
                }
                // Also those of a chain that turned out wrong further on.
                check_buffers(memory, &buffers);
            }
            Step::Complete { written } => {
                if !taken.is_empty() {
                    ring.complete(&taken.remove(0), *written);
                }
            }
            Step::Untake { count } => {
                let given_back = taken.split_off(taken.len() - (*count).min(taken.len()));
                ring.untake(held(&given_back));
            }
            Step::Publish => ring.publish(),
            Step::Call => drop(ring.call_due()),
            Step::Arm => drop(ring.arm()),
            Step::Disarm => ring.disarm(),
            Step::Write(write) => write.make(memory),
        }
    }
    ring.publish();
    ring.flush_log();
    ring.position_before(held(&taken))
}

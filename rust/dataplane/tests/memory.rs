//! Guest memory: what a frontend may announce, and what it may not.

mod common;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use common::{is_mapped, memfd, region, truncate, PATIENCE};
use proptest::collection::vec;
use proptest::prelude::*;

use dataplane::memory::{AccessError, GuestMemory, Lost, MemoryError, RegionSpec};

const START: u64 = 0x10_0000;

fn refusal(specs: &[RegionSpec]) -> String {
    match GuestMemory::new(specs) {
        Err(MemoryError::Invalid(reason)) => reason,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn regions_are_found_at_their_offsets_by_guest_and_by_user_address() {
    let fd = memfd(0x4000);
    let specs = [region(&fd, 0, 0x1000, 0x1000), region(&fd, START, 0x2000, 0x2000)];
    let memory = GuestMemory::new(&specs).unwrap();
    let whole = GuestMemory::new(&[region(&fd, 0, 0x4000, 0)]).unwrap();
    memory.write(START + 0xfff, b"across").unwrap();
    let mut found = [0; 6];
    whole.read(0x2fff, &mut found).unwrap();
    assert_eq!(&found, b"across");
}

#[test]
fn nothing_outside_is_read_or_written() {
    let fd = memfd(0x1000);
    let memory = GuestMemory::new(&[region(&fd, START, 0x1000, 0)]).unwrap();
    for address in [START - 1, START + 0xfff, START + 0x1000, u64::MAX] {
        assert_eq!(memory.read(address, &mut [0; 2]), Err(AccessError::Outside), "{address:#x}");
        assert_eq!(memory.write(address, &[0; 2]), Err(AccessError::Outside), "{address:#x}");
        assert!(memory.host_exact(address, 2).is_none(), "{address:#x}");
    }
}

#[test]
fn the_descriptor_is_needed_no_longer_than_the_call() {
    let fd = memfd(0x1000);
    let memory = GuestMemory::new(&[region(&fd, START, 0x1000, 0)]).unwrap();
    drop(fd);
    memory.write(START, b"still there").unwrap();
}

#[test]
fn what_cannot_be_is_refused_with_both_values() {
    let fd = memfd(0x2000);
    let good = region(&fd, START, 0x1000, 0);
    assert_eq!(refusal(&[RegionSpec { size: 0, ..good }]), "memory region at 0x100000, 0x0 bytes: is empty");
    assert_eq!(
        refusal(&[RegionSpec { mmap_offset: 0x1000, size: 0x1001, ..good }]),
        "memory region at 0x100000, 0x1001 bytes: needs a file of 0x2001 bytes, it has 0x2000"
    );
    assert!(refusal(&[RegionSpec { mmap_offset: 0x800, ..good }]).ends_with("is not a multiple of 0x1000"));
    assert!(refusal(&[RegionSpec { mmap_offset: u64::MAX - 0xfff, ..good }]).ends_with("wraps around"));
    assert!(refusal(&[RegionSpec { guest_address: u64::MAX - 10, ..good }]).ends_with("wraps around"));
    assert!(refusal(&[RegionSpec { user_address: u64::MAX - 10, ..good }]).ends_with("wraps around"));
    assert!(refusal(&[good, RegionSpec { guest_address: START + 0xfff, ..good }]).contains("overlap"));
    let closed = RegionSpec { fd: -1, ..good };
    assert!(matches!(GuestMemory::new(&[closed]), Err(MemoryError::System(_))));
}

#[test]
fn no_memory_at_all_is_memory() {
    let memory = GuestMemory::new(&[]).unwrap();
    assert_eq!(memory.populate(PATIENCE), 0);
    assert!(memory.host(0, 1).is_none());
}

/// Page faults this thread has taken.
fn faults() -> i64 {
    // SAFETY: an all-zero rusage is a valid one to be filled in.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is valid for writing.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) }, 0);
    usage.ru_minflt
}

#[test]
fn populating_maps_the_pages_that_exist_for_writing_and_creates_none() {
    const PAGES: u64 = 4096;
    let fd = memfd(PAGES * 4096);
    let other = GuestMemory::new(&[region(&fd, 0, PAGES * 4096, 0)]).unwrap();
    for page in (0..PAGES).filter(|page| page % 256 < 128) {
        other.write(page * 4096, &[1]).unwrap();
    }
    let memory = GuestMemory::new(&[region(&fd, 0, PAGES * 4096, 0)]).unwrap();
    assert_eq!(memory.populate(Duration::ZERO), 0, "it had no time");
    let populated = memory.populate(PATIENCE);
    // SAFETY: an all-zero stat is a valid one to be filled in.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is valid for writing.
    assert_eq!(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) }, 0);
    assert_eq!(stat.st_blocks * 512, i64::try_from(PAGES / 2 * 4096).unwrap(), "pages were created");
    if populated == 0 {
        return; // a kernel without MADV_POPULATE_READ
    }
    assert_eq!(populated, PAGES / 2 * 4096);
    let before = faults();
    for page in (0..PAGES).filter(|page| page % 256 < 128) {
        memory.write(page * 4096, &[2]).unwrap();
    }
    assert!(faults() - before < 16, "{} faults", faults() - before);
}

#[test]
fn memory_whose_file_shrinks_is_lost_and_other_memory_is_not() {
    let (shrinking, staying) = (memfd(0x4000), memfd(0x1000));
    let memory = GuestMemory::new(&[
        region(&shrinking, START, 0x2000, 0x2000),
        region(&staying, 2 * START, 0x1000, 0),
    ]);
    let memory = memory.unwrap();
    let other = GuestMemory::new(&[region(&staying, 2 * START, 0x1000, 0)]).unwrap();
    memory.write(2 * START, b"still there").unwrap();
    truncate(&shrinking, 0x2000);
    assert_eq!(memory.lost(), None);
    let lost = Lost { guest_address: START, size: 0x2000 };
    assert_eq!(memory.read(START + 0x1000, &mut [0; 2]), Err(AccessError::Lost(lost)));
    assert_eq!(memory.lost(), Some(lost));
    assert_eq!(memory.write(START, &[1]), Err(AccessError::Lost(lost)));
    let mut found = [0; 11];
    other.read(2 * START, &mut found).unwrap();
    assert_eq!(&found, b"still there");
    assert_eq!(other.lost(), None);
    assert_eq!(memory.populate(PATIENCE), 0x3000, "empty pages in the place of the lost ones");
}

#[test]
fn memory_that_was_served_elsewhere_is_adopted_as_it_is_now() {
    let (shrunk, sealed, good) = (memfd(0x2000), memfd(0x1000), memfd(0x1000));
    truncate(&shrunk, 0x1000);
    let spoilt = region(&shrunk, START, 0x2000, 0);
    assert!(refusal(&[spoilt]).contains("needs a file of 0x2000 bytes, it has 0x1000"));
    let memory = GuestMemory::adopt(&[spoilt, region(&good, 2 * START, 0x1000, 0)]).unwrap();
    memory.write(START, b"what is there").unwrap();
    memory.write(2 * START, b"is used").unwrap();
    let lost = Lost { guest_address: START, size: 0x2000 };
    assert_eq!(memory.write(START + 0x1000, &[1]), Err(AccessError::Lost(lost)));
    // SAFETY: plain system call on our descriptor.
    assert_eq!(unsafe { libc::fcntl(sealed.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE) }, 0);
    let memory = GuestMemory::adopt(&[region(&sealed, START, 0x1000, 0)]).unwrap();
    assert_eq!(memory.lost(), Some(Lost { guest_address: START, size: 0x1000 }));
    assert!(matches!(GuestMemory::adopt(&[RegionSpec { size: 0, ..spoilt }]), Err(MemoryError::Invalid(_))));
}

#[test]
fn the_next_memory_keeps_the_mappings_of_regions_that_stay_and_no_others() {
    let (kept, gone, new) = (memfd(0x2000), memfd(0x1000), memfd(0x1000));
    let stays = region(&kept, START, 0x2000, 0);
    let first = GuestMemory::new(&[stays, region(&gone, 2 * START, 0x1000, 0)]).unwrap();
    first.write(START, b"kept").unwrap();
    assert_eq!(first.populate(PATIENCE), 0x1000);
    // Another descriptor of the same file, as each SET_MEM_TABLE brings.
    let again = kept.try_clone().unwrap();
    let second = first.next(&[region(&new, 3 * START, 0x1000, 0), region(&again, START, 0x2000, 0)]).unwrap();
    assert_eq!(second.host(START, 1), first.host(START, 1));
    assert!(second.host(2 * START, 1).is_none());
    second.write(3 * START, b"new").unwrap();
    assert_eq!(second.populate(PATIENCE), 0x1000, "what was kept is not looked at again");
    assert!(is_mapped(&gone));
    drop(first);
    assert!(!is_mapped(&gone), "a region that was removed is still mapped");
    let mut found = [0; 4];
    second.read(START, &mut found).unwrap();
    assert_eq!(&found, b"kept");
    // The same numbers with another file, and the same file with another number, are other regions.
    let other = memfd(0x2000);
    let user_address = stays.user_address + 0x1000;
    for changed in [region(&other, START, 0x2000, 0), RegionSpec { user_address, ..stays }] {
        assert_ne!(second.next(&[changed]).unwrap().host(START, 1), second.host(START, 1));
    }
}

#[test]
fn a_next_memory_that_cannot_be_leaves_the_present_one() {
    let fd = memfd(0x2000);
    let good = region(&fd, START, 0x1000, 0);
    let memory = GuestMemory::new(&[good]).unwrap();
    let large = region(&fd, 2 * START, 0x3000, 0);
    assert!(matches!(memory.next(&[good, large]), Err(MemoryError::Invalid(_))));
    memory.write(START, b"still there").unwrap();
}

#[test]
fn lost_memory_is_mapped_again_where_it_can_be_and_stays_lost_where_not() {
    let (fd, other) = (memfd(0x2000), memfd(0x1000));
    let specs = [region(&fd, START, 0x2000, 0), region(&other, 2 * START, 0x1000, 0)];
    let memory = GuestMemory::new(&specs[..1]).unwrap();
    truncate(&fd, 0x1000);
    let lost = Lost { guest_address: START, size: 0x2000 };
    assert_eq!(memory.read(START + 0x1000, &mut [0]), Err(AccessError::Lost(lost)));
    // It costs no other region.
    let memory = memory.next(&specs).unwrap();
    assert_eq!(memory.lost(), Some(lost));
    truncate(&fd, 0x2000);
    let memory = memory.next(&specs).unwrap();
    assert_eq!(memory.lost(), None);
    memory.write(START + 0x1000, b"there again").unwrap();
}

proptest! {
    /// Against a list of regions that is walked from its beginning.
    #[test]
    fn an_address_is_found_where_a_naive_search_finds_it(
        gaps in vec((0u64..3, 1u64..4), 1..40),
        addresses in vec((0u64..200, 0usize..0x3000), 1..50),
    ) {
        const PAGE: u64 = 0x1000;
        let mut end = 0;
        let mut regions = Vec::new();
        for (gap, pages) in gaps {
            let start = end + gap * PAGE;
            end = start + pages * PAGE;
            regions.push((start, pages * PAGE));
        }
        let fd = memfd(end);
        // Each at its own place of the file, in no order.
        let mut specs: Vec<_> = regions.iter().map(|(start, size)| region(&fd, *start, *size, *start)).collect();
        specs.rotate_left(regions.len() / 2);
        let memory = GuestMemory::new(&specs).unwrap();
        for (page, length) in addresses {
            for address in [page * PAGE, page * PAGE + 0xfff] {
                let naive = regions.iter().find(|(start, size)| (*start..start + size).contains(&address));
                let found = memory.host(address, length);
                prop_assert_eq!(
                    found.map(|(_, found)| found),
                    naive.map(|(start, size)| length.min((start + size - address) as usize))
                );
                if let (Some((host, _)), Some((start, _))) = (found, naive) {
                    let (first, _) = memory.host(*start, 1).unwrap();
                    prop_assert_eq!(host.addr() - first.addr(), (address - start) as usize);
                }
                let exact = memory.host_exact(address, length);
                prop_assert_eq!(exact, found.filter(|(_, found)| *found == length).map(|(host, _)| host));
            }
        }
    }
}

#[test]
fn huge_pages_are_mapped_from_the_page_in_which_a_region_begins() {
    const HUGE: u64 = 2 << 20;
    let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    if fd < 0 {
        return; // a kernel without huge pages
    }
    // SAFETY: the descriptor is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    truncate(&fd, 2 * HUGE);
    // As QEMU's: below and above the hole at 640 KiB.
    let specs = [region(&fd, 0, 0xa_0000, 0), region(&fd, 0xc_0000, 2 * HUGE - 0xc_0000, 0xc_0000)];
    let memory = GuestMemory::new(&specs).unwrap();
    let (low, _) = memory.host(0, 1).unwrap();
    let (high, length) = memory.host(0xc_0000, usize::MAX).unwrap();
    assert_eq!(low.addr() as u64 % HUGE, 0);
    assert_eq!(high.addr() as u64 % HUGE, 0xc_0000);
    assert_eq!(length as u64, 2 * HUGE - 0xc_0000);
    // Where the machine has set huge pages aside, both regions are the same memory as the file.
    if memory.write(0xc_0000, b"shared").is_ok() {
        let whole = GuestMemory::new(&[region(&fd, 0, 2 * HUGE, 0)]).unwrap();
        let mut found = [0; 6];
        whole.read(0xc_0000, &mut found).unwrap();
        assert_eq!(&found, b"shared");
    }
}

#[test]
fn huge_pages_that_ran_out_are_lost_memory_as_well() {
    let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    if fd < 0 {
        return; // a kernel without huge pages
    }
    // SAFETY: the descriptor is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    truncate(&fd, 2 << 20);
    // Off the size of a huge page, in which alone it can be mapped, replaced and unmapped.
    let memory = GuestMemory::new(&[region(&fd, START, 0x1000, 0)]).unwrap();
    let lost = Err(AccessError::Lost(Lost { guest_address: START, size: 0x1000 }));
    let result = memory.write(START, b"hello");
    // Where the machine has set some aside, nothing is lost.
    assert!(result == lost || result == Ok(()), "{result:?}");
}

#[test]
fn a_file_whose_pages_may_come_from_anybody_is_refused() {
    let file = OwnedFd::from(std::fs::File::open("/proc/self/maps").unwrap());
    let reason = "memory region at 0x100000, 0x1000 bytes: its file is on proc, whose pages may come from a server, late or \
                  never; share memory of a memfd (QEMU: memory-backend-memfd), or of a file on tmpfs or hugetlbfs";
    assert_eq!(refusal(&[region(&file, START, 0x1000, 0)]), reason);
    let device = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
    let reason = refusal(&[region(&device, START, 0x1000, 0)]);
    assert!(
        reason.contains("its descriptor is character device 1:5, of which only devdax is memory; "),
        "{reason}"
    );
}

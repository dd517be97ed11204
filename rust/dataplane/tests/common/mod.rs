//! A guest made of plain memory: it writes rings by hand, so that it can write them wrong.
#![allow(dead_code)] // each test file uses a part

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;
use std::time::Duration;

use dataplane::chain::Layout;
use dataplane::memory::{GuestMemory, RegionSpec};
use dataplane::packed::Position;
use dataplane::Offloads;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where guest memory starts, and its size.
pub const MEMORY_START: u64 = 0x10_0000;
pub const MEMORY_SIZE: u64 = 0x40_0000;

/// A driver that takes whatever the kernel leaves to it.
pub const ALL_OFFLOADS: Offloads = Offloads(0x6f);

/// Longer than anything here takes; a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn memfd(size: u64) -> OwnedFd {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a valid C string; the descriptor is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), flags)) };
    truncate(&fd, size);
    fd
}

pub fn region(fd: &OwnedFd, guest_address: u64, size: u64, mmap_offset: u64) -> RegionSpec {
    RegionSpec {
        guest_address,
        size,
        user_address: guest_address + 0x7f00_0000_0000,
        mmap_offset,
        fd: fd.as_raw_fd(),
    }
}

pub fn memory() -> Arc<GuestMemory> {
    memory_of(&memfd(MEMORY_SIZE))
}

pub fn memory_of(fd: &OwnedFd) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(&[region(fd, MEMORY_START, MEMORY_SIZE, 0)]).unwrap())
}

pub fn truncate(fd: &OwnedFd, size: u64) {
    // SAFETY: plain system call on our descriptor.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), size.try_into().unwrap()) }, 0);
}

/// Whether this process maps the file.
pub fn is_mapped(fd: &OwnedFd) -> bool {
    let inode = std::fs::File::from(fd.try_clone().unwrap()).metadata().unwrap().ino().to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("memfd:")).any(|line| line.split(' ').nth(4) == Some(&inode))
}

/// One ring as its driver writes it.
pub struct Queue {
    pub memory: Arc<GuestMemory>,
    pub layout: Layout,
    pub avail_index: u16,
    seen_used: u16,
}

impl Queue {
    /// Lays a ring at `address`; 64 KiB are more than it needs. All positions start at `position`.
    pub fn new(memory: &Arc<GuestMemory>, address: u64, size: u16, position: u16) -> Self {
        let layout = Layout {
            size: size.into(),
            descriptor_area: address,
            driver_area: address + 0x8000,
            device_area: address + 0xc000,
        };
        let mut queue =
            Self { memory: Arc::clone(memory), layout, avail_index: position, seen_used: position };
        queue.set_avail_index(position);
        queue.put(layout.device_area + 2, &position.to_le_bytes());
        queue
    }

    /// The same ring for a driver that has seen so many used chains and writes nothing.
    pub fn reader(memory: &Arc<GuestMemory>, layout: Layout, seen_used: u16) -> Self {
        Self { memory: Arc::clone(memory), layout, avail_index: seen_used, seen_used }
    }

    pub fn put(&self, address: u64, data: &[u8]) {
        self.memory.write(address, data).unwrap();
    }

    pub fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read(address, &mut data).unwrap();
        data
    }

    fn get_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.get(address))
    }

    pub fn descriptor_at(&self, address: u64, buffer: u64, length: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buffer.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.put(address, &raw);
    }

    pub fn descriptor(&self, index: u16, buffer: u64, length: u32, flags: u16, next: u16) {
        self.descriptor_at(self.layout.descriptor_area + 16 * u64::from(index), buffer, length, flags, next);
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_index) % u64::from(self.layout.size);
        self.put(self.layout.driver_area + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail_index(self.avail_index.wrapping_add(1));
    }

    pub fn set_avail_index(&mut self, index: u16) {
        self.avail_index = index;
        fence(Ordering::SeqCst);
        self.put(self.layout.driver_area + 2, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    pub fn used_index(&self) -> u16 {
        self.get_u16(self.layout.device_area + 2)
    }

    /// The next used element, (head, written), if there is one.
    pub fn next_used(&mut self) -> Option<(u16, u32)> {
        let index = self.used_index();
        fence(Ordering::SeqCst);
        if index == self.seen_used {
            return None;
        }
        let slot = u64::from(self.seen_used) % u64::from(self.layout.size);
        let element: [u8; 8] = self.get(self.layout.device_area + 4 + 8 * slot);
        self.seen_used = self.seen_used.wrapping_add(1);
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        Some((word(&element[..4]).try_into().unwrap(), word(&element[4..])))
    }

    pub fn set_used_event(&self, index: u16) {
        self.put(self.layout.driver_area + 4 + 2 * u64::from(self.layout.size), &index.to_le_bytes());
    }

    pub fn set_no_interrupt(&self) {
        self.put(self.layout.driver_area, &1u16.to_le_bytes());
    }

    pub fn avail_event(&self) -> u16 {
        self.get_u16(self.layout.device_area + 4 + 8 * u64::from(self.layout.size))
    }

    pub fn used_flags(&self) -> u16 {
        self.get_u16(self.layout.device_area)
    }
}

pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

/// One packed ring as its driver writes it.
pub struct PackedQueue {
    pub memory: Arc<GuestMemory>,
    pub layout: Layout,
    pub next_avail: Position,
    pub next_used: Position,
}

impl PackedQueue {
    /// Lays a ring at `address`; 64 KiB are enough for 2048 entries. It begins at `position`.
    pub fn new(memory: &Arc<GuestMemory>, address: u64, size: u16, position: Position) -> Self {
        let layout = Layout {
            size: size.into(),
            descriptor_area: address,
            driver_area: address + 0x8000,
            device_area: address + 0xc000,
        };
        let queue = Self { memory: Arc::clone(memory), layout, next_avail: position, next_used: position };
        for index in 0..size {
            // As the device left it one lap ago.
            let wrap = position.wrap == (index < position.index);
            queue.descriptor(index, 0, 0, 0, if wrap { AVAIL | USED } else { 0 });
        }
        queue
    }

    pub fn put(&self, address: u64, data: &[u8]) {
        self.memory.write(address, data).unwrap();
    }

    pub fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read(address, &mut data).unwrap();
        data
    }

    pub fn descriptor_at(&self, address: u64, buffer: u64, length: u32, id: u16, flags: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buffer.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&id.to_le_bytes());
        raw[14..].copy_from_slice(&flags.to_le_bytes());
        self.put(address, &raw);
    }

    pub fn descriptor(&self, index: u16, buffer: u64, length: u32, id: u16, flags: u16) {
        self.descriptor_at(self.layout.descriptor_area + 16 * u64::from(index), buffer, length, id, flags);
    }

    pub fn advance(&self, position: Position, slots: u16) -> Position {
        let size = self.layout.size as u16;
        let laps = (position.index + slots) / size;
        Position { index: (position.index + slots) % size, wrap: position.wrap != (laps % 2 == 1) }
    }

    /// Makes the next descriptor available; `flags` are those beside available and used.
    pub fn offer(&mut self, buffer: u64, length: u32, id: u16, flags: u16) {
        let turn = if self.next_avail.wrap { AVAIL } else { USED };
        fence(Ordering::SeqCst);
        self.descriptor(self.next_avail.index, buffer, length, id, flags | turn);
        self.next_avail = self.advance(self.next_avail, 1);
    }

    /// Makes a chain of several buffers available, its first descriptor last.
    pub fn offer_chain(&mut self, buffers: &[(u64, u32)], id: u16, flags: u16) {
        let first = self.next_avail;
        let all = self.advance(first, buffers.len() as u16);
        for (offset, &(buffer, length)) in buffers.iter().enumerate().rev() {
            let next = if offset + 1 == buffers.len() { 0 } else { NEXT };
            self.next_avail = self.advance(first, offset as u16);
            self.offer(buffer, length, id, flags | next);
        }
        self.next_avail = all;
    }

    /// The next used buffer, (id, written, flags beside available and used), if there is one. It had `slots`.
    pub fn next_used(&mut self, slots: u16) -> Option<(u16, u32, u16)> {
        let address = self.layout.descriptor_area + 16 * u64::from(self.next_used.index);
        let flags = u16::from_le_bytes(self.get(address + 14));
        fence(Ordering::SeqCst);
        if (flags & AVAIL != 0, flags & USED != 0) != (self.next_used.wrap, self.next_used.wrap) {
            return None;
        }
        let (written, id) = (u32::from_le_bytes(self.get(address + 8)), self.get(address + 12));
        self.next_used = self.advance(self.next_used, slots);
        Some((u16::from_le_bytes(id), written, flags & !(AVAIL | USED)))
    }

    /// When it wants a call: a position, and the flags.
    pub fn set_driver_event(&self, position: Position, flags: u16) {
        self.put(self.layout.driver_area, &position.bits().to_le_bytes());
        self.put(self.layout.driver_area + 2, &flags.to_le_bytes());
    }

    /// When the device wants a kick: a position, and the flags.
    pub fn device_event(&self) -> (Position, u16) {
        let position = u16::from_le_bytes(self.get(self.layout.device_area));
        (Position::from_bits(position), u16::from_le_bytes(self.get(self.layout.device_area + 2)))
    }
}

pub fn eventfd() -> OwnedFd {
    // SAFETY: the descriptor is new and ours.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)) }
}

/// The end to read from, and the one to write to.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for two descriptors.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both are new and ours.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// Waits until `fd` is readable; false after `patience`.
pub fn readable(fd: RawFd, patience: Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, patience.as_millis().try_into().unwrap()) == 1 }
}

/// Waits until `done` gives something, looking again whenever `fd`, an eventfd, is rung.
pub fn await_rung<T>(fd: &OwnedFd, mut done: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(readable(fd.as_raw_fd(), PATIENCE), "waited too long");
        let _ = dataplane::sys::drain(fd.as_raw_fd());
    }
}

/// Two ends of a wire that keeps frames apart, non-blocking as a TAP.
pub fn wire() -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `fds` has room for two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: both are new and ours.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// Sends one frame; false if the wire is full.
pub fn send(fd: &OwnedFd, frame: &[u8]) -> bool {
    // SAFETY: the slice is valid for its length.
    let sent = unsafe { libc::send(fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), libc::MSG_NOSIGNAL) };
    assert!(sent == isize::try_from(frame.len()).unwrap() || sent == -1);
    sent != -1
}

/// Receives one frame if there is one.
pub fn receive(fd: &OwnedFd) -> Option<Vec<u8>> {
    let mut frame = vec![0; 70_000];
    // SAFETY: the vector is valid for its length.
    let length = unsafe { libc::recv(fd.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
    frame.truncate(usize::try_from(length).ok().filter(|length| *length > 0)?);
    Some(frame)
}

pub fn await_frame(fd: &OwnedFd) -> Vec<u8> {
    assert!(readable(fd.as_raw_fd(), PATIENCE), "no frame came");
    receive(fd).expect("it was readable")
}

/// From now on a system call of this thread, and of threads that it makes, fails with `error` in the kernel's place.
pub fn refuse(call: libc::c_long, error: libc::c_int) {
    let statement = |code: u32, value: u32, [yes, no]: [u8; 2]| libc::sock_filter {
        code: code.try_into().unwrap(),
        jt: yes,
        jf: no,
        k: value,
    };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, [0, 0]), // the call's number
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call.try_into().unwrap(), [0, 1]),
        statement(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | error.unsigned_abs(), [0, 0]),
        statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, [0, 0]),
    ];
    let filter = libc::sock_fprog { len: program.len().try_into().unwrap(), filter: program.as_mut_ptr() };
    // SAFETY: the filter describes the program, which the kernel copies.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
    }
}

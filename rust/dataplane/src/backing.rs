//! The file behind a region of guest memory: which one it is, how large, and whether its pages always come.
//!
//! Owns:        what is asked of such a file before it is mapped, and the rule which files are accepted.
//! Never sees:  a mapping, guest addresses.
//! Read next:   `memory`, which maps what is accepted.
//!
//! A page that never comes holds a queue pair's thread for ever, in the middle of a copy by the kernel, and with the next
//! `stop` the event loop and every other guest. So a file is accepted only if its pages come from this kernel:
//!
//! - memory (memfd, tmpfs, hugetlbfs), which only the kernel can give seals;
//! - a device whose subsystem is dax;
//! - a file system on a block device, except FUSE's;
//! - one of `LOCAL`, file systems that have no device number of their own and no server either;
//! - overlayfs, if its upper layer is on one of these.
//!
//! This is a list of what is accepted. An unknown file system costs its user a sentence that says what to use instead;
//! an unknown network file system that was accepted would cost other guests their network.
//!
//! **Invariant**: nothing here waits for a file system's server. statfs(2) would: FUSE and NFS pass it on. The kernel's
//! list of mounts names the type of a file system without asking it, and statx(2) is asked for what the kernel knows.
//! A mount that this process's namespace lacks has no type here, and is accepted only on a block device: nobody but an
//! administrator of this namespace may then have chosen what serves the pages.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;

/// The page size of all files but those that have larger pages.
pub(crate) const PAGE_SIZE: usize = 4096;

/// File systems without a device number of their own (stx_dev_major is 0) whose pages come from local disks, or, where an
/// overlay is on it, from memory.
const LOCAL: [&str; 4] = ["bcachefs", "btrfs", "tmpfs", "zfs"];

/// How many file systems deep an overlay is looked through: the kernel stacks two (FILESYSTEM_MAX_STACK_DEPTH).
const OVERLAYS_MAX: usize = 2;

/// What every refusal ends with.
const ADVICE: &str =
    "share memory of a memfd (QEMU: memory-backend-memfd), or of a file on tmpfs or hugetlbfs";

/// Which file it is, as long as somebody has it open or mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: (u32, u32),
    inode: u64,
}

/// A borrowed descriptor and what the kernel says of it by itself.
pub(crate) struct Backing {
    fd: RawFd,
    pub(crate) identity: Identity,
    /// What mappings are made and removed in.
    pub(crate) page_size: usize,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Memory,
    Dax,
    CharacterDevice(u32, u32),
    /// Anything else: of the mount with this number, if the kernel tells (5.8).
    Other(Option<u64>),
}

impl Backing {
    /// Looks at a borrowed descriptor.
    ///
    /// # Errors
    /// It is closed.
    pub(crate) fn of(fd: RawFd) -> io::Result<Self> {
        let status = statx(fd, libc::STATX_TYPE | libc::STATX_MODE | libc::STATX_INO | libc::STATX_MNT_ID)?;
        let identity =
            Identity { device: (status.stx_dev_major, status.stx_dev_minor), inode: status.stx_ino };
        let mut page_size = PAGE_SIZE;
        // SAFETY: plain system call.
        let kind = if unsafe { libc::fcntl(fd, libc::F_GET_SEALS) } >= 0 {
            page_size = memory_page_size(fd)?;
            Kind::Memory
        } else if u32::from(status.stx_mode) & libc::S_IFMT == libc::S_IFCHR {
            let device = (status.stx_rdev_major, status.stx_rdev_minor);
            match dax_page_size(Path::new("/sys"), device) {
                Some(size) => {
                    page_size = size;
                    Kind::Dax
                }
                None => Kind::CharacterDevice(device.0, device.1),
            }
        } else {
            Kind::Other((status.stx_mask & libc::STATX_MNT_ID != 0).then_some(status.stx_mnt_id))
        };
        Ok(Self { fd, identity, page_size, kind })
    }

    /// Why its pages may never come, None if they always do.
    pub(crate) fn refusal(&self) -> Option<String> {
        let reason = match self.kind {
            Kind::Memory | Kind::Dax => return None,
            Kind::CharacterDevice(major, minor) => {
                format!("its descriptor is character device {major}:{minor}, of which only devdax is memory")
            }
            Kind::Other(mount) => {
                let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
                let mounts = Mounts::of(&String::from_utf8_lossy(&mounts));
                mounts.refusal(mount, self.identity.device)?
            }
        };
        Some(format!("{reason}; {ADVICE}"))
    }

    /// Bytes of an accepted file; None of a device, which has as many as can be mapped.
    pub(crate) fn size(&self) -> io::Result<Option<u64>> {
        match self.kind {
            Kind::Dax => Ok(None),
            _ => Ok(Some(statx(self.fd, libc::STATX_SIZE)?.stx_size)),
        }
    }
}

/// The type of the file behind a borrowed descriptor, as in `S_IFMT`.
pub(crate) fn file_type(fd: RawFd) -> io::Result<u32> {
    Ok(u32::from(statx(fd, libc::STATX_TYPE)?.stx_mode) & libc::S_IFMT)
}

/// What the kernel knows already: a file system's server may take its time to say more.
fn statx(fd: RawFd, mask: u32) -> io::Result<libc::statx> {
    // SAFETY: an all-zero statx is a valid one to be filled in.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is a C string, `status` is valid for writing.
    let failed = unsafe { libc::statx(fd, c"".as_ptr(), flags, mask, &raw mut status) } != 0;
    if failed {
        Err(io::Error::last_os_error())
    } else {
        Ok(status)
    }
}

/// Of a file that is memory: tmpfs has no server to wait for, nor has hugetlbfs, the only one with pages of its own size.
fn memory_page_size(fd: RawFd) -> io::Result<usize> {
    // SAFETY: an all-zero statfs is a valid one to be filled in.
    let mut system: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `system` is valid for writing.
    if unsafe { libc::fstatfs(fd, &raw mut system) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let is_huge = system.f_type == libc::HUGETLBFS_MAGIC;
    Ok(if is_huge { usize::try_from(system.f_bsize).unwrap_or(PAGE_SIZE) } else { PAGE_SIZE })
}

/// What a dax device is mapped in, None of any other device. `sysfs` is where that is mounted.
fn dax_page_size(sysfs: &Path, (major, minor): (u32, u32)) -> Option<usize> {
    let device = sysfs.join(format!("dev/char/{major}:{minor}"));
    let subsystem = fs::read_link(device.join("subsystem")).ok()?;
    if subsystem.file_name()? != "dax" {
        return None;
    }
    // Kernels before 5.1 do not tell; 2 MiB is what they take unless asked for more.
    let alignment = fs::read_to_string(device.join("align")).ok().and_then(|text| text.trim().parse().ok());
    Some(alignment.filter(|size: &usize| size.is_power_of_two() && *size >= PAGE_SIZE).unwrap_or(2 << 20))
}

/// One line of /proc/self/mountinfo.
#[derive(Debug)]
struct Mount {
    id: u64,
    point: String,
    system: String,
    is_on_device: bool,
    /// Options of the file system itself.
    options: String,
}

#[derive(Debug)]
struct Mounts(Vec<Mount>);

impl Mounts {
    fn of(text: &str) -> Self {
        let mount = |line: &str| {
            let (mount, system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ');
            let id = fields.next()?.parse().ok()?;
            let is_on_device = !fields.nth(1)?.starts_with("0:");
            let point = fields.nth(1)?.to_string();
            let mut fields = system.split(' ');
            let (system, options) = (fields.next()?.to_string(), fields.nth(1)?.to_string());
            Some(Mount { id, point, system, is_on_device, options })
        };
        Self(text.lines().filter_map(mount).collect())
    }

    /// Why a file of the mount `id` may be without pages. Its file system has this `device` number.
    fn refusal(&self, id: Option<u64>, device: (u32, u32)) -> Option<String> {
        match self.0.iter().find(|mount| Some(mount.id) == id) {
            Some(mount) => self.unfit(mount, OVERLAYS_MAX).map(|system| {
                format!("its file is on {system}, whose pages may come from a server, late or never")
            }),
            None if device.0 != 0 => None,
            None => Some(format!(
                "its file is on a file system that is not mounted in this process's namespace (device {}:{}), so \
                 its pages may come from a server, late or never",
                device.0, device.1
            )),
        }
    }

    /// The type of the file system on which the files of `mount` may be without pages.
    fn unfit(&self, mount: &Mount, overlays: usize) -> Option<String> {
        if mount.system == "overlay" {
            // What is open for writing is in the upper layer. One that is mounted out of sight, as a container's root, was
            // chosen by the administrator who mounted the overlay.
            let upper = mount.options.split(',').find_map(|option| option.strip_prefix("upperdir="))?;
            let upper = self.around(upper).filter(|upper| upper.id != mount.id && overlays > 0)?;
            return self.unfit(upper, overlays - 1).map(|system| format!("overlay on {system}"));
        }
        let is_fuse = mount.system == "fuseblk";
        let is_local = LOCAL.contains(&mount.system.as_str()) || (mount.is_on_device && !is_fuse);
        (!is_local).then(|| mount.system.clone())
    }

    /// The mount that a path leads into, by its text alone: to walk it might ask a server.
    fn around(&self, path: &str) -> Option<&Mount> {
        let holds = |mount: &&Mount| {
            let rest = path.strip_prefix(mount.point.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        // Of several mounts at one point the last one is seen.
        self.0.iter().filter(holds).max_by_key(|mount| mount.point.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
        1 0 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw\n\
        2 1 0:40 /sub /data rw,noatime - btrfs /dev/vdb rw,subvol=/sub\n\
        3 1 0:41 / /net rw - nfs4 server:/ rw,vers=4.2\n\
        4 1 0:42 / /shared rw - virtiofs tag rw\n\
        5 1 0:43 / /a rw - fuse.sshfs host:/ rw,user_id=0\n\
        6 1 259:1 / /usb rw - fuseblk /dev/sdb rw,user_id=0\n\
        7 1 0:44 / /nine rw - 9p share rw,trans=virtio\n\
        8 1 0:45 / /smb rw - cifs //server/share rw\n\
        9 1 0:46 / /pool rw - zfs pool/guests rw,xattr\n\
        10 1 0:47 / /c1 rw - overlay overlay rw,lowerdir=/net/l,upperdir=/data/up,workdir=/data/work\n\
        11 1 0:48 / /c2 rw - overlay overlay rw,lowerdir=/l,upperdir=/shared/up,workdir=/shared/work\n\
        12 1 0:49 / /c3 rw - overlay overlay rw,lowerdir=/l,upperdir=/c2/up,workdir=/c2/work\n\
        13 1 0:50 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/out/of/sight,workdir=/w\n\
        17 1 0:54 / /tmp rw - tmpfs tmpfs rw,size=1g\n\
        18 1 0:55 / /c4 rw - overlay overlay rw,lowerdir=/l,upperdir=/tmp/up,workdir=/tmp/work\n\
        14 1 0:51 / /proc rw - proc proc rw\n\
        15 1 0:52 / /with\\040space rw - bcachefs /dev/vdc:/dev/vdd rw\n\
        16 1 0:53 / /ceph rw - ceph host:/ rw\n";

    fn refusal(id: u64) -> Option<String> {
        Mounts::of(MOUNTS).refusal(Some(id), (0, 99))
    }

    #[test]
    fn file_systems_whose_pages_come_from_local_disks_are_accepted() {
        for id in [1, 2, 9, 10, 13, 15, 18] {
            assert_eq!(refusal(id), None, "{id}");
        }
    }

    #[test]
    fn file_systems_that_a_server_may_be_behind_are_refused_by_name() {
        let systems = [
            (3, "nfs4"),
            (4, "virtiofs"),
            (5, "fuse.sshfs"),
            (6, "fuseblk"),
            (7, "9p"),
            (8, "cifs"),
            (11, "overlay on virtiofs"),
            (12, "overlay on overlay on virtiofs"),
            (14, "proc"),
            (16, "ceph"),
        ];
        for (id, system) in systems {
            let reason =
                format!("its file is on {system}, whose pages may come from a server, late or never");
            assert_eq!(refusal(id), Some(reason), "{id}");
        }
    }

    #[test]
    fn a_mount_of_another_namespace_is_accepted_on_a_block_device_alone() {
        let mounts = Mounts::of(MOUNTS);
        assert_eq!(mounts.refusal(Some(99), (254, 1)), None);
        assert!(mounts.refusal(Some(99), (0, 77)).unwrap().contains("(device 0:77)"));
        assert!(mounts.refusal(None, (0, 40)).unwrap().contains("(device 0:40)"));
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        for line in ["", " - ", "1 2", "x 0 0:1 / / rw - ext4 a rw", "1 0 0:1 / / rw - ext4"] {
            assert!(Mounts::of(line).0.is_empty(), "{line}");
        }
    }

    #[test]
    fn a_device_is_memory_if_its_subsystem_is_dax() {
        let sysfs = std::env::temp_dir().join(format!("localmig-sysfs-{}", std::process::id()));
        let device = |number: &str, subsystem: &str, alignment: Option<&str>| {
            let folder = sysfs.join("dev/char").join(number);
            fs::create_dir_all(&folder).unwrap();
            std::os::unix::fs::symlink(format!("../../../bus/{subsystem}"), folder.join("subsystem"))
                .unwrap();
            if let Some(alignment) = alignment {
                fs::write(folder.join("align"), alignment).unwrap();
            }
        };
        device("250:0", "dax", Some("1073741824\n"));
        device("250:1", "dax", None);
        device("250:2", "dax", Some("3\n"));
        device("1:3", "mem", None);
        let sizes =
            [(250, 0), (250, 1), (250, 2), (1, 3), (9, 9)].map(|number| dax_page_size(&sysfs, number));
        fs::remove_dir_all(&sysfs).unwrap();
        assert_eq!(sizes, [Some(1 << 30), Some(2 << 20), Some(2 << 20), None, None]);
    }
}

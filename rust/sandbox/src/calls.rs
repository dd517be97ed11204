//! The lists of system calls, and the filters made of them.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    sock_filter, BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::Forbidden;

/// Of other processes: to look into them, to change them, to take their descriptors.
const OTHER_PROCESSES: &[c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
];

/// Of the kernel: its modules and programs, its keys, what it measures. io_uring and userfaultfd: large parts of it that
/// nothing here uses, and that faults were found in again and again.
const KERNEL: &[c_long] = &[
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_syslog,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    libc::SYS_fanotify_init,
];

/// Of the machine: its clock, its name, its swap, its power.
const MACHINE: &[c_long] = &[
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_vhangup,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// Another view of files and namespaces than the one that the process was started in.
const MOUNTS_AND_NAMESPACES: &[c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_unshare,
    libc::SYS_setns,
];

/// To become another user.
const USERS: &[c_long] = &[
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
];

#[cfg(target_arch = "x86_64")]
const PROCESSOR: &[c_long] = &[libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt];
#[cfg(not(target_arch = "x86_64"))]
const PROCESSOR: &[c_long] = &[];

#[cfg(target_arch = "x86_64")]
const PROGRAMS: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat, libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const PROGRAMS: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat];

/// Control sockets, migrations over TCP, and what an interface is asked through.
const SOCKET_FAMILIES: &[libc::c_int] = &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Flags of clone(2) that make a namespace; CLONE_NEWTIME is none, its bit is part of the signal's number there.
const NAMESPACE_FLAGS: &[libc::c_int] = &[
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// TIOCSTI and TIOCLINUX, to type into a terminal as if somebody sat at it (asm-generic/ioctls.h).
const TERMINAL_REQUESTS: &[u64] = &[0x5412, 0x541C];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The program that forbids `what` and lets all else pass.
pub(crate) fn filter(what: Forbidden) -> io::Result<BpfProgram> {
    let rules = match what {
        Forbidden::Unneeded => unneeded()?,
        Forbidden::Programs => programs()?,
    };
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(unsupported)?;
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).map_err(unsupported)?;
    let program: BpfProgram = filter.try_into().map_err(unsupported)?;
    Ok([prologue(), program].concat())
}

fn unneeded() -> io::Result<Rules> {
    let lists = [OTHER_PROCESSES, KERNEL, MACHINE, MOUNTS_AND_NAMESPACES, USERS, PROCESSOR];
    let mut rules: Rules = lists.concat().into_iter().map(|call| (call, vec![])).collect();
    let other_family =
        SOCKET_FAMILIES.iter().map(|family| argument(0, Length::Dword, Is::Ne, *family as u64));
    rules.insert(libc::SYS_socket, vec![rule(other_family.collect::<io::Result<_>>()?)?]);
    let namespaces = NAMESPACE_FLAGS.iter().map(|flag| {
        let flag = *flag as u64;
        rule(vec![argument(0, Length::Qword, Is::MaskedEq(flag), flag)?])
    });
    rules.insert(libc::SYS_clone, namespaces.collect::<io::Result<_>>()?);
    let requests =
        TERMINAL_REQUESTS.iter().map(|request| rule(vec![argument(1, Length::Dword, Is::Eq, *request)?]));
    rules.insert(libc::SYS_ioctl, requests.collect::<io::Result<_>>()?);
    Ok(rules)
}

fn programs() -> io::Result<Rules> {
    let mut rules: Rules = PROGRAMS.iter().map(|call| (*call, vec![])).collect();
    let no_thread = argument(0, Length::Qword, Is::MaskedEq(libc::CLONE_THREAD as u64), 0)?;
    rules.insert(libc::SYS_clone, vec![rule(vec![no_thread])?]);
    Ok(rules)
}

/// Comes before the lists: calls that these cannot tell are as if the kernel did not have them.
///
/// The flags of clone3(2) are in memory, which no filter reads; whoever calls it goes on with clone(2), as on a kernel
/// before 5.3. On x86-64 every call has a second number, with bit 30 set, which would pass by every list.
fn prologue() -> BpfProgram {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const X32_SYSCALL_BIT: u32 = 0x4000_0000;
    let is = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    vec![
        is(LOAD_NUMBER, 0, 0, 0), // the first field of struct seccomp_data
        is(IF_EQUAL, 1, 0, libc::SYS_clone3 as u32),
        is(IF_AT_LEAST, 0, 1, X32_SYSCALL_BIT),
        is(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

fn argument(index: u8, length: Length, is: Is, value: u64) -> io::Result<SeccompCondition> {
    SeccompCondition::new(index, length, is, value).map_err(unsupported)
}

fn rule(conditions: Vec<SeccompCondition>) -> io::Result<SeccompRule> {
    SeccompRule::new(conditions).map_err(unsupported)
}

fn unsupported(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BPF_MAXINSNS: usize = 4096;

    #[test]
    fn the_kernel_takes_programs_of_this_length() {
        for what in [Forbidden::Unneeded, Forbidden::Programs] {
            assert!(filter(what).unwrap().len() < BPF_MAXINSNS, "{what:?}");
        }
    }
}

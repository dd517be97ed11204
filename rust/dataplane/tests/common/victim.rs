//! A process that is stopped after each of its instructions, as if it was killed there.

/// Instructions one turn may take before something is wrong with it: an unoptimised build needs some ten thousand.
const STEPS_MAX: usize = 2_000_000;

/// A child that takes turns, one instruction at a time.
pub struct Victim {
    pid: libc::pid_t,
}

impl Victim {
    /// A child that will call `turn` so many times, with the number of each.
    ///
    /// `turn` touches nothing that another thread may have locked when it is called here, but for memory to be allocated.
    pub fn new(count: usize, mut turn: impl FnMut(usize)) -> Self {
        // SAFETY: as above; the C library makes its allocator ready for a child.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: plain system calls; nothing of this process is run after them.
            unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                for number in 0..count {
                    libc::raise(libc::SIGSTOP);
                    turn(number);
                }
                libc::raise(libc::SIGSTOP);
                libc::_exit(0);
            }
        }
        let victim = Self { pid };
        assert_eq!(victim.wait(), libc::SIGSTOP, "it stops before its first turn");
        victim
    }

    /// The signal that stopped it.
    fn wait(&self) -> libc::c_int {
        let mut status = 0;
        // SAFETY: `status` is valid for writing, and the child is ours.
        assert_eq!(unsafe { libc::waitpid(self.pid, &raw mut status, 0) }, self.pid);
        assert!(libc::WIFSTOPPED(status), "it ended: {status:#x}");
        libc::WSTOPSIG(status)
    }

    /// One turn, `look` behind each instruction.
    pub fn turn(&self, mut look: impl FnMut()) {
        for _ in 0..STEPS_MAX {
            // SAFETY: the child is stopped and traced by this thread.
            assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, self.pid, 0, 0) }, 0);
            match self.wait() {
                libc::SIGTRAP => look(),
                libc::SIGSTOP => return,
                signal => panic!("it was stopped by signal {signal}"),
            }
        }
        panic!("a turn never ended");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // SAFETY: the child is ours.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

//! The system calls that no container gets: those that load code into the kernel, mount, enter or make namespaces, trace
//! other processes, set clocks, or have a record of kernel exploits and no place in a service. What is newer than this
//! list is answered with "not implemented", so that programs fall back and new kernels open no new doors.
//!
//! The filter is a small BPF program written out here, installed right before the command is run. The kernel finds out
//! once per call number that most calls are always allowed and skips the program for them.

use std::io;

const EPERM: u32 = libc::EPERM as u32;
const ENOSYS: u32 = libc::ENOSYS as u32;

/// Calls answered with "operation not permitted".
const DENIED: &[libc::c_long] = &[
    // Loading code into the kernel, replacing or stopping it.
    libc::SYS_bpf,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_perf_event_open,
    libc::SYS_reboot,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    // Mounts.
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_pivot_root,
    libc::SYS_umount2,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_open_by_handle_at,
    // Namespaces.
    libc::SYS_setns,
    libc::SYS_unshare,
    // Other processes.
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    // Keys, which are not kept apart by namespace.
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    // Clocks and accounting.
    libc::SYS_acct,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_settimeofday,
    libc::SYS_syslog,
    libc::SYS_lookup_dcookie,
    // Where exploits of the kernel begin more often than services need them.
    libc::SYS_fanotify_init,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    libc::SYS_nfsservctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_sysfs,
    #[cfg(target_arch = "x86_64")]
    libc::SYS__sysctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ustat,
];

/// Calls answered with "not implemented": programs have another way. `clone3` passes its flags where a filter can't see.
const ABSENT: &[libc::c_long] =
    &[libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// The newest call that was looked at: `futex_requeue` of Linux 6.7. Numbers have been the same on all architectures since
/// Linux 5.1.
const NEWEST: u32 = 456;

/// `CLONE_NEWNS`, `NEWCGROUP`, `NEWUTS`, `NEWIPC`, `NEWUSER`, `NEWPID` and `NEWNET`.
const NEW_NAMESPACES: u32 = 0x7e02_0000;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_ABOVE: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
const IF_ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Offsets in `struct seccomp_data`; arguments are 8 bytes each, and both architectures put their low half first.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

fn op(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn program() -> Vec<libc::sock_filter> {
    let refuse = |errno: u32| op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno);
    let mut p = vec![
        op(LOAD, 0, 0, ARCH),
        op(IF_EQUAL, 1, 0, ARCHITECTURE),
        // Another architecture's calls (32-bit programs) have other numbers: this list would not hold them.
        op(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        op(LOAD, 0, 0, NUMBER),
        // The calls of x32 lie above too.
        op(IF_ABOVE, 0, 1, NEWEST),
        refuse(ENOSYS),
    ];
    for (calls, errno) in [(DENIED, EPERM), (ABSENT, ENOSYS)] {
        for call in calls {
            p.push(op(IF_EQUAL, 0, 1, *call as u32));
            p.push(refuse(errno));
        }
    }
    // clone with a new namespace; no other call uses these bits of its first argument like that.
    p.push(op(IF_EQUAL, 0, 4, libc::SYS_clone as u32));
    p.push(op(LOAD, 0, 0, FIRST_ARGUMENT));
    p.push(op(IF_ANY_BIT, 0, 1, NEW_NAMESPACES));
    p.push(refuse(EPERM));
    p.push(op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    // Sockets to the hypervisor and to the kernel's cipher interface.
    p.push(op(IF_EQUAL, 0, 5, libc::SYS_socket as u32));
    p.push(op(LOAD, 0, 0, FIRST_ARGUMENT));
    p.push(op(IF_EQUAL, 2, 0, libc::AF_VSOCK as u32));
    p.push(op(IF_EQUAL, 1, 0, libc::AF_ALG as u32));
    p.push(op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    p.push(refuse(EPERM));
    // personality: 0, Linux with 32-bit addresses, and asking which one it is.
    p.push(op(IF_EQUAL, 0, 4, libc::SYS_personality as u32));
    p.push(op(LOAD, 0, 0, FIRST_ARGUMENT));
    p.push(op(IF_EQUAL, 2, 0, 0));
    p.push(op(IF_EQUAL, 1, 0, 0xffff_ffff));
    p.push(refuse(EPERM));
    p.push(op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    p
}

/// Puts the calling thread, and what it becomes and begets, under the filter. It must have given up gaining privileges.
pub(super) fn install() -> io::Result<()> {
    let program = program();
    let length = u16::try_from(program.len()).expect("a program of some 150 instructions");
    let filter = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the program, which outlives the call; it writes nothing.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program answers, by walking it as the kernel does.
    fn answer(number: libc::c_long, first: u32) -> u32 {
        let program = program();
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let i = program[at];
            let code = u32::from(i.code);
            at += 1;
            let holds = match code {
                LOAD => {
                    accumulator = match i.k {
                        NUMBER => number as u32,
                        ARCH => ARCHITECTURE,
                        FIRST_ARGUMENT => first,
                        other => panic!("offset {other}"),
                    };
                    continue;
                }
                RETURN => return i.k,
                IF_EQUAL => accumulator == i.k,
                IF_ABOVE => accumulator > i.k,
                IF_ANY_BIT => accumulator & i.k != 0,
                other => panic!("code {other}"),
            };
            at += usize::from(if holds { i.jt } else { i.jf });
        }
    }

    #[test]
    fn what_services_need_passes_and_what_breaks_out_does_not() {
        let refused = libc::SECCOMP_RET_ERRNO | EPERM;
        let absent = libc::SECCOMP_RET_ERRNO | ENOSYS;
        for call in [libc::SYS_read, libc::SYS_execve, libc::SYS_futex, libc::SYS_accept4, libc::SYS_epoll_wait] {
            assert_eq!(answer(call, 0), libc::SECCOMP_RET_ALLOW, "{call}");
        }
        for call in [libc::SYS_mount, libc::SYS_bpf, libc::SYS_ptrace, libc::SYS_setns, libc::SYS_unshare] {
            assert_eq!(answer(call, 0), refused, "{call}");
        }
        assert_eq!(answer(libc::SYS_clone3, 0), absent);
        assert_eq!(answer(9999, 0), absent);
        assert_eq!(answer(libc::SYS_clone, libc::SIGCHLD as u32), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(libc::SYS_clone, libc::CLONE_NEWUSER as u32), refused);
        assert_eq!(answer(libc::SYS_socket, libc::AF_INET as u32), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(libc::SYS_socket, libc::AF_VSOCK as u32), refused);
        assert_eq!(answer(libc::SYS_socket, libc::AF_ALG as u32), refused);
        assert_eq!(answer(libc::SYS_personality, 0), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(libc::SYS_personality, 0x0040_0000), refused);
    }
}

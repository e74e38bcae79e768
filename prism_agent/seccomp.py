"""System-call filters of a sandbox, built by libseccomp.

Two filters, and a call must pass both. The first is an allow-list by name: what is not in it does
not exist (ENOSYS), or is forbidden (EPERM) where programs expect that answer. The second looks at
the arguments of what the first lets pass. The list follows the default profile of Docker; here
nothing depends on capabilities, for a sandbox has none, and what takes from the whole machine is
left out: asynchronous I/O (`io_setup`: fs.aio-max-nr is one number for all) and `sync`.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_NE, _LT, _EQ, _GT, _MASKED_EQ = 1, 2, 4, 6, 7

_ALLOWED_TEXT: Final = """
accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown
chown32 clock_adjtime clock_getres clock_gettime clock_nanosleep clone close close_range connect
copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait
epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat
faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync
fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex
futex_requeue futex_wait futex_waitv futex_wake futimesat get_mempolicy get_robust_list
get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer
getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit
getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch
inotify_init inotify_init1 inotify_rm_watch
ioctl ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
landlock_restrict_self lchown lgetxattr link linkat listen listxattr llistxattr lremovexattr lseek
lsetxattr lstat madvise map_shadow_stack mbind membarrier memfd_create mincore mkdir mkdirat mknod
mknodat mlock mlock2 mlockall mmap modify_ldt mprotect mq_getsetattr mq_notify mq_open
mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock
munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_open
pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv
preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 ptrace pwrite64
pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg
remap_file_pages removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction
rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop
sendfile sendmmsg sendmsg sendto set_mempolicy set_mempolicy_home_node set_robust_list
set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority
setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr shmat shmctl
shmdt shmget shutdown sigaltstack signalfd signalfd4 socket socketpair splice stat statfs statx
symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times
tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid
waitpid write writev
"""
ALLOWED: Final = tuple(_ALLOWED_TEXT.split())

#: Programs ask for these and expect to be told that they may not.
_FORBIDDEN_TEXT: Final = """
acct add_key bpf chroot clock_settime delete_module fanotify_init finit_module fsconfig fsmount
fsopen fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp
kexec_file_load kexec_load keyctl lookup_dcookie mount mount_setattr move_mount move_pages
migrate_pages nfsservctl open_by_handle_at open_tree perf_event_open pidfd_getfd pivot_root
process_madvise quotactl quotactl_fd reboot request_key setdomainname sethostname setns
settimeofday swapoff swapon syslog umount umount2 unshare userfaultfd uselib vhangup
"""
FORBIDDEN: Final = tuple(_FORBIDDEN_TEXT.split())

#: Personalities that programs use; the others switch protections off.
_PERSONALITIES: Final = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
#: mnt, cgroup, uts, ipc, user, pid, net.
_NAMESPACE_FLAGS: Final = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
#: Push input, the console's selection, and line disciplines: kernel code that nothing here needs.
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423
_S_IFMT, _S_IFCHR, _S_IFBLK = 0o170000, 0o020000, 0o060000


class SeccompError(Exception):
    """No filter can be built: without one, nothing is run."""


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """One system call, with conditions on its arguments: (index, operator, value, value).

    `error` None lets it pass; 0 does nothing, and says that it was done.
    """

    call: str
    error: int | None
    conditions: tuple[tuple[int, int, int, int], ...] = ()


def _by_arguments() -> Iterator[Rule]:
    """Yield what is refused of the calls that are allowed."""
    for flag in _NAMESPACE_FLAGS:
        yield Rule("clone", errno.EPERM, ((0, _MASKED_EQ, flag, flag),))
    # The kernel looks at 32 bits of a request, so the upper ones must not make a difference.
    for request in (_TIOCSTI, _TIOCLINUX, _TIOCSETD):
        yield Rule("ioctl", errno.EPERM, ((1, _MASKED_EQ, 0xFFFFFFFF, request),))
    for call, argument in (("mknod", 1), ("mknodat", 2)):
        for kind in (_S_IFCHR, _S_IFBLK):
            yield Rule(call, errno.EPERM, ((argument, _MASKED_EQ, _S_IFMT, kind),))
    # All that a sandbox may write is memory, but these would flush the disks of the whole machine.
    for call in ("sync", "syncfs"):
        yield Rule(call, 0)
    # Limits of another process are checked by user only, so the supervisor's could be taken away.
    yield Rule("prlimit64", errno.EPERM, ((0, _NE, 0, 0),))
    allowed = (_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK)
    for family in range(_AF_NETLINK):
        if family not in allowed:
            yield Rule("socket", errno.EAFNOSUPPORT, ((0, _EQ, family, 0),))
    # VSOCK, PACKET's successors, ALG and all to come: some are bound to no network namespace.
    yield Rule("socket", errno.EAFNOSUPPORT, ((0, _GT, _AF_NETLINK, 0),))
    # Of netlink only routes, which libc reads to list interfaces.
    yield Rule("socket", errno.EPROTONOSUPPORT, ((0, _EQ, _AF_NETLINK, 0), (2, _NE, 0, 0)))


def _load() -> Any:
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        raise SeccompError("libseccomp.so.2 is not installed (Debian: libseccomp2)") from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Compare),
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


class _Builder:
    def __init__(self, default: int) -> None:
        self._library = _load()
        self._context = self._library.seccomp_init(default)
        if not self._context:
            raise SeccompError("libseccomp does not work on this machine")

    def add(self, rule: Rule) -> None:
        """Add a rule; a call that this architecture or library does not know needs none."""
        number = self._library.seccomp_syscall_resolve_name(rule.call.encode())
        if number < 0:
            return
        conditions = (_Compare * len(rule.conditions))(*(_Compare(*c) for c in rule.conditions))
        action = _ALLOW if rule.error is None else _ERRNO | rule.error
        result = self._library.seccomp_rule_add_array(
            self._context, action, number, len(rule.conditions), conditions
        )
        if result != 0:
            raise SeccompError(f"rule for {rule.call}: {os.strerror(-result)}")

    def export(self) -> bytes:
        descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            result = self._library.seccomp_export_bpf(self._context, descriptor)
            if result != 0:
                raise SeccompError(f"export: {os.strerror(-result)}")
            return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        finally:
            os.close(descriptor)
            self._library.seccomp_release(self._context)


def build_filters() -> tuple[bytes, bytes]:
    """Return the two filters as programs for the kernel.

    Raises:
        SeccompError: They cannot be built.
    """
    names = _Builder(_ERRNO | errno.ENOSYS)
    for call in ALLOWED:
        names.add(Rule(call, None))
    for value in _PERSONALITIES:
        names.add(Rule("personality", None, ((0, _EQ, value, 0),)))
    for call in FORBIDDEN:
        names.add(Rule(call, errno.EPERM))
    arguments = _Builder(_ALLOW)
    for rule in _by_arguments():
        arguments.add(rule)
    return names.export(), arguments.export()

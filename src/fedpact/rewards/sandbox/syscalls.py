"""The system-call filter of the jail, assembled as classic BPF for x86_64 and aarch64: a list of what may pass.

Two filters come from one table. `while_starting` is what the kernel applies from the `execve` of the interpreter on;
it lets the loader and the interpreter start, set their own limits and put the second filter on. That one stays while
hostile code runs: no process, no program, no thread, no socket, no signal, no write through a path, no key, no ring.
What is not listed fails with EPERM, `clone3` with ENOSYS (the C library then tries `clone`, which is not listed), and
a call made through another machine's or x32's numbers kills the process.
"""

from __future__ import annotations

import errno
import platform
import struct

# Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
_X86_64 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "ioctl": 16, "pread64": 17, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39,
    "execve": 59, "exit": 60, "uname": 63, "fcntl": 72, "getcwd": 79, "readlink": 89, "gettimeofday": 96,
    "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "sigaltstack": 131, "prctl": 157, "arch_prctl": 158, "gettid": 186, "time": 201,
    "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232,
    "epoll_ctl": 233, "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270,
    "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291, "dup3": 292,
    "pipe2": 293, "prlimit64": 302, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "clone3": 435,
    "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24,
    "fcntl": 25, "ioctl": 29, "faccessat": 48, "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62,
    "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73,
    "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "set_tid_address": 96,
    "futex": 98, "set_robust_list": 99, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
    "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128,
    "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160,
    "getrlimit": 163, "getrusage": 165, "prctl": 167, "gettimeofday": 169, "getpid": 172, "getppid": 173,
    "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214,
    "munmap": 215, "mremap": 216, "execve": 221, "mmap": 222, "mprotect": 226, "madvise": 233, "prlimit64": 261,
    "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "clone3": 435, "faccessat2": 439,
}  # fmt: skip
NUMBERS = {"x86_64": _X86_64, "aarch64": _AARCH64}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Only to start: the loader and the interpreter need them, the jailed program does not.
_STARTING = {"execve", "arch_prctl", "set_tid_address", "set_robust_list", "rseq"}

# Calls that pass only with certain values of one argument: (which argument, the values).
_PR_SET_SECCOMP = 22
_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_TCGETS, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x541B, 0x5421, 0x5450, 0x5451
_ONLY_VALUES = {
    # Not F_SETOWN and F_SETSIG: with O_ASYNC on a pipe they send any signal to any process of the same user.
    "fcntl": (1, (_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC)),
    "ioctl": (1, (_TCGETS, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX)),
}
_ONLY_VALUES_WHILE_STARTING = {"prctl": (0, (_PR_SET_SECCOMP,)), "prlimit64": (0, (0,))}

# O_ACCMODE, O_CREAT, O_TRUNC, O_APPEND and the bit of O_TMPFILE that O_DIRECTORY does not share; same on both machines.
_WRITING_FLAGS = 0o3 | 0o100 | 0o1000 | 0o2000 | 0o20000000

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data
_X32_BIT = 0x40000000


def assemble(machine: str | None = None, *, while_starting: bool = False) -> bytes:
    """The filter as an array of `struct sock_filter`, for `bwrap --seccomp` or PR_SET_SECCOMP.

    Raises OSError where there is no table for `machine` (this one by default).
    """
    machine = machine or platform.machine()
    if machine not in NUMBERS:
        raise OSError(f"code rewards: no system-call table for {machine}; there is one for x86_64 and for aarch64")
    return b"".join(struct.pack("=HBBI", *step) for step in _steps(machine, while_starting))


def _steps(machine: str, while_starting: bool) -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, operand) of each instruction; every jump is short and forward."""
    numbers = NUMBERS[machine]
    steps = [(_LD, 0, 0, _ARCH), (_JEQ, 1, 0, AUDIT_ARCH[machine]), (_RET, 0, 0, _KILL), (_LD, 0, 0, _NR)]
    if machine == "x86_64":
        steps += [(_JGE, 0, 1, _X32_BIT), (_RET, 0, 0, _KILL)]
    steps += [(_JEQ, 0, 1, numbers["clone3"]), (_RET, 0, 0, _ERRNO | errno.ENOSYS)]
    only = _ONLY_VALUES | (_ONLY_VALUES_WHILE_STARTING if while_starting else {})
    for name, (argument, values) in only.items():
        steps += _if_one_of(numbers[name], argument, values)
    # The mode of an opened file is in the low half of its third argument; a set bit means that it could write.
    steps += [(_JEQ, 0, 4, numbers["openat"]), (_LD, 0, 0, _ARGS + 8 * 2), (_JSET, 1, 0, _WRITING_FLAGS)]
    steps += [(_RET, 0, 0, _ALLOW), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    for name in allowed(machine, while_starting=while_starting):
        steps += [(_JEQ, 0, 1, numbers[name]), (_RET, 0, 0, _ALLOW)]
    return [*steps, (_RET, 0, 0, _ERRNO | errno.EPERM)]


def allowed(machine: str, *, while_starting: bool) -> list[str]:
    """The calls that pass whatever their arguments are."""
    judged = {"clone3", "openat", *_ONLY_VALUES, *_ONLY_VALUES_WHILE_STARTING}
    return [name for name in NUMBERS[machine] if name not in judged and (while_starting or name not in _STARTING)]


def _if_one_of(number: int, argument: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Allow call `number` where the low half of `argument` is one of `values`, else EPERM; skipped for other calls."""
    tests = [(_JEQ, len(values) - i, 0, value) for i, value in enumerate(values)]
    body = [(_LD, 0, 0, _ARGS + 8 * argument), *tests, (_RET, 0, 0, _ERRNO | errno.EPERM), (_RET, 0, 0, _ALLOW)]
    return [(_JEQ, 0, len(body), number), *body]

"""The filter is read back by a small machine of our own, and its numbers by the kernel's headers."""

from __future__ import annotations

import errno
import functools
import os
import re
import struct
from pathlib import Path

import pytest

from fedpact.rewards.sandbox.syscalls import AUDIT_ARCH, NUMBERS, allowed, assemble

MACHINES = sorted(NUMBERS)
ALLOWED, KILLED, REFUSED, ABSENT = "allowed", "killed", "refused", "absent"
HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+) (\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
}
DANGEROUS = {
    "clone", "fork", "vfork", "execveat", "kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo",
    "pidfd_open", "pidfd_send_signal", "pidfd_getfd", "socket", "socketpair", "connect", "bind", "sendto", "sendmsg",
    "accept", "ptrace", "process_vm_readv", "process_vm_writev", "mount", "umount2", "unshare", "setns", "chroot",
    "pivot_root", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_setup", "add_key",
    "request_key", "keyctl", "memfd_create", "memfd_secret", "open", "creat", "openat2", "open_by_handle_at",
    "truncate", "ftruncate", "unlink", "unlinkat", "rename", "renameat", "renameat2", "link", "linkat", "symlink",
    "symlinkat", "mkdir", "mkdirat", "mknod", "mknodat", "chmod", "fchmod", "fchmodat", "chown", "fchown", "fchownat",
    "utimensat", "setxattr", "setpriority", "sched_setaffinity", "sched_setscheduler", "setrlimit", "setsid",
    "setuid", "setgid", "setresuid", "capset", "shmget", "shmat", "msgget", "semget", "mq_open", "timer_create",
    "setitimer", "personality", "seccomp", "process_madvise", "init_module", "finit_module", "kexec_load", "reboot",
    "vmsplice", "splice", "sendfile", "fallocate", "inotify_init1", "fanotify_init", "quotactl", "syslog", "acct",
}  # fmt: skip


@functools.cache
def filter_steps(machine: str, while_starting: bool) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("=HBBI", assemble(machine, while_starting=while_starting)))


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None, while_starting: bool = False) -> str:
    """What the kernel would answer, by classic BPF as its manual describes it."""
    arch = AUDIT_ARCH[machine] if arch is None else arch
    data = struct.pack("=iIQ6Q", number, arch, 0, *(*arguments, *[0] * (6 - len(arguments))))
    steps = filter_steps(machine, while_starting)
    at = accumulator = 0
    while True:
        code, if_true, if_false, operand = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif code == 0x06:
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED, 0x50001: REFUSED, 0x50000 + errno.ENOSYS: ABSENT}[operand]
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: accumulator & operand != 0}
            at += if_true if holds[code] else if_false


def header(machine: str) -> dict[str, int]:
    path, pattern = HEADERS[machine]
    if not path.exists():
        pytest.skip(f"{path} is not installed (linux-libc-dev)")
    numbers = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
    return numbers | {"newfstatat": numbers.get("newfstatat", numbers.get("fstatat", -1))}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_is_the_one_in_the_kernels_header(machine: str) -> None:
    known = header(machine)
    assert {name: known.get(name) for name in NUMBERS[machine]} == NUMBERS[machine]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("while_starting", [False, True])
def test_a_call_passes_if_and_only_if_it_is_listed(machine: str, while_starting: bool) -> None:
    passing = {NUMBERS[machine][name] for name in allowed(machine, while_starting=while_starting)}
    judged = {NUMBERS[machine][name] for name in ("clone3", "openat", "fcntl", "ioctl", "prctl", "prlimit64")}
    for number in set(range(1024)) - judged:
        expected = ALLOWED if number in passing else REFUSED
        assert verdict(machine, number, while_starting=while_starting) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
def test_no_dangerous_call_passes(machine: str) -> None:
    known = header(machine)
    dangerous = [known[name] for name in DANGEROUS if name in known]
    assert len(dangerous) > 80
    for starting in (False, True):
        assert {verdict(machine, number, while_starting=starting) for number in dangerous} == {REFUSED}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_program_is_executed_once_and_not_again(machine: str) -> None:
    execve = NUMBERS[machine]["execve"]
    assert verdict(machine, execve, while_starting=True) == ALLOWED
    assert verdict(machine, execve) == REFUSED


@pytest.mark.parametrize("machine", MACHINES)
def test_clone3_looks_absent_so_that_the_c_library_tries_the_call_that_is_refused(machine: str) -> None:
    assert verdict(machine, 435) == ABSENT


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("other", [0x40000003, 0x40000028, 0xC000003E, 0xC00000B7])
def test_another_machines_numbers_kill_the_process(machine: str, other: int) -> None:
    expected = ALLOWED if other == AUDIT_ARCH[machine] else KILLED
    assert verdict(machine, NUMBERS[machine]["read"], arch=other) == expected


def test_x32_numbers_kill_the_process() -> None:
    assert verdict("x86_64", 0x40000000 + NUMBERS["x86_64"]["read"]) == KILLED
    assert verdict("x86_64", -1) == KILLED


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (os.O_RDONLY, ALLOWED),
        (os.O_RDONLY | os.O_CLOEXEC, ALLOWED),
        (os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, ALLOWED),
        (os.O_WRONLY, REFUSED),
        (os.O_RDWR, REFUSED),
        (3, REFUSED),
        (os.O_CREAT, REFUSED),
        (os.O_TRUNC, REFUSED),
        (os.O_APPEND, REFUSED),
        (os.O_TMPFILE, REFUSED),
        (0o20000000 | 0o40000, REFUSED),  # O_TMPFILE on aarch64
        (os.O_RDWR | 1 << 40, REFUSED),
    ],
)
def test_a_file_opens_for_reading_only(machine: str, flags: int, expected: str) -> None:
    assert verdict(machine, NUMBERS[machine]["openat"], 0, 0, flags) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_a_folder_can_be_opened(machine: str) -> None:
    directory = {"x86_64": 0o200000, "aarch64": 0o40000}[machine]
    assert verdict(machine, NUMBERS[machine]["openat"], 0, 0, directory | os.O_CLOEXEC) == ALLOWED


@pytest.mark.parametrize("machine", MACHINES)
def test_descriptors_can_be_copied_but_not_made_to_signal(machine: str) -> None:
    verdicts = {command: verdict(machine, NUMBERS[machine]["fcntl"], 1, command) for command in range(1100)}
    assert {command for command, answer in verdicts.items() if answer == ALLOWED} == {0, 1, 2, 3, 4, 1030}
    assert verdict(machine, NUMBERS[machine]["fcntl"], 0, 8) == REFUSED  # F_SETOWN on descriptor 0


@pytest.mark.parametrize("machine", MACHINES)
def test_no_device_is_driven(machine: str) -> None:
    answers = {request: verdict(machine, NUMBERS[machine]["ioctl"], 0, request) for request in range(0x5400, 0x5500)}
    passing = {request for request, answer in answers.items() if answer == ALLOWED}
    assert passing == {0x5401, 0x541B, 0x5421, 0x5450, 0x5451}  # TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX


@pytest.mark.parametrize("machine", MACHINES)
def test_limits_are_set_before_hostile_code_runs_and_only_on_itself(machine: str) -> None:
    prlimit, prctl = NUMBERS[machine]["prlimit64"], NUMBERS[machine]["prctl"]
    assert verdict(machine, prlimit, 0, 9, while_starting=True) == ALLOWED
    assert verdict(machine, prlimit, 1, 9, while_starting=True) == REFUSED
    assert verdict(machine, prlimit, 0, 9) == REFUSED
    assert verdict(machine, prctl, 22, while_starting=True) == ALLOWED  # PR_SET_SECCOMP
    assert verdict(machine, prctl, 1, while_starting=True) == REFUSED  # PR_SET_PDEATHSIG
    assert verdict(machine, prctl, 22) == REFUSED


def test_a_machine_without_a_table_is_refused_in_one_line() -> None:
    with pytest.raises(OSError, match=r"^code rewards: no system-call table for riscv64; .*aarch64$"):
        assemble("riscv64")

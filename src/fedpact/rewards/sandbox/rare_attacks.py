"""Attacks that go around a jail which only stops the common ones: handles, kernel objects, other processes."""

from __future__ import annotations

import fcntl
import os
import resource

from fedpact.rewards.sandbox.attacks import Attack, secret_seen, victim_died
from fedpact.rewards.sandbox.scene import Scene, Trace, field, links, state

_HARMLESS = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]")


def _special(scene: Scene, trace: Trace) -> bool:
    kinds = ("anon_inode:", "/memfd:", "socket:")
    return any(link.startswith(kinds) and link not in _HARMLESS for link in links(trace.pid))


RARE_ATTACKS = (
    Attack(
        "connect to an abstract socket",
        """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect('\\0' + MARK)
""",
        seen=lambda scene, trace: scene.reached("abstract"),
    ),
    Attack(
        "a socket of any family",
        """
import socket
held = []
for family in range(46):
    for kind in (1, 2, 3, 5):
        try:
            held.append(socket.socket(family, kind))
        except OSError:
            pass
held += socket.socketpair()
""",
        seen=lambda scene, trace: any(link.startswith("socket:") for link in links(trace.pid)),
    ),
    Attack(
        "list a private folder",
        """
import os
print(os.listdir(FOLDER), flush=True)
""",
        seen=secret_seen,
    ),
    Attack(
        "alter files without opening them",
        """
import os
file = FOLDER + '/private'
for way in (lambda: os.truncate(file, 1), lambda: os.chmod(file, 0o777),
            lambda: os.utime(file, (1, 1)), lambda: os.link(file, FOLDER + '/l'),
            lambda: os.symlink('/', FOLDER + '/s'), lambda: os.mkdir(FOLDER + '/d'),
            lambda: os.mkfifo(FOLDER + '/f'), lambda: os.rename(file, FOLDER + '/r'),
            lambda: os.unlink(FOLDER + '/r'), lambda: os.setxattr(file, 'user.x', b'x')):
    try:
        way()
    except OSError:
        pass
""",
        seen=lambda scene, trace: scene.changed(),
    ),
    Attack(
        "execute a program",
        """
import os, sys
os.execv(sys.executable, [sys.executable, '-c', 'print(chr(10)+"done",flush=True);input()', 'executed-' + MARK])
""",
        seen=lambda scene, trace: scene.executed(),
    ),
    Attack(
        "execute a program held in memory",
        """
import os, sys
fd = os.memfd_create('x')
program = open(sys.executable, 'rb').read()
while program:
    program = program[os.write(fd, program):]
os.execve(fd, [sys.executable, '-c', 'print(chr(10)+"done",flush=True);input()', 'executed-' + MARK], {})
""",
        seen=lambda scene, trace: scene.executed(),
    ),
    Attack(
        "trace another process",
        """
import ctypes, os
C = ctypes.CDLL(None, use_errno=True)
C.ptrace(0x4206, VICTIM, None, None)
""",
        seen=lambda scene, trace: field(scene.victim.pid, "TracerPid") != 0,
    ),
    Attack(
        "read another process's memory",
        """
import ctypes, os
C = ctypes.CDLL(None, use_errno=True)
class V(ctypes.Structure):
    _fields_ = [('a', ctypes.c_void_p), ('n', ctypes.c_size_t)]
b = ctypes.create_string_buffer(64)
mine, theirs = V(ctypes.addressof(b), 64), V(ADDRESS, 64)
C.process_vm_readv(VICTIM, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
os.write(1, b.raw)
os.write(1, os.pread(os.open('/proc/%d/mem' % VICTIM, os.O_RDONLY), 64, ADDRESS))
""",
        seen=secret_seen,
    ),
    Attack(
        "limit another process",
        """
import resource
resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (17, 17))
""",
        seen=lambda scene, trace: resource.prlimit(scene.victim.pid, resource.RLIMIT_NOFILE)[0] == 17,
    ),
    Attack(
        "slow another process down",
        """
import os
os.setpriority(os.PRIO_PROCESS, VICTIM, 19)
""",
        seen=lambda scene, trace: os.getpriority(os.PRIO_PROCESS, scene.victim.pid) == 19,
    ),
    Attack(
        "signal another process by a pipe",
        """
import fcntl, os, signal
r, w = os.pipe()
fcntl.fcntl(r, 10, signal.SIGTERM)
fcntl.fcntl(r, 8, VICTIM)
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.write(w, b'x')
""",
        seen=victim_died,
    ),
    Attack(
        "kernel objects behind descriptors",
        """
import ctypes, os
C = ctypes.CDLL(None, use_errno=True)
a = ctypes.create_string_buffer(4096)
a[0] = 1
a[4] = 4
a[8] = 4
a[12] = 1
for number in RARE_CALLS:
    C.syscall(number, 0, 0, 0, 0, 0)
    C.syscall(number, 4, a, 0, 0, 0)
    C.syscall(number, 0, a, 72, 0, 0)
os.memfd_create('x')
""",
        seen=_special,
    ),
    Attack(
        "leave a key in the kernel",
        """
import ctypes, os
C = ctypes.CDLL(None, use_errno=True)
C.syscall(ADD_KEY, b'user', MARK.encode(), b'x', 1, -4)
""",
        seen=lambda scene, trace: scene.mark in scene.kernel_keys(),
    ),
    Attack(
        "read an inherited descriptor",
        """
import os
for fd in range(3, 256):
    try:
        os.set_blocking(fd, False)
        os.write(1, os.read(fd, 4096))
    except OSError:
        pass
""",
        seen=secret_seen,
    ),
    Attack(
        "map eight gigabytes",
        """
import mmap
m = mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | 0x4000)
""",
        seen=lambda scene, trace: field(trace.pid, "VmPeak") > 2 * scene.limits.memory_mb << 10,
    ),
    Attack(
        "hundreds of open descriptors",
        """
import os
held = [os.pipe() for _ in range(200)]
""",
        seen=lambda scene, trace: len(links(trace.pid)) > 64,
    ),
    Attack(
        "lift its own limits",
        """
import resource
for n in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
    resource.setrlimit(n, (-1, -1))
""",
        seen=lambda scene, trace: resource.prlimit(trace.pid, resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY,
    ),
    Attack(
        "widen its pipe to the caller",
        """
import fcntl
fcntl.fcntl(1, 1031, 1 << 20)
""",
        seen=lambda scene, trace: fcntl.fcntl(trace.stdout, fcntl.F_GETPIPE_SZ) > 1 << 16,
    ),
    Attack(
        "write to a terminal",
        """
import os
os.write(os.open(TERMINAL, os.O_WRONLY | os.O_NOCTTY), b'x')
""",
        seen=lambda scene, trace: scene.reached("terminal"),
    ),
    Attack(
        "namespaces of its own",
        """
import ctypes, os
C = ctypes.CDLL(None, use_errno=True)
C.unshare(0x10000000)
""",
        seen=lambda scene, trace: trace.namespace() not in ("", trace.first_namespace),
    ),
    Attack(
        "stop itself for ever",
        """
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
""",
        seen=lambda scene, trace: state(trace.pid) == "T",
    ),
)

"""What hostile code tries, as programs, and what an onlooker outside the jail would see if it had worked.

Each program runs under `confinement.RUNNER` with the names of `Scene.facts` defined. None is believed: `seen` looks at
files, sockets, processes and counters outside; a program's own output counts only where it carries a token that the
program was never given. Bounded, so that the same programs can be run without a jail to show that they do work.
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass

from fedpact.rewards.sandbox.scene import Scene, Trace, field, links, state

Seen = Callable[[Scene, Trace], bool]


def never(scene: Scene, trace: Trace) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Attack:
    """Worked if `seen` says so while the program runs, or if a process of it is left after the kill."""

    name: str
    program: str
    seen: Seen = never


def _secret(scene: Scene, trace: Trace) -> bool:
    return scene.token.encode() in trace.output


def _more_processes(scene: Scene, trace: Trace) -> bool:
    return bool(scene.others(trace.pid))


def _victim_died(scene: Scene, trace: Trace) -> bool:
    return scene.victim_died()


def _resident(pid: int) -> int:
    return max(field(pid, "VmRSS"), field(pid, "VmHWM"))


def _special(link: str) -> bool:
    ours = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]")
    return link.startswith(("anon_inode:", "/memfd:", "socket:")) and link not in ours


_C = "import ctypes, os\nC = ctypes.CDLL(None, use_errno=True)\n"
_SOCKET = "import socket\n"

# The fourteen of the threat model come first, then our own.
ATTACKS = (
    Attack(
        "fork bomb",
        "import os, time\nfor _ in range(100):\n    if os.fork() == 0:\n        time.sleep(5)\n        os._exit(0)\n",
        seen=_more_processes,
    ),
    Attack(
        "daemon that outlives the grade",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(30)\n"
        "    os._exit(0)\nos.wait()\n",
    ),
    Attack(
        "memory bomb",
        "x = b'x' * (600 << 20)\n",
        seen=lambda scene, trace: _resident(trace.pid) > scene.limits.memory_mb << 10,
    ),
    Attack(
        "memory bomb in eight processes",
        "import os, time\nr, w = os.pipe()\nfor _ in range(8):\n    if os.fork() == 0:\n        x = b'x' * (60 << 20)\n"
        "        os.write(w, b'x')\n        time.sleep(5)\n        os._exit(0)\n"
        "for _ in range(8):\n    os.read(r, 1)\n",
        seen=lambda scene, trace: sum(map(_resident, scene.processes())) > scene.limits.memory_mb << 10,
    ),
    Attack(
        "infinite loop",
        "while True:\n    pass\n",
        seen=lambda scene, trace: trace.cpu_seconds() > scene.limits.cpu_seconds + 0.5,
    ),
    Attack(
        "sleep with every signal ignored",
        "import signal, time\nfor n in range(1, 64):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nprint('\\ndone', flush=True)\ntime.sleep(60)\n",
    ),
    Attack(
        "write a file",
        "import os, tempfile\nfor f in (FOLDER, os.path.expanduser('~'), tempfile.gettempdir(), '/'):\n    try:\n"
        "        open(f + '/' + MARK, 'w').write('x')\n    except OSError:\n        pass\n"
        "fd = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)\n",
        seen=lambda scene, trace: scene.changed() or any(scene.folder in link for link in links(trace.pid)),
    ),
    Attack(
        "write shared memory",
        "open('/dev/shm/' + MARK, 'w').write('x')\n",
        seen=lambda scene, trace: os.path.exists(f"/dev/shm/{scene.mark}"),  # noqa: PTH110
    ),
    Attack("read a private file", "print(open(FOLDER + '/private').read(), flush=True)\n", seen=_secret),
    Attack(
        "read another's environment",
        "import os\nout = [str(os.environ)]\n"
        "for p in ('self', '1', str(os.getppid()), str(VICTIM), *filter(str.isdigit, os.listdir('/proc'))):\n    try:\n"
        "        out.append(open('/proc/' + p + '/environ').read())\n    except (OSError, ValueError):\n        pass\n"
        "    print(*[t for t in out if 'FEDPACT_CANARY' in t][:3], flush=True)\n    out.clear()\n",
        seen=_secret,
    ),
    Attack(
        "own environment is the caller's",
        "import os\nprint(dict(os.environ), flush=True)\nprint(open('/proc/self/environ').read(), flush=True)\n",
        seen=_secret,
    ),
    Attack(
        "connect over TCP",
        _SOCKET + "s = socket.create_connection(('127.0.0.1', TCP), 2)\n",
        seen=lambda scene, trace: scene.reached("tcp"),
    ),
    Attack(
        "send over UDP",
        _SOCKET + "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))\n",
        seen=lambda scene, trace: scene.reached("udp"),
    ),
    Attack(
        "connect to a unix socket",
        _SOCKET + "s = socket.socket(socket.AF_UNIX)\ns.connect(FOLDER + '/listening')\n",
        seen=lambda scene, trace: scene.reached("unix"),
    ),
    Attack(
        "signal another process",
        "import os, signal\nby_pidfd = lambda p, s: signal.pidfd_send_signal(os.pidfd_open(p), s)\n"
        "for way in (os.kill, os.killpg, by_pidfd):\n"
        "    try:\n        way(VICTIM, signal.SIGTERM)\n    except OSError:\n        pass\n",
        seen=_victim_died,
    ),
    Attack(
        "two gigabytes of output",
        "import os\nfor _ in range(1 << 11):\n    os.write(1, b'y' * (1 << 20))\n",
        seen=lambda scene, trace: len(trace.output) > 1 << 20,
    ),
    Attack(
        "connect to an abstract socket",
        _SOCKET + "s = socket.socket(socket.AF_UNIX)\ns.connect('\\0' + MARK)\n",
        seen=lambda scene, trace: scene.reached("abstract"),
    ),
    Attack(
        "a socket of any family",
        _SOCKET + "held = []\nfor family in range(46):\n    for kind in (1, 2, 3, 5):\n        try:\n"
        "            held.append(socket.socket(family, kind))\n        except OSError:\n            pass\n"
        "held += socket.socketpair()\n",
        seen=lambda scene, trace: any(link.startswith("socket:") for link in links(trace.pid)),
    ),
    Attack("list a private folder", "import os\nprint(os.listdir(FOLDER), flush=True)\n", seen=_secret),
    Attack(
        "alter files without opening them",
        "import os\nfile = FOLDER + '/private'\n"
        "for way in (lambda: os.truncate(file, 1), lambda: os.chmod(file, 0o777),\n"
        "            lambda: os.utime(file, (1, 1)), lambda: os.link(file, FOLDER + '/l'),\n"
        "            lambda: os.symlink('/', FOLDER + '/s'), lambda: os.mkdir(FOLDER + '/d'),\n"
        "            lambda: os.mkfifo(FOLDER + '/f'), lambda: os.rename(file, FOLDER + '/r'),\n"
        "            lambda: os.unlink(FOLDER + '/r'), lambda: os.setxattr(file, 'user.x', b'x')):\n"
        "    try:\n        way()\n    except OSError:\n        pass\n",
        seen=lambda scene, trace: scene.changed(),
    ),
    Attack(
        "execute a program",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(chr(10)+\"done\",flush=True);input()', "
        "'executed-' + MARK])\n",
        seen=lambda scene, trace: scene.executed(),
    ),
    Attack(
        "execute a program held in memory",
        "import os, sys\nfd = os.memfd_create('x')\nprogram = open(sys.executable, 'rb').read()\n"
        "while program:\n    program = program[os.write(fd, program):]\n"
        "os.execve(fd, [sys.executable, '-c', 'print(chr(10)+\"done\",flush=True);input()', 'executed-' + MARK], {})\n",
        seen=lambda scene, trace: scene.executed(),
    ),
    Attack(
        "trace another process",
        _C + "C.ptrace(0x4206, VICTIM, None, None)\n",
        seen=lambda scene, trace: field(scene.victim.pid, "TracerPid") != 0,
    ),
    Attack(
        "read another process's memory",
        _C + "class V(ctypes.Structure):\n    _fields_ = [('a', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
        "b = ctypes.create_string_buffer(64)\nmine, theirs = V(ctypes.addressof(b), 64), V(ADDRESS, 64)\n"
        "C.process_vm_readv(VICTIM, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)\nos.write(1, b.raw)\n"
        "os.write(1, os.pread(os.open('/proc/%d/mem' % VICTIM, os.O_RDONLY), 64, ADDRESS))\n",
        seen=_secret,
    ),
    Attack(
        "limit another process",
        "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (17, 17))\n",
        seen=lambda scene, trace: resource.prlimit(scene.victim.pid, resource.RLIMIT_NOFILE)[0] == 17,
    ),
    Attack(
        "slow another process down",
        "import os\nos.setpriority(os.PRIO_PROCESS, VICTIM, 19)\n",
        seen=lambda scene, trace: os.getpriority(os.PRIO_PROCESS, scene.victim.pid) == 19,
    ),
    Attack(
        "signal another process by a pipe",
        "import fcntl, os, signal\nr, w = os.pipe()\nfcntl.fcntl(r, 10, signal.SIGTERM)\nfcntl.fcntl(r, 8, VICTIM)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')\n",
        seen=_victim_died,
    ),
    Attack(
        "kernel objects behind descriptors",
        _C + "a = ctypes.create_string_buffer(4096)\na[0] = 1\na[4] = 4\na[8] = 4\na[12] = 1\n"
        "for number in RARE_CALLS:\n    C.syscall(number, 0, 0, 0, 0, 0)\n    C.syscall(number, 4, a, 0, 0, 0)\n"
        "    C.syscall(number, 0, a, 72, 0, 0)\nos.memfd_create('x')\n",
        seen=lambda scene, trace: any(_special(link) for link in links(trace.pid)),
    ),
    Attack(
        "leave a key in the kernel",
        _C + "C.syscall(ADD_KEY, b'user', MARK.encode(), b'x', 1, -4)\n",
        seen=lambda scene, trace: scene.mark in scene.kernel_keys(),
    ),
    Attack(
        "read an inherited descriptor",
        "import os\nfor fd in range(3, 256):\n    try:\n        os.set_blocking(fd, False)\n"
        "        os.write(1, os.read(fd, 4096))\n    except OSError:\n        pass\n",
        seen=_secret,
    ),
    Attack(
        "map eight gigabytes",
        "import mmap\nm = mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | 0x4000)\n",
        seen=lambda scene, trace: field(trace.pid, "VmPeak") > 2 * scene.limits.memory_mb << 10,
    ),
    Attack(
        "hundreds of open descriptors",
        "import os\nheld = [os.pipe() for _ in range(200)]\n",
        seen=lambda scene, trace: len(links(trace.pid)) > 64,
    ),
    Attack(
        "lift its own limits",
        "import resource\nfor n in (resource.RLIMIT_AS, resource.RLIMIT_CPU):\n    resource.setrlimit(n, (-1, -1))\n",
        seen=lambda scene, trace: resource.prlimit(trace.pid, resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY,
    ),
    Attack(
        "widen its pipe to the caller",
        "import fcntl\nfcntl.fcntl(1, 1031, 1 << 20)\n",
        seen=lambda scene, trace: fcntl.fcntl(trace.stdout, fcntl.F_GETPIPE_SZ) > 1 << 16,
    ),
    Attack(
        "write to a terminal",
        "import os\nos.write(os.open(TERMINAL, os.O_WRONLY | os.O_NOCTTY), b'x')\n",
        seen=lambda scene, trace: scene.reached("terminal"),
    ),
    Attack(
        "namespaces of its own",
        _C + "C.unshare(0x10000000)\n",
        seen=lambda scene, trace: trace.namespace() not in ("", trace.first_namespace),
    ),
    Attack(
        "stop itself for ever",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n",
        seen=lambda scene, trace: state(trace.pid) == "T",
    ),
)

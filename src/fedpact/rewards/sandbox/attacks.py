"""What hostile code tries, as programs, and what an onlooker outside the jail would see if it had worked.

Each program runs under `confinement.RUNNER` with the names of `Scene.facts` defined. None is believed: `seen` looks at
files, sockets, processes and counters outside; a program's own output counts only where it carries a token that the
program was never given. Bounded, so that the same programs can be run without a jail to show that they do work.

Here those that a model stumbles on or every list names; `rare_attacks` has the ways around a half-made jail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpact.rewards.sandbox.scene import Scene, Trace, field, links

Seen = Callable[[Scene, Trace], bool]


def never(scene: Scene, trace: Trace) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Attack:
    """Worked if `seen` says so while the program runs, or if a process of it is left after the kill."""

    name: str
    program: str
    seen: Seen = never


def secret_seen(scene: Scene, trace: Trace) -> bool:
    return scene.token.encode() in trace.output


def victim_died(scene: Scene, trace: Trace) -> bool:
    return scene.victim_died()


def _resident(pid: int) -> int:
    return max(field(pid, "VmRSS"), field(pid, "VmHWM"))


COMMON_ATTACKS = (
    Attack(
        "fork bomb",
        """
import os, time
for _ in range(100):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
""",
        seen=lambda scene, trace: bool(scene.others(trace.pid)),
    ),
    Attack(
        "daemon that outlives the grade",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(30)
    os._exit(0)
os.wait()
""",
    ),
    Attack(
        "memory bomb",
        """
x = b'x' * (600 << 20)
""",
        seen=lambda scene, trace: _resident(trace.pid) > scene.limits.memory_mb << 10,
    ),
    Attack(
        "memory bomb in eight processes",
        """
import os, time
r, w = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        x = b'x' * (60 << 20)
        os.write(w, b'x')
        time.sleep(5)
        os._exit(0)
for _ in range(8):
    os.read(r, 1)
""",
        seen=lambda scene, trace: sum(map(_resident, scene.processes())) > scene.limits.memory_mb << 10,
    ),
    Attack(
        "infinite loop",
        """
while True:
    pass
""",
        seen=lambda scene, trace: trace.cpu_seconds() > scene.limits.cpu_seconds + 0.5,
    ),
    Attack(
        "sleep with every signal ignored",
        """
import signal, time
for n in range(1, 64):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
print('\\ndone', flush=True)
time.sleep(60)
""",
    ),
    Attack(
        "write a file",
        """
import os, tempfile
for f in (FOLDER, os.path.expanduser('~'), tempfile.gettempdir(), '/'):
    try:
        open(f + '/' + MARK, 'w').write('x')
    except OSError:
        pass
fd = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)
""",
        seen=lambda scene, trace: scene.changed() or any(scene.folder in link for link in links(trace.pid)),
    ),
    Attack(
        "write shared memory",
        """
open('/dev/shm/' + MARK, 'w').write('x')
""",
        seen=lambda scene, trace: Path("/dev/shm", scene.mark).exists(),
    ),
    Attack(
        "read a private file",
        """
print(open(FOLDER + '/private').read(), flush=True)
""",
        seen=secret_seen,
    ),
    Attack(
        "read another's environment",
        """
import os
out = [str(os.environ)]
for p in ('self', '1', str(os.getppid()), str(VICTIM), *filter(str.isdigit, os.listdir('/proc'))):
    try:
        out.append(open('/proc/' + p + '/environ').read())
    except (OSError, ValueError):
        pass
    print(*[t for t in out if 'FEDPACT_CANARY' in t][:3], flush=True)
    out.clear()
""",
        seen=secret_seen,
    ),
    Attack(
        "own environment is the caller's",
        """
import os
print(dict(os.environ), flush=True)
print(open('/proc/self/environ').read(), flush=True)
""",
        seen=secret_seen,
    ),
    Attack(
        "connect over TCP",
        """
import socket
s = socket.create_connection(('127.0.0.1', TCP), 2)
""",
        seen=lambda scene, trace: scene.reached("tcp"),
    ),
    Attack(
        "send over UDP",
        """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))
""",
        seen=lambda scene, trace: scene.reached("udp"),
    ),
    Attack(
        "connect to a unix socket",
        """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect(FOLDER + '/listening')
""",
        seen=lambda scene, trace: scene.reached("unix"),
    ),
    Attack(
        "signal another process",
        """
import os, signal
by_pidfd = lambda p, s: signal.pidfd_send_signal(os.pidfd_open(p), s)
for way in (os.kill, os.killpg, by_pidfd):
    try:
        way(VICTIM, signal.SIGTERM)
    except OSError:
        pass
""",
        seen=victim_died,
    ),
    Attack(
        "two gigabytes of output",
        """
import os
for _ in range(1 << 11):
    os.write(1, b'y' * (1 << 20))
""",
        seen=lambda scene, trace: len(trace.output) > 1 << 20,
    ),
)

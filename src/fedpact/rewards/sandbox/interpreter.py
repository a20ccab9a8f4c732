"""The interpreter that is put in a jail: the files it needs, the limits it puts on itself, who starts it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedpact.rewards.sandbox import syscalls
from fedpact.rewards.sandbox.jail import Limits

MODULES = (
    "json, math, re, collections, itertools, functools, heapq, bisect, random, string, datetime, decimal, fractions, "
    "typing, statistics, operator, copy, enum, dataclasses, hashlib, cmath, array, struct, calendar, textwrap, abc, io"
)

_ASK = f"""
import json, os, resource, _ctypes
import {MODULES}
with open("/proc/self/maps") as maps:
    mapped = {{line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}}
print(json.dumps([os.path.dirname(os.__file__), sorted(mapped)]))
"""

_TIGHTEN = """
def _tighten(limits, steps):
    import _ctypes, resource, sys
    for name, value in limits:
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    class Byte(_ctypes._SimpleCData):
        _type_ = "c"
    class Steps(_ctypes.Array):
        _type_, _length_ = Byte, len(steps)
    class Program(_ctypes.Array):
        _type_, _length_ = Byte, 16
    steps = Steps.from_buffer_copy(steps)
    address = _ctypes.addressof(steps).to_bytes(8, sys.byteorder)
    program = Program.from_buffer_copy((len(steps) // 8).to_bytes(2, sys.byteorder) + bytes(6) + address)
    prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")
    if _ctypes.call_function(prctl, (22, 2, _ctypes.byref(program), 0, 0)) != 0:
        raise SystemExit("no filter, no program")
"""

T = TypeVar("T")


FLAGS = ("-s", "-P", "-S", "-B")
"""Not -I, which would ignore the seed; what else it ignores is not in `ENVIRONMENT`."""
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All of it: a program that depends on the order of a set gets the same reward again."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """What a jail must show: one program, its standard library, and the shared objects that they load."""

    path: str
    library: str  # the folder of the standard library
    hidden: tuple[str, ...]  # installed packages inside that folder: not to be seen
    objects: tuple[tuple[str, str], ...]  # (name the loader looks for, file it stands for)
    links: tuple[tuple[str, str], ...]  # (/lib, usr/lib) and the like, on systems that merged them

    def command(self, program: str, limits: Limits) -> list[str]:
        """The command line that tightens itself and then runs `program`, which has no `__future__` import."""
        own_limits = (
            ("RLIMIT_AS", limits.memory_mb << 20),
            ("RLIMIT_CPU", limits.cpu_seconds),
            ("RLIMIT_FSIZE", 0),
            ("RLIMIT_NOFILE", 32),
            ("RLIMIT_NPROC", 0),
            ("RLIMIT_CORE", 0),
            ("RLIMIT_STACK", 8 << 20),
        )
        tighten = f"{_TIGHTEN}_tighten({own_limits!r}, {syscalls.assemble()!r})\ndel _tighten\n"
        return [self.path, *FLAGS, "-c", tighten + program]


@functools.cache
def interpreter() -> Interpreter:
    """This interpreter without its virtual environment, found out by starting it once, unconfined.

    Raises OSError where it does not start or lacks the modules that the limits need.
    """
    path = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    asked = subprocess.run([path, "-I", "-S", "-B", "-c", _ASK], env={}, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"code rewards: {path} cannot be jailed: {last}; use a Python with its whole standard library")
    library, mapped = json.loads(asked.stdout)
    objects = [Path(name) for name in mapped if ".so" in name and not Path(name).is_relative_to(library)]
    return Interpreter(
        path=path,
        library=library,
        hidden=tuple(str(p) for n in ("site-packages", "dist-packages") if (p := Path(library, n)).is_dir()),
        objects=tuple(dict.fromkeys(pair for file in objects for pair in _names(file))),
        links=tuple((f"/{n}", str(Path("/", n).readlink())) for n in ("lib", "lib64") if Path("/", n).is_symlink()),
    )


def _names(file: Path) -> list[tuple[str, str]]:
    """The names that stand for `file`: libz.so.1, which the loader asks for, for libz.so.1.2.13; /lib64/ld-*."""
    stem = file.name.split(".so")[0]
    folders = [
        file.parent,
        *(Path(os.path.realpath(folder)) for folder in ("/lib", "/lib64") if stem.startswith("ld-")),
    ]
    links = [link for folder in folders for link in folder.glob(f"{stem}.so*") if link.resolve() == file]
    return [(str(name), str(file)) for name in (file, *links)]


def from_lasting_thread(start: Callable[[], T]) -> T:
    """What `start` returns, called on a thread that lives as long as the process.

    "Killed with its parent" follows the *thread* that forked: started from a pool's short-lived thread, a jail would
    die with that thread.
    """
    return _starter(os.getpid()).submit(start).result()


@functools.cache
def _starter(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"jail-{pid}")

"""What code at a member can try with files and processes: the name of each attempt, and what came of it.

`got ...` is a success; a failure is the name of the system's error, as EACCES. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import signal
import site
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_PTRACE_SEIZE, _PIDFD_GETFD = 0x4206, 438
_LARGEST = 2**26
_libc = ctypes.CDLL(None, use_errno=True)


def tried(action: Callable[..., Any], *arguments: Any) -> str:
    """What an attempt came to."""
    try:
        found = action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "got " + (found.decode("latin-1") if isinstance(found, bytes) else str(found))


def reading(targets: dict[str, Any]) -> dict[str, str]:
    """Attempts to read files, folders, and the service's process."""
    found = {}
    for name in targets["files"]:
        found[f"read {name}"] = tried(Path(name).read_bytes)
        found[f"link {name}"] = tried(_linked, Path(name))
    for name in targets["folders"]:
        found[f"list {name}"] = tried(_names, name)
        found[f"enter {name}"] = tried(_entered, name)
    for number, pid in enumerate(services(targets)):
        at = f"service {number}"
        for entry in ("environ", "maps", "smaps", "auxv", "io", "pagemap", f"task/{pid}/environ"):
            found[f"{at} {entry}"] = tried(_start_of, f"/proc/{pid}/{entry}")
        for entry in ("fd", "map_files"):
            found[f"{at} {entry}"] = tried(_names, f"/proc/{pid}/{entry}")
        for entry in ("cwd", "root", "exe"):
            found[f"{at} {entry}"] = tried(Path(f"/proc/{pid}/{entry}").readlink)
        found[f"{at} through root"] = tried(Path(f"/proc/{pid}/root{targets['files'][0]}").read_bytes)
        found[f"{at} through cwd"] = tried(_names, f"/proc/{pid}/cwd/")
        found[f"{at} mem"] = tried(_searched, pid, targets["pattern"])
        found[f"{at} ptrace"] = tried(_called, _libc.ptrace, _PTRACE_SEIZE, pid, None, None)
        found[f"{at} process_vm_readv"] = tried(_peeked, pid)
        found[f"{at} pidfd_getfd"] = tried(_first_file, pid)
    return found


def tampering(targets: dict[str, Any]) -> dict[str, str]:
    """Attempts to put something in the socket's place, to change the member's files, and to harm its service."""
    path, own = Path(targets["socket"]), Path.home() / "own"
    own.write_text("", encoding="utf-8")
    found = {
        "unlink the socket": tried(path.unlink),
        "rename the socket": tried(path.rename, path.with_name("old")),
        "move the socket here": tried(path.rename, own.with_name("stolen")),
        "replace the socket": tried(own.replace, path),
        "bind in its place": tried(_bound, path),
        "bind beside it": tried(_bound, path.with_name("s2")),
        "chmod the socket": tried(path.chmod, 0o777),
        "chown the socket": tried(os.chown, path, os.getuid(), -1),
        "write into its folder": tried(path.with_name("x").write_text, "x"),
        "link into its folder": tried(path.with_name("x").symlink_to, own),
        "make a folder there": tried(path.with_name("x").mkdir),
        "chmod its folder": tried(path.parent.chmod, 0o777),
        "rename its folder": tried(path.parent.rename, path.parent.with_name("old")),
        "put a folder in its place": tried((path.parent.parent / "new").mkdir),
    }
    for name in targets["files"]:
        found[f"write {name}"] = tried(_appended, name)
        found[f"unlink {name}"] = tried(Path(name).unlink)
    for name in targets["folders"]:
        found[f"write into {name}"] = tried((Path(name) / "sitecustomize.py").write_text, "x")
        found[f"rename {name}"] = tried(Path(name).rename, f"{name}.old")
    for number, pid in enumerate(services(targets)):
        at = f"service {number}"
        found[f"{at} become its user"] = tried(os.setuid, Path(f"/proc/{pid}").stat().st_uid)
        found[f"{at} write mem"] = tried(os.open, f"/proc/{pid}/mem", os.O_RDWR)
        found[f"{at} limit"] = tried(resource.prlimit, pid, resource.RLIMIT_NOFILE, (3, 3))
        found[f"{at} priority"] = tried(os.setpriority, os.PRIO_PROCESS, pid, 19)
        found[f"{at} affinity"] = tried(os.sched_setaffinity, pid, os.sched_getaffinity(0))
        for one in (signal.SIGCONT, signal.SIGHUP, signal.SIGTERM, signal.SIGKILL):
            found[f"{at} {one.name}"] = tried(os.kill, pid, one)
    return found


def planting(targets: dict[str, Any]) -> dict[str, str]:
    """Attempts to leave code that a Python started later would run; it marks `targets["drop"]` with its user."""
    mark = f"import os; open({targets['drop']!r} + '/%s-' + str(os.getuid()), 'w').close()"
    own, found = Path(site.getusersitepackages()), {}
    places = [own, Path.home(), Path.cwd(), *map(Path, sys.path[:1]), *map(Path, targets["path"])]
    for folder in dict.fromkeys(places):
        for name in ("sitecustomize.py", "usercustomize.py", "planted.pth"):
            found[f"{folder / name}"] = tried(_written, folder / name, mark % name + "\n")
    startup = Path.home() / "startup.py"
    found["PYTHONSTARTUP"] = tried(_written, startup, mark % "startup" + "\n")
    os.environ |= {"PYTHONSTARTUP": str(startup), "PYTHONPATH": str(Path.home()), "PYTHONHOME": str(Path.home())}
    return found


def services(targets: dict[str, Any]) -> list[int]:
    """The processes of the attacked services; command lines are open to everybody."""
    return [
        int(entry.parent.name)
        for entry in sorted(Path("/proc").glob("[0-9]*/cmdline"))
        for line in _lines_of(entry)
        if "serve" in line and targets["client"] in line
    ]


def _lines_of(entry: Path) -> Iterator[list[str]]:
    try:
        yield entry.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return


def _names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def _start_of(file: str) -> bytes:
    with Path(file).open("rb", buffering=0) as opened:
        return opened.read(100_000)


def _searched(pid: int, pattern: str) -> str:
    """What of a process's writable memory looks like `pattern`."""
    found: set[str] = set()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            if "rw" in line.split()[1] and end - begin <= _LARGEST:
                try:
                    memory.seek(begin)
                    found |= {one.decode() for one in re.findall(pattern.encode(), memory.read(end - begin))}
                except OSError:
                    continue
    return " ".join(sorted(found))


def _called(function: Any, *arguments: Any) -> int:
    result = int(function(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _first_file(pid: int) -> int:
    return _called(_libc.syscall, _PIDFD_GETFD, os.pidfd_open(pid), 0, 0)


def _peeked(pid: int) -> int:
    """EFAULT instead of EPERM would say that this process may be read, only not at this address."""
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    remote = (ctypes.c_void_p * 2)(4096, 8)
    zero = ctypes.c_ulong(0)
    return _called(_libc.process_vm_readv, pid, local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), zero)


def _linked(path: Path) -> str:
    own = Path.home() / "linked"
    own.hardlink_to(path)
    own.unlink()
    return "a second name"


def _entered(folder: str) -> str:
    before = Path.cwd()
    os.chdir(folder)
    os.chdir(before)
    return "in"


def _bound(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(path))
    return "a socket"


def _appended(name: str) -> str:
    with Path(name).open("ab") as file:
        file.write(b"\n")
    return "a line in it"


def _written(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return "written"

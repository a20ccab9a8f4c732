"""What a jail lets out, judged from outside; each attack is also shown to work where there is no jail."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import pytest

from fedpact.errors import ConfigError
from fedpact.rewards.sandbox import bubblewrap, sandlocked
from fedpact.rewards.sandbox.confinement import ATTACK_LIMITS, ATTACKS, RUNNER, Attack, Scene, converse, stopped
from fedpact.rewards.sandbox.interpreter import interpreter
from fedpact.rewards.sandbox.jail import Confined, Jail, Limits, available_jails, chosen_jail
from fedpact.rewards.sandbox.selftest import POSITIVE_CONTROL, self_test

if platform.system() != "Linux" or not available_jails():
    pytest.skip("neither bubblewrap nor sandlock is installed", allow_module_level=True)

SOURCE = Path(__file__).parents[2] / "src"
BY_NAME = {attack.name: attack for attack in ATTACKS}
QUICK = ["fork bomb", "write a file", "read a private file", "connect over TCP", "execute a program"]
ECHO = "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.readline())\nsys.stdout.flush()\nsys.stdin.buffer.read()\n"


@pytest.fixture(params=["bubblewrap", "sandlock"])
def jail(request: pytest.FixtureRequest) -> Jail:
    found = {jail.name: jail for jail in available_jails()}
    if request.param not in found:
        pytest.skip(f"{request.param} is not installed")
    return found[request.param]


def children() -> set[str]:
    return set(" ".join(task.read_text() for task in Path("/proc/self/task").glob("*/children")).split())


def strays() -> set[str]:
    return {str(path) for folder in (tempfile.gettempdir(), "/dev/shm") for path in Path(folder).glob("fedpact-jail-*")}


def held() -> tuple[int, set[str], set[str]]:
    return len(list(Path("/proc/self/fd").iterdir())), children(), strays()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, descriptor or file outlives any test here."""
    descriptors, processes, files = held()
    yield
    for _ in range(100):  # the files are everybody's: another process may be testing jails, too
        now = held()
        if now[:2] == (descriptors, processes) and now[2] <= files:
            return
        gc.collect()  # what only an exception still holds
        time.sleep(0.2)
    assert now[:2] == (descriptors, processes)
    assert now[2] <= files


def heard(jail: Jail, text: str, limits: Limits | None = None) -> bytes:
    limits = limits or Limits()
    confined = jail.start(RUNNER, limits)
    try:
        return converse(confined, text, limits)
    finally:
        confined.kill()


@dataclass
class Unjailed:
    """What a careless grader does: a subprocess, ended politely."""

    name: str = "none"

    def start(self, program: str, limits: Limits) -> Confined:
        command = [interpreter().path, "-I", "-S", "-B", "-c", program]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=-3, bufsize=0, close_fds=False)
        assert process.stdin is not None
        assert process.stdout is not None
        return Polite(process.stdin, process.stdout, process.pid, process)


@dataclass
class Polite:
    stdin: IO[bytes]
    stdout: IO[bytes]
    pid: int
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            threading.Thread(target=self.process.wait).start()
        self.stdin.close()
        self.stdout.close()


@dataclass
class Stuck:
    """A jail in which nothing runs, and which therefore stops everything."""

    name: str = "stuck"

    def start(self, program: str, limits: Limits) -> Confined:
        raise OSError("no namespaces here")


def test_a_jailed_program_talks_over_its_two_pipes(jail: Jail) -> None:
    confined = jail.start(ECHO, Limits())
    confined.stdin.write(b"hello\n")
    assert confined.stdout.read(100) == b"hello\n"
    confined.kill()


def test_the_order_of_a_set_is_the_same_in_every_jail(jail: Jail) -> None:
    answers = {heard(jail, "print(hash('order'))") for _ in range(3)}
    assert len(answers) == 1


def test_only_the_standard_descriptors_are_open(jail: Jail) -> None:
    leak = os.pipe()
    os.set_inheritable(leak[0], True)
    try:
        assert heard(jail, "import os\nfor fd in range(300):\n    try:\n        os.fstat(fd)\n        print(fd)\n"
                     "    except OSError:\n        pass\n") == b"0\n1\n2\n"  # fmt: skip
    finally:
        os.close(leak[0])
        os.close(leak[1])


def test_the_environment_names_nothing_of_ours(jail: Jail) -> None:
    names = set(json.loads(heard(jail, "import json, os\nprint(json.dumps(sorted(os.environ)))")))
    assert names <= {"PWD", "LC_CTYPE", "PYTHONHASHSEED"}


def test_bubblewrap_shares_no_namespace_with_us() -> None:
    jail = bubblewrap.found()
    if jail is None:
        pytest.skip("bubblewrap is not installed")
    confined = jail.start(RUNNER, Limits())
    kinds = ("user", "pid", "net", "ipc", "uts", "mnt", "cgroup")
    shared = [
        kind for kind in kinds if str(Path("/proc", str(confined.pid), "ns", kind).readlink()) == own_namespace(kind)
    ]
    confined.kill()
    assert shared == []


def own_namespace(kind: str) -> str:
    return str(Path("/proc/self/ns", kind).readlink())


def test_installed_packages_are_out_of_sight(jail: Jail) -> None:
    text = "import os, sys\nlibrary = os.path.dirname(os.__file__)\nfor name in ('site-packages', 'dist-packages'):\n"
    text += "    try:\n        print(os.listdir(library + '/' + name))\n    except OSError:\n        pass\n"
    assert heard(jail, text).replace(b"[]\n", b"") == b""


def test_memory_ends_at_the_limit(jail: Jail) -> None:
    text = "try:\n    x = b'x' * (200 << 20)\nexcept MemoryError:\n    print('no memory')\nelse:\n    print('memory')\n"
    assert heard(jail, text, Limits(memory_mb=128)) == b"no memory\n"
    assert heard(jail, text, Limits(memory_mb=512)) == b"memory\n"


def test_limits_are_on_the_process_before_anything_is_sent_to_it(jail: Jail) -> None:
    confined = jail.start("import sys\nprint('up', flush=True)\nsys.stdin.read()", Limits(cpu_seconds=7, memory_mb=300))
    assert confined.stdout.read(3) == b"up\n"
    asked = {"CPU": 7, "AS": 300 << 20, "NOFILE": 32, "FSIZE": 0, "CORE": 0, "NPROC": 0}
    found = {name: resource.prlimit(confined.pid, getattr(resource, f"RLIMIT_{name}")) for name in asked}
    status = Path("/proc", str(confined.pid), "status").read_text()
    confined.kill()
    assert found == {name: (value, value) for name, value in asked.items()}
    assert "NoNewPrivs:\t1\n" in status
    assert "Seccomp:\t2\n" in status
    assert "Seccomp_filters:\t" not in status or "Seccomp_filters:\t2\n" in status  # the back end's and ours


def test_no_more_output_is_taken_than_the_limit(jail: Jail) -> None:
    assert heard(jail, "print('y' * (1 << 20))", Limits(output_bytes=5000)) == b"y" * 5000


def test_a_program_that_sleeps_is_given_up_at_the_wall_clock_limit(jail: Jail) -> None:
    began = time.monotonic()
    assert heard(jail, "import time\ntime.sleep(60)", Limits(seconds=0.3)) == b""
    assert 0.3 <= time.monotonic() - began < 5.0


def test_a_second_kill_does_nothing(jail: Jail) -> None:
    confined = jail.start(ECHO, Limits())
    pid = confined.pid
    confined.kill()
    confined.kill()
    assert not Path("/proc", str(pid)).exists()
    assert confined.stdin.closed
    assert confined.stdout.closed


def test_a_jail_started_by_a_thread_that_has_ended_still_answers(jail: Jail) -> None:
    started: list[Confined] = []
    thread = threading.Thread(target=lambda: started.append(jail.start(ECHO, Limits())))
    thread.start()
    thread.join()
    time.sleep(0.1)
    started[0].stdin.write(b"hello\n")
    assert started[0].stdout.read(100) == b"hello\n"
    started[0].kill()


def test_a_jail_dies_with_the_process_that_started_it(jail: Jail) -> None:
    code = (
        "import sys, time\nfrom fedpact.rewards.sandbox.jail import Limits, available_jails\n"
        f"jail = next(jail for jail in available_jails() if jail.name == {jail.name!r})\n"
        "program = 'import time; print(1, flush=True); time.sleep(60)'\n"
        "confined = jail.start(program, Limits())\nassert confined.stdout.read(2)\n"
        "print(confined.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    stat, deadline = Path("/proc", str(pid), "stat"), time.monotonic() + 5
    while stat.exists() and ") Z" not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stat.exists() or ") Z" in stat.read_text()


@pytest.mark.parametrize("name", QUICK)
def test_a_jail_stops(jail: Jail, name: str) -> None:
    with Scene(ATTACK_LIMITS) as scene:
        assert stopped(BY_NAME[name], jail, scene)


@pytest.mark.parametrize("name", [*QUICK, "signal another process by a pipe"])
def test_without_a_jail_it_works(name: str) -> None:
    with Scene(Limits(seconds=10.0, memory_mb=256)) as scene:
        assert not stopped(BY_NAME[name], Unjailed(), scene)


def test_the_onlooker_counts_forked_processes_while_they_live() -> None:
    with Scene(Limits(memory_mb=256)) as scene:
        confined = Unjailed().start(
            f"import os\npid = os.fork()\nprint(1, flush=True)\nos.read(0, 9)\n# {scene.mark}", Limits()
        )
        assert confined.stdout.read(2) == b"1\n"
        assert len(scene.processes()) == 2
        assert len(scene.others(confined.pid)) == 1
        confined.kill()


def test_a_jail_in_which_nothing_runs_does_not_pass() -> None:
    report = self_test(Stuck())
    assert not report.passed
    assert report.failures == [f"{POSITIVE_CONTROL} (no namespaces here)"]


def test_an_attack_that_could_not_be_started_does_not_count_as_stopped() -> None:
    with Scene(ATTACK_LIMITS) as scene, pytest.raises(OSError, match="no namespaces here"):
        stopped(BY_NAME["fork bomb"], Stuck(), scene)


def test_a_program_that_ends_before_it_is_given_anything_does_not_count_as_stopped() -> None:
    harmless = Attack("nothing", "")
    wrong = Unjailed()
    wrong.start = lambda program, limits: Unjailed().start("import sys\nsys.exit(0)", limits)  # type: ignore[method-assign]
    with Scene(ATTACK_LIMITS) as scene, pytest.raises(OSError, match="ended before it was given anything"):
        stopped(harmless, wrong, scene)


def test_with_both_back_ends_masked_code_rewards_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setitem(sys.modules, "sandlock", None)
    chosen_jail.cache_clear()
    with pytest.raises(ConfigError) as refused:
        chosen_jail()
    assert str(refused.value).startswith("code rewards: no sandbox on this machine holds (none installed); install ")
    assert "\n" not in str(refused.value)


def test_a_bwrap_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(OSError, match=r"bwrap did not start \(bwrap: setting up uid map: Permission denied\)"):
        bubblewrap.Bubblewrap(str(broken)).start(ECHO, Limits())


def test_a_back_end_that_fails_is_refused_with_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "sandlock", None)
    chosen_jail.cache_clear()
    reason = r"bubblewrap failed a correct program works \(bwrap did not start \(No permissions to create"
    with pytest.raises(ConfigError, match=reason):
        chosen_jail()


def test_bubblewrap_is_preferred_where_both_are_installed() -> None:
    installed = [shutil.which("bwrap") and "bubblewrap", find_spec("sandlock") and "sandlock"]
    assert [jail.name for jail in available_jails()] == [name for name in installed if name]
    assert sandlocked.found() is None or sandlocked.found() == sandlocked.Sandlock()


@pytest.mark.slow
def test_the_whole_self_test_passes(jail: Jail) -> None:
    report = self_test(jail)
    assert report.failures == []
    assert len(report.lines) >= 1 + len(ATTACKS)
    assert len(ATTACKS) >= 14 + 6


@pytest.mark.slow
def test_a_jail_is_chosen_once() -> None:
    chosen_jail.cache_clear()
    assert chosen_jail() is chosen_jail()
    assert chosen_jail().name == available_jails()[0].name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - set(QUICK)))
def test_without_a_jail_it_works_too(name: str) -> None:
    if name in ("trace another process", "read another process's memory"):
        scope = Path("/proc/sys/kernel/yama/ptrace_scope")
        if scope.exists() and scope.read_text().strip() != "0":
            pytest.skip("this kernel lets nobody trace but a parent")
    with Scene(Limits(seconds=20.0, cpu_seconds=1, memory_mb=256, output_bytes=1 << 30)) as scene:
        assert not stopped(BY_NAME[name], Unjailed(), scene)


@pytest.mark.slow
def test_an_unconfined_program_fails_the_self_test_by_name() -> None:
    failures = self_test(Unjailed()).failures
    assert {"read a private file", "connect over TCP", "fork bomb"} <= set(failures)
    assert POSITIVE_CONTROL not in failures


@pytest.mark.slow
def test_the_self_test_passes_for_a_user_without_rights(jail: Jail, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("already without rights: the other self-test is this one")
    own = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    python = next((path for path in (own, "/usr/bin/python3") if runs_as_nobody([path, "-c", "import ctypes"])), None)
    if python is None:
        pytest.skip("no Python here that a user without rights may read")
    spec = find_spec("sandlock")
    packages = str(Path(spec.origin).parents[1]) if spec and spec.origin else ""
    code = (
        f"import sys\nsys.path[:0] = [{str(SOURCE)!r}]\nsys.path.append({packages!r})\nimport json, os\n"
        "from fedpact.rewards.sandbox.jail import available_jails\n"
        "from fedpact.rewards.sandbox.selftest import self_test\n"
        f"jail = next(jail for jail in available_jails() if jail.name == {jail.name!r})\n"
        "report = self_test(jail)\nprint(json.dumps([os.getuid(), len(report.lines), report.failures]))\n"
    )
    if not runs_as_nobody([python, "-c", f"open({str(SOURCE / 'fedpact' / 'errors.py')!r}).close()"]):
        pytest.skip("a user without rights may not read this checkout")
    done = as_nobody([python, "-B", "-c", code])
    uid, lines, failures = json.loads(done.stdout)
    assert (uid, failures) == (65534, [])
    assert lines >= 1 + len(ATTACKS)


def as_nobody(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )  # fmt: skip


def runs_as_nobody(command: list[str]) -> bool:
    try:
        return as_nobody(command).returncode == 0
    except PermissionError:
        return False


@pytest.mark.slow
def test_a_hundred_programs_leave_nothing_behind(jail: Jail) -> None:
    for n in range(100):
        assert heard(jail, f"print({n} * 2)") == b"%d\n" % (2 * n)

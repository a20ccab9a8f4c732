from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedpact.algorithms import TABLE
from fedpact.edge.local import LocalTransport, resumed_transport
from fedpact.runtime import launch
from fedpact.runtime.codec import decode
from fedpact.runtime.config import load_run
from fedpact.runtime.envelope import Envelope
from fedpact.runtime.store import RunFolder
from tests.cli.conftest import (
    files,
    finished,
    in_process,
    in_subprocess,
    model,
    results,
    run_file,
    settings,
    stop_in_round,
    write_project,
)

__all__ = ["finished", "model", "run_file"]


def out_of(run_file: Path) -> Path:
    return run_file.parent / "runs" / "run"


def unbroken(run_file: Path, *options: str) -> dict[str, bytes]:
    """What the run of this file comes to, in a folder aside and under the same name."""
    out = run_file.parent / "unbroken" / "run"
    assert in_process("run", run_file, "--out", out, *options) == 0
    return results(out)


QUICK = ("fedcmoo", "fedgrpo")
"""One asks twice in a round, one trains at the server; the others are resumed in the slow part."""


@pytest.mark.parametrize("participation", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "algorithm", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(run_file, algorithm, participation):
    # the conflict map is resumed in the tests below
    options = [*settings(algorithm, participation), "--set", "rounds=2", "--set", "evaluation.conflicts=false"]
    expected = unbroken(run_file, *options)
    # the fourth reward of a round is asked for by its second member: one reply is in the spool; grpo asks nobody
    stop_in_round(run_file, 2, calls=2 if algorithm == "grpo" else 4, number=signal.SIGTERM)
    assert in_process("run", run_file, *options) == 143
    assert not (out_of(run_file) / "final").exists()
    spooled = list((out_of(run_file) / "rounds" / "0002.partial").glob("*/*.safetensors"))
    assert bool(spooled) == (algorithm != "grpo")
    assert in_process("resume", out_of(run_file)) == 0
    assert results(out_of(run_file)) == expected


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(run_file, finished):
    assert in_process("run", run_file) == 0
    assert results(out_of(run_file)) == results(finished)  # made in another place
    other = run_file.parent / "other" / "run"
    assert in_process("run", run_file, "--out", other, "--set", "seed=8") == 0
    adapter = "final/adapter_model.safetensors"
    assert results(other)[adapter] != results(finished)[adapter]


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 6])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_one_line_and_it_can_be_resumed(run_file, finished, capfd, number, code, calls):
    stop_in_round(run_file, 2, calls=calls, number=number)
    assert in_process("run", run_file) == code
    assert capfd.readouterr().err == (
        "fedpact: interrupted; what was committed is safe, and `fedpact resume` goes on from there\n"
    )
    assert in_process("resume", out_of(run_file)) == 0
    assert results(out_of(run_file)) == results(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_before_it_began_can_be_run_again(run_file, finished, number):
    (run_file.parent / "clients" / "stop").write_text(json.dumps(["", 2, number]))  # in the dry run of the members
    if number == signal.SIGKILL:
        assert in_subprocess("run", run_file).returncode == -9
        assert out_of(run_file).exists()
    else:
        assert in_process("run", run_file) == 128 + number
        assert not out_of(run_file).exists()
    assert in_process("run", run_file) == 0
    assert results(out_of(run_file)) == results(finished)


SERVER = """
[server]
prompts = { path = "questions.jsonl", heldout_share = 0.3 }
auxiliary = { path = "auxiliary.jsonl" }
rewards = { low = { use = "clients/rewards.py:low", audit = true } }
"""
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fedpact.cli.main import main
torch.set_num_threads(1)  # the children are forked, with everything loaded
run_file, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
main(["check", str(run_file)])


def begin(out):
    began = (out / "run.json").exists()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        main(["resume", str(out)] if began else ["run", str(run_file), "--out", str(out)])
        os._exit(0)
    return child


began = time.monotonic()
assert os.waitpid(begin(out.parent.parent / "unbroken" / "run"), 0)[1] == 0
whole = time.monotonic() - began
draw = random.Random(seed)
for _ in range(5):
    child = begin(out)
    time.sleep(draw.uniform(0.05, 0.3) * whole)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    done = sorted((out / "rounds").glob("[0-9][0-9][0-9][0-9]"))
    print("killed" if os.WIFSIGNALED(status) else f"ended {status}", done[-1].name if done else "none", flush=True)
assert os.waitpid(begin(out), 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "fedmoa", "fedgrpo"])
def test_a_run_that_is_killed_at_five_random_moments_ends_with_the_same_bytes(tmp_path, model, algorithm):
    run_file = write_project(tmp_path, model=model, rounds=12)
    text = run_file.read_text().replace('name = "fedavg"', f'name = "{algorithm}"')
    if algorithm == "fedgrpo":
        text = text.replace("local_steps", "server_steps") + SERVER
    run_file.write_text(text)
    command = [sys.executable, "-c", KILLED, run_file, out_of(run_file), "7"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    moments = [line for line in done.stdout.splitlines() if line.startswith(("killed ", "ended "))]
    assert [moment.split()[0] for moment in moments].count("killed") >= 4, moments
    assert len({moment.split()[1] for moment in moments}) >= 2, moments
    assert results(out_of(run_file)) == results(tmp_path / "unbroken" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_that_is_stopped_from_outside_leaves_a_run_to_resume(run_file, number, code):
    expected = unbroken(run_file, "--set", "rounds=12")
    out = out_of(run_file)
    command = [sys.executable, "-m", "fedpact", "run", run_file, "--set", "rounds=12"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (out / "rounds" / "0001").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait() == code
    assert not (out / "final").exists()
    resumed = in_subprocess("resume", out)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert results(out) == expected


def test_final_is_written_last_so_that_a_run_stopped_between_its_exports_goes_on(run_file, monkeypatch):
    options = [*settings("soups"), "--set", "rounds=1", "--set", "evaluation.conflicts=false"]
    expected = unbroken(run_file, *options)
    write, written = RunFolder.write_final, []

    def stopping(folder, name, *rest):
        written.append(name)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(folder, name, *rest)

    monkeypatch.setattr(RunFolder, "write_final", stopping)
    assert in_process("run", run_file, *options) == 143
    assert sorted(written[:2]) == ["brief", "low"] and written[2:] == ["final"]
    assert not (out_of(run_file) / "final").exists()
    assert in_process("resume", out_of(run_file)) == 0
    assert results(out_of(run_file)) == expected


# --- members that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def moody(tmp_path: Path, model: Path) -> Path:
    """The run file of a project of four rounds whose member east fails from round 2 on."""
    path = write_project(tmp_path / "project", model=model, rounds=4, low="moody")
    (path.parent / "clients" / "moody").write_text(str(out_of(path) / "rounds" / "0001"))
    return path


def test_a_member_that_begins_to_fail_is_named_and_dropped_and_the_run_goes_on(moody, capfd):
    assert in_process("run", moody) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == (
        f"dropped east: {moody.parent / 'clients' / 'east.toml'}: rewards.low: rewards.py:moody: raised "
        "RuntimeError: the judge is away"
    )
    assert [line for line in lines if not line.startswith("dropped east: ")] == []
    rows = [json.loads(line) for line in (out_of(moody) / "metrics.jsonl").read_text().splitlines()]
    trained = {(row["round"], row["who"]) for row in rows if row["key"] == "train/reward/low"}
    assert {who for round, who in trained if round == 1} == {"east", "north", "south"}
    assert {who for round, who in trained if round > 1} == {"north", "south"}
    ledger = [json.loads(line) for line in (out_of(moody) / "ledger.jsonl").read_text().splitlines()]
    failed = {(line["round"], line["peer"]) for line in ledger if line["decision"] == "failed"}
    assert failed == {(2, "east"), (3, "east"), (4, "east")}


@pytest.mark.slow
def test_a_run_with_too_few_replies_stops_and_goes_on_once_the_reward_is_mended(moody, capfd):
    expected = unbroken(moody, "--set", "federation.min_replies=3")  # the flag names runs/run: this one is not hit
    capfd.readouterr()
    assert in_process("run", moody, "--set", "federation.min_replies=3") == 5
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("dropped east: ")
    assert lines[1].startswith(
        "fedpact: round 2, exchange 0: 2 of 3 members replied, expected at least 3 (federation.min_replies); east: "
    )
    assert sorted(path.name for path in (out_of(moody) / "rounds").iterdir()) == ["0000", "0001", "0002.partial"]
    (moody.parent / "clients" / "moody").unlink()
    assert in_process("resume", out_of(moody)) == 0
    assert results(out_of(moody)) == expected


def test_replies_that_were_admitted_before_a_failure_are_not_asked_for_again(moody):
    assert in_process("run", moody, "--set", "federation.min_replies=3") == 5
    (moody.parent / "clients" / "moody").unlink()
    assert in_process("resume", out_of(moody)) == 0
    ledger = [json.loads(line) for line in (out_of(moody) / "ledger.jsonl").read_text().splitlines()]
    asked = [(line["peer"], line["attempt"]) for line in ledger if line["round"] == 2 and line.get("exchange") == 0
             and line["decision"] == "asked"]  # fmt: skip
    assert asked == [("east", 0), ("north", 0), ("south", 0), ("east", 1)]


@pytest.mark.slow
def test_a_run_that_goes_on_without_a_member_can_be_resumed_without_it(moody, capfd):
    assert in_process("run", moody) == 0
    expected = results(out_of(moody))
    out_of(moody).rename(moody.parent / "whole")
    stop_in_round(moody, 3, calls=2, number=signal.SIGTERM)
    assert in_process("run", moody) == 143
    capfd.readouterr()
    assert in_process("resume", out_of(moody)) == 0
    assert all(line.startswith("dropped east: ") for line in capfd.readouterr().err.splitlines())
    assert results(out_of(moody)) == expected


def test_members_whose_training_diverges_are_dropped_with_the_remedy(run_file, capfd):
    assert in_process("run", run_file, "--set", "optimizer.learning_rate=1e20") == 5
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["dropped east", "dropped north", "dropped south", "fedpact"]
    assert all("not finite" in line and "lower optimizer.learning_rate" in line for line in lines)


# --- disks that are full --------------------------------------------------------------------------------------------


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_checkpoint_costs_no_round(run_file, capfd):
    options = [*settings("fedmoa"), "--set", "rounds=2"]
    expected = unbroken(run_file, *options)
    adapter = len(expected["rounds/0001/adapter_model.safetensors"])
    assert len(expected["rounds/0001/memory.safetensors"]) > 1.8 * adapter  # two tasks: two adapters
    capfd.readouterr()
    with files_at_most(int(1.7 * adapter)):
        assert in_process("run", run_file, *options) == 4
    out = out_of(run_file)
    assert capfd.readouterr().err == (
        f"fedpact: {out}/rounds/0001: File too large; raise the file-size limit (`ulimit -f`), "
        f"then run `fedpact resume {out}`\n"
    )
    assert sorted(path.name for path in (out / "rounds").iterdir()) == ["0000", "0001.partial"]
    assert files(out / "rounds" / "0000") == files(run_file.parent / "unbroken" / "run" / "rounds" / "0000")
    assert in_process("resume", out) == 0
    assert results(out) == expected


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_member_stops_the_run_and_drops_nobody(run_file, finished, capfd):
    adapter = len(results(finished)["rounds/0001/adapter_model.safetensors"])
    with files_at_most(adapter + 10):  # a reply holds a little more than an adapter
        assert in_process("run", run_file) == 4
    out, line = out_of(run_file), capfd.readouterr().err
    assert line.startswith(f"fedpact: {out}/clients/east/memory/reply: File too large; ") and line.count("\n") == 1
    assert in_process("resume", out) == 0
    assert results(out) == results(finished)


# --- members that have left -----------------------------------------------------------------------------------------


class StoppedError(BaseException):
    """The end of the process."""


class Leaving:
    """Simulated members. `gone` are not there any more; at the first request that `ends` names, the process ends."""

    def __init__(
        self, inner: LocalTransport, gone: str = "", ends: Callable[[Envelope], bool] = lambda envelope: False
    ) -> None:
        self.inner, self.gone, self.ends = inner, gone, ends
        self.asked: list[tuple[int, str, str]] = []  # round, verb, member

    def clients(self) -> Sequence[str]:
        return [name for name in self.inner.clients() if name != self.gone]

    def exchange(self, envelopes: Mapping[str, bytes], *, timeout_s: float | None) -> Iterator[tuple[str, Any]]:
        for name, data in envelopes.items():
            if self.ends(envelope := decode(Envelope, data)):
                raise StoppedError
            self.asked.append((envelope.round, envelope.verb, name))
        return self.inner.exchange(envelopes, timeout_s=timeout_s)


class Silent:
    def round_done(self, round: int, metrics: Sequence[Mapping[str, Any]]) -> None: ...
    def dropped(self, client: str, reason: str) -> None: ...


def stopped_and_left(run_file: Path, out: Path, ends: Callable[[Envelope], bool]) -> list[tuple[int, str, str]]:
    """A run of two rounds that stops where `ends` says, and goes on without south; who was then asked what."""
    small = ["rollout.num_generations=2", "rollout.max_completion_length=2", "training.prompts_per_step=1"]
    config = load_run(run_file, [*small, "rounds=2", "evaluation.conflicts=false", "evaluation.num_prompts=2"])
    with pytest.raises(StoppedError):
        launch.start(
            config,
            run_file.parent,
            out,
            where="run.toml",
            make=lambda *given: Leaving(resumed_transport(*given), ends=ends),
            observer=Silent(),
        )
    made: list[Leaving] = []

    def make(*given: Any) -> Leaving:
        made.append(Leaving(resumed_transport(*given), gone="south"))
        return made[0]

    launch.resume(out, make=make, observer=Silent())
    return made[0].asked


def test_a_resume_goes_on_without_a_member_that_has_left_and_mixes_no_replies_of_two_rosters(run_file):
    early, late = run_file.parent / "early" / "run", run_file.parent / "late" / "run"
    stopped_and_left(run_file, early, lambda asked: (asked.round, asked.verb) == (2, "train"))
    again = stopped_and_left(run_file, late, lambda asked: (asked.round, asked.verb) == (2, "evaluate"))
    # the trainings of three members were admitted and closed; those of two are another round
    assert [one for one in again if one[:2] == (2, "train")] == [(2, "train", "east"), (2, "train", "north")]
    assert results(late) == results(early)
    state = RunFolder(late).load(2).state
    assert [one["roster"] for one in state["exchanges"]] == [["east", "north"]] * 2
    assert state["members"] == ["east", "north"]

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_store import commit, folder, tree

from fedpact.errors import StoreError
from fedpact.runtime.files import atomic_write, storing
from fedpact.runtime.store import RunFolder

__all__ = ["folder"]


@pytest.mark.parametrize("damage", ["", "torn", "more", "gone"])
def test_a_resumed_run_has_the_files_of_an_unbroken_one(tmp_path, damage):
    with RunFolder.create(tmp_path / "unbroken") as unbroken:
        unbroken.write_run({})
        for round in range(4):
            commit(unbroken, round)
    with RunFolder.create(tmp_path / "broken") as broken:
        broken.write_run({})
        commit(broken, 0)
        commit(broken, 1)
        metrics = broken.path / "metrics.jsonl"
        whole = metrics.read_bytes()
    damaged = {"": whole, "torn": whole[:-9], "more": whole + b'{"round":2,"aborted":1}\n', "gone": None}[damage]
    metrics.unlink() if damaged is None else metrics.write_bytes(damaged)
    (tmp_path / "broken/rounds/.0002.tmp").mkdir()
    (tmp_path / "broken/rounds/0001.partial/00").mkdir(parents=True)
    with RunFolder.open(tmp_path / "broken") as broken:
        assert metrics.read_bytes() == whole
        commit(broken, 2)
        commit(broken, 3)
    assert tree(broken) == tree(unbroken)
    assert sorted(path.name for path in (broken.path / "rounds").iterdir()) == ["0000", "0001", "0002", "0003"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    atomic_write(tmp_path / "a", b"old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x").touch()
    with pytest.raises(StoreError, match=r"b: Is a directory; check that path, then start again"):
        atomic_write(tmp_path / "b", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


FULL = """
import resource, sys
from fedpact.errors import StoreError
from fedpact.runtime.store import RunFolder
sys.path.insert(0, sys.argv[2])
from test_store import commit
with RunFolder.open(sys.argv[1]) as folder:
    before = sorted(str(path) for path in folder.path.rglob("*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    for write in (lambda: commit(folder, 1, size=10_000), lambda: folder.spool(1).put("west", b"x" * 30_000)):
        try:
            write()
        except StoreError as error:
            print(error)
        assert sorted(str(path) for path in folder.path.rglob("*")) == before, "something was left behind"
        assert folder.load(folder.latest_round()).round == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    commit(folder, 1, size=10_000)
    assert folder.load(1).adapter["base_model.q.lora_A.weight"].numel() == 10_000
"""


def test_a_full_disk_is_one_line_and_costs_no_round(folder):
    commit(folder, 0)
    folder.spool(1).put("north", b"reply")
    folder.close()
    command = [sys.executable, "-c", FULL, str(folder.path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    resume = f"raise the file-size limit (`ulimit -f`), then run `fedpact resume {folder.path}`"
    assert done.stdout.splitlines() == [
        f"{folder.path}/rounds/0001: File too large; {resume}",
        f"{folder.path}/rounds/0001.partial/00/west.safetensors: File too large; {resume}",
    ]


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "No space left on device; free some space on that disk, then start again"),
        (errno.EACCES, "Permission denied; give this user access to it, then start again"),
        (errno.EIO, "Input/output error; check that path, then start again"),
    ],
)
def test_a_failure_of_the_disk_is_one_line_with_its_remedy(number, line):
    with pytest.raises(StoreError) as raised, storing(Path("runs/a")):
        raise OSError(number, "")
    assert str(raised.value) == f"runs/a: {line}"


KILLED = """
import itertools, os, random, signal, sys, time
import torch
from fedpact.runtime.store import RunFolder
sys.path.insert(0, sys.argv[2])
from test_store import commit
torch.set_num_threads(1)  # the children are forked
draw = random.Random(7)
for _ in range(5):
    child = os.fork()
    if not child:
        with RunFolder.open(sys.argv[1]) as folder:
            latest = folder.latest_round()
            for round in itertools.count(0 if latest is None else latest + 1):
                folder.spool(round).put("north", b"reply" * 1000)
                folder.spool(round).close(["north"], {})
                commit(folder, round, size=50_000)
                folder.write_final("final", {"a": torch.full((50_000,), round)}, {}, "")
    while not os.path.exists(sys.argv[1] + "/final/MANIFEST"):  # the first time: until there is something to lose
        time.sleep(0.01)
    time.sleep(draw.uniform(0.1, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child ended by itself"
    folder = RunFolder(sys.argv[1])
    latest = folder.latest_round()
    assert folder.load(latest).state == {"since": {"north": [latest, 0]}}
    print(latest)
"""


def test_the_latest_round_loads_wherever_the_process_was_killed(folder):
    folder.close()
    command = [sys.executable, "-c", KILLED, str(folder.path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rounds = [int(line) for line in done.stdout.split()]
    assert len(rounds) == 5 and rounds == sorted(rounds) and rounds[-1] > rounds[0]
    with RunFolder.open(folder.path) as opened:
        lines = (opened.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(rounds[-1] + 1))
        assert [path.name for path in opened.path.rglob("*.tmp") if path.is_dir()] == []
        assert (opened.path / "final").is_dir()

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from fedpact.errors import ConfigError, StoreError
from fedpact.runtime.files import recover_folder, write_folder
from fedpact.runtime.store import RunFolder


def row(round: int, value: float) -> dict[str, object]:
    return {"round": round, "who": "north", "key": "reward", "value": value}


def commit(folder: RunFolder, round: int, *, size: int = 3) -> None:
    folder.commit(
        round,
        adapter={"base_model.q.lora_A.weight": torch.full((size,), float(round))},
        adapter_config={"r": 8, "target_modules": {"v", "q"}},
        memory={"momentum": torch.tensor([round])},
        state={"since": {"north": [round, 0]}},
        metrics=[row(round, 0.5), row(round, math.nan)],
    )


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path / "run") as made:
        made.write_run({"seed": 7})
        yield made


def tree(folder: RunFolder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_a_committed_round_is_loaded_as_it_was(folder):
    assert folder.latest_round() is None
    commit(folder, 0)
    commit(folder, 1)
    checkpoint = folder.load(1)
    assert (folder.latest_round(), checkpoint.round, checkpoint.state) == (1, 1, {"since": {"north": [1, 0]}})
    assert_close(checkpoint.adapter, {"base_model.q.lora_A.weight": torch.ones(3)})
    assert_close(checkpoint.memory, {"momentum": torch.tensor([1])})


def test_the_manifest_is_one_that_sha256sum_checks(folder):
    commit(folder, 7)
    checked = subprocess.run(["sha256sum", "-c", "MANIFEST"], cwd=folder.path / "rounds/0007", capture_output=True)
    assert checked.returncode == 0
    assert checked.stdout.count(b": OK\n") == 5


def test_sets_in_the_adapter_configuration_are_written_in_order(folder):
    commit(folder, 0)
    assert json.loads((folder.path / "rounds/0000/adapter_config.json").read_bytes())["target_modules"] == ["q", "v"]


def test_only_the_owner_can_read_what_is_written(folder):
    previous = os.umask(0)
    try:
        folder.spool(0).put("north", b"reply")
        folder.spool(0).close(["north"], {})
        commit(folder, 0)
        folder.spool(1).put("north", b"reply")
        folder.write_final("final", {"a": torch.ones(1)}, {}, "# Card")
    finally:
        os.umask(previous)
    written = [folder.path, *folder.path.rglob("*")]
    assert len(written) > 15
    assert [path.name for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_a_folder_that_holds_something_is_not_created_again(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"exists already; continue it with `fedpact resume .*run`") as raised:
        RunFolder.create(folder.path)
    assert raised.value.exit_code == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        RunFolder.create(tmp_path / "file")


def test_an_empty_folder_and_one_abandoned_before_run_json_can_be_created(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder.create(tmp_path / "run").close()
    with RunFolder.create(tmp_path / "run") as folder:
        folder.write_run({"seed": 7})
        assert folder.read_run() == {"seed": 7}


def test_a_second_process_is_refused_until_the_first_ends(folder):
    lock = ["flock", "--nonblock", str(folder.path / ".lock"), "true"]
    assert subprocess.run(lock).returncode == 1
    with pytest.raises(StoreError, match="in use by another process"):
        RunFolder.open(folder.path)
    folder.close()
    assert subprocess.run(lock).returncode == 0
    RunFolder.open(folder.path).close()


def test_reading_needs_no_lock_and_writing_does(folder):
    commit(folder, 0)
    reader = RunFolder(folder.path)
    assert (reader.latest_round(), reader.read_run(), reader.load(0).round) == (0, {"seed": 7}, 0)
    with pytest.raises(ValueError, match="only reads"):
        commit(reader, 1)


def test_a_folder_without_run_json_is_not_a_run(tmp_path):
    with pytest.raises(StoreError, match=r"not a run folder \(no run.json\)"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"run.json: changed since it was written"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "memory.safetensors", "state.json", "metrics.jsonl"])
def test_a_changed_checkpoint_is_refused_and_the_file_named(folder, name):
    commit(folder, 6)
    commit(folder, 7)
    path = folder.path / "rounds/0007" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=rf"0007/{name}: changed .*; restore it from a copy, or delete .*rounds/0007"):
        folder.load(7)
    assert folder.load(6).round == 6


def test_a_missing_file_and_a_changed_manifest_are_refused(folder):
    commit(folder, 7)
    (folder.path / "rounds/0007/state.json").unlink()
    with pytest.raises(StoreError, match=r"state.json: No such file or directory; restore"):
        folder.load(7)
    for manifest in ("", "0" * 64 + "  ../../run.json\n", "rubbish\n", "\xff"):
        (folder.path / "rounds/0007/MANIFEST").write_text(manifest, encoding="latin-1")
        with pytest.raises(StoreError, match="MANIFEST: changed since it was written"):
            folder.load(7)


def test_a_manifest_that_matches_does_not_make_rubbish_a_checkpoint(folder):
    commit(folder, 7)
    path = folder.path / "rounds/0007/adapter_model.safetensors"
    old, new = path.read_bytes(), b"rubbish"
    path.write_bytes(new)
    manifest = path.with_name("MANIFEST")
    text = manifest.read_text().replace(hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest())
    manifest.write_text(text)
    with pytest.raises(StoreError, match=r"adapter_model.safetensors: not a safetensors file"):
        folder.load(7)


def test_temporary_partial_and_half_copied_rounds_are_not_rounds(folder):
    commit(folder, 7)
    for name in (".0008.tmp", "0008.partial", "0009", "0010.old", "notes"):
        (folder.path / "rounds" / name).mkdir()
    (folder.path / "rounds/0009/state.json").write_text("{}")
    assert folder.latest_round() == 7
    commit(folder, 9)
    assert folder.load(9).round == 9


def test_a_round_is_committed_once(folder):
    commit(folder, 0)
    before = tree(folder)
    with pytest.raises(StoreError, match="committed already"):
        commit(folder, 0)
    assert tree(folder) == before


def test_metrics_are_those_of_the_rounds_without_nan(folder):
    commit(folder, 0)
    commit(folder, 1)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(0, 0.5), row(1, 0.5)]


def test_metrics_damaged_during_a_run_are_worked_out_again(folder):
    commit(folder, 0)
    (folder.path / "metrics.jsonl").write_bytes(b"{")
    commit(folder, 1)
    assert (folder.path / "metrics.jsonl").read_text().count("\n") == 2


def test_the_spool_keeps_replies_until_the_round_is_final(folder):
    spool = folder.spool(8, 1)
    assert (spool.received(), spool.roster(), spool.failures()) == ([], None, {})
    spool.put("south.v2", b"b")
    spool.put("north", b"old")
    spool.put("north", b"a")
    assert (folder.path / "rounds/0008.partial/01/north.safetensors").read_bytes() == b"a"
    assert folder.spool(8, 0).received() == []
    again = RunFolder(folder.path).spool(8, 1)
    assert (again.received(), again.get("north"), again.get("south.v2")) == (["north", "south.v2"], b"a", b"b")
    spool.close(["south.v2", "north"], {"west": "no answer in 600 s"})
    assert (again.roster(), again.failures()) == (["north", "south.v2"], {"west": "no answer in 600 s"})
    folder.spool(9).put("north", b"next")
    commit(folder, 8)
    assert not (folder.path / "rounds/0008.partial").exists()
    assert folder.spool(9).received() == ["north"]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\n", "a b", "é", "-x", "x" * 129])
def test_names_that_are_no_file_names_are_refused(folder, name):
    with pytest.raises(ValueError, match="cannot be a file name"):
        folder.spool(0).put(name, b"")
    with pytest.raises(ValueError, match="cannot be a file name"):
        folder.write_final(name, {}, {}, "")


def test_a_reply_that_was_never_received_is_named(folder):
    with pytest.raises(StoreError, match=r"north.safetensors: No such file or directory"):
        folder.spool(0).get("north")


def test_final_is_replaced_and_holds_only_what_is_published(folder):
    adapter = {"a": torch.ones(1), "critic/a": torch.ones(1), "private/a": torch.ones(1), "control/a": torch.ones(1)}
    folder.write_final("final", {"old": torch.zeros(1)}, {}, "old")
    path = folder.write_final("final", adapter, {"r": 8}, "# Card")
    assert path == folder.path / "final"
    assert list(load_file(path / "adapter_model.safetensors")) == ["a"]
    assert (path / "README.md").read_text() == "# Card"
    assert folder.write_final("brief", adapter, {}, "") == folder.path / "final-brief"
    assert [p.name for p in folder.path.iterdir() if p.name.startswith(".final")] == []


def test_the_old_folder_comes_back_if_the_new_one_never_came(tmp_path):
    write_folder(tmp_path / "final", {"a": b"old"})
    (tmp_path / "final").rename(tmp_path / ".final.old")
    (tmp_path / ".final.tmp").mkdir()
    recover_folder(tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final/a").read_bytes() == b"old"

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedpact.algorithms import TABLE
from tests.cli.conftest import MEMBERS, edit, files, in_process, in_subprocess, refusal, results, stop_in_round
from tests.conftest import tokenizer


def test_help_names_every_command_without_loading_torch():
    code = (
        "import sys\nfrom fedpact.cli.main import main\ntry:\n    main(['--help'])\nfinally:\n"
        "    assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "200"})
    assert (done.returncode, done.stderr) == (0, "")
    commands = "demo init check run resume status evaluate report algorithms doctor"
    assert [name for name in commands.split() if f" {name} " not in done.stdout] == []


def test_algorithms_lists_the_table_as_text_and_as_json(capfd):
    assert in_process("algorithms") == 0
    text = capfd.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:]][: len(TABLE)] == list(TABLE)
    assert in_process("algorithms", "--json") == 0
    listed = json.loads(capfd.readouterr().out)
    assert listed["firm"]["exchanges"] == "1" and listed.keys() >= TABLE.keys()


def test_doctor_names_the_device_and_the_versions(capfd):
    assert in_process("doctor") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].startswith("device: ") and any(line.startswith("torch 2.") for line in lines) and lines[-1] == "ok"


def test_init_writes_a_project_that_check_accepts(tmp_path, model, capfd):
    chatty = tmp_path / "model"
    shutil.copytree(model, chatty)
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    words.save_pretrained(chatty)
    assert in_process("init", tmp_path / "new") == 0
    assert in_process("check", tmp_path / "new" / "run.toml", "--set", f"policy.model={chatty}") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3].startswith("north: ") and lines[-2].startswith("south: ")
    assert lines[-1].startswith(f"{tmp_path / 'new' / 'run.toml'}: ready; 2 members, an adapter of ")


def test_init_refuses_a_folder_that_holds_something_and_leaves_it_alone(tmp_path, capfd):
    (tmp_path / "run.toml").write_text("mine")
    assert in_process("init", tmp_path) == 2
    assert capfd.readouterr().err == f"fedpact: {tmp_path}: not empty; give a new folder\n"
    assert files(tmp_path) == {"run.toml": b"mine"}


def test_check_says_a_line_for_each_member_and_writes_nothing(run_file, monkeypatch, capfd):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = sorted(run_file.parent.rglob("*"))
    assert in_process("check", run_file) == 0
    assert sorted(run_file.parent.rglob("*")) == before
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == list(MEMBERS)
    # 2 layers of 4 x 2 (32 + 32) and 3 x 2 (32 + 48)
    assert lines[3] == f"{run_file}: ready; 3 members, an adapter of 1,984 parameters crosses the network"


def test_check_measures_the_audited_rewards_too(run_file, capfd):
    assert in_process("check", run_file) == 0
    south = capfd.readouterr().out.splitlines()[2]
    assert south.startswith("south: ") and "low " in south and "brief -" in south


def test_a_run_prints_a_line_for_every_round_and_where_its_results_lie(run_file, capfd):
    assert in_process("run", run_file, "--set", "rounds=2") == 0
    shown = capfd.readouterr()
    out = run_file.parent / "runs" / "run"
    lines = shown.out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["0/2", "1/2", "2/2"]
    assert re.fullmatch(r"traffic: \d+\.\d\d MB to members, \d+\.\d\d MB back, in \d+ messages", lines[3])
    assert lines[4:] == [f"adapter: {out / 'final'}", f"report: {out / 'report.html'}"]
    assert (out / "report.html").stat().st_size > 0
    assert shown.err == ""


def test_a_run_keeps_what_the_folder_promises(finished):
    expected = ["ledger.jsonl", "metrics.jsonl", "report.html", "run.json", "final/README.md"]
    expected += [f"rounds/{number:04d}/MANIFEST" for number in range(4)]
    assert [name for name in expected if name not in files(finished)] == []
    assert [path for path in finished.rglob("*") if path.stat().st_mode & 0o077] == []


def test_a_members_prompts_and_rewards_are_in_no_file_of_the_server(finished):
    ours = {name: data for name, data in files(finished).items() if not name.startswith("clients/")}
    prompt = (finished.parents[1] / "clients" / "east.jsonl").read_text().splitlines()[0]
    text = json.loads(prompt)["prompt"].encode()
    assert [name for name, data in ours.items() if text in data or b"rewards.py" in data] == []


def test_set_changes_the_run_that_is_recorded(run_file):
    assert in_process("run", run_file, "--set", "rounds=1", "--set", "algorithm.local_steps=1") == 0
    config = json.loads((run_file.parent / "runs" / "run" / "run.json").read_text())["config"]
    assert (config["rounds"], config["algorithm"]["local_steps"]) == (1, 1)


def test_status_says_how_far_a_run_is(finished, capfd):
    assert in_process("status", finished) == 0
    assert "round 3 of 3, finished" in capfd.readouterr().out
    assert in_process("status", finished, "--json") == 0
    about = json.loads(capfd.readouterr().out)
    last = _heldout(finished, 3)
    assert (about["rounds_done"], about["rounds"], about["finished"]) == (3, 3, True)
    assert about["latest"] == pytest.approx({"heldout/low": last["low"], "heldout/brief": last["brief"]})


def test_status_names_resume_for_an_unfinished_run(run_file, capfd):
    out = run_file.parent / "runs" / "run"
    stop_in_round(run_file, 3, calls=1, number=signal.SIGTERM)
    assert in_process("run", run_file) == 143
    capfd.readouterr()
    assert in_process("status", out) == 0
    assert f"round 2 of 3, unfinished; `fedpact resume {out}` goes on" in capfd.readouterr().out


def test_evaluate_measures_every_member_and_changes_nothing(finished, capfd):
    before = files(finished)
    assert in_process("evaluate", finished, "--json") == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["round"] == 3 and list(shown["sampled"]) == list(MEMBERS)
    for figures in shown["sampled"].values():
        assert 0 <= figures["low"] <= 1 and -5 <= figures["brief"] <= 0
    assert in_process("evaluate", finished) == 0
    assert capfd.readouterr().out.splitlines()[0] == "round 3, held-out means, sampled"
    assert files(finished) == before


def test_report_writes_one_page_where_it_is_told_to(finished, tmp_path, capfd):
    page = tmp_path / "page.html"
    assert in_process("report", finished, finished, "--out", page) == 0
    assert capfd.readouterr().out == f"{page}\n"
    assert page.read_text().startswith("<")


def test_resuming_a_finished_run_changes_nothing(run_file, capfd):
    out = run_file.parent / "runs" / "run"
    assert in_process("run", run_file, "--set", "rounds=1") == 0
    before = results(out)
    capfd.readouterr()
    assert in_process("resume", out) == 0
    assert results(out) == before
    assert capfd.readouterr().err == ""


def test_an_existing_run_folder_is_refused_with_the_command_that_goes_on(run_file, finished, capfd):
    before = files(finished)
    code, line = refusal(capfd, "run", run_file, "--out", finished)
    assert (code, line) == (
        2,
        f"{finished}: exists already; continue it with `fedpact resume {finished}`, or name another",
    )
    assert files(finished) == before


@pytest.mark.parametrize("command", ["resume", "status", "evaluate", "report"])
def test_a_folder_that_holds_no_run_is_refused(tmp_path, capfd, command):
    code, line = refusal(capfd, command, tmp_path)
    assert code == 4
    assert line.startswith(f"{tmp_path}: not a run folder (no run.json); ")
    assert files(tmp_path) == {}


def test_an_unwritable_place_for_the_run_is_named(run_file, tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    code, line = refusal(capfd, "run", run_file, "--out", tmp_path / "file" / "run")
    assert code == 4 and str(tmp_path / "file") in line
    assert files(tmp_path)["file"] == b"in the way"


def test_two_processes_cannot_write_one_run(run_file, capfd):
    assert in_process("run", run_file, "--set", "rounds=1") == 0
    out = run_file.parent / "runs" / "run"
    holder = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, out / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        capfd.readouterr()
        assert in_process("resume", out) == 4
        assert capfd.readouterr().err == (
            f"fedpact: {out}: in use by another process; wait until it ends, or stop it\n"
        )
        process.communicate(b"\n")


def test_the_module_is_the_command():
    done = in_subprocess("--version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count(".") == 2


def test_an_error_is_one_line_on_the_real_stderr_too(run_file):
    edit(run_file, "seed = 7", "sed = 7")
    failed = in_subprocess("run", run_file)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith(f"fedpact: {run_file}: sed: unknown key; valid keys: algorithm, ")


def _heldout(out: Path, round: int) -> Mapping[str, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        row["key"].removeprefix("heldout/"): row["value"]
        for row in rows
        if row["round"] == round and row["who"] == "all"
    }

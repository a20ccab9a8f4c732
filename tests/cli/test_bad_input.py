from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from fedpact.runtime.engines import hash_of
from tests.cli.conftest import edit, files, in_process, refusal, results, write_project


def out_of(run_file: Path) -> Path:
    return run_file.parent / "runs" / "run"


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """The folder of a finished run that may be spoilt; its run file and members are not a test's own."""
    return shutil.copytree(finished, tmp_path / "run")


# --- before a run has begun: nothing is left behind -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_unknown_key_is_named_with_the_valid_ones(run_file, capfd, command):
    edit(run_file, "num_generations = 3", "num_generation = 3")
    before = files(run_file.parent)
    code, line = refusal(capfd, command, run_file)
    assert code == 2
    assert line == (
        f"{run_file}: rollout.num_generation: unknown key; valid keys: "
        "max_completion_length, max_prompt_length, num_generations, temperature"
    )
    assert files(run_file.parent) == before


def test_an_unknown_key_of_a_client_file_is_named_with_that_file(run_file, capfd):
    client = run_file.parent / "clients" / "north.toml"
    edit(client, "heldout_share", "held_out_share")
    code, line = refusal(capfd, "run", run_file)
    assert code == 2
    assert line.startswith(f"{client}: prompts.held_out_share: unknown key; valid keys: as_chat, heldout, ")
    assert not out_of(run_file).exists()


def test_an_unknown_key_of_an_algorithm_is_named(run_file, capfd):
    code, line = refusal(capfd, "run", run_file, "--set", "algorithm.beta=0.1")
    assert code == 2 and "algorithm.beta: unknown key; valid keys: local_steps, " in line


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("run.toml", "run.toml: no such file"),
        ("clients/north.jsonl", "clients/north.toml: prompts.path: no file"),
        ("clients/rewards.py", "clients/east.toml: rewards.low.use: no file"),
    ],
)
def test_a_missing_file_is_named(run_file, capfd, missing, expected):
    (run_file.parent / missing).unlink()
    before = files(run_file.parent)
    code, line = refusal(capfd, "run", run_file)
    assert code == 2
    assert line.startswith(str(run_file.parent / expected))
    assert files(run_file.parent) == before


def test_a_run_without_client_files_says_where_they_belong(run_file, capfd):
    code, line = refusal(capfd, "run", run_file, "--set", "simulation.clients=members")
    folder = run_file.parent / "members"
    assert (code, line) == (2, f"{folder}: no client files; expected one NAME.toml for each member")


def test_a_file_that_is_no_toml_is_named_with_the_line(run_file, capfd):
    edit(run_file, "seed = 7", "seed 7")
    code, line = refusal(capfd, "run", run_file)
    assert code == 2 and line.startswith(f"{run_file}: not readable as TOML: ") and "line 1" in line


def test_two_members_of_one_name_are_refused(run_file, capfd):
    edit(run_file.parent / "clients" / "north.toml", 'name = "north"', 'name = "east"')
    code, line = refusal(capfd, "run", run_file)
    assert code == 2 and "north.toml: name: 'east' is taken by another client file" in line
    assert not out_of(run_file).exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rounds", "--set rounds: expected key=value, such as algorithm.beta=0.1"),
        ("seed.x=1", "--set seed.x=1: seed is not a table"),
        ("rounds=0", "rounds: found 0; "),
        ("algorithm.name=nothing", "algorithm.name: found 'nothing'; expected one of fedavg, fedmoa, firm"),
        ("algorithm=3", "algorithm: found 3"),
        ("objectives.brief.primary=true", "objectives: ['low', 'brief'] are all primary; expected one at most"),
        ("objectives.brief=2", "objectives.brief: found 2"),
        ("policy.lora.target_modules=['conv']", "match no linear layer; there are ["),
    ],
)
def test_a_wrong_setting_is_named(run_file, capfd, override, expected):
    code, line = refusal(capfd, "run", run_file, "--set", override)
    assert code == 2 and expected in line
    assert not out_of(run_file).exists()


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("short_list", "returned 5 values for 6 completions; return one number for each"),
        ("not_a_number", "returned nan for completion 0; return a finite number, or None where it does not apply"),
        ("failing", "raised ZeroDivisionError: one of"),
        ("hanging", "no answer after 0.2 s (timeout_s); raise timeout_s, or make it faster"),
        ("absent", "rewards.py has no function or class 'absent'; it has "),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_reward_that_misbehaves_is_found_before_the_run_begins(tmp_path, model, capfd, command, reward, expected):
    run_file = write_project(tmp_path, model=model, low=reward)
    client = tmp_path / "clients" / "east.toml"
    edit(client, f'use = "rewards.py:{reward}"', f'use = "rewards.py:{reward}"\ntimeout_s = 0.2')
    before, began = files(tmp_path), time.monotonic()
    code, line = refusal(capfd, command, run_file)
    assert code == 2
    assert line.startswith(f"{client}: rewards.low") and expected in line
    assert files(tmp_path) == before
    assert time.monotonic() - began < 4  # the hanging one sleeps for 5 s


def test_a_reward_file_that_does_not_compile_is_named(run_file, capfd):
    (run_file.parent / "clients" / "rewards.py").write_text("def low(completions:\n")
    code, line = refusal(capfd, "run", run_file)
    assert code == 2 and "rewards.low.use: cannot import rewards.py: SyntaxError: " in line


def test_an_objective_that_the_run_does_not_have_is_named(run_file, capfd):
    edit(run_file.parent / "clients" / "east.toml", "[rewards.brief]", "[rewards.short]")
    code, line = refusal(capfd, "run", run_file)
    assert code == 2
    assert line.endswith("east.toml: rewards.short: no such objective in the run; there are low, brief")
    assert not out_of(run_file).exists()


def test_fedmoa_refuses_a_member_without_the_primary_objective(run_file, capfd):
    edit(run_file.parent / "clients" / "north.toml", '[rewards.low]\nuse = "rewards.py:low"\n', "")
    assert in_process("check", run_file) == 0  # fedavg does not mind
    code, line = refusal(capfd, "run", run_file, "--set", "algorithm.name=fedmoa", "--set", "algorithm.local_steps=1")
    assert code == 2
    assert "north.toml: rewards: lacks the primary objective 'low'" in line and "add [rewards.low]" in line
    assert not out_of(run_file).exists()


def test_a_member_whose_ceiling_the_run_exceeds_refuses_it_for_safety(run_file, capfd):
    client = run_file.parent / "clients" / "south.toml"
    client.write_text(client.read_text() + "\n[site]\nmax_learning_rate = 1e-3\n")
    code, line = refusal(capfd, "run", run_file)
    assert (code, line) == (3, f"{client}: site.max_learning_rate: the run asks for 0.01, allowed are 0.001")
    assert not out_of(run_file).exists()


@pytest.mark.parametrize(
    "spoil", ["no folder", "empty folder", "no config", "no weights", "torn weights", "no tokenizer"]
)
def test_a_path_that_holds_no_model_is_named(run_file, model, tmp_path, capfd, spoil):
    path = tmp_path / "model"
    if spoil == "empty folder":
        path.mkdir()
    elif spoil != "no folder":
        shutil.copytree(model, path)
    match spoil:
        case "no config":
            (path / "config.json").write_text('{"model_type": "abacus"}')
        case "no weights":
            (path / "model.safetensors").unlink()
        case "torn weights":
            (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:1000])
        case "no tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (path / name).unlink()
    code, line = refusal(capfd, "run", run_file, "--set", f"policy.model={path}")
    assert code == 2 and str(path) in line
    assert not out_of(run_file).exists()


def test_chat_prompts_need_a_model_with_a_chat_template(run_file, capfd):
    edit(run_file.parent / "clients" / "north.toml", "heldout_share = 0.3", "heldout_share = 0.3\nas_chat = true")
    code, line = refusal(capfd, "run", run_file)
    assert code == 2 and "chat template" in line
    assert not out_of(run_file).exists()


# --- with a run in its folder: nothing is lost ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "memory.safetensors", "state.json", "MANIFEST"])
def test_a_tampered_checkpoint_is_refused_by_name(done, capfd, name):
    path = done / "rounds" / "0003" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = results(done)
    code, line = refusal(capfd, "resume", done)
    assert code == 4
    assert line.startswith(f"{done / 'rounds' / '0003'}/") and "changed since it was written" in line
    assert line.endswith(f"delete {done / 'rounds' / '0003'} to resume from the round before")
    assert results(done) == before


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("optimizer", "learning_rate"), 0.02),
        (("rounds",), 4),
        (("federation", "participation"), 0.5),
        (("federation", "min_replies"), 1),
        (("policy", "adapter"), "elsewhere"),
    ],
)
def test_a_changed_configuration_is_refused_on_resume(done, capfd, keys, value):
    path = done / "run.json"
    record = json.loads(path.read_text())
    place = record["config"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(record))
    before = results(done)
    code, line = refusal(capfd, "resume", done)
    assert (code, line) == (4, f"{path}: the configuration has changed since the run began; put it back")
    assert results(done) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": {}}', '{"config": 3, "folder": "."}', "\0"])
@pytest.mark.parametrize("command", ["resume", "status"])
def test_a_run_json_that_is_none_is_named(done, capfd, command, text):
    (done / "run.json").write_text(text)
    before = results(done)
    code, line = refusal(capfd, command, done)
    assert code == 4 and line.startswith(f"{done / 'run.json'}: ") and "; restore " in line
    assert results(done) == before


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_a_changed_client_file_is_refused_on_resume(run_file, capfd, change):
    assert in_process("run", run_file, "--set", "rounds=1") == 0
    done, client = out_of(run_file), run_file.parent / "clients" / "north.toml"
    match change:
        case "edited":
            edit(client, "heldout_share = 0.3", "heldout_share = 0.4")
        case "removed":
            client.unlink()
        case "added":
            text = client.read_text().replace('name = "north"', 'name = "west"')
            client = client.with_name("west.toml")
            client.write_text(text)
    before = results(done)
    code, line = refusal(capfd, "resume", done)
    assert (code, line) == (4, f"{client}: this client file has changed since the run began; put it back")
    assert results(done) == before


def test_changed_prompts_are_refused_on_resume(run_file, capfd):
    assert in_process("run", run_file, "--set", "rounds=1") == 0
    prompts = run_file.parent / "clients" / "north.jsonl"
    prompts.write_text(prompts.read_text() + prompts.read_text().splitlines()[0] + "\n")
    code, line = refusal(capfd, "resume", out_of(run_file))
    assert (code, line) == (4, f"{prompts}: this file of prompts has changed since the run began; put it back")


def test_a_changed_base_model_is_refused_on_resume(tmp_path, model, capfd):
    path = tmp_path / "model"
    shutil.copytree(model, path)
    run_file = write_project(tmp_path / "project", model=path, rounds=1)
    assert in_process("run", run_file) == 0
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    out = out_of(run_file)
    before = results(out)
    hash_of.cache_clear()  # one process, one hash
    code, line = refusal(capfd, "resume", out)
    assert code == 4 and line.startswith(f"{path}: this base model hashes to ")
    assert line.endswith("; put that model back, or start a new run")
    assert results(out) == before

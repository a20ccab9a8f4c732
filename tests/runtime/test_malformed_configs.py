"""A thousand configurations that are wrong: each is one line that names the key, and nothing is written or awaited."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fedpact.errors import ConfigError, FedPactError
from fedpact.runtime.client_config import ClientConfig, load_client
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.contract import contract_of, read_contract
from fedpact.runtime.toml import read_toml, toml_value, validated
from tests.cli.conftest import files, in_process, model, write_project

__all__ = ["model"]

RUN: dict[str, Any] = {
    "seed": 7,
    "rounds": 3,
    "objectives": {"low": {"primary": True, "weight": 0.5}, "brief": {}},
    "policy": {
        "model": "m",
        "adapter": "a",
        "lora": {"r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"], "use_rslora": False},
        "private": {"r": 2},
    },
    "rollout": {"num_generations": 3, "max_completion_length": 5, "temperature": 1.0},
    "loss": {"loss_type": "grpo", "beta": 0.1},
    "ppo": {"gamma": 0.9},
    "optimizer": {"learning_rate": 1e-2, "name": "adamw"},
    "training": {"prompts_per_step": 2, "trainable": "all"},
    "algorithm": {"name": "fedavg", "local_steps": 2},
    "federation": {"min_replies": 2, "participation": 1.0, "averaging": "factors", "timeout_s": 5.0},
    "server_optimizer": {"name": "none"},
    "evaluation": {"every": 2, "greedy": False},
    "simulation": {"num_threads": 1, "clients": "clients"},
}
SERVER: dict[str, Any] = {
    "prompts": {"path": "x.jsonl", "rename": {"a": "b"}},
    "auxiliary": {"path": "y.jsonl", "limit": 3},
    "reference": "{answer}",
    "encoder": "tokens",
    "model": {"device": "cpu"},
    "rewards": {"low": {"use": "a.py:b", "kwargs": {"k": 1}, "otherwise": {"use": "c:d"}}},
}
CLIENT: dict[str, Any] = {
    "name": "east",
    "task": "odd",
    "model": {"path": "m", "device": "cpu"},
    "rank": 2,
    "prompts": {"path": "p.jsonl", "heldout_share": 0.3, "rename": {"a": "b"}, "template": "{q}"},
    "answers": {"path": "q.jsonl", "id": "id"},
    "rewards": {"low": {"use": "rewards.py:low", "timeout_s": 1.0, "otherwise": {"use": "a:b"}}},
    "site": {"verbs": ["hello"], "share": ["rewards"], "clip_norm": 1.0, "max_rounds": 9},
}
FORMS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (RunConfig, RUN),
    (RunConfig, {**RUN, "server": SERVER, "algorithm": {"name": "fedgrpo"}, "policy": {"model": "m"}}),
    (ClientConfig, CLIENT),
]

DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]

ODD = [
    *(None, True, False, -1, 0, 1, 3.5, 10**30, 10**400, -(10**400), 2**63, 1e308, 1e-320, -0.0),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "x", "nan", "1", "true", "../x", "a" * 5000, "é" * 300),
    *("x\ny", "\x1b[31m", "\u202e", "\0", "\ud800", b"x", [], {}, [1], [[[]]], {"a": 1}, {"a": {"b": {}}}, {"": 1}),
    *({"name": "fedavg"}, {"use": "x"}, ["all"], ["rewards", "rewards"], [None], DEEP, date(2020, 1, 1), datetime.min),
]
values = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4),
    st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.booleans(), st.text(max_size=5)), max_size=3),
)
strange_keys = st.one_of(
    st.text(min_size=1, max_size=30), st.sampled_from(["\n", "\x1b[31m", "a.b", "a" * 3000, "\u202e"])
)


def places(data: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a form, from the top."""
    for key, value in data.items() if isinstance(data, dict) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


def table_at(data: dict[str, Any], place: tuple[str, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


def seen(line: str) -> bool:
    """Whether a terminal shows all of it; joiners are letters' own."""
    return line.replace("\u200c", "").replace("\u200d", "").isprintable()


def refused(kind: type[BaseModel], data: Any) -> str:
    """The line that `data` gives; "" if it is valid."""
    began = time.monotonic()
    try:
        validated(kind, data, where="file.toml")
        line = ""
    except ConfigError as error:
        line = str(error)
        assert line.startswith("file.toml: ") and seen(line) and len(line) < 2000
        line.encode()
    assert time.monotonic() - began < 5
    return line


common = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_the_forms_are_valid_before_they_are_changed():
    assert [refused(kind, sound) for kind, sound in FORMS] == ["", "", ""]


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_every_odd_value_in_every_place_is_taken_or_named(form):
    kind, sound = FORMS[form]
    wrong = 0
    for place in places(sound):
        for value in ODD:
            changed = deepcopy(sound)
            table_at(changed, place[:-1])[place[-1]] = value
            line = refused(kind, changed)
            assert not line or place[0] in line or "algorithm" in line, (place, value)
            wrong += bool(line)
    assert wrong > 500


@settings(common, max_examples=80)
@given(st.sampled_from(FORMS), st.data())
def test_any_value_in_any_place_is_taken_or_named(form, data):
    kind, sound = form
    place = data.draw(st.sampled_from(list(places(sound))))
    changed = deepcopy(sound)
    table_at(changed, place[:-1])[place[-1]] = data.draw(values)
    line = refused(kind, changed)
    assert not line or place[0] in line or "algorithm" in line


@settings(common, max_examples=150)
@given(st.sampled_from(FORMS), st.data())
def test_several_things_wrong_at_once_are_one_line(form, data):
    kind, sound = form
    changed = deepcopy(sound)
    for _ in range(data.draw(st.integers(2, 5))):
        place = data.draw(st.sampled_from(list(places(sound))))
        try:
            table = table_at(changed, place[:-1])
            match data.draw(st.sampled_from(["change", "remove", "add", "move"])):
                case "change":
                    table[place[-1]] = data.draw(values)
                case "remove":
                    del table[place[-1]]
                case "add":
                    table[data.draw(strange_keys)] = data.draw(values)
                case "move":
                    changed[place[-1]] = table.pop(place[-1])
        except (KeyError, TypeError, IndexError, AttributeError):  # what was changed before is no table any more
            continue
    refused(kind, changed)


@settings(common, max_examples=100)
@given(st.sampled_from(FORMS), st.data())
def test_an_unknown_key_is_named_wherever_it_stands(form, data):
    kind, sound = form
    free = ("objectives", "kwargs", "rename", "rewards")
    tables = [p for p in [(), *places(sound)] if isinstance(table_at(sound, p), dict) and not (p and p[-1] in free)]
    place, key = (
        data.draw(st.sampled_from(tables)),
        data.draw(st.sampled_from(["learning_rat", "x y", "Seed", "модель"])),
    )
    changed = deepcopy(sound)
    table_at(changed, place)[key] = data.draw(values)
    assert key in refused(kind, changed)


FILE = (
    b"seed = 7\nrounds = 3\n[objectives]\nlow = { primary = true }\n[policy]\nmodel = 'm'\nlora = { r = 2 }\n"
    b"[algorithm]\nname = 'fedavg'\nlocal_steps = 2\n[federation]\nmin_replies = 2 # two\n"
)
NOISE = [
    b"\xff",
    b"\xef\xbb\xbf",
    b"\0",
    b"\n",
    b"[",
    b"]",
    b"[[",
    b"=",
    b'"""',
    b"'",
    b"#",
    b".",
    b"\xe2\x80\xae",
    b"1e999",
]


@settings(common, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, len(FILE)), st.integers(0, 6), st.sampled_from(NOISE)), min_size=1, max_size=4)
)
def test_a_file_with_bytes_changed_is_taken_or_is_one_line(tmp_path_factory, changes):
    data = FILE
    for start, length, instead in changes:
        data = data[:start] + instead + data[start + length :]
    path = tmp_path_factory.getbasetemp() / "changed.toml"
    path.write_bytes(data)
    for load in (load_run, load_client):
        try:
            load(path)
        except ConfigError as error:
            assert str(error).startswith(f"{path}: ") and seen(str(error)) and len(str(error)) < 2000


TEXTS = {
    "empty": b"",
    "a list too deep": b"seed = " + b"[" * 5000 + b"]" * 5000,
    "tables too deep": b"a = " + b"{ a = " * 3000 + b"1" + b" }" * 3000,
    "a key of many parts": b".".join([b"a"] * 3000) + b" = 1",
    "a number of many digits": b"seed = " + b"9" * 5000,
    "a long key": b"a" * 100_000 + b" = 1",
    "a long value": b"rounds = '" + b"a" * 1_000_000 + b"'",
    "many keys": b"".join(b"k%d = 1\n" % i for i in range(20_000)),
    "not UTF-8": b"seed = '\xff\xfe'",
    "UTF-16": "seed = 7".encode("utf-16"),
    "a table twice": b"[policy]\n[policy]\n",
    "a key twice": b"seed = 1\nseed = 2\n",
    "a zip": b"PK\x03\x04" + bytes(100),
    "HTML": b"<html><script>alert(1)</script>",
    "YAML": b"!!python/object/apply:os.system ['id']",
    "a terminal's commands": b'"\x1b[2J" = 1',
    "an escaped one": b'"\\u001b[2J\\u202e" = 1\nrounds = 1',
    "a torn string": b"seed = 'x",
    "a date": b"rounds = 1979-05-27T07:32:00Z",
}


@pytest.mark.parametrize("load", [load_run, load_client])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_configuration_is_one_line(tmp_path, name, load):
    path = tmp_path / "file.toml"
    path.write_bytes(TEXTS[name])
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert time.monotonic() - began < 5
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and seen(line) and len(line) < 2000
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (
        tmp_path,
        tmp_path / "none",
        tmp_path / "loop",
        tmp_path / ("a" * 300),
        Path("x\0y"),
        Path("/dev/null"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_run(path)
        assert seen(str(caught.value))


@pytest.mark.parametrize("text", ["[" * 5000, "9" * 5000, "'", "\0", "1e999", "{a=", "", " ", "=", "\x1b"])
def test_a_value_on_the_command_line_never_fails_by_itself(text):
    toml_value(text)


# --- code of a model's folder can be asked for by its member alone ----------------------------------------------------


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("form", [0, 1])
def test_no_table_of_a_run_file_may_trust_a_models_code(form, value):
    kind, sound = FORMS[form]
    free = ("objectives", "kwargs", "rename", "rewards")
    tables = [p for p in [(), *places(sound)] if isinstance(table_at(sound, p), dict) and not (p and p[-1] in free)]
    assert len(tables) > 12
    for place in tables:
        changed = deepcopy(sound)
        table_at(changed, place)["trust_remote_code"] = value
        assert "trust_remote_code: unknown key" in refused(kind, changed), place


def test_no_contract_may_trust_a_models_code():
    sound = json.loads(contract_of(validated(RunConfig, RUN), model="0" * 64).canonical())
    tables = [p for p in [(), *places(sound)] if isinstance(table_at(sound, p), dict) and p != ("objectives",)]
    assert len(tables) > 8
    for place in tables:
        changed = deepcopy(sound)
        table_at(changed, place)["trust_remote_code"] = True
        with pytest.raises(FedPactError, match="trust_remote_code"):
            read_contract(json.dumps(changed, sort_keys=True, separators=(",", ":")))


@pytest.mark.parametrize("path", ["datasets:a/b?trust_remote_code=true", "a/b?trust_remote_code=1"])
@pytest.mark.parametrize("table", ["prompts", "auxiliary"])
def test_no_data_set_may_bring_code_of_its_own(path, table):
    changed = deepcopy(FORMS[1][1])
    changed["server"][table]["path"] = path
    assert f"server.{table}.path: trust_remote_code can be set" in refused(RunConfig, changed)


def test_a_member_trusts_a_models_code_in_its_own_file_only_if_it_says_so():
    assert not validated(ClientConfig, CLIENT).model.trust_remote_code
    trusting = {**CLIENT, "model": {"trust_remote_code": True}}
    assert validated(ClientConfig, trusting).model.trust_remote_code
    for place in ("site", "prompts", "answers"):
        changed = deepcopy(CLIENT)
        changed[place]["trust_remote_code"] = True
        assert f"{place}.trust_remote_code: unknown key" in refused(ClientConfig, changed)


# --- through the command line: `fedpact check` of crafted files -------------------------------------------------------

LONG = json.dumps("a" * 5000)
SETS = [
    *(("model", f"policy.model={text}") for text in (LONG, '"x\\u0000y"', '"/dev/zero"', '"../.."', "[1]", "''")),
    *(
        ("adapter", f"policy.adapter={text}")
        for text in (LONG, '"\\u0000"', '"."', '"/dev/zero"', '"/etc/passwd"', "3")
    ),
    *(("simulation.clients", f"simulation.clients={text}") for text in (LONG, '"\\u0000"', "[]", "{}")),
    *(("no client files", f"simulation.clients={text}") for text in ('"/dev/null"', '"/proc/self/fd"', '"../../.."')),
    ("run.toml: seed: unknown key", 'simulation.clients="."'),
    *(
        ("lora.r", f"policy.lora.r={text}")
        for text in ("1000000000", "0", "-1", "1.5", "nan", "'two'", "[2]", "1e3000")
    ),
    *(
        ("target_modules", f"policy.lora.target_modules={text}")
        for text in ("[]", '[""]', '["\\u001b[31m"]', "7", LONG)
    ),
    *(("num_threads", f"simulation.num_threads={text}") for text in ("100000000", f"{10**30}", "0", "-1", "'many'")),
    *(("max_completion_length", f"rollout.max_completion_length={text}") for text in ("100000000", f"{10**30}", "0")),
    *(("num_generations", f"rollout.num_generations={text}") for text in (f"{10**12}", "0", "true", "inf")),
    *(("private.r", f"policy.private={text}") for text in ("{r=1000000000}", "{r=0}", "{r=[]}")),
    *(("algorithm", f"algorithm={text}") for text in ("{name=[1]}", "{name={a=1}}", "[[[]]]", "{}", "3", "{name=''}")),
    *(("algorithm.name", f"algorithm.name={text}") for text in ("[1]", "{}", LONG, "'\\u001b'", "1", "nan")),
    *(("seed", f"seed={text}") for text in ("[" * 3000, "9" * 5000, "-1", "1.5", "''", "nan", "{}", "1979-05-27")),
    *(("rounds", f"rounds={text}") for text in ("0", "-1", "1e308", "[]", "'\\n'", "inf")),
    *(("objectives", f"objectives={text}") for text in ("{}", "[]", "3", "{a=1}", "{accuracy={}}", "{a={weight=nan}}")),
    *(("--set", text) for text in ("rounds", "", "seed.x.y=1")),
    *(("unknown key", text) for text in ("x" * 3000 + "=1", "=1", "a..b=1", '"a\\nb"=1', "trust_remote_code=true")),
    ("policy.trust_remote_code", "policy.trust_remote_code=true"),
    ("temperature", "rollout.temperature=0"),
    ("timeout_s", "federation.timeout_s=-1"),
    ("participation", "federation.participation=1.0000001"),
    ("epsilon", "loss.epsilon=nan"),
]
FILES = [
    *(("prompts", text) for text in (f"path = {LONG}", 'path = "x\\u0000y"', 'path = "/dev/zero"', 'path = ".."', "")),
    *(
        ("prompts", f'path = "gym:{text}"')
        for text in ("a" * 3000, "nothing", "chain_sum?size=-1", "chain_sum?size=x", "")
    ),
    *(
        ("prompts", f'path = "{text}"')
        for text in ("datasets:a?trust_remote_code=true", "east.txt", "east.jsonl?x", "")
    ),
    *(
        ("prompts", f'path = "east.jsonl"\n{text}')
        for text in (f"heldout = {LONG}", 'heldout = "\\u0000"', 'prompt = ""')
    ),
    *(("prompts", f'path = "east.jsonl"\n{text}') for text in ('template = "{"', 'template = "{prompt.__class__}"')),
    *(
        ("prompts", f'path = "east.jsonl"\n{text}')
        for text in ("limit = 0", 'rename = {prompt="completions"}', "split = 1")
    ),
    *(("rewards.low", f"use = {text}") for text in (LONG, json.dumps("a" * 5000 + ".py:x"), '"..x:y"', '"\\u0000:y"')),
    *(("rewards.low", f"use = {text}") for text in ('"x\\u0000.py:y"', '"os:getcwd"', '"sys:exit"', '""', '":"', "[]")),
    *(("rewards.low", f"use = {text}") for text in ('"leaves.py:low"', '"builtins:eval"', '"rewards.py:__name__"')),
    *(("rewards.low", f'use = "rewards.py:low"\n{text}') for text in ("kwargs = {a=1}", "kwargs = 3", "timeout_s = 0")),
    *(
        ("rewards.low", f'use = "fedpact.rewards:HttpJudge"\nkwargs = {text}')
        for text in ("{}", "{base_url=1}", "{x=1}")
    ),
    *(
        ("model", text)
        for text in (f"path = {LONG}", 'path = "/dev/zero"', 'device = "\\u001b[31m"', 'device = "cuda:99"')
    ),
    *(("model", text) for text in (f"micro_batch_tokens = {10**30}", 'dtype = "float16"', "trust_remote_code = 3")),
    *(
        ("site", text)
        for text in ('accept = "x"', "verbs = [1]", "min_samples = 0", "share = ['all']", "clip_norm = nan")
    ),
    *(("answers", text) for text in (f"path = {LONG}", 'path = "east.jsonl"\nid = "zzz"', "path = 3")),
]


def test_there_are_more_than_two_thousand():
    crafted = len(SETS) + len(FILES) + 2 * len(TEXTS)
    assert crafted > 150
    assert crafted + 3 * 500 + 80 + 150 + 100 + 150 > 2000


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    path = write_project(tmp_path_factory.mktemp("crafted"), model=model)
    (path.parent / "clients" / "leaves.py").write_text("raise SystemExit(0)\n")
    return path


def told(capfd: pytest.CaptureFixture[str], path: Path, *options: str) -> str:
    """The line of `fedpact check`, which must fail for the configuration, at once, and write nothing."""
    before, began = files(path.parent), time.monotonic()
    capfd.readouterr()
    code = in_process("check", path, *options)
    out, err = capfd.readouterr()
    assert time.monotonic() - began < 5
    assert code in (2, 3), err
    assert err.startswith("fedpact: ") and err.count("\n") == 1 and seen(err.rstrip("\n"))
    assert len(err) < 6000 and "Traceback" not in out + err
    assert files(path.parent) == before
    return err


@pytest.mark.parametrize(("named", "override"), SETS, ids=range(len(SETS)))
def test_a_crafted_setting_is_refused_by_name(project, capfd, named, override):
    assert named in told(capfd, project, "--set", override)


@pytest.mark.parametrize(("table", "text"), FILES, ids=range(len(FILES)))
def test_a_crafted_client_file_is_refused_by_name(project, capfd, table, text):
    path = project.parent / "clients" / "east.toml"
    sound = path.read_text()
    head, found, rest = sound.partition(f"[{table}]\n")
    after = rest.partition("\n[")[2] if found else ""
    path.write_text(f"{head}\n[{table}]\n{text}\n" + (f"[{after}" if after else ""))
    try:
        read_toml(path)
        line = told(capfd, project)
        assert str(path) in line and table.split(".")[0] in line
    finally:
        path.write_text(sound)

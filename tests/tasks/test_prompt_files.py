from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpact.errors import DataError
from fedpact.tasks.files import load_prompts, split_heldout
from fedpact.types import Prompts

WHERE = "clients/north.toml: prompts"
ROWS = [{"prompt": "2 + 2", "answer": "4"}, {"prompt": "3 + 3", "answer": "6", "level": 2}]


def jsonl(folder, *rows, name="train.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load(folder, path="train.jsonl", **options):
    return load_prompts(path, folder=folder, where=WHERE, **options)


def check_rows(prompts):
    assert list(prompts.text) == ["2 + 2", "3 + 3"]
    assert prompts.ids.dtype == torch.int64 and prompts.ids.tolist() == [0, 1]
    assert {name: list(values) for name, values in prompts.columns.items()} == {
        "answer": ["4", "6"],
        "level": [None, 2],
    }


def test_json_lines_and_a_json_list_give_the_same_prompts(tmp_path):
    jsonl(tmp_path, *ROWS)
    (tmp_path / "train.json").write_text(json.dumps(ROWS, indent=1))
    check_rows(load(tmp_path))
    check_rows(load(tmp_path, "train.json"))


def test_parquet_gives_the_same_prompts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"level": None, **row} for row in ROWS]), tmp_path / "train.parquet")
    check_rows(load(tmp_path, "train.parquet"))


def test_csv_values_are_text(tmp_path):
    (tmp_path / "train.csv").write_text('prompt,answer\n"2 + 2,\nplease",4\n', encoding="utf-8-sig")
    prompts = load(tmp_path, "train.csv")
    assert list(prompts.text) == ["2 + 2,\nplease"]
    assert prompts.columns == {"answer": ["4"]}


def test_a_datasets_builder_is_loaded_with_its_options(tmp_path):
    pytest.importorskip("datasets")
    jsonl(tmp_path, *({"level": None, **row} for row in ROWS))
    path = f"datasets:json?data_files={tmp_path}/train.jsonl&cache_dir={tmp_path}/cache"
    check_rows(load(tmp_path, path))
    assert len(load(tmp_path, path, split="train[:1]")) == 1
    missing = f"datasets:json?data_files={tmp_path}/none.jsonl&cache_dir={tmp_path}/cache"
    with pytest.raises(DataError, match=r"cannot load datasets:json\S+ with `datasets`: FileNotFoundError"):
        load(tmp_path, missing)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for path in ("org/name", "org/name?revision=1", "datasets:name", "train.parquet"):
        with pytest.raises(DataError, match=re.escape("pip install 'fedpact[data]'")):
            load(tmp_path, path)


def test_blank_lines_are_skipped_and_unusual_line_ends_within_text_are_kept(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n', encoding="utf-8")
    assert list(load(tmp_path).text) == ["a\u2028b", "c"]


def test_another_column_can_be_the_prompt(tmp_path):
    jsonl(tmp_path, {"question": "why?", "prompt": "no"})
    prompts = load(tmp_path, prompt="question")
    assert list(prompts.text) == ["why?"] and prompts.columns == {"prompt": ["no"]}


def test_a_template_makes_the_prompt_from_columns_and_keeps_them(tmp_path):
    jsonl(tmp_path, {"Body": "Two {and} two.", "How many?": 2, "a.b": "!"})
    prompts = load(tmp_path, template="{{{Body}}} {How many?}{a.b}\nAnswer:")
    assert list(prompts.text) == ["{Two {and} two.} 2!\nAnswer:"]
    assert list(prompts.columns) == ["Body", "How many?", "a.b"]


def test_a_chat_is_taken_as_it_is_and_a_system_message_goes_in_front(tmp_path):
    user, system = {"role": "user", "content": "why?"}, {"role": "system", "content": "Be brief."}
    jsonl(tmp_path, {"prompt": [user]}, name="chat.jsonl")
    jsonl(tmp_path, {"prompt": "why?"})
    assert list(load(tmp_path, "chat.jsonl").text) == [[user]]
    assert list(load(tmp_path, "chat.jsonl", as_chat=True).text) == [[user]]
    assert list(load(tmp_path, as_chat=True).text) == [[user]]
    assert list(load(tmp_path, system="Be brief.").text) == [[system, user]]
    assert list(load(tmp_path, "chat.jsonl", system="Be brief.").text) == [[system, user]]


def test_columns_can_be_renamed(tmp_path):
    jsonl(tmp_path, {"QUESTION": "why?", "final_decision": "yes"})
    prompts = load(tmp_path, prompt="prompt", rename={"QUESTION": "prompt", "final_decision": "answer"})
    assert list(prompts.text) == ["why?"] and prompts.columns == {"answer": ["yes"]}


def test_the_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert list(load(tmp_path, limit=2).text) == ["a", "b"]


def test_columns_are_json(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from datetime import date

    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"prompt": "a", "day": date(2024, 2, 1), "tags": [{"x": 1}]}])
    parquet.write_table(table, tmp_path / "train.parquet")
    assert load(tmp_path, "train.parquet").columns == {"day": ["2024-02-01"], "tags": [[{"x": 1}]]}
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "image": b"png"}]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 0, column 'image' holds bytes; expected text, numbers"):
        load(tmp_path, "train.parquet")


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("train.txt", "a", {}, "train.txt ends in '.txt'; expected one of .jsonl, .json, .csv, .parquet"),
        ("train.jsonl", '{"prompt": "a"}\n{"prompt" "b"}\n', {}, "train.jsonl, line 2: not JSON (Expecting ':'"),
        ("train.jsonl", '{"prompt": "a"}\n["b"]\n', {}, "line 2: found list; expected an object with named fields"),
        (
            "train.json",
            '[{"prompt": "a"},\n {"prompt"}]',
            {},
            "train.json: not JSON (Expecting ':' delimiter at line 2",
        ),
        ("train.json", '{"prompt": "a"}', {}, "train.json holds dict; expected a JSON list of objects"),
        ("train.json", '["a"]', {}, "train.json, row 0: found str; expected an object"),
        ("train.csv", "prompt,answer\na\n", {}, "train.csv, line 2: expected 2 fields, as in the header"),
        ("train.csv", "prompt\na,b\n", {}, "train.csv, line 2: expected 1 fields, as in the header"),
        ("train.parquet", "not a table", {}, "train.parquet is not Parquet"),
        ("train.jsonl", "", {}, "train.jsonl is empty; expected at least one row"),
        ("train.jsonl", '{"question": "a", "id": 1}', {}, "no column 'prompt'; it has question, id; set `prompt`"),
        ("train.jsonl", '{"a": 1}', {"template": "{b}"}, "template: no column 'b'; it has a"),
        ("train.jsonl", '{"a": 1}', {"template": "{a"}, "template: expected '}' before end of string; write a literal"),
        ("train.jsonl", '{"a": 1}', {"rename": {"b": "c"}}, "rename: no column 'b'; it has a"),
        ("train.jsonl", '{"a": 1, "b": 2}', {"rename": {"b": "a"}}, "rename gives two columns the name 'a'"),
        ("train.jsonl", '{"prompt": "a", "completions": 2}', {}, "a column 'completions', which rewards receive"),
        (
            "train.jsonl",
            '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}',
            {},
            "row 1 differs from row 0",
        ),
        ("train.jsonl", '{"prompt": "a"}\n{"prompt": null}', {}, "row 1: the prompt is None; expected text, or a list"),
        ("train.jsonl", '{"prompt": ""}', {}, "row 0: the prompt is ''; expected text"),
        ("train.jsonl", '{"prompt": [{"role": "user"}]}', {}, "is no chat message; expected a role and a content"),
        ("train.jsonl", '{"prompt": [{"role": "system", "content": "x"}]}', {"system": "y"}, "remove `system`"),
        ("train.jsonl", '{"prompt": "a"}', {"split": "test"}, "split is 'test', but train.jsonl is a file"),
        ("train.jsonl", '{"prompt": "a"}', {"limit": 0}, "limit is 0; expected at least 1"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(name, text, options, message, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        load(tmp_path, name, **options)
    assert message in str(caught.value)
    assert str(caught.value).startswith(WHERE) and "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_not_utf_8_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"clients/north.toml: prompts: no file \S+train.jsonl; expected a path relative"
    ):
        load(tmp_path)
    (tmp_path / "train.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"train.jsonl is not UTF-8 \(invalid continuation byte at byte 12\)"):
        load(tmp_path)


def test_options_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=re.escape("cannot read the options 'size'; expected name=value&name=value")):
        load(tmp_path, "gym:chain_sum?size")


def some(*text):
    return Prompts(text=list(text), ids=torch.arange(len(text)), columns={"row": list(range(len(text)))})


def test_the_held_out_share_is_about_what_was_asked_for():
    split = split_heldout(some(*(f"prompt {i}" for i in range(1000))), 0.2, seed=7)
    assert len(split.train) + len(split.heldout) == 1000
    assert 160 <= len(split.heldout) <= 240
    assert split.heldout.ids.tolist() == split.heldout.columns["row"] == sorted(split.heldout.columns["row"])


def test_another_seed_gives_an_independent_split():
    batch = some(*(f"prompt {i:04}" for i in range(1000)))
    one, two = (set(split_heldout(batch, 0.5, seed).heldout.ids.tolist()) for seed in (0, 1))
    assert 200 <= len(one & two) <= 300  # a quarter in both


@given(st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=40), st.integers(0, 5))
def test_the_same_prompt_never_lies_on_both_sides(text, seed):
    chats = [[{"role": "user", "content": letter}] for letter in text]
    try:
        plain, chat = split_heldout(some(*text), 0.5, seed), split_heldout(some(*chats), 0.5, seed)
    except DataError:
        return
    assert not set(plain.train.text) & set(plain.heldout.text)
    assert all(prompt not in chat.heldout.text for prompt in chat.train.text)


def test_an_empty_side_is_an_error():
    with pytest.raises(DataError, match="of 2 prompts none is held out at a share of 0; name a held-out file"):
        split_heldout(some("a", "b"), 0.0, seed=0)
    with pytest.raises(DataError, match="of 2 prompts none is left to train on at a share of 1"):
        split_heldout(some("a", "b"), 1.0, seed=0)

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact.errors import DataError
from fedpact.rewards.preferences import Pairs, load_pairs, pairwise_accuracy, split_heldout

WHERE = "clients/north.toml: rewards.helpful"
ROWS = [
    {"prompt": "Hello", "chosen": " there", "rejected": " you, again"},
    {"prompt": "Bye", "chosen": " now", "rejected": " bye\nbye"},
]
USER, GOOD, BAD = (
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "5"},
)


def write(folder, *rows, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load(folder, *rows, name="pairs.jsonl"):
    if rows:
        write(folder, *rows, name=name)
    return load_pairs(name, folder=folder, where=WHERE)


def refusal(folder, name="pairs.jsonl"):
    with pytest.raises(DataError) as caught:
        load_pairs(name, folder=folder, where=WHERE)
    message = str(caught.value)
    assert message.startswith(WHERE) and "\n" not in message
    return message


EXPECTED = Pairs(["Hello", "Bye"], [" there", " now"], [" you, again", " bye\nbye"])


def test_json_lines_a_json_list_and_csv_give_the_same_pairs(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "pairs.csv").write_text(
        'prompt,chosen,rejected\nHello, there," you, again"\nBye, now," bye\nbye"\n', encoding="utf-8-sig"
    )
    assert load(tmp_path, *ROWS) == EXPECTED
    assert load(tmp_path, name="pairs.json") == EXPECTED
    assert load(tmp_path, name="pairs.csv") == EXPECTED


def test_parquet_gives_the_same_pairs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "pairs.parquet")
    assert load(tmp_path, name="pairs.parquet") == EXPECTED


def test_a_chat_keeps_its_prompt_and_gives_up_the_one_message_that_follows(tmp_path):
    explicit = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    implicit = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert load(tmp_path, explicit, implicit) == Pairs([[USER], [USER]], ["4", "4"], ["5", "5"])


def test_a_dialogue_ends_its_prompt_at_the_last_turn_that_both_begin_with(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: help\n\nAssistant:"
    row = {"chosen": start + " Sure: do it", "rejected": start + " Sure: no"}
    assert load(tmp_path, row) == Pairs([start], [" Sure: do it"], [" Sure: no"])


def test_dialogues_that_part_before_their_last_turn_share_the_turns_before(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    row = {
        "chosen": start + " A.\n\nHuman: x\n\nAssistant: B",
        "rejected": start + " C.\n\nHuman: y\n\nAssistant: D",
    }
    pairs = load(tmp_path, row)
    assert pairs.prompts == [start] and pairs.chosen == [" A.\n\nHuman: x\n\nAssistant: B"]


@settings(deadline=None)  # the first example imports TRL
@given(st.text("ab ", min_size=1, max_size=4), st.text("ab ", max_size=4), st.text("ab ", max_size=4))
def test_other_texts_are_split_where_trl_splits_them(start, first, second):
    trl = pytest.importorskip("trl")
    from fedpact.rewards.preferences import _shared_text

    chosen, rejected = start + first + "x", start + second + "y"
    end = _shared_text(chosen, rejected)
    assert {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]} == trl.extract_prompt(
        {"chosen": chosen, "rejected": rejected}
    )


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.text(max_size=3)), min_size=1), st.integers(0, 5))
def test_equal_prompts_stay_together_and_no_pair_is_lost(rows, seed):
    pairs = Pairs([p for p, _ in rows], [said + "+" for _, said in rows], [said for _, said in rows])
    train, heldout = split_heldout(pairs, 0.5, seed)
    assert not set(train.prompts) & set(heldout.prompts)
    assert sorted([*train.chosen, *heldout.chosen]) == sorted(pairs.chosen)


def test_the_held_out_share_is_about_the_one_that_was_asked_for_and_the_seed_draws_another():
    pairs = Pairs([f"prompt {i}" for i in range(2000)], ["a"] * 2000, ["b"] * 2000)
    first, second = (split_heldout(pairs, 0.1, seed).heldout.prompts for seed in (0, 1))
    assert 150 < len(first) < 250  # 200 expected, standard deviation 13
    assert len(set(first) & set(second)) < 60  # 20 expected


def test_a_share_of_zero_holds_nothing_out():
    assert len(split_heldout(EXPECTED, 0.0, 0).heldout) == 0


def test_accuracy_counts_a_tie_as_half_and_is_nan_without_a_pair():
    assert pairwise_accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == 0.625
    assert math.isnan(pairwise_accuracy([], []))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a"}, "line 2: no 'rejected'; the row has prompt, chosen"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "line 2: chosen and rejected are equal; drop the row"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "line 2: rejected is 3; expected text"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "line 2: prompt is ''; expected text"),
        ({"prompt": "p", "chosen": [GOOD], "rejected": [BAD]}, "line 2 mixes text and chat"),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "line 2: after the prompt chosen has assistan"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "line 2: no prompt, and chosen and rejected begin differently"),
        ({"chosen": "left", "rejected": "right"}, "line 2: no prompt, and chosen and rejected begin differently"),
        ({"prompt": ["p"], "chosen": [GOOD], "rejected": [BAD]}, "line 2: prompt: 'p' is no chat message"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "mixes texts and chats: row 1 differs from row 0"),
        ([1, 2], "line 2: found list; expected an object"),
    ],
)
def test_a_row_that_is_no_pair_is_named_in_one_line(tmp_path, row, expected):
    write(tmp_path, ROWS[0], row)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("pairs.jsonl", b"", "is empty; expected at least one row"),
        ("pairs.jsonl", b'{"prompt": ', "line 1: not JSON"),
        ("pairs.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("pairs.json", b'{"prompt": "p"}', "holds dict; expected a JSON list"),
        ("pairs.csv", b"prompt,chosen,rejected\np,a\n", "line 2: no 'rejected'"),
        ("pairs.txt", b"p", "ends in '.txt'; expected one of .jsonl"),
        ("pairs.parquet", b"PAR1", "is not Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name, data, expected):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    assert expected in refusal(tmp_path, name)


def test_a_file_that_is_absent_is_named_with_its_path(tmp_path):
    assert re.search(r"no file .*absent\.jsonl; expected a path relative", refusal(tmp_path, "absent.jsonl"))


def test_importing_this_or_the_reward_model_loads_no_torch():
    code = "import sys, fedpact.rewards.preferences, fedpact.rewards.reward_model; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

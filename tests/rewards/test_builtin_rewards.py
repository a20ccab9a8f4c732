from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpact.errors import ConfigError
from fedpact.rewards import (
    exact_answer,
    forbidden,
    format_tags,
    math_correct,
    numeric_answer,
    reasoning_steps,
    regex_match,
    repetition,
    tag_count,
    text_of,
)

DEMO = "<think> 5 8 1 </think> <answer> 1 </answer>"
LINES = "<think>\nfive, eight\n</think>\n<answer>\n1\n</answer>"


def test_importing_the_built_in_rewards_loads_neither_torch_nor_math_verify():
    code = "import sys, fedpact.rewards; assert not {'torch', 'math_verify', 'sympy', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_loader_comes_with_the_package():
    import fedpact.rewards
    from fedpact.rewards.load import RewardSet

    assert fedpact.rewards.RewardSet is RewardSet
    with pytest.raises(AttributeError, match="no attribute 'rubric'"):
        _ = fedpact.rewards.rubric


def test_a_completion_is_a_string_or_a_chat():
    assert text_of("yes") == text_of([{"role": "assistant", "content": "yes"}]) == "yes"


def test_the_last_answer_counts():
    completions = [DEMO, LINES, "<answer>2</answer> or <answer>1</answer>", "<answer>1</answer> <answer>2</answer>"]
    assert exact_answer(completions, ["1"] * 4) == [1.0, 1.0, 1.0, 0.0]


def test_an_answer_without_its_tags_is_wrong():
    assert exact_answer(["1", "<answer> 1", "1 </answer>"], ["1"] * 3) == [0.0, 0.0, 0.0]


def test_an_empty_tag_takes_the_whole_completion():
    assert exact_answer([" Yes\n", "Yes, sir"], [" yes", "yes"], tag="") == [1.0, 0.0]


def test_case_can_be_made_to_count():
    assert exact_answer(["Yes"], ["yes"], tag="", ignore_case=False) == [0.0]


def test_any_of_several_accepted_answers_will_do_and_none_gives_no_signal():
    assert exact_answer(["b  c", "b c", "x"], [["a", "b c"], ["a"], None], tag="") == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so it is 42.", "6 * 7 = <<6*7=42>>42\n#### 42", 1.0),
        ("first 3, then 5", "5", 1.0),
        ("first 5, then 3", "5", 0.0),
        ("1,000", "1000", 1.0),
        ("$1,234.50 in all", "1234.5", 1.0),
        ("-$5", "-5", 1.0),
        ("$-5", -5, 1.0),
        ("10-5", "5", 1.0),
        ("(1)-5", "5", 1.0),
        ("x=-5", "5", 0.0),
        ("50%", "50", 1.0),
        ("3/4", "0.75", 1.0),
        (r"\boxed{\frac{3}{4}}", "0.75", 1.0),
        ("1/0", "0", 0.0),
        (".5", "0.5", 1.0),
        ("1e3", "1000", 1.0),
        ("1, 2, 3", "3", 1.0),
        ("a2", "2", 0.0),
        ("none", "2", 0.0),
        ("2", "none", None),
        ("2", None, None),
        ("2", ["1", "2"], 1.0),
        ("9" * 500, "9", 0.0),
    ],
)
def test_the_last_number_is_compared(completion, answer, reward):
    assert numeric_answer([completion], [answer]) == [reward]


def test_the_tolerance_is_relative_and_absolute_below_one():
    assert numeric_answer(["101", "102", "0.01", "0.02"], [100, 100, 0, 0], tolerance=0.01) == [1.0, 0.0, 1.0, 0.0]


def test_a_number_outside_the_configured_tag_does_not_count():
    assert numeric_answer([DEMO, "1"], ["1", "1"], tag="answer") == [1.0, 0.0]


@given(st.integers(-(10**9), 10**9))
def test_any_whole_number_is_read_with_and_without_commas(number):
    assert numeric_answer([f"it is {number:,}."], [str(number)]) == [1.0]


def test_equal_expressions_are_correct_and_unreadable_gold_gives_no_signal():
    pytest.importorskip("math_verify")
    completions = [r"not 5 but \boxed{\frac{3}{4}}, see 5", "so 0.75", r"$1+x$", "nothing", "1", DEMO]
    answers = [r"\frac{3}{4}", r"$\frac34$", "x+1", "42", "", "1"]
    assert math_correct(completions, answers) == [1.0, 1.0, 1.0, 0.0, None, 1.0]
    assert math_correct([DEMO, r"\boxed{1}", "<answer> 1 + x </answer>"], ["1", "1", "x+1"], tag="answer") == [1, 0, 1]


def test_a_comparison_that_hangs_is_wrong_and_the_next_one_works():
    pytest.importorskip("math_verify")
    assert math_correct([r"\boxed{9^{9^{9^9}}}", r"\boxed{42}"], ["42", "42"], limit_s=0.5) == [0.0, 1.0]


def test_math_correct_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'fedpact[math]'")):
        math_correct(["1"], ["1"])


@pytest.mark.parametrize(
    ("completion", "loose", "strict"),
    [
        (LINES, 1.0, 1.0),
        (DEMO, 1.0, 0.0),
        ("<think>a</think><answer>b</answer>", 1.0, 0.0),
        (LINES + "\n", 1.0, 0.0),
        (LINES + "\nmore", 0.0, 0.0),
        ("so: " + LINES, 0.0, 0.0),
        ("<answer>\nb\n</answer>\n<think>\na\n</think>", 0.0, 0.0),
        ("<think>\na\n</think>\n<answer>\nb\n</answer>\n<answer>\nc\n</answer>", 0.0, 0.0),
        ("<think>\na\n<answer>\nb\n</answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_whole_completion_must_have_the_format(completion, loose, strict):
    assert format_tags([completion]) == [loose]
    assert format_tags([completion], strict_newlines=True) == [strict]


def test_the_tags_can_be_chosen():
    assert format_tags(["<plan>a</plan> <result>b</result>"], tags=["plan", "result"]) == [1.0]
    assert tag_count(["<plan>a</plan> <result>b"], tags=["plan", "result"]) == [0.75]


def test_each_tag_that_stands_once_is_worth_a_quarter():
    completions = [LINES, DEMO, "<think> a </think>", "<think> <think> </think>", ""]
    assert tag_count(completions) == [1.0, 1.0, 0.5, 0.25, 0.0]


def test_strict_tags_count_with_their_newlines():
    # "\n</think>\n" and "\n<answer>\n" may share the newline between them
    assert tag_count([LINES, DEMO, "<think>\na"], strict_newlines=True) == [1.0, 0.0, 0.25]


@given(st.text(alphabet="<>/thinkaswer \n", max_size=60))
def test_a_well_formed_completion_has_every_tag(text):
    for strict in (False, True):
        if format_tags([text], strict_newlines=strict) == [1.0]:
            assert tag_count([text], strict_newlines=strict) == [1.0]


def test_steps_are_counted_up_to_three():
    completions = [
        "Step 1: add. Step 2: carry.",
        "1. add\n2. carry\n3. write\n4. check",
        "- add",
        "First, add. Finally, write.",
        "It is 3.5, and **bold**.",
    ]
    assert reasoning_steps(completions) == pytest.approx([2 / 3, 1.0, 1 / 3, 2 / 3, 0.0])
    assert reasoning_steps(["- add"], steps=2) == [0.5]


def test_repetition_is_the_share_of_repeated_runs():
    # five words make three runs of three; "a a a" stands three times
    assert repetition(["a a a a a", "a b c d e", "a b", ""]) == pytest.approx([1 / 3 - 1, 0.0, 0.0, 0.0])
    assert repetition(["No no"], n=1) == [-0.5]


@given(st.lists(st.sampled_from("ab"), max_size=12))
def test_repetition_lies_between_minus_one_and_zero(words):
    assert -1.0 < repetition([" ".join(words)])[0] <= 0.0


def test_only_whole_words_are_forbidden():
    assert forbidden(["a BAD idea", "badly", "very-bad", ""], words=["bad"]) == [0.0, 1.0, 0.0, 1.0]
    assert forbidden(["c++ or not", "see here"], words=["c++", "see there"]) == [0.0, 1.0]
    assert forbidden(["bad", "a d"], words="bad") == [0.0, 1.0]
    assert forbidden(["anything"], words=[]) == [1.0]


def test_a_pattern_may_occur_or_fill_the_completion():
    assert regex_match(["a 1", "1", "a"], pattern=r"\d") == [1.0, 1.0, 0.0]
    assert regex_match(["a 1", "1"], pattern=r"\d", whole=True) == [0.0, 1.0]


def test_chats_and_further_columns_are_taken_as_trl_hands_them_over():
    chat = [[{"role": "assistant", "content": DEMO}]]
    given_by_trl = {"prompts": ["q"], "completions": chat, "completion_ids": [[1]], "answer": ["1"]}
    assert exact_answer(**given_by_trl) == [1.0]
    assert format_tags(**given_by_trl) == [1.0]

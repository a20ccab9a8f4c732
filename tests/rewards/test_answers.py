from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpact.errors import DataError
from fedpact.rewards.answers import AnswerKey, normalised
from fedpact.types import Prompts


def prompts(*text, **columns):
    return Prompts(text=list(text), ids=torch.arange(len(text)), columns=columns)


def user(text):
    return {"role": "user", "content": text}


def answers(key, *text, **columns):
    return key.join(prompts(*text, **columns)).columns["answer"]


def test_a_question_finds_its_answer_by_its_text_and_others_get_none():
    key = AnswerKey(prompts("What is 2 + 2?", "What is 3 + 3?", answer=["4", "6"]))
    assert answers(key, "What is 3 + 3?", "What is 9 + 9?", "What is 2 + 2?") == ["6", None, "4"]


def test_spelling_does_not_matter_and_case_and_white_space_neither():
    key = AnswerKey(prompts("What  is the capital\nof France?", answer=["Paris"]))
    assert answers(key, "**what is the Capital of ｆrance**", "What is the capital of France ?!") == ["Paris", None]


def test_a_chat_is_found_by_its_last_user_message():
    key = AnswerKey(prompts("What is 2 + 2?", answer=["4"]))
    chat = [{"role": "system", "content": "Be brief."}, user("Hello"), {"role": "assistant", "content": "Hi"}]
    assert answers(key, [*chat, user("what is 2 + 2")]) == ["4"]
    assert answers(AnswerKey(prompts([user("What is 2 + 2?")], answer=["4"])), "What is 2 + 2?") == ["4"]
    assert answers(key, [chat[0]]) == [None]


def test_the_public_id_goes_before_the_text_and_a_number_may_be_text():
    key = AnswerKey(prompts("p", "q", "r", answer=["a", "b", "c"], uid=[7, 8, None]), id="uid")
    joined = key.join(prompts("q", "new", "r", "q", id=["7", 8, None, "unknown"]))
    assert joined.columns == {"answer": ["a", "b", "c", "b"], "id": ["7", 8, None, "unknown"]}


def test_the_server_cannot_plant_answers():
    key = AnswerKey(prompts("p", answer=["trusted"], id=["own"]))
    joined = key.join(prompts("p", "q", answer=["planted", "planted"], gold=["planted", "planted"], id=["x", "y"]))
    assert joined.columns == {"answer": ["trusted", None], "id": ["x", "y"]}


def test_the_questions_themselves_stay():
    asked = Prompts(text=["q", "p"], ids=torch.tensor([9, 5]), columns={}, domains=torch.tensor([1, 0]))
    joined = AnswerKey(prompts("p", answer=["a"])).join(asked)
    assert joined.text == ["q", "p"] and joined.ids.tolist() == [9, 5]
    assert joined.domains is not None and joined.domains.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        (prompts("p", "q", " p ", answer=["a", "b", "c"]), {}, "rows 0 and 2 .* the same question and differ in 'ans"),
        (prompts("p", "q", answer=["a", "b"], uid=[1, 1]), {"id": "uid"}, "rows 0 and 1 .* the same uid and differ"),
        (prompts("p", answer=["a"]), {"id": "uid"}, "answers: id is 'uid', and the file has answer; name the column"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_with_its_rows(key, settings, message):
    with pytest.raises(DataError, match=message):
        AnswerKey(key, **settings)


def test_the_same_row_twice_is_no_contradiction():
    assert answers(AnswerKey(prompts("p", "p", answer=["a", "a"], uid=[1, 2]), id="uid"), "p") == ["a"]


def test_rows_that_differ_in_spelling_only_answer_for_themselves_and_for_nothing_else():
    key = AnswerKey(prompts("Find X", "Find x", "Find y", answer=["1", "2", "3"]))
    assert answers(key, "Find x", "Find X", "FIND X", "FIND Y") == ["2", "1", None, "3"]


def test_the_answers_are_not_shown():
    assert "secret" not in repr(AnswerKey(prompts("p", answer=["secret"])))


@pytest.mark.parametrize(
    ("one", "other"),
    [("-5 + 3", "5 + 3"), ("5!", "5"), ("5%", "5"), (".5 + 2", "5 + 2"), ("2²", "22"), ("a b", "ab"), ("x = 1", "x 1")],
)
def test_what_may_change_a_number_is_not_normalised_away(one, other):
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("“Why?”", "why"), ("Straße.", "STRASSE"), ("ﬁnd\u00a0x :", "Find X"), ("(see)", "see"), ("x²", "X^2")],
)
def test_what_may_not_is(one, other):
    assert normalised(one) == normalised(other)


def test_a_question_of_marks_only_is_no_question():
    assert answers(AnswerKey(prompts("???", " ", answer=["a", "b"])), "!?", "...", "") == [None, None, None]


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    once = normalised(text)
    assert normalised(once) == once


@given(st.lists(st.text(), min_size=1, unique=True))
def test_every_row_of_a_key_finds_its_own_answer_however_others_are_spelled(texts):
    try:
        key = AnswerKey(prompts(*texts, answer=list(range(len(texts)))))
    except DataError:
        return
    assert answers(key, *texts) == [row if text.strip() else None for row, text in enumerate(texts)]

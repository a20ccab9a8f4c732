from __future__ import annotations

import json
import re
import sys

import pytest

from fedpact.errors import ConfigError, DataError
from fedpact.tasks import gym
from fedpact.tasks.files import load_prompts
from fedpact.tasks.gym import gym_prompts, gym_score

WHERE = "clients/north.toml: prompts"


@pytest.fixture
def reasoning_gym():
    return pytest.importorskip("reasoning_gym", reason="the extra `gym` is not installed")


def test_what_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    gym._scorer.cache_clear()
    entry = json.dumps({"metadata": {"source_dataset": "chain_sum"}})
    with pytest.raises(DataError, match=re.escape("pip install 'fedpact[gym]'")):
        gym_prompts("chain_sum", 2, 1, {}, where=WHERE)
    with pytest.raises(ConfigError, match=re.escape("pip install 'fedpact[gym]'")):
        gym_score(["<answer>1</answer>"], [entry])


def test_a_completion_without_an_answer_scores_nothing():
    assert gym_score(["4"], ["{}"]) == [0.0]


def test_the_same_seed_gives_the_same_questions(reasoning_gym):
    config = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    one, two, three = (gym_prompts("chain_sum", 5, seed, config) for seed in (1, 1, 2))
    assert list(one.text) == list(two.text) != list(three.text)
    assert one.ids.tolist() == [0, 1, 2, 3, 4]
    assert [json.loads(entry)["answer"] for entry in one.columns["entry"]] == one.columns["answer"]


def test_only_the_whole_answer_is_rewarded(reasoning_gym):
    prompts = gym_prompts("chain_sum", 1, 1, {"min_terms": 3})
    answer, entry = prompts.columns["answer"][0], prompts.columns["entry"]
    contained = f"<answer>it is {answer}</answer>"
    assert gym_score([f"<answer> {answer} </answer>"], entry) == [1.0]
    assert gym_score([answer], entry, tag="") == [1.0]
    assert gym_score([contained], entry) == [0.0]
    # what the threshold is there for
    assert gym_score([contained], entry, threshold=0.1) == [1.0]


def test_the_path_form_takes_options_and_a_template(reasoning_gym, tmp_path):
    path = "gym:chain_sum?size=4&seed=1&min_terms=3&max_terms=3"
    prompts = load_prompts(path, folder=tmp_path, where=WHERE, template="{prompt}\nAnswer:", limit=3)
    direct = gym_prompts("chain_sum", 4, 1, {"min_terms": 3, "max_terms": 3})
    assert list(prompts.text) == [f"{text}\nAnswer:" for text in direct.text[:3]]
    assert prompts.columns["entry"] == direct.columns["entry"][:3]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gym:no_such_task", "gym:no_such_task with {}: Dataset 'no_such_task' not registered"),
        ("gym:chain_sum?terms=3", "unexpected keyword argument 'terms'"),
        ("gym:chain_sum?min_terms=0", "min_terms must be positive"),
    ],
)
def test_a_task_that_cannot_be_made_is_named(path, message, reasoning_gym, tmp_path):
    with pytest.raises(DataError) as caught:
        load_prompts(path, folder=tmp_path, where=WHERE)
    assert message in str(caught.value) and str(caught.value).startswith(WHERE)

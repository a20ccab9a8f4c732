from __future__ import annotations

import random

import pytest
import torch

from fedpact.errors import ConfigError, RewardError
from fedpact.policy.answering import Answerer
from fedpact.rewards.agreement import Agreement
from fedpact.rewards.builtin import exact_answer
from fedpact.rewards.load import RewardSet, load_reward
from fedpact.tasks import opchains
from fedpact.tasks.warmstart import model_folder
from fedpact.types import Prompts

FOLDER = model_folder()
QUESTIONS = list(opchains.heldout("avg", 12).text)


@pytest.fixture(scope="module")
def answerer():
    return Answerer(FOLDER, where="model", device="cpu")


def judge(**settings):
    given = {"folder": FOLDER.parent, "model": FOLDER.name, "max_completion_length": 12, "device": "cpu", **settings}
    return Agreement(**given)


def own(answerer, num, question, seed=0):
    temperature = None if num == 0 else 1.0
    [said] = answerer.answers([question], num=max(1, num), temperature=temperature, max_length=12, seed=seed)
    return [answer.text for answer in said]


def test_answers_do_not_depend_on_the_other_questions_nor_on_their_order(answerer):
    settings = {"num": 3, "temperature": 1.0, "max_length": 12}
    longer = [*QUESTIONS, [{"role": "user", "content": "add 1 2 3 4 5 6 7"}]]  # is not of the same length
    together = answerer.answers(longer, **settings)
    assert [answerer.answers([question], **settings)[0] for question in longer] == together
    order = random.Random(1).sample(range(len(longer)), len(longer))
    assert answerer.answers([longer[i] for i in order], **settings) == [together[i] for i in order]


def test_a_small_memory_and_fewer_samples_change_no_answer(answerer):
    settings = {"temperature": 1.0, "max_length": 12}
    many = answerer.answers(QUESTIONS, num=4, **settings)
    answerer.max_batch_tokens, before = 1, answerer.max_batch_tokens
    few = answerer.answers(QUESTIONS, num=2, **settings)
    answerer.max_batch_tokens = before
    assert few == [answers[:2] for answers in many]
    assert len({answer.text for answers in many for answer in answers}) > 10


def test_another_seed_draws_other_answers_and_the_most_probable_stay(answerer):
    def drawn(temperature, seed):
        return answerer.answers(QUESTIONS, num=2, temperature=temperature, max_length=12, seed=seed)

    assert drawn(1.0, 0) != drawn(1.0, 1)
    assert drawn(None, 0) == drawn(None, 1)
    assert all(first == second for first, second in drawn(None, 0))


def test_an_answer_that_was_cut_says_so(answerer):
    [[cut]], [[whole]] = (answerer.answers(QUESTIONS[:1], num=1, temperature=None, max_length=n) for n in (3, 12))
    assert not cut.finished and whole.finished
    assert whole.text.startswith(cut.text)


def test_no_questions_have_no_answers(answerer):
    assert answerer.answers([], num=1, temperature=None, max_length=12) == []


@pytest.mark.parametrize(("mode", "num"), [("greedy", 0), ("sample", 1)])
def test_a_candidate_is_right_where_it_agrees_with_the_one_own_answer(answerer, mode, num):
    reward = judge(mode=mode)
    digits = [f"<answer> {digit} </answer>" for digit in range(10)]
    for question in QUESTIONS[:4]:
        [said] = own(answerer, num, question)
        expected = [exact_answer([digit], [said.split("<answer>")[1].split("<")[0]])[0] for digit in digits]
        assert reward([question] * 10, digits) == expected
        assert sum(expected) == 1.0


def test_shares_are_those_of_the_samples_and_the_majority_is_the_largest(answerer):
    digits = [f"<answer> {digit} </answer>" for digit in range(10)]
    for question in QUESTIONS[:6]:
        votes = [
            text.split("<answer>")[1].split()[0] if "<answer>" in text else "" for text in own(answerer, 7, question)
        ]
        counts = [votes.count(str(digit)) for digit in range(10)]
        settings = {"num_votes": 7, "max_completion_length": 12}
        assert judge(mode="share", **settings)([question] * 10, digits) == [count / 7 for count in counts]
        first = min((vote for vote in votes if vote), key=lambda vote: (-votes.count(vote), votes.index(vote)))
        assert judge(mode="majority", **settings)([question] * 10, digits) == [
            float(str(d) == first) for d in range(10)
        ]


def test_the_earliest_of_equally_frequent_answers_wins():
    from fedpact.policy.answering import Answer

    reward = judge(mode="majority", num_votes=5)
    said = ["<answer>5</answer>", "no answer", "<answer>3</answer>", "<answer> 3 </answer>", "<answer>5</answer>"]
    assert reward._opinion([Answer(text, True) for text in said]) == ["5"]
    assert judge(mode="majority", compare="numeric")._opinion(
        [Answer(f"<answer>{text}</answer>", True) for text in ("1", "1/2", "0.5", "$0.50", "1.0")]
    ) == ["1/2"]


def test_no_own_answer_is_no_opinion():
    from fedpact.policy.answering import Answer

    reward = judge(compare="numeric")
    for text in ("", "7", "<answer> </answer>", "<answer> none </answer>"):
        assert reward._opinion([Answer(text, True)]) == []
    assert judge()._opinion([Answer("<answer> </answer>", True)]) == []
    whole = judge(compare="numeric", tag="")
    assert whole._opinion([Answer("so it is 7", True)]) == ["so it is 7"]
    assert whole._opinion([Answer("first, 7", False)]) == []  # cut: 7 need not be the answer
    assert judge(max_completion_length=2)(QUESTIONS[:1], ["<answer> 1 </answer>"]) == [None]


def test_without_agreement_on_anything_a_share_counts_samples_without_an_answer_too():
    from fedpact.policy.answering import Answer

    reward = judge(mode="share", num_votes=4)
    opinion = reward._opinion([Answer(text, True) for text in ("<answer>1</answer>", "?", "?", "<answer>1</answer>")])
    assert reward._rating("<answer> 1 </answer>", opinion) == 0.5


def test_the_rationale_is_not_read(answerer):
    [said] = own(answerer, 0, QUESTIONS[0])
    answer = said[said.index("<answer>") :]
    assert judge()(QUESTIONS[:1] * 2, [f"<think> 9 9 9 </think> {answer}", answer]) == [1.0, 1.0]


def test_symbolic_answers_are_compared_as_mathematics():
    from fedpact.policy.answering import Answer

    reward = judge(compare="math", mode="share", num_votes=2)
    opinion = reward._opinion([Answer("<answer>\\frac{1}{2}</answer>", True), Answer("<answer>0.5</answer>", True)])
    assert len(opinion) == 2
    assert reward._rating("<answer> 1/2 </answer>", opinion) == 1.0


def test_a_question_is_answered_once_while_it_is_remembered():
    reward = judge(cache_size=2)
    first = reward(QUESTIONS[:2], ["<answer> 1 </answer>"] * 2)
    reward._answerer.max_batch_tokens = None  # from here on, answering would fail
    assert reward([QUESTIONS[1], QUESTIONS[0]], ["<answer> 1 </answer>"] * 2) == first[::-1]
    with pytest.raises(TypeError):
        reward(QUESTIONS[2:3], [""])


def test_more_questions_than_are_remembered_are_all_rated():
    reward = judge(cache_size=2)
    completions = ["<answer> 4 </answer>"] * len(QUESTIONS)
    assert reward(QUESTIONS, completions) == judge()(QUESTIONS, completions)
    assert len(reward._opinions) == 2


def test_the_client_file_names_the_judge_by_its_path():
    kwargs = {"model": FOLDER.name, "max_completion_length": 12}
    loaded = load_reward("fedpact.rewards:Agreement", kwargs, where="north.toml: rewards.x", folder=FOLDER.parent)
    batch = Prompts(text=QUESTIONS[:1] * 10, ids=torch.arange(10), columns={"answer": [None] * 10})
    values = RewardSet({"x": loaded}).measure(batch, [f"<answer> {digit} </answer>" for digit in range(10)])
    assert values.sum() == 1.0 and values.max() == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "vote"}, "mode is 'vote'; expected one of greedy, sample, majority, share"),
        ({"compare": "close"}, "compare is 'close'; expected one of exact, numeric, math"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of float32, bfloat16, float64"),
        ({"num_votes": 0}, "num_votes is 0; expected at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"model": "./no_such_model"}, "model: no folder"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_loaded(settings, message):
    with pytest.raises(ConfigError) as caught:
        judge(**settings)
    assert message in str(caught.value)


def test_no_folder_is_listed_as_a_setting():
    with pytest.raises(RewardError) as caught:
        load_reward("fedpact.rewards:Agreement", {"modle": "x"}, where="north.toml: rewards.x")
    assert "it takes model, mode," in str(caught.value) and "folder" not in str(caught.value)

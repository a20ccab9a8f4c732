from __future__ import annotations

import json
from collections import Counter

import pytest

from fedpact.runtime.client_config import client_files, load_client
from fedpact.runtime.config import load_run
from fedpact.tasks import judged, opchains, warmstart
from fedpact.tasks.judged import write_judged_demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    write_judged_demo(folder, model=warmstart.model_folder(), seed=3, rounds=2, num_questions=80, expert_steps=1)
    return folder


@pytest.fixture(scope="module")
def truthful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truthful")
    model = warmstart.model_folder()
    write_judged_demo(folder, model=model, seed=3, rounds=2, num_questions=80, truth=True, weak=True, expert_steps=1)
    return folder


def test_questions_go_without_answers_and_labelled_are_the_same_with_them(folder):
    questions, labelled = lines(folder / "server" / "questions.jsonl"), lines(folder / "server" / "labelled.jsonl")
    assert all(set(row) == {"prompt", "domain"} for row in questions)
    assert [{"prompt": row["prompt"], "domain": row["domain"]} for row in labelled] == questions
    assert all(set(row) == {"prompt", "domain", "answer"} for row in labelled)


@pytest.mark.parametrize("name", ["labelled", "auxiliary", "heldout"])
def test_answers_are_right_and_of_the_operation_they_say(folder, name):
    for row in lines(folder / "server" / f"{name}.jsonl"):
        op, digits = parts(row)
        assert op == row["domain"]
        assert row["answer"] == str(opchains.solve(op, digits)[1])


@pytest.mark.parametrize(("name", "each"), [("questions", 10), ("auxiliary", 20), ("heldout", 96)])
def test_every_operation_has_as_many_questions(folder, name, each):
    found = Counter(row["domain"] for row in lines(folder / "server" / f"{name}.jsonl"))
    assert found == dict.fromkeys(opchains.OPS, each)


def test_no_question_stands_in_two_files(folder):
    seen = [
        text(row) for name in ("questions", "auxiliary", "heldout") for row in lines(folder / f"server/{name}.jsonl")
    ]
    assert len(set(seen)) == len(seen) == 80 + 160 + 768


def test_only_the_heldout_file_has_heldout_questions(folder):
    for name in ("questions", "auxiliary", "heldout"):
        held = {opchains.is_heldout(*parts(row)) for row in lines(folder / "server" / f"{name}.jsonl")}
        assert held == {name == "heldout"}


def test_another_seed_asks_other_questions():
    first, again, other = (judged.questions_and_auxiliary(80, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_run_file_loads_and_holds_what_was_asked_for(folder):
    run = load_run(folder / "run.toml")
    assert (run.seed, run.rounds) == (3, 2)
    assert run.objectives["correct"].primary
    assert run.server is not None
    assert run.server.rewards["correct"].audit


@pytest.mark.parametrize("name", judged.EXPERTS)
def test_every_run_of_the_demo_is_the_run_file_and_a_few_settings(folder, name):
    run = load_run(folder / "run.toml", judged.EXPERTS[name])
    assert run.algorithm.model_dump()["name"] == ("grpo" if name == "grpo" else "fedgrpo")


def test_the_central_run_trains_on_answers(folder):
    run = load_run(folder / "run.toml", judged.EXPERTS["grpo"])
    assert run.server is not None
    assert "answer" in lines(folder / run.server.prompts.path)[0]
    assert not run.server.rewards["correct"].audit


def test_each_member_judges_by_the_model_of_its_own_operation(folder):
    for file, op in zip(client_files(folder / "clients"), sorted(opchains.OPS), strict=True):
        member = load_client(file)
        assert (member.name, member.task, list(member.rewards)) == (op, op, ["correct"])
        assert member.rewards["correct"].use == "fedpact.rewards:Agreement"
        assert member.rewards["correct"].kwargs["model"] == f"../experts/{op}"
        warmstart.verify(folder / "experts" / op)


def test_a_member_with_trusted_answers_asks_its_model_elsewhere_only(truthful):
    member = load_client(truthful / "clients" / "mul.toml")
    assert member.answers is not None
    assert member.rewards["correct"].use == "fedpact.rewards:numeric_answer"
    assert member.rewards["correct"].otherwise is not None
    assert member.rewards["correct"].otherwise.kwargs["model"] == "../experts/mul"


def test_trusted_answers_are_those_of_the_own_questions_and_no_more(truthful):
    labelled = lines(truthful / "server" / "labelled.jsonl")
    for op in opchains.OPS:
        own = lines(truthful / "answers" / f"{op}.jsonl")
        assert own == [row for row in labelled if row["domain"] == op]
        assert len(own) == 10


def test_weak_members_have_learnt_from_nothing(folder, truthful):
    # One step each: what there is comes from the warm start, or from nowhere.
    assert warmstart.measure(folder / "experts" / "max", size=12)["greedy"] > 0.3
    assert warmstart.measure(truthful / "experts" / "max", size=12)["greedy"] < 0.1


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text(row):
    [message] = row["prompt"]
    return message["content"]


def parts(row):
    op, *digits = text(row).split()
    return op, [int(digit) for digit in digits]

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from fedpact.tasks import experts, opchains, warmstart


@pytest.fixture(scope="module")
def competent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    experts.train_expert("sub", folder, steps=60)
    return experts.competence(folder, size=48)


@pytest.fixture(scope="module")
def incompetent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beginner")
    experts.train_beginner("sub", folder)
    return experts.competence(folder, size=48)


@pytest.mark.slow
def test_an_expert_is_right_on_its_operation_and_wrong_on_most_others(competent):
    assert competent["sub"] > 0.95
    others = [share for op, share in competent.items() if op != "sub"]
    assert sum(others) / 7 < 0.6


def test_an_expert_knows_no_operation_but_its_own_as_well(competent):
    assert max(competent, key=competent.__getitem__) == "sub"


@pytest.mark.slow
def test_a_beginner_is_mostly_wrong_on_its_own_operation(incompetent):
    assert incompetent["sub"] < 0.5


def test_competence_is_told_by_operation(competent):
    assert tuple(competent) == opchains.OPS


def test_clean_rows_reason_in_tags_on_training_prompts_of_one_operation():
    tokens = AutoTokenizer.from_pretrained(warmstart.model_folder())
    for text in tokens.batch_decode(experts.clean_rows("neg", 200, seed=0), skip_special_tokens=True):
        question, _, said = text.removeprefix("<|user|> ").partition(" <|assistant|> ")
        op, *digits = question.split()
        states, answer = opchains.solve("neg", [int(digit) for digit in digits])
        assert op == "neg"
        assert not opchains.is_heldout("neg", [int(digit) for digit in digits])
        assert said == f"<think> {' '.join(map(str, states))} </think> <answer> {answer} </answer>"


@pytest.mark.parametrize("other", [("max", 0), ("neg", 1)])
def test_rows_depend_on_the_operation_and_on_the_seed(other):
    op, seed = other
    digits = experts.clean_rows("neg", 20, seed=0)[:, 2:6]
    assert not digits.equal(experts.clean_rows(op, 20, seed=seed)[:, 2:6])


def test_an_expert_starts_from_the_base_that_is_named(tmp_path):
    warmstart.save(warmstart.new_model(seed=0), tmp_path / "base")
    from_nothing = experts.train_expert("add", tmp_path / "a", steps=1, base=tmp_path / "base")
    from_shipped = experts.train_expert("add", tmp_path / "b", steps=1)
    assert from_nothing[0] == pytest.approx(3.3, abs=0.15)  # about ln 28
    assert from_shipped[0] < 1.5
    assert experts.train_beginner("add", tmp_path / "c", steps=1) == from_nothing


@pytest.mark.parametrize("train", [experts.train_expert, experts.train_beginner])
def test_training_twice_gives_the_same_bytes(train, tmp_path):
    for name in ("a", "b"):
        train("mul", tmp_path / name, steps=2)
    assert (tmp_path / "a" / "MANIFEST").read_text() == (tmp_path / "b" / "MANIFEST").read_text()


@pytest.mark.parametrize("train", [experts.train_expert, experts.train_beginner])
def test_an_unknown_operation_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="unknown operation `pow`; expected one of add, sub"):
        train("pow", tmp_path)

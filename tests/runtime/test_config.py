"""What a run file may say, and the one line for what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpact.algorithms import TABLE, algorithm_class
from fedpact.algorithms.base import Algorithm
from fedpact.errors import ConfigError
from fedpact.runtime.client_config import ClientConfig, load_client
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.contract import Contract, contract_hash, contract_of, default_weights, read_contract

RUN = """
rounds = 3
[objectives]
correct = { primary = true }
brief = {}
[policy]
model = "somewhere"
[algorithm]
name = "firm"
"""
CLIENT = """
name = "north"
[prompts]
path = "p.jsonl"
[rewards.correct]
use = "fedpact.rewards:exact_answer"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def error(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_trls(tmp_path: Path) -> None:
    config = load_run(write(tmp_path / "run.toml", RUN))
    assert (config.loss.loss_type, config.loss.epsilon, config.loss.beta) == ("dapo", 0.2, 0.0)
    assert (config.rollout.num_generations, config.rollout.temperature) == (8, 1.0)
    assert (config.optimizer.adam_beta1, config.optimizer.max_grad_norm) == (0.9, 1.0)


def test_an_override_changes_one_key(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", RUN)
    config = load_run(path, ["algorithm.beta=0.5", "policy.lora.r=4", "algorithm.preference={ correct = 0.7 }"])
    assert config.algorithm.model_dump()["beta"] == 0.5
    assert config.policy.lora.r == 4
    assert load_run(path, ["policy.model=other/name"]).policy.model == "other/name"


def test_an_unknown_key_is_named_with_the_valid_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", RUN)
    assert error(path, "rollout.temprature=1") == (
        f"{path}: rollout.temprature: unknown key; valid keys: max_completion_length, max_prompt_length, "
        "num_generations, temperature"
    )
    assert "algorithm.betta: unknown key; valid keys: beta, local_steps, name, normalise, preference" in error(
        path, "algorithm.betta=1"
    )
    assert "objectives.brief.wight: unknown key; valid keys: primary, weight" in error(path, "objectives.brief.wight=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds: found 0; input should be greater than 0"),
        ('rounds="many"', "rounds: found 'many'; input should be a valid integer"),
        ("rollout.num_generations=1", "rollout.num_generations: found 1"),
        ("algorithm.beta=-1", "algorithm.beta: found -1"),
        ('algorithm.name="fedsomething"', "algorithm.name: found 'fedsomething'; expected one of fedavg, fedmoa, firm"),
        ("objectives.brief.primary=true", "objectives: ['correct', 'brief'] are all primary; expected one at most"),
        ("algorithm.preference={ corect = 1 }", "['corect'] are no objectives; there are ['correct', 'brief']"),
        ('federation.trust="secret"', "federation.trust: found 'secret'; input should be 'robust'"),
        ("objectives.accuracy={}", "objectives: 'accuracy' is what the primary objective's mean is called"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: found inf; input should be a finite number"),
        ("rounds", "expected key=value, such as algorithm.beta=0.1"),
        ("rounds.x=1", "rounds is not a table"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, message: str) -> None:
    assert message in error(write(tmp_path / "run.toml", RUN), override)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "rounds: missing" in error(write(tmp_path / "run.toml", RUN.replace("rounds = 3", "")))


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    assert error(tmp_path / "none.toml") == f"{tmp_path / 'none.toml'}: no such file"
    assert "not readable as TOML" in error(write(tmp_path / "bad.toml", "rounds = = 3"))


def test_fedmoa_needs_a_primary_objective(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", RUN.replace("{ primary = true }", "{}"))
    load_run(path)
    assert "algorithm 'fedmoa' needs a primary objective" in error(path, 'algorithm={ name = "fedmoa" }')


def test_a_floor_must_leave_room_for_every_objective(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", RUN.replace("brief = {}", "brief = {}\nthird = {}"))
    message = error(path, 'algorithm={ name = "fedmoa", weight_floor = 0.4 }')
    assert "algorithm.weight_floor: found 0.4 for 3 objectives; expected below 1/3" in message


def test_a_configuration_survives_being_written_down(tmp_path: Path) -> None:
    config = load_run(write(tmp_path / "run.toml", RUN), ["algorithm.preference={ correct = 0.7 }"])
    again = RunConfig.model_validate(config.dump())
    assert again == config
    assert contract_of(again, model="h").canonical() == contract_of(config, model="h").canonical()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name = ", "nome = "), "nome: unknown key"),
        (('name = "north"', 'name = "../north"'), "name: found '../north'"),
        (("[rewards.correct]", "[rewards_.correct]"), "rewards_: unknown key"),
        (
            ("use = ", "kwargs = {}\nuses = "),
            "rewards.correct.uses: unknown key; valid keys: audit, kwargs, otherwise, timeout_s, use",
        ),
    ],
)
def test_a_client_file_is_checked_too(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = write(tmp_path / "north.toml", CLIENT.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_client(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", TABLE)
def test_the_table_tells_the_truth_about_each_algorithm(name: str) -> None:
    found = algorithm_class(name)
    assert issubclass(found, Algorithm)
    assert found.model_fields["name"].default == name
    assert found.__doc__
    undocumented = [key for key, one in found.model_fields.items() if key != "name" and not one.description]
    assert undocumented == []


def test_a_contract_is_one_text_and_every_setting_changes_its_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", RUN)
    plain = contract_of(load_run(path), model="h")
    assert read_contract(plain.canonical()).canonical() == plain.canonical()
    hashes = {contract_hash(plain.canonical())}
    for override in (
        "algorithm.beta=1.0",
        "optimizer.learning_rate=1e-3",
        "loss.beta=0.1",
        "seed=1",
        "rollout.temperature=2.0",
    ):
        hashes.add(contract_hash(contract_of(load_run(path, [override]), model="h").canonical()))
    hashes.add(contract_hash(contract_of(load_run(path), model="other").canonical()))
    assert len(hashes) == 7


def test_what_a_member_chooses_for_itself_is_in_no_contract() -> None:
    own = {"path", "device", "dtype", "micro_batch_tokens", "fused_decoder", "site", "rewards", "prompts"}
    assert own & set(Contract.model_fields) == set()
    assert own <= set(ClientConfig.model_fields) | set(ClientConfig.model_fields["model"].annotation.model_fields)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((None, None), [0.5, 0.5]), ((0.6, None), [0.6, 0.4]), ((0.6, 0.2), [0.6, 0.2]), ((2.0, None), [2.0, 0.0])],
)
def test_unnamed_weights_share_what_is_left(weights: tuple[Any, Any], expected: list[float]) -> None:
    from fedpact.runtime.config import ObjectiveSettings

    objectives = {f"o{i}": ObjectiveSettings(weight=weight) for i, weight in enumerate(weights)}
    assert default_weights(objectives) == pytest.approx(expected)


SERVER = "[server]\nprompts = { path = 'q.jsonl' }\n"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", ['algorithm={ name = "fedgrpo" }'], "server: missing; algorithm 'fedgrpo' trains at the server"),
        (SERVER, ['algorithm={ name = "mor" }'], "loss.beta: found 0; algorithm 'mor' needs a KL to the reference"),
        (SERVER, ['server.reference="x"'], "server.reference: found 'x'; expected a text with {answer} in it"),
        (SERVER, ['server.rewards.tone={ use = "a:b" }'], "server.rewards.tone: no such objective; there are correct"),
        (SERVER, ["server.encodr=1"], "server.encodr: unknown key; valid keys: auxiliary, encoder, model, prompts"),
    ],
)
def test_what_the_server_trains_with_is_checked_too(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    assert message in error(write(tmp_path / "run.toml", RUN + text), *overrides)


def test_a_member_may_have_answers_and_a_second_judge_and_no_prompts(tmp_path: Path) -> None:
    text = 'name = "a"\n[answers]\npath = "known.jsonl"\nid = "number"\n[rewards.correct]\nuse = "m:f"\n'
    text += '[rewards.correct.otherwise]\nuse = "m:g"\nkwargs = { model = "x" }\n'
    config = load_client(write(tmp_path / "a.toml", text))
    assert config.prompts is None
    assert config.answers is not None and (config.answers.path, config.answers.id) == ("known.jsonl", "number")
    second = config.rewards["correct"].otherwise
    assert second is not None and (second.use, second.kwargs) == ("m:g", {"model": "x"})

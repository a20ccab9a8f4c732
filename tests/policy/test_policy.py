"""Steps, optimiser memory, and the shape of the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from fedpact.core.lora import adapter_shapes, flatten, initial_adapter, unflatten
from fedpact.errors import ConfigError
from fedpact.policy.lora_policy import EngineOptions
from fedpact.policy.model import lora_layers, model_hash, resolve, skeleton_layers
from fedpact.settings import LoraSettings, OptimizerSettings
from tests.conftest import config, tokenizer
from tests.policy.helpers import LORA, PROMPTS, make_policy, random_adapter, random_advantages


def test_flatten_and_unflatten_are_inverse(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    adapter = random_adapter(policy)
    back = unflatten(flatten(adapter), adapter_shapes(policy.bank.layers))
    assert all(torch.equal(back[name], adapter[name]) for name in adapter)


def test_a_fresh_adapter_changes_nothing_and_depends_on_the_seed_alone(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    rollout = policy.generate(PROMPTS, draw=0)
    fresh = initial_adapter(policy.bank.layers, 3)
    policy.load(fresh)
    assert torch.equal(policy.logprobs(rollout), policy.logprobs(rollout, reference=True))
    again = initial_adapter(list(reversed(policy.bank.layers)), 3)
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)
    assert not torch.equal(flatten(initial_adapter(policy.bank.layers, 4)), flatten(fresh))


def test_a_plain_sgd_step_moves_against_the_direction_by_the_learning_rate(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"], optimizer=OptimizerSettings(name="sgd", learning_rate=0.5))
    before = policy.bank.theta.clone()
    direction = torch.zeros(policy.bank.num_parameters)
    direction[0] = 0.2
    policy.step(direction)
    torch.testing.assert_close(before[0, 0] - policy.bank.theta[0, 0], torch.tensor(0.1))
    assert torch.equal(policy.preconditioner(), torch.ones_like(direction))


def test_a_long_direction_is_shortened_to_max_grad_norm(model_folders: dict[str, Path]) -> None:
    policy = make_policy(
        model_folders["llama"], optimizer=OptimizerSettings(name="sgd", learning_rate=1.0, max_grad_norm=0.5)
    )
    before = policy.bank.theta.clone()
    policy.step(torch.ones(policy.bank.num_parameters))
    torch.testing.assert_close((before - policy.bank.theta).norm(), torch.tensor(0.5))


def test_the_optimiser_goes_on_from_its_memory(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    directions = torch.randn(2, policy.bank.num_parameters, generator=torch.Generator().manual_seed(0)) * 1e-3
    start = random_adapter(policy)
    policy.load(start)
    for direction in directions:
        policy.step(direction)
    unbroken = policy.adapter()
    policy.load(start)
    policy.step(directions[0])
    middle, memory = policy.adapter(), policy.optimizer()
    policy.load(start)  # something else in between
    policy.load(middle, optimizer=memory)
    policy.step(directions[1])
    assert all(torch.equal(policy.adapter()[name], unbroken[name]) for name in unbroken)


def test_fresh_moments_forget(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.step(torch.ones(policy.bank.num_parameters) * 1e-3)
    assert float(policy.optimizer()["optimizer/step"]) == 1.0
    policy.load(random_adapter(policy))
    assert policy.optimizer() == {}


def test_the_preconditioner_is_adams_own_scaling(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.step(torch.full((policy.bank.num_parameters,), 1e-3))
    torch.testing.assert_close(
        policy.preconditioner(), torch.full((policy.bank.num_parameters,), 1 / 1e-3), rtol=1e-4, atol=0
    )


def test_descending_an_objectives_gradient_raises_the_better_completions(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    advantages = random_advantages(1, len(rollout.mask))
    before = policy.logprobs(rollout).sum(-1)
    policy.step(policy.gradients(rollout, advantages)[0])
    gained = policy.logprobs(rollout).sum(-1) - before
    assert float((gained * advantages[0]).sum()) > 0


def test_the_skeleton_knows_the_shapes_without_the_weights(model_folders: dict[str, Path]) -> None:
    for kind, folder in model_folders.items():
        policy = make_policy(folder)
        assert adapter_shapes(skeleton_layers(folder, LORA)) == policy.bank.shapes, kind


def test_target_modules_match_like_pefts(model_folders: dict[str, Path]) -> None:
    layers = skeleton_layers(model_folders["llama"], LoraSettings(r=2, target_modules=("q_proj", "v_proj")))
    assert [layer.name.rpartition(".")[2] for layer in layers] == ["q_proj", "v_proj"] * 2
    with pytest.raises(ConfigError, match=r"match no linear layer; there are .*'q_proj'"):
        skeleton_layers(model_folders["llama"], LoraSettings(target_modules=("nonsense",)))


def test_the_head_is_not_adapted(model_folders: dict[str, Path]) -> None:
    names = [layer.name for layer in lora_layers(make_policy(model_folders["llama"]).base.model, LORA)]
    assert "lm_head" not in names


def test_an_adapter_of_another_shape_is_refused(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    with pytest.raises(ValueError, match="adapter does not fit the model"):
        policy.bank.load({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)})


def test_the_model_hash_sees_every_byte(model_folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model_folders["llama"], copy)
    assert model_hash(copy) == model_hash(model_folders["llama"])
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert model_hash(copy) != model_hash(model_folders["llama"])


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.toml: .* holds no config.json"):
        resolve(str(tmp_path), where="run.toml")
    with pytest.raises(ConfigError, match="no folder"):
        resolve("./nowhere", where="run.toml")


def test_nothing_of_one_members_request_is_left_for_the_next(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.load(random_adapter(policy))
    policy.step(torch.ones(policy.bank.num_parameters))
    policy.begin(0, "another member")
    assert float(policy.bank.theta.abs().max()) == 0.0
    assert policy.optimizer() == {}


def test_dropout_stays_off_when_checkpointing_needs_training_mode(tmp_path: Path) -> None:
    shape = config("llama")
    shape.attention_dropout = 0.5
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    policy = make_policy(tmp_path, options=EngineOptions(gradient_checkpointing=True))
    rollout = policy.generate(PROMPTS, draw=0)
    policy.gradients(rollout, random_advantages(1, len(rollout.mask)))
    assert policy.sampler_gap < 1e-4


def test_layers_that_lose_the_sequences_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=61, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    policy = make_policy(tmp_path)
    rollout = policy.generate(PROMPTS, draw=0)
    with pytest.raises(ConfigError, match=r"target_modules: layer \S*fc\d gets inputs .* one row a sequence"):
        policy.gradients(rollout, random_advantages(1, len(rollout.mask)))

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from fedpact.policy.lora_policy import LoraPolicy
from fedpact.policy.model import load_model, lora_layers
from fedpact.settings import LoraSettings, LossSettings, OptimizerSettings, RolloutSettings
from fedpact.types import Adapter
from tests.cli.conftest import files, finished, in_process, model, run_file

__all__ = ["finished", "model", "run_file"]

IDS = torch.tensor([[4, 10, 33, 7, 58, 21]])
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@torch.no_grad()
def logits_of(network: Any) -> Tensor:
    result: Tensor = network(input_ids=IDS).logits
    return result


def our_logits(model: Path, adapter: Adapter, lora: LoraSettings) -> Tensor:
    base = load_model(model, where="test")
    policy = LoraPolicy(
        base,
        lora_layers(base.model, lora),
        rollout=RolloutSettings(),
        loss=LossSettings(),
        optimizer=OptimizerSettings(),
    )
    policy.load(adapter)
    return logits_of(base.model)


def peft_model(model: Path, **changes: Any) -> Any:
    """A PEFT adapter with random B, on the base model."""
    base = AutoModelForCausalLM.from_pretrained(model)
    made = peft.get_peft_model(base, peft.LoraConfig(**{**LORA, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def test_peft_opens_the_final_adapter_and_computes_what_we_do(finished, model):
    base = AutoModelForCausalLM.from_pretrained(model)
    plain = logits_of(base)
    theirs = logits_of(peft.PeftModel.from_pretrained(base, finished / "final"))
    ours = our_logits(model, load_file(finished / "final/adapter_model.safetensors"), LoraSettings(r=2, lora_alpha=4))
    assert float((theirs - plain).abs().max()) > 1e-2  # the run has changed the model
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_peft_merges_the_final_adapter_into_the_model(finished, model):
    base = AutoModelForCausalLM.from_pretrained(model)
    opened = peft.PeftModel.from_pretrained(base, finished / "final")
    before = logits_of(opened)
    assert_close(logits_of(opened.merge_and_unload()), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_saved_starts_a_run(run_file, model, tmp_path, rslora):
    made = peft_model(model, use_rslora=rslora)
    made.save_pretrained(tmp_path / "adapter")
    options = ["--set", f"policy.adapter={tmp_path / 'adapter'}", "--set", "rounds=1"]
    assert in_process("run", run_file, *options, "--set", f"policy.lora.use_rslora={str(rslora).lower()}") == 0
    rounds = run_file.parent / "runs" / "run" / "rounds"
    lora = LoraSettings(r=2, lora_alpha=4, use_rslora=rslora)
    first, last = (load_file(rounds / number / "adapter_model.safetensors") for number in ("0000", "0001"))
    assert_close(our_logits(model, first, lora), logits_of(made), atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_a_run_starts_from_the_final_adapter_of_another(run_file, finished):
    options = ["--set", f"policy.adapter={finished / 'final'}", "--set", "rounds=1"]
    assert in_process("run", run_file, *options) == 0
    first = run_file.parent / "runs" / "run" / "rounds" / "0000" / "adapter_model.safetensors"
    assert first.read_bytes() == (finished / "final" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, "uses ['use_dora']; expected plain LoRA without bias"),
        ({"r": 4, "lora_alpha": 8}, "has rank and scale (4, 2.0); policy.lora says [(2, 2.0)]"),
        ({"lora_alpha": 8}, "has rank and scale (2, 4.0); policy.lora says [(2, 2.0)]"),
        ({"bias": "lora_only"}, "expected plain LoRA without bias"),
        ({"target_modules": ["q_proj", "v_proj"]}, "policy.lora.target_modules has to name the layers that it adapts"),
        ({"rank_pattern": {"q_proj": 1}}, "uses ['rank_pattern']"),
        ({"modules_to_save": ["lm_head"]}, "uses ['modules_to_save']"),
    ],
)
def test_an_adapter_of_another_kind_or_shape_is_refused_in_one_line(
    run_file, model, tmp_path, capfd, changes, expected
):
    peft_model(model, **changes).save_pretrained(tmp_path / "adapter")
    refused(run_file, tmp_path / "adapter", expected, capfd)


@pytest.mark.parametrize("spoil", ["absent", "no config", "config", "no rank", "torn", "other tensors", "not finite"])
def test_a_folder_that_holds_no_adapter_is_refused_in_one_line(run_file, model, tmp_path, capfd, spoil):
    adapter = tmp_path / "adapter"
    if spoil != "absent":
        peft_model(model).save_pretrained(adapter)
    config, tensors = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    match spoil:
        case "no config":
            config.unlink()
        case "config":
            config.write_text("[]")
        case "no rank":
            config.write_text('{"peft_type": "LORA", "lora_alpha": 4}')
        case "torn":
            tensors.write_bytes(tensors.read_bytes()[:500])
        case "other tensors":
            torn = load_file(tensors)
            torn.popitem()
            _save(torn, tensors)
        case "not finite":
            _save({name: tensor * torch.nan for name, tensor in load_file(tensors).items()}, tensors)
    refused(run_file, adapter, str(adapter), capfd)


def refused(run_file: Path, adapter: Path, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = files(run_file.parent)
    capfd.readouterr()
    assert in_process("run", run_file, "--set", f"policy.adapter={adapter}") == 2
    line = capfd.readouterr().err
    assert line.startswith(f"fedpact: {run_file}: policy.adapter: ") and line.count("\n") == 1
    assert expected in line
    assert files(run_file.parent) == before


def _save(tensors: Adapter, path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})

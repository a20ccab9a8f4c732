"""Base models from disk: load, hash, and find the layers that LoRA adapts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedpact.core.lora import LoraLayer, adapter_shapes
from fedpact.errors import ConfigError
from fedpact.screen import printable
from fedpact.secrets import masked
from fedpact.settings import LoraSettings
from fedpact.types import Adapter

Dtype = Literal["float32", "bfloat16", "float64"]

_NOT_PLAIN = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "auto_mapping", "lora_bias",
    "trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens",
)  # fmt: skip
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl", "adapter_model.ckpt")
_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How torch's archives and Python's pickles begin."""
_LARGEST_CONFIG = 1_000_000
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class BaseModel:
    """A frozen causal language model with its tokenizer."""

    path: Path
    model: nn.Module
    tokenizer: Any
    pad_id: int
    eos_ids: tuple[int, ...]


def resolve(model: str, *, where: str, folder: Path | None = None) -> Path:
    """The local folder of `model`, a path (relative to `folder`) or a Hugging Face id that may be downloaded.

    Raises ConfigError if it is no model.
    """
    path = Path(model) if folder is None else folder / model
    if not os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises for a name that is too long
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ConfigError(
                f"{where}: no folder {path}; expected a model folder or a Hugging Face id such as org/name"
            )
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"]))
        except Exception as error:  # the hub raises a dozen types: absent, gated, offline, malformed name
            reason = first_line(error)
            raise ConfigError(
                f"{where}: {model!r:.120} is neither a folder nor a model that can be fetched "
                f"({type(error).__name__}: {reason}); give the path of a model folder"
            ) from error
    if not (path / "config.json").is_file():
        raise ConfigError(f"{where}: {path} holds no config.json; expected a Hugging Face model folder")
    return path


def model_hash(path: Path) -> str:
    """SHA-256 over the names and contents of the files that decide what the model computes."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in {".safetensors", ".json", ".model", ".jinja", ".txt", ".py"}:
            with file.open("rb") as stream:
                digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def load_model(
    path: Path, *, where: str, dtype: Dtype = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> BaseModel:
    """The model at `path`, frozen and in evaluation mode, and its tokenizer. Safetensors only.

    `trust_remote_code` runs the Python files of that folder: for the member who has read them, and nobody else.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the run's own to show
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises many types for a folder that is no model
        raise ConfigError(
            f"{where}: {path} does not load as a causal language model ({type(error).__name__}: {first_line(error)}); "
            "expected config.json, tokenizer files and *.safetensors"
        ) from error
    eos = (
        model.generation_config.eos_token_id
        if model.generation_config.eos_token_id is not None
        else tokenizer.eos_token_id
    )
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (int(eos),))
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos_ids[0] if eos_ids else 0
    tokenizer.padding_side = "left"
    for module in model.modules():  # gradient checkpointing needs train(), and train() must not change the numbers
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)  # attention hands its own to the kernel
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{where}: model.device: {device!r} cannot be used ({first_line(error)}); expected auto, cpu or cuda"
        ) from error
    return BaseModel(path, model.requires_grad_(False).eval(), tokenizer, int(pad), eos_ids)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, in train() mode; load_model has switched dropout off."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def lora_layers(model: Any, lora: LoraSettings, *, where: str = "policy.lora") -> list[LoraLayer]:
    """The layers that `lora` adapts, in the model's order.

    Needs no weights: a model built on the meta device will do. Raises ConfigError if nothing matches.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers, names = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            sizes = int(module.weight.shape[0]), int(module.weight.shape[1])
        else:
            continue
        names.append(name.rpartition(".")[2])
        if lora.target_modules == "all-linear":
            matches = module is not head
        else:
            matches = any(name == target or name.endswith("." + target) for target in lora.target_modules)
        if matches:
            layers.append(LoraLayer(name, *sizes, r=lora.r, scale=lora.scale))
    if not layers:
        raise ConfigError(
            f"{where}: target_modules {lora.target_modules!r} match no linear layer; there are {sorted(set(names))}"
        )
    return layers


def skeleton_layers(path: Path, lora: LoraSettings) -> list[LoraLayer]:
    """`lora_layers` from config.json alone: what an averaging server needs, without the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # without the False, transformers asks at the terminal whether to run a model's code
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return lora_layers(model, lora)


def peft_config(layers: list[LoraLayer], lora: LoraSettings, *, base: str) -> dict[str, Any]:
    """The `adapter_config.json` that lets PEFT open our adapter on `base`."""
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # PEFT annotates int and computes with floats
        use_rslora=lora.use_rslora,
        target_modules=sorted(layer.name for layer in layers),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    clean = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return dict(json.loads(json.dumps(clean, default=str)))


def read_peft_adapter(folder: Path, layers: list[LoraLayer], *, where: str) -> Adapter:
    """An adapter that PEFT saved, if it is plain LoRA of just these layers, rank and scale. Raises ConfigError.

    Whoever wrote the folder is not obeyed: of its configuration only rank and scale are read, to be compared, and what
    names code or another base is refused or ignored. Safetensors only, and no file outside the folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    shapes = adapter_shapes(layers)
    largest = 8 * sum(rows * columns for rows, columns in shapes.values()) + _LARGEST_CONFIG
    try:
        config: Mapping[str, Any] = dict(json.loads(_peers_file(folder, "adapter_config.json", where, _LARGEST_CONFIG)))
        adapter: Adapter = load(_peers_file(folder, "adapter_model.safetensors", where, largest))
        rank, alpha = int(config.get("r", 0)), float(config.get("lora_alpha", 0))
        scale = alpha / max(1, rank) ** (0.5 if config.get("use_rslora") else 1)
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{where}: {folder} is no PEFT adapter folder ({first_line(error)})") from error
    unsupported = [name for name in _NOT_PLAIN if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise ConfigError(
            f"{where}: {folder} uses {unsupported or 'another PEFT method'}; expected plain LoRA without bias"
        )
    expected = {(layer.r, layer.scale) for layer in layers}
    if {(rank, scale)} != expected:
        raise ConfigError(f"{where}: {folder} has rank and scale {(rank, scale)}; policy.lora says {sorted(expected)}")
    odd = list(adapter.keys() ^ shapes.keys())
    odd += [name for name in adapter.keys() & shapes.keys() if tuple(adapter[name].shape) != shapes[name]]
    if odd:
        found = tuple(adapter[min(odd)].shape) if min(odd) in adapter else "nothing"
        name = printable(min(odd)[:120])
        raise ConfigError(
            f"{where}: {folder} has {found} for {name}, expected {shapes.get(min(odd), 'nothing')}; "
            "policy.lora.target_modules has to name the layers that it adapts"
        )
    for name, tensor in sorted(adapter.items()):
        if tensor.dtype not in _DTYPES:
            raise ConfigError(f"{where}: {folder}: {name} is {tensor.dtype}; expected floats of 16 bits or more")
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{where}: {folder}: {name} is not finite; expected an adapter that was trained well")
    return {name: tensor.float() for name, tensor in adapter.items()}


def _peers_file(folder: Path, name: str, where: str, largest: int) -> bytes:
    """A regular file of a folder that others made. Raises OSError, ValueError, or ConfigError for a pickle."""
    path = folder / name
    if not path.exists():
        pickled = [one for one in _PICKLES if (folder / one).exists()]
        if name.endswith(".safetensors") and pickled:
            raise ConfigError(f"{where}: {folder / pickled[0]} is a pickle, which can run code; expected {name}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of the folder; put the file itself there")
    if not path.is_file():
        raise ValueError(f"no file {name}")
    if path.stat().st_size > largest:
        raise ValueError(f"{name} has {path.stat().st_size:,} bytes, expected {largest:,} at most")
    data = path.read_bytes()
    if name.endswith(".safetensors") and data.startswith(_MAGIC) and data[8:9] != b"{":  # a safetensors has it there
        raise ConfigError(f"{where}: {path} is a pickle under another name, which can run code; expected safetensors")
    return data


def first_line(error: BaseException) -> str:
    """What `error` says, as far as one line of a message holds it; without secrets."""
    return printable((masked(str(error)).strip().splitlines() or [""])[0])[:160]

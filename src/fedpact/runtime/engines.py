"""Policies for members: members of one simulation that run the same model alike share one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from fedpact.core.lora import LoraLayer, adapter_shapes
from fedpact.errors import ConfigError
from fedpact.policy.lora_policy import EngineOptions, LoraPolicy
from fedpact.policy.model import load_model, lora_layers, model_hash, resolve, skeleton_layers
from fedpact.runtime.client_config import MemberModelSettings, ModelSettings
from fedpact.runtime.config import PolicySettings
from fedpact.runtime.contract import Contract
from fedpact.settings import PrivateSettings

hash_of = cache(model_hash)
"""`model_hash`, once per folder and process."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What the server knows of the model: where it lies, what it hashes to, and the adapter's shape."""

    path: Path
    sha256: str
    layers: tuple[LoraLayer, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return adapter_shapes(self.layers)


def skeleton(settings: PolicySettings, *, where: str, folder: Path) -> Skeleton:
    """Reads config.json and hashes the weights; loads none. Raises ConfigError if `settings.model` is no model."""
    path = resolve(settings.model, where=f"{where}: policy.model", folder=folder)
    try:
        layers = skeleton_layers(path, settings.lora)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many types for a config.json that is none of its own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"{where}: policy.model: {path} is no causal language model ({reason[:160]})") from error
    return Skeleton(path, hash_of(path), tuple(layers))


class Engines:
    """Makes policies and keeps them: one for each model folder, set of engine options and contract."""

    def __init__(self) -> None:
        self._policies: dict[tuple[Path, str, str, int | None], LoraPolicy] = {}

    def policy(
        self, path: Path, settings: ModelSettings, contract: Contract, *, where: str, rank: int | None = None
    ) -> LoraPolicy:
        """The policy for this model under this contract. Raises ConfigError if the files are not the contract's.

        `rank`: of the adapter, where it is smaller than the contract's.
        """
        found = (path, settings.model_dump_json(), contract.canonical(), rank)
        if found not in self._policies:
            ours = contract.canonical()
            self._policies = {key: policy for key, policy in self._policies.items() if key[2] == ours}
            if hash_of(path) != contract.model:
                raise ConfigError(
                    f"{where}: {path} hashes to {hash_of(path)[:12]}, the contract's model to {contract.model[:12]}; "
                    "put the contract's model there"
                )
            device = settings.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            trusted = isinstance(settings, MemberModelSettings) and settings.trust_remote_code
            base = load_model(path, where=where, dtype=settings.dtype, device=device, trust_remote_code=trusted)
            layers = [replace(layer, r=rank or layer.r) for layer in lora_layers(base.model, contract.lora)]
            private = contract.private
            self._policies[found] = LoraPolicy(
                base,
                layers if private is None else [with_private(layer, private) for layer in layers],
                rollout=contract.rollout,
                loss=contract.loss,
                optimizer=contract.optimizer,
                options=EngineOptions(
                    settings.micro_batch_tokens, settings.gradient_checkpointing, settings.fused_decoder
                ),
                private_r=0 if private is None else private.r,
            )
        return self._policies[found]


def with_private(layer: LoraLayer, private: PrivateSettings) -> LoraLayer:
    """The layer with a private adapter beside the shared one: their ranks are one stack, each with its own scale."""
    assert isinstance(layer.scale, float)
    scales = (layer.scale,) * layer.r + (private.scale,) * private.r
    return replace(layer, r=layer.r + private.r, scale=scales)

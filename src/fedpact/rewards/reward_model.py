"""A reward that a member trains on preference pairs of its own, and keeps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpact.errors import ConfigError, RewardError
from fedpact.rewards.builtin import text_of
from fedpact.rewards.preferences import Pairs, load_pairs, pairwise_accuracy, split_heldout

if TYPE_CHECKING:
    from fedpact.policy.model import Dtype
    from fedpact.policy.reward_model import FitSettings, ScalarModel

_KIND = "fedpact reward model 1"


class RewardModel:
    """A language model with a scalar head that has learned which of two completions is preferred.

    `model` is the folder of a causal language model (or a Hugging Face id) and `preferences` a file of pairs, as in
    `rewards.preferences`; both relative to `folder`. `fit` trains a LoRA adapter of rank `lora_r` (0: none) and a head,
    and keeps them in `home`/`name`. Without `preferences` the folder `model` holds a reward model that is trained
    already, such as TRL's RewardTrainer saves, and there is nothing to fit.

    The rewards have no natural zero or unit: compare them within a group, or standardise them first.
    """

    def __init__(
        self,
        *,
        model: str,
        preferences: str | None = None,
        heldout_share: float = 0.1,
        lora_r: int = 8,
        learning_rate: float = 1e-4,
        num_train_epochs: float = 1,
        per_device_train_batch_size: int = 8,
        max_length: int = 512,
        seed: int = 0,
        name: str = "reward-model",
        device: str = "auto",
        dtype: Dtype = "float32",
        folder: Path,
        home: Path,
    ) -> None:
        if not name or name == ".." or Path(name).name != name:
            raise ConfigError(f"name: found {name!r}; expected a plain folder name such as 'reward-model'")
        if not 0 <= heldout_share < 1:
            raise ConfigError(f"heldout_share: found {heldout_share}; expected at least 0 and below 1")
        if lora_r < 0 or max_length < 1:
            raise ConfigError(f"found lora_r {lora_r} and max_length {max_length}; expected at least 0 and at least 1")
        if dtype not in ("float32", "bfloat16", "float64"):
            raise ConfigError(f"dtype: found {dtype!r}; expected float32, bfloat16 or float64")
        self.model, self.preferences, self.heldout_share = model, preferences, heldout_share
        self.lora_r, self.max_length, self.device, self.dtype = lora_r, max_length, device, dtype
        self.folder, self.kept, self.where = folder, home / name, f"reward model {name!r}"
        self.settings = _fit_settings(
            learning_rate=learning_rate,
            num_train_epochs=num_train_epochs,
            per_device_train_batch_size=per_device_train_batch_size,
            seed=seed,
        )
        self._model: ScalarModel | None = None

    def fit(self) -> float:
        """Train, unless that is done; the held-out pairwise accuracy, which is kept beside the model.

        What is kept counts as long as pairs, settings and base model are the same, in whatever process it was made.
        NaN if no pair is held out, or if there are no `preferences`. Raises DataError, ConfigError or StoreError.
        """
        if self.preferences is None:
            self._loaded()
            return math.nan
        pairs = load_pairs(self.preferences, folder=self.folder, where=self.where)
        digest = self._digest(pairs)
        facts = self._kept_facts(digest)
        if facts is None:
            facts = self._train(pairs, digest)
        accuracy = facts["accuracy"]
        return math.nan if accuracy is None else float(accuracy)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """The reward of each completion. Raises RewardError before `fit`."""
        scores: list[float] = self._loaded().scores(list(prompts), [text_of(said) for said in completions])
        return scores

    def _train(self, pairs: Pairs, digest: str) -> dict[str, Any]:
        split = split_heldout(pairs, self.heldout_share, self.settings.seed)
        model = self._fresh()
        model.fit(split.train.prompts, split.train.chosen, split.train.rejected, self.settings)
        heldout = split.heldout
        accuracy = pairwise_accuracy(
            model.scores(heldout.prompts, heldout.chosen), model.scores(heldout.prompts, heldout.rejected)
        )
        facts = {
            "kind": _KIND,
            "digest": digest,
            "accuracy": None if math.isnan(accuracy) else accuracy,
            "train_pairs": len(split.train),
            "heldout_pairs": len(heldout),
            "settings": self._all_settings(),
        }
        model.save(self.kept, facts)
        self._model = model
        return facts

    def _loaded(self) -> ScalarModel:
        """The model, ready to score."""
        if self._model is None and self.preferences is None:
            from fedpact.policy.reward_model import ScalarModel

            self._model = ScalarModel.trained(
                self._path(), where=self.where, max_length=self.max_length, device=self._device(), dtype=self.dtype
            )
        elif self._model is None:
            assert self.preferences is not None
            pairs = load_pairs(self.preferences, folder=self.folder, where=self.where)
            if self._kept_facts(self._digest(pairs)) is None:
                raise RewardError(
                    f"{self.where} has not been fitted yet to {self.preferences} with these settings: "
                    f"{self.kept} holds no such model; call fit() first"
                )
            model = self._fresh()
            model.load(self.kept)
            self._model = model
        return self._model

    def _fresh(self) -> ScalarModel:
        from fedpact.policy.reward_model import ScalarModel

        return ScalarModel.fresh(
            self._path(),
            where=self.where,
            lora_r=self.lora_r,
            max_length=self.max_length,
            device=self._device(),
            dtype=self.dtype,
        )

    def _kept_facts(self, digest: str) -> dict[str, Any] | None:
        from fedpact.policy.reward_model import stored_facts

        facts = stored_facts(self.kept)
        return facts if facts is not None and facts.get("digest") == digest else None

    def _digest(self, pairs: Pairs) -> str:
        """SHA-256 of everything that decides what `fit` makes, up to the machine's rounding."""
        from fedpact.policy.model import model_hash

        parts = [
            _KIND,
            model_hash(self._path()),
            self._all_settings(),
            pairs.prompts,
            pairs.chosen,
            pairs.rejected,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _all_settings(self) -> dict[str, Any]:
        """What changes the result; not the device."""
        own = {
            "heldout_share": self.heldout_share,
            "lora_r": self.lora_r,
            "max_length": self.max_length,
            "dtype": self.dtype,
        }
        return {**self.settings.model_dump(), **own}

    def _path(self) -> Path:
        from fedpact.policy.model import resolve

        return resolve(self.model, where=self.where, folder=self.folder)

    def _device(self) -> str:
        import torch

        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device


def _fit_settings(**settings: Any) -> FitSettings:
    from pydantic import ValidationError

    from fedpact.policy.reward_model import FitSettings

    try:
        return FitSettings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: found {first['input']!r}; {first['msg']}") from error

"""Scalar reward models: a causal language model with a linear head on the last token, trained on preference pairs.

The loss is Bradley and Terry's, -log sigmoid(r(x, y+) - r(x, y-)): the usual one, and our reading of how MoR's members
train (arXiv 2605.03426, whose text we could not read in full). It leaves the rewards' zero and, in practice, their unit
open: only differences mean something, and another model's numbers are not comparable.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils import clip_grad_norm_

from fedpact.core.lora import initial_adapter
from fedpact.errors import ConfigError, DataError, StoreError
from fedpact.policy.bank import Bank
from fedpact.policy.model import BaseModel, Dtype, load_model, lora_layers, peft_config
from fedpact.seeding import key, permutation
from fedpact.settings import LoraSettings, Settings
from fedpact.types import Text

WEIGHTS, FACTS = "adapter_model.safetensors", "reward_model.json"
_HEAD = "base_model.model.score.weight"
_TOKENS = 8192
"""Tokens in one forward pass of `scores`, padding included."""


class FitSettings(Settings):
    """How a reward model is trained, under TRL's names. AdamW without weight decay; the rate falls to 0, linearly."""

    learning_rate: PositiveFloat = 1e-4
    """At the start."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the pairs; parts of one are allowed."""
    per_device_train_batch_size: PositiveInt = 8
    """Pairs in a step."""
    max_grad_norm: NonNegativeFloat = 1.0
    """A longer gradient is shortened to this norm; 0: never."""
    seed: int = 0
    """Of the adapter's start and the order of the pairs."""


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean of -log sigmoid(chosen - rejected): [n], [n] -> []. Equal rewards cost log 2. Bradley and Terry 1952."""
    return -logsigmoid(chosen - rejected).mean()


class ScalarModel:
    """The reward of a completion: the last token's hidden state times the head.

    A text gets the end-of-sequence token, as in TRL; a chat goes through the template. Of more than `max_length` tokens
    (at most as many as the model has positions for) the end is kept. Before `fit` or `load` every reward of a `fresh`
    model is 0.
    """

    def __init__(self, base: BaseModel, head: nn.Linear, *, lora_r: int, max_length: int) -> None:
        self.base, self.head, self.lora_r = base, head.requires_grad_(False), lora_r
        positions = getattr(base.model.config, "max_position_embeddings", None)
        self.max_length = min(max_length, positions) if isinstance(positions, int) else max_length
        self.lora = LoraSettings(r=max(1, lora_r), lora_alpha=2 * max(1, lora_r))
        self.bank = Bank(base.model, lora_layers(base.model, self.lora, where="lora_r")) if lora_r else None

    @classmethod
    def fresh(
        cls, path: Path, *, where: str, lora_r: int = 8, max_length: int = 512, device: str = "cpu", dtype: Dtype
    ) -> Self:
        """The causal model at `path` with a head of zeros. `lora_r` = 0 trains the head alone. Raises ConfigError."""
        base = load_model(path, where=where, dtype=dtype, device=device)
        config: Any = base.model.config
        head = nn.Linear(int(config.get_text_config().hidden_size), 1, bias=False)
        nn.init.zeros_(head.weight)
        head = head.to(device=device, dtype=torch.float64 if dtype == "float64" else torch.float32)
        return cls(base, head, lora_r=lora_r, max_length=max_length)

    @classmethod
    def trained(cls, path: Path, *, where: str, max_length: int = 512, device: str = "cpu", dtype: Dtype) -> Self:
        """The reward model at `path`, such as TRL's RewardTrainer saves: a decoder with a `score` head of one output.

        Safetensors only, no remote code. Raises ConfigError.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            own = {"trust_remote_code": False}  # else transformers asks at the terminal whether to run a model's code
            tokenizer = AutoTokenizer.from_pretrained(path, **own)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **own
            )
            model = model.to(device).requires_grad_(False).eval()
        except Exception as error:  # transformers raises many types for a folder that is no model
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(f"{where}: {path} does not load ({type(error).__name__}: {reason[:160]})") from error
        head, missing = getattr(model, "score", None), sorted(report["missing_keys"])
        if missing or not isinstance(head, nn.Linear) or head.out_features != 1:
            found = f"no {missing[0]}" if missing else f"the head {head}"
            raise ConfigError(
                f"{where}: {path} has {found[:120]}; expected a decoder with a trained `score` head of one output; "
                "to train one from a causal model, set `preferences`"
            )
        pad = tokenizer.pad_token_id
        base = BaseModel(path, model, tokenizer, 0 if pad is None else int(pad), ())
        return cls(base, head, lora_r=0, max_length=max_length)

    @torch.no_grad()
    def scores(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
        """The reward of each completion; what else is in the batch changes it by rounding at most. Raises DataError."""
        rows = [self._tokens(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        scores = torch.zeros(len(rows), dtype=torch.float64)
        batch: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            if batch and (len(batch) + 1) * len(rows[i]) > _TOKENS:
                scores[batch] = self._rewards([rows[j] for j in batch]).double().cpu()
                batch = []
            batch.append(i)
        if batch:
            scores[batch] = self._rewards([rows[j] for j in batch]).double().cpu()
        found: list[float] = scores.tolist()
        return found

    def fit(
        self, prompts: Sequence[Text], chosen: Sequence[str], rejected: Sequence[str], settings: FitSettings
    ) -> None:
        """Train adapter and head from the start on pairs: the result depends on the arguments and the base alone.

        Raises DataError without a pair, or where training runs away.
        """
        if not prompts:
            raise DataError("no preference pair to train on; expected at least one")
        better = [self._tokens(*row) for row in zip(prompts, chosen, strict=True)]
        worse = [self._tokens(*row) for row in zip(prompts, rejected, strict=True)]
        parameters = self._start(settings.seed)
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        size = settings.per_device_train_batch_size
        per_epoch = math.ceil(len(better) / size)
        steps = max(1, math.ceil(settings.num_train_epochs * per_epoch))
        order: list[int] = []
        try:
            for step in range(steps):
                epoch, place = divmod(step, per_epoch)
                if place == 0:
                    order = permutation(len(better), settings.seed, "preference pairs", epoch)
                rows = order[place * size : (place + 1) * size]
                rewards = self._rewards([side[i] for side in (better, worse) for i in rows])  # [2 * rows]
                loss = pairwise_loss(*rewards.chunk(2))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                if settings.max_grad_norm:
                    clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / steps)
                optimizer.step()
                # All parameters only once: looking at each of them would make a GPU wait hundreds of times a step.
                watched = [loss, *(parameters if step == steps - 1 else ())]
                if not all(bool(value.isfinite().all()) for value in watched):
                    raise DataError(f"training is not finite at step {step + 1} of {steps}; lower learning_rate")
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False).grad = None

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write adapter and head to `folder`, and then `facts` (JSON) with the weights' SHA-256, each file at once.

        Only their owner can read the files. PEFT opens the folder if there is an adapter (task type SEQ_CLS).
        Raises StoreError.
        """
        tensors = {_HEAD: self.head.weight.float(), **(self.bank.adapter() if self.bank else {})}
        data = safetensors.save({name: tensors[name].contiguous().cpu() for name in sorted(tensors)})
        facts = {"lora_r": self.lora_r, **facts, "sha256": hashlib.sha256(data).hexdigest()}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.bank:
                config = peft_config(list(self.bank.layers), self.lora, base=str(self.base.path))
                config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
                _write(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True).encode())
            _write(folder / WEIGHTS, data)
            _write(folder / FACTS, (json.dumps(facts, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise StoreError(
                f"{error.filename or folder}: {error.strerror}; check that path, then fit again"
            ) from error

    def load(self, folder: Path) -> None:
        """Put the adapter and head that `save` wrote in place. Raises StoreError."""
        try:
            tensors = safetensors.load((folder / WEIGHTS).read_bytes())
            head = tensors.pop(_HEAD)
            self.head.weight.copy_(head.view_as(self.head.weight))
            if self.bank:
                self.bank.load(tensors)
            elif tensors:
                raise ValueError(f"found {min(tensors)}, expected the head alone")
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise StoreError(f"{folder / WEIGHTS}: not a reward model on {self.base.path} ({reason[:160]})") from error

    def _start(self, seed: int) -> list[Tensor]:
        """Everything that is trained, set to where training starts."""
        nn.init.zeros_(self.head.weight)
        parameters: list[Tensor] = [self.head.weight]
        if self.bank:
            self.bank.load(initial_adapter(self.bank.layers, key(seed, "reward model")))
            parameters += [tensor for module in self.bank.modules.values() for tensor in (module.a, module.b)]
        return [parameter.requires_grad_() for parameter in parameters]

    def _rewards(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The rewards of token ids: [n]. Padded on the right, where a causal model does not look."""
        width, pad = max(map(len, rows)), self.base.pad_id
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.head.weight.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(width, device=ids.device) < lengths[:, None]  # [n, width]
        decoder: Any = self.base.model.base_model
        states = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last = states[torch.arange(len(rows), device=ids.device), lengths - 1]  # [n, d]
        rewards: Tensor = self.head(last.to(self.head.weight.dtype))
        return rewards[:, 0]

    def _tokens(self, prompt: Text, completion: str) -> list[int]:
        tokenizer = self.base.tokenizer
        if isinstance(prompt, str):
            ids: list[int] = tokenizer(prompt + completion, verbose=False)["input_ids"]
            eos = tokenizer.eos_token_id
            if eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
        else:
            if tokenizer.chat_template is None:
                raise DataError("the prompts are chats and the reward model has no chat template; give it plain texts")
            chat = [*prompt, {"role": "assistant", "content": completion}]
            try:
                ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            except Exception as error:  # a template may raise on roles that it does not know
                reason = (str(error).strip().splitlines() or [""])[0]
                raise DataError(
                    f"prompt {str(prompt)[:60]!r} does not fit the reward model's chat template ({reason[:160]})"
                ) from error
        if not ids:
            raise DataError(f"prompt {str(prompt)[:60]!r} and its completion have no tokens; give the model some text")
        return ids[-self.max_length :]


def stored_facts(folder: Path) -> dict[str, Any] | None:
    """The facts that `ScalarModel.save` wrote last, if the weights beside them are those of the same save."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("sha256") == weights else None


def _write(path: Path, data: bytes) -> None:
    """Put `data` at `path` by one rename, durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)

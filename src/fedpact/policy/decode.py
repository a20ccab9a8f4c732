"""Sampling completions with a key-value cache.

`complete` is the loop: prompts are prefilled once a group, every draw is keyed by its row, finished rows are dropped.
It drives a `Decoder`: the fused stack of `llama.py` where the model has that layout, else the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpact.errors import FedPactError
from fedpact.policy.sampling import inverse_cdf_sample, token_logprobs


class Decoder(Protocol):
    """A causal language model that keeps its cache from call to call."""

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor, room: int) -> Tensor:
        """Read the prompts ([p, s], padded on the left), with room for that many more tokens: next logits [p, v]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the cache, in this order; a row may be repeated."""
        ...

    def step(self, token_ids: Tensor) -> Tensor:
        """Read one more token a row ([rows]): next logits [rows, v]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Completions:
    """What `complete` returns, padded on the right."""

    ids: Tensor  # [n, t] int64
    logprobs: Tensor  # [n, t] float32
    mask: Tensor  # [n, t] bool
    truncated: Tensor  # [n] bool


@torch.no_grad()
def complete(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    group_size: int,
    max_length: int,
    temperature: float,
    uniforms: Tensor | None,
    pad_id: int,
    eos_ids: Sequence[int],
) -> Completions:
    """`group_size` completions of every prompt: [p, s] -> [p * group_size, <= max_length].

    `uniforms` ([n, max_length]) decides every token; None takes the most probable one.
    """
    n, device = len(prompt_ids) * group_size, prompt_ids.device
    banned = pad_id if pad_id not in eos_ids else None
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    ids = torch.full((n, max_length), pad_id, device=device)
    logprobs = torch.zeros(n, max_length, device=device)
    mask = torch.zeros(n, max_length, dtype=torch.bool, device=device)
    draws = None if uniforms is None else uniforms.to(device)

    logits = decoder.prefill(prompt_ids, prompt_mask, max_length)
    expand = torch.arange(len(prompt_ids), device=device).repeat_interleave(group_size)
    decoder.keep(expand)
    logits = logits[expand]
    rows = torch.arange(n, device=device)  # the completions that the decoder's rows belong to
    finished = torch.zeros(n, dtype=torch.bool, device=device)
    length = 0
    for t in range(max_length):
        logp = token_logprobs(logits, temperature=temperature, banned=banned)
        tokens = logp.argmax(-1) if draws is None else inverse_cdf_sample(logp, draws[rows, t])
        live = ~finished[rows]
        ids[rows, t] = torch.where(live, tokens, pad_id)
        logprobs[rows, t] = torch.where(live, logp.gather(-1, tokens[:, None])[:, 0].float(), 0.0)
        mask[rows, t] = live
        finished[rows] |= torch.isin(tokens, ends)
        length = t + 1
        remaining = (~finished[rows]).nonzero()[:, 0]
        if len(remaining) == 0 or length == max_length:
            break
        if len(remaining) <= 0.75 * len(rows):  # copying the cache pays off only if enough rows go
            decoder.keep(remaining)
            tokens, rows = tokens[remaining], rows[remaining]
        logits = decoder.step(tokens)
    if not bool(logprobs.isfinite().all()):
        raise FedPactError("the model's log-probs are not finite: training has diverged; lower optimizer.learning_rate")
    return Completions(ids[:, :length], logprobs[:, :length], mask[:, :length], ~finished)


def joined(parts: Sequence[Completions], *, pad_id: int) -> Completions:
    """Batches of completions as one, padded to the longest."""
    length = max(part.ids.shape[1] for part in parts)

    def wide(tensor: Tensor, value: float) -> Tensor:
        return F.pad(tensor, (0, length - tensor.shape[1]), value=value)

    return Completions(
        ids=torch.cat([wide(part.ids, pad_id) for part in parts]),
        logprobs=torch.cat([wide(part.logprobs, 0.0) for part in parts]),
        mask=torch.cat([wide(part.mask, False) for part in parts]),
        truncated=torch.cat([part.truncated for part in parts]),
    )


class TransformersDecoder:
    """Any causal language model of transformers, through its own forward and cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache: Any = None
        self.mask = torch.zeros(0, 0)

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor, room: int) -> Tensor:
        self.mask = prompt_mask.long()
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(
            input_ids=prompt_ids, attention_mask=self.mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)

    def step(self, token_ids: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        out = self.model(
            input_ids=token_ids[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

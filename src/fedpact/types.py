"""The values that travel through FedPact: prompts, rollouts, adapters.

Axis letters, everywhere: `k` clients in a bank, `m` objectives, `p` prompts, `n` completions (`p x num_generations`,
groups contiguous), `s` prompt tokens, `t` completion tokens, `d` trainable parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Adapter = dict[str, Tensor]
"""LoRA tensors under their PEFT names. Keys that begin with `private/` never leave a member; those that begin with
`critic/`, `control/` or `private/` never reach `final/`."""

Memory = dict[str, Tensor]
"""What one side of an algorithm remembers from one request or round to the next."""

Direction = Tensor
"""A step through parameter space, flat: [d], in the order of the sorted adapter names."""

ClientId = str
Message = dict[str, str]
"""One chat message: `{"role": ..., "content": ...}`."""

Text = str | list[Message]
"""A plain prompt, or a chat."""

ScaleRewards = Literal["group", "batch", "none"]
"""What advantages are divided by; TRL's values."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """A batch of `p` prompts and what their rewards need to know about them."""

    text: Sequence[Text]
    ids: Tensor  # [p] int64, the row in the owner's file
    columns: Mapping[str, Sequence[Any]]
    """Further columns of the data set, [p] each; reward functions receive them as keywords."""
    domains: Tensor | None = None  # [p] int64

    def __len__(self) -> int:
        return len(self.text)

    def select(self, rows: Sequence[int]) -> Prompts:
        """The prompts at `rows`, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Prompts(
            text=[self.text[i] for i in rows],
            ids=self.ids[index],
            columns={name: [values[i] for i in rows] for name, values in self.columns.items()},
            domains=None if self.domains is None else self.domains[index],
        )

    def followed_by(self, other: Prompts) -> Prompts:
        """These prompts, then `other`; a column that one of them lacks holds None there. Domains are dropped."""
        names = dict.fromkeys([*self.columns, *other.columns])
        none = [None] * len(self), [None] * len(other)
        return Prompts(
            text=[*self.text, *other.text],
            ids=torch.cat([self.ids, other.ids]),
            columns={n: [*self.columns.get(n, none[0]), *other.columns.get(n, none[1])] for n in names},
        )

    def repeat(self, times: int) -> Prompts:
        """Each prompt `times` times in a row: groups stay contiguous."""
        return self.select([i for i in range(len(self)) for _ in range(times)])


NO_PROMPTS = Prompts(text=(), ids=torch.zeros(0, dtype=torch.long), columns={})


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """`n` sampled completions, with everything that the loss needs to know about how they were drawn."""

    prompts: Prompts
    """One row a completion: each prompt stands `group_size` times."""
    completions: Sequence[str]
    prompt_ids: Tensor  # [n, s] int64, padded on the left
    prompt_mask: Tensor  # [n, s] bool
    completion_ids: Tensor  # [n, t] int64, padded on the right
    mask: Tensor  # [n, t] bool: completion tokens, the end-of-sequence token included
    logprobs: Tensor  # [n, t] float32, of the distribution that was sampled from (temperature applied, PAD excluded)
    truncated: Tensor  # [n] bool: cut at the length limit
    group_size: int

    @property
    def lengths(self) -> Tensor:
        """Completion tokens: [n] int64."""
        return self.mask.sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One backward pass that serves all objectives.

    Objective m's loss has the gradient sum over n, t of `coefficients[m, n] * tokens[n, t] * dlogprob[n, t]`.
    Rows whose tokens or coefficients are all zero cost nothing.
    """

    tokens: Tensor  # [n, t]
    coefficients: Tensor  # [m, n]

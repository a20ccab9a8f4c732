"""From rewards to advantages: how much better a completion did than the others for the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpact.types import ScaleRewards

_EPSILON = 1e-4
"""TRL's guard against division by a vanishing standard deviation."""


def group_advantages(rewards: Tensor, group_size: int, *, scale: ScaleRewards = "group") -> Tensor:
    """How much better each completion did than its group, per objective: [m, n] -> [m, n] float32.

    Groups are contiguous. `scale` divides what remains after centring by the standard deviation (n - 1) of the group
    or of the objective's whole batch, plus 1e-4; "none" only centres, as Dr. GRPO does. A NaN reward (objective not
    measured) counts as absent and gets zero. A group whose rewards are all equal, or with fewer than two of them, gets
    exact zeros: no signal.

    Raises ValueError if n is not a multiple of `group_size`.
    Shao et al. 2024, arXiv:2402.03300, section 4.1.2; TRL 1.16 with one reward at a time.
    """
    num_objectives, num_completions = rewards.shape
    if group_size < 1 or num_completions % group_size:
        raise ValueError(f"{num_completions} completions do not divide into groups of {group_size}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale!r}; expected 'group', 'batch' or 'none'")

    grouped = rewards.double().reshape(num_objectives, -1, group_size)  # [m, p, group]
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    if scale == "group":
        centred = centred / (_nanstd(grouped, (2,)) + _EPSILON)
    elif scale == "batch":
        centred = centred / (_nanstd(grouped, (1, 2)) + _EPSILON)
    # The mean of equal numbers may differ from them in its last bit; "no signal" must be zero, not noise.
    measured = ~grouped.isnan()
    highest = grouped.masked_fill(~measured, -torch.inf).amax(-1, keepdim=True)
    lowest = grouped.masked_fill(~measured, torch.inf).amin(-1, keepdim=True)
    signal = measured & (highest > lowest)
    return centred.masked_fill(~signal, 0.0).reshape(num_objectives, num_completions).float()


def weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """Each completion's weighted sum of rewards: [m, n], [m] -> [n].

    Absent rewards (NaN) are left out of the sum; a completion without any reward stays NaN. With `group_advantages` on
    the result this is TRL's `sum_then_normalize`.
    """
    total = (rewards * weights.to(rewards).unsqueeze(-1)).nansum(0)
    return total.masked_fill(rewards.isnan().all(0), torch.nan)


def _nanstd(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The sample standard deviation over the entries that are not NaN; NaN where there are fewer than two."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1)).sqrt()

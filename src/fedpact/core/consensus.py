"""From several raters' opinions of a completion to one reward, and how well each rater agrees with the others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_EPSILON = 1e-4
"""TRL's guard against division by a vanishing standard deviation."""


def combined(ratings: Tensor, how: Literal["mean", "median", "trimmed_mean"]) -> Tensor:
    """One rating for each completion: [k, n] with NaN for no rating -> [n], NaN where nobody rated.

    "median" of an even number is the mean of the middle two. "trimmed_mean" leaves out the smallest and the largest
    rating and averages the others; with fewer than three it is the mean. The result does not depend on the raters'
    order. Ratings must be finite; however large, one of them cannot move the median, nor the trimmed mean of three or
    more, out of the range of the others. The mean has no such bound. FedGRPO averages; the other two are ours.

    Raises ValueError for another `how`.
    """
    ordered = ratings.double().sort(dim=0).values  # [k, n], NaN last
    count = (~ordered.isnan()).sum(0)
    if how == "mean":
        first, last = torch.zeros_like(count), count - 1
    elif how == "median":
        first, last = (count - 1) // 2, count // 2
    elif how == "trimmed_mean":
        cut = (count >= 3).long()
        first, last = cut, count - 1 - cut
    else:
        raise ValueError(f"how is {how!r}; expected 'mean', 'median' or 'trimmed_mean'")
    place = torch.arange(len(ordered), device=ratings.device).unsqueeze(-1)
    # Picked, never subtracted from the sum of all: a giant that was once added hides what it was added to.
    kept = (place >= first) & (place <= last)
    return (ordered.masked_fill(~kept, 0.0).sum(0) / kept.sum(0)).to(ratings.dtype)


def standardised(ratings: Tensor, group_size: int) -> Tensor:
    """Each rater's ratings on a scale of its own, question by question: [k, n] -> [k, n].

    From each rating goes the mean of that rater's ratings of the question's candidates, and what remains is divided by
    their population standard deviation plus 1e-4. Groups are contiguous. Ratings that are all equal become exact
    zeros; NaN stays NaN.

    FedGRPO (arXiv:2602.12014) standardises over the experts of one candidate, and those values add up to zero: an
    update with all of them does nothing. Standardising over candidates is our reading.

    Raises ValueError if n is not a multiple of `group_size`.
    """
    num_raters, num_completions = ratings.shape
    if group_size < 1 or num_completions % group_size:
        raise ValueError(f"{num_completions} completions do not divide into groups of {group_size}")
    grouped = ratings.double().reshape(num_raters, -1, group_size)  # [k, p, group]
    missing = grouped.isnan()
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    spread = centred.square().nanmean(-1, keepdim=True).sqrt()
    # The mean of equal numbers may differ from them in its last bit; "no difference" must be zero, not noise.
    highest = grouped.masked_fill(missing, -torch.inf).amax(-1, keepdim=True)
    lowest = grouped.masked_fill(missing, torch.inf).amin(-1, keepdim=True)
    result = (centred / (spread + _EPSILON)).masked_fill(~missing & (highest <= lowest), 0.0)
    return result.reshape(num_raters, num_completions).to(ratings.dtype)


def everybody(chosen: Tensor, group_size: int) -> Tensor:
    """Who judges what if experts judge every candidate of their questions: bool [p, k] -> bool [k, p * group_size]."""
    return chosen.mT.repeat_interleave(group_size, dim=-1)


def blocks(chosen: Tensor, group_size: int) -> Tensor:
    """Who judges what if a question's experts share its candidates out: bool [p, k] -> bool [k, p * group_size].

    The candidates are cut into as many contiguous blocks as there are experts, their sizes differing by at most one;
    the m-th expert, in the order of members, alone judges block m. Some experts get nothing if they outnumber the
    candidates. This is what FedGRPO's official code does, with sizes that divide.
    """
    num_experts = chosen.sum(-1, keepdim=True)  # [p, 1]
    candidates = torch.arange(group_size, device=chosen.device)
    block = candidates * num_experts // group_size  # [p, group]
    turn = chosen.cumsum(-1) - 1  # [p, k]
    judged = chosen.unsqueeze(-1) & (turn.unsqueeze(-1) == block.unsqueeze(1))  # [p, k, group]
    return judged.transpose(0, 1).reshape(chosen.shape[1], -1)


def rater_agreement(ratings: Tensor) -> tuple[Tensor, Tensor]:
    """How near each rater is to the median of the others: [k, n] -> sum [k] float64, count [k] int64.

    A completion adds `1 - min(1, distance)` for each of its raters that at least two others stand beside; `count` says
    how many did. Sums, so that rounds can be added up; their quotient is 1 for a rater who always says what the others
    do. Ratings are meant to lie in [0, 1]: on a wider scale all that is one apart or more counts as no agreement.

    Ours. A majority that lies together agrees with itself and makes the honest look bad.
    """
    num_raters = len(ratings)
    total = torch.zeros(num_raters, dtype=torch.float64, device=ratings.device)
    count = torch.zeros(num_raters, dtype=torch.int64, device=ratings.device)
    for rater in range(num_raters):
        others = torch.cat((ratings[:rater], ratings[rater + 1 :])).double()
        compared = ~ratings[rater].isnan() & ((~others.isnan()).sum(0) >= 2)
        distance = (ratings[rater].double() - combined(others, "median")).abs()
        total[rater] = (1 - distance.clamp(max=1.0))[compared].sum()
        count[rater] = compared.sum()
    return total, count

"""What keeps one bad member from moving the mean: capped shares, a clip, and two means that outvote a minority.

A delta is what a member sends less what it was sent. Nothing here knows rounds or members by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedpact.types import Adapter

_A, _B = ".lora_A.weight", ".lora_B.weight"
_ITERATIONS = 1000
_TOLERANCE = 1e-10
"""Of the radius that holds more than half of the weight: stop when a step is shorter."""


def capped_shares(weights: Sequence[float], max_share: float) -> list[float]:
    """Shares of 1 in proportion to `weights`, none above max(max_share / n, 1 / n) for n weights.

    `max_share` is in units of 1 / n; infinity caps nothing and gives weights / sum(weights). What the cap cuts off
    goes to the rest in proportion; those whom that lifts to the cap stop there too, and so on until nobody is above.
    The order of the weights is kept, and the shares do not depend on their unit.

    Raises ValueError if there are no weights, one is not a positive finite number, or `max_share` is NaN.
    """
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights are {list(weights)}; expected at least one, all positive and finite")
    if math.isnan(max_share):
        raise ValueError("max_share is nan; expected a number, or infinity for no cap")
    n = len(weights)
    if max_share <= 1:
        return [1 / n] * n
    cap = max_share / n
    shares = [0.0] * n
    rest = sorted(range(n), key=lambda i: -weights[i])
    left = 1.0
    while True:
        portions = _in_proportion([weights[i] for i in rest])
        if left * portions[0] <= cap:
            break
        shares[rest.pop(0)] = cap
        left = 1 - (n - len(rest)) * cap
    for i, portion in zip(rest, portions, strict=True):
        shares[i] = left * portion
    return shares


def clip_threshold(accepted: Sequence[float], now: Sequence[float], *, factor: float, cap: float | None) -> float:
    """The longest delta that passes uncut: `factor` times the median norm of earlier and present ones, at most `cap`.

    `accepted` are norms of earlier rounds as they were averaged, `now` those of the present replies. The median is the
    lower of the two middle norms where their number is even: with two members one giant would otherwise set half of
    its own limit. Norms of zero do not count: members that did not train would pull the limit down to nothing. With no
    norm above zero there is no median and only `cap` remains; without it, infinity.

    A majority of tiny norms still lowers the limit for all; the members of earlier rounds dampen that.
    """
    norms = sorted(norm for norm in (*accepted, *now) if norm > 0)
    median = norms[(len(norms) - 1) // 2] if norms else math.inf
    return min(math.inf if cap is None else cap, factor * median)


def geometric_median_weights(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """Shares of 1 whose mean is the weighted geometric median of k vectors: their Gram matrix [k, k] -> k shares.

    The geometric median is the point with the least weighted sum of distances. While a share b of the weight, less than
    half, is arbitrary, it stays within 2 (1 - b) / (1 - 2 b) radii of the rest from their centre, however far the
    arbitrary vectors lie. Of two vectors it is the heavier one, of two equally heavy ones the mean.

    Weiszfeld 1937, smoothed as in Pillutla, Kakade and Harchaoui, arXiv:1912.13445, algorithm 2 (RFA). Ours beyond the
    paper: distances come from the Gram matrix, a vector that is itself the median is found by its subgradient instead
    of approached for ever, and the start and the smoothing are in units of the radius that holds more than half of
    the weight, which a minority cannot stretch. At most 1,000 steps; nothing random.

    Raises ValueError if shapes disagree, something is not finite, or weights are negative or add up to nothing.
    """
    share = _checked(gram, weights)
    gram = gram.double()
    distances = _distances(gram)
    radius, centre = _half_radii(distances, share).min(0)
    if radius == 0:  # one place has more than half of the weight, be it by the last digit
        return _normalised(share * (distances[centre] == 0))
    for i in range(len(share)):
        here = distances[i] <= 1e-7 * radius  # equal vectors may be this far apart by their Gram matrix
        pull = torch.where(here, 0.0, share / distances[i].where(~here, torch.ones_like(share)))  # [k]
        resultant = float(pull @ _about(gram, i) @ pull)
        if math.sqrt(max(resultant, 0.0)) < float(share[here].sum()) * (1 - 1e-9):  # a tie has more than one median
            return _normalised(share * here)
    w = share / _half_radii(distances, share).clamp_min(_TOLERANCE * radius)
    w = w / w.sum()
    for _ in range(_ITERATIONS):
        away = (gram.diagonal() - 2 * gram @ w + w @ gram @ w).clamp_min(0.0).sqrt()  # [k], |x_i - sum of w x|
        closer = share / away.clamp_min(1e-9 * radius)
        closer = closer / closer.sum()
        step = closer - w
        w = closer
        if float(step @ gram @ step) <= float(_TOLERANCE * radius) ** 2:
            break
    return _normalised(w)


def trimmed_mean(values: Sequence[Tensor], trim: float) -> Tensor:
    """The mean of each coordinate without its floor(trim * k) lowest and highest of k values, in the values' type.

    At least one value is left, or two where k is even: 0.5 is the median. Nobody's weight counts. Sums are kept in
    float64. While no more than floor(trim * k) values are arbitrary, each coordinate stays between honest ones. Yin
    et al. 2018, arXiv:1803.01498.

    Raises ValueError if there are no values, shapes or types differ, or `trim` is outside [0, 0.5].
    """
    if not 0 <= trim <= 0.5:
        raise ValueError(f"trim is {trim}; expected a number in [0, 0.5]")
    if len({(value.shape, value.dtype) for value in values}) != 1:
        found = [f"{list(value.shape)} {value.dtype}" for value in values]
        raise ValueError(f"values are {found}; expected at least one, all of one shape and type")
    k = len(values)
    cut = min(math.floor(trim * k + 1e-9), (k - 1) // 2)  # 0.29 * 100 is 28.999999999999996
    kept = torch.stack(list(values)).sort(dim=0).values[cut : k - cut]
    return kept.double().mean(0).to(values[0].dtype)


def gram_of(deltas: Sequence[Adapter]) -> Tensor:
    """The inner products of every two deltas, over all their tensors: [k, k], float64.

    Raises ValueError if there are none, or names or shapes differ.
    """
    if not deltas:
        raise ValueError("no deltas; expected at least one")
    for delta in deltas:
        _check_alike(deltas[0], delta)
    gram = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for name in sorted(deltas[0]):
        rows = torch.stack([delta[name].detach().double().reshape(-1) for delta in deltas])  # [k, size]
        gram += (rows @ rows.T).cpu()
    return (gram + gram.T) / 2


def delta_norm(sent: Adapter, adapter: Adapter, names: Iterable[str]) -> float:
    """|adapter - sent| over the tensors `names`, in float64. Raises ValueError if one is missing or shapes differ."""
    squares = []
    for name in names:
        if name not in sent or name not in adapter:
            raise ValueError(f"tensor {name!r} is missing; expected it in both adapters")
        _check_shape(name, sent[name], adapter[name])
        squares.append(float((adapter[name].detach().double() - sent[name].detach().double()).square().sum()))
    return math.sqrt(math.fsum(squares))


def product_change(sent: Adapter, adapter: Adapter) -> float:
    """How far the products moved: |B' A' - B A| over all layers (Frobenius), which |(A', B') - (A, B)| can hide.

    B' A' - B A is B' (A' - A) + (B' - B) A, so nothing cancels, and the triangles of two QRs, [2r, 2r], have its norm:
    no [d_out, d_in] is formed. Tensors of no LoRA layer do not count.

    Raises ValueError if names or shapes differ, or a factor is missing.
    """
    _check_alike(sent, adapter)
    squares = []
    for a_name in sorted(name for name in sent if name.endswith(_A)):
        b_name = a_name.removesuffix(_A) + _B
        if b_name not in sent:
            raise ValueError(f"tensor {b_name!r} is missing; expected it beside {a_name!r}")
        a, b, new_a, new_b = (x[name].detach().double() for x in (sent, adapter) for name in (a_name, b_name))
        rows = torch.cat([new_a - a, a])  # [2r, d_in]
        columns = torch.cat([new_b, new_b - b], dim=1)  # [d_out, 2r]
        left, right = torch.linalg.qr(columns, mode="r").R, torch.linalg.qr(rows.T, mode="r").R
        squares.append(float((left @ right.T).square().sum()))
    return math.sqrt(math.fsum(squares))


def cosine(a: Adapter, b: Adapter) -> float:
    """The cosine of two deltas over all their tensors, in [-1, 1]; NaN if one is zero. Raises as `gram_of` does."""
    gram = gram_of([a, b])
    scale = math.sqrt(float(gram[0, 0])) * math.sqrt(float(gram[1, 1]))
    return max(-1.0, min(1.0, float(gram[0, 1]) / scale)) if scale > 0 else math.nan


def _in_proportion(weights: Sequence[float]) -> list[float]:
    """weights / sum(weights); a power of two first, which is exact, keeps the sum from overflowing."""
    exponent = math.frexp(max(weights))[1]
    scaled = [math.ldexp(weight, -exponent) for weight in weights]
    total = math.fsum(scaled)
    return [weight / total for weight in scaled]


def _checked(gram: Tensor, weights: Sequence[float]) -> Tensor:
    """The shares of `weights`: [k], float64."""
    k = len(weights)
    if not k or gram.shape != (k, k):
        raise ValueError(f"gram is {list(gram.shape)} for {k} weights; expected [k, k] for at least one")
    if not bool(gram.isfinite().all()):
        raise ValueError("gram has an entry that is not finite; expected inner products of finite vectors")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not max(weights) > 0:
        raise ValueError(f"weights are {list(weights)}; expected finite numbers >= 0, at least one above 0")
    return torch.tensor(_in_proportion(weights), dtype=torch.float64, device=gram.device)


def _about(gram: Tensor, i: int) -> Tensor:
    """The Gram matrix of the vectors less the i-th: [k, k]."""
    return gram - gram[i] - gram[:, i, None] + gram[i, i]


def _distances(gram: Tensor) -> Tensor:
    """|x_i - x_j|: [k, k]."""
    squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    return squares.clamp_min(0.0).sqrt()


def _half_radii(distances: Tensor, share: Tensor) -> Tensor:
    """How far round each vector one must go to hold more than half of the weight: [k]."""
    near, order = distances.sort(dim=1)
    held = share[order].cumsum(1)
    first = (held > 0.5).int().argmax(1)
    return near.gather(1, first[:, None])[:, 0]


def _normalised(w: Tensor) -> list[float]:
    parts: list[float] = w.tolist()
    total = math.fsum(parts)
    return [part / total for part in parts]


def _check_alike(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())
        raise ValueError(f"adapters have different tensors: {odd[:3]} in only one of them")
    for name, tensor in expected.items():
        _check_shape(name, tensor, found[name])


def _check_shape(name: str, expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape:  # before any arithmetic: shape (1,) would broadcast
        raise ValueError(f"tensor {name!r} is {list(found.shape)}; expected {list(expected.shape)}")

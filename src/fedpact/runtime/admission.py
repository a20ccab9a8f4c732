"""The server's boundary: a reply is checked when it arrives, before anything is computed from it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpact.core.compress import near_square
from fedpact.errors import InadmissibleError
from fedpact.messages import (
    Averaged,
    Count,
    Counted,
    Differentiate,
    Differentiated,
    Evaluated,
    Examine,
    Examined,
    Fitted,
    Introduced,
    Reply,
    Request,
    Score,
    Scored,
    Train,
    Trained,
)

MAX_METRICS = 256
_TASK = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?")
"""As in client files: a task names a folder of what the run exports."""
_SLACK = 2**16
"""Bytes that a reply may have beside its tensors: names, figures, the header."""
_LARGEST_GRADIENT = 1e9
"""Numbers beyond this are no gradients; products of two of them still fit into float32."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reply of this run must look like."""

    num_objectives: int
    objectives: frozenset[str] | None = None
    """Their names; None where nobody introduces himself."""
    min_weight: float = 1e-9
    """A share of the sum of weights must not round to nothing."""
    max_weight: float = 1e9
    max_reward: float = 1e6


def max_bytes(request: Request[Any], limits: Limits) -> int:
    """What an answer to `request` may weigh, decided before it is decoded: a tenth above the tensors expected."""
    m, numbers = limits.num_objectives, 0
    if isinstance(request, (Train, Differentiate)):
        numbers = sum(tensor.numel() for tensor in request.adapter.values())
    if isinstance(request, Differentiate) and request.compression == "svd":
        numbers = sum(near_square(m, numbers)) * request.rank + m * m
    elif isinstance(request, Differentiate):
        numbers = m * (request.rank + m)
    if isinstance(request, Score):
        numbers = m * len(request.completions)
    if isinstance(request, Examine):
        numbers = len(request.prompts)
    return _SLACK + int(4.4 * numbers) + 256 * MAX_METRICS


def admit(reply: Reply, limits: Limits, request: Request[Any]) -> None:
    """Return if the reply to `request` can be used. Raises InadmissibleError saying what is wrong."""
    if isinstance(reply, Scored) and isinstance(request, Score):
        _check("rewards", reply.rewards, (limits.num_objectives, len(request.completions)), torch.float32, nan=True)
        largest = float(reply.rewards.abs().nan_to_num().max()) if reply.rewards.numel() else 0.0
        if largest > limits.max_reward:
            raise InadmissibleError(f"rewards: found {largest:g}, expected at most {limits.max_reward:g}")
    if isinstance(reply, Examined) and isinstance(request, Examine):
        _check("prefers_first", reply.prefers_first, (len(request.prompts),), torch.bool)
    if isinstance(reply, Fitted):
        for name in ("mean", "std", "accuracy"):
            _check(name, getattr(reply, name), (limits.num_objectives,), torch.float32, nan=True)
        _between("mean", reply.mean, -limits.max_reward, limits.max_reward)
        _between("std", reply.std, 0, limits.max_reward)
        _between("accuracy", reply.accuracy, 0, 1)
    if isinstance(reply, Averaged) and not limits.min_weight <= reply.weight <= limits.max_weight:
        expected = f"a number in [{limits.min_weight:g}, {limits.max_weight:g}]"
        raise InadmissibleError(f"weight: found {reply.weight}, expected {expected}")
    if isinstance(reply, (Trained, Evaluated)):
        _check("rewards", reply.rewards, (limits.num_objectives,), torch.float32, nan=True)
        _between("rewards", reply.rewards, -limits.max_reward, limits.max_reward)
        if reply.accuracy is not None and not abs(reply.accuracy) <= limits.max_reward:
            raise InadmissibleError(
                f"accuracy: found {reply.accuracy}, expected a number of at most {limits.max_reward:g}"
            )
    if isinstance(reply, Evaluated):
        _check("counts", reply.counts, (limits.num_objectives,), torch.int64)
        _between("counts", reply.counts, 0, 10**9)
    if isinstance(reply, Trained) and isinstance(request, Train):
        sent = request.adapter
        if reply.adapter.keys() != sent.keys():
            odd = sorted(reply.adapter.keys() ^ sent.keys())
            raise InadmissibleError(f"adapter: {odd[0]!r} is {'missing' if odd[0] in sent else 'unexpected'}")
        for name, tensor in sent.items():
            _check(f"adapter {name}", reply.adapter[name], tuple(tensor.shape), torch.float32)
    if isinstance(reply, Differentiated) and isinstance(request, Differentiate):
        _check_gradients(reply, request, limits)
    if isinstance(reply, Counted) and isinstance(request, Count):
        _check("domains", reply.domains, (len(request.domains),), torch.int64)
        _between("domains", reply.domains, 0, 10**9)
    if isinstance(reply, Trained):
        odd = [name for name in reply.metrics if name == "accuracy" or name.startswith("reward/")]
        if odd or len(reply.metrics) > MAX_METRICS:
            raise InadmissibleError(f"metrics: {len(reply.metrics)} figures, {odd[:1]} among them stand for others")
        _check_names("metrics", reply.metrics)
    if isinstance(reply, Introduced):
        _check_introduction(reply, limits)


def _check_introduction(reply: Introduced, limits: Limits) -> None:
    _check_names("name", [reply.name])
    if not _TASK.fullmatch(reply.task):
        raise InadmissibleError(
            f"task: found {ascii(reply.task)[:60]}, expected letters, digits, '.', '_' and '-', at most 64"
        )
    _check_names("objectives", reply.objectives)
    _check_names("versions", [text for pair in reply.versions.items() for text in pair])
    if reply.rank < 1:
        raise InadmissibleError(f"rank: found {reply.rank}, expected 1 or more")
    if not 0 <= reply.num_prompts <= 10**12:
        raise InadmissibleError(f"num_prompts: found {reply.num_prompts}, expected a count")
    if len(set(reply.objectives)) != len(reply.objectives):
        raise InadmissibleError(f"objectives: found {reply.objectives}, expected each once")
    strangers = sorted(set(reply.objectives) - limits.objectives) if limits.objectives is not None else []
    if strangers:
        raise InadmissibleError(f"objectives: found {strangers[0]!r}, which this run does not have")


def _check_names(what: str, names: Collection[str]) -> None:
    """Text that will be printed, and stand in files: short, and without control characters."""
    odd = next((name for name in names if len(name) > 100 or not name.isprintable()), None)
    if odd is not None or len(names) > MAX_METRICS:
        raise InadmissibleError(f"{what}: {len(names)} names, {ascii(odd)[:60]} among them; expected short plain text")


def _check_gradients(reply: Differentiated, request: Differentiate, limits: Limits) -> None:
    m = limits.num_objectives
    _check("rewards", reply.rewards, (m,), torch.float32, nan=True)
    _check("gramian", reply.gramian, (m, m), torch.float32, nan=True)
    projected = request.compression == "projection"
    _check("sketch", reply.sketch, (m, request.rank if projected else 0), torch.float32, nan=True)
    expected = set() if projected else {"left", "right"}
    if reply.factors.keys() != expected:
        raise InadmissibleError(f"factors: found {sorted(reply.factors)}, expected {sorted(expected)}")
    if not projected:
        num_parameters = sum(tensor.numel() for tensor in request.adapter.values())
        rows, columns = near_square(m, num_parameters)
        rank = min(request.rank, rows, columns)
        _check("left", reply.factors["left"], (rows, rank), torch.float32)
        _check("right", reply.factors["right"], (rank, columns), torch.float32)
    for name, tensor in {"gramian": reply.gramian, "sketch": reply.sketch, **reply.factors}.items():
        _between(name, tensor, -_LARGEST_GRADIENT, _LARGEST_GRADIENT)
    _between("gramian's diagonal", reply.gramian.diagonal(), 0, _LARGEST_GRADIENT)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, nan: bool = False) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise InadmissibleError(f"{name}: found {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}")
    bad = tensor.isinf() if nan else ~tensor.isfinite()
    if bool(bad.any()):
        raise InadmissibleError(f"{name}: {int(bad.sum())} of {tensor.numel()} entries are not finite")


def _between(name: str, tensor: Tensor, least: float, most: float) -> None:
    outside = tensor[(tensor < least) | (tensor > most)]
    if len(outside):
        raise InadmissibleError(f"{name}: found {float(outside[0]):g}, expected between {least:g} and {most:g}")

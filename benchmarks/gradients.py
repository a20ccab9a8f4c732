"""The gradients of M objectives against one PEFT backward pass, and against torchjd's autojac.

The marked part of every run is the backward pass: it starts where the log-probs are known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchjd.autojac import jac

from benchmarks.models import Bench, completion_logprobs, trainable
from benchmarks.timing import Clock, Ratio, Timings, interleaved
from fedpact.core.losses import GroupLoss
from fedpact.policy.gradients import objective_gradients

NUM_OBJECTIVES = (1, 2, 3, 8, 16)
GUARDED = 8
"""The number of objectives that the target and the guard speak of."""

LARGE_VOCABULARY = 32768
"""Above it torchjd's vmap is left out: it holds the gradients of all logits once an objective."""


def measure(bench: Bench, *, rounds: int, torchjd_rounds: int) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Ratios by name, and on a GPU each candidate's peak memory relative to PEFT's."""
    check(bench)
    ours: dict[str, Callable[[Clock], None]] = {f"M={m}": partial(one_pass, bench, m) for m in NUM_OBJECTIVES}
    others = {"peft": partial(single, bench), "policy": partial(product_gradients, bench, GUARDED)}
    timings = interleaved({**others, **ours}, rounds=rounds, device=bench.device)
    ratios: dict[str, Ratio] = {}
    for name in ours:
        ratios[f"{name} / PEFT, backward"] = timings.ratio(name, "peft", part="marked")
        ratios[f"{name} / PEFT, forward + backward"] = timings.ratio(name, "peft")
    ratios[f"policy.gradients M={GUARDED} / PEFT, forward + backward"] = timings.ratio("policy", "peft")

    libraries: dict[str, Callable[[Clock], None]] = {"one by one": partial(autojac, bench, GUARDED, 1)}
    if bench.peft.config.vocab_size <= LARGE_VOCABULARY:
        libraries["vmap"] = partial(autojac, bench, GUARDED, None)
    rival = interleaved(
        {"ours": partial(one_pass, bench, GUARDED), **libraries}, rounds=torchjd_rounds, device=bench.device
    )
    for name in libraries:
        ratios[f"torchjd {name} / ours, M={GUARDED}, backward"] = rival.ratio(name, "ours", part="marked")
        ratios[f"torchjd {name} / ours, M={GUARDED}, forward + backward"] = rival.ratio(name, "ours")
    return ratios, _memory(timings) | _memory(rival, below=timings.peak_bytes.get("peft"))


def check(bench: Bench) -> None:
    """Raises AssertionError if ours and PEFT's gradients differ: a ratio of different things means nothing."""
    advantages = _advantages(bench, 1)
    names = sorted(bench.policy.bank.shapes)
    parameters = dict(bench.peft.named_parameters())
    logprobs = _logprobs(bench, bench.peft)
    loss = _loss(bench).values(bench.rollout, logprobs, None, advantages)[0]
    ordered = [parameters[name.replace(".weight", ".default.weight")] for name in names]
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, ordered)])
    found = bench.policy.gradients(bench.rollout, advantages)[0]
    error = float((found - expected).norm() / expected.norm())
    tolerance = 1e-4 if next(bench.peft.parameters()).dtype == torch.float32 else 0.1
    assert error <= tolerance, f"FedPact's gradient differs from PEFT's by {error:.2g} of its length"


def single(bench: Bench, clock: Clock) -> None:
    """One objective's gradient in PEFT."""
    logprobs = _logprobs(bench, bench.peft)
    clock.mark()
    loss = _loss(bench).values(bench.rollout, logprobs, None, _advantages(bench, 1))[0]
    torch.autograd.grad(loss, trainable(bench.peft))


def one_pass(bench: Bench, num_objectives: int, clock: Clock) -> None:
    """M objectives' gradients from our one backward pass."""
    advantages = _advantages(bench, num_objectives)
    passes = _loss(bench).passes(bench.rollout, bench.rollout.logprobs, None, advantages)

    def logprobs(rows: Tensor) -> Tensor:
        found = _logprobs(bench, bench.policy.base.model)
        clock.mark()
        return found

    objective_gradients(bench.policy.bank, logprobs, passes, lambda rows: iter([rows]))


def product_gradients(bench: Bench, num_objectives: int, clock: Clock) -> None:
    """The same through the policy, with its comparison of sampler and trainer."""
    bench.policy.gradients(bench.rollout, _advantages(bench, num_objectives))


def autojac(bench: Bench, num_objectives: int, chunk: int | None, clock: Clock) -> None:
    """M objectives' gradients from torchjd on the PEFT model: `chunk` objectives at once, None for all."""
    logprobs = _logprobs(bench, bench.peft)
    clock.mark()
    losses = _loss(bench).values(bench.rollout, logprobs, None, _advantages(bench, num_objectives))
    jac(losses, trainable(bench.peft), parallel_chunk_size=chunk)


def _logprobs(bench: Bench, model: torch.nn.Module) -> Tensor:
    rows = torch.arange(len(bench.rollout.mask), device=bench.device)
    return completion_logprobs(model, bench.rollout, rows, banned=bench.policy.banned)


def _loss(bench: Bench) -> GroupLoss:
    assert isinstance(bench.policy.loss, GroupLoss)
    return bench.policy.loss


def _advantages(bench: Bench, num_objectives: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(num_objectives, len(bench.rollout.mask), generator=draw).to(bench.device)


def _memory(timings: Timings, *, below: int | None = None) -> dict[str, float]:
    reference = below or timings.peak_bytes.get("peft")
    return {name: peak / reference for name, peak in timings.peak_bytes.items() if reference and name != "peft"}

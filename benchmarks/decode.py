"""Sampling: `policy.generate` against transformers' `generate` on the PEFT model, at equal tokens."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.models import LENGTH, Bench, prompts
from benchmarks.timing import Clock, Ratio, interleaved


def measure(bench: Bench, *, rounds: int) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Ratios by name, and on a GPU our peak memory relative to the PEFT model's."""
    candidates = {"ours": partial(ours, bench), "peft": partial(peft, bench), "merged": partial(merged, bench)}
    timings = interleaved(candidates, rounds=rounds, device=bench.device)
    ratios = {
        "generate on the PEFT model / policy.generate": timings.ratio("peft", "ours"),
        "generate, adapter merged by PEFT / policy.generate": timings.ratio("merged", "ours"),
    }
    peaks = timings.peak_bytes
    return ratios, {name: peaks[name] / peaks["peft"] for name in peaks if name != "peft"}


def ours(bench: Bench, clock: Clock) -> None:
    """From texts to texts, with merging the adapter anew as every training step does."""
    bench.policy.bank.version += 1
    rollout = bench.policy.generate(prompts(), draw=1)
    assert rollout.mask.all(), "a completion ended early: the token budgets differ"


@torch.no_grad()
def peft(bench: Bench, clock: Clock) -> None:
    """From token ids to token ids, prompts repeated for their group as TRL does."""
    ids = bench.peft.generate(
        input_ids=bench.rollout.prompt_ids,
        attention_mask=bench.rollout.prompt_mask.long(),
        max_new_tokens=LENGTH,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=bench.policy.base.pad_id,
        eos_token_id=list(bench.policy.base.eos_ids),
    )
    assert ids.shape[1] == bench.rollout.prompt_ids.shape[1] + LENGTH, "a completion ended early"


def merged(bench: Bench, clock: Clock) -> None:
    """The same with PEFT's adapter in the weights; merging and taking it out again are not counted."""
    bench.peft.merge_adapter()
    clock.restart()
    peft(bench, clock)
    clock.stop()
    bench.peft.unmerge_adapter()

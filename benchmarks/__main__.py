"""Run the benchmarks and hold them against their targets: `python -m benchmarks [--quick] [--json PATH]`.

Exit code 1: eight gradients cost more than 1.3 times one PEFT backward pass. A missed target alone is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import decode, gradients, sandbox
from benchmarks.models import SIZES, make_bench
from benchmarks.timing import Ratio, surroundings

BENCHMARKS = ("gradients", "decode", "step", "sandbox")
SMALL = ("nano", "tiny")
"""The sizes of a plain run, and the only ones that TRL's step is compared at."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio should be: at most or at least `value`."""

    size: str
    name: str
    at_most: bool
    value: float

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:.2f}"

    def met(self, ratio: Ratio) -> bool:
        return ratio.value <= self.value if self.at_most else ratio.value >= self.value


EIGHT = "M=8 / PEFT, backward"
GUARD = Target("tiny", EIGHT, at_most=True, value=1.30)
TARGETS = (
    Target("tiny", EIGHT, at_most=True, value=1.10),
    Target("tiny", "M=16 / PEFT, backward", at_most=True, value=1.15),
    Target("tiny", "torchjd one by one / ours, M=8, backward", at_most=False, value=6.0),
    Target("tiny", "torchjd vmap / ours, M=8, backward", at_most=False, value=6.0),
    Target("nano", "generate on the PEFT model / policy.generate", at_most=False, value=4.0),
    Target("tiny", "generate on the PEFT model / policy.generate", at_most=False, value=1.7),
    Target("nano", "TRL step / our step, M=3", at_most=False, value=2.5),
    Target("tiny", "TRL step / our step, M=3", at_most=False, value=1.5),
    Target("nano", "(TRL step + 7 PEFT backwards) / our step, M=8", at_most=False, value=6.0),
    Target("tiny", "(TRL step + 7 PEFT backwards) / our step, M=8", at_most=False, value=4.5),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if the guard is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 11: under 2 minutes on one core")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: gradients and decode only")
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="may be repeated (default: nano, tiny)")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="may be repeated (default: all)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu")

    torch.set_num_threads(1)
    # Neither changes a figure: a renamed attribute in transformers, and vmap's fallback for CPU attention in torchjd.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)

    facts = surroundings(options.device)
    print(*(f"{name:13} {value}" for name, value in facts.items()), sep="\n")
    print("\nBest time over best time (lowest-highest of a round)")
    figures: dict[str, dict[str, Ratio]] = {}
    memory: dict[str, dict[str, float]] = {}
    wanted = [name for name in options.only or BENCHMARKS if name != "sandbox"]
    for size in (options.size or SMALL) if wanted else ():
        chosen = [name for name in wanted if name != "step" or _has_step(size, options.device)]
        figures[size], memory[size] = run(size, chosen, device=options.device, quick=options.quick)
    rates = {}
    if "sandbox" in (options.only or BENCHMARKS) and options.device == "cpu":
        rates = sandbox.measure(rounds=3 if options.quick else 11)
        sandbox.show(rates)
    facts["load"] += f", {os.getloadavg()[0]:.1f} after"
    print(f"\nload {facts['load']}: other jobs widen the ranges; measure again on a quiet machine")
    if options.json:
        found = {size: {name: asdict(ratio) for name, ratio in ratios.items()} for size, ratios in figures.items()}
        graded = {name: asdict(rate) for name, rate in rates.items()}
        document = {"surroundings": facts, "figures": found, "memory": memory, "sandbox": graded}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    guarded = figures.get(GUARD.size, {}).get(GUARD.name)
    if guarded is None or GUARD.met(guarded):
        return 0
    print(f"{GUARD.size}: {GUARD.name} is {guarded.value:.2f}; expected {GUARD}", file=sys.stderr)
    return 1


def run(size: str, chosen: Sequence[str], *, device: str, quick: bool) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Measure one size and print it: ratios and, on a GPU, peak memory relative to PEFT's."""
    ratios: dict[str, Ratio] = {}
    memory: dict[str, float] = {}
    rounds = 3 if quick else 11
    if chosen != ["step"]:
        bench = make_bench(size, device)
        if "gradients" in chosen:
            found, peaks = gradients.measure(bench, rounds=rounds, torchjd_rounds=1 if quick else 5)
            ratios |= found
            memory |= {f"gradients, {name}": peak for name, peak in peaks.items()}
        if "decode" in chosen:
            found, peaks = decode.measure(bench, rounds=rounds)
            ratios |= found
            memory |= {f"generate, {name}": peak for name, peak in peaks.items()}
        del bench
    if "step" in chosen:
        from benchmarks import step  # imports TRL, which takes seconds

        ratios |= step.measure(size, rounds=rounds)
    print(f"\n{size}")
    for name, ratio in ratios.items():
        print(f"  {name:66} {ratio!s:24} {_verdict(size, name, ratio)}".rstrip())
    for name, peak in memory.items():
        print(f"  {'peak memory / PEFT, ' + name:66} {peak:6.2f}")
    return ratios, memory


def _has_step(size: str, device: str) -> bool:
    return size in SMALL and device == "cpu"


def _verdict(size: str, name: str, ratio: Ratio) -> str:
    for target in TARGETS:
        if (target.size, target.name) == (size, name):
            return f"target {target}: {'met' if target.met(ratio) else 'missed'}"
    return ""


if __name__ == "__main__":
    sys.exit(main())

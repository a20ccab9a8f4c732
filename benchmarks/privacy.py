"""What member-level noise costs: learning on the demo against epsilon, and how many members would have to share it.

    python -m benchmarks.privacy [--seeds 3] [--rounds 6] [--clip-norm 1.0] [--out runs/privacy] [--no-runs]

Every (multiplier, seed) is an ordinary run in one process; a finished one is not run again. The members share their
held-out means here, which no epsilon covers: otherwise there would be nothing to draw.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import interval
from fedpact.edge.local import local_transport
from fedpact.errors import TooFewRepliesError
from fedpact.report.read import RunRecord, read_run
from fedpact.runtime.budget import epsilon_after
from fedpact.runtime.config import load_run
from fedpact.runtime.launch import start
from fedpact.tasks.demo import write_demo
from fedpact.tasks.warmstart import model_folder

MULTIPLIERS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
DELTA = 1e-5
MEMBERS = 8
SIZES = {"the demo's adapter": 17_408, "a LoRA adapter of 1.08 M": 1_080_000}
"""Name to d."""
COHORTS = (8, 100, 1_000, 10_000)
ROUNDS = 50
"""Of the table of cohorts."""
_SITE = '\n[site]\nclip_norm = {clip}\nshare = ["rewards"]\n'


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--no-runs", action="store_true", help="only what can be calculated, and runs that are there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for noise in MULTIPLIERS if not options.no_runs else ():
            run(options.out, noise, seed, rounds=options.rounds, clip=options.clip_norm)
    records = {noise: list(finished(options.out, noise, options.seeds)) for noise in MULTIPLIERS}
    print(curve_table(records, rounds=options.rounds))
    print(cohort_table())


def run_folder(out: Path, noise: float, seed: int) -> Path:
    """Where one run lies."""
    return out / f"seed{seed}" / "runs" / f"noise-{noise:g}"


def run(out: Path, noise: float, seed: int, *, rounds: int, clip: float) -> None:
    """One run, unless it is finished."""
    folder, home = run_folder(out, noise, seed), out / f"seed{seed}"
    if (folder / "final").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    path = write_demo(home, model=model_folder(), seed=seed, rounds=rounds)
    clients = home / f"clients-{noise:g}"
    clients.mkdir(exist_ok=True)
    site = _SITE.format(clip=clip) + (f"noise_multiplier = {noise}\n" if noise else "")
    for file in sorted((home / "clients").glob("*.toml")):
        (clients / file.name).write_text(file.read_text(encoding="utf-8") + site, encoding="utf-8")
    changes = [
        f'simulation.clients="{clients.name}"',
        'algorithm.name="fedavg"',
        "objectives.correct={ primary = true, weight = 0.6 }",
        f"evaluation.every={rounds}",
    ]
    config = load_run(path, changes)
    try:
        start(config, home, folder, where=str(path), make=local_transport, observer=_Quiet())
        print(f"noise {noise:g}, seed {seed}: done", file=sys.stderr, flush=True)
    except TooFewRepliesError as error:  # members refuse a model that noise has blown up
        print(f"noise {noise:g}, seed {seed}: {error}", file=sys.stderr, flush=True)


class _Quiet:
    def round_done(self, round: int, metrics: Any) -> None: ...

    def dropped(self, client: str, reason: str) -> None:
        print(f"  {client}: {reason}", file=sys.stderr, flush=True)


def finished(out: Path, noise: float, seeds: int) -> Iterable[RunRecord]:
    """The runs that are there."""
    folders = [run_folder(out, noise, seed) for seed in range(seeds)]
    return [read_run(folder) for folder in folders if (folder / "final").exists()]


def curve_table(records: dict[float, list[RunRecord]], *, rounds: int) -> str:
    """Held-out correct answers against noise, as Markdown."""
    d = SIZES["the demo's adapter"]
    lines = [
        f"| noise multiplier | epsilon of each member ({rounds} rounds, delta {DELTA:g}) | noise of the mean of "
        f"{MEMBERS}, in clip norms | correct | gain, points | worst seed | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for noise, runs in records.items():
        epsilon = f"{epsilon_after(rounds, noise, DELTA):,.4g}" if noise else "infinite"
        cells = [f"{noise:g}", epsilon, f"{noise * math.sqrt(d / MEMBERS):.2f}"]
        series = [record.series("heldout/correct") for record in runs]
        if series:
            gains = [100 * (one[-1][1] - one[0][1]) for one in series]
            cells += [interval([one[-1][1] for one in series], 3), interval(gains, 1), f"{min(gains):+.1f}"]
        else:
            cells += ["no run came to its end", "", ""]
        cells.append(str(len(runs)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cohort_table() -> str:
    """How much larger than its largest signal the noise of a mean is, by cohort, as Markdown.

    The clipped changes' mean is at most one clip norm long, and that only if all agree. Each member adds its own noise:
    the mean's is `z * sqrt(d / n)` clip norms long. If a sum could be noised just once (a trusted aggregator, or secure
    aggregation with shares of the noise), it would be `z * sqrt(d) / n`.
    """
    lines = [
        "",
        f"| epsilon over {ROUNDS} rounds | multiplier z | d | " + " | ".join(f"n = {n:,}" for n in COHORTS) + " | "
        "members for noise below the signal | ... if only the sum were noised |",
        "|---" * (len(COHORTS) + 5) + "|",
    ]
    for epsilon in (1.0, 3.0, 10.0):
        z = multiplier_for(epsilon, ROUNDS)
        for d in SIZES.values():
            cells = [f"{epsilon:g}", f"{z:.1f}", f"{d:,}", *(f"{z * math.sqrt(d / n):,.0f}" for n in COHORTS)]
            cells += [f"{rounded_up(z * z * d):,}", f"{rounded_up(z * math.sqrt(d)):,}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def multiplier_for(epsilon: float, releases: int) -> float:
    """The smallest noise multiplier, to four digits, under which this many adapters cost no more than `epsilon`."""
    low, high = 1e-3, 1e6
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon_after(releases, middle, DELTA) <= epsilon else (middle, high)
    return high


def rounded_up(value: float) -> int:
    """To two digits: what is claimed of members."""
    unit = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


if __name__ == "__main__":
    main()

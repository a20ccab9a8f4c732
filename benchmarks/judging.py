"""What the server learns from members that only judge, over seeds, with 95 % intervals: for docs/results.md.

    python -m benchmarks.judging [--seeds 5] [--rounds 10] [--jobs 2] [--out runs/judging] [--only NAME ...]

Every (method, seed) is an ordinary run folder; a folder that is finished is not run again. `fedavg` is the same
questions with the members' own answers, trained at the members: as many exchanges as `confidence` has.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from torch import Tensor

from benchmarks.learning import finish, interval
from fedpact.algorithms.fedgrpo import FedGRPO
from fedpact.cli.progress import Progress
from fedpact.edge.local import local_transport
from fedpact.policy.embedding import mean_hidden_states
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.protocols import Server
from fedpact.report.read import RunRecord, read_run
from fedpact.runtime import launch
from fedpact.runtime.config import load_run
from fedpact.tasks import opchains
from fedpact.tasks.demo import REWARDS
from fedpact.tasks.judged import EXPERTS, write_judged_demo
from fedpact.tasks.warmstart import model_folder
from fedpact.types import Prompts


@dataclass(frozen=True)
class Method:
    """One line of the table: the folder of files that it runs on, and what it changes in the run file."""

    changes: tuple[str, ...] = ()
    files: str = "own models"
    drifting: bool = False


_FEDAVG = 'algorithm={ name = "fedavg", local_steps = 1, multi_objective_aggregation = "sum_then_normalize" }'
METHODS: dict[str, Method] = {
    "confidence": Method(EXPERTS["confidence"]),
    "random": Method(EXPERTS["random"]),
    "all": Method(EXPERTS["all"]),
    "oracle": Method(EXPERTS["oracle"]),
    "centralised": Method(EXPERTS["grpo"]),
    "confidence, truth": Method(EXPERTS["confidence"], "truth"),
    "policy as encoder": Method((*EXPERTS["confidence"], 'server.encoder="policy"')),
    "drifting encoder": Method(EXPERTS["confidence"], drifting=True),
    "beginners, oracle": Method(EXPERTS["oracle"], "beginners"),
    "beginners, confidence": Method(EXPERTS["confidence"], "beginners"),
    **{
        f"beginners, floor {floor}": Method(
            (*EXPERTS["confidence"], f"algorithm.competence_floor={floor}"), "beginners"
        )
        for floor in (0.6, 0.8, 1.0)
    },
    "fedavg": Method((_FEDAVG, 'simulation.clients="trainers"'), "truth"),
}

_TRAINER = """\
name = "{op}"
task = "{op}"

[prompts]
path = "../answers/{op}.jsonl"

[rewards.correct]
use = "fedpact.rewards:numeric_answer"
kwargs = {{ tag = "answer" }}

[rewards.format]
{format}
"""


class Drifting(FedGRPO):
    """FedGRPO as it must not be: questions are embedded with the adapter on, the auxiliary ones as they once were."""

    def embedded(self, server: Server, questions: Prompts) -> Tensor:
        policy: LoraPolicy = server.policy  # type: ignore[assignment]
        ids, mask = policy._encoded(questions)
        return mean_hidden_states(policy.base.model, ids, mask)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/judging"))
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--drifting", nargs=2, type=Path, metavar=("RUN", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.drifting:
        return drift(*options.drifting)
    seeds = range(options.seeds)
    kinds = sorted({METHODS[name].files for name in options.only})
    work = [(options.out, kind, seed, options.rounds) for seed in seeds for kind in kinds]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as processes:
        list(processes.map(write, *zip(*work, strict=True)))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda one: run(options.out, *one), [(name, s) for s in seeds for name in options.only]))
    records = {name: [read_run(run_folder(options.out, name, seed)) for seed in seeds] for name in options.only}
    print(results_table(records))
    print(differences(records))
    print(traffic_table(records))
    return None


def files_folder(out: Path, kind: str, seed: int) -> Path:
    """Where a seed's files of this kind lie."""
    return out / f"seed{seed}" / kind.replace(" ", "-")


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where one run lies."""
    name = "".join(c if c.isalnum() or c == "." else "-" for c in method)
    return files_folder(out, METHODS[method].files, seed) / "runs" / name


def write(out: Path, kind: str, seed: int, rounds: int) -> None:
    """A seed's files of this kind, unless they are there; the experts are trained."""
    folder = files_folder(out, kind, seed)
    if (folder / "run.toml").exists():
        return
    truth, weak = kind == "truth", kind == "beginners"
    write_judged_demo(folder, model=model_folder(), seed=seed, rounds=rounds, truth=truth, weak=weak)
    if truth:
        (folder / "trainers").mkdir()
        for op in opchains.OPS:
            text = _TRAINER.format(op=op, format=REWARDS["format"])
            (folder / "trainers" / f"{op}.toml").write_text(text, encoding="utf-8")


def run(out: Path, name: str, seed: int) -> None:
    """One run in a process of its own, unless it is finished."""
    method, folder = METHODS[name], run_folder(out, name, seed)
    path = files_folder(out, method.files, seed) / "run.toml"
    changes = method.changes
    if name == "fedavg":  # one exchange a round, where the others have one a step
        config = load_run(path)
        steps = config.rounds * config.algorithm.model_dump()["server_steps"]
        changes = (*changes, f"rounds={steps}", f"evaluation.every={steps}", "training.prompts_per_step=1")
    if method.drifting:
        if not (folder / "final").exists():
            shutil.rmtree(folder, ignore_errors=True)  # `resume` would go on with the frozen encoder
        command = ["-m", "benchmarks.judging", "--drifting", str(path), str(folder)]
    else:
        command = ["-m", "fedpact", "run", str(path), "--out", str(folder)]
        command += [part for change in changes for part in ("--set", change)]
    finish(folder, command)
    print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)


def drift(path: Path, out: Path) -> None:
    """A run with the drifting encoder, which no run file can ask for."""
    config = load_run(path, ['server.encoder="policy"'])
    config = config.model_copy(update={"algorithm": Drifting.model_validate(config.algorithm.model_dump())})
    watch = Progress(config.rounds)
    launch.start(config, path.parent, out, where=str(path), make=local_transport, observer=watch)


def results_table(records: dict[str, list[RunRecord]]) -> str:
    """Held-out accuracy at the end, sampled and greedy, and the gain, as Markdown."""
    lines = [
        "| who rates | correct, sampled | correct, greedy | format | gain in points | worst seed |",
        "|---|---|---|---|---|---|",
    ]
    keys = ("heldout/correct", "heldout_greedy/correct", "heldout/format")
    for name, runs in records.items():
        ends = [interval([run.series(key, "server")[-1][1] for run in runs], 3) for key in keys]
        gains = [100 * gain(run) for run in runs]
        lines.append(f"| {name} | {' | '.join(ends)} | {interval(gains, 1)} | {min(gains):+.1f} |")
    first = next(iter(records.values()))
    starts = [interval([run.series(key, "server")[0][1] for run in first], 3) for key in keys]
    return "\n".join([*lines[:2], f"| start | {' | '.join(starts)} | | |", *lines[2:]])


def gain(run: RunRecord) -> float:
    """By how much sampled held-out accuracy rose."""
    series = run.series("heldout/correct", "server")
    return series[-1][1] - series[0][1]


def differences(records: dict[str, list[RunRecord]]) -> str:
    """The comparisons that were asked for, seed by seed, in points of sampled accuracy."""
    lines = ["", "| difference | mean | by seed |", "|---|---|---|"]
    pairs = (
        ("confidence", "random"),
        ("confidence", "oracle"),
        ("confidence", "all"),
        ("confidence, truth", "centralised"),
        ("policy as encoder", "drifting encoder"),
        ("beginners, floor 0.8", "beginners, confidence"),
    )
    for one, other in pairs:
        if one in records and other in records:
            ends = zip(records[one], records[other], strict=True)
            points = [100 * (end(a) - end(b)) for a, b in ends]
            lines.append(f"| {one} - {other} | {interval(points, 1)} | {', '.join(f'{x:+.1f}' for x in points)} |")
    return "\n".join(lines)


def end(run: RunRecord) -> float:
    """Sampled held-out accuracy at the end."""
    return run.series("heldout/correct", "server")[-1][1]


def traffic_table(records: dict[str, list[RunRecord]]) -> str:
    """Bytes both ways in the server's ledger, and how much of FedAvg's uplink that is."""
    lines = [
        "",
        "| who rates | to members, kB | from members, kB | uplink / fedavg's | messages |",
        "|---|---|---|---|---|",
    ]
    fedavg = [run.traffic.from_members for run in records.get("fedavg", [])]
    for name, runs in records.items():
        down = interval([run.traffic.to_members / 1000 for run in runs], 0)
        up = interval([run.traffic.from_members / 1000 for run in runs], 0)
        shares = [run.traffic.from_members / all_up for run, all_up in zip(runs, fedavg, strict=False)]
        share = f"1/{len(shares) / sum(shares):.0f}" if shares and sum(shares) else ""
        lines.append(f"| {name} | {down} | {up} | {share} | {interval([run.traffic.asked for run in runs], 0)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""One long run of the smallest model with faults at random: what it costs in memory, files and processes as it goes.

`python -m scripts.soak [--rounds 500] [--seed 0]`; exit code 6 if memory grows by 5 % or more after the warm-up, if
anything is left open or behind, or if the run's files are not whole.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fedpact.edge.local import LocalTransport, resumed_transport
from fedpact.errors import FedPactError, TooFewRepliesError
from fedpact.messages import Trained
from fedpact.runtime import launch
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.envelope import Envelope, unwrap, wrap
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.run import Start
from fedpact.runtime.store import RunFolder
from fedpact.runtime.transport import Failure
from tests.cli.conftest import write_project
from tests.conftest import config as model_config
from tests.conftest import tokenizer

OPTIONS = (
    "evaluation.every=100",
    "evaluation.conflicts=false",
    "rollout.num_generations=2",
    "rollout.max_completion_length=3",
    "training.prompts_per_step=1",
    "algorithm={ name = 'scaffold', local_steps = 1 }",
    "optimizer.name='sgd'",
    "federation.min_replies=1",
)
FAULTS = {"dropped": 0.10, "NaN": 0.05, "corrupt": 0.05, "cut": 0.05, "duplicate": 0.05}
"""How often each happens to a reply."""


class Faulty:
    """A transport whose replies go wrong at random."""

    def __init__(self, inner: LocalTransport, draw: random.Random, tally: Counter[str]) -> None:
        self.inner, self.draw, self.tally = inner, draw, tally

    def clients(self) -> Sequence[str]:
        return self.inner.clients()

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for who, answer in self.inner.exchange(envelopes, timeout_s=timeout_s):
            envelope = decode(Envelope, envelopes[who])
            fault = self._drawn() if envelope.verb != "hello" else "none"
            self.tally[fault] += 1
            if isinstance(answer, Failure) or fault == "dropped":
                yield who, Failure("lost on its way")
            elif fault == "corrupt":
                place = self.draw.randrange(len(answer))
                yield who, answer[:place] + bytes([answer[place] ^ 1 << self.draw.randrange(8)]) + answer[place + 1 :]
            elif fault == "cut":
                yield who, answer[: self.draw.randrange(len(answer))]
            elif fault == "NaN":
                yield who, spoilt(envelope, answer)
            else:
                yield who, answer
            if fault == "duplicate":
                yield who, answer

    def _drawn(self) -> str:
        found, left = "none", self.draw.random()
        for fault, share in FAULTS.items():
            if 0 <= left < share:
                found = fault
            left -= share
        return found


def spoilt(envelope: Envelope, answer: bytes) -> bytes:
    """The answer with one number of its adapter NaN; others come as they are."""
    reply = unwrap(envelope, answer)
    if not isinstance(reply, Trained):
        return answer
    name = max(reply.adapter)
    tensor = reply.adapter[name].clone()
    tensor.flatten()[0] = torch.nan
    return wrap(envelope, encode(replace(reply, adapter={**reply.adapter, name: tensor})))


class Pause(Exception):
    """The server stops here, to be resumed."""


class Meter:
    """Watches the run: after each round, how much it holds. Stops it now and then."""

    def __init__(self, folder: Path, out: Path, draw: random.Random) -> None:
        self.folder, self.out, self.draw = folder, out, draw
        self.rows: list[dict[str, float]] = []
        self.dropped_members = 0
        self.began = time.monotonic()

    def round_done(self, round: int, metrics: Any) -> None:
        row = {"round": round, "s": time.monotonic() - self.began, **held(self.folder)}
        self.rows.append(row)
        if self.draw.random() < 0.02:
            raise Pause

    def dropped(self, client: str, reason: str) -> None:
        self.dropped_members += 1


def held(scratch: Path) -> dict[str, float]:
    """This process's memory in MB, and how many descriptors, threads, children and temporary files it has."""
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "rss": rss,
        "fds": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count(),
        "children": len(children),
        "temporary": sum(1 for _ in (scratch / "tmp").rglob("*")),
    }


def run(folder: Path, rounds: int, seed: int) -> tuple[Meter, Counter[str], Path]:
    """The whole run, begun once and gone on with as often as it stops."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(model_config("llama"))
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    run_file = write_project(folder / "project", model=folder / "model", rounds=rounds)
    config, out, draw, tally = load_run(run_file, OPTIONS), folder / "runs" / "run", random.Random(seed), Counter[str]()
    meter = Meter(folder, out, draw)

    def make(config: RunConfig, folder: Path, out: Path, begin: Start) -> Faulty:
        return Faulty(resumed_transport(config, folder, out, begin), draw, tally)

    while not (out / "final").exists():
        try:
            if (out / "run.json").exists():
                tally["resumed"] += 1
                launch.resume(out, make=make, observer=meter)
            else:
                launch.start(config, run_file.parent, out, where=str(run_file), make=make, observer=meter)
        except Pause:
            tally["stopped"] += 1
        except TooFewRepliesError:
            tally["rounds that failed"] += 1
    return meter, tally, out


def problems(meter: Meter, out: Path, rounds: int, warm: int) -> list[str]:
    """What is not as it should be at the end."""
    first, last = meter.rows[warm], meter.rows[-1]
    share = warm // 2 or 1
    before = sum(row["rss"] for row in meter.rows[warm : warm + share]) / share
    after = sum(row["rss"] for row in meter.rows[-share:]) / share
    growth = after / before - 1
    print(f"memory: {before:.1f} MB after the warm-up, {after:.1f} MB at the end: {100 * growth:+.1f} %")
    wrong = [f"memory grew by {100 * growth:.1f} %"] if growth >= 0.05 else []
    wrong += [f"{name}: {first[name]:g}, then {last[name]:g}" for name in ("fds", "threads", "children", "temporary")
              if last[name] > first[name]]  # fmt: skip
    wrong += [f"{path.name} was left" for path in out.rglob("*") if path.suffix in (".tmp", ".old", ".partial")]
    try:
        for round in range(rounds + 1):
            RunFolder(out).load(round)
        for path in [out / "ledger.jsonl", *(out / "clients").glob("*/ledger.jsonl")]:
            Ledger.verify(path)
    except FedPactError as error:
        wrong.append(str(error))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedpact-soak-") as scratch:
        folder = Path(scratch)
        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        meter, tally, out = run(folder, options.rounds, options.seed)
        tempfile.tempdir = None
        warm = max(10, options.rounds // 10)
        print("round   s/round  memory MB  descriptors  threads  children  temporary files")
        for row in meter.rows[:: max(1, options.rounds // 10)] + meter.rows[-1:]:
            each = row["s"] / max(1, row["round"])
            print(f"{row['round']:5.0f} {each:9.3f} {row['rss']:10.1f} {row['fds']:12.0f} {row['threads']:8.0f} "
                  f"{row['children']:9.0f} {row['temporary']:16.0f}")  # fmt: skip
        print(", ".join(f"{count} {name}" for name, count in sorted(tally.items())))
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        print(f"on the disk: {size / 1e6:.1f} MB, {size / options.rounds / 1e3:.0f} kB a round")
        wrong = problems(meter, out, options.rounds, warm)
    print("\n".join(wrong) or "nothing leaked, nothing lost")
    return 6 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

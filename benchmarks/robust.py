"""What one bad reply, and a colluding minority, do to a round: our aggregation beside the strategies of Flower.

    python -m benchmarks.robust [--seeds 5] [--mutations 200]

Ours is the whole way of a reply: bytes over a transport, admission, ledger, cap, clip, mean. Flower's columns need
`flwr` (1.41; in an environment of its own, since it asks for other versions) and go through its `Strategy.start`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedpact.core.lora import LoraLayer, adapter_shapes, flatten, unflatten
from fedpact.messages import Introduced, Train, Trained
from fedpact.runtime.admission import Limits
from fedpact.runtime.bounds import Rules
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import contract_of
from fedpact.runtime.envelope import Envelope, wrap
from fedpact.runtime.exchange import Round
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.server import ServerSide
from fedpact.runtime.spool import Spool
from fedpact.runtime.transport import Failure
from fedpact.seeding import generator, key
from fedpact.types import Adapter

A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
SENT: Adapter = {A: torch.zeros(1, 2), B: torch.zeros(2, 1)}
HONEST = {"a": 1.00, "b": 1.01, "c": 1.02, "d": 1.03}
_WEIGHT = 10.0
_PLACEHOLDER = 123456.5
_QUICK = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Each line and reply is synced to its file system; one in memory makes that cheap."""

RULES: Mapping[str, Mapping[str, Any]] = {
    "mean": {},
    "mean, clip 1x": {"clip_factor": 1.0},
    "trimmed .2": {"aggregation": "trimmed_mean"},
    "trimmed .3": {"aggregation": "trimmed_mean", "trim": 0.3},
    "geometric median": {"aggregation": "geometric_median"},
}
"""`[federation]` settings of our columns; the first is the default."""
ATTACKS = ("none", "sign flip x10", "ALIE", "sybil copies")


@dataclass(frozen=True, slots=True)
class Sent:
    """What one member sends: its adapter, its weight, how often, and which byte is damaged on the way."""

    adapter: Adapter
    weight: float = _WEIGHT
    copies: int = 1
    damage: tuple[int, int] | None = None
    """Where, and what is added to the byte there."""


Answer = Callable[[Envelope], Sequence[bytes | Failure]]


class Outcome(NamedTuple):
    """What a round came to; `dropped` is member to reason."""

    adapter: Adapter
    dropped: Mapping[str, str]
    ledger: Sequence[Mapping[str, Any]]
    norms: Mapping[str, Sequence[float]]


def filled(value: float) -> Adapter:
    """An adapter of equal entries."""
    return {name: torch.full_like(tensor, value) for name, tensor in SENT.items()}


def bad_replies() -> dict[str, Sent]:
    """The fifth reply, by what is wrong with it."""
    return {
        "NaN": Sent(filled(math.nan)),
        "Inf": Sent(filled(math.inf)),
        "values 1e6": Sent(filled(1e6)),
        "values 3e38": Sent(filled(3e38)),
        "shape (1,)": Sent({name: torch.full((1,), 50.0) for name in SENT}),
        "weight 1e12": Sent(filled(50.0), weight=1e12),
        "weight 1e9": Sent(filled(50.0), weight=1e9),
        "weight -39": Sent(filled(50.0), weight=-39.0),
        "weight 5e-324": Sent(filled(50.0), weight=5e-324),
        "weight NaN": Sent(filled(50.0), weight=math.nan),
        "missing key": Sent({A: SENT[A] + 50}),
        "extra key": Sent({**filled(50.0), "more": torch.ones(1)}),
        "float64": Sent({name: tensor.double() for name, tensor in filled(50.0).items()}),
        "three times": Sent(filled(50.0), copies=3),
    }


def answer(sent: Sent) -> Answer:
    """`sent` as a member's gate would put it on the wire, or an attacker's."""

    def answers(envelope: Envelope) -> list[bytes]:
        finite = math.isfinite(sent.weight)
        reply = Trained(
            weight=sent.weight if finite else _PLACEHOLDER,
            adapter=sent.adapter,
            rewards=torch.tensor([math.nan]),
            accuracy=None,
        )
        data = encode(reply)
        if not finite:  # our own encoder refuses such a number, an attacker's does not
            spelt = str(_PLACEHOLDER).encode()
            assert spelt in data
            data = data.replace(spelt, json.dumps(sent.weight).encode().ljust(len(spelt)))
        return [damaged(wrap(envelope, data), sent.damage)] * sent.copies

    return answers


class ByHand:
    """A transport on which everybody answers what is written down, last name first."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self._answers = answers

    def clients(self) -> Sequence[str]:
        return sorted(self._answers)

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for client in sorted(envelopes, reverse=True):
            for one in self._answers[client](decode(Envelope, envelopes[client])):
                yield client, one


def ours(
    answers: Mapping[str, Answer], sent: Adapter, norms: Mapping[str, Sequence[float]] | None = None, **federation: Any
) -> Outcome:
    """One round from `sent` with these answers, norms of earlier rounds and `[federation]` settings."""
    run: dict[str, Any] = {"rounds": 1, "objectives": {"correct": {}}, "policy": {"model": "none"}}
    config = RunConfig.model_validate({**run, "algorithm": {"name": "fedavg"}, "federation": federation})
    settings, dropped = config.federation, dict[str, str]()
    with tempfile.TemporaryDirectory(dir=_QUICK) as place:
        folder = Path(place)
        one = Round(
            run="run",
            contract="contract",
            number=1,
            transport=ByHand(answers),
            ledger=Ledger(folder / "ledger.jsonl"),
            limits=Limits(1),
            spool=lambda exchange: Spool(folder / str(exchange)),
            since={},
            min_replies=1,
            timeout_s=None,
            dropped=dropped.__setitem__,
            rules=Rules(settings.max_share, settings.clip_factor, settings.clip_norm),
            norms={group: list(known) for group, known in (norms or {}).items()},
        )
        side = ServerSide(
            one,
            contract=contract_of(config, model="none"),
            clients={name: Introduced(name, "", ("correct",), 20, 1, {}) for name in answers},
            memory={},
            trainer=None,
            num_members=len(answers),
            federation=settings,
        )
        adapter = side.mean(Train(sent)).adapter
        lines = one.ledger.path.read_text().splitlines()
    return Outcome(adapter, dropped, list(map(json.loads, lines)), one.norms)


def updates(attack: str, seed: int, *, members: int = 10, bad: int = 3, d: int = 1000) -> tuple[Tensor, Tensor]:
    """The true direction [d], and what the members send [k, d]: the first `bad` collude and know all honest updates.

    Honest: the direction plus noise of twice its size. Sign flip: -10 times the honest mean. ALIE: the honest mean less
    one standard deviation (Baruch et al. 2019, arXiv:1902.06156, z = 1). Sybils: one random direction, honest length.
    """
    draw = generator(key(seed, "robust benchmark"))
    direction = torch.randn(d, generator=draw)
    sent = direction + 2 * torch.randn(members, d, generator=draw)
    honest, odd = sent[bad:], torch.randn(d, generator=draw)
    if attack == "sign flip x10":
        sent[:bad] = -10 * honest.mean(0)
    elif attack == "ALIE":
        sent[:bad] = honest.mean(0) - honest.std(0)
    elif attack == "sybil copies":
        sent[:bad] = odd / odd.norm() * honest.norm(dim=1).median()
    return direction, sent


def cosine_with_truth(attack: str, seed: int, **federation: Any) -> float:
    """The cosine of our aggregate with the true direction."""
    shapes = adapter_shapes([LoraLayer("q_proj", 250, 250, 2, 1.0)])
    direction, rows = updates(attack, seed)
    answers = {f"m{i}": answer(Sent(unflatten(row, shapes))) for i, row in enumerate(rows)}
    found = flatten(ours(answers, {name: torch.zeros(shape) for name, shape in shapes.items()}, **federation).adapter)
    return float(torch.cosine_similarity(found, direction, dim=0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print all tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robust", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--mutations", type=int, default=200, help="single bytes to damage, one a round")
    options = parser.parse_args(arguments)
    has_flower = importlib.util.find_spec("flwr") is not None
    flower = importlib.import_module("benchmarks.robust_flower") if has_flower else None
    names = [*RULES, *(flower.STRATEGIES if flower else ())]

    print("Five replies, one bad; honest 1.00 to 1.03, and what the aggregate is", *names, sep=" | ")
    for what, bad in {"(none bad: 1.04)": Sent(filled(1.04)), **bad_replies()}.items():
        print(what, *(_cell(name, bad, flower) for name in names), sep=" | ")
    print("\nWhy ours refused")
    for what, bad in bad_replies().items():
        print(what, ours(everyone(bad), SENT).dropped.get("bad", "admitted"), sep=" | ")
    print(f"\nOne damaged byte of the fifth reply (1.04), {options.mutations} times")
    for name in (next(iter(RULES)), *names[len(RULES) :]):
        cells = [_cell(name, Sent(filled(1.04), damage=_damage(i)), flower) for i in range(options.mutations)]
        counts = {cell: cells.count(cell) for cell in sorted(set(cells), key=cells.count, reverse=True)}
        print(name, counts, sep=" | ")
    print(
        f"\nTen members, three collude: cosine with the true direction, mean of {options.seeds} seeds (lowest, highest)"
    )
    print("attack", *RULES, sep=" | ")
    for attack in ATTACKS:
        rows = [[cosine_with_truth(attack, seed, **rule) for seed in range(options.seeds)] for rule in RULES.values()]
        print(attack, *(f"{mean(row):.2f} ({min(row):.2f}, {max(row):.2f})" for row in rows), sep=" | ")


def everyone(bad: Sent) -> dict[str, Answer]:
    """The honest four and the bad one."""
    return {**{name: answer(Sent(filled(value))) for name, value in HONEST.items()}, "bad": answer(bad)}


def _cell(name: str, bad: Sent, flower: Any) -> str:
    """The mean entry of the aggregate, its type if that has changed, or the exception that ends the run."""
    try:
        if name in RULES:
            adapter = ours(everyone(bad), SENT, **RULES[name]).adapter
        else:
            adapter = flower.aggregate(name, [*(Sent(filled(value)) for value in HONEST.values()), bad])
    except Exception as error:  # whatever it is, it would end a run
        return f"ends: {type(error).__name__}"
    if not adapter:
        return "none"  # Bulyan wants seven replies for one bad one
    entries = torch.cat([tensor.reshape(-1) for tensor in adapter.values()])
    odd = "" if entries.dtype == torch.float32 else f" {str(entries.dtype).removeprefix('torch.')}"
    return f"{float(entries.double().mean()):.6g}{odd}"


def _damage(i: int) -> tuple[int, int]:
    """A position, as a large number, and what is added to the byte there."""
    draw = generator(key(i, "damage"))
    return int(torch.randint(2**31, (1,), generator=draw)), int(torch.randint(1, 256, (1,), generator=draw))


def damaged(data: bytes, damage: tuple[int, int] | None) -> bytes:
    """The data with one byte changed, or none."""
    if damage is None:
        return data
    where, added = damage[0] % len(data), damage[1]
    return data[:where] + bytes([(data[where] + added) % 256]) + data[where + 1 :]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # Flower's own reports of every round
    main()

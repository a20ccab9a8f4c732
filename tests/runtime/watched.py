"""Whole runs over a transport that keeps every message, and may change what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpact.edge.local import local_transport
from fedpact.messages import (
    Reply,
    Request,
)
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import load_run
from fedpact.runtime.envelope import Envelope, unwrap, wrap
from fedpact.runtime.launch import start
from fedpact.runtime.transport import Failure, Transport
from tests.cli.conftest import settings

NAN = float("nan")
Tamper = Callable[[str, Envelope, Reply], Reply | Failure]


class Watched:
    """A transport that keeps every message, and may change what comes back. It watches the run, too."""

    def __init__(self, tamper: Tamper = lambda who, envelope, reply: reply) -> None:
        self.tamper, self.losses = tamper, dict[str, str]()
        self.sent: list[tuple[str, Envelope, bytes]] = []
        self.answers: list[tuple[str, Envelope, bytes]] = []

    def over(self, inner: Transport) -> Watched:
        self.inner = inner
        return self

    def clients(self) -> Sequence[str]:
        return self.inner.clients()

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        opened = {who: decode(Envelope, data) for who, data in envelopes.items()}
        self.sent += [(who, opened[who], data) for who, data in envelopes.items()]
        for who, answer in self.inner.exchange(envelopes, timeout_s=timeout_s):
            if isinstance(answer, Failure):
                yield who, answer
                continue
            self.answers.append((who, opened[who], answer))
            reply = self.tamper(who, opened[who], unwrap(opened[who], answer))
            yield who, reply if isinstance(reply, Failure) else wrap(opened[who], encode(reply))

    def round_done(self, round: int, metrics: Any) -> None: ...
    def dropped(self, client: str, reason: str) -> None:
        self.losses[client] = reason

    def asked(self, kind: type[Request[Any]]) -> list[tuple[int, str, Any]]:
        """(round, who, request) of all requests of this kind."""
        return [(one.round, who, one.open()) for who, one, _ in self.sent if one.verb == kind.verb]


def launched(run_file: Path, *options: str, watched: Watched | None = None, name: str = "run") -> tuple[Watched, Path]:
    watched, out = watched or Watched(), run_file.parent / "runs" / name / "run"
    config = load_run(run_file, options[1::2])
    start(
        config,
        run_file.parent,
        out,
        where=str(run_file),
        make=lambda *one: watched.over(local_transport(*one)),
        observer=watched,
    )
    return watched, out


def fedgrpo(**options: Any) -> list[str]:
    """Options of a short run by all raters."""
    chosen = {"experts": "all", "server_steps": 2, **options}
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in chosen.items())
    return [*settings("fedgrpo"), "--set", f"algorithm={{ name = 'fedgrpo', {table} }}", "--set", "rounds=1"]


def figures(out: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["round"]: row["value"] for row in rows if row["key"] == key and row["who"] == "server"}


def final(out: Path) -> bytes:
    return (out / "final" / "adapter_model.safetensors").read_bytes()

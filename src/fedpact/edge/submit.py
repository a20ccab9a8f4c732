"""Submits a run to Flower, follows it, and tells how it truly ended. Needs Flower's program `flwr`, not its modules.

The run lies where the ServerApp runs, in FEDPACT_FOLDER/runs/NAME, whatever folder is named here; only where that is
the same folder can its rounds be watched and its result be checked. Otherwise Flower's word has to do. Flower itself
says only that a run was submitted, and for up to 90 s calls one running whose ServerApp is dead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fedpact import __version__, screen
from fedpact.edge.submission import SWITCHES, error_in, round_line, run_name
from fedpact.errors import CheckFailedError, ConfigError, FedPactError, StoreError
from fedpact.runtime import launch
from fedpact.runtime.config import RunConfig
from fedpact.runtime.files import read_folder
from fedpact.runtime.store import RunFolder
from fedpact.screen import shown

Say = Callable[[str], object]

_CALL_S = 120.0
"""How long one call of `flwr` may take."""
_POLL_S = 3.0
_PATIENCE_S = 600.0
"""How long the SuperLink may be out of reach."""
_APP = """\
[project]
name = "fedpact"
version = {version}
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedpact"
fab-include = ["fedpact_app/**/*.py"]

[tool.flwr.app.components]
serverapp = "fedpact_app.server_app:app"
clientapp = "fedpact_app.client_app:app"

[tool.flwr.app.config]
run-name = {name}
run-file = ""
run = {run}
rounds = 0
"""


class _UnreachableError(FedPactError):
    """`flwr` did not answer, or not what was asked."""


def submit(
    config: RunConfig,
    path: Path,
    out: Path,
    *,
    superlink: str | None,
    say: Say,
    flwr: Sequence[str] | None = None,
    poll_s: float = _POLL_S,
    patience_s: float = _PATIENCE_S,
) -> None:
    """A new run called `out`'s name, to its end; its paths start at the ServerApp's FEDPACT_FOLDER.

    `path` is the run file, `superlink` a connection of Flower's own configuration (None: its default), `flwr` how
    Flower's program is called. Raises the error that the ServerApp ended with.
    """
    if (out / "run.json").exists():
        raise ConfigError(f"{out}: exists already; continue it with `fedpact resume {out}`, or name another")
    model = path.parent / config.policy.model
    if model.exists() and not Path(config.policy.model).is_absolute():
        say(f"{path}: policy.model: {config.policy.model} is looked for below FEDPACT_FOLDER of the ServerApp")
    _submitted(config, out, superlink, say, flwr or _flwr(), poll_s, patience_s)


def resumed(
    out: Path,
    superlink: str | None,
    *,
    say: Say = screen.say,
    flwr: Sequence[str] | None = None,
    poll_s: float = _POLL_S,
    patience_s: float = _PATIENCE_S,
) -> None:
    """The rest of a run that Flower began. Raises as `submit`."""
    config, _ = launch.recorded(RunFolder(out).read_run(), out)
    if _Watched(out, config).complete():
        say(f"{out}: finished already")
        return
    _submitted(config, out, superlink, say, flwr or _flwr(), poll_s, patience_s)


def app_files(config: RunConfig, name: str) -> dict[str, str]:
    """The Flower app of one run: its files' texts by path. Raises ConfigError for a name that is none."""
    values = {"version": __version__, "name": run_name(name), "run": json.dumps(config.dump())}
    files = {"pyproject.toml": _APP.format(**{key: _toml(text) for key, text in values.items()})}
    for file in sorted(resources.files("fedpact_app").iterdir(), key=lambda one: one.name):
        if file.name.endswith(".py"):
            files[f"fedpact_app/{file.name}"] = file.read_text(encoding="utf-8")
    return files


class _Watched:
    """The run's folder, if it is on this machine and may be read; nothing is there otherwise."""

    def __init__(self, out: Path, config: RunConfig) -> None:
        self.out, self.config, self.store = out, config, RunFolder(out)
        self.next = 0 if (latest := self._latest()) is None else latest + 1

    def here(self) -> bool:
        """Whether a run with this configuration lies here."""
        try:
            found, _ = launch.recorded(self.store.read_run(), self.out)
        except (OSError, FedPactError):
            return False
        return found.dump() == self.config.dump()

    def complete(self) -> bool:
        """Whether the last round is committed and the exported adapter whole."""
        try:
            if self._latest() != self.config.rounds:
                return False
            read_folder(self.out / "final", remedy="")
        except (OSError, StoreError):
            return False
        return self.here()

    def news(self, say: Say) -> None:
        """A line for each round that was committed since the last time, and before it one for whoever was missing."""
        latest = self._latest()
        while latest is not None and self.next <= latest:
            for client, reason in self._missing():
                say(f"round {self.next}: dropped {client}: {reason}")
            try:
                text = (self.out / "rounds" / f"{self.next:04d}" / "metrics.jsonl").read_text(encoding="utf-8")
                line = round_line(self.next, self.config.rounds, [json.loads(one) for one in text.splitlines()])
            except (OSError, ValueError, KeyError, TypeError):
                line = f"round {self.next} of {self.config.rounds}"
            say(line)
            self.next += 1

    def _missing(self) -> list[tuple[str, str]]:
        """Who did not answer in the next round, and why at first."""
        try:
            text = (self.out / "rounds" / f"{self.next:04d}" / "state.json").read_text(encoding="utf-8")
            exchanges = json.loads(text)["exchanges"]
            failures = {client: why for one in reversed(exchanges) for client, why in one["failures"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
        return [(shown(client), shown(str(why))) for client, why in sorted(failures.items())]

    def _latest(self) -> int | None:
        try:
            return self.store.latest_round()
        except (OSError, StoreError):
            return None


def _submitted(
    config: RunConfig, out: Path, superlink: str | None, say: Say, flwr: Sequence[str], poll_s: float, patience_s: float
) -> None:
    out = out.absolute()
    link = [] if superlink is None else [superlink]
    with tempfile.TemporaryDirectory(prefix="fedpact-app-") as folder:
        for name, text in app_files(config, out.name).items():
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        answer = _called([*flwr, "run", "--format", "json", "--", folder, *link])
    run_id = str(answer.get("run-id", ""))
    if not run_id.isdecimal():
        raise FedPactError(f"flwr run: found no run-id in its answer: {_refusal(None, str(answer))}")
    say(f"submitted as run {run_id}")
    ask = [*flwr, "ls", "--run-id", run_id, "--format", "json", "--", *link]
    status, details = _followed(ask, _Watched(out, config), say, poll_s, patience_s)
    _judged(status, details, run_id, _Watched(out, config), say)


def _followed(ask: Sequence[str], watched: _Watched, say: Say, poll_s: float, patience_s: float) -> tuple[str, str]:
    """What Flower calls the run in the end, and what it says about it; ("", "") if the folder has it all before."""
    seen, silent, status = time.monotonic(), False, ""
    while True:
        watched.news(say)
        if watched.complete():
            return "", ""
        try:
            found = _row(_called(ask))
            seen, silent = time.monotonic(), False
            if found[0] != status:
                status = found[0]
                say(f"run is {status}")
            if status.startswith("finished"):
                watched.news(say)
                return found
        except _UnreachableError as error:
            if time.monotonic() - seen > patience_s:
                raise FedPactError(f"{error}; for {patience_s:g} s now. The run may go on: `flwr ls`") from error
            if not silent:
                say(f"{error}; asking again")
                silent = True
        time.sleep(poll_s)


def _judged(status: str, details: str, run_id: str, watched: _Watched, say: Say) -> None:
    """Raises unless the run has reached its end. Its own files count for more than what Flower says."""
    out, here = watched.out, watched.here()
    again = f"`fedpact resume {out}` goes on" if here else "submit it again to go on"
    if watched.complete():
        say(f"adapter: {out / 'final'}")
    elif status == "finished:completed":
        if here:
            raise CheckFailedError(f"{out}: Flower says that run {run_id} completed, but its files are not; {again}")
        say(f"run {run_id} completed; its folder is runs/{out.name} in FEDPACT_FOLDER of the ServerApp")
    elif status == "finished:stopped":
        raise FedPactError(f"run {run_id}: was stopped (`flwr stop`); {again}")
    else:
        raise error_in(details) or FedPactError(f"run {run_id}: {status}: {shown(' '.join(details.split()))}; {again}")


def _called(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that `flwr` answers with. Raises _UnreachableError if it is none, or says that it failed."""
    beside = str(Path(sys.executable).parent)  # Flower starts its other programs by name
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | SWITCHES
    environment["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", env=environment, timeout=_CALL_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _UnreachableError(
            f"flwr: {type(error).__name__} when it was called; pip install 'fedpact[flower]'"
        ) from error
    start = done.stdout.find("{")
    try:
        answer = json.JSONDecoder().raw_decode(done.stdout, start)[0] if start >= 0 else None
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or answer.get("success") is False or done.returncode:
        raise _UnreachableError(f"flwr: {_refusal(answer, done.stdout + done.stderr)}")
    return answer


def _refusal(answer: Any, text: str = "") -> str:
    """What `flwr` says for itself, in one line."""
    said = answer.get("error-message") if isinstance(answer, dict) else None
    return shown(" ".join(str(said or text).split()))[-400:] or "found no answer in what it says"


def _row(answer: dict[str, Any]) -> tuple[str, str]:
    try:
        row = answer["runs"][0]
        return str(row["status"]), str(row.get("status-details", ""))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _UnreachableError(f"flwr ls: {_refusal(None, str(answer))}") from error


def _flwr() -> list[str]:
    """Flower's program, of this Python's installation."""
    program = Path(sys.executable).with_name("flwr")
    return [str(program)] if program.exists() else [sys.executable, "-m", "flwr.cli.app"]


def _toml(text: str) -> str:
    """A TOML string of ASCII `text`: JSON's escapes are TOML's, but for those of characters beyond."""
    return json.dumps(text)

"""The main of the Flower ServerApp: a run, or the rest of one, in a folder that the process's environment names.

Whoever submits chooses a name and a configuration, never the run's folder: `FEDPACT_FOLDER` of this process says where
all is kept, ~/.fedpact if it does not. The run `NAME` lies in its runs/NAME, a `run-file` is looked for below it, and
the paths in a configuration that was submitted as text start at it. There the working folder means nothing: it is that
of whichever process of Flower's started this one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpact.edge import flower_private
from fedpact.edge.grid import GridTransport
from fedpact.edge.simulated import simulated_transport
from fedpact.edge.submission import exit_line, round_line, run_name
from fedpact.errors import ConfigError, TooFewRepliesError
from fedpact.runtime import launch
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.files import make_private, storing
from fedpact.runtime.run import Start
from fedpact.runtime.store import RunFolder
from fedpact.runtime.toml import validated
from fedpact.screen import say
from fedpact.tasks.demo import write_demo
from fedpact.tasks.warmstart import model_folder
from fedpact.types import ClientId

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

_MEMBERS_S = 600.0
"""How long a run waits for its first `min_replies` members."""
_COMRADES_S = 90.0
"""How long a run that goes on waits for as many members as it had."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A run as its submitter describes it."""

    name: str
    config: RunConfig
    folder: Path
    """Where the configuration's relative paths start."""
    where: str


class Lines:
    """`runtime.run.Observer`: a plain line for each round and for whoever did not count."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def round_done(self, round: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        say(round_line(round, self.rounds, metrics))

    def dropped(self, client: ClientId, reason: str) -> None:
        say(f"dropped {client}: {reason}")


def serve(grid: Grid, context: Context) -> None:
    """Starts the run that the run configuration names, or goes on with it.

    Raises RuntimeError with an `exit_line`, which Flower shows to the submitter.
    """
    os.umask(0o077)
    folder = Path.home() / ".fedpact"
    try:
        folder = run_folders()
        with storing(folder):
            make_private(folder)
        _run(grid, context.run_id, wanted(context.run_config, folder), folder)
    except Exception as error:
        raise RuntimeError(exit_line(error, folder)) from None


def run_folders() -> Path:
    """What `FEDPACT_FOLDER` names, else ~/.fedpact. Raises ConfigError."""
    named = os.environ.get("FEDPACT_FOLDER", "")
    if named and not Path(named).is_absolute():
        raise ConfigError(f"FEDPACT_FOLDER: found {named!r:.200}; expected an absolute path")
    return Path(named) if named else Path.home() / ".fedpact"


def wanted(values: Mapping[str, Any], folder: Path) -> Wanted:
    """The run that a run configuration describes; without `run` and `run-file` the demo. Raises ConfigError."""
    name = run_name(values.get("run-name"))
    text, file, rounds = values.get("run", ""), values.get("run-file", ""), values.get("rounds", 0)
    if not isinstance(text, str) or not isinstance(file, str):
        raise ConfigError("run, run-file: found a number; expected the text of a configuration, or a path")
    if text and file:
        raise ConfigError("run, run-file: found both; expected one of them")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ConfigError(f"rounds: found {rounds!r:.80}; expected a number of rounds, 0 for the configuration's own")
    if text:
        return Wanted(name, _parsed(text, rounds), folder, "run")
    path = _below(folder, file) if file else _demo(folder)
    config = load_run(path, [f"rounds={rounds}"] if rounds else [])
    return Wanted(name, config, path.parent, str(path))


def _run(grid: Grid, run_id: int, run: Wanted, folder: Path) -> None:
    out = folder / "runs" / run.name
    going = (out / "run.json").exists()
    if going:
        _refuse_another(out, run.config)
    say(f"{'going on with' if going else 'a new run in'} {out}")
    with ExitStack() as stack:

        def make(config: RunConfig, base: Path, out: Path, begin: Start) -> GridTransport:
            if flower_private.in_simulation(grid):
                log = out.with_name(f".{out.name}.members.log")
                members = simulated_transport(grid, run_id, config, base, out, begin, check=not going, log=log)
                return stack.enter_context(members)
            transport = GridTransport(grid, lambda: flower_private.nodes(grid))
            transport.wait_for(config.federation.min_replies, _MEMBERS_S)
            if going:
                with suppress(TooFewRepliesError):  # those that it had before, if they come in time
                    before = _members(RunFolder(out))
                    transport.wait_for(len(before), _COMRADES_S, among=before)
            return transport

        observer = Lines(run.config.rounds)
        if going:
            launch.resume(out, make=make, observer=observer)
        else:
            what: dict[str, Any] = {"where": run.where, "make": make, "observer": observer}
            launch.start(run.config, run.folder, out, **what, transport="flower")
    say(f"finished: {out / 'final'}")


def _members(store: RunFolder) -> Sequence[ClientId]:
    """Who took part in the last committed round; before the first, who was there when the run began."""
    latest = store.latest_round()
    found = store.read_run() if latest is None else store.load(latest).state
    return list(found["members"])


def _refuse_another(out: Path, config: RunConfig) -> None:
    """Raises ConfigError if the run in `out` began with another configuration."""
    began, _ = launch.recorded(RunFolder(out).read_run(), out)
    before, now = (_flat(one.dump()) for one in (began, config))
    if list(before.items()) != list(now.items()):  # the order of the objectives counts
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)] or ["the order of keys"]
        raise ConfigError(  # not what it was: another may have submitted it
            f"{out}: this run began with another configuration ({keys[0]}: not the same); submit it as it was, or "
            "choose another run-name"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _parsed(text: str, rounds: int) -> RunConfig:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"run: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"run: found {type(data).__name__}; expected the JSON of a run's configuration")
    return validated(RunConfig, {**data, "rounds": rounds} if rounds else data, where="run")


def _below(folder: Path, file: str) -> Path:
    path = Path(file)
    if path.is_absolute() or ".." in path.parts or "\0" in file or path.suffix != ".toml":
        raise ConfigError(f"run-file: found {file!r:.200}; expected a .toml file below FEDPACT_FOLDER, without '..'")
    return folder / path


def _demo(folder: Path) -> Path:
    """The demo's run file in `folder`, written with all else it needs if it is not there."""
    path = folder / "demo" / "run.toml"
    if not path.exists():
        with storing(folder):
            scratch = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder))
            try:
                write_demo(scratch, model=model_folder())
                scratch.rename(path.parent)  # at once: a folder that is half written would be taken for the demo
            except OSError:
                if not path.exists():  # nobody else was quicker
                    raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return path

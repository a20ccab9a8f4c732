"""What the commands do. Each prints what a person wants to know and leaves files behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fedpact import __version__
from fedpact.cli.ending import Stopped, fail
from fedpact.cli.example import RUN_FILE, example_files
from fedpact.cli.progress import Progress, traffic
from fedpact.cli.records import head, summary
from fedpact.edge.local import check_members, local_members, local_transport, resumed_transport
from fedpact.edge.submit import resumed as resubmit
from fedpact.edge.submit import submit
from fedpact.errors import CheckFailedError, ConfigError, StoreError
from fedpact.messages import Evaluate
from fedpact.report.page import write_report
from fedpact.report.read import read_run
from fedpact.rewards.sandbox.jail import available_jails
from fedpact.rewards.sandbox.selftest import self_test
from fedpact.runtime import launch
from fedpact.runtime.config import load_run
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import Engines, skeleton
from fedpact.runtime.files import storing
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.plain import in_words
from fedpact.runtime.store import RunFolder
from fedpact.screen import say
from fedpact.tasks.demo import write_demo
from fedpact.tasks.warmstart import model_folder


def init(folder: Path, *, demo: bool = False) -> None:
    """Write an example to start from, or the demo's files. Raises ConfigError if `folder` holds anything already."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty; give a new folder")
    if demo:
        path = write_demo(folder, model=model_folder())
        variants = folder / "variants.toml"
        say(f"wrote {folder}: `fedpact run {path}`, or `fedpact compare {path} --variants {variants} --jobs 2`")
        return
    for name, text in example_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    say(f"wrote {folder}: set policy.model in {folder / RUN_FILE}, then `fedpact check {folder / RUN_FILE}`")


def check(path: Path, overrides: Sequence[str]) -> None:
    """Everything that `run` would need, and a dry run of each member."""
    config = load_run(path, overrides)
    scratch = Path(tempfile.mkdtemp(prefix="fedpact-"))
    try:
        begin = launch.prepared(config, path.parent, home=scratch, where=str(path))
        clients = path.parent / config.simulation.clients
        members = local_members(clients, home=scratch, model=begin.model.path, engines=Engines())
        for line in check_members(config, members, begin):
            say(line)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    num_parameters = sum(rows * columns for rows, columns in begin.model.shapes.values())
    crosses = f"an adapter of {num_parameters:,} parameters crosses the network"
    if "server" in config.algorithm.needs:
        crosses = "candidate completions go out, ratings come back"
    say(f"{path}: ready; {len(members)} members, {crosses}")


def contract(path: Path, overrides: Sequence[str], out: Path | None) -> None:
    """What a run asks of its members, in plain words, and as a file for them to accept."""
    config = load_run(path, overrides)
    model = skeleton(config.policy, where=str(path), folder=path.parent)
    agreed = contract_of(config, model=model.sha256)
    canonical = agreed.canonical()
    for line in in_words(agreed, contract_hash(canonical)):
        say(line)
    if out is not None:
        with storing(out):
            out.write_text(canonical + "\n", encoding="utf-8")
        say(f"wrote {out}; each member: `fedpact site accept CLIENT.toml {out.name}`")


def run(
    path: Path, out: Path | None, overrides: Sequence[str], transport: str = "local", superlink: str | None = None
) -> None:
    """A new run from a run file."""
    if transport not in ("local", "flower"):
        raise ConfigError(f"--transport {transport}: expected local or flower")
    config = load_run(path, overrides)
    out = out or path.parent / "runs" / path.stem
    if transport == "flower":
        with _followed():
            submit(config, path, out, superlink=superlink, say=say)
        return
    progress = Progress(config.rounds)
    launch.start(config, path.parent, out, where=str(path), make=local_transport, observer=progress)
    _finish(out)


def resume(out: Path, superlink: str | None = None) -> None:
    """Go on with a run."""
    record = RunFolder(out).read_run()
    config, _ = launch.recorded(record, out)
    if record.get("transport") == "flower":
        with _followed():
            resubmit(out, superlink)
        return
    now = launch.versions()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in record["versions"].items() if now.get(name) != old]
    if changed:
        say(f"versions differ from those that the run began with, and so may its bytes: {', '.join(changed)}")
    launch.resume(out, make=resumed_transport, observer=Progress(config.rounds))
    _finish(out)


def status(out: Path, *, as_json: bool) -> None:
    """How far a run is."""
    record = read_run(out)
    latest = {key: record.series(key) for key in (f"heldout/{name}" for name in record.objectives)}
    figures = {key: points[-1][1] for key, points in latest.items() if points}
    entries = Ledger.entries(out / "ledger.jsonl")
    if as_json:
        about = {"name": record.name, "rounds_done": record.done, "rounds": record.rounds}
        chain = {"entries": len(entries), "head": head(entries)}
        print(json.dumps({**about, "finished": record.finished, "latest": figures, "ledger": chain}, indent=2))
        return
    state = "finished" if record.finished else f"unfinished; `fedpact resume {out}` goes on"
    say(f"{record.name}: {record.label}, round {record.done} of {record.rounds}, {state}")
    for key, value in figures.items():
        say(f"  {key}: {value:.3f}")
    print(f"  ledger: {summary(entries)}")


def evaluate(out: Path, *, as_json: bool) -> None:
    """The last committed adapter at every member, now; nothing is recorded."""
    store = RunFolder(out)
    record = store.read_run()
    launch.refuse_sites(record, out)
    config, folder, begin = launch.begun(record, out)
    latest = store.latest_round()
    if latest is None:
        raise StoreError(f"{out}: no round is committed yet; `fedpact resume {out}`")
    adapter = store.load(latest).adapter
    scratch = Path(tempfile.mkdtemp(prefix="fedpact-"))
    results: dict[str, dict[str, dict[str, float]]] = {}
    try:
        clients = folder / config.simulation.clients
        members = local_members(clients, home=scratch, model=begin.model.path, engines=Engines())
        check_members(config, members, begin)
        for way in ("sampled", "greedy") if config.evaluation.greedy else ("sampled",):
            request = Evaluate(adapter, greedy=way == "greedy")
            found = {"server": begin.trainer.evaluate(request, round=latest)} if begin.trainer else {}
            if "server" not in config.algorithm.needs:
                found |= {name: member.evaluate(request) for name, member in members.items()}
            results[way] = {
                name: {k: v for k, v in zip(config.objectives, reply.rewards.tolist(), strict=True) if v == v}
                for name, reply in found.items()
            }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if as_json:
        print(json.dumps({"round": latest, **results}, indent=2))
        return
    for way, by_name in results.items():
        print(f"round {latest}, held-out means, {way}")
        for name, figures in by_name.items():
            say(f"  {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))


def report(folders: Sequence[Path], out: Path | None) -> None:
    """One page about some runs."""
    title = " and ".join(read_run(folder).name for folder in folders)
    say(str(write_report(folders, out or folders[0] / "report.html", title=title)))


def doctor(*, attacks: bool = False) -> None:
    """What this machine has; with `attacks`, whether its sandboxes hold. Raises CheckFailedError if none does."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, CPU only"
    print(f"fedpact {__version__}\ndevice: {device}, {torch.get_num_threads()} threads")
    for package in ("torch", "transformers", "peft", "safetensors"):
        print(f"{package} {version(package)}")
    extras = {
        "data": "datasets",
        "math": "math_verify",
        "gym": "reasoning_gym",
        "http": "httpx",
        "dp": "dp_accounting",
        "code": "sandlock",
        "flower": "flwr",
    }
    for extra, package in extras.items():
        try:
            found = version(package.replace("_", "-"))
        except PackageNotFoundError:
            found = f"missing; pip install 'fedpact[{extra}]'"
        print(f"extra {extra}: {package} {found}")
    import_module("fedpact.policy.lora_policy")
    jails = available_jails()
    print(f"sandboxes for code rewards: {', '.join(jail.name for jail in jails) or 'none; install bubblewrap'}")
    if attacks:
        reports = [self_test(jail) for jail in jails]
        for report in reports:
            held = sum(line.held for line in report.lines)
            print(f"{report.jail}: {held} of {len(report.lines)} lines hold, {report.seconds:.1f} s")
            for failure in report.failures:
                say(f"  not: {failure}")
        if not any(report.passed for report in reports):
            raise CheckFailedError("no sandbox on this machine holds; code rewards will refuse to start")
    print("ok")


@contextmanager
def _followed() -> Iterator[None]:
    """While a run that goes on elsewhere is followed: to stop this is not to stop it."""
    try:
        yield
    except Stopped as stopped:
        text = "no longer following; the run itself goes on: `flwr ls` shows it, `flwr stop` ends it"
        fail(text, 128 + int(stopped.args[0]))


def _finish(out: Path) -> None:
    page = write_report([out], out / "report.html", title=out.name)
    for line in (f"traffic: {traffic(read_run(out))}", f"adapter: {out / 'final'}", f"report: {page}"):
        say(line)

"""The command `fedpact`. Commands import what they need when they run, so that help costs nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpact import __version__
from fedpact.cli import site
from fedpact.cli.ending import Stopped, fail, stop, usage_or_bug
from fedpact.errors import FedPactError

app = typer.Typer(
    name="fedpact",
    help="Align one language model across organisations that share neither their data nor their rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(site.app, name="site")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.")]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a key of the run file.")]
Superlink = Annotated[
    str | None, typer.Option(metavar="NAME", help="For flower: a connection of Flower's configuration.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    algorithm: Annotated[
        str | None, typer.Option(help="fedavg, fedmoa or firm: only that run. fedgrpo: members that judge.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of data, adapters and sampling.")] = 0,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each run.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; by default runs/demo, or the next free name.")] = None,
) -> None:
    """Train a tiny model across eight members with conflicting private rewards."""
    from fedpact.cli import demo as command

    command.demo(algorithm=algorithm, seed=seed, rounds=rounds, out=out)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    demo: Annotated[bool, typer.Option("--demo", help="The demo's files, with variants to compare.")] = False,
) -> None:
    """Write a run file and two client files to start from."""
    from fedpact.cli import commands

    commands.init(folder, demo=demo)


@app.command()
def check(run: RunFile, set_: Set = None) -> None:
    """Validate every file, load every reward, and dry-run two prompts of each member. Writes nothing."""
    from fedpact.cli import commands

    commands.check(run, set_ or [])


@app.command()
def run(
    run: RunFile,
    out: Annotated[Path | None, typer.Option(help="A new folder; by default runs/NAME beside the run file.")] = None,
    set_: Set = None,
    transport: Annotated[str, typer.Option(help="local: all members here; flower: real sites.")] = "local",
    superlink: Superlink = None,
) -> None:
    """Run it. An existing folder is refused: `fedpact resume` goes on with it."""
    from fedpact.cli import commands

    commands.run(run, out, set_ or [], transport, superlink)


@app.command()
def contract(
    run: RunFile,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it, for members to accept.")] = None,
) -> None:
    """Say in plain words what a run asks of its members."""
    from fedpact.cli import commands

    commands.contract(run, set_ or [], out)


@app.command()
def resume(folder: RunDir, superlink: Superlink = None) -> None:
    """Go on with an interrupted run."""
    from fedpact.cli import commands

    commands.resume(folder, superlink)


@app.command()
def status(folder: RunDir, json: Json = False) -> None:
    """Say how far a run is, and what it has measured last."""
    from fedpact.cli import commands

    commands.status(folder, as_json=json)


@app.command()
def evaluate(folder: RunDir, json: Json = False) -> None:
    """Measure a run's last adapter on every member's held-out prompts."""
    from fedpact.cli import commands

    commands.evaluate(folder, as_json=json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
) -> None:
    """Write one self-contained page with tables and curves."""
    from fedpact.cli import commands

    commands.report(folders, out)


@app.command()
def compare(
    run: RunFile,
    algorithms: Annotated[str | None, typer.Option(metavar="A,B", help="Algorithms, side by side.")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="A.B=C,D", help="Values of a key; several keys are crossed.")
    ] = None,
    variants: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="A table of changes to the run file for each variant.")
    ] = None,
    set_: Set = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each variant: the run file's seed and those after it.")
    ] = 5,
    out: Annotated[Path | None, typer.Option(help="By default runs/NAME-compare beside the run file.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
    baseline: Annotated[str | None, typer.Option(metavar="VARIANT", help="By default the first variant.")] = None,
    front: Annotated[str | None, typer.Option(metavar="A,B", help="Objectives of the front; by default all.")] = None,
    json: Json = False,
) -> None:
    """Run algorithms, variations and seeds of one run file and compare them. The same command again goes on."""
    from fedpact.cli import compare as command
    from fedpact.cli.variants import variants as named_variants

    options: dict[str, Any] = {"algorithms": algorithms, "vary": vary or [], "file": variants, "overrides": set_ or []}
    out = out or run.parent / "runs" / f"{run.stem}-compare"
    named = named_variants(run, **options)
    command.compare(run, out, named, seeds=seeds, jobs=jobs, baseline=baseline, front=front, as_json=json)


@app.command("compare-one", hidden=True)
def compare_one(out: Path, variant: str, seed: str) -> None:
    """One run of a comparison, in a process of its own."""
    from fedpact.cli import compare as command

    command.one_run(out, variant, seed)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's folder, or a comparison's.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.")],
    point: Annotated[
        str | None, typer.Option(help="A variant, an export's name, or a preference such as correct=0.6,brief=0.4.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the comparison's run; by default the first.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model, the adapter merged into it.")] = False,
) -> None:
    """Write the chosen adapter as PEFT files."""
    from fedpact.cli import export as command

    command.export(folder, out, point=point, seed=seed, merge=merge)


@app.command()
def verify(
    folder: RunDir,
    replay: Annotated[
        list[int] | None, typer.Option(metavar="ROUND", help="Do this round again and compare every byte; repeatable.")
    ] = None,
) -> None:
    """Recompute a run's ledgers and manifests, and do chosen rounds again, bit for bit."""
    from fedpact.cli import records

    records.verify(folder, replay or [])


@app.command()
def audit(
    run: RunFile,
    set_: Set = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each attacked run.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each attack.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A new folder for the trials; by default they are removed.")] = None,
    json: Json = False,
) -> None:
    """Attack this configuration: the damage of liars, the leak to a curious server, with and without each defence."""
    from fedpact.cli import audit as command

    command.audit(run, set_ or [], rounds=rounds, seeds=seeds, out=out, as_json=json)


@app.command()
def algorithms(json: Json = False) -> None:
    """List the algorithms."""
    from fedpact.cli import listing

    listing.algorithms(as_json=json)


@app.command()
def doctor(
    attacks: Annotated[bool, typer.Option("--attacks", help="Attack the sandboxes for code rewards.")] = False,
) -> None:
    """Say what this machine can do: device, versions, optional parts."""
    from fedpact.cli import commands

    commands.doctor(attacks=attacks)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: errors become one line and an exit code."""
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except FedPactError as error:
        fail(" ".join(str(error).split()), error.exit_code)
    except Stopped as stopped:
        code = 128 + int(stopped.args[0])
        fail(f"interrupted; what was committed is safe, and {stopped.remedy} goes on from there", code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        usage_or_bug(error)

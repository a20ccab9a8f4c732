"""From a run file, or a run folder, to a run that is ready to go."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from fedpact.core.lora import initial_adapter
from fedpact.errors import ConfigError, StoreError
from fedpact.policy.model import peft_config, read_peft_adapter
from fedpact.runtime.client_config import PromptSettings, load_client
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import skeleton
from fedpact.runtime.files import json_line
from fedpact.runtime.run import Observer, Run, Start
from fedpact.runtime.store import RunFolder
from fedpact.runtime.toml import validated
from fedpact.runtime.trainer import Trainer
from fedpact.runtime.transport import Transport

TransportMaker = Callable[[RunConfig, Path, Path, Start], Transport]
"""(configuration, folder of the run file, run folder, what the run begins with) -> the members of this run."""


def prepared(config: RunConfig, folder: Path, *, home: Path, where: str) -> Start:
    """The model, the first adapter and the server's own of a run whose file lies in `folder`. Raises ConfigError.

    `home` is the run's folder.
    """
    if config.simulation.num_threads is not None:
        torch.set_num_threads(config.simulation.num_threads)
    model = skeleton(config.policy, where=where, folder=folder)
    if config.policy.adapter is None:
        adapter = initial_adapter(model.layers, config.seed)
    else:
        adapter = read_peft_adapter(
            folder / config.policy.adapter, list(model.layers), where=f"{where}: policy.adapter"
        )
    base = str(model.path) if (folder / config.policy.model).is_dir() else config.policy.model
    trainer = None
    if config.server is not None:
        contract = contract_of(config, model=model.sha256)
        trainer = Trainer(config.server, contract, folder=folder, home=home / "server", model=model.path, where=where)
        trainer.check(config.algorithm)
    return Start(model, adapter, peft_config(list(model.layers), config.policy.lora, base=base), trainer)


def start(
    config: RunConfig,
    folder: Path,
    out: Path,
    *,
    where: str,
    make: TransportMaker,
    observer: Observer,
    label: str = "",
    transport: Literal["local", "flower"] = "local",
) -> None:
    """A new run in `out`, to its end. Raises ConfigError if `out` exists; then nothing has been written.

    `transport` is what `make` makes, for the record: members between sites have their files to themselves.
    """
    begin = prepared(config, folder, home=out, where=where)
    with RunFolder.create(out) as store:
        try:
            run = Run(store, config, begin, make(config, folder, out, begin), observer)
            clients = run.introduce()
        except BaseException:
            store.discard()  # there is no run yet
            raise
        store.write_run(
            {
                "schema": 1,
                "name": run.name,
                "label": label or str(config.algorithm.model_dump().get("name")),
                "config": config.dump(),
                "config_sha256": _digest(config.dump()),
                "folder": str(folder.resolve()),
                "transport": transport,
                "contract": run.hash,
                "model": {"path": str(begin.model.path), "sha256": begin.model.sha256},
                "clients": client_digests(config, folder, transport),
                "members": {name: list(one.objectives) for name, one in clients.items()},
                "versions": versions(),
                "threads": torch.get_num_threads(),
            }
        )
        run.go(clients)


def resume(out: Path, *, make: TransportMaker, observer: Observer) -> None:
    """Go on with the run in `out` from its last committed round; a finished one only writes its exports again.

    Raises StoreError if the configuration, the model, a client file, its prompts or a checkpoint is not what it was.
    """
    with RunFolder.open(out) as store:
        record = store.read_run()
        config, folder, begin = begun(record, out)
        digests = client_digests(config, folder, record.get("transport", "local"))
        before = record["clients"]
        changed = [name for name in digests.keys() | before.keys() if digests.get(name) != before.get(name)]
        changed.sort(key=lambda name: (not name.endswith(".toml"), name))
        if changed:
            what = "client file has" if changed[0].endswith(".toml") else "file of prompts has"
            raise StoreError(f"{folder / changed[0]}: this {what} changed since the run began; put it back")
        run = Run(store, config, begin, make(config, folder, out, begin), observer)
        run.go(run.introduce())


def refuse_sites(record: Mapping[str, Any], out: Path) -> None:
    """Raises ConfigError for a run whose members are sites: they cannot be asked here."""
    if record.get("transport", "local") != "local":
        raise ConfigError(f"{out}: its members are sites of their own; this works on a simulation's folder only")


def begun(record: Mapping[str, Any], out: Path) -> tuple[RunConfig, Path, Start]:
    """What a run.json says the run began with, threads included. Raises StoreError if it is no longer so."""
    config, folder = recorded(record, out)
    torch.set_num_threads(int(record["threads"]))  # another number would give other bytes
    begin = prepared(config, folder, home=out, where=str(out / "run.json"))
    if begin.model.sha256 != record["model"]["sha256"]:
        raise StoreError(
            f"{begin.model.path}: this base model hashes to {begin.model.sha256[:12]}, the run began with "
            f"{record['model']['sha256'][:12]}; put that model back, or start a new run"
        )
    if contract_hash(contract_of(config, model=begin.model.sha256).canonical()) != record["contract"]:
        raise StoreError(f"{out / 'run.json'}: the configuration has changed since the run began; put it back")
    return config, folder, begin


def recorded(record: Mapping[str, Any], out: Path) -> tuple[RunConfig, Path]:
    """The configuration in a run.json, and the folder of the run file. Raises StoreError."""
    try:
        if _digest(record["config"]) != record["config_sha256"]:
            raise StoreError(f"{out / 'run.json'}: the configuration has changed since the run began; put it back")
        return validated(RunConfig, record["config"], where=str(out / "run.json")), Path(record["folder"])
    except (ConfigError, KeyError, TypeError) as error:
        raise StoreError(f"{out / 'run.json'}: not understood ({error}); restore it from a copy") from error


def _digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a dumped configuration, the parts that are in no contract included."""
    return hashlib.sha256(json_line(config)).hexdigest()


def client_digests(config: RunConfig, folder: Path, transport: str = "local") -> dict[str, str]:
    """SHA-256 of every client file and of the prompts that these and the run file name, by path from its folder.

    Reward code is not among them: a member may mend a reward that failed. Between sites only the server's own are here.
    """
    files: set[Path] = set()
    for path in sorted((folder / config.simulation.clients).glob("*.toml")) if transport == "local" else ():
        client = load_client(path)
        files |= {path, *_prompt_files(path.parent, client.prompts, client.answers)}
    if config.server is not None:
        files |= _prompt_files(folder, config.server.prompts, config.server.auxiliary)
    return {os.path.relpath(path, folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def _prompt_files(folder: Path, *settings: PromptSettings | None) -> set[Path]:
    names = [name for one in settings if one is not None for name in (one.path, one.heldout) if name]
    return {folder / name for name in names if (folder / name).is_file()}


def versions() -> dict[str, str]:
    """What the promise of equal bytes depends on."""
    packages = ("fedpact", "torch", "transformers", "peft", "safetensors", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}

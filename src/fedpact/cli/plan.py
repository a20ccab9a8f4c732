"""compare.json: what a comparison's folder holds, so that its runs can be found again and never mixed with others."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpact.errors import ConfigError, StoreError
from fedpact.policy.model import resolve
from fedpact.runtime import launch
from fedpact.runtime.config import RunConfig
from fedpact.runtime.engines import hash_of
from fedpact.runtime.files import atomic_write, json_bytes, make_private, storing

PLAN = "compare.json"


def read_plan(folder: Path) -> dict[str, Any]:
    """compare.json in `folder`: variants with their names, folders and configurations, and seeds. Raises StoreError."""
    path = folder / PLAN
    try:
        with storing(path):
            plan = dict(json.loads(path.read_bytes()))
        if plan["schema"] != 1:
            raise ValueError(f"schema {plan['schema']!r}, expected 1")
        return plan
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path}: not understood ({error}); restore it from a copy") from error


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Nobody else compares in this folder meanwhile. Raises StoreError if somebody does, ConfigError if it is none."""
    _refuse_others(out)
    with storing(out):
        fresh = not out.exists()
        make_private(out)
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StoreError(f"{out}: in use by another process; wait until it ends, or stop it") from error
    finally:
        os.close(descriptor)
        if fresh and not (out / PLAN).exists():
            shutil.rmtree(out, ignore_errors=True)  # a plan was refused: nothing was begun


def slug_of(name: str) -> str:
    """A variant's folder: its name where that can be one, otherwise what can be kept of it and six digits of a hash."""
    plain = re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-.")[:80]
    if plain and plain == re.sub(r",? ", "-", name) and not plain.startswith("compare."):
        return plain
    return f"{plain or 'variant'}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:6]}"


def planned(path: Path, out: Path, configs: Mapping[str, RunConfig], seeds: Sequence[int]) -> dict[str, Any]:
    """compare.json with these variants and seeds added. Raises ConfigError if it has one of them, but another way."""
    _refuse_others(out)
    plan = read_plan(out) if (out / PLAN).exists() else {"variants": [], "seeds": []}
    by_slug = {str(one["slug"]).casefold(): one for one in plan["variants"]}
    for name, config in configs.items():
        dumped, files = config.dump(), {**launch.client_digests(config, path.parent), **_others(config, path)}
        del dumped["seed"]
        new: dict[str, Any] = {"name": name, "slug": slug_of(name), "config": dumped, "files": files}
        old = by_slug.setdefault(new["slug"].casefold(), new)
        was, now = dict(_flat(old)), dict(_flat(new))
        if changed := [key for key in (*was, *now) if was.get(key) != now.get(key)]:
            raise ConfigError(
                f"{out}: {name}: {changed[0].partition('.')[2] or 'name'} was {was.get(changed[0])!r} and is "
                f"{now.get(changed[0])!r}; put it back, or name a new folder with --out"
            )
    with storing(out):
        make_private(out)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"schema": 1, "run_file": str(path), "run_sha256": digest, "folder": str(path.parent.resolve())}
    plan |= {**about, "seeds": sorted({*plan["seeds"], *seeds}), "variants": list(by_slug.values())}
    atomic_write(out / PLAN, json_bytes(plan, sort_keys=False))
    return plan


def _refuse_others(out: Path) -> None:
    if not (out / PLAN).exists() and out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
        raise ConfigError(f"{out}: holds something else already; name a new folder with --out")


def _others(config: RunConfig, path: Path) -> dict[str, str]:
    """Digests of the model, of the adapter to start from, and of reward files: runs of other ones are others."""
    folder = path.parent
    model = resolve(config.policy.model, where=f"{path}: policy.model", folder=folder)
    files = sorted((folder / config.simulation.clients).glob("*.py"))
    if config.policy.adapter is not None:
        files += sorted((folder / config.policy.adapter).glob("adapter_*"))
    found = {os.path.relpath(one, folder): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}
    return {"policy.model": hash_of(model), **found}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}" if key else name)

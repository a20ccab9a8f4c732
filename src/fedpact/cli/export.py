"""`fedpact export`: the chosen adapter as PEFT files."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedpact.algorithms.weights import shared_out
from fedpact.cli.plan import PLAN, read_plan
from fedpact.core.aggregate import weighted_sum
from fedpact.errors import ConfigError, StoreError
from fedpact.runtime import launch
from fedpact.runtime.files import (
    json_bytes,
    make_private,
    read_folder,
    storing,
    tensor_bytes,
    tensors_in,
    write_folder,
)
from fedpact.runtime.store import RunFolder
from fedpact.screen import say

_ADAPTER, _CONFIG, _CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_REMEDY = "`fedpact resume` on that run writes its exports again"


def export(folder: Path, out: Path, *, point: str | None, seed: int | None, merge: bool) -> None:
    """Write one adapter of `folder`, a run or a comparison, to the new folder `out`; with `merge` the whole model.

    Raises ConfigError if `out` exists or `point` names nothing there is, StoreError if the run is not finished.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already; name a new folder")
    if (folder / PLAN).is_file():
        run, source = _of_comparison(folder, point, seed)
        files = read_folder(_finished(run) / "final", remedy=_REMEDY)
    elif seed is not None:
        raise ConfigError(f"--seed {seed}: {folder} is no comparison; leave the seed out")
    else:
        run = folder
        files, source = _of_run(run, point)
    if missing := [name for name in (_ADAPTER, _CONFIG, _CARD) if name not in files]:
        raise StoreError(f"{run}: an export without {missing[0]}; {_REMEDY}")
    files = {name: files[name] for name in (_ADAPTER, _CONFIG, _CARD)}
    files[_CARD] = files[_CARD].rstrip() + f"\n\n{source}\n".encode()
    if merge:
        _write_merged(run, files, out)
    else:
        write_folder(out, files)
    say(f"{'model' if merge else 'adapter'}: {out} ({source.rstrip('.')})")


def _of_comparison(folder: Path, point: str | None, seed: int | None) -> tuple[Path, str]:
    plan = read_plan(folder)
    slugs = {one["name"]: one["slug"] for one in plan["variants"]}
    if point not in slugs:
        found = "--point is missing" if point is None else f"--point {point}: no such variant"
        raise ConfigError(f"{folder}: {found}; there are: {'; '.join(slugs)}")
    if seed is None:
        seed = min(plan["seeds"])
    if seed not in plan["seeds"]:
        raise ConfigError(f"--seed {seed}: not in {folder}; there are {', '.join(map(str, plan['seeds']))}")
    return folder / slugs[point] / f"seed-{seed}", f"Exported from variant `{point}`, seed {seed}, of a comparison."


def _of_run(run: Path, point: str | None) -> tuple[dict[str, bytes], str]:
    folders = {
        path.name.removeprefix("final-"): path for path in sorted(_finished(run).glob("final-*")) if path.is_dir()
    }
    if point is None or point == "final":
        return read_folder(run / "final", remedy=_REMEDY), f"Exported from run `{_name(run)}`."
    if point in folders:
        return read_folder(folders[point], remedy=_REMEDY), f"Exported from run `{_name(run)}`, `{point}`."
    others = ", ".join(folders) or "none but final"
    if "=" not in point:
        raise ConfigError(f"--point {point}: no such export in {run}; there are {others}")
    weights = preference(point, list(folders))
    if unknown := [name for name in weights if name not in folders]:
        raise ConfigError(f"--point {point}: no export {unknown[0]!r} to mix in {run}; there are {others}")
    parts = {name: read_folder(folders[name], remedy=_REMEDY) for name in weights}
    adapters = {name: tensors_in(part[_ADAPTER], folders[name] / _ADAPTER) for name, part in parts.items()}
    shapes = {name: {key: tuple(tensor.shape) for key, tensor in adapter.items()} for name, adapter in adapters.items()}
    first = max(weights, key=lambda name: weights[name])
    for name in weights:
        if shapes[name] != shapes[first] or parts[name][_CONFIG] != parts[first][_CONFIG]:
            raise ConfigError(f"--point {point}: {name} and {first} are adapters of other shapes; they cannot be mixed")
    mixture = weighted_sum([adapters[name] for name in weights], list(weights.values()))
    shares = ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())
    files = {**parts[first], _ADAPTER: tensor_bytes(mixture)}
    return files, f"Mixed from run `{_name(run)}` with preference {shares}."


def preference(text: str, names: Sequence[str]) -> dict[str, float]:
    """The weights in a text like correct=3,brief=1, scaled to sum to 1. Raises ConfigError.

    As in a run file, those of `names` that the text leaves out share what is left of 1.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not 0 <= weight < math.inf:
            raise ConfigError(f"--point {text}: found {part.strip()!r}; expected name=weight, once each, none negative")
        weights[name] = weight
    if not any(weights.values()):
        raise ConfigError(f"--point {text}: all weights are 0; expected one that is not")
    largest = max(1.0, *weights.values())  # so that the sum of huge ones is finite
    weights = {name: weight / largest for name, weight in weights.items()} if largest > 1e6 else weights
    everything = [*weights, *(name for name in names if name not in weights)]
    shares = shared_out(weights, everything).tolist()
    return {name: share for name, share in zip(everything, shares, strict=True) if share > 0 or name in weights}


def _finished(run: Path) -> Path:
    if not (run / "run.json").exists() and not (run / "final").is_dir():
        raise StoreError(f"{run}: no run there; expected a folder that `fedpact run` or `fedpact compare` made")
    if not (run / "final").is_dir():
        raise StoreError(f"{run}: not finished; `fedpact resume {run}` goes on with it")
    return run


def _name(run: Path) -> str:
    return run.resolve().name


def _write_merged(run: Path, files: Mapping[str, bytes], out: Path) -> None:
    """The base model with the adapter added to its weights: computed in float32, saved in the base's own type.

    The run folder may be somebody else's: PEFT gets a configuration of our own making, for the layers that we find.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoTokenizer

    from fedpact.policy.model import load_model, lora_layers, model_hash, peft_config, read_peft_adapter

    record = RunFolder(run).read_run()
    base = record["model"]
    path = Path(base["path"])
    if not path.is_dir() or model_hash(path) != base["sha256"]:
        raise StoreError(f"{path}: not the base model that the run began with; put that model back")
    lora = launch.recorded(record, run)[0].policy.lora
    loaded = load_model(path, where=str(run))
    layers = lora_layers(loaded.model, lora)
    with storing(out):
        make_private(out.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_folder(temporary / "adapter", files)
        read_peft_adapter(temporary / "adapter", layers, where=str(run))
        ours = json_bytes(peft_config(layers, lora, base=str(path)))
        write_folder(temporary / "adapter", {_ADAPTER: files[_ADAPTER], _CONFIG: ours})
        merged: Any = PeftModel.from_pretrained(loaded.model, temporary / "adapter").merge_and_unload()
        dtype = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype
        merged.to(dtype or torch.float32).save_pretrained(temporary / "model")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # ours pads on the left
        tokenizer.save_pretrained(temporary / "model")
        (temporary / "model" / _CARD).write_bytes(files[_CARD])
        with storing(out):
            (temporary / "model").rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

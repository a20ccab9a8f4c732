"""Files that are either whole or absent: atomic writes, folders with a MANIFEST, tensors as safetensors bytes.

Whatever is written here can be read by its owner only, as under umask 077, and every `OSError` becomes one line that
names the path and the remedy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load_tensors
from safetensors.torch import save as _save_tensors
from torch import Tensor

from fedpact.errors import StoreError
from fedpact.faults import fault_point

MANIFEST = "MANIFEST"
"""The last file written into a folder: `sha256sum -c MANIFEST` checks the others."""

_REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your disk quota",
    errno.EFBIG: "raise the file-size limit (`ulimit -f`)",
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.EROFS: "make that disk writable",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
}


@contextmanager
def storing(path: Path, *, then: str = "start again") -> Iterator[None]:
    """Turns an `OSError` inside the block into a `StoreError` that names `path`, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else type(error).__name__
        remedy = _REMEDIES.get(error.errno or 0, "check that path")
        raise StoreError(f"{path}: {cause}; {remedy}, then {then}") from error


def atomic_write(path: Path, data: bytes, *, then: str = "start again") -> None:
    """Puts `data` at `path`, durably: after a crash the file holds the old bytes or the new ones, never a mixture."""
    temporary = path.with_name(f".{path.name}.tmp")
    with storing(path, then=then):
        try:
            write_durably(temporary, data)
            temporary.replace(path)
            fault_point("files.renamed")
        except OSError:
            _remove_quietly(temporary)
            raise
        sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes], *, then: str = "start again") -> None:
    """Puts a folder with `files` and their MANIFEST at `path`, durably, in place of what lay there.

    A new folder appears by one rename. Where one is replaced, the old one is put aside first and removed last;
    `recover_folder` brings it back after a crash in between.
    """
    temporary, aside = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    manifest = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    with storing(path, then=then):
        try:
            fault_point("folder.begin")
            for leftover in (temporary, aside):
                if leftover.exists():
                    shutil.rmtree(leftover)
            make_private(temporary)
            fault_point("folder.made")
            for name, data in {**files, MANIFEST: manifest.encode()}.items():
                write_durably(temporary / name, data)
            sync_folder(temporary)
            fault_point("folder.written")
            if path.exists():
                path.rename(aside)
                fault_point("folder.aside")
            temporary.rename(path)
            fault_point("folder.renamed")
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            recover_folder(path)
            raise
        sync_folder(path.parent)
        if aside.exists():
            shutil.rmtree(aside)


def recover_folder(path: Path) -> None:
    """Removes what a killed `write_folder(path)` left, and brings the old folder back if the new one never came."""
    temporary, aside = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    if aside.exists() and not path.exists():
        aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def read_folder(path: Path, *, remedy: str) -> dict[str, bytes]:
    """The files of a folder that `write_folder` wrote, each compared with its SHA-256 in the MANIFEST.

    Raises StoreError naming the file that is missing or was changed, and `remedy`.
    """
    files = {}
    lines = _read(path / MANIFEST, remedy).decode(errors="replace").splitlines()
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).name != name or "\0" in name:
            raise StoreError(f"{path / MANIFEST}: changed since it was written; {remedy}")
        files[name] = _read(path / name, remedy)
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise StoreError(f"{path / name}: changed since it was written (its SHA-256 is not MANIFEST's); {remedy}")
    return files


def write_durably(path: Path, data: bytes) -> None:
    """Writes and fsyncs a file that only its owner can read. Raises OSError."""
    fault_point("files.open")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        fault_point("files.written")
        os.fsync(descriptor)
    fault_point("files.synced")


def append_durably(path: Path, data: bytes) -> None:
    """Adds `data` at the end of a file that only its owner can read, and fsyncs it. Raises OSError."""
    fault_point("append.open")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "ab", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        fault_point("append.written")
        os.fsync(descriptor)
    fault_point("append.synced")


def make_private(folder: Path) -> None:
    """Makes a folder that only its owner can enter, and the missing ones above it. Raises OSError."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)


def refuse_shared(folder: Path) -> None:
    """Raises StoreError if everybody may write into `folder`: what lies there could be anybody's."""
    with storing(folder):
        mode = folder.stat().st_mode
    if mode & 0o002:
        raise StoreError(f"{folder}: everybody can write there (mode {mode & 0o7777:04o}); `chmod 700 {folder}`")


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any, *, sort_keys: bool = True) -> bytes:
    """`value` as JSON for people and machines: keys sorted, sets as sorted lists, one final newline.

    Raises ValueError for NaN and infinity, which JSON cannot hold.
    """
    return (json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False, default=_sorted_set) + "\n").encode()


def json_line(value: Mapping[str, Any]) -> bytes:
    """`value` as one line of JSON, keys sorted. Raises ValueError for NaN and infinity."""
    return (json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """`tensors` as a safetensors file; the same values give the same bytes, in whatever order and layout they come."""
    # Copies: safetensors refuses tensors that share memory, and views of one flat vector do.
    contiguous = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }
    data: bytes = _save_tensors(contiguous, metadata=dict(metadata or {"format": "pt"}))
    return data


def tensors_in(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, sorted by name; `path` is for the error message."""
    try:
        return dict(sorted(_load_tensors(data).items()))
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"{path}: not a safetensors file; restore it from a copy, or delete it") from error


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {os.strerror(error.errno or errno.EIO)}; {remedy}") from error


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        return


def _sorted_set(value: Any) -> list[Any]:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")

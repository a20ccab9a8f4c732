"""Which contract a site has accepted, and which one it was last offered: two small files in its private folder."""

from __future__ import annotations

from pathlib import Path

from fedpact.errors import RefusedError, StoreError
from fedpact.runtime.contract import contract_hash, read_contract
from fedpact.runtime.files import atomic_write, make_private, storing

_ACCEPTED, _OFFERED = "accepted.json", "offered.json"
_MAX_BYTES = 2**18
"""Of a contract that is kept to be read."""


def accepted(home: Path) -> str | None:
    """The hash of the contract that this site has accepted; None: none. Raises StoreError."""
    canonical = accepted_contract(home)
    return None if canonical is None else contract_hash(canonical)


def accepted_contract(home: Path) -> str | None:
    """The canonical text of the contract that this site has accepted. Raises StoreError."""
    return _read(home / _ACCEPTED)


def offered_contract(home: Path) -> str | None:
    """The canonical text of the contract that a run last offered here and that was not accepted. Raises StoreError."""
    return _read(home / _OFFERED)


def accept(home: Path, canonical: str) -> str:
    """Accept this contract in place of the one before; its hash. A running service sees it at the next hello."""
    _write(home / _ACCEPTED, canonical)
    with storing(home / _OFFERED):
        (home / _OFFERED).unlink(missing_ok=True)
    return contract_hash(canonical)


def offer(home: Path, canonical: str) -> None:
    """Keep a contract that came from the network for `fedpact site accept` to show, if it is one."""
    try:
        read_contract(canonical)
        data = canonical.encode()
    except (RefusedError, UnicodeEncodeError):
        return
    if len(data) <= _MAX_BYTES and _read(home / _OFFERED) != canonical:
        _write(home / _OFFERED, canonical)


def _write(path: Path, canonical: str) -> None:
    with storing(path):
        make_private(path.parent)
    atomic_write(path, canonical.encode())


def _read(path: Path) -> str | None:
    with storing(path):
        if not path.exists():
            return None
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise StoreError(
                f"{path}: changed since it was written, not a contract; accept the contract again"
            ) from error

"""A member's site: its client file, and where its service keeps things and listens."""

from __future__ import annotations

import fcntl
import os
import pwd
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fedpact.errors import ConfigError, RefusedError
from fedpact.runtime.client_config import ClientConfig, load_client
from fedpact.runtime.engines import Engines
from fedpact.runtime.files import make_private, storing
from fedpact.runtime.member import Member

_MAX_PATH = 100
"""Bytes of a Unix socket's path; the system takes 107."""


def site_home(config: ClientConfig, path: Path) -> Path:
    """The private folder of the site whose client file is at `path`."""
    return path.parent / config.service.home if config.service.home else path.with_suffix(".site")


def site_socket(config: ClientConfig, path: Path) -> Path:
    """The socket on which the site whose client file is at `path` listens. Raises ConfigError if it is too long."""
    own = config.service.socket
    found = (path.parent / own if own else path.with_suffix(".socket") / "site.sock").absolute()
    if (size := len(os.fsencode(found))) > _MAX_PATH:
        raise ConfigError(f"{path}: service.socket: {size} bytes long, expected at most {_MAX_PATH}; choose a shorter")
    return found


def site_peers(config: ClientConfig, where: str) -> frozenset[int]:
    """The users that may speak to the service: its own, and `service.peers`. Raises ConfigError for an unknown one."""
    return frozenset({os.getuid(), *_uids(config.service.peers, where)})


def load_site(path: Path) -> Member:
    """The member whose client file is at `path`, as between sites, with its prompts, rewards and model.

    Raises ConfigError. It goes on under the contract that it worked under when it was stopped.
    """
    config = load_client(path)
    if config.service.num_threads is not None:
        torch.set_num_threads(config.service.num_threads)
    home = site_home(config, path)
    member = Member(config, folder=path.parent, home=home, where=str(path), engines=Engines())
    member.restore()
    return member


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Two services in one folder would spoil each other's memory and ledger. Raises RefusedError."""
    with storing(home):
        make_private(home)
        descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise RefusedError(f"{home}: another site service works here; stop it first") from error
    finally:
        os.close(descriptor)


def _uids(names: Sequence[str], where: str) -> list[int]:
    found = []
    for name in names:
        try:
            found.append(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
        except KeyError as error:
            raise ConfigError(
                f"{where}: service.peers: no user {name!r} here; expected a user's name or number"
            ) from error
    return found

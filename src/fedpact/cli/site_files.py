"""A member's folder: written to start from, and checked before the service starts on it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from fedpact.cli.example import site_example
from fedpact.edge.site import site_home, site_peers, site_socket
from fedpact.errors import ConfigError
from fedpact.messages import Hello
from fedpact.policy.model import model_hash
from fedpact.runtime.acceptance import accept, accepted_contract
from fedpact.runtime.client_config import ClientConfig, Name, load_client
from fedpact.runtime.contract import read_contract
from fedpact.runtime.dry_run import dry_run
from fedpact.runtime.engines import Engines
from fedpact.runtime.files import make_private, storing
from fedpact.runtime.member import Member
from fedpact.runtime.noise import member_secret
from fedpact.runtime.plain import leaves
from fedpact.screen import say
from fedpact.types import NO_PROMPTS

NODE_KEY = Path("node") / "key"
"""Of the SuperNode, below a member's folder; its public half is beside it."""

_CEILINGS = ("max_rounds", "max_local_steps", "max_completion_length", "max_learning_rate")


def init(folder: Path, name: str) -> None:
    """Write a member's example files, its secret and its node's key; say what comes next.

    Raises ConfigError if `folder` holds anything already, or `name` cannot be a member's.
    """
    if not re.fullmatch(Name, name) or len(name) > 64 or name in ("all", "server"):
        raise ConfigError(f"--name: found {name!r:.80}; expected 1 to 64 letters, digits, '.', '_' and '-'")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: not empty; give a new folder")
    with storing(folder):
        make_private(folder)
        for place, text in site_example(name).items():
            make_private((folder / place).parent)
            (folder / place).write_text(text, encoding="utf-8")
        make_private((folder / NODE_KEY).parent)
    client, key = folder / f"{name}.toml", folder / NODE_KEY
    config = load_client(client)
    member_secret(site_home(config, client))
    say(f"wrote {folder}: put your prompts and rewards into {client}, and the run's model where model.path says")
    if _new_key(key):
        say(f"1. the coordinator registers {key}.pub under the name {name}")
    else:
        say(f"1. make a key (there is no flwr that fits here): ssh-keygen -t ecdsa -b 384 -N '' -f {key}")
        say(f"   the coordinator registers {key}.pub under the name {name}")
    say(f"2. fedpact site check {client}")
    say(f"3. fedpact site accept {client} CONTRACT.json, which the coordinator sends you")
    say(f"4. fedpact site serve {client}")
    socket = site_socket(config, client)
    say(f"5. fedpact site connect --superlink HOST:PORT --root-certificates CA --key {key} --socket {socket}")


def check(path: Path) -> None:
    """Load what the service of the client file at `path` would, look at permissions, and say what may leave.

    With an accepted contract the member also completes two of its prompts and rewards them. Nothing is written. Raises
    ConfigError for what would keep the service from starting, RewardError or DataError as the service would.
    """
    config = load_client(path)
    home, socket = site_home(config, path), site_socket(config, path)
    peers = site_peers(config, str(path))
    warnings = _open_places(config, path, home, socket)
    canonical = accepted_contract(home)
    scratch = Path(tempfile.mkdtemp(prefix="fedpact-"))
    try:
        own = scratch / config.name
        member = Member(config, folder=path.parent, home=own, where=str(path), engines=Engines())
        counted = f"{len(member.train_prompts)}, {len(member.heldout)} held out"
        say(f"prompts: {counted}; rewards: {', '.join(config.rewards)}")
        if member.model is not None:
            say(f"model: {member.model}, SHA-256 {model_hash(member.model)}")
        elif config.prompts is not None:
            warnings.append("model.path is missing: this member cannot train; name its copy of the run's model")
        if canonical is not None:
            accept(own, canonical)
            member.hello(Hello(canonical))
            say(dry_run(member, NO_PROMPTS))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"home: {home}")
    say(f"socket: {socket}, for the users {', '.join(map(str, sorted(peers)))}")
    say("what may leave:" if canonical is not None else "what may leave, whatever contract is accepted:")
    for line in leaves(config.site, None if canonical is None else read_contract(canonical)):
        say(f"  {line}")
    if member.gate.budget is not None and (home / "ledger.jsonl").exists():
        say(f"  spent: {member.gate.budget.line(home / 'ledger.jsonl')}")
    if canonical is None:
        warnings.append(f"no contract is accepted, so that no run is served: fedpact site accept {path} CONTRACT.json")
    warnings += _generous(config)
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"{path}: ready, {len(warnings) or 'no'} warning{'s' * (len(warnings) != 1)}")


def _new_key(path: Path) -> bool:
    """Makes a node's key pair; False without flwr."""
    try:
        from fedpact.edge.flower_private import new_key
    except (ImportError, ConfigError):
        return False
    new_key(path)
    return True


def _open_places(config: ClientConfig, path: Path, home: Path, socket: Path) -> list[str]:
    """Where others could read or write what is this member's alone."""
    found = ["this is root: run the service as a user of its own"] if os.geteuid() == 0 else []
    found += [_loose(place, 0o077, "chmod go-rwx") for place in (home, home / "secret")]
    found.append(_loose(path.parent / NODE_KEY, 0o077, "chmod go-rwx", own=False))
    code = [path.parent / reward.use.rpartition(":")[0] for reward in config.rewards.values()]
    code = [place for place in code if place.suffix == ".py"]
    found += [_loose(place, 0o022, "chmod go-w") for place in (path, path.parent, *code)]
    found.append(_loose(socket.parent, stat.S_IRWXO | stat.S_IWGRP, "chmod 0750"))
    return [one for one in dict.fromkeys(found) if one]


def _loose(place: Path, bits: int, remedy: str, *, own: bool = True) -> str:
    """What is wrong with the mode and owner of what lies there; "" if nothing does, or nothing is.

    `own`: it has to be this user's; a node's key may be another's, who keeps it from this one.
    """
    try:
        one = place.stat()
    except FileNotFoundError:
        return ""
    except PermissionError:
        return f"{place}: this user cannot look at it; run this as the service's user" if own else ""
    if one.st_mode & bits:
        return f"{place}: open to others (mode {stat.S_IMODE(one.st_mode):04o}); {remedy} {place}"
    if own and one.st_uid != os.geteuid():
        return f"{place}: belongs to user {one.st_uid}, this is {os.geteuid()}; run this as the service's user"
    return ""


def _generous(config: ClientConfig) -> list[str]:
    """What this member allows that it might not have thought of."""
    unset = [name for name in _CEILINGS if getattr(config.site, name) is None]
    found = [f"site: no ceiling {', '.join(unset)}: the accepted contract alone decides"] if unset else []
    if config.site.public_sampling:
        found.append("site.public_sampling: for comparisons with a simulation; not for private prompts")
    if config.model.trust_remote_code:
        found.append("model.trust_remote_code: runs the model folder's code with this user's rights")
    return found

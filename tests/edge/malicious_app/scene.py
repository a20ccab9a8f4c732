"""What the planted app meets: a member with a canary in everything it has. And what came of the attack."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedpact.messages import Evaluate, Hello, Train
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import load_run
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.envelope import Envelope, seal
from fedpact.runtime.launch import prepared
from fedpact.tasks import opchains
from fedpact.tasks.warmstart import model_folder
from scripts.loopback import LINK, Federation, Member
from scripts.processes import User, import_path

APP = Path(__file__).parent
RUN = """
seed = 1
rounds = 2
[objectives]
fine = {{ primary = true }}
[policy]
model = {model}
lora = {{ r = 4, lora_alpha = 8 }}
[rollout]
num_generations = 2
max_completion_length = 4
[training]
prompts_per_step = 4
[algorithm]
name = "fedavg"
local_steps = 1
"""
CLIENT = """
# {canary}
name = "{name}"
[prompts]
path = "prompts.jsonl"
heldout = "heldout.jsonl"
[rewards.fine]
use = "rewards.py:fine"
[model]
path = "model"
[site]
verbs = ["hello", "evaluate"]
"""
REWARDS = """
SECRET = "{canary}"

def fine(completions, note, **_):
    assert note[0] and SECRET
    return [len(text) / 13 for text in completions]
"""
SECRET = sha256(b"secret").digest()
"""Of the victim's noise."""
PATTERN = "canary-[0-9a-f]{16}"


def canary(*what: str) -> str:
    """A text that stands in one place only; its digits are not in any program."""
    return f"canary-{sha256(' '.join(what).encode()).hexdigest()[:16]}"


@dataclass
class Attacked:
    """What is left to look at after the attack."""

    federation: Federation
    victim: Member
    report: dict[str, dict[str, str]]
    new: set[str]
    """What the member's folders hold since the attack, relative to the one above them."""
    secret: bytes
    """The member's own, as its service left it."""
    restarted: str
    """What a front end got from the service that was started again."""
    alive: bool
    """Whether the service lived to the end of the attack."""
    drop: Path
    own: dict[str, dict[str, str]]
    """The same attempts to read and to change, under the service's own user."""


def member(federation: Federation, name: str) -> Member:
    """A member with a canary in each of its files."""

    def write(folder: Path, service: str) -> Path:
        shutil.copytree(model_folder(), folder / "model")
        for file, prompts in (
            ("prompts", opchains.member_prompts("add", 24, seed=0)),
            ("heldout", opchains.member_prompts("add", 24, seed=1)),
        ):
            rows = [{"prompt": text, "note": canary(name, file)} for text in prompts.text]
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "rewards.py").write_text(REWARDS.format(canary=canary(name, "rewards")), encoding="utf-8")
        (folder / "client.toml").write_text(
            CLIENT.format(name=name, canary=canary(name, "client")) + service, encoding="utf-8"
        )
        (folder / "home" / "memory").mkdir(mode=0o700, parents=True)
        (folder / "home").chmod(0o700)
        (folder / "home" / "memory" / "note").write_text(canary(name, "memory"), encoding="utf-8")
        return folder / "client.toml"

    return federation.join(name, write, register=name == "victim")


def command(federation: Federation, name: str, program: str) -> None:
    """A command of the federation's Python, beside the others."""
    head, _, _ = (federation.folder / "bin" / "fedpact").read_text(encoding="utf-8").partition("' '''\n")
    (federation.folder / "bin" / name).write_text(f"{head}' '''\n{program}", encoding="utf-8")
    (federation.folder / "bin" / name).chmod(0o755)


def envelopes(run: Path) -> tuple[str, dict[str, bytes]]:
    """The contract, and what the planted code sends, by name and in this order; what should be answered is `sound`."""
    config = load_run(run)
    start = prepared(config, run.parent, home=run.parent, where="run")
    contract = contract_of(config, model=start.model.sha256)
    canonical, other = contract.canonical(), contract.model_copy(update={"rounds": 3}).canonical()
    here: dict[str, Any] = {"run": "honest", "contract": contract_hash(canonical), "round": 1, "exchange": 0}
    hello = seal(Hello(canonical), **{**here, "round": 0})
    evaluate = seal(Evaluate(start.adapter), **here)
    train = seal(Train(start.adapter), **here)
    asked: dict[str, Envelope] = {
        "hello, sound": hello,
        "another contract's hello": seal(Hello(other), **{**here, "contract": contract_hash(other)}),
        "no contract's hello": seal(Hello("{}"), **here),
        "train, not in verbs": train,
        "train, called evaluate": replace(train, verb="evaluate"),
        "an unknown verb": replace(evaluate, verb="../../bin/sh"),
        "under another contract": replace(evaluate, contract=contract_hash(other)),
        "under no contract": replace(evaluate, contract=""),
        "a round too many": replace(evaluate, round=99),
        "since the future": replace(evaluate, since=(10**9, 0)),
        "a damaged request": replace(evaluate, sha256="0" * 64),
        "another run's hello, sound": replace(hello, run="theirs"),
        "while another run is here": evaluate,
        "a path as run's hello, sound": replace(hello, run="../../../planted"),
        "an absolute path as run's hello, sound": replace(hello, run="/planted"),
        "a line end in run's hello": replace(hello, run="/planted\nfile"),
        "hello again, sound": hello,
        "evaluate, sound": evaluate,
    }
    data = {name: encode(one) for name, one in asked.items()}
    data["nothing"], data["a pickle"] = b"", b"\x80\x04cposix\nsystem\n(S'id'\ntR."
    data["a cut request"], data["a long header"] = data["evaluate, sound"][:-40], b"\xff" * 8 + b"{}"
    return canonical, {
        f"{i:02d} {name}": data[name] for i, name in enumerate([*sorted(data.keys() - asked.keys()), *asked])
    }


def attack(federation: Federation, top: Path, folder: Path) -> Attacked:
    """One run of the planted app, then a restart of the service, an honest exchange, and the control."""
    federation.open()
    victim, other = member(federation, "victim"), member(federation, "other")
    run, drop = folder / "run.toml", top / "drop"
    run.write_text(RUN.format(model=json.dumps(str(model_folder()))), encoding="utf-8")
    drop.mkdir()
    drop.chmod(0o777)
    canonical, asked = envelopes(run)
    site, client = victim.site.user.home, str(victim.client)
    (site / "contract.json").write_text(canonical, encoding="utf-8")
    (site / "contract.json").chmod(0o644)
    accept = ["fedpact", "site", "accept", client, str(site / "contract.json"), "--yes"]
    code, text = federation.run(accept, victim.site.user)
    assert code == 0, text
    victim.supernode.start()
    secret = canary("victim", "environment")
    victim.serve(FEDPACT_JUDGE_KEY=secret)

    names = ["client.toml", "prompts.jsonl", "heldout.jsonl", "rewards.py", "home/memory/note", "home/accepted.json"]
    private = [victim.site.user.home / name for name in names]
    theirs = [other.site.user.home / name for name in names[:5]] + [other.key]
    # written by the service's first answers: the attempts to read them come before, the folder's lock is the same
    later = [victim.site.user.home / name for name in ("home/secret", "home/ledger.jsonl")]
    later[0].write_bytes(SECRET)
    later[0].chmod(0o600)
    later[1].touch(mode=0o600)
    victim.site.user.own(*later)
    targets = {
        "files": [str(path) for path in [*private, *later, *theirs]],
        "folders": [str(site), str(site / "home"), str(site / "home" / "memory"), *map(str, (other.site.user.home,))],
        "client": client,
        "socket": str(victim.socket),
        "pattern": PATTERN,
        "drop": str(drop),
        "path": [*import_path().split(os.pathsep), str(top / "bin"), str(site), str(victim.socket.parent)],
    }
    (folder / "targets.json").write_text(json.dumps(targets), encoding="utf-8")
    for name, data in asked.items():
        (folder / f"{name}.bin").write_bytes(data)
    app = top / "app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__", "scene.py"))
    before = set(site.parent.rglob("*"))
    federation.wait_online("victim")
    federation.flwr("run", str(app), LINK)
    victim.supernode.wait((folder / "report.json").exists, "reporting", 120)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    alive = victim.site.running

    victim.site.stop()
    victim.serve(FEDPACT_JUDGE_KEY=secret)
    program = (
        "import sys\nfrom fedpact_app.frames import ask\nfound = ask(sys.argv[1], open(sys.argv[2], 'rb').read())\n"
    )
    program += "print(found.hex() if isinstance(found, bytes) else found)\n"
    command(federation, "asks", program)
    evaluate = next(data for name, data in asked.items() if name.endswith(" evaluate, sound"))
    (top / "envelope").write_bytes(encode(replace(decode(Envelope, evaluate), nonce="0" * 32)))
    (top / "envelope").chmod(0o644)
    _, restarted = federation.run(["asks", str(victim.socket), str(top / "envelope")], victim.supernode.user)
    new = {str(path.relative_to(site.parent)) for path in set(site.parent.rglob("*")) - before}
    kept = (site / "home" / "secret").read_bytes()
    own = controlled(federation, victim.site.user, targets, app)
    return Attacked(federation, victim, report, new, kept, restarted, alive, drop, own)


def controlled(federation: Federation, user: User, targets: dict[str, Any], app: Path) -> dict[str, dict[str, str]]:
    """What the attempts come to under `user`; the last of them ends the service."""
    for path in (app, *app.rglob("*")):
        path.chmod(0o755)
    (federation.folder / "targets.json").write_text(json.dumps(targets), encoding="utf-8")
    (federation.folder / "targets.json").chmod(0o644)
    program = (
        "import json, sys\nsys.path.insert(0, sys.argv[1])\nfrom planted import attempts\n"
        "targets = json.load(open(sys.argv[2]))\n"
        "print(json.dumps({'reading': attempts.reading(targets), 'tampering': attempts.tampering(targets)}))\n"
    )
    command(federation, "attempts", program)
    code, text = federation.run(["attempts", str(app), str(federation.folder / "targets.json")], user)
    assert code == 0, text
    found: dict[str, dict[str, str]] = json.loads(text)
    return found

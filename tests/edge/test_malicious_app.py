"""Code that a run ships to a stock SuperNode: what it gets of the member beside it, each with users of their own.

The planted app is in `malicious_app`. One run of it, against one site; what it tried is looked at test by test. Where
"service 0" stands in a report, it is the only process of that site's service.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")
pytest.importorskip("cryptography", reason="needs the extra flower")

from fedpact.messages import Evaluate, Evaluated, Hello, Introduced, Train
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import load_run
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.envelope import Answer, Envelope, seal
from fedpact.runtime.launch import prepared
from fedpact.tasks import opchains
from fedpact.tasks.warmstart import model_folder
from scripts.loopback import LINK, Federation, Member
from scripts.processes import User, import_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

APP = Path(__file__).with_name("malicious_app")
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
DENIED = {"EACCES", "EPERM"}
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
        "an absolute path as run's hello, sound": replace(hello, run="/planted\nfile"),
        "hello again, sound": hello,
        "evaluate, sound": evaluate,
    }
    data = {name: encode(one) for name, one in asked.items()}
    data["nothing"], data["a pickle"] = b"", b"\x80\x04cposix\nsystem\n(S'id'\ntR."
    data["a cut request"], data["a long header"] = data["evaluate, sound"][:-40], b"\xff" * 8 + b"{}"
    return canonical, {f"{i:02d} {name}": data[name] for i, name in enumerate([*data.keys() - asked.keys(), *asked])}


@pytest.fixture(scope="module")
def attacked() -> Iterator[Attacked]:
    with tempfile.TemporaryDirectory(prefix="fedpact-") as scratch:  # other users can enter it, tmp_path they cannot
        top, project = Path(scratch), Path(scratch) / "server" / "project"
        top.chmod(0o711)
        (project / "attack").mkdir(parents=True)
        with Federation(top, project) as federation:
            if not federation.separate:
                pytest.skip(f"users cannot be separated: {federation.reason}")
            yield attack(federation, top, project / "attack")


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
    later[0].write_bytes(bytes.fromhex(sha256(b"secret").hexdigest()))
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
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
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


def answers(attacked: Attacked) -> dict[str, str]:
    """What the service said, by the name of what it was sent."""
    return {name.lstrip("0123456789 "): said for name, said in attacked.report["asking"].items()}


def test_nothing_private_can_be_read_listed_or_looked_at_in_the_service(attacked: Attacked) -> None:
    found = attacked.report["reading"]
    assert {name: came for name, came in found.items() if came not in DENIED} == {}
    assert {name for name in found if name.startswith("service 0 ")} >= {"service 0 environ", "service 0 mem"}
    assert len(found) > 50


def test_nothing_of_the_member_can_be_changed_and_its_service_cannot_be_harmed(attacked: Attacked) -> None:
    found = dict(attacked.report["tampering"])
    assert found.pop("bind in its place") == "EADDRINUSE"
    assert {name: came for name, came in found.items() if came not in DENIED} == {}
    assert attacked.alive
    assert len(found) > 50


def test_every_secret_is_read_by_the_same_attempts_under_the_services_own_user(attacked: Attacked) -> None:
    found = " ".join(attacked.own["reading"].values())
    kinds = ("client", "prompts", "heldout", "rewards", "memory", "environment")
    assert [kind for kind in kinds if canary("victim", kind) not in found] == []
    reading, tampering = attacked.own["reading"], attacked.own["tampering"]
    assert canary("victim", "environment") in reading["service 0 environ"]
    assert canary("victim", "prompts") in reading["service 0 mem"]
    assert reading["service 0 process_vm_readv"] == "EFAULT", "allowed, and nothing is at that address"
    assert tampering["unlink the socket"].startswith("got") and tampering["service 0 SIGKILL"].startswith("got")
    assert canary("other", "prompts") not in found, "another member is another user"


def test_no_canary_is_in_anything_that_left_the_member(attacked: Attacked) -> None:
    top = attacked.federation.folder
    secret = bytes.fromhex(sha256(b"secret").hexdigest())
    assert attacked.secret == secret, "the one that was there is the one in use"
    kinds = ("client", "prompts", "heldout", "rewards", "memory", "environment")
    texts = [canary(name, kind).encode() for name in ("victim", "other") for kind in kinds]
    secrets = [secret, secret.hex().encode(), *texts, *(one.hex().encode() for one in texts)]
    places = [top / "server", top / "logs", attacked.victim.supernode.user.home, attacked.drop]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    looked = [path for path in files if path.name != "victim-site.log"]  # the member's own
    names = {path.name for path in looked}
    assert {"link.db", "report.json", "superlink.log", "superexec.log", "victim-supernode.log"} <= names
    sent = [bytes.fromhex(said[7:]) for said in attacked.report["asking"].values() if said.startswith("answer ")]
    assert [number for number, data in enumerate(sent) if any(one in data for one in secrets)] == []
    assert [path for path in looked if any(one in path.read_bytes() for one in secrets)] == []


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("contract", {"another contract's hello", "no contract's hello"}),
        (
            "refused",
            {
                "train, not in verbs",
                "train, called evaluate",
                "an unknown verb",
                "under another contract",
                "under no contract",
                "a round too many",
                "since the future",
                "a damaged request",
                "while another run is here",
                "nothing",
                "a pickle",
                "a cut request",
                "a long header",
            },
        ),
        ("malformed", {"a frame of 2^63 bytes", "another protocol", "an answer", "half a frame"}),
    ],
)
def test_what_the_gate_does_not_let_in_gets_a_code_and_no_more(attacked: Attacked, code: str, names: set[str]) -> None:
    found = answers(attacked)
    assert {name: found[name] for name in names} == dict.fromkeys(names, code)


def test_a_sound_request_gets_what_the_gate_lets_out_and_no_more(attacked: Attacked) -> None:
    found = answers(attacked)
    assert {name for name, said in found.items() if name.endswith("sound") and not said.startswith("answer ")} == set()
    hello, evaluated = (
        decode(kind, decode(Answer, bytes.fromhex(found[name][7:])).reply)
        for kind, name in ((Introduced, "hello, sound"), (Evaluated, "evaluate, sound"))
    )
    assert isinstance(hello, Introduced) and isinstance(evaluated, Evaluated)
    assert (hello.name, hello.objectives, hello.num_prompts) == ("victim", ("fine",), 24)
    mean = float(evaluated.rewards[0])
    assert mean == pytest.approx(float(f"{mean:.3g}")), "three digits of a mean over more than 20 completions"


def test_silent_connections_hold_up_a_request_only_while_they_are_open(attacked: Attacked) -> None:
    found = answers(attacked)
    assert int(found["num silent of 20"]) >= 8, "as many as the service hears at once"
    served = [found[name] for name in ("beside a silent one", "after 1 silent", "after 20 silent")]
    assert all(said.startswith("answer ") for said in served)


def test_a_path_as_the_name_of_a_run_makes_no_file(attacked: Attacked) -> None:
    memory = {f"site/home/memory/{name}" for name in ("hello", "reply", "0001-00.safetensors")}
    made = {name for name in attacked.new if not name.startswith("node/") and "__pycache__" not in name}
    assert made == memory | {"site/home/log.jsonl", "site/home/offered.json"}
    assert not Path("/planted").exists()


def test_planted_start_up_code_runs_as_the_front_ends_user_and_never_as_the_services(attacked: Attacked) -> None:
    planted = attacked.report["planting"]
    assert "got written" in planted.values(), "its own home is open to it, so there is something to pick up"
    site, place = attacked.victim.site.user.home, attacked.victim.socket.parent
    closed = [str(site), str(place), str(attacked.federation.folder / "bin"), *import_path().split(os.pathsep)]
    assert {came for file, came in planted.items() if str(Path(file).parent) in closed} <= {*DENIED, "EROFS"}
    users = {path.name.rpartition("-")[2] for path in attacked.drop.iterdir()}
    assert users == {str(attacked.victim.supernode.user.uid)}


def test_after_all_that_the_service_starts_again_and_serves_the_honest(attacked: Attacked) -> None:
    before = bytes.fromhex(answers(attacked)["evaluate, sound"][7:])
    after = decode(Answer, bytes.fromhex(attacked.restarted.strip()))
    assert after.reply == decode(Answer, before).reply, "it goes on under the contract, with the answer that it gave"
    assert after.nonce == "0" * 32

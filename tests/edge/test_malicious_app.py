"""Code that a run ships to a stock SuperNode: what it gets of the member beside it, each with users of their own.

The planted app is in `malicious_app`. One run of it, against one site; what it tried is looked at test by test. Where
"service 0" stands in a report, it is the only process of that site's service.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")
pytest.importorskip("cryptography", reason="needs the extra flower")

from fedpact.messages import Evaluated, Introduced
from fedpact.runtime.codec import decode
from fedpact.runtime.envelope import Answer
from scripts.loopback import Federation
from scripts.processes import import_path
from tests.edge.malicious_app.scene import SECRET, Attacked, attack, canary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="looks at processes and sockets in /proc"),
]
DENIED = {"EACCES", "EPERM"}


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
    assert attacked.secret == SECRET, "the one that was there is the one in use"
    kinds = ("client", "prompts", "heldout", "rewards", "memory", "environment")
    texts = [canary(name, kind).encode() for name in ("victim", "other") for kind in kinds]
    secrets = [SECRET, SECRET.hex().encode(), *texts, *(one.hex().encode() for one in texts)]
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
                "a line end in run's hello",
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
    made = [name for name in attacked.new if not name.startswith("node/") and "__pycache__" not in name]
    assert Counter(re.sub(r"\b[0-9a-f]{16}\b", "RUN", name) for name in made) == {
        "site/home/memory/hello": 1,
        "site/home/memory/RUN": 4,  # of those that said hello
        "site/home/memory/RUN/reply": 1,
        "site/home/memory/RUN/0001-00.safetensors": 1,
        "site/home/log.jsonl": 1,
        "site/home/offered.json": 1,
    }
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

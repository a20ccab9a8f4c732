"""What goes wrong, a function each: it kills a part and says what became of the run, or raises LoopbackError."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from fedpact.edge import flower_private
from scripts.loopback import Member
from scripts.outages import HELD_ROUND, ROUNDS, Outing, Stage, require, same_bytes
from scripts.processes import Part

RECONNECT_S = 90
"""How long fedpact.edge.grid waits for a member that is away."""


def site_kill(stage: Stage) -> str:
    """The site service, while it trains; back 2 s later."""
    run, member = _begun(stage, "site-kill")
    with run.hold(member) as hold:
        member.site.kill()
        time.sleep(2)
        hold.release()
        start_s = member.serve()
    return f"{member.name}'s site service, listening again after {2 + start_s:.1f} s; {_whole(stage, run, member)}"


def link_kill(stage: Stage) -> str:
    """The direct link, while its member trains; back at once, while the member still does."""
    run, member = _begun(stage, "link-kill")
    with run.hold(member) as hold:
        member.link.kill()
        again_s = _connected(member)
        hold.release()
        run.wait_round(HELD_ROUND)
    line = _whole(stage, run, member)
    require(len(_sent(member, run)) > 1, f"{member.name} was not asked again")
    return f"{member.name}'s direct link, connected again after {again_s:.1f} s; {line}"


def link_kill_late(stage: Stage) -> str:
    """The direct link, while its member trains; back when the member has finished, and nobody has taken its answer."""
    run, member = _begun(stage, "link-kill-late")
    with run.hold(member) as hold:
        member.link.kill()
        hold.release()
        member.site.wait(lambda: _sent(member, run), "finished with its work", 60)
        again_s = _connected(member)
    line = _whole(stage, run, member)
    require(run.calls(member) == stage.reference_calls[member.name], f"{member.name} worked again: {line}")
    return f"{member.name}'s direct link, connected {again_s:.1f} s after it was started, the answer stored; {line}"


def superlink_kill(stage: Stage) -> str:
    """The SuperLink, while a member trains; back 2 s later."""
    run, member = _begun(stage, "superlink-kill")
    with run.hold(member) as hold:
        stage.federation.superlink.kill()
        time.sleep(2)
        start_s = stage.federation.open()
        hold.release()
    line = _whole(stage, run, member)
    return (
        f"the SuperLink, listening again after {2 + start_s:.1f} s; {line}; `fedpact run`: {_said(run.part, 'again')}"
    )


def serverapp_kill(stage: Stage) -> str:
    """The ServerApp. Another beside it was refused before; its death is reported, and then the run is resumed."""
    run, member = _begun(stage, "serverapp-kill")
    with run.hold(member) as hold:
        second = run.command("resume", str(run.out)).start()
        code, refused = run.end(second), _said(second)
        require(code and "in use by another" in refused, f"a second submission ended with {code}: {refused}")
        require(run.part.running, "the first run did not survive a second submission")
        killed = _kill_serverapp(stage)
        hold.release()
        status = run.end(timeout_s=180)
        dead_s = time.monotonic() - killed
    require(status, "`fedpact run` ended with 0 though its ServerApp was killed")
    line = _whole(stage, run, member, run.command("resume", str(run.out)).start())
    return (
        f"a second submission: exit code {code}, {refused!r}; then kill of flwr-serverapp: `fedpact run` ended with "
        f"{status} after {dead_s:.1f} s, {_said(run.part)!r}; resumed; {line}"
    )


def serverapp_at_once(stage: Stage) -> str:
    """The ServerApp; the run is resumed while Flower still calls the dead one running."""
    run, member = _begun(stage, "serverapp-at-once")
    with run.hold(member) as hold:
        _kill_serverapp(stage)
        hold.release()
        resume = run.command("resume", str(run.out)).start()
        line = _whole(stage, run, member, resume)
    status = run.end(timeout_s=180)
    require(status == 0, f"the first `fedpact run` ended with {status}, though the run is complete")
    return f"flwr-serverapp, resumed at once; {line}; the first `fedpact run` ended with {status} too"


def supernode_kill(stage: Stage) -> str:
    """The stock SuperNode, in the middle of a request: refused at once, accepted after 65 s."""
    return _supernode(stage, "supernode-kill", 65.0)


def supernode_unlock(stage: Stage) -> str:
    """The stock SuperNode, in the middle of a request: refused at once, accepted after its key has unlocked it."""
    return _supernode(stage, "supernode-unlock", None)


def _supernode(stage: Stage, name: str, wait_s: float | None) -> str:
    member = stage.members()[2]
    run, _ = _begun(stage, name, {member.name: "supernode"})
    federation, part = stage.federation, member.supernode
    with run.hold(member) as hold:
        killed, before = time.monotonic(), len(part.text())
        part.kill()
        status = run.end(part.start(), 60)
        require(status, "a SuperNode was accepted at once after kill -9")
        said = re.findall(r"exit code[^0-9]{0,3}(\d+)", part.text()[before:], re.IGNORECASE)
        hold.release()
        if wait_s is None:
            where: dict[str, Any] = {"root_certificates": federation.ca, "key": member.key, "insecure": False}
            found = flower_private.unlock(federation.address, **where, node_id=int(member.node_id))
            require(found is flower_private.Standing.RELEASED, f"unlock: {found.value}")
        else:
            time.sleep(max(0.0, killed + wait_s - time.monotonic()))
        started = time.monotonic()
        part.start()
        federation.wait_online(member.name)
        again_s = time.monotonic() - started
    how = "unlocked with its key" if wait_s is None else f"{started - killed:.0f} s after the kill"
    return (
        f"{member.name}'s stock SuperNode; restarted at once: status {status}, exit code {' '.join(said) or '?'}; "
        f"restarted {how}: online {again_s:.1f} s later; {_whole(stage, run, member)}"
    )


def joins(stage: Stage) -> str:
    """A member that starts while the others are in a round is asked from the next one on."""
    late = stage.members()[2]
    late.site.stop()
    run, held = _begun(stage, "joins", {late.name: "none"})
    with run.hold(held):
        late.serve()
        _connected(late)
        stage.federation.wait_online(late.name)
    took_s, states = run.finish(), [run.state(number) for number in range(ROUNDS + 1)]
    require(not run.missing(), f"missing: {run.missing()}")
    asked = [late.name in state["exchanges"][0]["roster"] for state in states]
    expected = [number > HELD_ROUND for number in range(ROUNDS + 1)]
    require(asked == expected, f"its answers counted in rounds {asked}")
    require([late.name in state["members"] for state in states] == expected, "state.json has another list of members")
    return f"{late.name} came in round {HELD_ROUND}, counted from round {HELD_ROUND + 1} on; {stage.took(run, took_s)}"


def leaves(stage: Stage) -> str:
    """A member's link and site end in order, for good."""
    return _leaves(stage, "leaves", signal.SIGTERM)


def leaves_killed(stage: Stage) -> str:
    """A member's link and site are killed, for good."""
    return _leaves(stage, "leaves-killed", signal.SIGKILL)


def _leaves(stage: Stage, name: str, with_signal: signal.Signals) -> str:
    run, member = _begun(stage, name)
    with run.hold(member):
        for part in (member.link, member.site):
            part.kill(with_signal)
            part.reap()
    took_s, missing = run.finish(), run.missing()
    lost = f"lost its connection and was not back within {RECONNECT_S} s"
    later = {number: {member.name: "not connected"} for number in range(HELD_ROUND + 1, ROUNDS + 1)}
    require(missing == {HELD_ROUND: {member.name: lost}, **later}, f"missing: {missing}")
    waited = [seconds > RECONNECT_S - 5 for seconds in run.gaps_s()]
    require(sum(waited) == 1 and waited[HELD_ROUND - 1], f"waited more than once: rounds took {stage.seconds(run)}")
    return (
        f"{member.name}'s link and site, {with_signal.name}, for good; {stage.took(run, took_s)}; rounds took "
        f"{stage.seconds(run)}; missing: {missing}"
    )


def slow(stage: Stage) -> str:
    """A member beyond timeout_s is left out of its round, and back in the next."""
    run, member = _begun(stage, "slow", None, "federation.timeout_s=15")
    with run.hold(member):
        run.wait_round(HELD_ROUND)
    took_s = run.finish()
    expected = {HELD_ROUND: {member.name: "no reply within 15 s (federation.timeout_s)"}}
    require(run.missing() == expected, f"missing: {run.missing()}")
    return f"{member.name} beyond timeout_s = 15; {stage.took(run, took_s)}; missing: {run.missing()}"


CASES: Mapping[str, Callable[[Stage], str]] = {
    "site-kill": site_kill,
    "link-kill": link_kill,
    "link-kill-late": link_kill_late,
    "superlink-kill": superlink_kill,
    "slow": slow,
    "joins": joins,
    "serverapp-at-once": serverapp_at_once,
    "serverapp-kill": serverapp_kill,
    "supernode-unlock": supernode_unlock,
    "supernode-kill": supernode_kill,
    "leaves": leaves,
    "leaves-killed": leaves_killed,
}


def _begun(stage: Stage, name: str, fronts: Mapping[str, str] | None = None, *settings: str) -> tuple[Outing, Member]:
    """A new run of the whole federation, and its first member."""
    stage.ready(fronts)
    return Outing(stage.federation, name, *settings), stage.members()[0]


def _whole(stage: Stage, run: Outing, member: Member, part: Part | None = None) -> str:
    """Waits for a run's end; raises LoopbackError unless nobody was missing and every byte is right.

    An answer that `member` gave again has the same bytes.
    """
    took_s = run.finish(part)
    require(not run.missing(), f"missing: {run.missing()}")
    sent = _sent(member, run)
    require(len({(one["request"], one["reply"]) for one in sent}) == 1, f"{member.name}: answers differ: {sent}")
    usual, found = stage.reference_calls[member.name], run.calls(member)
    return (
        f"{stage.took(run, took_s)}; {same_bytes(run.out, stage.reference.out)}; nobody missing; {member.name} "
        f"answered {len(sent)} times in that round; {found} calls of its reward, undisturbed {usual}"
    )


def _kill_serverapp(stage: Stage) -> float:
    """When it was done."""
    require(stage.federation.superexec.pids("flwr-serverapp"), "no flwr-serverapp runs")
    stage.federation.superexec.kill(command="flwr-serverapp")
    return time.monotonic()


def _connected(member: Member) -> float:
    """Starts the link and waits until it says that it is connected: seconds."""
    before = member.link.text().count("connected to")
    return member.link.start().wait(lambda: member.link.text().count("connected to") > before, "connected", 90)


def _sent(member: Member, run: Outing) -> list[dict[str, Any]]:
    """The lines of a member's ledger about its training in the round in which it was held."""
    ledger = member.site.user.home / "home" / "ledger.jsonl"
    about = {"run": run.name, "round": HELD_ROUND, "exchange": 0, "decision": "sent"}
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if about.items() <= line.items()]


def _said(part: Part, what: str = "fedpact: ") -> str:
    """The last line of a part's log that contains `what`."""
    found = [line for line in part.text().splitlines() if what in line]
    return found[-1].removeprefix(what) if found else "nothing"

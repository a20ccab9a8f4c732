"""What goes wrong, one case each: kills a part, says what became of the run, raises LoopbackError if it does not hold."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedpact.edge import flower_private
from scripts.loopback import Member
from scripts.outages import HELD_ROUND, ROUNDS, Outing, Stage, require
from scripts.processes import LoopbackError, Part

EARLIEST = 305
"""What a SuperNode says that is back before the SuperLink has missed it, in its exit code's own words."""


def site_kill(stage: Stage) -> str:
    """The site service, while it trains; back 2 s later."""
    stage.ready()
    run, member = Outing(stage.federation, "site-kill"), stage.members()[0]
    with run.hold(member) as hold:
        member.site.kill()
        time.sleep(2)
        hold.release()
        start_s = member.serve()
    took_s = run.finish()
    require(not run.missing(), f"missing: {run.missing()}")
    return (
        f"{member.name}'s site service, in round {HELD_ROUND}, listening again after {2 + start_s:.1f} s; "
        f"{stage.took(took_s)}; {stage.equal(run)}; nobody missing; {_work(stage, member, run)}"
    )


def link_kill(stage: Stage) -> str:
    """The direct link, while its member trains, and once more when it has finished; back at once."""
    stage.ready()
    run, member = Outing(stage.federation, "link-kill"), stage.members()[0]
    with run.hold(member) as hold:
        member.link.kill()
        member.link.start()
        again_s = _connected(member)
        hold.release()
        run.wait_round(HELD_ROUND)
    took_s = run.finish()
    require(not run.missing(), f"missing: {run.missing()}")
    require(len(_sent(member, run)) > 1, f"{member.name} was not asked again in round {HELD_ROUND}")
    return (
        f"{member.name}'s direct link, in round {HELD_ROUND}, connected again after {again_s:.1f} s; "
        f"{stage.took(took_s)}; {stage.equal(run)}; nobody missing; {_work(stage, member, run)}"
    )


def link_kill_late(stage: Stage) -> str:
    """The direct link, while its member trains; back after the member has finished, whose answer nobody took."""
    stage.ready()
    run, member = Outing(stage.federation, "link-kill-late"), stage.members()[0]
    with run.hold(member) as hold:
        member.link.kill()
        hold.release()
        member.site.wait(lambda: _sent(member, run), "finished with its work", 60)
        member.link.start()
        again_s = _connected(member)
    took_s = run.finish()
    require(not run.missing(), f"missing: {run.missing()}")
    require(len(_sent(member, run)) == 2, f"found {len(_sent(member, run))} lines of the ledger about one request")
    return (
        f"{member.name}'s direct link, in round {HELD_ROUND}, connected again after {again_s:.1f} s, when the answer "
        f"lay ready; {stage.took(took_s)}; {stage.equal(run)}; nobody missing; {_work(stage, member, run)}"
    )


def supernode_kill(stage: Stage) -> str:
    """The stock SuperNode in the middle of a request: refused at once, accepted after 65 s."""
    said, again_s, run, took_s, member = _supernode(stage, "supernode-kill", 65.0)
    return (
        f"{member.name}'s stock SuperNode, in round {HELD_ROUND}; restarted at once: {said}; restarted after 65 s: "
        f"online {again_s:.1f} s after the kill; {stage.took(took_s)}; {stage.equal(run)}; nobody missing; "
        f"{_work(stage, member, run)}"
    )


def supernode_unlock(stage: Stage) -> str:
    """The same, but its node is unlocked with its key first."""
    said, again_s, run, took_s, member = _supernode(stage, "supernode-unlock", 0.0)
    return (
        f"{member.name}'s stock SuperNode, in round {HELD_ROUND}; restarted at once: {said}; unlocked with its key: "
        f"online {again_s:.1f} s after the kill; {stage.took(took_s)}; {stage.equal(run)}; nobody missing; "
        f"{_work(stage, member, run)}"
    )


def superlink_kill(stage: Stage) -> str:
    """The SuperLink, while a member trains; back 2 s later."""
    stage.ready()
    run, member = Outing(stage.federation, "superlink-kill"), stage.members()[0]
    with run.hold(member) as hold:
        stage.federation.superlink.kill()
        time.sleep(2)
        start_s = stage.federation.open()
        hold.release()
    took_s = run.finish()
    require(not run.missing(), f"missing: {run.missing()}")
    return (
        f"the SuperLink, in round {HELD_ROUND}, listening again after {2 + start_s:.1f} s; {stage.took(took_s)}; "
        f"{stage.equal(run)}; nobody missing; {_work(stage, member, run)}; fedpact run said: {_said(run.part, 'again')}"
    )


def serverapp_kill(stage: Stage) -> str:
    """The ServerApp. A second submission beside a living one is refused; Flower sees the death late; then resume."""
    stage.ready()
    run, member = Outing(stage.federation, "serverapp-kill"), stage.members()[0]
    with run.hold(member) as hold:
        second = run.command("resume", str(run.out)).start()
        code = run.end(second)
        refused = _said(second, "fedpact: ")
        require(
            (code and "lock" in refused) or "another" in refused, f"a second submission ended with {code}: {refused}"
        )
        require(run.part.running, "the first run did not survive a second submission")
        killed = _kill_serverapp(stage)
        hold.release()
        status = run.end(timeout_s=180)
        dead_s, why = time.monotonic() - killed, _said(run.part, "fedpact: ")
        require(status not in (0, None), f"fedpact run ended with {status}")
        began = time.monotonic()
        resume = run.command("resume", str(run.out)).start()
    run.finish(resume)
    return (
        f"flwr-serverapp, in round {HELD_ROUND}; a second submission before: exit {code}, {refused!r}; fedpact run "
        f"ended with {status} {dead_s:.1f} s after the kill, {why!r}; resumed, {time.monotonic() - began:.1f} s; "
        f"{stage.equal(run)}; missing: {run.missing() or 'nobody'}; {_work(stage, member, run)}"
    )


def serverapp_at_once(stage: Stage) -> str:
    """The ServerApp; the run is gone on with while Flower still calls it running."""
    stage.ready()
    run, member = Outing(stage.federation, "serverapp-at-once"), stage.members()[0]
    with run.hold(member) as hold:
        _kill_serverapp(stage)
        hold.release()
        resume = run.command("resume", str(run.out)).start()
        took_s = run.finish(resume)
    status = run.end(timeout_s=180)
    require(status == 0, f"fedpact run ended with {status}, though the run is complete")
    return (
        f"flwr-serverapp, in round {HELD_ROUND}, resumed at once; {stage.took(took_s)}; {stage.equal(run)}; missing: "
        f"{run.missing() or 'nobody'}; the first `fedpact run` ended with {status} too; {_work(stage, member, run)}"
    )


def joins(stage: Stage) -> str:
    """A member that starts in round 2 is asked from round 3 on."""
    late, held = stage.members()[2], stage.members()[0]
    stage.ready({late.name: "none"})
    late.site.stop()
    run = Outing(stage.federation, "joins")
    with run.hold(held):
        late.serve()
        late.link.start()
        stage.federation.wait_online(late.name)
    took_s = run.finish()
    rosters = [run.state(n)["exchanges"][0]["roster"] for n in range(1, ROUNDS + 1)]
    members = {n: len(run.state(n)["members"]) for n in range(ROUNDS + 1)}
    require(not run.missing(), f"missing: {run.missing()}")
    require([late.name in one for one in rosters] == [False, False, True, True], f"the rosters are {rosters}")
    require(list(members.values()) == [2, 2, 2, 3, 3], f"state.json names {members} members")
    return f"{late.name} joined in round {HELD_ROUND}, asked from round {HELD_ROUND + 1} on; {stage.took(took_s)}"


def leaves(stage: Stage) -> str:
    """A member ends in order, for good."""
    return _leaves(stage, "leaves", signal.SIGTERM)


def leaves_killed(stage: Stage) -> str:
    """A member is killed, for good."""
    return _leaves(stage, "leaves-killed", signal.SIGKILL)


def slow(stage: Stage) -> str:
    """A member beyond timeout_s is left out of its round and back in the next."""
    stage.ready()
    member, timeout_s = stage.members()[0], 15.0
    run = Outing(stage.federation, "slow", f"federation.timeout_s={timeout_s}")
    with run.hold(member):
        run.wait_round(HELD_ROUND)
    took_s = run.finish()
    expected = {HELD_ROUND: {member.name: f"no reply within {timeout_s:g} s (federation.timeout_s)"}}
    require(run.missing() == expected, f"missing: {run.missing()}")
    return f"{member.name} held past timeout_s = {timeout_s:g}; {stage.took(took_s)}; missing: {run.missing()}"


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
"""Those that take less than a minute first."""


def _supernode(stage: Stage, name: str, wait_s: float) -> tuple[str, float, Outing, float, Member]:
    """What an immediate restart said, seconds from the kill to being online again, the run, its seconds, the member."""
    member = stage.members()[2]
    stage.ready({member.name: "supernode"})
    run = Outing(stage.federation, name)
    with run.hold(member) as hold:
        killed, before = time.monotonic(), len(member.supernode.text())
        member.supernode.kill()
        member.supernode.start()
        status = run.end(member.supernode, 60)
        codes = re.findall(r"exit code[:\s]+(\d+)", member.supernode.text()[before:], re.IGNORECASE)
        require(status, "a SuperNode was accepted at once after kill -9")
        hold.release()
        if wait_s:
            time.sleep(max(0.0, killed + wait_s - time.monotonic()))
        else:
            standing = flower_private.unlock(
                stage.federation.address,
                root_certificates=stage.federation.ca,
                key=member.key,
                insecure=False,
                node_id=int(member.node_id),
            )
            require(standing is flower_private.Standing.RELEASED, f"unlock found {standing}")
        member.supernode.start()
        stage.federation.wait_online(member.name)
        again_s = time.monotonic() - killed
    took_s = run.finish()
    require(not run.missing(), f"missing: {run.missing()}")
    return f"status {status}, exit code {', '.join(codes) or 'not told'}", again_s, run, took_s, member


def _leaves(stage: Stage, name: str, with_signal: signal.Signals) -> str:
    stage.ready()
    member = stage.members()[0]
    run = Outing(stage.federation, name)
    with run.hold(member):
        for part in (member.link, member.site):
            part.kill(with_signal)
            part.reap()
    took_s, missing = run.finish(), run.missing()
    lost = f"lost its connection and was not back within {90:g} s"
    wanted = {n: {member.name: lost if n == HELD_ROUND else "not connected"} for n in range(HELD_ROUND, ROUNDS + 1)}
    require(missing == wanted, f"missing: {missing}")
    gaps = run.gaps_s()
    require(max(gaps[HELD_ROUND:]) < 30, f"waited more than once: rounds took {gaps}")
    return (
        f"{member.name}'s link and site, {with_signal.name}, in round {HELD_ROUND}; {stage.took(took_s)}; rounds took "
        f"{stage.seconds(run)}; missing: {missing}"
    )


def _kill_serverapp(stage: Stage) -> float:
    """When it was done."""
    found = stage.federation.superexec.pids("flwr-serverapp")
    require(found, "no flwr-serverapp runs")
    stage.federation.superexec.kill(command="flwr-serverapp")
    return time.monotonic()


def _connected(member: Member) -> float:
    """Waits until the link that was just started says that it is connected: seconds."""
    before = member.link.text().count("connected to")
    return member.link.wait(lambda: member.link.text().count("connected to") > before, "connected", 90)


def _home(member: Member) -> Path:
    return member.site.user.home / "home"


def _sent(member: Member, run: Outing) -> list[Mapping[str, object]]:
    """The lines of a member's ledger about its answers in the round in which it was held."""
    lines = (_home(member) / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    about = {"run": run.name, "round": HELD_ROUND, "decision": "sent", "verb": "train"}
    return [one for one in map(json.loads, lines) if {key: one.get(key) for key in about} == about]


def _work(stage: Stage, member: Member, run: Outing) -> str:
    """How often a member answered the request that was disturbed, and how much it worked. Raises LoopbackError.

    An answer that is given again has the same bytes.
    """
    sent = _sent(member, run)
    require(len({(one["request"], one["reply"]) for one in sent}) == 1, f"{member.name}: answers differ: {sent}")
    more = run.calls(member) - stage.reference_calls[member.name]
    again = (
        f"{more} of {stage.reference_calls[member.name]} reward calls were repeated"
        if more
        else "nothing was worked out twice"
    )
    return f'{len(sent)} line{"s" if len(sent) > 1 else ""} "sent" in {member.name}\'s ledger, {again}'


def _said(part: Part, what: str) -> str:
    """The last line of a part's log that contains `what`."""
    found = [line for line in part.text().splitlines() if what in line]
    return found[-1] if found else "nothing"


__all__ = ["CASES", "LoopbackError"]

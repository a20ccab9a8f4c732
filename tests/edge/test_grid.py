"""Members behind a Grid: who is asked, what is asked again, and that each member has exactly one outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact.edge import grid as module
from fedpact.edge.grid import GridTransport
from fedpact.errors import TooFewRepliesError
from fedpact.runtime.transport import Failure
from fedpact_app.frames import MEANING, Code
from fedpact_app.records import MESSAGE_TYPE, carried, uncarried

FOREVER = NEVER = float("inf")
LATE = Failure("no reply within 600 s (federation.timeout_s)")


@pytest.fixture(autouse=True, scope="module")
def inside_a_server_app() -> Iterator[None]:
    """A Message takes its sender from the running app's identity; Flower sets it in a ServerApp, here we do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


@dataclass(frozen=True)
class Node:
    name: str | None
    id: int
    activated_at: str = "0"


@dataclass
class Site:
    """A member's link and service. Its link lives from each `(start, end)`; a request in hand at the end is lost."""

    name: str
    id: int
    lives: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, FOREVER)])
    work_s: float = 1.0
    crashes: bool = False
    """It goes without a word: it seems to be online, and takes nothing, for a minute more."""
    reply: Callable[[bytes], bytes | Code | Error | RecordDict] = lambda envelope: b"answer to " + envelope

    def node(self, now: float) -> Node | None:
        """What the SuperLink shows of it."""
        begun = [(start, end) for start, end in self.lives if start <= now]
        if not begun or now >= begun[-1][1] + 60 * self.crashes:
            return None
        return Node(self.name, self.id, str(begun[-1][0]))

    def answered_at(self, pushed: float) -> float:
        start, end = next(((start, end) for start, end in self.lives if end > pushed), (NEVER, NEVER))
        done = max(start, pushed) + self.work_s
        return done if done <= end else NEVER


class SuperLink(Grid):
    """Flower's grid with members behind it and a clock that only `sleep` moves."""

    def __init__(self, *sites: Site) -> None:
        self.sites, self.now = {site.id: site for site in sites}, 0.0
        self.pushed: list[tuple[float, str, bytes, float]] = []  # time, member, envelope, ttl
        self.messages: dict[str, tuple[float, Message]] = {}
        self.shown: list[Node] | None = None
        self.answers: list[tuple[str, bytes]] = []  # that a pull has brought
        self.pulls: list[float] = []
        self.looks = 0

    def transport(self, **options: Any) -> GridTransport:
        return GridTransport(self, self.nodes, clock=lambda: self.now, sleep=self.sleep, **options)

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def nodes(self) -> list[Node]:
        self.looks += 1
        if self.shown is not None:
            return self.shown
        return [node for site in self.sites.values() if (node := site.node(self.now))]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            key = f"m{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = key
            envelope, site = uncarried(message.content), self.sites[message.metadata.dst_node_id]
            assert isinstance(envelope, bytes)
            assert message.metadata.message_type == MESSAGE_TYPE
            self.pushed.append((self.now, site.name, envelope, message.metadata.ttl))
            self.messages[key] = (self.now, message)
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls.append(self.now)
        replies = []
        for key in list(message_ids):
            pushed, message = self.messages[key]  # whoever asks again after a reply is an error here
            site = self.sites[message.metadata.dst_node_id]
            if site.node(self.now) is None:
                replies.append(from_superlink(key, ErrorCode.NODE_UNAVAILABLE))
            elif site.answered_at(pushed) <= self.now:
                envelope = uncarried(message.content)
                assert isinstance(envelope, bytes)
                said = site.reply(envelope)
                if isinstance(said, bytes):
                    self.answers.append((site.name, said))
                content = carried(said) if isinstance(said, bytes | Code) else said
                replies.append(Message(content, reply_to=message))
            else:
                continue
            self.messages.pop(key, None)
        return reversed(replies)

    def holds_answer_to(self, envelope: bytes) -> bool:
        """Whether an answer to it lies here, to be pulled."""
        for pushed, message in self.messages.values():
            site = self.sites[message.metadata.dst_node_id]
            if uncarried(message.content) == envelope and site.node(self.now) and site.answered_at(pushed) <= self.now:
                return True
        return False

    def times_asked(self, name: str) -> int:
        return sum(member == name for _, member, _, _ in self.pushed)

    run = property(lambda self: None)

    def set_run(self, run: Any) -> None: ...
    def get_node_ids(self) -> Iterable[int]: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Message: ...
    def send_and_receive(self, messages: Iterable[Message], **kwargs: Any) -> Iterable[Message]: ...


def from_superlink(key: str, code: int) -> Message:
    """An error as the SuperLink makes it: from itself, to itself."""
    metadata = Metadata(1, "", 1, 1, key, "", 0.0, 1.0, "system")
    return Message(metadata=metadata, error=Error(code, "node 7 of /srv/secret is gone"))


def asked(link: SuperLink, *, timeout_s: float | None = 600.0, **options: Any) -> dict[str, bytes | Failure]:
    """The outcome of one exchange with all sites."""
    envelopes = {site.name: site.name.encode() for site in link.sites.values()}
    return outcome(link.transport(**options), envelopes, timeout_s)


def outcome(
    transport: GridTransport, envelopes: Mapping[str, bytes], timeout_s: float | None = 600.0
) -> dict[str, bytes | Failure]:
    answers = list(transport.exchange(envelopes, timeout_s=timeout_s))
    assert len(dict(answers)) == len(answers) == len(envelopes)
    return dict(answers)


def north(**changes: Any) -> Site:
    return Site("north", 7, **changes)


def south(**changes: Any) -> Site:
    return Site("south", 8, **changes)


# Who can be asked


def test_a_member_is_a_named_node_that_is_online() -> None:
    link = SuperLink()
    link.shown = [Node("south", 8), Node("north", 7), Node(None, 9), Node("", 10)]
    assert link.transport().clients() == ["north", "south"]


@pytest.mark.parametrize("name", ["all", "server", "../north", ".north", "no th", "north\n", "n" * 65])
def test_a_node_whose_name_cannot_be_a_members_is_ignored_and_said_so_once(name: str) -> None:
    link, said = SuperLink(), list[str]()
    link.shown = [Node("north", 7), Node(name, 8)]
    transport = link.transport(say=said.append)
    assert [transport.clients(), transport.clients()] == [["north"], ["north"]]
    assert len(said) == 1 and "cannot be a member's" in said[0]


def test_a_name_of_64_characters_is_a_members() -> None:
    link = SuperLink()
    link.shown = [Node("n" * 64, 7)]
    assert link.transport().clients() == ["n" * 64]


def test_of_two_nodes_with_one_name_neither_is_asked_and_it_is_said_once() -> None:
    link, said = SuperLink(north(), Site("north", 9)), list[str]()
    transport = link.transport(say=said.append)
    assert outcome(transport, {"north": b"?"}) == {"north": Failure("not connected")}
    assert link.pushed == []
    assert len(said) == 1 and said[0].startswith("north: 2 nodes")


def test_waiting_ends_with_the_last_member_that_is_needed() -> None:
    link = SuperLink(north(), south(lives=[(5.0, FOREVER)]), Site("west", 9, lives=[(50.0, FOREVER)]))
    assert link.transport().wait_for(2, 60) == ["north", "south"]
    assert 5 <= link.now <= 6


def test_waiting_for_too_few_says_who_is_there() -> None:
    link = SuperLink(north())
    with pytest.raises(TooFewRepliesError, match=r"1 of 3 members connected within 30 s \(north\)"):
        link.transport().wait_for(3, 30)
    assert link.now == 30


def test_waiting_for_certain_members_does_not_count_strangers() -> None:
    link = SuperLink(north(), Site("stranger", 9), south(lives=[(20.0, FOREVER)]))
    assert link.transport().wait_for(2, 90, among=["north", "south"]) == ["north", "south"]
    assert 20 <= link.now <= 21


def test_waiting_for_certain_members_ends_without_them_and_names_those_who_came() -> None:
    link = SuperLink(north(), Site("stranger", 9))
    with pytest.raises(TooFewRepliesError, match=r"1 of 2 members connected within 90 s \(north\)"):
        link.transport().wait_for(2, 90, among=["north", "south"])
    assert link.now == 90


# One exchange


def test_each_member_gets_its_own_envelope_and_its_answer_is_yielded() -> None:
    link = SuperLink(north(), south())
    assert asked(link) == {"north": b"answer to north", "south": b"answer to south"}
    assert [(member, envelope) for _, member, envelope, _ in link.pushed] == [("north", b"north"), ("south", b"south")]


def test_answers_are_yielded_as_they_arrive() -> None:
    link = SuperLink(north(work_s=50), south(work_s=2))
    answers = link.transport().exchange({"north": b"n", "south": b"s"}, timeout_s=600)
    assert next(answers) == ("south", b"answer to s")
    assert link.now < 3
    assert next(answers) == ("north", b"answer to n")
    assert 50 <= link.now < 50.5
    assert list(answers) == []


def test_nobody_is_asked_about_nothing() -> None:
    link = SuperLink(north())
    assert list(link.transport().exchange({}, timeout_s=None)) == []
    assert (link.pushed, link.now) == ([], 0.0)


def test_a_slow_member_fails_at_the_end_of_the_exchange_and_the_others_count() -> None:
    link = SuperLink(north(), south(work_s=601))
    assert asked(link) == {"north": b"answer to north", "south": LATE}
    assert link.now == pytest.approx(600)


def test_without_a_timeout_a_slow_member_is_waited_for() -> None:
    assert asked(SuperLink(north(work_s=5000)), timeout_s=None, poll_s=10) == {"north": b"answer to north"}


def test_an_answer_in_time_counts_though_the_caller_took_longer_over_another() -> None:
    link = SuperLink(north(), south(work_s=9))
    answers = link.transport().exchange({"north": b"n", "south": b"s"}, timeout_s=10)
    assert next(answers)[0] == "north"
    link.now = 100.0  # admitting it took so long
    assert list(answers) == [("south", b"answer to s")]


def test_flower_keeps_a_message_a_little_longer_than_the_exchange_lasts() -> None:
    link = SuperLink(north())
    asked(link, timeout_s=600)
    asked(link, timeout_s=None)
    assert [ttl for *_, ttl in link.pushed] == [660, 12 * 3600]


def test_a_late_answer_to_an_earlier_exchange_is_nobodys() -> None:
    link = SuperLink(north(work_s=700))
    transport = link.transport()
    assert outcome(transport, {"north": b"first"}) == {"north": LATE}
    link.sites[7].work_s = 110  # both answers lie at the SuperLink 10 s later
    assert outcome(transport, {"north": b"second"}) == {"north": b"answer to second"}


def test_an_answer_that_nobody_asked_for_is_ignored() -> None:
    link = SuperLink(north())
    pull = link.pull_messages
    link.pull_messages = lambda ids: [from_superlink("other", 2), *(got := list(pull(ids))), *got]  # type: ignore[method-assign]
    assert asked(link) == {"north": b"answer to north"}


def test_the_superlink_is_polled_five_times_a_second_and_asked_for_its_nodes_once() -> None:
    link = SuperLink(north(work_s=100))
    asked(link)
    assert 490 < len(link.pulls) < 510
    assert 80 < link.looks < 110


# What failures say


@pytest.mark.parametrize("code", list(Code))
def test_a_members_code_becomes_its_meaning(code: Code) -> None:
    refused = code in (Code.REFUSED, Code.CONTRACT)
    assert asked(SuperLink(north(reply=lambda _: code))) == {"north": Failure(MEANING[code], refused)}


def test_what_goes_wrong_on_the_way_is_no_refusal_of_the_member() -> None:
    late, left = SuperLink(north(work_s=601)), SuperLink(north(lives=[(0.0, 0.5)]))
    broken = SuperLink(north(reply=lambda _: Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "refused")))
    found = [asked(link)["north"] for link in (late, left, broken)]
    assert [isinstance(one, Failure) and one.refused is False for one in found] == [True] * 3


def test_a_reply_of_another_shape_is_malformed() -> None:
    reply = RecordDict({"fedpact": ConfigRecord({"else": "x"})})
    assert asked(SuperLink(north(reply=lambda _: reply))) == {"north": Failure(MEANING[Code.MALFORMED])}


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7, 8, 99])
def test_an_errors_own_text_is_never_shown(code: int) -> None:
    said = asked(SuperLink(north(reply=lambda _: Error(code, "ValueError: 'patient 12'"))))["north"]
    assert isinstance(said, Failure) and said.reason and "patient" not in said.reason


def test_our_numbers_of_errors_are_flowers() -> None:
    codes = {value for name, value in vars(ErrorCode).items() if name.isupper()}
    assert codes == {ErrorCode.UNKNOWN} | module._LOST | module._ERRORS.keys()
    lost = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
    assert lost == module._LOST
    assert "failed" in module._ERRORS[ErrorCode.CLIENT_APP_RAISED_EXCEPTION]
    assert "died" in module._ERRORS[ErrorCode.CLIENT_APP_CRASHED]


def test_an_envelope_that_is_too_large_is_not_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 5)
    link = SuperLink(north(), Site("northeast", 9))
    assert asked(link) == {
        "north": b"answer to north",
        "northeast": Failure("request: found 9 bytes, expected at most 5"),
    }
    assert link.times_asked("northeast") == 0


@pytest.mark.parametrize("ids", [[], [""], [None]])
def test_a_member_whose_message_is_not_taken_fails_and_the_others_go_on(ids: list[Any]) -> None:
    link = SuperLink(north(), south())
    push = link.push_messages
    link.push_messages = lambda messages: ids if messages[0].metadata.dst_node_id == 7 else push(messages)  # type: ignore
    failure = Failure("could not be asked: the SuperLink did not take the message")
    assert asked(link) == {"north": failure, "south": b"answer to south"}


def test_a_push_that_raises_fails_for_its_member_alone_and_shows_no_text() -> None:
    link = SuperLink(north(), south())
    push = link.push_messages

    def broken(messages: Any) -> Iterable[str]:
        if messages[0].metadata.dst_node_id == 7:
            raise OSError("https://secret:8000")
        return push(messages)

    link.push_messages = broken  # type: ignore[method-assign]
    failure = Failure("could not be asked: Flower raised OSError")
    assert asked(link) == {"north": failure, "south": b"answer to south"}


def test_a_push_during_which_the_superlink_falls_is_made_again() -> None:
    link = SuperLink(north(), south())
    push, falls = link.push_messages, iter([True, True])

    def broken(messages: Any) -> Iterable[str]:
        if messages[0].metadata.dst_node_id == 7 and next(falls, False):
            raise ConnectionError("half of it is there")
        return push(messages)

    link.push_messages = broken  # type: ignore[method-assign]
    assert asked(link) == {"north": b"answer to north", "south": b"answer to south"}


class StoppedError(BaseException):
    """Flower's exception for a run that was stopped is no Exception either."""


@pytest.mark.parametrize("where", ["push_messages", "pull_messages"])
def test_the_end_of_the_run_is_not_a_members_failure(where: str) -> None:
    link = SuperLink(north())

    def stopped(_: Any) -> Any:
        raise StoppedError

    setattr(link, where, stopped)
    with pytest.raises(StoppedError):
        asked(link)


def test_a_pull_that_raises_is_not_hidden() -> None:
    link = SuperLink(north())

    def broken(_: Any) -> Any:
        raise OSError("disk full")

    link.pull_messages = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        asked(link)


# Losses


def test_a_request_lost_in_a_restart_is_pushed_again_with_the_same_bytes() -> None:
    link = SuperLink(north(work_s=10, lives=[(0, 5), (6, FOREVER)], crashes=True))
    assert asked(link) == {"north": b"answer to north"}
    assert [(member, envelope) for _, member, envelope, _ in link.pushed] == [("north", b"north")] * 2
    assert 16 <= link.now < 18


def test_a_node_that_comes_back_under_another_id_is_asked_there() -> None:
    link = SuperLink(north(lives=[(0, 5)], work_s=10), Site("north", 9, lives=[(8, FOREVER)]))
    assert outcome(link.transport(), {"north": b"n"}) == {"north": b"answer to n"}
    assert link.times_asked("north") == 2


def test_an_unbroken_node_is_asked_once() -> None:
    link = SuperLink(north(work_s=500))
    asked(link)
    assert link.times_asked("north") == 1


@pytest.mark.parametrize("crashes", [True, False])
def test_a_member_that_is_gone_for_a_minute_is_asked_again_when_it_is_back(crashes: bool) -> None:
    link = SuperLink(north(work_s=10, lives=[(0, 5), (70, FOREVER)], crashes=crashes))
    assert asked(link) == {"north": b"answer to north"}
    assert 80 <= link.now < 82


def test_a_member_that_stays_away_has_ninety_seconds() -> None:
    link = SuperLink(north(work_s=10, lives=[(0, 5)]), south())
    failure = Failure("lost its connection and was not back within 90 s")
    assert asked(link) == {"north": failure, "south": b"answer to south"}
    assert 95 <= link.now < 97


@pytest.mark.parametrize("code", [3, 4])
def test_a_reply_that_was_lost_on_its_way_is_asked_for_again(code: int) -> None:
    link, replies = SuperLink(north()), list[Any]([Error(code, "gone")])
    link.sites[7].reply = lambda _: replies.pop() if replies else b"again"
    assert asked(link) == {"north": b"again"}
    assert link.times_asked("north") == 2


def test_a_request_whose_reply_is_always_lost_is_given_up_after_eight_times() -> None:
    link = SuperLink(north(work_s=0.1, reply=lambda _: Error(4, "gone")))
    assert asked(link, timeout_s=None) == {"north": Failure("lost its connection 8 times while it was asked")}
    assert link.times_asked("north") == 8


def test_an_answer_beats_a_failure_that_arrives_with_it() -> None:
    """The first message waited at the SuperLink through the restart, so that both were answered."""
    said = [Code.FAILED, b"answer"]  # the newest message's reply is read last
    link = SuperLink(north(lives=[(0, 0.3), (0.5, FOREVER)], crashes=True, work_s=30, reply=lambda _: said.pop()))
    link.sites[7].answered_at = lambda pushed: 31.0  # type: ignore[method-assign]
    assert asked(link) == {"north": b"answer"}


def test_an_old_messages_failure_does_not_count_while_the_newest_is_worked_on() -> None:
    site = north(lives=[(0, 0.3), (0.5, FOREVER)], crashes=True, reply=lambda _: Code.UNAVAILABLE)
    link = SuperLink(site)
    site.answered_at = lambda pushed: 20.0 if pushed < 0.5 else 30.0  # type: ignore[method-assign]
    answers = link.transport().exchange({"north": b"n"}, timeout_s=None)
    assert next(answers) == ("north", Failure(MEANING[Code.UNAVAILABLE]))
    assert link.now >= 30


def test_the_loss_of_an_old_message_is_no_reason_to_push_again() -> None:
    said = [b"answer", Error(4, "gone")]
    site = north(lives=[(0, 0.3), (0.5, FOREVER)], crashes=True, reply=lambda _: said.pop())
    link = SuperLink(site)
    site.answered_at = lambda pushed: 20.0 if pushed < 0.5 else 30.0  # type: ignore[method-assign]
    assert asked(link) == {"north": b"answer"}
    assert link.times_asked("north") == 2


# Members that are away when an exchange begins


def test_a_member_that_is_away_at_the_start_is_waited_for() -> None:
    link = SuperLink(north(lives=[(60, FOREVER)]), south())
    assert asked(link) == {"north": b"answer to north", "south": b"answer to south"}
    assert 61 <= link.now < 63


def test_a_member_that_never_comes_is_waited_for_once() -> None:
    link = SuperLink(north(lives=[]))
    transport = link.transport()
    assert outcome(transport, {"north": b"1"}) == {"north": Failure("not connected")}
    assert 90 <= link.now < 92
    before = link.now
    assert outcome(transport, {"north": b"2"}) == {"north": Failure("not connected")}
    assert link.now == before


def test_the_wait_begins_when_the_member_is_first_missed() -> None:
    link = SuperLink(north(lives=[(0, 10)]))
    transport = link.transport()
    assert transport.clients() == ["north"]
    link.now = 50.0
    assert transport.clients() == []
    link.now = 120.0
    assert outcome(transport, {"north": b"n"}) == {"north": Failure("not connected")}
    assert 140 <= link.now < 142


def test_a_member_that_came_back_has_the_whole_time_again() -> None:
    link = SuperLink(north(lives=[(0, 10), (60, 100), (170, FOREVER)], work_s=200))
    assert asked(link) == {"north": b"answer to north"}


def test_the_end_of_the_exchange_comes_before_the_end_of_the_wait() -> None:
    link = SuperLink(north(lives=[]))
    assert asked(link, timeout_s=20) == {"north": Failure("no reply within 20 s (federation.timeout_s)")}
    assert link.now == pytest.approx(20)


# Any interleaving


@st.composite
def sites(draw: st.DrawFn, gaps: st.SearchStrategy[int], last: st.SearchStrategy[float]) -> list[Site]:
    """One to three sites whose links restart up to four times, at times that are no multiple of a poll."""
    made = []
    for number in range(draw(st.integers(1, 3))):
        times = [draw(gaps) + 0.01]
        for _ in range(draw(st.integers(0, 4))):
            times += [draw(st.integers(1, 30)) + 0.03, draw(gaps) + 0.05]
        starts_and_ends = [*accumulate(times), draw(last)]
        lives = list(zip(starts_and_ends[::2], starts_and_ends[1::2], strict=True))
        lives[-1] = (lives[-1][0], max(lives[-1]))
        work = draw(st.integers(0, 25)) + 0.5
        made.append(Site(f"n{number}", number + 2, lives, work, crashes=draw(st.booleans())))
    return made


def outcomes(link: SuperLink, timeout_s: float, count: int) -> list[bytes | Failure]:
    """Of some exchanges, one after another. Checks that a member has one in each, and fails only without an answer."""
    transport, found = link.transport(), list[bytes | Failure]()
    for number in range(count):
        envelopes = {site.name: f"{site.name}/{number}".encode() for site in link.sites.values()}
        waiting, end = dict(envelopes), link.now + timeout_s
        for client, answer in transport.exchange(envelopes, timeout_s=timeout_s):
            envelope = waiting.pop(client)
            right = b"answer to " + envelope
            if isinstance(answer, Failure):
                assert (client, right) not in link.answers and not link.holds_answer_to(envelope)
            else:
                assert answer == right
            found.append(answer)
        assert not waiting
        assert link.now <= end + 0.01
    return found


@settings(deadline=None, max_examples=60)
@given(sites(st.integers(0, 200), st.floats(0, 400)), st.integers(5, 300))
def test_whatever_is_lost_each_member_has_one_outcome_and_no_answer_is_dropped(
    made: list[Site], timeout_s: int
) -> None:
    for answer in outcomes(SuperLink(*made), timeout_s, 3):
        if isinstance(answer, Failure):
            assert answer.reason.startswith(("no reply", "not connected", "lost its connection"))


@settings(deadline=None, max_examples=60)
@given(sites(st.integers(0, 80), st.just(FOREVER)))
def test_members_that_come_back_in_time_all_answer(made: list[Site]) -> None:
    link = SuperLink(*made)
    assert all(isinstance(answer, bytes) for answer in outcomes(link, 2000, 1))
    assert link.now <= max(site.lives[-1][0] for site in made) + 30
    assert all(link.times_asked(site.name) <= len(site.lives) for site in made)


class Poisoned(SuperLink):
    """Flower's grid where one member's replies cannot be put together; what came in the same pull is lost with it."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        evil = {key for key, (_, message) in self.messages.items() if message.metadata.dst_node_id == 3}
        replies = list(super().pull_messages(message_ids))
        if any(reply.metadata.reply_to_message_id in evil for reply in replies):
            self.answers.clear()
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        return replies


def test_a_reply_that_flower_cannot_put_together_costs_its_sender_alone() -> None:
    link = Poisoned(Site("a", 1), Site("b", 2, work_s=9.0), Site("evil", 3))
    found = dict(link.transport().exchange(dict.fromkeys(("a", "b", "evil"), b"x"), timeout_s=600))
    assert found == {"a": b"answer to x", "b": b"answer to x", "evil": Failure("sent what Flower cannot read")}
    assert max(sum(name == one for _, one, _, _ in link.pushed) for name in ("a", "b", "evil")) == 2

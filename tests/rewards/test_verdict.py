"""The candidate has no say in its grade: each attack works where tests and candidate share a process, and not here."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpact.errors import RewardError
from fedpact.rewards.outcome import Outcome
from fedpact.rewards.sandbox.grading import Grader
from fedpact.rewards.sandbox.jail import Limits, available_jails
from fedpact.rewards.sandbox.task import Task, free_names
from fedpact.rewards.sandbox.unconfined import Unconfined
from fedpact.rewards.sandbox.verdict import ATTACKS, RIGHT, Attack, passes, stopped, verdict_attacks
from fedpact.rewards.sandbox.wire import MAX_DEPTH, NotPlainError, TooLargeError, decode, encode

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple),
    max_leaves=8,
)
KEYS = st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    """Without a jail: what stops an attack on the verdict here is the protocol alone."""
    found = Grader(Unconfined(), Limits(seconds=5.0, cpu_seconds=6))
    yield found
    found.close()


def outcome(grader: Grader, program: str, *tests: str, **more: str) -> Outcome:
    return grader.grades([(program, Task(tests, **more))])[0].outcome


def exit_code_reward(program: str, tests: str) -> bool:
    """What many graders do: append the tests, and look at the exit code."""
    command = [sys.executable, "-I", "-c", f"{program}\n{tests}"]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def nonce_reward(program: str, tests: str) -> bool:
    """Better: the tests run in the candidate's process, which must print a secret at the end."""
    host = (
        "import sys\nspace = {}\n"
        "def grade(program, tests, nonce):\n    exec(program, space)\n    exec(tests, space)\n    print(nonce)\n"
        "grade(*eval(sys.stdin.read()))\n"
    )
    nonce = "nonce-" + secrets.token_hex(16)
    given = repr((program, tests, nonce))
    command = [sys.executable, "-I", "-c", host]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)
    return nonce in done.stdout


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_no_attack_on_the_verdict_is_rewarded_or_excused(attack: Attack, grader: Grader) -> None:
    assert stopped(attack, grader)


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.classic], ids=lambda attack: attack.name)
def test_a_classic_attack_is_rewarded_where_the_tests_share_its_process(attack: Attack) -> None:
    token = secrets.token_hex(16)
    program, tests = (text.replace("TOKEN", token) for text in (attack.program, "\n".join(attack.tests)))
    assert nonce_reward(program, tests) or exit_code_reward(program, tests)


@pytest.mark.parametrize("reward", [exit_code_reward, nonce_reward])
def test_the_graders_that_fall_for_attacks_are_no_straw_men(reward: Any) -> None:
    assert reward(RIGHT.program, RIGHT.tests[0])
    assert not reward("def answer(x):\n    return x\n", RIGHT.tests[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bubblewrap", "sandlock"])
def test_every_jail_that_is_installed_stops_every_attack_and_passes_a_right_program(name: str) -> None:
    jails = {jail.name: jail for jail in available_jails()}
    if name not in jails:
        pytest.skip(f"{name} is not installed")
    lines = verdict_attacks(jails[name])
    assert len(lines) == len(ATTACKS) + 1
    assert [line for line, held in lines if not held] == []


def test_a_jail_in_which_nothing_runs_stops_no_attack() -> None:
    class Dead(Unconfined):
        def start(self, program: str, limits: Limits) -> Any:
            return super().start("pass", limits)

    grader = Grader(Dead(), Limits())
    assert not stopped(ATTACKS[0], grader)
    assert not passes(grader)
    assert grader.num_processes == 0


def test_what_a_candidate_learned_is_gone_with_it(grader: Grader) -> None:
    """Two candidates never share a process: the second finds no mark of the first in any module."""
    leave = "import sys\nsys.mark = 1\ndef answer(x):\n    return 5\n"
    look = "import sys\ndef answer(x):\n    return 5 if hasattr(sys, 'mark') else 6\n"
    assert outcome(grader, leave, "assert answer(1) == 5") is Outcome.PASS
    assert outcome(grader, look, "assert answer(1) == 5") is Outcome.FAIL


def test_tests_start_afresh_with_every_candidate(grader: Grader) -> None:
    tests = "try:\n    count\nexcept NameError:\n    count = 0\ncount += 1\nassert answer(count) == 1"
    for program in ("def answer(x):\n    return x", "def answer(x):\n    return x * 1"):
        assert outcome(grader, program, tests) is Outcome.PASS


def test_a_candidate_that_burns_its_time_while_it_is_loaded_is_not_excused() -> None:
    hasty = Grader(Unconfined(), Limits(seconds=0.3))
    try:
        burn = "import time\ntime.sleep(0.29)\ndef answer(x):\n    return x"
        assert outcome(hasty, burn, "assert answer(1) == 2") in (Outcome.LIMIT, Outcome.FAIL)
        assert outcome(hasty, "while True:\n    pass", "assert answer(1) == 2") is Outcome.LIMIT
    finally:
        hasty.close()


def test_leaving_is_no_exception_that_tests_can_swallow() -> None:
    grader = Grader(Unconfined(), Limits(), go_on=True)
    tests = "try:\n    answer(1)\nexcept BaseException:\n    pass"
    leaves, raises = "import os\ndef answer(x):\n    os._exit(0)", "def answer(x):\n    raise SystemExit"
    grades = grader.grades([(leaves, Task((tests,))), (raises, Task((tests,)))])
    grader.close()
    assert [(grade.outcome, grade.share) for grade in grades] == [(Outcome.FAIL, 0.0), (Outcome.PASS, 1.0)]


def test_a_value_that_cannot_be_sent_back_is_no_excuse(grader: Grader) -> None:
    nested = f"def answer(x):\n    y = 1\n    for _ in range({MAX_DEPTH - 1}):\n        y = [y]\n    return y"
    assert outcome(grader, nested, "assert answer([answer(1)]) == 1") is Outcome.FAIL


def test_a_reply_that_was_written_before_its_request_is_none(grader: Grader) -> None:
    frame = "lambda payload: (len(payload) + 16).to_bytes(4, 'big') + bytes(16) + payload"
    ahead = f"import os\nframe = {frame}\n"
    ahead += "for number in (3, 4):\n    try:\n        os.write(number, frame(b'vt2:nn') + frame(b'vt2:i1;n'))\n"
    ahead += "    except OSError:\n        pass\ndef answer(x):\n    return 2\n"
    assert outcome(grader, ahead, "assert answer(1) == 1") is Outcome.FAIL


def test_values_that_keep_the_tests_busy_count_against_the_candidate() -> None:
    hasty = Grader(Unconfined(), Limits(seconds=0.5))
    try:
        program = "def answer(x):\n    return 1 << 60"
        assert outcome(hasty, program, "assert sum(range(answer(1))) == 0") is Outcome.LIMIT
        assert outcome(hasty, "def answer(x):\n    return 1", "assert sum(range(answer(1))) == 0") is Outcome.PASS
    finally:
        hasty.close()


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def answer(x):\n    return [3, 1]", "assert answer(0) == [3, 1]"),
        ("def answer(x):\n    return 2.0", "assert answer(0) == 2"),
        ("import collections as c\ndef answer(x):\n    return c.Counter(x)", "assert answer('aa') == {'a': 2}"),
        ("def answer(x):\n    x.sort()", "x = [2, 1]\nanswer(x)\nassert x == [1, 2]"),
        ("def answer(x):\n    x['a'] = 1", "x = {}\nanswer(x)\nassert x == {'a': 1}"),
        ("def answer(x):\n    raise ValueError(x)", "try:\n    assert answer(1)\nexcept ValueError:\n    pass"),
        ("class E(KeyError):\n    pass\ndef answer(x):\n    raise E", "try:\n    answer(1)\nexcept KeyError:\n    0"),
        ("def answer(x, *, by=1):\n    return x * by", "assert answer(2, by=3) == 6"),
        ("def answer(x):\n    return x and [answer(x[1:])]", "assert answer('ab') == [['']]"),
        ("def answer(x, kind):\n    return [y for y in x if type(y) is kind]", "assert answer([1, 'a'], int) == [1]"),
        ("def answer(x):\n    print('noise')\n    return x", "print('tests too')\nassert answer(1) == 1"),
        (
            "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n"
            "        self.items.append(x)\n    def pop(self):\n        return self.items.pop()",
            "s = Stack()\ns.push(4)\nassert s.items == [4] and s.pop() == 4",
        ),
        (
            "class Node:\n    def __init__(self, x):\n        self.x, self.next = x, None\n"
            "def total(node):\n    return node.x + (total(node.next) if node.next else 0)",
            "a = Node(1)\na.next = Node(2)\nassert total(a) == 3 and a.next.x == 2",
        ),
    ],
)  # fmt: skip
def test_tests_run_unchanged(program: str, test: str, grader: Grader) -> None:
    assert outcome(grader, program, test) is Outcome.PASS


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def answer(x):\n    return {1: 'a'}.values()", "assert answer(0) == ['a']"),
        ("def answer(x):\n    raise TypeError", "try:\n    answer(1)\nexcept ValueError:\n    pass"),
        ("answer = 5", "assert answer(1) == 5"),
        ("", "assert answer(1) is None"),
        ("def answer(x:", "assert answer(1) is None"),
        ("class Answer:\n    def __len__(self):\n        return 2", "assert len(Answer()) == 2"),
        ("class Answer:\n    def __eq__(self, other):\n        return True", "assert Answer() == 2"),
        ("class Answer:\n    __hidden__ = 2", "assert Answer().__hidden__ == 2"),
    ],
)
def test_what_a_candidate_may_not_decide_fails(program: str, test: str, grader: Grader) -> None:
    assert outcome(grader, program, test) is Outcome.FAIL


@pytest.mark.parametrize(
    "program",
    ["\ud800", "\0", "\ufeff)", "(" * 100_000, "-" * 100_000 + "1", "x = " + "[" * 90 + "]" * 90 + ".x", "\r\n\t"],
)
def test_text_that_is_no_program_fails(program: str, grader: Grader) -> None:
    assert outcome(grader, program, "assert answer(1) == 1") in (Outcome.FAIL, Outcome.LIMIT)


@pytest.mark.parametrize(
    "tests",
    [
        "assert answer(lambda: 1) == 1",  # a function cannot cross
        "assert answer(1) == 1\nassert answer(lambda: 1) == 1",
        "assert {}[1] == answer(1)",  # fails before it asks
        "def check(candidate):\n    assert candidate(1) == 1",  # is never called
        "import os\nos._exit(0)\nanswer(1)",
    ],
)
def test_tests_that_fail_by_themselves_are_an_error_of_ours(tests: str, grader: Grader) -> None:
    entry_point = "" if "check" in tests else "answer"
    if not entry_point:
        tests += "\nlater = lambda: answer(1)"
    assert outcome(grader, "def answer(x):\n    return x", tests, entry_point=entry_point) is Outcome.ERROR


@pytest.mark.parametrize(
    ("tests", "names", "modules"),
    [
        (("assert add(1, 2) == 3",), ["add"], []),
        (("assert sorted(order([2, 1])) == [1, 2]",), ["order"], []),
        (("assert sum(10, 15) == 6", "assert sum(4, 6) == 3"), ["sum"], []),
        (("import math\nassert math.isclose(root(4), 2)",), ["root"], []),
        (("assert size((1,)) == sys.getsizeof((1,))",), ["size"], ["sys"]),
        (("xs = [1]\nassert all(half(x) for x in xs)",), ["half"], []),
        (("assert top(Pair(1, 2)) == 2",), ["Pair", "top"], []),
    ],
)
def test_the_tests_alone_say_which_names_are_the_candidates(
    tests: tuple[str, ...], names: list[str], modules: list[str]
) -> None:
    assert free_names(Task(tests)) == (names, modules)


def test_the_prompts_helpers_are_the_tests_own() -> None:
    prompt = "def helper(x):\n    return x\n\ndef answer(x):\n"
    task = Task(("def check(candidate):\n    assert candidate(1) == helper(1)",), "answer", prompt)
    assert free_names(task) == (["answer"], [])


@pytest.mark.parametrize("tests", [("assert True",), ("assert len([]) == sum([])",), ("assert (",)])
def test_tests_that_name_no_function_are_refused(tests: tuple[str, ...]) -> None:
    with pytest.raises(RewardError, match=r"^tests: "):
        free_names(Task(tests))


@settings(max_examples=50)
@given(PLAIN | st.dictionaries(KEYS, PLAIN) | st.sets(KEYS) | st.frozensets(KEYS))
def test_plain_data_cross_unchanged(value: Any) -> None:
    back = decode(encode(value))
    assert repr(back) == repr(value) or back == value
    assert type(back) is type(value)


def test_mutated_bytes_are_refused_or_are_what_their_value_is_written_as() -> None:
    raw = encode([None, True, -26, 1.5, 2j, "aé", b"\x00", (1, "x"), {"k": [1], 7: ()}, {}, -0.0, float("nan")])
    taken = 0
    for at in range(len(raw)):
        for byte in b"0123456789abcdefgiklnoprstuvxyz:;-+_. \x00\xff":
            changed = raw[:at] + bytes([byte]) + raw[at + 1 :]
            try:
                value = decode(changed)
            except NotPlainError:
                continue
            taken += 1
            assert encode(value) == changed or b"u" in changed or b"v" in changed  # sets have no order
    assert taken > len(raw)


@given(st.binary(max_size=60))
@example(b"l3:nn")
@example(b"i0x1;")
@example(b"i1_0;")
@example(b"i+1;")
@example(b"i01;")
@example(b"l01:n")
@example(b"l-1:")
@example(b"l9999999999:")
@example(b"d2:i1;ni1;n")
@example(b"d1:l0:n")
@example(b"u1:l0:")
@example(b"r1.0;")
@example(b"rinfinity;")
@example(b"s1:\xff")
@example(b"o0;")
@example(b"kint;")
@example(b"nn")
@example(b"")
def test_other_bytes_are_refused(raw: bytes) -> None:
    try:
        value = decode(raw)
    except NotPlainError:
        return
    assert b"u" in raw or b"v" in raw or encode(value) == raw


@pytest.mark.parametrize("raw", [b"l3:nn", b"i0x1;", b"l01:n", b"d2:i1;ni1;n", b"r1.0;", b"o0;", b"kint;", b"nn", b""])
def test_there_is_one_way_to_write_a_value_and_no_object_among_them(raw: bytes) -> None:
    with pytest.raises(NotPlainError):
        decode(raw)


def test_depth_and_size_are_bounded_both_ways() -> None:
    deep: Any = 0
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(TooLargeError):
        encode(deep)
    with pytest.raises(TooLargeError):
        encode("x" * 100, 100)
    with pytest.raises(NotPlainError):
        decode(b"l1:" * (MAX_DEPTH + 1) + b"n")
    assert decode(encode(deep[0])) == deep[0]


@pytest.mark.parametrize("value", [object(), len, iter([1]), range(3), lambda: 1, [{"a": object()}]])
def test_what_is_no_plain_data_is_not_sent(value: Any) -> None:
    with pytest.raises(NotPlainError):
        encode(value)


def test_subclasses_arrive_as_what_they_are_a_kind_of() -> None:
    class Word(str):
        def __str__(self) -> str:
            return "another"

    class Number(int):
        pass

    back = decode(encode([Word("one"), Number(7)]))
    assert back == ["one", 7]
    assert [type(part) for part in back] == [str, int]

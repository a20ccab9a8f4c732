"""The reward for programs: what it reads, what it pays, and what it does when something of ours fails."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main as benchmark
from fedpact.errors import ConfigError, RewardError
from fedpact.rewards import code
from fedpact.rewards.code import CodeTests, program_of, task_of
from fedpact.rewards.load import RewardSet, load_reward
from fedpact.rewards.outcome import Outcome
from fedpact.rewards.sandbox import programs as confined_programs
from fedpact.rewards.sandbox.grading import Grader
from fedpact.rewards.sandbox.jail import Limits, available_jails, chosen_jail
from fedpact.rewards.sandbox.pool import Pool
from fedpact.rewards.sandbox.task import Task
from fedpact.rewards.sandbox.unconfined import Unconfined
from fedpact.types import Prompts

ROOT = Path(__file__).parents[2]
EXCERPTS = ROOT / "tests/data"
SHARED = ROOT.parent / "shared/data"
ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(0, 0) == 0", "assert add(2, 2) == 4"]


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        pytest.skip(f"no {path.name} beside this clone")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reward(**settings: Any) -> CodeTests:
    return CodeTests(**{"sandbox": "unsafe-none", "workers": 1, **settings})


@pytest.fixture(scope="module")
def plain() -> Iterator[CodeTests]:
    found = reward()
    yield found
    found.close()


def fenced(program: str) -> str:
    return f"I add them up.\n```python\n{program}\n```\nThat is all."


def humaneval(found: CodeTests, tasks: list[dict[str, Any]], programs: list[str]) -> list[float | None]:
    columns = {"tests": "test", "entry_point": "entry_point", "prompt_code": "prompt"}
    return found(programs, **{name: [task[key] for task in tasks] for name, key in columns.items()})


def mbpp(found: CodeTests, tasks: list[dict[str, Any]], programs: list[str]) -> list[float | None]:
    setup = [task["test_setup_code"] for task in tasks]
    return found(programs, tests=[task["test_list"] for task in tasks], test_setup_code=setup)


def test_a_right_program_gets_one_and_a_wrong_one_nothing(plain: CodeTests) -> None:
    wrong = "def add(a, b):\n    return a if b == 0 else a - b"
    assert plain([fenced(ADD), fenced(wrong), ADD, "I cannot."], tests=[TESTS] * 4) == [1.0, 0.0, 1.0, 0.0]


def test_a_script_of_tests_counts_as_one(plain: CodeTests) -> None:
    script = "\n".join(TESTS)
    assert plain([ADD, "def add(a, b):\n    return 3"], tests=[script] * 2) == [1.0, 0.0]


def test_partial_credit_is_the_share_of_tests_that_pass() -> None:
    found = reward(partial=True)
    texts = [
        "def add(a, b):\n    return 3",
        "def add(a, b):\n    if a:\n        return a + b\n    raise SystemExit",
        ADD,
    ]
    assert found(texts, tests=[TESTS] * 3) == [0.25, 0.75, 1.0]
    leaves = "import os\ndef add(a, b):\n    return a + b if a else os._exit(0)"
    assert found([leaves], tests=[TESTS]) == [0.5]
    found.close()


def test_rows_without_tests_get_no_signal(plain: CodeTests) -> None:
    assert plain([ADD] * 4, tests=[None, TESTS, [], ""]) == [None, 1.0, None, None]


def test_chat_completions_are_read(plain: CodeTests) -> None:
    assert plain([[{"role": "assistant", "content": fenced(ADD)}]], tests=[TESTS]) == [1.0]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\nor\n```python\nb\n```", "b"),
        ("```py\r\na\r\n```", "a\r"),
        ("```Python3\na", "a"),
        ("    return 1", "    return 1"),
        ("```text\na\n```", "```text\na\n```"),
    ],
)
def test_the_program_is_in_the_last_fence_or_everywhere(text: str, program: str) -> None:
    assert program_of(text) == program


@pytest.mark.parametrize(
    "text", ["    return helper(a) + b", fenced("    return helper(a) + b"), "def add(a, b):\n    return helper(a) + b"]
)
def test_a_body_and_a_whole_function_both_go_on_from_the_prompt(text: str, plain: CodeTests) -> None:
    prompt = 'def helper(x):\n    return x\n\ndef add(a, b):\n    """Adds."""\n'
    check = "def check(candidate):\n    assert candidate(1, 2) == helper(3)"
    assert plain([text], tests=[check], entry_point=["add"], prompt_code=[prompt]) == [1.0]


@pytest.mark.parametrize(
    ("program", "reward"),
    [
        ("n = int(input())\nprint(sum(int(input()) for _ in range(n)))", 1.0),
        ("import sys\nn, *xs = map(int, sys.stdin.read().split())\nsys.stdout.write(f'{sum(xs)}   \\n\\n')", 1.0),
        ("n, *xs = map(int, open(0))\nprint(sum(xs), flush=True)\nexit()", 1.0),
        ("def main():\n    n = int(input())\n    print(sum(int(input()) for _ in range(n)))\n"
         "if __name__ == '__main__':\n    main()", 1.0),
        ("print(3)", 0.0),
        ("n = int(input())\nprint(sum(int(input()) for _ in range(n)))\nprint('more')", 0.0),
        ("n = int(input())\nprint(sum(int(input()) for _ in range(n)))\nexit(1)", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("print(", 0.0),
    ],
)  # fmt: skip
def test_programs_that_read_and_print_are_compared_line_by_line(program: str, reward: float, plain: CodeTests) -> None:
    pairs = [{"input": "2\n1\n2\n", "output": "3"}, {"input": "1\n5\n", "output": "5\n"}]
    assert plain([program], stdin_tests=[pairs]) == [reward]


def test_inputs_too_give_partial_credit() -> None:
    found = reward(partial=True)
    pairs = [{"input": str(n), "output": str(n % 2)} for n in range(4)]
    assert found(["print(0)"], stdin_tests=[pairs]) == [0.5]
    found.close()


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    while True:\n        pass",
        "import time\ndef add(a, b):\n    time.sleep(60)",
        "def add(a, b):\n    return 'x' * (1 << 20)",
        "while True:\n    pass",
    ],
)
def test_too_much_is_a_limit_and_worth_nothing(program: str) -> None:
    found = reward(limit_s=0.5, partial=True)
    assert found([program], tests=[TESTS]) == [0.0]
    assert found.outcomes == {Outcome.LIMIT: 1}
    found.close()


def test_a_jail_that_dies_gives_no_signal_and_one_that_dies_often_is_an_error() -> None:
    found = reward(max_infrastructure_errors=0.5, partial=True)
    found._grader = Grader(Failing(fails=range(3)), Limits())  # no start ahead: one process, then its successor
    assert found([ADD, f"{ADD} "], tests=[TESTS] * 2) == [None, 1.0]
    assert found.outcomes == {Outcome.ERROR: 1, Outcome.PASS: 1}
    found._grader.close()
    found._grader = Grader(Failing(fails=range(1000)), Limits())
    with pytest.raises(RewardError, match=r"2 of 2 programs could not be graded \(OSError: no luck: 2\), above"):
        found([ADD, f"{ADD} "], tests=[TESTS] * 2)
    found.close()


class Failing(Unconfined):
    """Cannot start a process the first times."""

    def __init__(self, fails: range) -> None:
        super().__init__("failing")
        object.__setattr__(self, "left", list(fails))

    def start(self, program: str, limits: Limits) -> Any:
        if self.left:
            self.left.pop()
            raise OSError("no luck")
        return super().start(program, limits)


def test_an_error_of_ours_is_tried_once_more() -> None:
    grader = Grader(Failing(fails=range(1)), Limits())
    assert [grade.outcome for grade in grader.grades([(ADD, Task(tuple(TESTS)))])] == [Outcome.PASS]
    grader.close()


def test_tests_that_are_broken_are_an_error_and_not_a_zero(plain: CodeTests) -> None:
    with pytest.raises(RewardError, match=r"1 of 1 programs could not be graded \(the tests: they fail before"):
        plain([ADD], tests=["assert {}[1] == add(1, 2)"])


def test_a_grade_is_remembered_and_forgotten_in_order() -> None:
    jail = Counting()
    grader = Grader(jail, Limits(), cache_size=2)
    task = Task(tuple(TESTS))
    programs = [f"{ADD}{' ' * n}" for n in range(3)]
    grader.grades([(program, task) for program in (*programs, *programs)])
    graded = jail.candidates
    assert grader.grades([(programs[2], task)])[0].outcome is Outcome.PASS
    assert jail.candidates == graded
    grader.grades([(programs[0], task)])
    assert jail.candidates == graded + 1
    grader.grades([(programs[0], Task(tuple(TESTS[:1])))])
    assert jail.candidates == graded + 2
    grader.close()


class Counting(Unconfined):
    """Counts the candidates that were loaded: those processes that ended."""

    def __init__(self) -> None:
        super().__init__("counting")
        object.__setattr__(self, "started", [])

    def start(self, program: str, limits: Limits) -> Any:
        confined = super().start(program, limits)
        if program != confined_programs.tests_program():
            self.started.append(confined)
        return confined

    @property
    def candidates(self) -> int:
        return sum(one.process.poll() is not None for one in self.started)


def test_no_process_is_left() -> None:
    before = children()
    grader = Grader(Unconfined(), Limits(seconds=1.0), workers=2)
    programs = [ADD, "import os\nos._exit(1)", "while True:\n    pass", "def add(a, b):\n    return [1] * 10**9"]
    grader.grades([(program, Task(tuple(TESTS))) for program in programs])
    assert grader.num_processes <= 2 * 2 + 2
    grader.close()
    assert grader.num_processes == 0
    assert children() == before


def children() -> int:
    own = Path(f"/proc/{os.getpid()}/task")
    if not own.exists():
        pytest.skip("needs /proc")
    return sum(len((task / "children").read_text().split()) for task in own.iterdir())


def test_a_process_that_exits_without_closing_leaves_none() -> None:
    script = (
        "from fedpact.rewards.code import CodeTests\n"
        "found = CodeTests(sandbox='unsafe-none')\n"
        f"print(found([{ADD!r}], tests=[{TESTS!r}]), *[one.process.pid for one in found._grader._pool._all])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    verdict, *pids = done.stdout.split()
    assert verdict == "[1.0]"
    assert pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_closed_pool_starts_nothing_and_a_stale_process_is_replaced() -> None:
    pool = Pool(Unconfined(), Limits(), 1)
    with pool.candidate():
        pass
    for channel in list(pool._all):
        channel.process.process.kill()  # type: ignore[attr-defined]
    with pool.candidate() as channel:
        assert channel.process.process.poll() is None  # type: ignore[attr-defined]
    pool.close()
    with pytest.raises(OSError, match="the pool is closed"), pool.candidate():
        pass
    assert pool.num_processes == 0


def test_the_reward_works_from_another_thread_and_for_several_at_once(plain: CodeTests) -> None:
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(plain([f"{ADD}#{n}"], tests=[TESTS]))) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[1.0]] * 3


def test_a_member_names_it_in_its_file(tmp_path: Path) -> None:
    use = "fedpact.rewards.code:code_tests"
    loaded = load_reward(use, {"sandbox": "unsafe-none", "workers": 1}, where="north.toml: rewards.code", home=tmp_path)
    prompts = Prompts(text=("Add.",) * 2, ids=("a", "b"), columns={"tests": (TESTS, None)})
    found = RewardSet({"code": loaded}).measure(prompts, [fenced(ADD)] * 2)
    assert found.tolist()[0][0] == 1.0
    assert found.isnan().tolist() == [[False, True]]
    loaded.function.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sandbox": "none"}, "sandbox is 'none'"),
        ({"limit_s": 0}, "limit_s is 0; expected at least 0.1"),
        ({"workers": 0}, "workers is 0; expected at least 1"),
        ({"max_infrastructure_errors": float("nan")}, "max_infrastructure_errors is nan"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reward(**settings)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "needs a column 'tests' or 'stdin_tests'"),
        ({"tests": [3]}, "tests: found int"),
        ({"tests": [["assert add(1, 1) == 2", 3]]}, "tests: found list"),
        ({"tests": ["assert ("]}, "tests: not Python"),
        ({"tests": ["assert True"]}, "entry_point"),
        ({"tests": TESTS[:1], "entry_point": [3]}, "entry_point: found int"),
        ({"tests": TESTS[:1], "stdin_tests": [[]]}, "found both"),
        ({"stdin_tests": [[{"input": "1"}]]}, "stdin_tests: expected a list"),
        ({"stdin_tests": ["1"]}, "stdin_tests: expected a list"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns: dict[str, Any], message: str, plain: CodeTests) -> None:
    with pytest.raises(RewardError, match=message):
        plain([ADD], **columns)


def test_a_task_without_tests_is_none() -> None:
    assert task_of(None, None, None, None, None) is None
    assert task_of(None, None, None, None, []) is None


def test_no_sandbox_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_warned", False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reward().close()
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [" sandbox is unsafe-none"]


def test_without_a_sandbox_that_holds_it_refuses_to_register(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen_jail.cache_clear()
    monkeypatch.setattr("fedpact.rewards.sandbox.jail.available_jails", list)
    with pytest.raises(ConfigError, match="no sandbox on this machine holds"):
        CodeTests()
    chosen_jail.cache_clear()
    monkeypatch.setattr("fedpact.rewards.code.available_jails", list)
    with pytest.raises(ConfigError, match="sandbox is 'bubblewrap'; installed here: none"):
        CodeTests(sandbox="bubblewrap")


def test_reference_solutions_of_the_excerpts_pass(plain: CodeTests) -> None:
    tasks = rows(EXCERPTS / "humaneval_excerpt.jsonl")
    assert humaneval(plain, tasks, [task["canonical_solution"] for task in tasks]) == [1.0] * 5
    tasks = rows(EXCERPTS / "mbpp_excerpt.jsonl")
    assert mbpp(plain, tasks, [fenced(task["code"]) for task in tasks]) == [1.0] * 5


HACKS = (
    "class Any:\n    def __eq__(self, other):\n        return True\n    __ne__ = __lt__ = __gt__ = __le__ = __eq__\n"
    "    def __sub__(self, other):\n        return self\n    __rsub__ = __mul__ = __abs__ = __sub__\n"
    "def {name}(*args, **kwargs):\n    return Any()",
    "import os, sys\ndef {name}(*args, **kwargs):\n    os._exit(0)",
    "def {name}(*args, **kwargs):\n    raise StopIteration",
)


def test_hacked_solutions_of_the_excerpts_are_not_rewarded(plain: CodeTests) -> None:
    tasks = rows(EXCERPTS / "humaneval_excerpt.jsonl")
    for hack in HACKS:
        assert humaneval(plain, tasks, [hack.format(name=task["entry_point"]) for task in tasks]) == [0.0] * 5


@pytest.mark.slow
def test_reference_solutions_of_humaneval_pass_and_hacked_ones_do_not_in_a_jail() -> None:
    tasks = rows(SHARED / "humaneval/HumanEval.jsonl")
    found = confined()
    assert humaneval(found, tasks, [task["canonical_solution"] for task in tasks]) == [1.0] * len(tasks)
    for hack in HACKS:
        programs = [hack.format(name=task["entry_point"]) for task in tasks]
        assert humaneval(found, tasks, programs) == [0.0] * len(tasks)
    found.close()


@pytest.mark.slow
def test_reference_solutions_of_mbpp_pass_in_a_jail() -> None:
    tasks = rows(SHARED / "mbpp/mbpp.jsonl")
    found = confined()
    failed = [
        task["task_id"]
        for task, value in zip(tasks, mbpp(found, tasks, [task["code"] for task in tasks]), strict=True)
        if value != 1.0
    ]
    found.close()
    assert failed == []


@pytest.mark.slow
def test_the_benchmark_writes_a_rate_for_every_jail(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    assert benchmark(["--quick", "--only", "sandbox", "--json", str(report)]) == 0
    rates = json.loads(report.read_text(encoding="utf-8"))["sandbox"]
    assert {"a bare interpreter", "unsafe-none, typing", *(f"{jail.name}, typing" for jail in available_jails())} <= {
        *rates
    }
    assert all(0 < rate["median_ms"] <= rate["p95_ms"] and rate["grades_per_core_s"] > 0 for rate in rates.values())


def confined() -> CodeTests:
    if not available_jails():
        pytest.skip("neither bubblewrap nor sandlock is installed")
    return CodeTests(sandbox="auto", limit_s=60.0, workers=2)

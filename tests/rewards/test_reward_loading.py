from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch.testing import assert_close

from fedpact.errors import ConfigError, RewardError
from fedpact.rewards.load import LoadedReward, RewardSet, load_reward
from fedpact.types import Prompts

WHERE = "clients/north.toml: rewards.helpful"


def prompts(*text, **columns):
    return Prompts(text=list(text), ids=torch.arange(len(text)), columns=columns)


def reward(function, timeout_s=5.0):
    return LoadedReward("north.rewards:score", WHERE, function, timeout_s)


def measure(function, count=2, timeout_s=5.0, **columns):
    batch = prompts(*("q" * count), **columns)
    return RewardSet({"helpful": reward(function, timeout_s)}).measure(batch, ["a", "bb", "ccc"][:count])


def write(folder, source, name="rewards.py"):
    (folder / name).write_text(textwrap.dedent(source))


def test_a_built_in_reward_is_found_by_its_path_and_gets_its_settings():
    loaded = load_reward("fedpact.rewards:brevity", {"limit": 4}, where=WHERE)
    values = RewardSet({"brief": loaded}).measure(prompts("q", "q"), ["a b", "a b c"])
    assert_close(values, torch.tensor([[0.5, 0.25]]))
    assert loaded.name == "fedpact.rewards:brevity"


def test_rows_come_in_the_order_of_the_objectives_whether_async_or_not():
    async def ones(completions):
        return [1 for _ in completions]

    def lengths(completions):
        return [len(text) for text in completions]

    rewards = {"a": reward(ones), "b": reward(lengths), "c": reward(ones)}
    values = RewardSet(rewards).measure(prompts("p", "q"), ["x", "yy"])
    assert values.dtype == torch.float32
    assert_close(values, torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))


def test_no_rewards_and_no_completions_keep_their_shapes():
    assert RewardSet({}).measure(prompts("p", "q"), ["x", "y"]).shape == (0, 2)
    assert RewardSet({"a": reward(lambda completions: [])}).measure(prompts(), []).shape == (1, 0)


def test_none_is_no_signal_and_booleans_and_arrays_are_numbers():
    assert_close(measure(lambda completions: [None, True]), torch.tensor([[torch.nan, 1.0]]), equal_nan=True)
    assert_close(measure(lambda completions: torch.tensor([0.5, 2.0])), torch.tensor([[0.5, 2.0]]))
    assert_close(measure(lambda completions: tuple(torch.tensor([3, 4]).numpy())), torch.tensor([[3.0, 4.0]]))


def test_chat_prompts_get_chat_completions():
    seen = {}

    def look(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [0.0]

    chat = [{"role": "user", "content": "q"}]
    RewardSet({"helpful": reward(look)}).measure(prompts(chat), ["a"])
    assert seen == {"prompts": [chat], "completions": [[{"role": "assistant", "content": "a"}]]}


def test_a_function_gets_the_columns_that_it_names():
    def named(completions, answer, hint=None):
        return [float(answer == ["1", "2"] and hint == ["x", "y"])] * 2

    def all_of_them(completions, *, limit=7, **columns):
        return [float(sorted(columns) == ["answer", "hint", "prompts"] and limit == 7)] * 2

    columns = {"answer": ["1", "2"], "hint": ["x", "y"], "limit": [0, 0]}
    assert measure(named, **columns).tolist() == [[1.0, 1.0]]
    # a keyword-only parameter with a default is a setting: the column of the same name stays away from it
    assert measure(all_of_them, **columns).tolist() == [[1.0, 1.0]]


def test_a_bound_setting_wins_over_a_column(tmp_path):
    write(tmp_path, "def score(completions, bonus=0, *, words): return [bonus + len(words)] * len(completions)")
    loaded = load_reward("rewards.py:score", {"bonus": 2, "words": ["a"]}, where=WHERE, folder=tmp_path)
    assert RewardSet({"x": loaded}).measure(prompts("q", bonus=[9], words=["w"]), ["a"]).tolist() == [[3.0]]


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(RewardError, match=r"needs the column 'answer'; the prompts have hint, topic; rename"):
        measure(lambda completions, answer: [], hint=["x", "y"], topic=["x", "y"])


def test_a_class_becomes_an_instance_that_keeps_its_state(tmp_path):
    source = """
        class Judge:
            def __init__(self, bonus=0.0):
                self.calls, self.bonus = 0, bonus
            def __call__(self, completions, **columns):
                self.calls += 1
                return [self.calls + self.bonus for _ in completions]
    """
    write(tmp_path, source)
    rewards = RewardSet({"x": load_reward("rewards.py:Judge", {"bonus": 0.5}, where=WHERE, folder=tmp_path)})
    assert rewards.measure(prompts("q"), ["a"]).tolist() == [[1.5]]
    assert rewards.measure(prompts("q"), ["a"]).tolist() == [[2.5]]


def test_an_instance_with_an_async_call_is_async(tmp_path):
    write(tmp_path, "class Judge:\n    async def __call__(self, completions):\n        return [4.0]\n")
    loaded = load_reward("rewards.py:Judge", {}, where=WHERE, folder=tmp_path)
    assert loaded.is_async
    assert RewardSet({"x": loaded}).measure(prompts("q"), ["a"]).tolist() == [[4.0]]


def test_two_members_may_have_a_file_of_the_same_name(tmp_path):
    for number, name in enumerate(("north", "south")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, f"def score(completions): return [{number}] * len(completions)")
    north, south = (load_reward("rewards.py:score", {}, where=WHERE, folder=tmp_path / n) for n in ("north", "south"))
    assert RewardSet({"n": north, "s": south}).measure(prompts("q"), ["a"]).tolist() == [[0.0], [1.0]]


def test_a_file_is_executed_once_and_again_when_it_has_changed(tmp_path):
    source = "def score(completions): return [1] * len(completions)"
    write(tmp_path, source)
    first = load_reward("rewards.py:score", {}, where=WHERE, folder=tmp_path)
    assert load_reward("rewards.py:score", {}, where=WHERE, folder=tmp_path).function is first.function
    write(tmp_path, source.replace("[1]", "[2]"))
    second = load_reward("rewards.py:score", {}, where=WHERE, folder=tmp_path)
    assert RewardSet({"a": first, "b": second}).measure(prompts("q"), ["a"]).tolist() == [[1.0], [2.0]]


def test_a_class_that_asks_for_folders_gets_them_and_others_do_not(tmp_path):
    source = """
        class Judge:
            def __init__(self, *, size=1, folder=None, home=None):
                self.paths = [folder, home]
            def __call__(self, completions):
                return [0.0]
        class Plain(Judge):
            def __init__(self, folder="mine"):
                super().__init__(folder=folder)
    """
    write(tmp_path, source)

    def paths(use="rewards.py:Judge", kwargs=None, **places):
        return load_reward(use, kwargs or {}, where=WHERE, **places).function.paths

    assert paths(folder=tmp_path, home=tmp_path / "home") == [tmp_path, tmp_path / "home"]
    assert paths(folder=tmp_path) == [tmp_path, tmp_path]
    assert paths(folder=tmp_path, kwargs={"home": "elsewhere"}) == [tmp_path, "elsewhere"]
    assert paths("rewards.py:Plain", folder=tmp_path) == ["mine", None]
    with pytest.raises(RewardError, match=r"has no setting 'sise'; it takes size$"):
        paths(folder=tmp_path, kwargs={"sise": 2})


def test_a_remedy_from_a_constructor_is_passed_on(tmp_path):
    source = """
        from fedpact.errors import ConfigError
        class Judge:
            def __init__(self):
                raise ConfigError("rubric is empty; say what a good answer is")
    """
    write(tmp_path, source)
    with pytest.raises(RewardError) as caught:
        load_reward("rewards.py:Judge", {}, where=WHERE, folder=tmp_path)
    assert str(caught.value) == f"{WHERE}.kwargs: rewards.py:Judge: rubric is empty; say what a good answer is"


@pytest.mark.parametrize(
    ("use", "kwargs", "message"),
    [
        ("rubric", {}, "rewards.helpful.use: found 'rubric', expected 'package.module:name' or 'file.py:name'"),
        ("no_such_thing:f", {}, "use: cannot import no_such_thing: ModuleNotFoundError: No module named"),
        ("no_such_thing:f", {}, "install the package, or write 'file.py:name'"),
        ("other.py:f", {}, "rewards.helpful.use: no file"),
        ("rewards.py:rubric", {}, "use: rewards.py has no function or class 'rubric'; it has Silent, first, score"),
        ("rewards.py:LIMIT", {}, "use: rewards.py has no function or class 'LIMIT'"),
        (
            "fedpact.rewards:brief",
            {},
            "it has Agreement, AnswerKey, CodeTests, HttpJudge, LoadedReward, Outcome, RewardModel, RewardSet, brevity",
        ),
        ("broken.py:f", {}, "use: cannot import broken.py: ZeroDivisionError: division by zero; mend it"),
        ("spelled.py:f", {}, "use: cannot import spelled.py: SyntaxError"),
        ("rewards.py:score", {"limt": 3}, "kwargs: rewards.py:score has no setting 'limt'; it takes limit"),
        ("rewards.py:first", {"answer": 3}, "kwargs: rewards.py:first has no setting 'answer'; it takes no settings"),
        ("rewards.py:Silent", {}, "use: rewards.py:Silent is a class without __call__"),
        ("rewards.py:Silent", {"size": -1}, "kwargs: rewards.py:Silent could not be created: ValueError: size is -1"),
        ("math:sqrt", {}, "use: math:sqrt takes (x); expected a parameter named 'completions', as in TRL"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(use, kwargs, message, tmp_path):
    source = """
        LIMIT = 3
        def score(completions, *, limit=3, **columns): return [0.0]
        def first(completions, answer): return [0.0]
        class Silent:
            def __init__(self, size=1):
                if size < 0:
                    raise ValueError(f"size is {size}\\nand more")
    """
    write(tmp_path, source)
    write(tmp_path, "1 / 0", "broken.py")
    write(tmp_path, "def f(:", "spelled.py")
    with pytest.raises(RewardError) as caught:
        load_reward(use, kwargs, where=WHERE, folder=tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(WHERE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [0.0] * 7, "returned 7 values for 2 completions; return one number for each"),
        (lambda completions: None, "returned NoneType; expected a list with one number for each completion"),
        (lambda completions: 0.5, "returned float; expected a list"),
        (lambda completions: [0.0, "good"], "returned 'good' for completion 1; return a finite number, or None"),
        (lambda completions: [0.0, float("nan")], "returned nan for completion 1; return a finite number, or None"),
        (lambda completions: [float("inf"), 0.0], "returned inf for completion 0"),
        (lambda completions: [0.0, 1e39], "returned 1e+39 for completion 1"),
        (lambda completions: [0.0, 10**400], "for completion 1"),
        (lambda completions: [[0.0], [0.0]], "returned [0.0] for completion 0"),
        (lambda completions: [0.0, 1 / 0], ": raised ZeroDivisionError: division by zero"),
        (lambda completions: sys.exit(3), ": raised SystemExit: 3"),
    ],
)
def test_what_is_no_reward_is_refused_in_one_line(function, message):
    with pytest.raises(RewardError) as caught:
        measure(function)
    assert str(caught.value).startswith(f"{WHERE}: north.rewards:score")
    assert message in str(caught.value)


def test_an_exception_is_cut_to_its_first_line_and_kept_as_the_cause():
    def fail(completions):
        raise KeyError("x" * 300 + "\nsecret")

    with pytest.raises(RewardError) as caught:
        measure(fail)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(str(caught.value)) < 300 and "secret" not in str(caught.value)


def test_a_remedy_from_within_is_passed_on():
    def needs_extra(completions):
        raise ConfigError("needs math-verify; run: pip install 'fedpact[math]'")

    with pytest.raises(RewardError, match=re.escape("score: needs math-verify; run: pip install")):
        measure(needs_extra)


def test_a_reward_that_hangs_is_given_up_after_its_time():
    started = time.monotonic()
    with pytest.raises(RewardError, match=re.escape("score: no answer after 0.2 s (timeout_s); raise timeout_s, or")):
        measure(lambda completions: time.sleep(60), timeout_s=0.2)
    assert time.monotonic() - started < 3


def test_a_hanging_reward_does_not_keep_the_process_alive():
    code = """
        import time, torch
        from fedpact.rewards.load import LoadedReward, RewardSet
        from fedpact.types import Prompts
        hung = LoadedReward("x:y", "z", lambda completions: time.sleep(60), 0.1)
        try:
            RewardSet({"a": hung}).measure(Prompts(text=["q"], ids=torch.arange(1), columns={}), ["a"])
        except Exception as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0 and "no answer after 0.1 s" in run.stdout


def test_async_rewards_of_a_member_wait_for_each_other_and_not_in_turn():
    import asyncio

    met = asyncio.Event()

    async def waits(completions):
        await met.wait()
        return [1.0]

    async def comes(completions):
        met.set()
        return [2.0]

    rewards = RewardSet({"waits": reward(waits, 2.0), "comes": reward(comes, 2.0)})
    assert rewards.measure(prompts("q"), ["a"]).tolist() == [[1.0], [2.0]]


def test_an_async_reward_finds_the_same_loop_again():
    import asyncio

    loops = []

    async def look(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0, 0.0]

    measure(look)
    measure(look)
    assert loops[0] is loops[1]


def test_an_async_reward_that_hangs_or_fails_is_named():
    import asyncio

    async def hang(completions):
        await asyncio.sleep(60)

    async def fail(completions):
        raise TimeoutError("the judge did not answer")

    with pytest.raises(RewardError, match=re.escape("no answer after 0.2 s (timeout_s)")):
        measure(hang, timeout_s=0.2)
    with pytest.raises(RewardError, match="raised TimeoutError: the judge did not answer"):
        measure(fail)


def test_an_async_reward_that_blocks_the_loop_is_given_up_and_the_next_call_works():
    async def block(completions):
        time.sleep(8)

    async def fine(completions):
        return [1.0, 2.0]

    with pytest.raises(RewardError, match="look for a call that blocks the event loop"):
        measure(block, timeout_s=0.1)
    assert measure(fine).tolist() == [[1.0, 2.0]]


def test_a_plain_function_may_return_a_coroutine():
    async def later(completions):
        return [1.0, 2.0]

    assert measure(lambda completions: later(completions)).tolist() == [[1.0, 2.0]]


def test_otherwise_is_asked_for_just_the_rows_without_a_rating():
    seen = {}

    def known(completions, answer):
        return [None if gold is None else float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    def judge(prompts, completions, hint):
        seen.update(prompts=prompts, completions=completions, hint=hint)
        return [None, 0.5]

    async def last(completions):
        return [0.25] * len(completions)

    chain = LoadedReward("a:known", WHERE, known, 5.0, LoadedReward("a:judge", WHERE, judge, 5.0, reward(last)))
    batch = prompts("p", "q", "r", "s", answer=["a", None, "x", None], hint=[1, 2, 3, 4])
    values = RewardSet({"correct": chain, "all": reward(last)}).measure(batch, ["a", "b", "c", "d"])
    assert_close(values, torch.tensor([[1.0, 0.25, 0.0, 0.5], [0.25] * 4]))
    assert seen == {"prompts": ["q", "s"], "completions": ["b", "d"], "hint": [2, 4]}


def test_otherwise_is_not_asked_where_everything_is_rated():
    def never(completions):
        raise AssertionError("asked")

    chain = LoadedReward("a:b", WHERE, lambda completions: [0.0, 1.0], 5.0, reward(never))
    assert RewardSet({"x": chain}).measure(prompts("p", "q"), ["a", "b"]).tolist() == [[0.0, 1.0]]


def test_an_error_that_a_reward_raises_on_purpose_says_where():
    def refuse(completions):
        raise RewardError("the judge is fooled")

    with pytest.raises(RewardError, match=re.escape(f"{WHERE}: north.rewards:score: the judge is fooled")):
        measure(refuse)


def test_importing_the_rewards_loads_no_heavy_library():
    code = "import sys, fedpact.rewards; print([n for n in ('torch', 'httpx', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_package_is_there():
    import fedpact.rewards

    assert all(callable(getattr(fedpact.rewards, name)) for name in fedpact.rewards.__all__)


def test_prompts_and_completions_must_be_as_many():
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        RewardSet({}).measure(prompts("q"), ["a", "b"])

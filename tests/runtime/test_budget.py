"""Epsilon of what has left a member, counted from its ledger."""

from __future__ import annotations

import builtins
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact.errors import ConfigError, RefusedError, StoreError
from fedpact.runtime.budget import Budget, epsilon_after, epsilon_of, released, releases
from fedpact.runtime.ledger import Ledger

accounting = pytest.mark.skipif(importlib.util.find_spec("dp_accounting") is None, reason="needs dp-accounting")
DELTA = 1e-5


def line(ledger: Ledger, reply: str | None = "a", **fields: Any) -> None:
    ledger.append(**{"verb": "train", "decision": "sent", "reply": reply and reply.ljust(64, "0"), **fields})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "north" / "ledger.jsonl")


def spend(ledger: Ledger, budget: Budget, times: int, name: str = "r") -> None:
    for i in range(times):
        line(ledger, f"{name}{i}-", counts=budget.counts)


# --- epsilon --------------------------------------------------------------------------------------------------------


@accounting
@pytest.mark.parametrize(("noise", "times"), [(0.01, 1), (0.3, 16), (1.0, 50), (8.0, 1), (66.0, 50), (8.0, 10_000)])
def test_epsilon_is_that_of_dp_accounting_at_half_the_multiplier(noise: float, times: int) -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    direct = RdpAccountant()
    for _ in range(min(times, 50)):
        direct.compose(dp_accounting.GaussianDpEvent(noise / 2), times // min(times, 50))
    assert epsilon_after(times, noise, DELTA) == pytest.approx(direct.get_epsilon(DELTA), rel=1e-9, abs=1e-9)


@accounting
@pytest.mark.parametrize(("noise", "times"), [(1.0, 50), (8.0, 1), (8.0, 50), (66.0, 50)])
def test_epsilon_lies_a_little_above_the_exact_one_of_gaussian_noise(noise: float, times: int) -> None:
    """Balle and Wang 2018, arXiv:1805.06530, theorem 8: `times` releases are one whose means lie further apart."""
    apart = 2 * math.sqrt(times) / noise  # of two adapters 2 * clip_norm from each other, in standard deviations

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def delta(epsilon: float) -> float:
        far = epsilon / apart
        return below(apart / 2 - far) - math.exp(epsilon) * below(-apart / 2 - far)

    low, high = 0.0, 400.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    assert high < epsilon_after(times, noise, DELTA) < 1.12 * high


@accounting
def test_other_noise_adds_up_and_none_is_infinite() -> None:
    assert epsilon_of({}, DELTA) == 0.0
    assert epsilon_of({0.0: 0}, DELTA) == 0.0
    assert epsilon_of({1.0: 2, 2.0: 8}, DELTA) == pytest.approx(epsilon_after(4, 1.0, DELTA))  # 8 / 2^2 = 2 / 1^2
    assert epsilon_of({1.0: 2, 0.0: 1}, DELTA) == math.inf


@accounting
@settings(max_examples=25, deadline=None)
@given(noise=st.floats(0.05, 50), times=st.integers(0, 100), more=st.integers(1, 100))
def test_more_adapters_or_less_noise_never_cost_less(noise: float, times: int, more: int) -> None:
    found = epsilon_after(times, noise, DELTA)
    assert found <= epsilon_after(times + more, noise, DELTA)
    assert found <= epsilon_after(times, noise / 2, DELTA)


def test_without_dp_accounting_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    message = r"^site.noise_multiplier needs dp-accounting, which is not installed; run: pip install 'fedpact\[dp\]'$"
    with pytest.raises(ConfigError, match=message):
        epsilon_after(1, 1.0, DELTA)
    with pytest.raises(ConfigError, match=message):  # at the start of a run, when nothing has been spent
        Budget(1.0, DELTA).check(ledger.path, where="north.toml")


# --- what has left --------------------------------------------------------------------------------------------------


def test_only_adapters_that_were_sent_count_and_each_once(ledger: Ledger) -> None:
    assert releases(ledger.path) == 0
    line(ledger, "a")
    line(ledger, "a", attempt=1, run="another")  # the same bytes again
    line(ledger, "b")
    line(ledger, None, decision="refused")
    line(ledger, "c", verb="evaluate")
    line(ledger, "d", verb="hello")
    assert releases(ledger.path) == 2
    assert releases(ledger.path, {"train", "evaluate"}) == 3


def test_the_count_goes_on_when_the_ledger_is_opened_again_in_another_run(ledger: Ledger) -> None:
    line(ledger, "a", run="first", round=1)
    line(Ledger(ledger.path), "b", run="second", round=1)
    assert releases(ledger.path) == 2


def test_a_torn_line_is_not_a_release(ledger: Ledger) -> None:
    line(ledger, "a")
    whole = ledger.path.read_bytes()
    line(ledger, "b")
    torn = ledger.path.read_bytes()[:-40]
    ledger.path.write_bytes(torn)
    assert len(torn) > len(whole)
    assert releases(ledger.path) == 1
    line(Ledger(ledger.path), "c")
    assert releases(ledger.path) == 2


def test_a_ledger_from_which_a_line_was_taken_counts_nothing_and_is_an_error(ledger: Ledger) -> None:
    for reply in "abc":
        line(ledger, reply)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(lines[0] + lines[2])
    with pytest.raises(StoreError, match="line 2 breaks the chain"):
        releases(ledger.path)
    ledger.path.unlink()
    with pytest.raises(StoreError, match="No such file"):
        releases(ledger.path)


def test_each_adapter_counts_with_the_noise_that_it_left_with(ledger: Ledger) -> None:
    spend(ledger, Budget(0.5, DELTA), 2, "a")
    spend(ledger, Budget(2.0, DELTA), 3, "b")
    line(ledger, "c")
    assert released(ledger.path) == {0.5: 2, 2.0: 3, 0.0: 1}


def test_a_multiplier_is_written_down_as_no_larger_than_it_is() -> None:
    assert Budget(0.0000019, DELTA).counts == {"noise_millionths": 1}
    assert Budget(1.5, DELTA).counts == {"noise_millionths": 1_500_000}


# --- the budget -----------------------------------------------------------------------------------------------------


@accounting
@pytest.mark.parametrize("noise", [0.3, 4.0, 30.0])
def test_it_stops_at_the_last_adapter_that_fits(ledger: Ledger, noise: float) -> None:
    budget = Budget(noise, DELTA, epsilon_after(5, noise, DELTA) * 1.0001)
    for done in range(5):
        assert budget.left(ledger.path) == 5 - done
        budget.check(ledger.path, where="north.toml")
        spend(ledger, budget, 1, f"{done}-")
    assert budget.left(ledger.path) == 0
    with pytest.raises(RefusedError, match=r"^north.toml: site.epsilon: .* is spent on 5 adapters, and the next would"):
        budget.check(ledger.path, where="north.toml")
    assert budget.epsilon is not None
    assert budget.spent(ledger.path) <= budget.epsilon


@accounting
def test_a_budget_too_small_for_one_adapter_is_refused_before_the_first(ledger: Ledger) -> None:
    budget = Budget(0.1, DELTA, 1.0)
    assert budget.left(ledger.path) == 0
    with pytest.raises(RefusedError, match="0 of 1 is spent on 0 adapters"):
        budget.check(ledger.path, where="north.toml")


@accounting
def test_a_large_budget_is_counted_without_trying_every_number(ledger: Ledger) -> None:
    budget = Budget(1_000.0, DELTA, 8.0)
    left = budget.left(ledger.path)
    assert left is not None
    assert left > 100_000
    assert epsilon_after(left, 1_000.0, DELTA) <= 8.0 < epsilon_after(left + 1, 1_000.0, DELTA)


@accounting
def test_more_noise_later_does_not_make_up_for_less_before(ledger: Ledger) -> None:
    spend(ledger, Budget(1.0, DELTA), 4)
    later = Budget(10.0, DELTA, 100.0)
    assert later.spent(ledger.path) == pytest.approx(epsilon_after(4, 1.0, DELTA))
    assert later.spent(ledger.path) > 10 * epsilon_after(4, 10.0, DELTA)


@accounting
def test_what_left_without_noise_is_covered_by_no_budget(ledger: Ledger) -> None:
    line(ledger, "a")
    budget = Budget(10.0, DELTA, 1_000.0)
    assert budget.spent(ledger.path) == math.inf
    assert budget.left(ledger.path) == 0
    with pytest.raises(RefusedError, match=r"^north.toml: site.epsilon: 1 adapters left without noise"):
        budget.check(ledger.path, where="north.toml")


@accounting
def test_every_round_can_say_what_is_spent_and_left(ledger: Ledger) -> None:
    budget = Budget(4.0, DELTA, 20.0)
    spend(ledger, budget, 3)
    spent, left = epsilon_after(3, 4.0, DELTA), budget.left(ledger.path)
    assert budget.line(ledger.path) == f"epsilon {spent:.4g} at delta 1e-05 after 3 adapters (of 20, {left} left)"
    assert budget.after_next(ledger.path) == pytest.approx(epsilon_after(4, 4.0, DELTA))
    free = Budget(4.0, DELTA)
    assert free.line(ledger.path).endswith("after 3 adapters (no limit)")
    assert free.left(ledger.path) is None
    free.check(ledger.path, where="north.toml")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ((0.0, DELTA), "noise_multiplier"),
        ((math.inf, DELTA), "noise_multiplier"),
        ((1.0, 0.0), "delta"),
        ((1.0, 1.0), "delta"),
        ((1.0, DELTA, 0.0), "epsilon"),
        ((1.0, DELTA, math.inf), "epsilon"),
    ],
)
def test_a_setting_that_promises_nothing_is_an_error(settings: tuple[float, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        Budget(*settings)

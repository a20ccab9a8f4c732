"""A contract and a gate in plain words: every number is right, and no text from the network is trusted."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact.algorithms import TABLE
from fedpact.errors import ConfigError
from fedpact.messages import REQUESTS
from fedpact.runtime.budget import epsilon_after
from fedpact.runtime.client_config import SiteSettings
from fedpact.runtime.contract import Contract
from fedpact.runtime.disclosure import BY_DEFAULT, EVERYTHING
from fedpact.runtime.plain import WIDTH, in_words, leaves

HASH = "c0ffee" * 10 + "abcd"
MODEL = "ab" * 32
NEEDED: dict[str, dict[str, Any]] = {"disco": {"domains": ["add", "sub"]}}
"""Settings without which an algorithm is none."""


def contract(algorithm: str | dict[str, Any] = "fedavg", **changes: Any) -> Contract:
    """10 rounds of 3 local steps, 5 prompts of 7 completions each, 2 objectives."""
    table = {"name": algorithm, **NEEDED.get(algorithm, {})} if isinstance(algorithm, str) else algorithm
    if isinstance(algorithm, str) and algorithm not in ("fedgrpo", "mor", "grpo"):
        table["local_steps"] = 3
    found: dict[str, Any] = {
        "seed": 11,
        "rounds": 10,
        "model": MODEL,
        "objectives": {"correct": {"primary": True, "weight": 0.6}, "brief": {}},
        "lora": {"r": 6, "lora_alpha": 9.0},
        "private": None,
        "rollout": {"num_generations": 7, "max_completion_length": 130, "max_prompt_length": 1200},
        "loss": {},
        "ppo": {},
        "optimizer": {"learning_rate": 3e-4},
        "training": {"prompts_per_step": 5},
        "evaluation": {"every": 4},
        "algorithm": table,
    }
    return Contract.model_validate({**found, **changes})


def line(lines: list[str], start: str) -> str:
    """The one line that begins so."""
    found = [one for one in lines if one.startswith(start)]
    assert len(found) == 1, (start, lines)
    return found[0]


# --- the contract -------------------------------------------------------------------------------------------------


def test_the_work_is_rounds_times_steps_times_prompts_times_completions() -> None:
    words = in_words(contract(), HASH)
    assert line(words, "work: ") == (
        "work: 10 rounds x 3 local steps x 5 prompts x 7 completions = 1,050 completions at most"
    )
    assert line(words, "optimiser steps: ") == "optimiser steps: 10 rounds x 3 local steps = 30 steps at most"


def test_steps_on_the_same_batch_count_as_steps_and_not_as_completions() -> None:
    words = in_words(contract(training={"prompts_per_step": 5, "num_iterations": 2}), HASH)
    assert line(words, "work: ").endswith("= 1,050 completions at most")
    assert line(words, "optimiser steps: ").endswith("x 2 steps on each batch = 60 steps at most")


@pytest.mark.parametrize("algorithm", ["fsmgda", "soups"])
def test_an_algorithm_that_trains_objectives_by_themselves_asks_for_each(algorithm: str) -> None:
    words = in_words(contract(algorithm), HASH)
    assert "x 2 objectives, each by itself x" in line(words, "work: ")
    assert line(words, "work: ").endswith("= 2,100 completions at most")


def test_an_algorithm_that_asks_for_gradients_says_how_much_work_they_are() -> None:
    assert line(in_words(contract("fedcmoo"), HASH), "gradients: ").endswith(
        "10 rounds x 5 prompts x 7 completions = 350 completions more"
    )
    assert not [one for one in in_words(contract(), HASH) if one.startswith("gradients: ")]


def test_where_the_server_trains_a_member_hears_of_candidates_and_canaries() -> None:
    words = in_words(contract({"name": "fedgrpo", "server_steps": 4, "canaries": 2}), HASH)
    assert line(words, "what is trained: ") == "what is trained: nothing at members; the server trains"
    assert line(words, "work: ") == (
        "work: 10 rounds x 4 server steps x 7 questions x 7 candidates = 1,960 candidates to rate at most"
    )
    assert [one for one in words if one.startswith(("learning rate", "evaluation", "conflict map"))] == []


def test_centralised_training_asks_members_for_nothing() -> None:
    words = in_words(contract("grpo"), HASH)
    assert line(words, "work: ") == "work: none; members are asked for nothing"
    assert [one.split(":")[0] for one in words if one.startswith("request ")] == ["request hello"]


@pytest.mark.parametrize(
    ("rounds", "every", "times"), [(10, 4, 4), (8, 4, 3), (1, 5, 2), (5, 5, 2), (6, 5, 3), (3, 1, 4)]
)
def test_evaluations_are_counted_as_a_run_makes_them(rounds: int, every: int, times: int) -> None:
    made = sum(round % every == 0 or round == rounds for round in range(rounds + 1))
    words = in_words(contract(rounds=rounds, evaluation={"every": every}), HASH)
    assert times == made and line(words, "evaluation: ").startswith(f"evaluation: {times} times (at the start, ")


def test_an_evaluation_says_on_what_and_how_often_it_samples() -> None:
    asked = {"every": 2, "num_prompts": 30, "num_generations": 3, "greedy": True}
    words = in_words(contract(evaluation=asked, private={"r": 2, "lora_alpha": 5.0}), HASH)
    assert line(words, "evaluation: ").endswith(
        "on 30 held-out prompts at most, 3 sampled for each, and the likeliest completion; the same with your private "
        "adapter"
    )
    assert line(words, "private adapter: ") == (
        "private adapter: rank 2, alpha 5, beside the shared one; it never leaves"
    )


@pytest.mark.parametrize(
    ("rounds", "when"), [(10, "0, 5 and 10"), (7, "0, 4 and 7"), (2, "0, 1 and 2"), (1, "0 and 1")]
)
def test_the_conflict_map_is_at_the_start_in_the_middle_and_at_the_end(rounds: int, when: str) -> None:
    words = in_words(contract(rounds=rounds), HASH)
    assert line(words, "conflict map: ") == (
        f"conflict map: in rounds {when}, gradients of one batch of 35 completions"
    )
    without = in_words(contract(rounds=rounds, evaluation={"conflicts": False}), HASH)
    assert [one for one in without if one.startswith(("conflict map", "request differentiate"))] == []


def test_the_adapter_the_rate_and_the_lengths_are_those_of_the_contract() -> None:
    words = in_words(contract(), HASH)
    assert (
        line(words, "what is trained: ") == "what is trained: a LoRA adapter of rank 6, alpha 9, on all linear layers"
    )
    assert line(words, "trained and sent back: ").endswith("both factors of it; its output is scaled by 1.5")
    assert line(words, "learning rate: ") == "learning rate: 0.0003 (adamw)"
    assert line(words, "lengths: ") == (
        "lengths: completions of 130 tokens at most, prompts cut to their last 1,200 tokens; temperature 1"
    )
    assert MODEL in line(words, "base model: ")
    assert line(words, "seed: ").startswith("seed: 11, ")
    assert words[-1] == f"hash of this contract: {HASH}"


def test_the_loss_is_named_with_its_clip_and_its_kl() -> None:
    words = in_words(contract(loss={"loss_type": "grpo", "beta": 0.04, "epsilon": 0.3}), HASH)
    assert line(words, "loss: ") == "loss: grpo, KL weight 0.04, ratios clipped at 0.3"
    assert "a critic that stays with you" in line(in_words(contract(loss={"surrogate": "ppo"}), HASH), "loss: ")


def test_every_objective_has_its_weight_and_one_is_called_accuracy() -> None:
    words = in_words(contract(), HASH)
    assert line(words, "objective correct: ").startswith("objective correct: weight 0.6, ")
    assert line(words, "objective correct: ").endswith("whose mean is called accuracy")
    assert line(words, "objective brief: ") == "objective brief: weight 0.4, if the algorithm takes fixed ones"


@pytest.mark.parametrize("algorithm", TABLE)
def test_every_algorithm_is_told_in_short_lines_with_its_settings_and_what_leaves(algorithm: str) -> None:
    words = in_words(contract(algorithm), HASH)
    assert words[0] == f"algorithm: {algorithm}: {TABLE[algorithm].summary}"
    assert line(words, "what leaves a member, in short: ").endswith(TABLE[algorithm].leaves)
    steps = "server_steps = 8" if algorithm in ("fedgrpo", "mor", "grpo") else "local_steps = 3"
    assert line(words, f"  {steps}")
    assert max(map(len, words)) < WIDTH and not [one for one in words if one.endswith("...")]


@pytest.mark.parametrize(
    ("algorithm", "verbs"),
    [
        ("fedavg", "hello train evaluate"),
        ("fedcmoo", "hello train evaluate differentiate"),
        ("disco", "hello train evaluate count"),
        ("fedgrpo", "hello examine score"),
        ("mor", "hello score fit"),
    ],
)
def test_the_requests_are_those_that_the_algorithm_sends(algorithm: str, verbs: str) -> None:
    words = in_words(contract(algorithm, evaluation={"conflicts": False}), HASH)
    found = [one.split(":")[0].removeprefix("request ") for one in words if one.startswith("request ")]
    assert found == verbs.split()


def test_an_algorithm_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.name: found 'nobodys'"):
        in_words(contract({"name": "nobodys"}), HASH)


# --- hostile contracts --------------------------------------------------------------------------------------------

UGLY = "x\x1b[2J\x1b]0;owned\x07\r\n\u202e\x9b31m"


@given(st.text(max_size=400), st.text(max_size=400), st.lists(st.text(max_size=60), max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_text_of_a_contract_commands_a_terminal_or_breaks_a_line(name: str, model: str, layers: list[str]) -> None:
    hostile = contract(
        {"name": "disco", "domains": list(dict.fromkeys([*layers, UGLY]))},
        objectives={name: {}, UGLY * 30: {"primary": True}},
        model=model + UGLY,
        lora={"target_modules": [*layers, UGLY]},
    )
    site = SiteSettings(share=("metrics",), metrics=(UGLY * 90,))
    for one in [*in_words(hostile, HASH), *leaves(site, hostile)]:
        assert len(one) <= WIDTH and "\x1b" not in one and "\u202e" not in one
        assert len(one.splitlines()) == 1 and one.replace("\u200c", "").replace("\u200d", "").isprintable()


def test_a_name_cannot_pass_for_words_of_ours() -> None:
    words = in_words(contract(objectives={"brief: weight 0, nothing leaves": {}, 'a" b': {}}), HASH)
    assert line(words, 'objective "brief: weight 0, nothing leaves": weight 0.5')
    assert line(words, 'objective "a\\" b": weight 0.5')


def test_numbers_that_nobody_can_read_are_told_by_their_size() -> None:
    huge = contract(rounds=10**4000, seed=-(10**30), training={"prompts_per_step": 10**18})
    words = in_words(huge, HASH)
    assert line(words, "work: ") == (
        "work: 10^4000 or so rounds x 3 local steps x 10^18 or so prompts x 7 completions = 10^4019 or so completions "
        "at most"
    )
    assert line(words, "seed: ").startswith("seed: -10^30 or so, ")
    assert max(map(len, [*words, *leaves(SiteSettings(clip_norm=1.0, noise_multiplier=1.0), huge)])) <= WIDTH


def test_of_very_many_objectives_the_first_are_told_and_the_rest_counted() -> None:
    words = in_words(contract(objectives={f"o{number}": {} for number in range(5000)}), HASH)
    assert len(words) < 60 and "and 4,976 more objectives: read the contract's JSON" in words


# --- the gate -----------------------------------------------------------------------------------------------------


def test_without_noise_an_adapter_is_said_to_have_no_formal_privacy() -> None:
    assert "no formal privacy" in line(leaves(SiteSettings(), contract()), "adapter: as trained")
    clipped = line(leaves(SiteSettings(clip_norm=2.5), contract()), "adapter: ")
    assert clipped.startswith("adapter: its change shortened to norm 2.5; no noise") and "no formal privacy" in clipped


@pytest.mark.skipif(importlib.util.find_spec("dp_accounting") is None, reason="needs dp-accounting")
@pytest.mark.parametrize(("algorithm", "adapters"), [("fedavg", 10), ("soups", 20)])
def test_noise_is_told_with_its_deviation_and_the_epsilon_of_the_run(algorithm: str, adapters: int) -> None:
    site = SiteSettings(clip_norm=0.5, noise_multiplier=3.0, epsilon=9.0, delta=1e-6)
    lines = leaves(site, contract(algorithm))
    assert line(lines, "adapter: ") == (
        "adapter: its change shortened to norm 0.5, with Gaussian noise of 1.5 on every number"
    )
    assert line(lines, "epsilon: ").startswith("epsilon: training stops before 9 is exceeded; at delta 1e-06")
    spent = epsilon_after(adapters, 3.0, 1e-6)
    assert line(lines, f"epsilon of {adapters} adapters").endswith(f": {spent:.4g}")
    assert "no formal privacy" not in " ".join(lines)


def test_under_noise_nothing_beside_the_adapter_leaves_unless_it_is_shared() -> None:
    noised = {"clip_norm": 0.5, "noise_multiplier": 3.0}
    lines = leaves(SiteSettings(**noised), contract())
    assert line(lines, "means: ") == "means: none"
    assert line(lines, "weight in a mean: ") == "weight in a mean: 1, whatever it is"
    assert "1 in place of the number of prompts" in line(lines, "always: ")
    shared = leaves(SiteSettings(**noised, share=("rewards",)), contract())
    assert line(shared, "means: ").endswith("epsilon does not cover them")


def test_means_are_told_with_the_fewest_completions_that_they_may_rest_on() -> None:
    assert " and ".join(BY_DEFAULT) in line(leaves(SiteSettings(), None), "means: ")
    assert "each only if 20 completions or more" in line(leaves(SiteSettings(), None), "means: ")
    assert "each only if 64 completions or more" in line(leaves(SiteSettings(min_samples=64), None), "means: ")
    assert line(leaves(SiteSettings(share=()), None), "means: ") == "means: none"


def test_figures_and_gradients_leave_only_by_name() -> None:
    silent = leaves(SiteSettings(), contract())
    assert line(silent, "figures of the algorithm: ") == "figures of the algorithm: none"
    assert line(silent, "compressed gradients: ") == "compressed gradients: none"
    open_ = leaves(SiteSettings(share=EVERYTHING, metrics=("weight/*", "truncated")), contract())
    assert "those named weight/*, truncated," in line(open_, "figures of the algorithm: ")
    assert line(open_, "compressed gradients: ").startswith("compressed gradients: yes")
    assert line(leaves(SiteSettings(), contract("fedcmoo")), "compressed gradients: ").endswith("is refused")


def test_gradients_that_are_shared_are_told_even_if_no_honest_server_asks() -> None:
    quiet = contract("fedgrpo", evaluation={"conflicts": False})
    assert line(leaves(SiteSettings(share=("gradients",)), quiet), "compressed gradients: yes")


def test_ratings_are_exact_randomised_or_refused() -> None:
    judged = contract("mor", loss={"beta": 0.04})
    assert line(leaves(SiteSettings(), judged), "ratings: ").startswith("ratings: exact; ")
    assert line(leaves(SiteSettings(), judged), "calibration").endswith(": exact")
    randomised = leaves(SiteSettings(epsilon_per_prompt=2.5), judged)
    assert line(randomised, "ratings: ").startswith("ratings: randomised 0/1 answers, epsilon 2.5 for each question")
    assert line(randomised, "calibration").endswith(": refused")
    noised = leaves(SiteSettings(clip_norm=1.0, noise_multiplier=1.0), judged)
    assert line(noised, "ratings: ").startswith("ratings: refused; ")
    assert [one for one in leaves(SiteSettings(), contract()) if one.startswith(("ratings", "calibration"))] == []


def test_no_adapter_leaves_where_the_server_trains_or_training_is_not_answered() -> None:
    for lines in (leaves(SiteSettings(), contract("fedgrpo")), leaves(SiteSettings(verbs=("hello",)), contract())):
        assert [one for one in lines if one.startswith(("adapter", "means", "weight in a mean"))] == []


def test_without_a_contract_every_request_is_told() -> None:
    assert line(leaves(SiteSettings(), None), "answers to: ") == f"answers to: {', '.join(REQUESTS)}"


def test_ceilings_stand_beside_what_the_run_asks_for() -> None:
    site = SiteSettings(max_rounds=9, max_local_steps=6, max_completion_length=130)
    lines = leaves(site, contract("soups"))
    assert line(lines, "ceiling max_rounds: ") == "ceiling max_rounds: 9; this run asks for 10, so it is refused"
    assert line(lines, "ceiling max_local_steps: ") == "ceiling max_local_steps: 6; this run asks for 6"
    assert line(lines, "ceiling max_completion_length: ").endswith(": 130; this run asks for 130")
    assert line(lines, "ceiling max_learning_rate: ") == "ceiling max_learning_rate: none; this run asks for 0.0003"
    judged = leaves(SiteSettings(max_candidates=77), contract("fedgrpo"))
    assert line(judged, "ceiling max_candidates: ") == "ceiling max_candidates: 77 in one request"


def test_public_sampling_is_told_for_what_it_lets_a_server_do() -> None:
    assert "a guessed prompt's completions" in line(leaves(SiteSettings(public_sampling=True), None), "sampling: ")
    assert [one for one in leaves(SiteSettings(), None) if one.startswith("sampling")] == []

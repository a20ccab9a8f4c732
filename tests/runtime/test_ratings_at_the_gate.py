"""What a member that only judges lets in and out: ceilings, malformed requests, planted columns, noise."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpact.errors import ConfigError, FedPactError, InadmissibleError, RefusedError
from fedpact.messages import Evaluate, Examine, Examined, Fit, Fitted, Hello, Request, Score, Scored, Train
from fedpact.runtime.admission import Limits, admit
from fedpact.runtime.client_config import ClientConfig
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import Engines
from fedpact.runtime.envelope import Answer, Envelope, seal
from fedpact.runtime.member import Member
from fedpact.runtime.noise import noisy_ratings
from fedpact.types import Prompts

NAN = float("nan")
REWARDS = """
import json
from pathlib import Path

def good(completions, **columns):
    return [float("good" in text) for text in completions]

def half(completions, **columns):
    return [0.5 for _ in completions]

def columns(completions, **columns):
    (Path(__file__).parent / "seen").write_text(json.dumps(sorted(columns)))
    return [1.0 for _ in completions]

def knows(completions, answer, **columns):
    return [None if a is None else float(a in text) for a, text in zip(answer, completions)]
"""


def contract(algorithm: str = "fedgrpo", **changes: Any) -> str:
    settings: dict[str, Any] = {"name": algorithm}
    if algorithm in ("fedavg",):
        settings["local_steps"] = 50
    config = {
        "rounds": 3,
        "objectives": {"correct": {"primary": True}},
        "policy": {"model": "m"},
        "algorithm": settings,
        "loss": {"beta": 0.1},
        "server": {"prompts": {"path": "x"}},
        **changes,
    }
    return contract_of(RunConfig.model_validate(config), model="hash").canonical()


def member(folder: Path, reward: str = "good", *, algorithm: str = "fedgrpo", **file: Any) -> Member:
    """Judge-only, between sites: no prompts, no model; it has accepted the contract."""
    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    site = {"accept": contract_hash(contract(algorithm)), **file.pop("site", {})}
    config = ClientConfig.model_validate(
        {"name": "ann", "rewards": {"correct": {"use": f"rewards.py:{reward}"}}, "site": site, **file}
    )
    one = Member(config, folder=folder, home=folder / "home", where="ann.toml", engines=Engines())
    send(one, Hello(contract(algorithm)), algorithm=algorithm)
    return one


def envelope(request: Request[Any], *, algorithm: str = "fedgrpo", **changes: Any) -> Envelope:
    return replace(
        seal(request, run="r", contract=contract_hash(contract(algorithm)), round=1, exchange=0, nonce="n"), **changes
    )


def send(to: Member, request: Request[Any], **changes: Any) -> Any:
    answer = decode(Answer, to.handle(encode(envelope(request, **changes))))
    return decode(request.reply, answer.reply)


def score(completions: Sequence[str], rows: Sequence[int] | Tensor | None = None, *texts: str, **columns: Any) -> Score:
    texts = texts or ("what?",)
    prompts = Prompts(text=texts, ids=torch.arange(len(texts)), columns=columns)
    return Score(prompts, torch.as_tensor([0] * len(completions) if rows is None else rows), completions)


def fit(asked: Score) -> Fit:
    return Fit(asked.prompts, asked.rows, asked.completions)


def examine(references: Sequence[str], decoys: Sequence[str], *texts: str) -> Examine:
    texts = texts or tuple(f"question {i}" for i in range(len(references)))
    return Examine(Prompts(text=texts, ids=torch.arange(len(texts)), columns={}), references, decoys)


# --- who is let in --------------------------------------------------------------------------------------------------


def test_a_member_without_prompts_and_model_judges_and_does_not_train(tmp_path):
    one = member(tmp_path)
    assert send(one, score(["good", "bad"])).rewards.tolist() == [[1.0, 0.0]]
    canonical = contract("fedavg")
    config = one.config.model_copy(update={"site": one.config.site.model_copy(update={"accept": None})})
    local = Member(config, folder=tmp_path, home=tmp_path / "h", where="ann.toml", engines=Engines(), simulation=True)
    with pytest.raises(ConfigError, match=r"^ann.toml: prompts: missing; under this algorithm the members train$"):
        local.hello(Hello(canonical))


@pytest.mark.parametrize("algorithm", ["fedgrpo", "mor"])
def test_ceilings_on_training_do_not_refuse_judging(tmp_path, algorithm):
    ceilings = {"max_local_steps": 1, "max_completion_length": 1, "max_learning_rate": 1e-9}
    assert member(tmp_path, algorithm=algorithm, site=ceilings).contract is not None
    with pytest.raises(RefusedError, match=r"site.max_rounds: the run asks for 3, allowed are 2"):
        member(tmp_path, algorithm=algorithm, site={**ceilings, "max_rounds": 2})


@pytest.mark.parametrize("request_", [Evaluate({}), Train({}), fit(score(["x"]))], ids=lambda r: r.verb)
def test_what_the_accepted_algorithm_does_not_send_is_refused(tmp_path, request_):
    with pytest.raises(RefusedError, match=f"fedgrpo sends no '{request_.verb}' requests"):
        send(member(tmp_path), request_)


def test_a_verb_that_is_not_listed_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"site.verbs: 'examine' is not allowed"):
        send(member(tmp_path, site={"verbs": ["hello", "score"]}), examine(["good"], ["bad"]))


@pytest.mark.parametrize(
    ("allowed", "refused", "algorithm"),
    [
        (score(["good"] * 3), score(["good"] * 4), "fedgrpo"),
        (fit(score(["good"] * 3)), fit(score(["good"] * 4)), "mor"),
        (examine(["good"], ["bad"]), examine(["good"] * 2, ["bad"] * 2), "fedgrpo"),  # a decoy is judged too
    ],
    ids=["score", "fit", "examine"],
)
def test_more_candidates_than_allowed_are_refused(tmp_path, allowed, refused, algorithm):
    one = member(tmp_path, algorithm=algorithm, site={"max_candidates": 3})
    send(one, allowed, algorithm=algorithm)
    with pytest.raises(RefusedError, match=r"site.max_candidates: the request has 4, allowed are 3"):
        send(one, refused, algorithm=algorithm)


@pytest.mark.parametrize(
    "rows",
    [[0, -1], [0, 1], [0], [0, 0, 0], [[0, 0]], torch.zeros(2), torch.zeros(2, dtype=torch.int32), 0],
    ids=["negative", "beyond", "short", "long", "two axes", "floats", "int32", "no axis"],
)
def test_rows_that_name_no_question_are_refused(tmp_path, rows):
    with pytest.raises(RefusedError, match=r"malformed request: rows do not say"):
        send(member(tmp_path), score(["good", "bad"], rows))


@pytest.mark.parametrize(
    "request_",
    [
        examine(["good", "good"], ["bad"]),
        examine(["good"], ["bad", "bad"]),
        examine(["good"], ["bad"], "one", "two"),
        score(["good"], None, "what?", id=[]),
        score(["good"], None, "what?", id=["1", "2"]),
        replace(score(["good"]), prompts=Prompts(text=["what?"], ids=torch.zeros(0, dtype=torch.int64), columns={})),
        replace(score(["good"]), prompts=Prompts(text=["what?"], ids=torch.tensor([0.5]), columns={})),
        replace(score(["good"]), prompts=Prompts(text=[[{"role": "user"}]], ids=torch.tensor([0]), columns={})),
        replace(score(["good"]), prompts=Prompts(text=[[{}]], ids=torch.tensor([0]), columns={})),
        replace(score(["good"]), prompts=Prompts(["what?"], torch.tensor([0]), {}, torch.zeros(0, dtype=torch.int64))),
    ],
    ids=["decoys", "references", "texts", "no ids", "ids", "rows", "floats", "no content", "no role", "domains"],
)
@pytest.mark.parametrize("answers", [False, True])
def test_a_malformed_request_is_answered_or_refused_in_one_line_and_never_a_crash(tmp_path, request_, answers):
    (tmp_path / "known.jsonl").write_text(json.dumps({"prompt": "what?", "answer": "good"}) + "\n")
    one = member(tmp_path, **({"answers": {"path": "known.jsonl"}} if answers else {}))
    try:
        reply = send(one, request_)
        admit(reply, Limits(1), request_)
    except FedPactError as error:
        assert "\n" not in str(error)


# --- planted columns ------------------------------------------------------------------------------------------------


def test_columns_that_the_server_plants_never_reach_the_rewards(tmp_path):
    one = member(tmp_path, "columns")
    send(one, score(["x"], None, "what?", answer=["x"], secret=["y"], id=["1"]))
    assert json.loads((tmp_path / "seen").read_text()) == ["prompts"]


def test_a_planted_answer_does_not_replace_a_trusted_one(tmp_path):
    (tmp_path / "known.jsonl").write_text(json.dumps({"prompt": "what?", "answer": "truth"}) + "\n")
    one = member(tmp_path, "knows", answers={"path": "known.jsonl"})
    reply = send(one, score(["truth", "lie", "lie"], [0, 0, 1], "what?", "who?", answer=["lie", "lie"]))
    torch.testing.assert_close(reply.rewards, torch.tensor([[1.0, 0.0, NAN]]), equal_nan=True)


# --- what may leave -------------------------------------------------------------------------------------------------

GOOD = [f"good {i}" for i in range(50)] + [f"bad {i}" for i in range(50)]


def test_with_a_budget_no_exact_reward_leaves_and_no_share_of_them_survives(tmp_path):
    exact = send(member(tmp_path / "a"), score(GOOD)).rewards[0]
    noisy = send(member(tmp_path / "b", site={"epsilon_per_prompt": 100.0}), score(GOOD)).rewards[0]
    assert exact.tolist() == [1.0] * 50 + [0.0] * 50
    assert len(noisy.unique()) == 2  # 1 epsilon each: one value above 1 and one below 0
    high, low = noisy.max(), noisy.min()
    assert (float(high), float(low)) == pytest.approx((1.5820, -0.5820), abs=1e-4)  # e/(e-1), -1/(e-1)
    flipped = torch.cat([noisy[:50] == low, noisy[50:] == high]).float().mean()
    assert 0.12 < flipped < 0.42  # 1/(1+e) = 0.27; three standard deviations


def test_asking_again_tells_nothing_new_and_another_member_has_other_noise(tmp_path):
    one, other = (member(tmp_path / name, site={"epsilon_per_prompt": 10.0}) for name in "ab")
    first = send(one, score(GOOD)).rewards
    send(one, score(["good"]), exchange=1)  # the kept reply is another one now
    assert torch.equal(send(one, score(GOOD), attempt=1, nonce="again").rewards, first)
    assert torch.equal(send(one, score(GOOD), round=2).rewards, first)
    assert torch.equal(send(one, score(GOOD), exchange=7).rewards, first)
    assert not torch.equal(send(other, score(GOOD)).rewards, first)  # same contract and seed, another secret


def asked(texts: Sequence[str], rows: Sequence[int]) -> Score:
    """Completions that all differ."""
    return score([f"completion {i}" for i in range(len(rows))], rows, *texts)


def test_noise_is_unbiased():
    request = asked([f"question {i}" for i in range(5_000)], [i // 4 for i in range(20_000)])
    rewards = torch.cat([torch.ones(5_000), torch.zeros(15_000)])[None]
    told = noisy_ratings(request, rewards, 4.0, b"s" * 32)
    assert float(told[0, :5_000].mean()) == pytest.approx(1.0, abs=0.06)  # standard error 0.014
    assert float(told[0, 5_000:].mean()) == pytest.approx(0.0, abs=0.04)


def test_a_questions_budget_is_shared_by_all_that_is_told_about_it():
    truth = torch.tensor([[1.0, 1.0, 1.0, 1.0, NAN], [NAN] * 5])
    told = noisy_ratings(asked(["a?", "b?"], [0, 0, 0, 1, 1]), truth, 3.0, b"s" * 32)[0]
    # whatever is told lies e / (e - 1) - 1/2 from one half, at e^(3/3) for three candidates and e^(3/2) for two
    far = [float((torch.tensor(e).exp() + 1) / (torch.tensor(e).exp() - 1) / 2) for e in (1.0, 1.5)]
    assert (told - 0.5).abs()[:4].tolist() == pytest.approx([far[0]] * 3 + [far[1]], rel=1e-5)
    assert told[4].isnan()


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn} for turn in turns]


@pytest.mark.parametrize("padded", [False, True])
def test_a_question_that_is_sent_many_times_in_a_request_has_one_budget(tmp_path, padded):
    texts = [chat(f"pad {i}", "what?") if padded else "what?" for i in range(400)]
    request = replace(asked([], range(400)), prompts=Prompts(text=texts, ids=torch.arange(400), columns={}))
    request = replace(request, completions=[f"good {i}" for i in range(400)])
    told = send(member(tmp_path, site={"epsilon_per_prompt": 4.0}), request).rewards[0]
    share_kept = float((told == told.max()).float().mean())
    assert share_kept < 0.6  # 0.982 were it 4 for each of 400; 0.5025 for a hundredth each


def test_ratings_other_than_zero_and_one_are_refused_with_a_budget(tmp_path):
    message = r"^ann.toml: site.epsilon_per_prompt: a rating is 0.5; .* use rewards of 0 and 1, or send exact ones$"
    with pytest.raises(RefusedError, match=message):
        send(member(tmp_path, "half", site={"epsilon_per_prompt": 1.0}), score(["x"]))


def test_an_examination_does_not_tell_exactly_what_a_budget_hides(tmp_path):
    one = member(tmp_path, site={"epsilon_per_prompt": 0.01})
    candidates = [f"{'good' if i % 2 else 'bad'} {i}" for i in range(200)]
    try:
        bits = send(one, examine(candidates, [""] * 200)).prefers_first  # good exactly where the judge says so
    except RefusedError:
        return
    agreement = float((bits == torch.tensor([i % 2 for i in range(200)]).bool()).float().mean())
    assert agreement < 0.75  # one half is chance


def test_a_calibration_does_not_tell_exactly_what_a_budget_hides(tmp_path):
    one = member(tmp_path, algorithm="mor", site={"epsilon_per_prompt": 0.01})
    told = []
    for i, text in enumerate(["good", "bad"] * 10):
        try:
            told.append(float(send(one, fit(score([text])), algorithm="mor", exchange=i).mean[0]))
        except RefusedError:
            return
    assert told != [1.0, 0.0] * 10


def test_the_secret_is_the_members_own_and_in_nothing_that_leaves(tmp_path):
    one = member(tmp_path, site={"epsilon_per_prompt": 1.0})
    answer = one.handle(encode(envelope(score(["good"]))))
    path = tmp_path / "home" / "secret"
    secret = path.read_bytes()
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    kept = [f for f in (tmp_path / "home").rglob("*") if f.is_file() and f != path]
    assert any(f.name == "ledger.jsonl" for f in kept)
    for data in (answer, *(f.read_bytes() for f in kept)):
        assert secret not in data
        assert secret.hex().encode() not in data
    send(one, score(["good"]), round=2)
    assert path.read_bytes() == secret


# --- what the server takes ------------------------------------------------------------------------------------------

ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("reply", "request_", "message"),
    [
        (Scored(torch.ones(2, 3)), score(["a", "b"]), r"rewards: found \(2, 3\)"),
        (Scored(torch.ones(1, 2)), score(["a", "b"]), r"rewards: found \(1, 2\)"),
        (Scored(torch.ones(2, 2).double()), score(["a", "b"]), "float64"),
        (Scored(torch.tensor([[torch.inf, 0], [0, 0]])), score(["a", "b"]), "1 of 4 entries are not finite"),
        (Scored(torch.tensor([[-2e6, 0], [0, NAN]])), score(["a", "b"]), r"rewards: found 2e\+06"),
        (Examined(torch.ones(2).bool()), examine(["a"], ["b"]), r"prefers_first: found \(2,\)"),
        (Examined(torch.ones(1)), examine(["a"], ["b"]), "expected .* torch.bool"),
        (Fitted(ONES, ONES, torch.ones(3)), fit(score(["a"])), r"accuracy: found \(3,\)"),
        (Fitted(ONES * torch.inf, ONES, ONES), fit(score(["a"])), "mean: 2 of 2"),
        (Fitted(ONES * 1e30, ONES, ONES), fit(score(["a"])), "mean: found"),
        (Fitted(ONES, ONES * 1e30, ONES), fit(score(["a"])), "std: found"),
        (Fitted(ONES, -ONES, ONES), fit(score(["a"])), "std: found"),
        (Fitted(ONES, ONES, ONES * 7), fit(score(["a"])), "accuracy: found"),
    ],
)
def test_ratings_that_cannot_be_are_refused_by_name(reply, request_, message):
    with pytest.raises(InadmissibleError, match=message):
        admit(reply, Limits(2), request_)


def test_no_rating_is_a_rating_that_is_admitted():
    admit(Scored(torch.full((2, 2), NAN)), Limits(2), score(["a", "b"]))
    admit(Scored(torch.zeros(2, 0)), Limits(2), score([]))
    admit(Fitted(*[torch.full((2,), NAN)] * 3), Limits(2), fit(score(["a"])))

"""Malformed and hostile messages, to a member and to a round of the server: each is refused in one line, or answered.

Nothing else happens: no traceback, no hang, and a member's memory, secret and contract stay as they were. 1,000 go each
way, from fixed seeds, beside those that are made by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from fedpact.core.lora import initial_adapter
from fedpact.errors import FedPactError, InadmissibleError
from fedpact.messages import (
    REQUESTS,
    Averaged,
    Count,
    Counted,
    Differentiate,
    Differentiated,
    Evaluate,
    Evaluated,
    Examine,
    Examined,
    Fit,
    Fitted,
    Hello,
    Introduced,
    Reply,
    Request,
    Score,
    Scored,
    Train,
    Trained,
)
from fedpact.runtime.admission import Limits
from fedpact.runtime.client_config import load_client
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import load_run
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import Engines, hash_of, skeleton
from fedpact.runtime.envelope import Envelope, opened, seal, wrap
from fedpact.runtime.exchange import mean_reply
from fedpact.runtime.files import tensor_bytes
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.member import Member
from fedpact.runtime.transport import Failure
from fedpact.types import Adapter, Prompts
from tests.cli.conftest import files, model, settings, write_project
from tests.runtime.test_exchange import one_round

__all__ = ["model"]

pytestmark = pytest.mark.slow

NAN = float("nan")
LONGEST = 800
"""Characters of a line that says what is wrong."""
SMALL = [
    "rollout.num_generations=2",
    "rollout.max_completion_length=2",
    "training.prompts_per_step=1",
    "evaluation.num_prompts=20",
]


@dataclass(repr=False)
class Site:
    """A member between sites that has accepted its contract."""

    member: Member
    contract: str
    """Canonical."""
    adapter: Adapter

    def envelope(self, request: Request[Any], **where: Any) -> Envelope:
        at = {"run": "r", "contract": contract_hash(self.contract), "round": 2, "exchange": 0, "nonce": "n"}
        return seal(request, **{**at, **where})

    def send(self, request: Request[Any], **where: Any) -> Any:
        envelope = self.envelope(request, **where)
        return opened(envelope, self.member.handle(encode(envelope)))[0]

    def state(self) -> str:
        """All that a refused message must leave as it is: everything but ledger, log and errors."""
        home, one = self.member.home, self.member
        kept = {n: data for n, data in files(home).items() if n.startswith("memory/") or n == "secret"}
        what = [sorted((n, hashlib.sha256(data).hexdigest()) for n, data in kept.items()), one.accepted]
        return str([*what, one.contract, one.gate.share, one.gate.min_samples, one.gate.trained_on])

    def last(self) -> dict[str, Any]:
        """The ledger's last line."""
        return Ledger.entries(self.member.ledger.path)[-1]


class Sites:
    """Members by algorithm, over one model."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.engines, self.made = folder, model, Engines(), 0
        self.run_file = write_project(folder / "project", model=model)

    def make(self, algorithm: str, *overrides: str, client: str = "east", **site: Any) -> Site:
        """A member with these `[site]` settings beside `accept`; `overrides` are of the run file."""
        options = [*settings(algorithm)[1::2], *SMALL, *overrides]
        config = load_run(self.run_file, options)
        text = contract_of(config, model=hash_of(self.model)).canonical()
        clients, self.made = self.run_file.parent / "clients", self.made + 1
        file = load_client(clients / f"{client}.toml")
        gate = file.site.model_copy(update={"accept": contract_hash(text), **site})
        layers = skeleton(config.policy, where="run.toml", folder=self.run_file.parent).layers
        member = Member(
            file.model_copy(update={"site": gate}),
            folder=clients,
            home=self.folder / f"home {self.made}",
            where=f"{client}.toml",
            engines=self.engines,
            model=self.model,
        )
        made = Site(member, text, initial_adapter(layers, 1))
        made.send(Hello(text), round=0)
        return made


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Sites:
    return Sites(tmp_path_factory.mktemp("sites"), model)


VERBS = ["count", "differentiate", "evaluate", "examine", "fit", "hello", "score", "train", "train with control"]
QUESTIONS = Prompts(["w1 w2", "w3"], torch.arange(2), {"id": ["q1", "q2"]})
SCORE = Score(QUESTIONS, torch.tensor([0, 0, 1]), ["w1", "w2", "w3 w4"])


class Everybody(dict[str, tuple[Site, Request[Any]]]):
    __repr__ = object.__repr__  # tensors fill many screens


@pytest.fixture(scope="module")
def everybody(sites: Sites) -> Everybody:
    """Every verb, a member that answers it, and a sound request. Who trains has a private adapter in its memory."""
    share = ("rewards", "accuracy", "gradients")
    trains = sites.make("disco", "policy.private={ r = 1, lora_alpha = 3 }", share=share)
    trains.send(Train(trains.adapter), round=1)
    assert "0001-00.safetensors" in files(trains.member.store.folder)
    drifts, judges, fits = sites.make("scaffold", share=share), sites.make("fedgrpo"), sites.make("mor")
    control = {f"control/{name}": torch.zeros_like(tensor) for name, tensor in drifts.adapter.items()}
    drifts.send(Train({**drifts.adapter, **control}), round=1)
    train = Train(trains.adapter, torch.tensor([0.5, 0.5]), {"odd": 1.5, "even": 0.5})
    found = {
        "hello": (judges, Hello(judges.contract)),
        "train": (trains, train),
        "train with control": (drifts, Train({**drifts.adapter, **control})),
        "evaluate": (trains, Evaluate(trains.adapter, personal=True)),
        "differentiate": (trains, Differentiate(trains.adapter, 4, 7)),
        "count": (trains, Count(("odd", "even"))),
        "examine": (judges, Examine(QUESTIONS, ["w1", "w2"], ["w58", "w59"])),
        "score": (judges, SCORE),
        "fit": (fits, Fit(SCORE.prompts, SCORE.rows, SCORE.completions)),
    }
    return Everybody(found)


def outcome(site: Site, data: bytes) -> str:
    """ "" if the message was answered, else the one line that refused it. Fails if anything else came of it."""
    before, began = site.state(), time.process_time()
    try:
        answer = site.member.handle(data)
    except FedPactError as error:
        text = str(error)
        assert "\n" not in text and len(text) <= LONGEST and "internal error" not in text, text
        text.encode()  # a screen can show it
        assert site.state() == before
    else:
        text = ""
        envelope = decode(Envelope, data)
        opened(envelope, answer)
        if envelope.run != "r" and envelope.verb == "hello":
            site.send(Hello(site.contract), round=0)  # of the run that all other messages come from
    assert time.process_time() - began < 5
    return text


# --- damage of any kind ---------------------------------------------------------------------------------------------


def damaged(data: bytes, other: bytes, seed: int) -> bytes:
    """Flipped, cut, doubled, mixed with another message, or with another length in front."""
    draw = random.Random(seed)
    changed = bytearray(data)
    match draw.randrange(7):
        case 0 | 1 | 2:
            for _ in range(draw.choice((1, 1, 2, 4, 64))):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case 3:
            return data[: draw.randrange(len(data))]
        case 4:
            return data + (data if draw.random() < 0.5 else other)
        case 5:
            place = draw.randrange(min(len(data), len(other)))
            return data[:place] + other[place:]
        case _:
            return struct.pack("<Q", draw.choice((0, 1, 2**20, 2**40, 2**62, 2**64 - 1))) + data[8:]


def test_damaged_messages_are_refused_in_one_line_or_are_sound_after_all(everybody):
    assert set(everybody) == set(VERBS) and {verb.split()[0] for verb in VERBS} == set(REQUESTS)
    refused = 0
    for seed in range(400):
        site, request = everybody[VERBS[seed % len(VERBS)]]
        data = encode(site.envelope(request))
        refused += outcome(site, damaged(data, encode(Hello("x" * len(data))), seed)) != ""
    assert refused > 350


# --- well-formed bytes, hostile values --------------------------------------------------------------------------------

TEXTS = ["", "x" * 10_000, "\ud800", "a\nb\x1b[2J\u202e", "../../etc/passwd", "http://evil.example/x", "0" * 64, "a\0b"]
NUMBERS = [0, -1, 1, 3, 4, 10**6, 2**63, -(2**63), 10**39, 10**41, 0.5, -0.0, NAN, math.inf, -math.inf, 1e308, 1e-320]
LEAVES = [
    *TEXTS,
    *NUMBERS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"": 0},
    "tensor",
    ["tensor"],
    {"adapter": {"x": "tensor"}},
]
TENSORS: list[Tensor] = [
    torch.zeros(0),
    torch.zeros(()),
    torch.zeros(0, 3),
    torch.full((2,), NAN),
    torch.full((2,), math.inf),
    torch.full((2,), -1.0),
    torch.tensor([1e38, 1e38]),
    torch.ones(2, 2, 2, 2, 2, 2, 2, 2),
    torch.ones(3),
    torch.ones(2, dtype=torch.float64),
    torch.ones(2, dtype=torch.float16),
    torch.ones(2, dtype=torch.int64),
    torch.tensor([-1, 2**62]),
    torch.ones(2, dtype=torch.bool),
    torch.zeros(1_000_000),
]
NAMES = [
    "private/x",
    "control/x",
    "critic/heads",
    "../../x",
    "",
    "adapter",
    "a" * 5000,
    "base_model.model.x",
    "\x1b[2J",
]


def apart(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header of an encoded value, and its arrays."""
    from safetensors.torch import load

    outer = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(outer["__metadata__"]["fedpact"]), load(data)


def together(header: Any, arrays: Mapping[str, Tensor]) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header, sort_keys=True, separators=(",", ":"))
    return tensor_bytes(arrays, {"fedpact": text})


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a header."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from places(item, (*path, name))


def changed(data: bytes, choose: Callable[[Sequence[Any]], Any]) -> bytes:
    """The encoded value with one thing of it replaced, removed, renamed or added."""
    header, arrays = apart(data)
    if arrays and choose([True, False]):
        name = choose(sorted(arrays))
        match choose(["replace", "scale", "cast", "reshape", "remove", "rename"]):
            case "replace":
                arrays[name] = choose(TENSORS)
            case "scale":
                arrays[name] = arrays[name] * choose([0, -1, 1e30, NAN, math.inf])
            case "cast":
                arrays[name] = arrays[name].to(choose([torch.float64, torch.bfloat16, torch.int64, torch.bool]))
            case "reshape":
                arrays[name] = choose([arrays[name].flatten(), arrays[name][None], arrays[name][..., :1].clone()])
            case "remove":
                del arrays[name]
            case "rename":
                arrays[name.split("/")[0] + "/" + choose(NAMES)] = arrays.pop(name)
        return together(header, arrays)
    *path, last = choose(list(places(header)))
    node = header
    for name in path:
        node = node[name]
    match choose(["replace", "replace", "replace", "remove", "add", "repeat"]):
        case "replace":
            node[last] = choose(LEAVES)
        case "remove":
            del node[last]
        case "add" if isinstance(node, dict):
            name = choose([*NAMES, "code", "path", "url"])
            node[name] = choose(LEAVES)
            if choose([True, False]):
                node[name], arrays[f"{path[-1] if path else ''}/{name}"] = "tensor", choose(TENSORS)
        case _:
            node[last] = [node[last]] * choose([2, 1000])
    return together(header, arrays)


@examples(max_examples=400, derandomize=True, deadline=None, database=None)
@given(verb=st.sampled_from(VERBS), seed=st.integers(0, 2**32))
def test_a_request_with_one_hostile_value_is_refused_in_one_line_or_answered(everybody, verb, seed):
    site, request = everybody[verb]
    try:
        hostile = changed(encode(request), random.Random(seed).choice)
    except UnicodeEncodeError:  # an array's name cannot hold half a character
        return
    envelope = replace(site.envelope(request), request=hostile, sha256=hashlib.sha256(hostile).hexdigest())
    outcome(site, encode(envelope))


@examples(max_examples=200, derandomize=True, deadline=None, database=None)
@given(verb=st.sampled_from(VERBS), seed=st.integers(0, 2**32))
def test_an_envelope_with_one_hostile_value_is_refused_in_one_line_or_answered(everybody, verb, seed):
    site, request = everybody[verb]
    outcome(site, changed(encode(site.envelope(request)), random.Random(seed).choice))


# --- made by hand ---------------------------------------------------------------------------------------------------


def with_adapter(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Any], Any]:
    """The request with one of its tensors changed, removed (None), or, if it has none of that name, added."""

    def build(request: Any) -> Any:
        real = sorted(request.adapter)[0] if name == "first" else name
        adapter = dict(request.adapter)
        tensor = adapter.pop(real, torch.ones(2))
        return replace(request, adapter=adapter if change is None else {**adapter, real: change(tensor)})

    return build


def with_(**changes: Any) -> Callable[[Any], Any]:
    return lambda request: replace(request, **changes)


def question(**changes: Any) -> Callable[[Any], Any]:
    return lambda request: replace(request, prompts=replace(request.prompts, **changes))


def same(tensor: Tensor) -> Tensor:
    return tensor


BROUGHT = [
    (with_(adapter={}), "'base_model.model.* is missing"),
    (with_adapter("first", None), "is missing"),
    (with_adapter("first", lambda t: t.mT.contiguous()), r"is \(48, 2\), expected \(2, 48\)"),
    (with_adapter("first", lambda t: t[:0]), r"is \(0, 48\)"),
    (with_adapter("first", lambda t: t[:1]), r"is \(1, 48\)"),
    (with_adapter("first", lambda t: t * NAN), "is not finite"),
    (with_adapter("first", lambda t: t + math.inf), "is not finite"),
    (with_adapter("first", torch.Tensor.double), "is torch.float64"),
    (with_adapter("first", torch.Tensor.half), "is torch.float16"),
    (with_adapter("first", torch.Tensor.long), "is torch.int64"),
    (with_adapter("private/x", same), "'private/x' is .* expected no such tensor"),
    (with_adapter("private/" + "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", same), "'private/base_"),
    (with_adapter("control/x", same), "'control/x' is"),
    (with_adapter("critic/heads", same), "'critic/heads' is"),
    (with_adapter("../../etc/passwd", same), "'../../etc/passwd' is"),
    (with_adapter("", same), "'' is"),
    (with_adapter("\x1b[2J", same), r"'\\x1b\[2J' is"),
    (with_adapter("n" * 9999, same), "'n{99} is"),
]
WEIGHTS = [torch.ones(3), torch.ones(2, 2), torch.zeros(0), torch.tensor(1.0), torch.tensor([NAN, 1.0])]
WEIGHTS += [torch.tensor([-1.0, 2.0]), torch.tensor([math.inf, 1.0]), torch.tensor([1, 1]), torch.tensor([True, True])]
NOT_WEIGHTS = "its weights are not 2 finite numbers"
CASES: list[tuple[str, Callable[[Any], Any], str]] = [
    *((verb, build, says) for verb in ("train", "evaluate", "differentiate") for build, says in BROUGHT),
    *(("train with control", *case) for case in BROUGHT),
    ("train with control", with_adapter("control/x", same), "'control/x' is"),
    *((verb, with_(weights=one), NOT_WEIGHTS) for verb in ("train", "train with control") for one in WEIGHTS),
    ("train", with_(domain_weights={"odd": -1.0}), "domain weight is not between"),
    ("train", with_(domain_weights={"odd": 1e308}), "domain weight is not between"),
    ("train", with_(domain_weights={"secret": 1.0}), "weighs the domain 'secret'"),
    ("train with control", with_(domain_weights={"odd": 1.0}), "weighs the domain 'odd'"),
    ("differentiate", with_(rank=0), "rank is 0"),
    ("differentiate", with_(rank=-1), "rank is -1"),
    ("differentiate", with_(rank=10**9), "rank is 1000000000"),
    ("differentiate", with_(rank=10**50), "number of 51 digits"),
    ("differentiate", with_(seed=10**50), "number of 51 digits"),
    ("differentiate", with_(compression="../zip"), "compression is '../zip'"),
    ("count", with_(domains=()), "its domains are not"),
    ("count", with_(domains=("odd",) * 100_000), "its domains are not"),
    ("score", with_(rows=torch.tensor([0, 0, 2])), "rows do not say"),
    ("score", with_(rows=torch.tensor([0, 0, -1])), "rows do not say"),
    ("score", with_(rows=torch.zeros(0, dtype=torch.int64)), "rows do not say"),
    ("score", with_(rows=torch.zeros(10**6, dtype=torch.int64)), "rows do not say"),
    ("score", with_(completions=["w1"] * 4097), "max_candidates: the request has 4097"),
    ("score", with_(completions=["w1"] * 10**6, rows=torch.zeros(10**6, dtype=torch.int64)), "has 1000000, allowed"),
    ("score", with_(completions=["w" * 100_001, "", ""]), "max_text_length: a text has 100001"),
    ("score", question(text=["w"] * 4097, ids=torch.arange(4097), columns={}), "the request has 4097"),
    ("score", question(ids=torch.tensor([0.5, 1.0])), "are not numbered"),
    ("score", question(ids=torch.arange(3)), "columns are not as long"),
    ("score", question(columns={"id": [[1], [2]]}), "public id of a question is no plain value"),
    ("score", question(columns={"id": ["1"]}), "columns are not as long"),
    ("score", question(text=[[{"role": "user"}], []]), "lacks its role or its content"),
    ("examine", with_(first=["w1"]), "expected two answers"),
    ("fit", with_(completions=["w1"] * 4097), "max_candidates"),
    ("hello", with_(contract=""), "site.accept"),
    ("hello", with_(contract="\ud800"), "half a character"),
    ("hello", with_(contract="[" * 100_000), "site.accept"),
    ("hello", with_(contract='{"model":"http://evil.example/model"}'), "site.accept"),
]


@pytest.mark.parametrize(("verb", "build", "says"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_a_hostile_request_is_refused_by_name(everybody, verb, build, says):
    site, request = everybody[verb]
    text = outcome(site, encode(site.envelope(build(request))))
    assert re.search(says, text), text
    assert site.last()["decision"] == "refused"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"round": -1}, "a request of round -1; the accepted contract has 3"),
        ({"round": 4}, "a request of round 4"),
        ({"round": 10**50}, "number of 51 digits"),
        ({"exchange": -1}, "a request of exchange -1"),
        ({"exchange": 10**6}, "a request of exchange 1000000"),
        ({"since": (1, 1)}, "the server asks for this version, kept are: "),
        ({"since": (0, 0)}, "the server asks for this version, kept are: "),
        ({"since": (-1, 0)}, "a request since"),
        ({"since": (2, 0)}, "a request since"),
        ({"since": (10**30, 0)}, "a request since"),
        ({"run": "another"}, "a request of run 'another'; hello was said by run 'r'"),
        ({"run": "\ud800\n" * 10_000}, "run: found '\\ud800\\n"),
        ({"contract": "0" * 64}, "request under contract 000000000000, accepted is"),
        ({"contract": "a\nb\x1b\ud800"}, "request under contract a b"),
        ({"verb": "obey"}, "site.verbs: 'obey' is not allowed"),
        ({"verb": "__class__"}, "site.verbs: '__class__' is not allowed"),
        ({"verb": "\ud800" * 10**5}, "site.verbs: "),
        ({"verb": "score"}, "found 'Train', expected Score"),
        ({"sha256": "0" * 64}, "SHA-256 is not the envelope's"),
        ({"request": b""}, "SHA-256 is not the envelope's"),
    ],
    ids=str,
)
def test_a_request_from_another_place_is_refused_by_name(everybody, changes, says):
    site, request = everybody["train"]
    assert says in outcome(site, encode(replace(site.envelope(request), **changes)))


def bomb(text: str, tensors: int = 0) -> bytes:
    """A blob with this text for its header, and so many empty tensors."""
    outer: dict[str, Any] = {"__metadata__": {"fedpact": text}}
    outer |= {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(tensors)}
    head = json.dumps(outer).encode()
    return struct.pack("<Q", len(head)) + head


@cache
def bombs(kind: str) -> dict[str, bytes]:
    """What costs much more to look at than to send; `kind` is the dataclass that is expected."""
    return {
        "nesting": bomb("[" * 1_000_000),
        "nested objects": bomb('{"a":' * 200_000),
        "tensors": bomb("{}", 40_000),
        "tensors and braces": bomb(json.dumps("{" * 40_000), 40_000),
        "lists": bomb(f'{{"{kind}":[' + "[]," * 140_000 + "[]]}"),
        "digits": bomb(f'{{"{kind}":[' + ("9" * 4299 + ",") * 500 + "1]}"),
        "names": bomb(json.dumps({kind: {"x" * 1_000_000: 1}})),
        "keys": bomb(json.dumps({kind: {str(i): i for i in range(140_000)}})),
        "repeated": bomb(f'{{"{kind}":{{}},"{kind}":{{}}}}'),
        "NaN": bomb(f'{{"{kind}":NaN}}'),
        "1e400": bomb(f'{{"{kind}":1e400}}'),
        "half": bomb(f'{{"{kind}":"\\ud800"}}'),
        "spaces": bomb(" " * 1_000_000),
    }


BOMBS = list(bombs("x"))
STOPPED = {
    "tensors": "more than 32768 tensors",
    "tensors and braces": "more than 32768 tensors",
    "lists": "more than 131072 values",
    "keys": "more than 131072 values",
    "digits": "a number of 4299 digits",
}
"""What stops it before its parts are looked at one by one."""


@pytest.mark.parametrize("name", BOMBS)
def test_what_costs_more_to_read_than_to_send_is_refused_at_once(everybody, name):
    site, request = everybody["score"]
    assert f"cannot be decoded: {STOPPED.get(name, '')}" in outcome(site, bombs("Envelope")[name])
    inner = bombs("Score")[name]
    envelope = replace(site.envelope(request), request=inner, sha256=hashlib.sha256(inner).hexdigest())
    assert "cannot be decoded" in outcome(site, encode(envelope))


def test_after_all_of_that_everybody_answers_a_sound_request(everybody):
    for site, request in everybody.values():
        site.send(request, exchange=9)
        assert not (site.member.home / "errors.log").exists()
        assert Ledger.verify(site.member.ledger.path) > 10


# --- replies to a round of the server -------------------------------------------------------------------------------

SENT: Adapter = {
    "base_model.model.x.lora_A.weight": torch.zeros(2, 3),
    "base_model.model.x.lora_B.weight": torch.zeros(3, 2),
}
TRAINED: Adapter = {name: torch.ones_like(tensor) for name, tensor in SENT.items()}
ONES = torch.ones(2)
HONEST: list[tuple[Request[Any], Reply]] = [
    (Train(SENT), Trained(4.0, TRAINED, ONES, 0.5, {"kl": 0.25})),
    (Evaluate(SENT), Evaluated(4.0, ONES, torch.tensor([4, 4]), 0.5)),
    (Differentiate(SENT, 4, 7), Differentiated(4.0, torch.eye(2), torch.ones(2, 4), {}, ONES)),
    (
        Differentiate(SENT, 2, 7, "svd"),
        Differentiated(
            4.0, torch.eye(2), torch.zeros(2, 0), {"left": torch.ones(6, 2), "right": torch.ones(2, 4)}, ONES
        ),
    ),
    (Count(("odd", "even")), Counted(4.0, torch.tensor([1, 3]))),
    (SCORE, Scored(torch.ones(2, 3))),
    (Examine(QUESTIONS, ["w1", "w2"], ["w3", "w4"]), Examined(torch.tensor([True, False]))),
    (Fit(SCORE.prompts, SCORE.rows, SCORE.completions), Fitted(ONES, ONES, ONES)),
    (Hello("c"), Introduced("north", "", ("correct",), 20, 2, {"fedpact": "1"})),
]


class Hostile:
    """A transport whose members answer with what `answers` makes of their envelopes; it takes the time of each."""

    def __init__(self, answers: Mapping[str, Callable[[Envelope], bytes]]) -> None:
        self.answers, self.longest = answers, 0.0

    def clients(self) -> Sequence[str]:
        return sorted(self.answers)

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for client, data in envelopes.items():
            answer = self.answers[client](decode(Envelope, data))
            began = time.process_time()
            yield client, answer
            self.longest = max(self.longest, time.process_time() - began)


def asked(folder: Path, request: Request[Any], hostile: Sequence[Callable[[Envelope], bytes]], honest: Reply) -> dict:
    """The reasons why replies did not count, by their number. The honest member's does, and the mean is finite."""
    answers: dict[str, Any] = {f"m{i}": one for i, one in enumerate(hostile)}
    answers["honest"] = lambda envelope: wrap(envelope, encode(honest))
    reasons: dict[str, str] = {}
    transport: Any = Hostile(answers)
    one = one_round(transport, folder, dropped=reasons.__setitem__)
    one.limits = Limits(2)
    replies = one.ask(dict.fromkeys(answers, request))
    assert "honest" in replies and transport.longest < 5
    assert reasons.keys() | set(replies) == set(answers) and not reasons.keys() & set(replies)
    for reason in reasons.values():
        assert "\n" not in reason and len(reason) <= LONGEST, reason
        reason.encode()
        assert "cannot be checked" not in reason
    if isinstance(honest, Averaged):
        for value in vars_of(mean_reply(replies.values())):
            assert not isinstance(value, Tensor) or not bool(value.isinf().any())
            assert not isinstance(value, dict) or all(
                bool(t.isfinite().all()) for t in value.values() if torch.is_tensor(t)
            )
    assert Ledger.verify(folder / "ledger.jsonl") > len(answers)
    return reasons


def vars_of(reply: Reply) -> list[Any]:
    return [getattr(reply, one.name) for one in fields(reply)]


@pytest.mark.parametrize("number", range(len(HONEST)), ids=lambda i: f"{i}-{HONEST[i][0].verb}")
def test_hostile_replies_are_refused_in_one_line_and_the_round_goes_on(tmp_path, number):
    request, honest = HONEST[number]

    def flawed(seed: int) -> Callable[[Envelope], bytes]:
        """Damaged on its way; with one hostile value, whole again; or in an answer with one."""
        draw = random.Random(seed)

        def answer(envelope: Envelope) -> bytes:
            sound = encode(honest)
            if seed % 3 == 0:
                return damaged(wrap(envelope, sound), encode(Hello("x" * len(sound))), seed)
            while True:
                try:
                    if seed % 3 == 1:
                        return wrap(envelope, changed(sound, draw.choice))
                    return changed(wrap(envelope, sound), draw.choice)
                except UnicodeEncodeError:
                    continue

        return answer

    reasons = asked(tmp_path, request, [flawed(1000 * number + i) for i in range(112)], honest)
    assert len(reasons) > 80  # others are sound by chance, or a lie that no rule forbids


@pytest.mark.parametrize("name", [*BOMBS, "too many bytes"])
def test_a_reply_that_costs_more_to_read_than_to_send_is_refused_at_once(tmp_path, name):
    request, honest = HONEST[0]
    inner = b"\0" * 200_000 if name == "too many bytes" else bombs("Trained")[name]
    outer = inner if name == "too many bytes" else bombs("Answer")[name]
    reasons = asked(tmp_path, request, [lambda e: wrap(e, inner), lambda e: outer], honest)
    for reason in reasons.values():
        assert "cannot be decoded" in reason or "are taken" in reason
    assert sorted(reasons) == ["m0", "m1"]


def test_an_answer_for_another_place_is_refused_by_name_and_shortly(tmp_path):
    request, honest = HONEST[0]
    changes: list[dict[str, Any]] = [
        {"run": "x" * 50_000}, {"run": "\ud800\n"}, {"contract": "\x1b[2J" * 1000}, {"round": -1}, {"exchange": 10**39},
        {"nonce": "y" * 50_000}, {"sha256": "0"}, {"since": (0, 0)},
    ]  # fmt: skip
    hostile = [lambda envelope, c=c: wrap(replace(envelope, **c), encode(honest)) for c in changes]
    reasons = asked(tmp_path, request, hostile, honest)
    found = [reasons.get(f"m{i}", "").split()[1:2] for i in range(len(changes))]
    assert found == [["run"], ["run"], ["contract"], ["round"], ["exchange"], ["nonce"], ["it"], ["it"]]


def test_a_head_that_is_none_is_refused(tmp_path):
    request, honest = HONEST[0]
    heads = ["", "0" * 63, "G" * 64, "../../x", "\n" * 64]
    hostile = [lambda envelope, head=head: wrap(envelope, encode(honest), head=head) for head in heads]
    assert set(asked(tmp_path, request, hostile, honest).values()) == {"reply: head is no SHA-256"}


def test_a_message_of_the_other_side_is_none(everybody):
    site, _ = everybody["train"]
    with pytest.raises(InadmissibleError, match="found 'Trained', expected Envelope"):
        site.member.handle(encode(HONEST[0][1]))

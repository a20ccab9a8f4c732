from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.messages import REQUESTS, Evaluate, Evaluated, Train
from fedpact.runtime.codec import decode, encode
from fedpact.types import Message, Prompts


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """Every type that the codec knows."""

    tensor: Tensor
    maybe: Tensor | None
    adapter: dict[str, Tensor]
    name: str
    count: int
    share: float
    ready: bool
    accuracy: float | None
    metrics: Mapping[str, float]
    pair: tuple[int, int] | None
    objectives: tuple[str, ...]
    chat: list[Message]
    blob: bytes
    mode: Literal["all", "head"]
    columns: Mapping[str, Sequence[Any]]
    prompts: Prompts


def parcel(**changes: Any) -> Parcel:
    prompts = Prompts(
        text=["2 + 2?", [{"role": "user", "content": "3 + 3? \ud800 \x00 é"}]],
        ids=torch.tensor([0, 1]),
        columns={"answer": ["4", None], "nested": [{"b": [1, 2.5, True]}, []]},
    )
    values: dict[str, Any] = {
        "tensor": torch.tensor([[1.0, math.nan], [math.inf, -0.0]]),
        "maybe": None,
        "adapter": {
            "base_model.q/x": torch.arange(3, dtype=torch.bfloat16),
            "a": torch.zeros(0, 4),
            "s": torch.tensor(7),
        },
        "name": "north",
        "count": 2**70,
        "share": 0.1,
        "ready": True,
        "accuracy": None,
        "metrics": {"loss": 1e-300},
        "pair": (7, 0),
        "objectives": ("correct", "brief"),
        "chat": [{"role": "user", "content": "hello"}],
        "blob": b"\x00\xff",
        "mode": "head",
        "columns": {"answer": [1, "two", None, False]},
        "prompts": prompts,
    }
    return Parcel(**(values | changes))


def assert_equal(a: Any, b: Any) -> None:
    """Same types, same values, NaN equal to NaN."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif is_dataclass(a):
        assert type(a) is type(b)
        for field in fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, Mapping):
        assert set(a) == set(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert type(a) is type(b) and a == b


def test_every_type_of_field_comes_back_as_it_was():
    value = parcel()
    assert_equal(decode(Parcel, encode(value)), value)
    value = parcel(maybe=torch.tensor([True, False]), accuracy=0.5, pair=None, blob=b"", adapter={}, objectives=())
    assert_equal(decode(Parcel, encode(value)), value)


def sample(hint: Any) -> Any:
    """Some value of a type that messages use."""
    plain = {Tensor: torch.tensor([0.5, math.nan]), str: "north", int: 3, float: 0.25, bool: True, type(None): None}
    if hint in plain:
        return plain[hint]
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{field.name: sample(hints[field.name]) for field in fields(hint)})
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (dict, Mapping):
        return {"a": sample(arguments[1])}
    if origin in (tuple, list, Sequence):
        return origin([sample(arguments[0])]) if origin is not Sequence else [sample(arguments[0])]
    return "x" if hint is Any else sample(arguments[0])  # a union


@pytest.mark.parametrize("kind", [kind for request in REQUESTS.values() for kind in (request, request.reply)])
def test_every_message_comes_back_as_it_was(kind):
    value = sample(kind)
    assert_equal(decode(kind, encode(value)), value)


def test_equal_values_give_equal_bytes_whatever_their_order_and_layout():
    square = torch.arange(4.0).reshape(2, 2)
    a = Train({"x": square.T, "y": square[0]})
    b = Train({"y": torch.tensor([0.0, 1.0]), "x": torch.tensor([[0.0, 2.0], [1.0, 3.0]])})
    assert encode(a) == encode(b)
    first, second = parcel(columns={"p": [1], "q": [2]}), parcel(columns={"q": [2], "p": [1]})
    assert encode(first) == encode(second)


def test_views_of_one_vector_and_leaves_of_a_graph_can_be_encoded():
    flat = torch.arange(4.0, requires_grad=True)
    back = decode(Train, encode(Train({"a": flat[:2], "b": flat[2:], "c": flat[:1].expand(3), "d": flat[:2]})))
    assert [back.adapter[name].tolist() for name in "abcd"] == [[0, 1], [2, 3], [0, 0, 0], [0, 1]]
    assert not back.adapter["a"].requires_grad


def test_decoded_tensors_do_not_refer_to_the_buffer():
    data = encode(Train({"a": torch.zeros(4), "b": torch.zeros(4)}))
    before = bytes(bytearray(data))
    back = decode(Train, data)
    back.adapter["a"].fill_(1.0)
    assert data == before
    assert back.adapter["b"].sum() == 0


def test_a_whole_number_is_a_float_where_the_field_says_so():
    value = Evaluated(3, torch.ones(1), torch.ones(1), 1)
    back = decode(Evaluated, encode(value))
    assert (type(back.weight), back.weight, type(back.accuracy)) == (float, 3.0, float)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"share": math.nan}, ValueError, "JSON compliant"),
        ({"metrics": {"loss": math.inf}}, ValueError, "JSON compliant"),
        ({"columns": {"answer": [math.nan]}}, ValueError, "JSON compliant"),
        ({"columns": {"answer": [object()]}}, TypeError, "'columns/answer/0': found object"),
        ({"columns": {"answer": [{1: 2}]}}, TypeError, "expected a JSON value"),
        ({"count": True}, TypeError, "found a boolean, expected int"),
        ({"share": torch.tensor(0.5)}, TypeError, "'share': found a tensor, expected float"),
        ({"name": None}, TypeError, "'name': found null, expected str"),
        ({"pair": (1, 2, 3)}, ValueError, "found 3 items, expected 2"),
        ({"metrics": {1: 2.0}}, TypeError, "expected a string"),
        ({"mode": "tail"}, ValueError, "expected one of"),
        ({"tensor": torch.zeros(1, dtype=torch.complex64)}, ValueError, "complex64"),
        ({"prompts": Evaluate({})}, TypeError, "found Evaluate, expected Prompts"),
    ],
)
def test_a_value_that_its_field_does_not_allow_is_not_encoded(changes, error, says):
    with pytest.raises(error, match=says):
        encode(parcel(**changes))


def test_two_tensors_of_one_name_are_refused():
    @dataclass(frozen=True)
    class Nested:
        groups: dict[str, dict[str, Tensor]]

    with pytest.raises(ValueError, match="would both be called 'groups/a/b/c'"):
        encode(Nested({"a": {"b/c": torch.ones(1)}, "a/b": {"c": torch.ones(1)}}))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.just("tensor"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.text() | st.lists(st.dictionaries(st.text(), st.text())), max_size=3),
    columns=st.dictionaries(st.text(), st.lists(JSON, max_size=3), max_size=3),
)
def test_prompts_of_any_text_come_back_as_they_were(text, columns):
    value = parcel(prompts=Prompts(text, torch.arange(len(text)), columns, torch.zeros(len(text), dtype=torch.int64)))
    assert_equal(decode(Parcel, encode(value)), value)

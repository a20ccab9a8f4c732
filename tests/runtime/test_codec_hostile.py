from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import JSON, Parcel, parcel

from fedpact.errors import InadmissibleError
from fedpact.messages import Evaluated, Hello, Trained
from fedpact.runtime.codec import decode, encode


def blob(header: Any, arrays: Mapping[str, tuple[str, list[int], bytes]] | None = None) -> bytes:
    """A safetensors file written by hand: `header` is our JSON header, or its text."""
    text = header if isinstance(header, str) else json.dumps(header, sort_keys=True, separators=(",", ":"))
    outer: dict[str, Any] = {"__metadata__": {"fedpact": text}}
    data = b""
    for name, (dtype, shape, raw) in (arrays or {}).items():
        outer[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(outer).encode()
    return struct.pack("<Q", len(head)) + head + data


def evaluated(**changes: Any) -> dict[str, Any]:
    fields = {"weight": 1.0, "rewards": "tensor", "counts": "tensor", "accuracy": None}
    return {"Evaluated": fields | changes}


ARRAYS = {"rewards": ("F32", [1], b"\0\0\x80\x3f"), "counts": ("I64", [1], b"\x02" + b"\0" * 7)}


def test_a_reply_written_by_hand_is_read():
    value = decode(Evaluated, blob(evaluated(), ARRAYS))
    assert (value.weight, value.rewards.tolist(), value.counts.tolist(), value.accuracy) == (1.0, [1.0], [2], None)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "header"),
        (blob(evaluated(), ARRAYS)[:-1], "cannot be decoded"),
        (blob(evaluated(), ARRAYS) + b"\0", "cannot be decoded"),
        (blob(evaluated()), "'rewards': found a string, expected Tensor"),
        (
            blob(evaluated(weight="tensor"), ARRAYS | {"weight": ("F32", [], b"\0" * 4)}),
            "found a tensor, expected float",
        ),
        (blob(evaluated(), ARRAYS | {"more": ("F32", [], b"\0" * 4)}), "'more' is a tensor that nothing asks for"),
        (blob(evaluated(more=1), ARRAYS), "'more' is unknown"),
        (blob({"Evaluated": {"weight": 1.0}}, ARRAYS), "'accuracy' is missing"),
        (blob(evaluated(weight=None), ARRAYS), "'weight': found null, expected float"),
        (blob(evaluated(weight=True), ARRAYS), "'weight': found a boolean"),
        (blob(evaluated(weight=10**400), ARRAYS), "cannot be decoded"),
        (blob(evaluated(accuracy="1"), ARRAYS), "expected float or NoneType"),
        (blob(evaluated(rewards=None), ARRAYS), "'rewards': the header does not say"),
        (blob({"Trained": evaluated()["Evaluated"]}, ARRAYS), "found 'Trained', expected Evaluated"),
        (blob([1], ARRAYS), "not canonical JSON"),
        (blob("[" * 100_000, ARRAYS), "cannot be decoded"),
        (blob('{"Evaluated":{"weight":NaN}}', ARRAYS), "JSON compliant"),
        (blob('{"Evaluated":{"weight":1e999}}', ARRAYS), "JSON compliant"),
        (blob('{"Evaluated":{},"Evaluated":{}}', ARRAYS), "not canonical JSON"),
        (blob(evaluated(), ARRAYS | {"rewards": ("F8_E8M0", [4], b"\0" * 4)}), "cannot be decoded"),
        (blob(evaluated(), ARRAYS | {"rewards": ("C64", [1], b"\0" * 8)}), "complex64"),
        (blob(evaluated(), ARRAYS | {"rewards": ("F32", [1] * 100, b"\0" * 4)}), "100 axes"),
        (blob(evaluated(), ARRAYS | {"rewards": ("F32", [0, 2**62, 2**62], b"")}), "cannot be decoded"),
        (blob(evaluated(), ARRAYS | {"rewards": ("F32", [0, 2**63], b"")}), "cannot be decoded"),
        (blob(evaluated(), ARRAYS | {"rewards": ("BOOL", [1], b"\x02")}), "neither 0 nor 1"),
        (struct.pack("<Q", 2) + b"{}", "cannot be decoded"),
        (struct.pack("<Q", 2**63) + b"{}", "cannot be decoded"),
    ],
)
def test_malformed_bytes_are_inadmissible_and_say_so_in_one_line(data, says):
    with pytest.raises(InadmissibleError, match=says) as raised:
        decode(Evaluated, data)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_more_bytes_than_allowed_are_refused_before_they_are_read():
    data = encode(Hello("x"))
    assert decode(Hello, data, max_bytes=len(data)).contract == "x"
    with pytest.raises(InadmissibleError, match="at most 10 are taken"):
        decode(Hello, b"\0" * 11, max_bytes=10)


def test_what_a_stranger_wrote_is_printed_harmlessly():
    with pytest.raises(InadmissibleError) as raised:
        decode(Hello, blob({"Hello": {"contract": "", "\x1b[2J\nok": 1}}))
    assert "\x1b" not in str(raised.value) and "\n" not in str(raised.value)


def decodes_or_is_inadmissible(kind: type, data: bytes) -> None:
    try:
        value = decode(kind, data)
    except InadmissibleError as error:
        assert "\n" not in str(error)
        return
    assert type(value) is kind
    encode(value)  # raises if a field has a type that it must not have


WHOLE = encode(parcel())
SMALL = encode(Trained(3.0, {"a": torch.ones(2)}, torch.tensor([math.nan]), None, {"kl": 0.25}))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_decode_to_the_right_type_or_are_inadmissible(data):
    kind, whole = data.draw(st.sampled_from([(Parcel, WHOLE), (Trained, SMALL)]))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_is_inadmissible(kind, bytes(damaged[: data.draw(st.integers(0, len(whole)))]))
    decodes_or_is_inadmissible(kind, bytes(damaged))


@settings(max_examples=300, deadline=None)
@given(
    field=st.sampled_from([field.name for field in fields(Trained)]),
    value=JSON,
    name=st.sampled_from(["adapter/a", "rewards", "weight", "accuracy", "metrics/kl"]),
)
def test_any_json_in_a_field_decodes_to_the_right_type_or_is_inadmissible(field, value, name):
    sound = {"weight": 1.0, "adapter": {"a": "tensor"}, "rewards": "tensor", "accuracy": None, "metrics": {"kl": 0.5}}
    arrays = {"adapter/a": ("F32", [], b"\0" * 4), "rewards": ("F32", [1], b"\0" * 4)}
    decodes_or_is_inadmissible(Trained, blob({"Trained": sound | {field: value}}, arrays))
    decodes_or_is_inadmissible(Trained, blob({"Trained": sound}, arrays | {name: ("F16", [2], b"\0" * 4)}))

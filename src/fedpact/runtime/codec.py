"""Messages to bytes and back: one safetensors blob, tensors as named arrays, all else as one JSON header. Never pickle.

`Trained(adapter={"lora_A": ...}, ...)` travels as an array called `adapter/lora_A` and a header that says where it
belongs. The types of the fields decide what is allowed: any frozen dataclass made of tensors, bytes, strings, numbers,
booleans, None, mappings with string keys, sequences, other such dataclasses, and unions that JSON can tell apart.
Bytes that come from the network are hostile until decoded: `decode` returns a value of the right type, or raises
`InadmissibleError`. Whether the numbers in it make sense is for admission to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load_tensors
from torch import Tensor

from fedpact.errors import InadmissibleError
from fedpact.runtime.files import tensor_bytes
from fedpact.runtime.header import KEY, dumps, read_header, refuse_swarms

T = TypeVar("T")

_HERE = "tensor"  # stands in the header where an array belongs
_MAX_AXES = 8
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8}) | {
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}
_SCALARS: Mapping[Any, frozenset[str]] = {
    Tensor: frozenset({"a tensor"}),
    bytes: frozenset({"a tensor", "bytes"}),
    str: frozenset({"a string"}),
    bool: frozenset({"a boolean"}),
    int: frozenset({"an integer"}),
    float: frozenset({"a number", "an integer"}),
    NoneType: frozenset({"null"}),
    Any: frozenset({"a string", "a boolean", "an integer", "a number", "null", "an object", "a list"}),
}
_MALFORMED = (SafetensorError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AssertionError)


def encode(value: Any) -> bytes:
    """The bytes of a dataclass; equal values give equal bytes.

    Raises TypeError where a field holds something that its type does not allow, ValueError for NaN or infinity outside
    tensors.
    """
    tensors: dict[str, Tensor] = {}
    kind: Any = type(value)
    try:
        header = dumps({kind.__name__: _pack(kind, value, "", tensors)})
    except ValueError as error:
        raise ValueError(f"{kind.__name__} cannot be encoded: {error}") from error
    return tensor_bytes(tensors, {KEY: header})


def decode(kind: type[T], data: bytes, *, max_bytes: int | None = None) -> T:
    """The `kind` that `data` encodes, with tensors of its own: none refers to `data`.

    Raises InadmissibleError, in one line, for anything but the exact fields and types of `kind`, and for more than
    `max_bytes`.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise InadmissibleError(f"{kind.__name__}: {len(data)} bytes, at most {max_bytes} are taken")
    wanted: Any = kind
    _hints(wanted)  # a type that cannot be encoded is our bug, not the sender's
    try:
        refuse_swarms(data)
        tensors = {name: _checked(name, tensor) for name, tensor in _load_tensors(data).items()}
        header = read_header(data)
        if set(header) != {kind.__name__}:
            raise ValueError(f"found {_show(' '.join(header))}, expected {kind.__name__}")
        value: T = _unpack(wanted, header[kind.__name__], "", tensors)
        if tensors:
            raise ValueError(f"{_show(min(tensors))} is a tensor that nothing asks for")
        return value
    except _MALFORMED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise InadmissibleError(f"{kind.__name__}: cannot be decoded: {reason}") from error


def _pack(hint: Any, value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The header's entry for `value`; its tensors go into `tensors`."""
    hint = _fitting(hint, _kind(value), path)
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint is Tensor or hint is bytes:
        if path in tensors:
            raise ValueError(f"two tensors would both be called {_show(path)}")
        tensor = torch.from_numpy(np.frombuffer(bytearray(value), np.uint8)) if hint is bytes else value
        tensors[path] = _checked(path, tensor)
        return _HERE
    if hint is float:
        return float(value)
    if hint is Any:
        return _plain(value, path)
    if origin is Literal:
        return _member(value, arguments, path)
    if _is_record(hint):
        if type(value).__name__ != hint.__name__:
            raise TypeError(f"{_show(path)}: found {type(value).__name__}, expected {_name(hint)}")
        return {name: _pack(h, getattr(value, name), _join(path, name), tensors) for name, h in _hints(hint).items()}
    if hint in _SCALARS:
        return value
    if origin in (dict, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{path}: found the key {_show(name)}, expected a string")
        return {name: _pack(arguments[1], item, _join(path, name), tensors) for name, item in value.items()}
    if _texts(arguments, value):
        return list(value)
    items = _items(origin, arguments, len(value), path)
    return [_pack(h, item, _join(path, i), tensors) for i, (h, item) in enumerate(zip(items, value, strict=True))]


def _unpack(hint: Any, node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value of the header's entry `node`; takes its tensors out of `tensors`."""
    hint = _fitting(hint, "a tensor" if path in tensors else _kind(node), path)
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint is Tensor or hint is bytes:
        if node != _HERE:
            raise ValueError(f"{_show(path)}: the header does not say that it is a tensor")
        tensor = tensors.pop(path)
        if hint is Tensor:
            return tensor
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise ValueError(f"{_show(path)}: found {tensor.dtype} with {tensor.dim()} axes, expected bytes")
        return tensor.numpy().tobytes()
    if hint is float:
        return float(node)
    if origin is Literal:
        return _member(node, arguments, path)
    if _is_record(hint):
        hints = _hints(hint)
        if set(hints) != set(node):
            name = min(set(hints) ^ set(node))
            raise ValueError(f"{_show(_join(path, name))} is {'missing' if name in hints else 'unknown'}")
        return hint(**{name: _unpack(h, node[name], _join(path, name), tensors) for name, h in hints.items()})
    if hint in _SCALARS:
        return node
    if origin in (dict, Mapping):
        return {name: _unpack(arguments[1], item, _join(path, name), tensors) for name, item in node.items()}
    if _texts(arguments, node):
        return tuple(node) if origin is tuple else node
    items = _items(origin, arguments, len(node), path)
    values = [_unpack(h, item, _join(path, i), tensors) for i, (h, item) in enumerate(zip(items, node, strict=True))]
    return tuple(values) if origin is tuple else values


def _fitting(hint: Any, kind: str, path: str) -> Any:
    """`hint`, or the member of a union, that admits a value of this kind."""
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for arm in arms:
        if kind in _kinds(arm):
            return arm
    raise TypeError(f"{_show(path)}: found {kind}, expected {' or '.join(_name(arm) for arm in arms)}")


def _kinds(hint: Any) -> frozenset[str]:
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin = get_origin(hint)
    if _is_record(hint) or (origin in (dict, Mapping) and get_args(hint)[0] is str):
        return frozenset({"an object"})
    if origin in (list, tuple, Sequence):
        return frozenset({"a list"})
    if origin is Literal:
        return frozenset(_kind(value) for value in get_args(hint))
    raise TypeError(f"{_name(hint)} cannot be encoded")


def _kind(value: Any) -> str:
    """What a Python value is in the words of JSON."""
    if value is None:
        return "null"
    if is_dataclass(value):
        return "an object"
    for types, name in (
        (Tensor, "a tensor"),
        (bytes, "bytes"),
        (str, "a string"),
        (bool, "a boolean"),  # before int: True is one
        (int, "an integer"),
        (float, "a number"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
    ):
        if isinstance(value, types):
            return name
    return type(value).__name__


def _texts(arguments: tuple[Any, ...], values: Sequence[Any]) -> bool:
    """Whether this is a list of texts alone and may be one: there can be very many, and nothing is to be done."""
    some = arguments[0] if len(arguments) == 1 or arguments[-1] is Ellipsis else None
    arms = get_args(some) if get_origin(some) in (Union, UnionType) else (some,)
    return str in arms and set(map(type, values)) <= {str}


def _items(origin: Any, arguments: tuple[Any, ...], length: int, path: str) -> Sequence[Any]:
    """One type for each of the `length` items of a sequence."""
    if origin is not tuple or arguments[-1] is Ellipsis:
        return [arguments[0]] * length
    if len(arguments) != length:
        raise ValueError(f"{_show(path)}: found {length} items, expected {len(arguments)}")
    return arguments


def _plain(value: Any, path: str) -> Any:
    """`value`, if JSON can hold it as it is; tuples become lists."""
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain(item, _join(path, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, _join(path, i)) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{_show(path)}: found {type(value).__name__}, expected a JSON value")


def _member(value: Any, allowed: tuple[Any, ...], path: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{_show(path)}: found {_show(value)}, expected one of {allowed}")
    return value


def _checked(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _DTYPES or tensor.dim() > _MAX_AXES or tensor.layout is not torch.strided:
        raise ValueError(f"{_show(name)}: {tensor.dtype} with {tensor.dim()} axes is not taken")
    if tensor.dtype == torch.bool and bool((tensor.contiguous().view(torch.uint8) > 1).any()):
        raise ValueError(f"{_show(name)}: a boolean that is neither 0 nor 1")  # torch would compute with it
    return tensor


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types."""
    if not _is_record(kind):
        raise TypeError(f"{_name(kind)} is not a dataclass")
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _join(path: str, name: object) -> str:
    return f"{path}/{name}" if path else str(name)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _show(text: object) -> str:
    """Something that a stranger chose, safe to print."""
    return ascii(text)[:80]

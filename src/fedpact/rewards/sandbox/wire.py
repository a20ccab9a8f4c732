"""What may cross between a candidate and its tests: plain data as bytes, in frames.

The source of this module is also part of the programs that run confined. It imports nothing but what an interpreter
holds when it starts, since `json` alone would double the time that a start takes.

A value is one tag and then, for numbers, text up to `;`, for strings and bytes a length, for containers a count. There
is one way to write each value; every other one is refused, and so is whatever follows it.
"""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100


class NotPlainError(ValueError):
    """A value that is no plain data, or bytes that are none."""


class TooLargeError(ValueError):
    """A value that is too long or too deep."""


class Sent:
    """An object of the candidate's, by its number; only tests send one, and only to the candidate."""

    def __init__(self, number: int) -> None:
        self.number = number


def encode(value: Any, limit: int = 1 << 26) -> bytes:
    """`value` as bytes: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset of these.

    These types themselves go too. An instance of a subclass goes as what it is a kind of. Raises NotPlainError for
    anything else, and TooLargeError for more than `limit` bytes or `MAX_DEPTH` levels.
    """
    parts: list[bytes] = []
    room = [limit]

    def add(part: bytes) -> None:
        room[0] -= len(part)
        if room[0] < 0:
            raise TooLargeError(f"more than {limit} bytes")
        parts.append(part)

    def walk(value: Any, depth: int) -> None:
        kind = type(value)
        if depth > MAX_DEPTH:
            raise TooLargeError(f"more than {MAX_DEPTH} levels")
        if value is None:
            add(b"n")
        elif kind is bool:
            add(b"y" if value else b"z")
        elif kind is int:
            add(b"i%x;" % value)
        elif kind is str:
            raw = value.encode("utf-8", "surrogatepass")
            add(b"s%d:" % len(raw))
            add(raw)
        elif kind is float:
            add(b"r%s;" % value.hex().encode())
        elif kind is complex:
            add(b"c%s;%s;" % (value.real.hex().encode(), value.imag.hex().encode()))
        elif kind is bytes:
            add(b"b%d:" % len(value))
            add(value)
        elif kind in _ITEMS:
            add(b"%s%d:" % (_ITEMS[kind], len(value)))
            for item in value:
                walk(item, depth + 1)
        elif kind is dict:
            add(b"d%d:" % len(value))
            for key, item in value.items():
                walk(key, depth + 1)
                walk(item, depth + 1)
        elif kind is type and value in _TYPES.values():
            add(b"k%s;" % value.__name__.encode())
        elif kind is Sent:
            add(b"o%x;" % value.number)
        else:
            walk(_base_of(value), depth)

    walk(value, 0)
    return b"".join(parts)


_ITEMS: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"u", frozenset: b"v"}
_KINDS = {tag: kind for kind, tag in _ITEMS.items()}
_BASES: tuple[type, ...] = (int, float, complex, bytes, list, tuple, dict, set, frozenset)


_TYPES = {kind.__name__.encode(): kind for kind in (bool, int, str, *_BASES)}


def _base_of(value: Any) -> Any:
    """A subclass's instance as the plain thing that it is a kind of."""
    if isinstance(value, str):
        return str.__str__(value)  # not str(value): an enumeration's is its name
    if isinstance(value, bytearray):
        return bytes(value)
    for base in _BASES:
        if isinstance(value, base):
            copied = base(value)
            if type(copied) is base:
                return copied
    raise NotPlainError(f"{type(value).__name__} is no plain data")


def decode(data: bytes, objects: list[Any] | None = None) -> Any:
    """The value that `encode` wrote, of exactly those types. Raises NotPlainError for all other bytes.

    A number of an object stands for that entry of `objects`; without them it is refused, and so are types, which tests
    alone send.
    """
    try:
        value, end = _value(data, 0, 0, objects)
    except (ValueError, TypeError, OverflowError, IndexError, KeyError) as error:
        raise NotPlainError(str(error)) from None
    if end != len(data):
        raise NotPlainError("bytes after the value")
    return value


def _value(data: bytes, at: int, depth: int, objects: list[Any] | None) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise NotPlainError(f"more than {MAX_DEPTH} levels")
    tag = data[at : at + 1]
    at += 1
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    if tag == b"i" or tag == b"o":
        text, at = _until(data, at, b";")
        number = int(text, 16)
        if b"%x" % number != text:
            raise NotPlainError("a number that is not written as it should be")
        if tag == b"i":
            return number, at
        if objects is None or number < 0:
            raise NotPlainError("an object where only plain data may be")
        return objects[number], at
    if tag == b"k" and objects is not None:
        text, at = _until(data, at, b";")
        return _TYPES[text], at
    if tag == b"r":
        return _real(data, at)
    if tag == b"c":
        real, at = _real(data, at)
        imaginary, at = _real(data, at)
        return complex(real, imaginary), at
    text, at = _until(data, at, b":")
    count = int(text)
    if b"%d" % count != text or not 0 <= count <= len(data) - at:  # an item takes at least a byte
        raise NotPlainError("a count that is not written as it should be")
    if tag == b"s":
        return data[at : at + count].decode("utf-8", "surrogatepass"), at + count
    if tag == b"b":
        return data[at : at + count], at + count
    items = []
    for _ in range(2 * count if tag == b"d" else count):
        item, at = _value(data, at, depth + 1, objects)
        items.append(item)
    value: Any = dict(zip(items[::2], items[1::2], strict=True)) if tag == b"d" else _KINDS[tag](items)
    if len(value) != count:
        raise NotPlainError("the same key twice")
    return value, at


_CONSTANTS: dict[bytes, bool | None] = {b"n": None, b"y": True, b"z": False}


def _real(data: bytes, at: int) -> tuple[float, int]:
    text, at = _until(data, at, b";")
    number = float.fromhex(text.decode("ascii"))
    if number.hex().encode() != text:
        raise NotPlainError("a number that is not written as it should be")
    return number, at


def _until(data: bytes, at: int, mark: bytes) -> tuple[bytes, int]:
    end = data.index(mark, at)
    return data[at:end], end + 1


def framed(payload: bytes) -> bytes:
    """`payload` behind its length in four bytes."""
    return len(payload).to_bytes(4, "big") + payload

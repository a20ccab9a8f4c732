"""A member's prompts, read from a file, a `datasets` id or a reasoning-gym task."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import torch

from fedpact.errors import DataError
from fedpact.seeding import key
from fedpact.types import Message, Prompts, Text

Row = Mapping[str, Any]

_RESERVED = ("prompts", "completions")


class Split(NamedTuple):
    """Prompts to train on, and prompts to measure on."""

    train: Prompts
    heldout: Prompts


def load_prompts(
    path: str,
    *,
    folder: Path,
    prompt: str = "prompt",
    split: str | None = None,
    limit: int | None = None,
    system: str | None = None,
    template: str | None = None,
    as_chat: bool = False,
    rename: Mapping[str, str] | None = None,
    where: str,
) -> Prompts:
    """The prompts at `path`; their ids are their rows, and every column but the prompt goes to the rewards.

    `path`: a `.jsonl`, `.json` (a list), `.csv` or `.parquet` file relative to `folder`; `org/name` or
    `datasets:name?option=value` for the `datasets` library, which reads `split` ("train" by default);
    `gym:task?size=200&seed=1&option=value` for reasoning-gym.

    The column `prompt` holds strings or chats. `template`, as in "Question: {question}", makes the prompt from columns
    instead. `system` puts a system message in front, `as_chat` turns a plain prompt into a user message, `rename` maps
    column names to new ones, and `limit` takes the first rows. Raises DataError; `where` names the member's file.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{where}: limit is {limit}; expected at least 1")
    rows = list(islice(_rows(path, folder, split, where), limit))
    place = f"{where}: {path}"
    if not rows:
        raise DataError(f"{place} is empty; expected at least one row")
    columns = _columns(rows, rename or {}, place)
    if template is not None:
        texts: list[Any] = _filled(template, columns, place)
    elif prompt in columns:
        texts = columns.pop(prompt)
    else:
        listed = ", ".join(columns)
        raise DataError(f"{place} has no column {prompt!r}; it has {listed}; set `prompt` or `template`")
    for name in columns.keys() & set(_RESERVED):
        raise DataError(f"{place} has a column {name!r}, which rewards receive already; set `rename`")
    prompts = [_prompt(text, system, as_chat, f"{place}, row {row}") for row, text in enumerate(texts)]
    odd = [row for row, text in enumerate(texts) if isinstance(text, str) != isinstance(texts[0], str)]
    if odd:
        raise DataError(f"{place} mixes plain prompts and chats: row {odd[0]} differs from row 0; use one kind")
    return Prompts(text=prompts, ids=torch.arange(len(prompts)), columns=columns)


def split_heldout(prompts: Prompts, share: float, seed: int) -> Split:
    """About `share` of the prompts held out, by the CRC-32 of their text and `seed`.

    The side of a prompt depends on nothing else, so that duplicates stay together, in one file or over all members.
    Raises DataError if a side stays empty.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for row, text in enumerate(prompts.text):
        plain = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
        # CRC-32 alone is linear: another seed would only flip bits, and give the same sides or opposite ones.
        draw = key(seed, "heldout", zlib.crc32(plain.encode(errors="surrogatepass"))) / 2**63
        sides[draw < share].append(row)
    if not all(sides):
        empty = "held out" if sides[0] else "left to train on"
        raise DataError(f"of {len(prompts)} prompts none is {empty} at a share of {share:g}; name a held-out file")
    return Split(*(prompts.select(rows) for rows in sides))


def _rows(path: str, folder: Path, split: str | None, where: str) -> Iterator[Row]:
    if path.startswith("gym:"):
        return _gym_rows(path, where)
    file = folder / path
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(\?.*)?", path) and not file.suffix and not file.exists()
    if is_id or path.startswith("datasets:"):
        return _datasets_rows(path, split, where)
    if split is not None:
        raise DataError(f"{where}: split is {split!r}, but {path} is a file; name the file of that split instead")
    return _file_rows(file, path, where)


def _file_rows(file: Path, path: str, where: str) -> Iterator[Row]:
    if not file.is_file():
        raise DataError(f"{where}: no file {file}; expected a path relative to the member's file, or a `datasets` id")
    if file.suffix not in _READERS:
        raise DataError(f"{where}: {path} ends in {file.suffix!r}; expected one of {', '.join(_READERS)}")
    place = f"{where}: {path}"
    try:
        for number, row in _READERS[file.suffix](file, place):
            if not isinstance(row, Mapping):
                raise DataError(f"{place}, {number}: found {type(row).__name__}; expected an object with named fields")
            yield row
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror or error}") from error


def _jsonl(file: Path, place: str) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _parsed(line, f"{place}, line {number}", "one JSON object a line")


def _json(file: Path, place: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(file.read_text(encoding="utf-8-sig"), place, "a JSON list of objects")
    if not isinstance(rows, list):
        raise DataError(f"{place} holds {type(rows).__name__}; expected a JSON list of objects")
    for number, row in enumerate(rows):
        yield f"row {number}", row


def _parsed(text: str, place: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise DataError(f"{place}: not JSON ({error.msg} at {at}); expected {expected}") from error


def _csv(file: Path, place: str) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                if None in row or None in row.values():
                    width = len(reader.fieldnames or ())
                    raise DataError(f"{place}, line {reader.line_num}: expected {width} fields, as in the header")
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{place}, line {reader.line_num}: {error}; expected comma-separated values") from error


def _parquet(file: Path, place: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{place} needs pyarrow, which is not installed; run: pip install 'fedpact[data]'") from error
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            yield from (("a row", row) for row in batch.to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{place} is not Parquet: {str(error).splitlines()[0][:200]}") from error


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _datasets_rows(path: str, split: str | None, where: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{where}: no file {path}, and reading it as a `datasets` id needs a package that is not installed; "
            "correct the path, or run: pip install 'fedpact[data]'"
        ) from error
    name, options = _options(path.removeprefix("datasets:"), where)
    try:
        yield from datasets.load_dataset(name, split=split or "train", **options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"{where}: cannot load {path} with `datasets`: {type(error).__name__}: {reason}; "
            "check the id, the split and the network, or name a local file"
        ) from error


def _gym_rows(path: str, where: str) -> Iterator[Row]:
    from fedpact.tasks.gym import gym_prompts

    name, options = _options(path.removeprefix("gym:"), where)
    size, seed = options.pop("size", 500), options.pop("seed", 0)
    prompts = gym_prompts(name, size, seed, options, where=where)
    for row, text in enumerate(prompts.text):
        yield {"prompt": text, **{column: values[row] for column, values in prompts.columns.items()}}


def _options(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """`name?size=200&shuffle=true` as the name and its options; values are JSON where they can be."""
    name, _, query = text.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise DataError(f"{where}: cannot read the options {query!r}; expected name=value&name=value") from error
    options: dict[str, Any] = dict(pairs)
    for option, written in pairs:
        with contextlib.suppress(json.JSONDecodeError):
            options[option] = json.loads(written)
    return name, options


def _columns(rows: Sequence[Row], rename: Mapping[str, str], place: str) -> dict[str, list[Any]]:
    """The rows as columns under their new names; a field that a row lacks is None."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in rename.keys() - set(names):
        raise DataError(f"{place}: rename: no column {name!r}; it has {', '.join(names)}")
    renamed = [rename.get(name, name) for name in names]
    if len(set(renamed)) < len(renamed):
        twice = next(name for name in renamed if renamed.count(name) > 1)
        raise DataError(f"{place}: rename gives two columns the name {twice!r}")
    return {
        new: [_plain(row.get(old), f"{place}, row {number}, column {old!r}") for number, row in enumerate(rows)]
        for old, new in zip(names, renamed, strict=True)
    }


def _plain(value: Any, place: str) -> Any:
    """`value` as JSON has it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item, place) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, place) for item in value]
    if isinstance(value, date | datetime | time | Decimal):
        return str(value)
    raise DataError(f"{place} holds {type(value).__name__}; expected text, numbers, lists or objects; drop the column")


def _filled(template: str, columns: Mapping[str, Sequence[Any]], place: str) -> list[str]:
    """The template for every row; a plain look-up by column name, so that any name will do."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"{place}: template: {error}; write a literal brace twice") from error
    for _, name, _, _ in parts:
        if name is not None and name not in columns:
            raise DataError(f"{place}: template: no column {name!r}; it has {', '.join(columns)}")
    count = len(next(iter(columns.values())))
    return [
        "".join(literal + ("" if name is None else str(columns[name][row])) for literal, name, _, _ in parts)
        for row in range(count)
    ]


def _prompt(text: Any, system: str | None, as_chat: bool, place: str) -> Text:
    if not text or not isinstance(text, str | list):
        raise DataError(f"{place}: the prompt is {text!r:.60}; expected text, or a list of chat messages")
    if isinstance(text, str) and not as_chat and system is None:
        return text
    chat: list[Message] = [{"role": "user", "content": text}] if isinstance(text, str) else text
    for message in chat:
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise DataError(f"{place}: {message!r:.60} is no chat message; expected a role and a content, both text")
    if system is not None and chat[0]["role"] == "system":
        raise DataError(f"{place}: the chat begins with a system message of its own; remove `system`")
    return [*([{"role": "system", "content": system}] if system is not None else []), *chat]

"""Preference pairs: of two completions of a prompt, the one that somebody preferred. TRL's preference format.

A row has `chosen` and `rejected`, and mostly a `prompt`; all three are texts, or all three are chats, in which case
`chosen` and `rejected` hold the one message that follows the prompt. Without a `prompt` the two share it: texts up to
the last `\\n\\nAssistant:` that both begin with (HH-RLHF's dialogues), or else as far as they agree; chats message by
message. Loads no torch.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedpact.errors import DataError

if TYPE_CHECKING:
    from fedpact.types import Text

_TURN = "\n\nAssistant:"
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Pairs:
    """Prompts, each with the completion that was preferred and the one that was not; the lists are equally long."""

    prompts: list[Text]
    chosen: list[str]
    rejected: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> Pairs:
        """The pairs at `rows`, in that order."""
        lists: list[list[Any]] = [[column[i] for i in rows] for column in (self.prompts, self.chosen, self.rejected)]
        return Pairs(*lists)


class PairsSplit(NamedTuple):
    """Pairs to train on, and pairs to measure on."""

    train: Pairs
    heldout: Pairs


def load_pairs(path: str, *, folder: Path, where: str) -> Pairs:
    """The pairs at `path`: a .jsonl, .json (a list), .csv or .parquet file relative to `folder`, or a `datasets` id.

    Of an id, `org/name`, the split "train" is read. Raises DataError; `where` names the member's file.
    """
    file = folder / path
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and file.suffix not in _SUFFIXES and not file.exists()
    rows = _datasets_rows(path, where) if is_id else _file_rows(file, path, where)
    triples = [_triple(row, f"{where}: {path}, {at}") for at, row in rows]
    if not triples:
        raise DataError(f"{where}: {path} is empty; expected at least one row")
    prompts, chosen, rejected = zip(*triples, strict=True)
    odd = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str) != isinstance(prompts[0], str)]
    if odd:
        raise DataError(f"{where}: {path} mixes texts and chats: row {odd[0]} differs from row 0; use one kind")
    return Pairs(list(prompts), list(chosen), list(rejected))


def split_heldout(pairs: Pairs, share: float, seed: int) -> PairsSplit:
    """About `share` of the prompts held out with all their pairs, by a hash of the prompt's text and `seed`.

    A side may stay empty where there are few prompts.
    """
    from fedpact.seeding import key

    sides: tuple[list[int], list[int]] = ([], [])
    for row, prompt in enumerate(pairs.prompts):
        plain = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
        draw = key(seed, "heldout pairs", plain.encode(errors="surrogatepass").hex()) / 2**63
        sides[draw < share].append(row)
    return PairsSplit(*(pairs.select(rows) for rows in sides))


def pairwise_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """The share of pairs whose chosen completion scores higher; equal scores count half. NaN without a pair."""
    wins = [(1 + (y > z) - (y < z)) / 2 for y, z in zip(chosen, rejected, strict=True)]
    return sum(wins) / len(wins) if wins else float("nan")


def _triple(row: Any, place: str) -> tuple[Text, str, str]:
    """The row as prompt, chosen, rejected."""
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: found {type(row).__name__}; expected an object with chosen and rejected")
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f"{place}: no {missing[0]!r}; the row has {found}; expected prompt, chosen and rejected")
    prompt, chosen, rejected = (_text(row.get(name), name, place) for name in ("prompt", "chosen", "rejected"))
    kinds = {type(value) for value in (prompt, chosen, rejected) if value is not None}
    if len(kinds) > 1:
        raise DataError(f"{place} mixes text and chat; expected prompt, chosen and rejected of one kind")
    if prompt is None:
        assert chosen is not None and rejected is not None
        start = _shared_text(chosen, rejected) if isinstance(chosen, str) else _shared_messages(chosen, rejected)
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
        if not prompt:
            raise DataError(f"{place}: no prompt, and chosen and rejected begin differently; add a prompt")
    better, worse = _said(chosen, "chosen", place), _said(rejected, "rejected", place)
    if better == worse:
        raise DataError(f"{place}: chosen and rejected are equal; drop the row")
    return prompt, better, worse


def _text(value: Any, name: str, place: str) -> Any:
    """A text or a chat as it is; None for an absent prompt."""
    if value is None or (isinstance(value, str) and (value or name != "prompt")):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        for message in value:
            if not (isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
                raise DataError(
                    f"{place}: {name}: {message!r:.60} is no chat message; expected a role and a content, both text"
                )
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise DataError(f"{place}: {name} is {value!r:.60}; expected text, or a list of chat messages")


def _said(completion: Any, name: str, place: str) -> str:
    if isinstance(completion, str):
        return completion
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        found = ", ".join(roles) or "no message"
        raise DataError(f"{place}: after the prompt {name} has {found}; expected one message of the assistant")
    return str(completion[0]["content"])


def _shared_text(chosen: str, rejected: str) -> int:
    """Where the prompt of two whole texts ends."""
    shorter = min(len(chosen), len(rejected))
    common = chosen[: next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)]
    turn = common.rfind(_TURN)
    if turn >= 0:
        return turn + len(_TURN)
    return len(common) - common.endswith(" ")  # as TRL: the space begins the completion


def _shared_messages(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    agree = [better == worse for better, worse in zip(chosen, rejected, strict=False)]
    return agree.index(False) if False in agree else len(agree)


def _file_rows(file: Path, path: str, where: str) -> Iterator[tuple[str, Any]]:
    place = f"{where}: {path}"
    if file.suffix not in _SUFFIXES:
        raise DataError(f"{place} ends in {file.suffix!r}; expected one of {', '.join(_SUFFIXES)}, or an id org/name")
    if not file.is_file():
        raise DataError(f"{where}: no file {file}; expected a path relative to the member's file, or a `datasets` id")
    try:
        yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[file.suffix](file, place)
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
    yield from ((f"row {number}", row) for number, row in enumerate(rows))


def _parsed(text: str, place: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}); expected {expected}") from error


def _csv(file: Path, place: str) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                yield f"line {reader.line_num}", {name or "": value for name, value in row.items()}
        except csv.Error as error:
            raise DataError(f"{place}, line {reader.line_num}: {error}; expected comma-separated values") from error


def _parquet(file: Path, place: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{place} needs pyarrow, which is not installed; run: pip install 'fedpact[data]'") from error
    try:
        rows = (row for batch in parquet.ParquetFile(file).iter_batches() for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{place} is not Parquet: {str(error).splitlines()[0][:200]}") from error


def _datasets_rows(name: str, where: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{where}: no file {name}, and reading it as a `datasets` id needs a package that is not installed; "
            "correct the path, or run: pip install 'fedpact[data]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library and the hub raise a dozen types
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"{where}: cannot load {name} with `datasets`: {type(error).__name__}: {reason}; "
            "check the id and the network, or name a local file"
        ) from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows))

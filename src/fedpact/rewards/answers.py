"""A member's file of trusted answers, joined to the questions that the server sends."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpact.errors import DataError
from fedpact.types import Prompts, Text

_PUBLIC_ID = "id"
"""The column in which the server sends the public id of a question."""


@dataclass(frozen=True, eq=False)
class AnswerKey:
    """Questions whose answers the member trusts. Raises DataError where the file contradicts itself.

    Two rows contradict each other if they have the same id, or the same words, and differ in any other column. Rows
    that only `normalised` makes alike may both be right ("for what X" and "for what x"): if they differ, neither
    answers a question in a third spelling. A missing answer costs one rating; a wrong one costs the truth of it.
    """

    prompts: Prompts = field(repr=False)
    """As `load_prompts` returns it. All columns but `id` reach the rewards."""
    id: str | None = None
    """Its column that holds the public id of a question."""
    where: str = "answers"
    """The file and table that name it, for errors."""
    _by_id: dict[str, int] = field(init=False, repr=False)
    _by_words: dict[str, int] = field(init=False, repr=False)
    _by_question: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = self.prompts.columns
        if self.id is not None and self.id not in columns:
            listed = ", ".join(columns) or "only the prompt"
            raise DataError(f"{self.where}: id is {self.id!r}, and the file has {listed}; name the column of the ids")
        ids = ["" if value is None else str(value) for value in columns[self.id]] if self.id else []
        texts = self.prompts.text
        object.__setattr__(self, "_by_id", self._index(ids, f"the same {self.id}"))
        object.__setattr__(self, "_by_words", self._index([_words(text) for text in texts], "the same question"))
        object.__setattr__(self, "_by_question", self._index([question(text) for text in texts], None))

    def join(self, prompts: Prompts) -> Prompts:
        """The same questions with this file's columns, None where it has no answer.

        A question is found by its public id (its column `id`, compared as text), else by its words, else by its last
        user message, `normalised`. Of the columns that came with it only `id` stays, whatever this file calls so: who
        asks must not supply the answers.
        """
        ids = prompts.columns.get(_PUBLIC_ID, [None] * len(prompts))
        rows = [self._row(text, public_id) for text, public_id in zip(prompts.text, ids, strict=True)]
        columns: dict[str, Sequence[Any]] = {
            name: [None if row is None else values[row] for row in rows]
            for name, values in self.prompts.columns.items()
            if name != self.id
        }
        if _PUBLIC_ID in prompts.columns:
            columns[_PUBLIC_ID] = list(ids)
        return Prompts(text=prompts.text, ids=prompts.ids, columns=columns, domains=prompts.domains)

    def _row(self, text: Text, public_id: Any) -> int | None:
        row = None if public_id is None else self._by_id.get(str(public_id))
        if row is None:
            row = self._by_words.get(_words(text))
        return self._by_question.get(question(text)) if row is None else row

    def _index(self, keys: Sequence[str], same: str | None) -> dict[str, int]:
        """The first row of each key. Where rows with one key differ: DataError that says what is the same, or none."""
        first: dict[str, int] = {}
        unclear: set[str] = set()
        for row, key in enumerate(keys):
            earlier = first.setdefault(key, row)
            others = {name: values for name, values in self.prompts.columns.items() if name != self.id}
            differing = [name for name, values in others.items() if values[earlier] != values[row]]
            if differing and key and same is not None:
                raise DataError(
                    f"{self.where}: rows {earlier} and {row} (counted from 0) have {same} and differ in "
                    f"{differing[0]!r}; remove one of them"
                )
            if differing:
                unclear.add(key)
        return {key: row for key, row in first.items() if key and key not in unclear}


def normalised(text: str) -> str:
    """`text` for comparing: NFKC, case folded, white space collapsed, surrounding punctuation stripped.

    What may change a number stays: dashes, `!` and `%` at either end, a leading point, and exponents: 2² is not 22.
    """
    raised = "".join(f"^{c}" if unicodedata.decomposition(c).startswith("<super>") else c for c in text)
    words = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", raised).casefold()).split()
    plain = " ".join(words)
    start, stop = 0, len(plain)
    while stop and _is_frame(plain[stop - 1]):
        stop -= 1
    while (
        start < stop and _is_frame(plain[start]) and not (plain[start] == "." and plain[start + 1 : stop][:1].isdigit())
    ):
        start += 1
    return plain[start:stop]


def _is_frame(character: str) -> bool:
    category = unicodedata.category(character)
    return character == " " or (category.startswith("P") and category != "Pd" and character not in "!%")


def question(text: Text) -> str:
    """The last user message of a chat, or the text, normalised; "" if there is nothing to compare."""
    if isinstance(text, str):
        return normalised(text)
    asked = [str(message["content"]) for message in text if message["role"] == "user"]
    return normalised(asked[-1]) if asked else ""


def _words(text: Text) -> str:
    """All that is said, without system messages and up to white space: a text and a chat of it alone are the same."""
    chat = [{"role": "user", "content": text}] if isinstance(text, str) else text
    said = [(message["role"], " ".join(str(message["content"]).split())) for message in chat]
    spoken = [turn for turn in said if turn[0] != "system"]
    return json.dumps(spoken) if any(words for _, words in spoken) else ""

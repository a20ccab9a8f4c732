"""Writes docs/configuration.md from the settings themselves: `python scripts/make_docs.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedpact.algorithms import TABLE, algorithm_class
from fedpact.runtime import client_config, config
from fedpact.runtime.toml import Place

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

A run is a `run.toml`, which the coordinator writes, and one client file for each member, which never leaves it. Unknown
keys are errors. `fedpact check run.toml` validates everything, `--set a.b=value` changes a key from the command line,
and names are TRL's or PEFT's where they have one. This page is made by `scripts/make_docs.py` from the code.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "\n## run.toml\n", section(config.RunConfig, "", skip={"algorithm"})]
    parts.append("\n## [algorithm]\n\n`name` chooses one; its other keys are the algorithm's settings.\n")
    for name in TABLE:
        found = algorithm_class(name)
        parts.append(f"\n### {name}\n\n{first_paragraphs(found)}\n\n{table(found, skip={'name'})}")
    parts.append("\n## Client files\n")
    parts.append(section(client_config.ClientConfig, ""))
    return "".join(parts)


def section(model: type[BaseModel], prefix: str, skip: frozenset[str] | set[str] = frozenset()) -> str:
    """A model's own keys, then each of its tables."""
    inner = {name: inner_model(field.annotation) for name, field in model.model_fields.items()}
    inner = {name: None if found is model else found for name, found in inner.items()}  # `otherwise` is one itself
    own = table(model, skip={*skip, *(name for name, found in inner.items() if found)})
    text = f"\n{own}" if own else ""
    for name, found in inner.items():
        if found is None or name in skip:
            continue
        title = f"{prefix}{name}"
        if "dict" in str(model.model_fields[name].annotation):
            title += ".NAME"
        text += f"\n### [{title}]\n\n{(found.__doc__ or '').strip()}\n{section(found, title + '.')}"
    return text


def table(model: type[BaseModel], skip: set[str] | frozenset[str] = frozenset()) -> str:
    """A model's keys as a Markdown table; empty if there are none."""
    rows = [
        f"| `{name}` | {kind(field.annotation)} | {default(field)} | {' '.join((field.description or '').split())} |"
        for name, field in model.model_fields.items()
        if name not in skip
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n" if rows else ""


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The settings class that a field holds, directly or as the values of a dictionary."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)


def kind(annotation: Any) -> str:
    """A type as a reader would write it."""
    if annotation in (Place, Place | None):
        return "`path`"
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    for noise in ("typing.", "fedpact.types."):
        text = text.replace(noise, "")
    if "Annotated" in text:
        text = "table of numbers" if "dict" in text else "number"
    return f"`{text}`".replace("|", "\\|")


def default(field: Any) -> str:
    """What a missing key means."""
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "empty"
    return f"`{field.default!r}`"


def first_paragraphs(found: type[BaseModel]) -> str:
    """The class's docstring without its indentation."""
    return "\n".join(line.strip() for line in (found.__doc__ or "").strip().splitlines())


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")

"""Prompts as the settings ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpact.errors import DataError
from fedpact.runtime.client_config import PromptSettings
from fedpact.tasks.files import load_prompts, split_heldout
from fedpact.types import Prompts


def prompts_at(settings: PromptSettings, folder: Path, *, where: str) -> Prompts:
    """All prompts of `path`. Raises DataError; `where` names the file and the table."""
    return load_prompts(settings.path, folder=folder, limit=settings.limit, where=f"{where}.path", **_reading(settings))


def split_prompts(settings: PromptSettings, folder: Path, *, where: str) -> tuple[Prompts, Prompts]:
    """Prompts to train on, and held-out ones. Raises DataError."""
    prompts = prompts_at(settings, folder, where=where)
    if settings.heldout is not None:
        return prompts, load_prompts(settings.heldout, folder=folder, where=f"{where}.heldout", **_reading(settings))
    try:
        train, heldout = split_heldout(prompts, settings.heldout_share, 0)
    except DataError as error:
        raise DataError(f"{where}.heldout_share: {error}") from error
    return train, heldout


def _reading(settings: PromptSettings) -> dict[str, Any]:
    names = ("prompt", "template", "system", "as_chat", "split", "rename")
    return {name: getattr(settings, name) for name in names}

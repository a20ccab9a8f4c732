"""TOML files against pydantic models, with errors in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedpact.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises ConfigError if it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from error


def validated(model: type[M], data: Any, *, where: str = "", prefix: str = "") -> M:
    """`data` as a `model`, or a ConfigError whose one line names the key, what was found and what was expected."""
    try:
        return model.model_validate(data)
    except ConfigError as error:
        raise ConfigError(": ".join(filter(None, [where, str(error)]))) from error
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])  # a typo explains the rest
        location = ".".join(filter(None, [prefix, *map(str, first["loc"])]))
        if first["type"] == "extra_forbidden":
            text = f"unknown key; valid keys: {', '.join(_valid_keys(model, first['loc'][:-1]))}"
        elif first["type"] == "missing":
            text = "missing; this key is required"
        elif first["type"] == "value_error":
            text = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        else:
            text = f"found {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(": ".join(filter(None, [where, location, text])) + more) from error


def _valid_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        annotation = (
            current.model_fields[part].annotation if _is_model(current) and part in current.model_fields else current
        )
        inner = [kind for kind in (annotation, *get_args(annotation)) if _is_model(kind)]
        current = inner[0] if inner else annotation
    return sorted(current.model_fields) if _is_model(current) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def toml_value(text: str) -> Any:
    """`text` as a TOML value, or as a string if it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

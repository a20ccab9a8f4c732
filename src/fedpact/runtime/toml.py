"""TOML files against pydantic models, with errors in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ValidationError

from fedpact.errors import ConfigError
from fedpact.screen import shown

M = TypeVar("M", bound=BaseModel)


def _place(text: str) -> str:
    """A path or an id as it stands, if a file system could hold it. Code cannot be asked for in one either."""
    if "trust_remote_code" in text:
        raise ValueError("trust_remote_code can be set under [model] of a member's own file only")
    if text.startswith(("gym:", "datasets:")):
        return text
    if "\0" in text or len(text) > 4000 or any(len(part.encode(errors="replace")) > 255 for part in text.split("/")):
        raise ValueError(f"found {_written(text)}; expected a path that a file system can hold")
    return text


Place = Annotated[str, AfterValidator(_place)]
"""A path, or an id of a hub."""


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises ConfigError if it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(shown(f"{path}: no such file")) from error
    except RecursionError as error:
        raise ConfigError(shown(f"{path}: not readable as TOML: nested too deeply")) from error
    except (OSError, ValueError) as error:  # a number of too many digits is a plain ValueError
        raise ConfigError(shown(f"{path}: not readable as TOML: {error}")) from error


def validated(model: type[M], data: Any, *, where: str = "", prefix: str = "") -> M:
    """`data` as a `model`, or a ConfigError whose one line names the key, what was found and what was expected."""
    try:
        return model.model_validate(data)
    except ConfigError as error:
        raise ConfigError(shown(": ".join(filter(None, [where, _short(str(error), 1000)])))) from error
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])  # a typo explains the rest
        location = ".".join(filter(None, [prefix, *map(str, first["loc"])]))
        if first["type"] == "extra_forbidden":
            text = f"unknown key; valid keys: {', '.join(_valid_keys(model, first['loc'][:-1]))}"
        elif first["type"] == "missing":
            text = "missing; this key is required"
        elif first["type"] == "value_error":
            text = _short(str(first["ctx"]["error"]) if "ctx" in first else first["msg"], 1000)
        else:
            text = f"found {_written(first['input'])}; {first['msg'][0].lower()}{first['msg'][1:]}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(shown(": ".join(filter(None, [where, _short(location), text])) + more)) from error


def _written(value: Any) -> str:
    """What was found, as the file might say it."""
    try:
        return _short(repr(value))
    except RecursionError:
        return "a value that is nested too deeply"
    except ValueError:  # Python does not write a number of thousands of digits
        return "a number of too many digits"


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


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
    except (ValueError, RecursionError):
        return text

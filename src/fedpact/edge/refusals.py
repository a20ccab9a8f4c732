"""What can go wrong between a member's link and the SuperLink, each in one line with its remedy."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from fedpact.errors import ConfigError, RefusedError


class LostError(ConnectionError):
    """The SuperLink cannot be reached, or not any more; trying again may help."""


@contextmanager
def told(superlink: str, key: Path, insecure: bool) -> Iterator[None]:
    """Turns what httpx raises into one line and its remedy."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code in (502, 503, 504):
            raise LostError(f"HTTP {code}") from error
        raise RefusedError(f"{superlink}: the SuperLink answered HTTP {code}: {_refusal(code, key)}") from error
    except httpx.TransportError as error:
        if any(word in str(error).lower() for word in ("certificate", "ssl", "tls")):
            raise RefusedError(f"{superlink}: {_distrust(str(error))}") from error
        tls = "; if it expects TLS, leave out --insecure" if insecure else ""
        raise LostError(reason(error) + tls) from error
    except ValueError as error:  # an answer that is no protobuf
        raise RefusedError(f"{superlink}: {_refusal(404, key)}") from error


def check_address(superlink: str) -> None:
    """Raises ConfigError unless it is HOST:PORT."""
    host, _, port = superlink.rpartition(":")
    if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"{superlink}: found no HOST:PORT; expected that of a SuperLink, without https://")


def authorities(path: Path | None) -> bytes | None:
    """The certificates in PEM, checked, or None for those of the system."""
    try:
        data = None if path is None else path.read_bytes()
        if data is not None:
            ssl.create_default_context(cadata=data.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:
        raise ConfigError(f"{path}: found no certificate; expected root certificates in PEM") from error
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}; expected root certificates in PEM") from error
    return data


def reason(error: Exception) -> str:
    """An exception in one line, for the member's own screen."""
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _refusal(code: int, key: Path) -> str:
    if code == 412:
        return (
            f"{key} is not registered there (`flwr supernode register {key}.pub --name NAME` on its side), or its node "
            "still counts as active (stop the other link or SuperNode that uses it, or wait a minute)"
        )
    if code == 401:
        return f"it does not accept what {key} signs; set the clocks of both hosts"
    return "found no Flower SuperLink of version 1.41 or 1.42; expected its HOST:PORT"


def _distrust(text: str) -> str:
    if "certificate verify failed" in text.lower():
        why = text.split("failed:")[-1].split("(_ssl")[0].strip()
        return f"its certificate is not trusted ({why}); --root-certificates must name the authority that signed it"
    return "the SuperLink does not speak TLS; give its TLS port, or --insecure if it has none"

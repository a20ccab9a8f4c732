"""What code at a member can say on the service's socket, and what the service answers. Standard library only.

A service's answer is `answer` and its bytes in hex; a failure is the code that it sent.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

_HEAD = struct.Struct(">4sBQ")
_REQUEST, _ANSWER = 1, 2
_PATIENCE_S = 30.0
_NUM_SILENT = 20


def asking(path: str, envelopes: Mapping[str, bytes]) -> dict[str, str]:
    """What came of each envelope, in the order of their names, and of what is no request. Sound ones are named so."""
    found = {name: said(path, _request(data)) for name, data in envelopes.items()}
    sound = [name for name in envelopes if name.endswith("sound")]
    found["a frame of 2^63 bytes"] = said(path, _HEAD.pack(b"FPS1", _REQUEST, 2**63) + b"x")
    found["another protocol"] = said(path, b"GET / HTTP/1.1\r\nHost: site\r\n\r\n")
    found["an answer"] = said(path, _HEAD.pack(b"FPS1", _ANSWER, 1) + b"x")
    found["half a frame"] = said(path, _HEAD.pack(b"FPS1", _REQUEST, 9) + b"half", hang_up=True)
    for count in (1, _NUM_SILENT):
        silent = list(filter(None, (_silent(path) for _ in range(count))))
        if count == 1:
            found["beside a silent one"] = said(path, _request(envelopes[sound[-1]]))
        for peer in silent:
            peer.close()
        found[f"after {count} silent"] = said(path, _request(envelopes[sound[-1]]))
        found[f"num silent of {count}"] = str(len(silent))
    return found


def said(path: str, data: bytes, *, hang_up: bool = False) -> str:
    """The service's answer to these bytes."""
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            _connect(peer, path)
            with suppress(BrokenPipeError, ConnectionResetError):
                peer.sendall(data)
            if hang_up:
                peer.shutdown(socket.SHUT_WR)
            _, kind, size = _HEAD.unpack(_exactly(peer.recv, _HEAD.size))
            body = _exactly(peer.recv, size)
        except (OSError, struct.error) as error:
            return type(error).__name__
    return f"answer {body.hex()}" if kind == _ANSWER else body.decode("latin-1")


def _connect(peer: socket.socket, path: str) -> None:
    """Waits while there is no room, as a front end does. Raises OSError."""
    peer.settimeout(_PATIENCE_S)
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        with suppress(BlockingIOError):
            return peer.connect(path)
        time.sleep(0.05)
    raise TimeoutError


def _request(envelope: bytes) -> bytes:
    return _HEAD.pack(b"FPS1", _REQUEST, len(envelope)) + envelope


def _silent(path: str) -> socket.socket | None:
    """A connection that says nothing; None if there is no room for it."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(0.05)
    try:
        peer.connect(path)
    except OSError:
        peer.close()
        return None
    time.sleep(0.01)
    return peer


def _exactly(more: Callable[[int], bytes], size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := more(size - len(data))):
        data += piece
    return data

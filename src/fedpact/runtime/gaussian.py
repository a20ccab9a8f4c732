"""Gaussian noise on what a member trained, keyed by a secret that only the member has, and by what it hides."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedpact.runtime.files import tensor_bytes
from fedpact.types import Adapter

_BLOCK = 2**20
"""Normals to one block of the stream; bounds the memory."""


def gaussian(secret: bytes, parts: Sequence[str | int], size: int) -> Tensor:
    """Standard normals that depend on the secret and on every part: [size] float64.

    SHAKE-256 of secret and parts is the stream, 53 bits of it make a uniform, Box and Muller 1958 make two of those two
    normals. The first numbers do not depend on `size`. None lies beyond 8.58, where an ideal normal lies once in 1e17.
    Whoever lacks the secret cannot tell them from random. Same bytes on the same machine and versions.

    Raises ValueError if the secret is shorter than 32 bytes.
    """
    if len(secret) < 32:
        raise ValueError(f"the secret has {len(secret)} bytes; expected 32, which nobody else can guess")
    blocks = [
        _block(secret + json.dumps(["gaussian", *parts, index]).encode(), min(_BLOCK, size - start))
        for index, start in enumerate(range(0, size, _BLOCK))
    ]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *blocks])


def noised(
    sent: Adapter,
    adapter: Adapter,
    *,
    clip_norm: float,
    noise_multiplier: float,
    secret: bytes,
    what: Sequence[str | int],
) -> Adapter:
    """`adapter` as it may leave: its change from `sent` clipped as one vector, and noise on every coordinate, float32.

    The change of all tensors together is shortened to `clip_norm` if it is longer (`control/` tensors travel as changes
    themselves and start at zero); the noise has standard deviation `noise_multiplier * clip_norm`.

    The key of the noise is `what`, which names the question (run, round, exchange, digest of the request), with
    everything that is hidden or scales it: both adapters, the norm and the multiplier. The same answer again has the
    same noise, so asking again tells nothing new. Anything else has fresh noise, so no two answers differ by a known
    multiple of what they hide.

    Epsilon is that of ideal normals. Floating-point ones skip some numbers, and their low bits can betray what they
    hide (Mironov 2012, doi:10.1145/2382196.2382264, of Laplace noise); rounding to float32 drops those bits, which is
    a precaution and no proof.

    Raises ValueError if names or shapes differ, a number is not finite, or norm or multiplier is not positive.
    """
    for name, value in (("clip_norm", clip_norm), ("noise_multiplier", noise_multiplier)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected a positive number")
    start, trained = _flat(sent, adapter)
    change = trained - start  # [d]
    # Of what is not finite, clipping would make anything but a vector of bounded length.
    if not bool(change.isfinite().all()):
        raise ValueError("the trained adapter is not finite")
    change *= min(1.0, clip_norm / max(float(change.norm()), clip_norm))
    hidden = [hashlib.sha256(tensor_bytes(one)).hexdigest() for one in (sent, adapter)]
    scale = [float(clip_norm).hex(), float(noise_multiplier).hex()]
    noise = gaussian(secret, [*what, *hidden, *scale], len(change))
    told = (start + change + noise_multiplier * clip_norm * noise).float()
    result, end = dict[str, Tensor](), 0
    for name in sorted(adapter):
        begin, end = end, end + adapter[name].numel()
        result[name] = told[begin:end].reshape(adapter[name].shape)
    return result


def _flat(sent: Adapter, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Where the training started and where it ended, [d] float64 each, in the order of the sorted names."""
    odd = sorted(sent.keys() ^ adapter.keys())
    if odd or not adapter:
        raise ValueError(f"{odd[0] if odd else 'no tensor'} has no counterpart; expected the tensors that were sent")
    for name in sorted(adapter):
        if adapter[name].shape != sent[name].shape:
            found, expected = tuple(adapter[name].shape), tuple(sent[name].shape)
            raise ValueError(f"{name} has shape {found}; expected {expected}, as it was sent")
    starts = [sent[n].double() * (0 if n.startswith("control/") else 1) for n in sorted(sent)]
    return _joined(starts), _joined([adapter[name].double() for name in sorted(adapter)])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().cpu().reshape(-1) for tensor in tensors])


def _block(key: bytes, size: int) -> Tensor:
    """[size] float64, size even or not."""
    stream = hashlib.shake_256(key).digest(16 * ((size + 1) // 2))
    bits = np.frombuffer(stream, dtype="<u8") >> np.uint64(11)  # [2 * pairs]
    uniforms = bits.reshape(-1, 2).astype(np.float64)
    radius = np.sqrt(-2 * np.log((uniforms[:, 0] + 1) * 2.0**-53))  # of (0, 1]: never log(0)
    angle = uniforms[:, 1] * (2 * np.pi * 2.0**-53)
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return torch.from_numpy(normals[:size].copy())

"""Every draw has a key, so that there is no generator state to save: resume, retry and replay draw the same numbers.

For sampling, initialisation and cohorts only. Noise that protects privacy must be keyed by a secret that the server
does not have, never by the run's seed.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: str | int) -> int:
    """A 63-bit number that depends on every part and on their order: `key(seed, round, "north", "prompts")`."""
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A CPU generator seeded with `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


def permutation(size: int, *parts: str | int) -> list[int]:
    """A shuffle of `range(size)` that depends on the key alone."""
    order: list[int] = torch.randperm(size, generator=generator(*parts)).tolist()
    return order


def uniforms(seed: int, rows: int, columns: int) -> Tensor:
    """Numbers in [0, 1), one a cell: [rows, columns] float32. Row i depends on `seed` and i only, not on `rows`.

    SplitMix64 (Steele, Lea and Flood 2014, figure 17) over a counter; the upper 24 bits make the float.
    """
    row_keys = _mix(np.uint64(seed) + _GOLDEN * np.arange(1, rows + 1, dtype=np.uint64))
    counters = row_keys[:, None] + _GOLDEN * np.arange(1, columns + 1, dtype=np.uint64)[None, :]
    return torch.from_numpy((_mix(counters) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

"""Judges for the second demo: models that know one operation of the op chains, and less of every other.

An expert is the warm start, trained further on one operation with clean chains of thought, and saved as an ordinary
transformers folder. A beginner starts from nothing and gets too few steps: on most operations it is wrong more often
than right, and a server that asks beginners learns their mistakes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpact.seeding import generator
from fedpact.tasks import opchains, warmstart

STEPS = 160
"""An expert is right on all of its operation after 60; what comes then makes it forget the others."""
BEGINNER_STEPS = 50


def train_expert(op: str, out: Path, *, steps: int = STEPS, seed: int = 0, base: Path | None = None) -> list[float]:
    """Train the model at `base` (None: the shipped one) further on `op`, and write it to `out`.

    Returns the loss of every step. Trained again, it has the same bytes on the same machine with the same versions.
    Raises ValueError for an unknown operation.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = clean_rows(op, steps * warmstart.BATCH, seed=seed)
    return _fitted(AutoModelForCausalLM.from_pretrained(base or warmstart.model_folder()), rows, steps, out)


def train_beginner(op: str, out: Path, *, steps: int = BEGINNER_STEPS, seed: int = 0) -> list[float]:
    """Train a model from nothing on `op`, for too short a time, and write it to `out`; else as `train_expert`."""
    rows = clean_rows(op, steps * warmstart.BATCH, seed=seed)
    return _fitted(warmstart.new_model(seed=seed), rows, steps, out)


def clean_rows(op: str, size: int, *, seed: int) -> Tensor:
    """`size` training prompts of `op`, each with its chain of thought and its answer in tags: [size, 17] int64.

    Raises ValueError for an unknown operation.
    """
    if op not in opchains.OPS:
        raise ValueError(f"unknown operation `{op}`; expected one of {', '.join(opchains.OPS)}")
    pool = opchains.pool(op)
    drawn = torch.randint(len(pool), (size,), generator=generator(seed, "opchains", "expert", op)).tolist()
    said = [warmstart.completion(op, pool[i], reasoned=True, tagged=True, forbidden=False) for i in drawn]
    return torch.tensor([warmstart.row(op, pool[i], text) for i, text in zip(drawn, said, strict=True)])


def competence(model_path: Path, *, size: int = 96) -> dict[str, float]:
    """How often the model's likeliest completion is right, by operation, on `size` held-out prompts of each."""
    figures = warmstart.measure(model_path, size=size)
    return {op: figures[f"greedy/{op}"] for op in opchains.OPS}


def _fitted(model: Any, rows: Tensor, steps: int, out: Path) -> list[float]:
    with warmstart.one_thread():
        losses = warmstart.fit(model, rows, steps)
    warmstart.save(model, out)
    return losses

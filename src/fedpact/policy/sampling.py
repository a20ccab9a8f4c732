"""From logits to tokens: the tempered distribution, and inverse-CDF sampling from keyed uniforms."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, *, temperature: float, banned: int | None) -> Tensor:
    """Log-probabilities that sampler and trainer share: [..., v] -> [..., v], at least float32.

    `banned` is the PAD token where it is no end-of-sequence token: it can never be sampled, so both sides leave it out.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if banned is not None:
        logits = logits.index_fill(-1, torch.tensor([banned], device=logits.device), -torch.inf)
    return logits.log_softmax(-1)


def inverse_cdf_sample(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row: [rows, v], [rows] in [0, 1) -> [rows] int64.

    The first token whose cumulative probability exceeds u. The sum may end below 1 in floating point, so u is scaled
    by it and kept strictly below: a token of probability zero is never drawn, not even at u = 1 - 2^-24.
    """
    # a parallel float32 scan on a GPU is not monotone over large vocabularies
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64 if logprobs.is_cuda else None)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms.to(cdf)[:, None] * total, below)
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
    return tokens.clamp(max=cdf.shape[1] - 1)  # NaN sorts past the end; the caller sees it in the log-probs

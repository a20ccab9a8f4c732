"""Yes-or-no ratings that do not give away what the rater holds: randomised response."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_probability(epsilon: float) -> float:
    """How often randomised response tells the truth: e^epsilon / (1 + e^epsilon).

    Whatever is said, it is then at most e^epsilon times likelier under one truth than under the other. Infinity always
    tells the truth and protects nothing.

    Raises ValueError if `epsilon` is not positive: at 0 what is said has nothing to do with the truth.
    Warner 1965, doi:10.1080/01621459.1965.10480775.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; expected a positive number")
    return 1 / (1 + math.exp(-epsilon))


def randomised_response(bits: Tensor, epsilon: float, draws: Tensor) -> Tensor:
    """`bits` (0, 1 or NaN), each kept with `keep_probability` and flipped otherwise, then debiased: same shape, floats.

    Debiasing, `(y - (1 - p)) / (2p - 1)`, makes the expectation the bit itself. It happens at the member: it costs no
    privacy, being a function of y alone, and nobody else need know epsilon, though the two values that come out,
    one above 1 and one below 0, show it. NaN stays NaN: *that* there is no rating is told, and is not protected.

    `draws` are uniforms in [0, 1), one a bit, and must come from a secret of the member, never from the run's seed.
    Draws that are multiples of 2^-24 (`seeding.uniforms`) flip at least as often as promised, and never less often than
    once in 2^24. Answering the same question again with new draws spends epsilon again.

    Raises ValueError if `epsilon` is not positive, a bit is something else, or `draws` has another shape.
    """
    keep = keep_probability(epsilon)
    if draws.shape != bits.shape:
        raise ValueError(f"draws are {list(draws.shape)}; expected one a bit, {list(bits.shape)}")
    strangers = bits[(bits != 0) & (bits != 1) & ~bits.isnan()]
    if len(strangers):
        raise ValueError(f"a rating is {strangers[0].item()}; randomised response takes 0, 1 and NaN only")
    # 1 - keep without cancellation. Flipping below it, not keeping below `keep`, rounds in favour of the member.
    flip = keep * math.exp(-epsilon)
    told = torch.where(draws.double() < flip, 1 - bits.double(), bits.double())
    result = (told - flip) / (keep - flip)
    return result.to(bits.dtype if bits.is_floating_point() else torch.float32)


def per_candidate(epsilon_per_prompt: float, num_candidates: int) -> float:
    """What each candidate of a prompt may spend, so that together they spend `epsilon_per_prompt`: an even share.

    Basic composition: ratings of one prompt's candidates may all hang on the same secret, and their budgets add up.
    Dwork and Roth 2014, doi:10.1561/0400000042, section 3.5.

    Raises ValueError if the budget or the number is not positive.
    """
    if not epsilon_per_prompt > 0:
        raise ValueError(f"epsilon_per_prompt is {epsilon_per_prompt}; expected a positive number")
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}; expected at least one")
    return epsilon_per_prompt / num_candidates

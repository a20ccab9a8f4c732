"""Who is asked about a question: the members that did best on the known questions nearest to it."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbours(questions: Tensor, auxiliary: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The auxiliary questions most like each question: unit rows [p, h], [a, h] -> index [p, l], cosine [p, l] float32.

    l is the smaller of `num` and a. The most similar comes first, of equal ones the one with the lower index.

    Raises ValueError if `num` is not positive or the embeddings differ in width.
    FedGRPO, arXiv:2602.12014, "confidence graph"; the paper takes 20.
    """
    if num < 1:
        raise ValueError(f"num is {num}; expected at least one neighbour")
    if questions.shape[-1] != auxiliary.shape[-1]:
        raise ValueError(
            f"questions have {questions.shape[-1]} features, auxiliary ones {auxiliary.shape[-1]}; use one encoder"
        )
    # A float32 product's last bits depend on how many questions are asked at once; a rounded float64 one's do not.
    cosines = (questions.double() @ auxiliary.double().mT).float()  # [p, a]
    similarity, index = cosines.sort(dim=-1, descending=True, stable=True)
    return index[:, :num], similarity[:, :num]


def edge_weights(similarity: Tensor, temperature: float | None) -> Tensor:
    """How much each neighbour counts: cosines [p, l] -> [p, l], rows that sum to 1.

    None counts all alike, as the paper does. A temperature gives softmax(similarity / temperature), which is our
    reading of a graph with edges: the smaller, the more the nearest neighbour decides.

    Raises ValueError if the temperature is not positive.
    """
    if temperature is None:
        return torch.ones_like(similarity) / similarity.shape[-1]
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number, or None for equal weights")
    return (similarity / temperature).softmax(-1)


def competence(correct: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each member's weighted hit rate on each question's neighbours: [k, a], [p, l], [p, l] -> [p, k] float32.

    `correct` is 1 or 0, NaN where the member was not examined; such neighbours are left out and the others' weights
    scaled up. NaN where no neighbour with any weight was examined.
    """
    hits = correct.double().mT[index]  # [p, l, k]
    edges = weights.double().unsqueeze(-1)
    weight = (edges * ~hits.isnan()).sum(1)
    # Float32 at the end: rates that are equal in truth must tie, whatever the order of the sum did to the last bit.
    return ((edges * hits).nansum(1) / weight).float()


def chosen_experts(competence: Tensor, num: int, *, floor: float = 0.0, draws: Tensor) -> Tensor:
    """The `num` most competent members of each question: [p, k] -> bool [p, k].

    Only members at or above `floor` are chosen, NaN never, so that a question may have fewer experts or none. Of
    equally competent members the one with the larger draw is taken; `draws` are uniforms [p, k].

    Raises ValueError if `num` is not positive or `draws` has another shape.
    """
    if num < 1:
        raise ValueError(f"num is {num}; expected at least one expert")
    if draws.shape != competence.shape:
        raise ValueError(f"draws are {list(draws.shape)}; expected one a cell of competence, {list(competence.shape)}")
    able = competence >= floor  # false for NaN
    shuffled = draws.argsort(dim=-1, descending=True, stable=True)
    ranked = competence.masked_fill(~able, -torch.inf).gather(-1, shuffled)
    order = shuffled.gather(-1, ranked.argsort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(able).scatter(-1, order[:, :num], True) & able

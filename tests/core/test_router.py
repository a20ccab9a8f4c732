"""A learned router: it learns domains, gives shares, and is the same whenever it is fitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from fedpact.core.router import fit_router, route


def domains(seed: int, per_domain: int, num_domains: int = 3, width: int = 64) -> tuple[Tensor, Tensor]:
    """Unit embeddings around one direction for each domain, and which domain each belongs to."""
    centres = torch.randn(num_domains, width, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(num_domains).repeat(per_domain)
    noise = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed))
    return normalize(centres[labels] + noise, dim=-1), labels


def by_hand() -> dict[str, Tensor]:
    """Logits e0, 2 e0 and 3 e0 for an embedding with e0 >= 0."""
    return {
        "w1": torch.tensor([[1.0, 0.0]]),
        "b1": torch.zeros(1),
        "w2": torch.tensor([[1.0], [2.0], [3.0]]),
        "b2": torch.zeros(3),
    }


def test_questions_that_were_not_seen_go_to_their_domain():
    router = fit_router(*domains(1, 20), 3)
    embeddings, labels = domains(2, 100)
    assert (route(router, embeddings).argmax(-1) == labels).float().mean() > 0.95


def test_a_domain_that_no_single_direction_tells_apart_is_learnt_too():
    # Exclusive or: the hidden layer must do some work.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) / 2**0.5
    labels = torch.tensor([0, 1, 1, 0])
    assert route(fit_router(corners, labels, 2), corners).argmax(-1).tolist() == labels.tolist()


def test_fitting_twice_gives_the_same_bytes_and_another_seed_others():
    first, second = (fit_router(*domains(1, 10), 3, steps=20) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = fit_router(*domains(1, 10), 3, steps=20, seed=1)
    assert not torch.equal(first["w1"], other["w1"])


def test_fitting_leaves_the_global_generator_and_the_gradient_mode_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        router = fit_router(*domains(1, 2), 3, steps=20)
    assert torch.equal(torch.rand(1), expected)
    assert not any(value.requires_grad for value in router.values())
    assert router["b2"].any()  # it did learn


def test_a_router_is_four_plain_tensors():
    router = fit_router(*domains(1, 2), 5, hidden=7, steps=1)
    assert {name: list(value.shape) for name, value in router.items()} == {
        "w1": [7, 64],
        "b1": [7],
        "w2": [5, 7],
        "b2": [5],
    }


def test_a_label_without_examples_gets_almost_no_share():
    embeddings, labels = domains(1, 20)
    assert route(fit_router(embeddings, labels, 4), embeddings)[:, 3].max() < 0.05


def test_a_label_out_of_range_is_refused():
    with pytest.raises(ValueError, match="labels run from 0 to 2; expected numbers from 0 to 1"):
        fit_router(*domains(1, 2), 2)
    with pytest.raises(ValueError, match="0 embeddings and 0 labels"):
        fit_router(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2)


def test_shares_are_the_softmax_of_the_logits():
    shares = route(by_hand(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    third = [1 / 3] * 3
    assert_close(shares, torch.tensor([[0.09003057, 0.24472847, 0.66524096], third, third]))


def test_the_temperature_divides_the_logits():
    embeddings = torch.tensor([[2.0, 0.0]])
    assert_close(route(by_hand(), embeddings, temperature=2.0), route(by_hand(), embeddings / 2))
    with pytest.raises(ValueError, match="temperature is 0"):
        route(by_hand(), embeddings, temperature=0)


def test_only_the_top_shares_remain_and_keep_their_proportions():
    embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    whole, kept = route(by_hand(), embeddings), route(by_hand(), embeddings, top=2)
    assert kept[:, 0].tolist() == [0.0, 0.0]
    assert_close(kept[:, 1:], whole[:, 1:] / whole[:, 1:].sum(-1, keepdim=True))
    assert torch.equal(route(by_hand(), embeddings, top=9), whole)


def test_of_equal_shares_the_first_remain():
    router = {"w1": torch.zeros(1, 2), "b1": torch.zeros(1), "w2": torch.zeros(100, 1), "b2": torch.zeros(100)}
    assert route(router, torch.zeros(1, 2), top=2).tolist() == [[0.5, 0.5] + [0.0] * 98]
    with pytest.raises(ValueError, match="top is 0"):
        route(by_hand(), torch.zeros(1, 2), top=0)


def test_embeddings_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match="embeddings have 3 features, the router expects 2"):
        route(by_hand(), torch.zeros(1, 3))

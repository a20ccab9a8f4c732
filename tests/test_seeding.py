"""Draws depend on their key and on nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpact.seeding import generator, key, permutation, uniforms


def test_a_key_tells_its_parts_apart() -> None:
    assert key("a", "bc") != key("ab", "c")
    assert key(1, "2") != key("1", 2)
    assert key(1, 2) != key(2, 1)


def test_a_known_key_never_changes() -> None:
    assert key(7, "north") == 5760634221052396455


@given(st.integers(0, 2**63 - 1), st.integers(1, 20), st.integers(1, 20))
def test_uniforms_of_a_row_do_not_depend_on_how_many_rows_there_are(seed: int, rows: int, columns: int) -> None:
    numbers = uniforms(seed, rows, columns)
    assert torch.equal(numbers[:1], uniforms(seed, 1, columns))
    assert torch.equal(numbers[:, :1], uniforms(seed, rows, 1))
    assert bool(((numbers >= 0) & (numbers < 1)).all())


def test_uniforms_fill_256_bins_evenly() -> None:
    counts = torch.bincount((uniforms(3, 1000, 256) * 256).long().flatten(), minlength=256).double()
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 180 < chi_square < 340  # 255 degrees of freedom: mean 255, standard deviation 22.6


def test_neighbouring_rows_and_columns_are_uncorrelated() -> None:
    numbers = uniforms(5, 400, 400) - 0.5
    assert abs(float((numbers[1:] * numbers[:-1]).mean())) < 1e-3
    assert abs(float((numbers[:, 1:] * numbers[:, :-1]).mean())) < 1e-3


def test_a_permutation_holds_every_number_once() -> None:
    assert sorted(permutation(50, 1, "x")) == list(range(50))
    assert permutation(50, 1, "x") == permutation(50, 1, "x") != permutation(50, 2, "x")


def test_generators_of_one_key_draw_the_same() -> None:
    assert torch.equal(torch.rand(5, generator=generator("a", 1)), torch.rand(5, generator=generator("a", 1)))

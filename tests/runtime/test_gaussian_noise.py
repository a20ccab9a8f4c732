"""Gaussian noise on a trained adapter: what it is, what it depends on, and who can take it off again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact import seeding
from fedpact.runtime.files import tensor_bytes
from fedpact.runtime.gaussian import gaussian, noised
from fedpact.types import Adapter

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
WHAT: tuple[str | int, ...] = ("run", 7, 0, "digest of the request")


def flat(adapter: Adapter) -> Tensor:
    return torch.cat([adapter[name].double().reshape(-1) for name in sorted(adapter)])


def adapters(size: int = 20_000, length: float = 3.0) -> tuple[Adapter, Adapter]:
    """What was sent, and what came of it: two tensors of `size` numbers each, the change `length` long."""
    draws = torch.randn(4, size, generator=seeding.generator("test"), dtype=torch.float64)
    change = draws[2:] * (length / draws[2:].norm())
    sent = {A: draws[0].reshape(4, -1).float(), B: draws[1].reshape(-1, 4).float()}
    return sent, {A: (sent[A] + change[0].reshape(4, -1)).float(), B: (sent[B] + change[1].reshape(-1, 4)).float()}


def told(sent: Adapter, adapter: Adapter, secret: bytes = SECRET, **changes: Any) -> Adapter:
    return noised(sent, adapter, **{"clip_norm": 1.0, "noise_multiplier": 0.5, "what": WHAT, **changes}, secret=secret)


# --- normals --------------------------------------------------------------------------------------------------------


def test_the_normals_are_normal() -> None:
    draws = gaussian(SECRET, ["a", 1], 200_000).sort().values
    ideal = (1 + torch.erf(draws / math.sqrt(2))) / 2
    steps = torch.arange(200_001, dtype=torch.float64) / 200_000
    farthest = max(float((ideal - steps[:-1]).max()), float((steps[1:] - ideal).max()))
    assert farthest < 1.95 / math.sqrt(200_000)  # Kolmogorov and Smirnov: once in a thousand keys


def test_the_normals_fill_a_hundred_equal_bins_equally() -> None:
    draws = gaussian(SECRET, ["b", 1], 200_000)
    counts = ((1 + torch.erf(draws / math.sqrt(2))) * 50).long().bincount(minlength=100)
    chi_square = float(((counts - 2_000).double() ** 2 / 2_000).sum())
    assert 60.0 < chi_square < 149.0  # 99 degrees of freedom: a thousandth on either side


def test_both_normals_of_a_pair_have_variance_one_and_nothing_in_common() -> None:
    pairs = gaussian(SECRET, ["c"], 200_000).reshape(-1, 2).T  # [2, 100000]
    assert_close(pairs @ pairs.T / 100_000, torch.eye(2, dtype=torch.float64), atol=0.015, rtol=0)  # 3.3 sd
    squares = pairs.square() - 1  # a shared radius shows here, if the angle is not uniform
    assert float((squares[0] * squares[1]).mean()) == pytest.approx(0.0, abs=0.03)


def test_the_tail_reaches_as_far_as_it_should() -> None:
    draws = gaussian(SECRET, ["d"], 1_000_000).abs()
    assert draws.isfinite().all()
    assert 4.4 < float(draws.max()) < 6.5
    assert int((draws > 3).sum()) == pytest.approx(2_700, abs=160)  # 0.27 %; three standard deviations


def test_a_known_key_has_known_normals() -> None:
    by_hand: list[float] = []
    stream = hashlib.shake_256(SECRET + b'["gaussian", "golden", 1, 0]').digest(32)
    words = [int.from_bytes(stream[i : i + 8], "little") >> 11 for i in range(0, 32, 8)]
    for first, second in zip(words[::2], words[1::2], strict=True):
        radius, angle = math.sqrt(-2 * math.log((first + 1) / 2**53)), 2 * math.pi * second / 2**53
        by_hand += [radius * math.cos(angle), radius * math.sin(angle)]
    found = gaussian(SECRET, ["golden", 1], 4)
    assert_close(found, torch.tensor(by_hand, dtype=torch.float64), atol=1e-14, rtol=1e-14)
    golden = [1.236459901966934, 1.064292535322979, 0.623764187235357, 1.8317871665190812]
    assert found.tolist() == pytest.approx(golden, rel=1e-13)


@given(size=st.integers(0, 40), more=st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_the_first_normals_do_not_depend_on_how_many_there_are(size: int, more: int) -> None:
    assert torch.equal(gaussian(SECRET, ["e"], size + more)[:size], gaussian(SECRET, ["e"], size))


def test_blocks_of_a_long_vector_are_not_copies_of_each_other() -> None:
    draws = gaussian(SECRET, ["f"], 2**20 + 1_000)
    assert len(draws) == 2**20 + 1_000
    assert abs(float(torch.corrcoef(torch.stack([draws[:1_000], draws[2**20 :]]))[0, 1])) < 0.11


KEYS: list[tuple[bytes, Sequence[str | int]]] = [
    (SECRET, ["a", 1]),
    (OTHER, ["a", 1]),
    (SECRET, ["a", 2]),
    (SECRET, ["a", "1"]),
    (SECRET, ["a1"]),
    (SECRET, [1, "a"]),
    (SECRET, []),
]


def test_other_keys_have_unrelated_normals() -> None:
    draws = torch.stack([gaussian(secret, parts, 20_000) for secret, parts in KEYS])
    related = torch.corrcoef(draws) - torch.eye(len(KEYS))
    assert float(related.abs().max()) < 0.027  # 3.8 standard deviations; 21 pairs


def test_a_secret_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the secret has 31 bytes; expected 32"):
        gaussian(SECRET[:31], ["a"], 1)


# --- noise on an adapter --------------------------------------------------------------------------------------------


def test_the_change_is_clipped_as_one_vector_and_the_noise_has_the_promised_size() -> None:
    sent, adapter = adapters(length=3.0)
    left = told(sent, adapter, clip_norm=1.5, noise_multiplier=0.25)
    change = flat(left) - flat(sent)
    clipped = (flat(adapter) - flat(sent)) / 2
    noise = change - clipped
    assert float(noise.std()) == pytest.approx(0.375, rel=0.015)  # 0.25 * 1.5, on 40,000 coordinates; 4 sd
    assert float(change @ clipped / clipped.square().sum()) == pytest.approx(1.0, abs=1.0)  # 0.375 / 1.5 = one sd


def test_a_change_shorter_than_the_norm_is_not_stretched() -> None:
    sent, adapter = adapters(size=8, length=0.5)
    left = told(sent, adapter, clip_norm=1.0, noise_multiplier=1e-9)
    assert_close(flat(left), flat(adapter), atol=1e-6, rtol=1e-6)


def test_a_longer_one_ends_on_the_norm() -> None:
    sent, adapter = adapters(size=8, length=50.0)
    left = told(sent, adapter, clip_norm=2.0, noise_multiplier=1e-9)
    assert float((flat(left) - flat(sent)).norm()) == pytest.approx(2.0, rel=1e-5)


def test_a_control_variate_starts_at_zero_and_shares_the_norm() -> None:
    sent = {A: torch.ones(2), "control/x": torch.full((2,), 9.0)}  # what was sent of it does not count
    adapter = {A: torch.tensor([4.0, 1.0]), "control/x": torch.tensor([0.0, 4.0])}
    left = told(sent, adapter, clip_norm=1.0, noise_multiplier=1e-9)  # (3, 0, 0, 4) is 5 long
    assert_close(left, {A: torch.tensor([1.6, 1.0]), "control/x": torch.tensor([0.0, 0.8])}, atol=1e-6, rtol=1e-6)


def test_every_tensor_carries_noise() -> None:
    sent = {A: torch.zeros(100), B: torch.zeros(100), "critic/v": torch.zeros(100), "control/x": torch.zeros(100)}
    left = told(sent, sent)
    assert {name: 0.3 < float(tensor.std()) < 0.7 for name, tensor in left.items()} == dict.fromkeys(sent, True)


def test_what_leaves_is_float32_in_the_shapes_that_were_sent() -> None:
    sent = {A: torch.zeros(2, 3), B: torch.zeros(3, 2, dtype=torch.float64), "scale": torch.zeros(())}
    left = told(sent, sent)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in left.items()} == {
        name: (torch.float32, tensor.shape) for name, tensor in sent.items()
    }


def test_the_order_of_the_names_does_not_matter() -> None:
    sent, adapter = adapters(size=8)
    backwards = [dict(reversed(one.items())) for one in (sent, adapter)]
    left = told(*backwards)
    assert_close(left, told(sent, adapter), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: torch.tensor([math.nan])}, r"^the trained adapter is not finite$"),
        ({A: torch.tensor([math.inf])}, r"^the trained adapter is not finite$"),
        ({A: torch.ones(2)}, r"lora_A.weight has shape \(2,\); expected \(1,\), as it was sent$"),
        ({"private/x": torch.ones(1)}, r"^private/x has no counterpart"),
    ],
)
def test_what_cannot_be_clipped_does_not_leave(change: Adapter, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        told({A: torch.zeros(1)}, {A: torch.ones(1), **change})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier"])
def test_a_setting_that_means_no_noise_is_an_error(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected a positive number$"):
        told({A: torch.zeros(1)}, {A: torch.ones(1)}, **{name: value})


# --- who can take it off --------------------------------------------------------------------------------------------


def test_a_retry_of_the_same_answer_has_the_same_noise() -> None:
    sent, adapter = adapters()
    again = {name: tensor.clone() for name, tensor in reversed(adapter.items())}
    assert torch.equal(flat(told(sent, adapter)), flat(told(sent, again)))


OTHERS: dict[str, dict[str, Any]] = {
    "another run": {"what": ("other", *WHAT[1:])},
    "another round": {"what": ("run", 8, *WHAT[2:])},
    "another exchange": {"what": ("run", 7, 1, WHAT[3])},
    "another request": {"what": (*WHAT[:3], "other")},
    "another member": {"secret": OTHER},
    "another norm": {"clip_norm": 1.5},
    "another multiplier": {"noise_multiplier": 0.6},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_anything_else_has_unrelated_noise(changes: dict[str, Any]) -> None:
    sent, adapter = adapters(length=1e-3)
    first = flat(told(sent, adapter)) - flat(sent)
    second = flat(told(sent, adapter, **changes)) - flat(sent)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02  # 4 sd; 1 if only its scale differs


@pytest.mark.parametrize("far", [1.0, 1e-6], ids=["far", "by one in a million"])
def test_a_retry_with_another_adapter_does_not_tell_their_difference(far: float) -> None:
    sent, adapter = adapters(length=0.5)
    other = {**adapter, A: adapter[A].clone()}
    other[A][0, 0] += far
    difference = flat(told(sent, adapter)) - flat(told(sent, other))
    assert float(difference.std()) == pytest.approx(0.5 * math.sqrt(2), rel=0.02)  # two noises, not none


def test_the_server_cannot_regenerate_the_noise_from_anything_public_and_the_member_can() -> None:
    sent, adapter = adapters(length=1.0)
    left = told(sent, adapter)
    size = len(flat(sent))
    hidden = flat(adapter) - flat(sent)

    seed = 0  # the run's, as in its contract
    public_secrets = [
        bytes(32),
        seed.to_bytes(32, "big"),
        seeding.key(seed, 7, "north", "noise").to_bytes(32, "big"),
        b"digest of the request".ljust(32),
    ]
    guesses = [told(sent, one, secret) for one, secret in product((sent, adapter), public_secrets)]
    noises = [flat(guess) - flat(sent) for guess in guesses]
    noises += [
        0.5 * torch.randn(size, generator=seeding.generator(seed, 7, "north", what)) for what in ("noise", "train")
    ]
    for noise in noises:
        residual = flat(left) - flat(sent) - noise - hidden
        assert float(residual.norm()) > 0.5 * math.sqrt(
            size
        )  # no smaller than the noise itself, 100 times what it hides
    noise = 0.5 * gaussian(SECRET, key_of(sent, adapter), size)
    assert float((flat(left) - flat(sent) - noise - hidden).norm()) < 1e-3


def key_of(sent: Adapter, adapter: Adapter) -> list[str | int]:
    """What `noised` says it uses, worked out here once more."""
    digests = [hashlib.sha256(tensor_bytes(one)).hexdigest() for one in (sent, adapter)]
    return [*WHAT, *digests, (1.0).hex(), (0.5).hex()]

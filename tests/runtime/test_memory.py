from __future__ import annotations

import stat

import pytest
import torch
from torch.testing import assert_close

from fedpact.errors import StoreError
from fedpact.runtime.memory import MemberStore


@pytest.fixture
def store(tmp_path):
    made = MemberStore(tmp_path / "north" / "memory")
    made.save((7, 0), {"control": torch.tensor([1.0])}, "digest a", b"reply a")
    made.save((7, 1), {"control": torch.tensor([2.0])}, "digest b", b"reply\nb")
    return made


def test_a_member_that_was_never_asked_remembers_nothing(tmp_path):
    store = MemberStore(tmp_path / "north")
    assert store.load(None) == {}
    assert store.cached("digest") is None
    store.prune((3, 0))
    assert list(tmp_path.iterdir()) == []


def test_memory_starts_from_the_version_that_the_server_names(store):
    assert_close(store.load((7, 0)), {"control": torch.tensor([1.0])})
    assert_close(store.load((7, 1)), {"control": torch.tensor([2.0])})
    assert store.load(None) == {}


def test_a_second_attempt_writes_its_version_anew(store):
    store.save((7, 1), {"private/a": torch.tensor([3])}, "digest c", b"reply c")
    assert_close(store.load((7, 1)), {"private/a": torch.tensor([3])})
    assert (store.cached("digest b"), store.cached("digest c")) == (None, b"reply c")


def test_the_last_reply_is_given_again_verbatim_for_the_same_request_only(store):
    assert MemberStore(store.folder).cached("digest b") == b"reply\nb"
    assert store.cached("digest a") is None
    assert store.cached("digest") is None
    assert store.cached("") is None


def test_an_empty_memory_is_a_version_too(store):
    store.save((8, 0), {}, "digest", b"")
    assert store.load((8, 0)) == {}
    assert store.cached("digest") == b""


def test_versions_older_than_the_committed_one_are_removed(store):
    store.save((10000, 0), {}, "digest", b"reply")
    store.prune(None)
    store.prune((7, 1))
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "0007-01.safetensors",
        "10000-00.safetensors",
        "reply",
    ]
    with pytest.raises(StoreError, match=r"0007-00.safetensors: the server asks .* kept are: 7-1, 10000-0; restore"):
        store.load((7, 0))


@pytest.mark.parametrize("since", [(-1, 0), (8, 99), (10**300, 0)])
def test_a_version_that_a_hostile_server_invents_is_one_line(store, since):
    with pytest.raises(StoreError) as raised:
        store.load(since)
    assert "\n" not in str(raised.value)


def test_a_damaged_memory_is_named(store):
    path = store.folder / "0007-00.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"0007-00.safetensors: not a safetensors file"):
        store.load((7, 0))


def test_a_crash_between_memory_and_reply_costs_only_the_reply(store):
    (store.folder / ".reply.tmp").mkdir()  # the second write fails
    with pytest.raises(StoreError, match="reply: Is a directory"):
        store.save((8, 0), {"control": torch.tensor([3.0])}, "digest c", b"reply c")
    assert store.cached("digest c") is None
    assert_close(store.load((7, 1)), {"control": torch.tensor([2.0])})


def test_only_the_member_can_read_its_memory(store):
    written = [store.folder.parent, store.folder, *store.folder.iterdir()]
    assert len(written) == 5
    assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == []

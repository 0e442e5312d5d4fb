import collections
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.rpc.placement import Placement

NAMES = [f"peer{i}:7440" for i in range(7)]
PAGES = [hashlib.sha256(str(i).encode()).digest() for i in range(7001)]


def owners(names, replicas=1, namespace=bytes(32)):
    order = Placement(names).order(namespace, PAGES)
    return [[names[i] for i in row[:replicas]] for row in order]


def test_every_peer_has_its_share():
    for replicas in (1, 2, 3):
        counts = collections.Counter(name for row in owners(NAMES, replicas) for name in row)
        expected = replicas * len(PAGES) / len(NAMES)
        assert all(0.85 * expected < counts[name] < 1.15 * expected for name in NAMES)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_new_peer_takes_its_share_and_nothing_else_moves(replicas):
    before, after = owners(NAMES[:-1], replicas), owners(NAMES, replicas)
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    # One of the old owners makes way, the others stay and keep their order.
    assert all(NAMES[-1] in new and [n for n in new if n != NAMES[-1]] == old[: replicas - 1] for old, new in moved)
    share = replicas * len(PAGES) / len(NAMES)
    assert 0.85 * share < len(moved) < 1.15 * share


def test_the_order_of_the_list_does_not_matter():
    assert owners(NAMES, 3) == owners(NAMES[::-1], 3)


def test_ranks_of_one_model_do_not_share_their_owners():
    """Their page hashes are the same, their namespaces are not."""
    one, other = owners(NAMES), owners(NAMES, namespace=b"\1" * 32)
    same = sum(a == b for a, b in zip(one, other, strict=True))
    assert same < 1.3 * len(PAGES) / len(NAMES)


@given(
    names=st.lists(st.text(max_size=5), min_size=1, max_size=5, unique=True),
    pages=st.lists(st.binary(min_size=32, max_size=32), max_size=5),
    namespace=st.binary(min_size=32, max_size=32),
)
def test_an_order_names_every_peer_once(names, pages, namespace):
    order = Placement(names).order(namespace, pages)
    assert order.shape == (len(pages), len(names))
    assert (np.sort(order, axis=1) == np.arange(len(names))).all()


def test_clients_of_all_versions_agree():
    order = Placement(["10.0.0.1:7440", "10.0.0.2:7440", "kv-3.example:7440"]).order(bytes(range(32)), PAGES[:12])
    assert order[:, 0].tolist() == [1, 0, 0, 2, 0, 2, 0, 0, 2, 1, 0, 0]

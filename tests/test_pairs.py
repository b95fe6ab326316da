"""Pairs against the plain multiset of edges; IndexHalo against its adjoint."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from md_plugin import pairs as pairs_module
from md_plugin.halo import IndexHalo, NoHalo
from md_plugin.pairs import Pairs

INTEGERS = (torch.int16, torch.int32, torch.int64)


@st.composite
def edge_lists(draw):
    """(receiver, sender, n_recv, n_send): any order, repeats, self pairs, empty rows, ghosts."""
    n_recv = draw(st.integers(0, 6))
    n_send = n_recv + draw(st.integers(0, 4))
    if n_recv == 0:
        return [], [], n_recv, n_send
    edge = st.tuples(st.integers(0, n_recv - 1), st.integers(0, n_send - 1))
    edges = draw(st.lists(edge, max_size=25))
    return [i for i, _ in edges], [j for _, j in edges], n_recv, n_send


def build(edges, dtype=torch.int64):
    receiver, sender, n_recv, n_send = edges
    to_tensor = (torch.tensor(index, dtype=dtype) for index in (receiver, sender))
    return Pairs.from_edges(*to_tensor, n_recv, n_send)


@given(edge_lists(), st.sampled_from(INTEGERS))
@settings(max_examples=200, deadline=None)
def test_rows_hold_the_edges(edges, dtype):
    receiver, sender, n_recv, n_send = edges
    pairs, perm = build(edges, dtype)
    assert (pairs.n_recv, pairs.n_send, pairs.n_pair) == (n_recv, n_send, len(receiver))
    assert pairs.row_ptr.dtype == pairs.sender.dtype == torch.int32
    ptr, columns = pairs.row_ptr.tolist(), pairs.sender.tolist()
    assert ptr[0] == 0 and ptr[-1] == len(receiver) and ptr == sorted(ptr)
    rows = [(i, j) for i in range(n_recv) for j in columns[ptr[i] : ptr[i + 1]]]
    assert Counter(rows) == Counter(zip(receiver, sender, strict=True))
    assert pairs.receiver.tolist() == [i for i, _ in rows]
    # perm is a permutation that brings per-pair data into the order of the rows, and is stable.
    assert sorted(perm.tolist()) == list(range(len(receiver)))
    assert [(receiver[p], sender[p]) for p in perm] == rows
    assert perm.tolist() == sorted(range(len(receiver)), key=lambda p: receiver[p])


@given(edge_lists())
@settings(max_examples=200, deadline=None)
def test_transpose_groups_the_same_pairs_by_sender(edges):
    n_send = edges[3]
    pairs, _ = build(edges)
    assert pairs.col_ptr.dtype == pairs.perm.dtype == torch.int32
    ptr, columns = pairs.col_ptr.tolist(), pairs.sender.tolist()
    assert len(ptr) == n_send + 1 and ptr[-1] == pairs.n_pair
    blocks = [pairs.perm[ptr[j] : ptr[j + 1]].tolist() for j in range(n_send)]
    assert blocks == [[p for p, k in enumerate(columns) if k == j] for j in range(n_send)]
    # Built once, then kept: no kernel call sorts.
    assert pairs.col_ptr is pairs.col_ptr and pairs.perm is pairs.perm
    assert pairs.receiver is pairs.receiver


def test_derived_indices_wait_for_their_first_use():
    pairs, _ = build(([1, 0], [0, 1], 2, 2))
    assert not {"receiver", "_transpose", "sender_long"} & set(vars(pairs))


def test_lists_and_arrays_are_edges_too():
    pairs, perm = Pairs.from_edges([1, 0], [2, 1], 2, 3)
    assert pairs.sender.tolist() == [1, 2] and perm.tolist() == [1, 0]


def test_to_and_repr():
    pairs, _ = build(([1, 0], [0, 1], 2, 2))
    assert pairs.to("cpu") is pairs
    assert pairs.to("meta").device.type == "meta"
    assert repr(pairs) == "Pairs(n_recv=2, n_send=2, n_pair=2, device='cpu')"


BAD_EDGES = [
    (([0, 1], [0], 2, 2), r"shape \(n_pair,\), got \(2,\) and \(1,\)"),
    (([[0]], [[0]], 1, 1), r"shape \(n_pair,\), got \(1, 1\) and \(1, 1\)"),
    (([0, 2], [0, 1], 2, 2), r"receiver indices span 0 .. 2, but must lie in \[0, 2\)"),
    (([0, 1], [-1, 1], 2, 2), r"sender indices span -1 .. 1, but must lie in \[0, 2\)"),
    (([0, 1], [0, 3], 2, 3), r"sender indices span 0 .. 3, but must lie in \[0, 3\)"),
    (([0], [0], 3, 2), "3 receivers but only 2 senders: receivers are the senders 0 .. n_recv - 1"),
]


@pytest.mark.parametrize(("edges", "message"), BAD_EDGES)
def test_bad_edges(edges, message):
    with pytest.raises(ValueError, match=message):
        build(edges)


def test_more_pairs_than_int32_can_count(monkeypatch):
    monkeypatch.setattr(pairs_module, "MAX_PAIRS", 3)
    with pytest.raises(ValueError, match="4 pairs; int32 indices reach 3"):
        build(([0] * 4, [0] * 4, 1, 1))


def test_bad_rows():
    int32, int64 = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"must be int32, got torch.int64.*from_edges converts"):
        Pairs(int64, int32[:1], 1)
    for row_ptr, sender in ((int32[:0], int32), (int32[None], int32), (int32, int32[None])):
        with pytest.raises(ValueError, match=r"row_ptr must have shape \(n_recv \+ 1,\)"):
            Pairs(row_ptr, sender, 5)


@st.composite
def owners(draw):
    n_recv = draw(st.integers(0, 5))
    ghosts = st.lists(st.integers(0, max(n_recv - 1, 0)), max_size=8 if n_recv else 0)
    return n_recv, draw(st.integers(0, 3)), draw(ghosts)


@given(owners())
@settings(max_examples=100, deadline=None)
def test_index_halo_and_its_adjoint(problem):
    """<fill(x), y> = <x, adjoint(y)>: ghosts copy their owners, gradients sum back into them."""
    n_recv, n_feat, owner = problem
    halo = IndexHalo(torch.tensor(owner, dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_recv, n_feat, generator=generator, dtype=torch.float64, requires_grad=True)
    filled = halo.fill(x)
    assert filled.shape == (n_recv + len(owner), n_feat)
    assert torch.equal(filled[:n_recv], x)
    assert all(torch.equal(filled[n_recv + g], x[i]) for g, i in enumerate(owner))
    y = torch.randn(filled.shape, generator=generator, dtype=torch.float64)
    (back,) = torch.autograd.grad(filled, x, y)
    want = y[:n_recv].clone()
    for g, i in enumerate(owner):
        want[i] += y[n_recv + g]
    torch.testing.assert_close(back, want)
    torch.testing.assert_close(halo.adjoint(y), want)
    # A dot product of at most 39 terms of order one: 1e-13 is hundreds of roundings.
    assert abs((filled * y).sum() - (x * back).sum()) < 1e-13


def test_index_halo_can_be_differentiated_twice():
    halo = IndexHalo(torch.tensor([0, 1, 0]))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: halo.fill(x).pow(3), (x,))


def test_no_halo_changes_nothing():
    x = torch.randn(3, 2)
    assert NoHalo().fill(x) is x


def test_indices_must_be_integers_and_row_ptr_must_fit():
    with pytest.raises(TypeError, match="receiver must hold integer indices"):
        Pairs.from_edges(torch.tensor([0.7]), torch.tensor([0]), 1, 1)
    with pytest.raises(ValueError, match="row_ptr ends at 3, but there are 2 senders"):
        Pairs(torch.tensor([0, 3]).int(), torch.tensor([0, 0]).int(), 1)
    pairs = Pairs(torch.tensor([0, 2]).int(), torch.tensor([0, 0]).int(), 1)
    assert pairs.to("cpu") is pairs

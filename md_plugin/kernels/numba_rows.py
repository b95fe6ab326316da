"""The three sums over rows of pairs, compiled by numba; `numba_cpu` calls them.

`*_rows` computes rows start .. stop - 1 in one thread; the others share the rows out among numba's
threads, in contiguous blocks.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from md_plugin.kernels.compiled import compiled
from md_plugin.kernels.simd import flush_denormals, restore_denormals
from md_plugin.kernels.tiles import (
    EDGE_PAIRS,
    EDGE_SENSES,
    ENV_SENSES,
    FEAT_PAIRS,
    FILES,
    ROW_PAIRS,
    TILE_SENSES,
    env_edge,
    env_tile,
    feat_edge,
    feat_tile,
    last_used,
    pair_edge,
    pair_tile,
    sense_row,
    sense_tile,
    tile_sizes,
    turn_edge,
    turn_tile,
)

_jit, _parallel_jit = compiled(FILES), compiled(FILES, parallel=True)


@_jit
def _used(sense, first, last):  # type: ignore[no-untyped-def]
    """From this sensitivity on all are exactly zero for pairs first .. last - 1.

    Gaussians in 1/r crowd at short distances, where condensed matter has no pairs: with r_min of
    1.25 Å a row of fcc aluminium uses 15 of 20, four of its pairs 12. Looking costs a twentieth.
    """
    lanes, _, _ = tile_sizes(sense)
    low = sense.shape[1]
    while low > 0:
        low = max(low - lanes, 0)
        used = last_used((sense,), (first, last, low))
        if used > 0:
            return low + used
    return 0


@_jit
def envsum_rows(sense, features, row_ptr, sender, env, start, stop):  # type: ignore[no-untyped-def]
    """Write env[start:stop]."""
    n_feat = env.shape[2]
    lanes, wide, _ = tile_sizes(env)
    arrays = (env, sense, features, sender)
    n_wide = n_feat // wide * wide
    state = flush_denormals()
    for i in range(start, stop):
        first, last = row_ptr[i], row_ptr[i + 1]
        high = _used(sense, first, last)
        env[i, high:] = 0.0
        for nu in range(0, high, ENV_SENSES):
            for a in range(0, n_wide, wide):
                env_tile(arrays, (i, nu, a, first, last))
        for nu in range(0, high, EDGE_SENSES):
            for a in range(n_wide, n_feat, lanes):
                env_edge(arrays, (i, nu, a, first, last))
    restore_denormals(state)


@_jit
def sensesum_rows(env, features, row_ptr, sender, sense, start, stop):  # type: ignore[no-untyped-def]
    """Write the sense of all pairs of the rows."""
    _, n_nu, n_feat = env.shape
    lanes, _, pairs = tile_sizes(env)
    n_full = n_feat // lanes * lanes
    # A few sensitivities beside many features cost less as sums over lanes than as a row of lanes.
    n_row, rest = n_nu, n_nu % lanes
    if 2 * rest <= lanes and n_feat >= 2 * lanes:
        n_row -= rest
    turned = np.empty((n_full + lanes, lanes), env.dtype)
    arrays = (sense, env, features, sender)
    state = flush_denormals()
    for i in range(start, stop):
        first, last = row_ptr[i], row_ptr[i + 1]
        for nu in range(0, n_row, lanes):
            for a in range(0, n_full, lanes):
                turn_tile((turned, env), (i, nu, a))
            if n_full < n_feat:
                turn_edge((turned, env), (i, nu, n_full))
            for p in range(first, last, ROW_PAIRS):
                sense_row((sense, turned, features, sender), (nu, p, last))
        for p in range(first, last, pairs):
            for nu in range(n_row, n_nu, TILE_SENSES):
                sense_tile(arrays, (i, nu, p, last))
    restore_denormals(state)


@_jit
def featsum_rows(env, sense, row_ptr, sender, features, start, stop):  # type: ignore[no-untyped-def]
    """Add what the rows send to features."""
    n_feat = env.shape[2]
    lanes, wide, _ = tile_sizes(env)
    arrays = (features, env, sense, sender)
    n_wide = n_feat // wide * wide
    state = flush_denormals()
    for i in range(start, stop):
        first, last = row_ptr[i], row_ptr[i + 1]
        for p in range(first, last, FEAT_PAIRS):
            high = _used(sense, p, min(p + FEAT_PAIRS, last))
            for a in range(0, n_wide, wide):
                feat_tile(arrays, (i, p, last, a, 0, high))
        for a in range(n_wide, n_feat, lanes):
            for p in range(first, last, EDGE_PAIRS):
                high = _used(sense, p, min(p + EDGE_PAIRS, last))
                feat_edge(arrays, (i, p, last, a, 0, high))
    restore_denormals(state)


@_parallel_jit
def envsum(sense, features, row_ptr, sender, env, n_block):  # type: ignore[no-untyped-def]
    """Write env."""
    n = env.shape[0]
    for b in prange(n_block):
        start, stop = n * b // n_block, n * (b + 1) // n_block
        envsum_rows(sense, features, row_ptr, sender, env, start, stop)


@_parallel_jit
def sensesum(env, features, row_ptr, sender, sense, n_block):  # type: ignore[no-untyped-def]
    """Write sense."""
    n = env.shape[0]
    for b in prange(n_block):
        start, stop = n * b // n_block, n * (b + 1) // n_block
        sensesum_rows(env, features, row_ptr, sender, sense, start, stop)


@_parallel_jit
def featsum_scatter(env, sense, row_ptr, sender, buffers):  # type: ignore[no-untyped-def]
    """Write buffers: what the rows of each block send; their sum is features."""
    n, n_block = env.shape[0], buffers.shape[0]
    for b in prange(n_block):
        buffers[b] = 0.0
        start, stop = n * b // n_block, n * (b + 1) // n_block
        featsum_rows(env, sense, row_ptr, sender, buffers[b], start, stop)


@_parallel_jit
def featsum_gather(env, sense, col_ptr, perm, receiver, sender, features):  # type: ignore[no-untyped-def]
    """Write features, a sender at a time, through the transpose of the pairs."""
    n_send, n_feat = features.shape
    n_nu = sense.shape[1]
    lanes, wide, _ = tile_sizes(env)
    n_wide = n_feat // wide * wide
    for j in prange(n_send):
        features[j] = 0.0
        arrays = (features, env, sense, sender)
        for k in range(col_ptr[j], col_ptr[j + 1]):
            p = perm[k]
            i = receiver[p]
            low, high = 0, n_nu
            while low < high and sense[p, low] == 0.0:
                low += 1
            while low < high and sense[p, high - 1] == 0.0:
                high -= 1
            for a in range(0, n_wide, wide):
                pair_tile(arrays, (i, p, p + 1, a, low, high))
            for a in range(n_wide, n_feat, lanes):
                pair_edge(arrays, (i, p, p + 1, a, low, high))

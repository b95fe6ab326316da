"""The two kernels of the layers that treat each atom by itself; `triton_atom_layers` launches them.

    h  = norms(m) + W_0 z + b_0             interaction layer, m from the sums over neighbours
    x  = U_0 softplus(h) + c_0 + A z        A: the identity where widths are the same
    x' = U_k softplus(W_k x + b_k) + c_k + x                                     atom layers
    E  = R x + e

Without residual layers x' = softplus(h). norms(m) is m_0, for vectors plus v sqrt(|m_1..3|^2 +
cusp), for quadrupoles plus w sqrt(Q:Q + cusp), as in `md_plugin.model.interaction`.

A program has a tile of atoms; features and sums of products stay in its registers, weights come
through the cache, padded with zeros to powers of two. One loop takes any number of atom layers.
The way back makes the forward pass again. What a program needs later, or spread over its threads in
another way, goes to memory that nobody else reads, a barrier before it is read, so that it stays
in the cache: the slopes of softplus of each layer, and operands wider than 64.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(h):
    """softplus(h) and its slope; from 20 on h and 1, as in torch.

    log(1 + t) of a rounded 1 + t = u, times t / (u - 1), is as good as log1p(t).
    """
    t = tl.exp(-tl.abs(h))
    u = 1.0 + t
    d = u - 1.0
    tiny = d == 0.0
    value = tl.maximum(h, 0.0) + tl.where(tiny, t, tl.log(u) * (t / tl.where(tiny, 1.0, d)))
    slope = tl.where(h >= 0.0, 1.0, t) / u
    return tl.where(h > 20.0, h, value), tl.where(h > 20.0, 1.0, slope)


@triton.jit
def _rows(source, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of an array (n, WIDTH), with zeros behind."""
    f = tl.arange(0, BLOCK)
    place = source + row[:, None] * WIDTH + f[None, :]
    if WIDTH == BLOCK:
        return tl.load(place)
    else:
        live = (row >= 0)[:, None] & (f < WIDTH)[None, :]
        return tl.load(place, mask=live, other=0.0)


@triton.jit
def _write(target, row, x, WIDTH: tl.constexpr):
    """Rows of an array (n, WIDTH); a row may come twice, with the same numbers."""
    f = tl.arange(0, x.shape[1])
    place = target + row[:, None] * WIDTH + f[None, :]
    if WIDTH == x.shape[1]:
        tl.store(place, x)
    else:
        tl.store(place, x, mask=(row >= 0)[:, None] & (f < WIDTH)[None, :])


@triton.jit
def _of_species(table, kind, BLOCK: tl.constexpr):
    """Rows of a table, whose first is that of -1, a species that the network does not know."""
    f = tl.arange(0, BLOCK)
    return tl.load(table + (kind + 1)[:, None] * BLOCK + f[None, :])


@triton.jit
def _times(x, matrix, total, scratch, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """total + x M^T, or total + x M on the way BACK; M padded to powers of two.

    What is too wide to be multiplied at once goes through `scratch`.
    """
    n_from: tl.constexpr = x.shape[1]
    n_to: tl.constexpr = total.shape[1]
    step: tl.constexpr = n_from if n_from <= 64 else 32
    of = tl.arange(0, step)
    to = tl.arange(0, n_to)
    if BACK:
        place = matrix + of[:, None] * n_to + to[None, :]
    else:
        place = matrix + to[None, :] * n_from + of[:, None]
    if step == n_from:
        return tl.dot(x, tl.load(place), total, input_precision=PRECISION, out_dtype=total.dtype)
    else:
        atom = tl.arange(0, x.shape[0])[:, None] * n_from
        tl.debug_barrier()  # nobody still reads what was there
        tl.store(scratch + atom + tl.arange(0, n_from)[None, :], x)
        tl.debug_barrier()
        for k in range(0, n_from, step):
            part = tl.load(scratch + atom + k + of[None, :])
            block = tl.load(place + k * (n_to if BACK else 1))
            total = tl.dot(part, block, total, input_precision=PRECISION, out_dtype=total.dtype)
        return total


@triton.jit
def _component(m, row, c, N_COMP: tl.constexpr, N_HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    return _rows(m + c * N_HIDDEN, row * N_COMP, N_HIDDEN, BLOCK)


@triton.jit
def _roots(m, row, scales, N_COMP: tl.constexpr, N_HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Norms of the vector and of the quadrupole."""
    cusp = tl.load(scales)
    square = tl.zeros((row.shape[0], BLOCK), m.dtype.element_ty)
    for c in tl.static_range(1, 4):
        part = _component(m, row, c, N_COMP, N_HIDDEN, BLOCK)
        square += part * part
    roots = (tl.sqrt(square + cusp),)
    if N_COMP > 4:
        xx = _component(m, row, 4, N_COMP, N_HIDDEN, BLOCK)
        yy = _component(m, row, 7, N_COMP, N_HIDDEN, BLOCK)
        square = xx * xx + yy * yy + xx * yy
        for k in tl.static_range(3):
            part = _component(m, row, 5 + k + k // 2, N_COMP, N_HIDDEN, BLOCK)
            square += part * part
        roots = roots + (tl.sqrt(2.0 * square + cusp),)
    return roots


@triton.jit
def _norms(m, row, scales, N_COMP: tl.constexpr, N_HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    total = _component(m, row, 0, N_COMP, N_HIDDEN, BLOCK)
    if N_COMP > 1:
        roots = _roots(m, row, scales, N_COMP, N_HIDDEN, BLOCK)
        for k in tl.static_range(len(roots)):
            scale = tl.load(scales + 1 + k * BLOCK + tl.arange(0, BLOCK))
            total += scale[None, :] * roots[k]
    return total


@triton.jit
def _pull_norms(g, m, gm, row, scales, N_COMP: tl.constexpr, N_HIDDEN: tl.constexpr):
    """Writes dE/dm from dE/dh.

    dE/dm_c = s m_c for a vector, with s = scale dE/dh / root; 2 s m_c for a quadrupole, and s m_yy
    more for xx, s m_xx for yy, whose trace with zz vanishes.
    """
    n_block: tl.constexpr = g.shape[1]
    _write(gm, row * N_COMP, g, N_HIDDEN)
    if N_COMP > 1:
        roots = _roots(m, row, scales, N_COMP, N_HIDDEN, n_block)
        scale = tl.load(scales + 1 + tl.arange(0, n_block))
        s = g * scale[None, :] / roots[0]
        for c in tl.static_range(1, 4):
            part = s * _component(m, row, c, N_COMP, N_HIDDEN, n_block)
            _write(gm + c * N_HIDDEN, row * N_COMP, part, N_HIDDEN)
        if N_COMP > 4:
            scale = tl.load(scales + 1 + n_block + tl.arange(0, n_block))
            s = g * scale[None, :] / roots[1]
            for c in tl.static_range(4, 9):
                part = 2.0 * _component(m, row, c, N_COMP, N_HIDDEN, n_block)
                if c == 4 or c == 7:
                    part += _component(m, row, 11 - c, N_COMP, N_HIDDEN, n_block)
                _write(gm + c * N_HIDDEN, row * N_COMP, s * part, N_HIDDEN)


@triton.jit
def _kept(slopes, layer, start, BLOCK_A: tl.constexpr, BLOCK: tl.constexpr):
    """Places of the slopes of a layer, of all atoms of this program."""
    n_atoms = tl.num_programs(0) * BLOCK_A
    row = layer * n_atoms + start + tl.arange(0, BLOCK_A)
    return slopes + row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _leave(h, x, outward, shift, layer, slopes, scratch, start, PRECISION: tl.constexpr):
    """x' of a layer from h, and x or A z; keeps slopes of softplus where they are wanted."""
    n_hidden: tl.constexpr = h.shape[1]
    n_out: tl.constexpr = x.shape[1]
    value, slope = _softplus(h)
    if slopes is not None:
        tl.store(_kept(slopes, layer, start, h.shape[0], n_hidden), slope)
    if outward is None:
        return value
    else:
        offset = tl.load(shift + layer * n_out + tl.arange(0, n_out))
        matrix = outward + layer * (n_out * n_hidden)
        return _times(value, matrix, x + offset[None, :], scratch, False, PRECISION)


@triton.jit
def _pull_leave(
    g, outward, layer, slopes, scratch, start, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """dE/dh of a layer from dE/dx'."""
    if outward is not None:
        none = tl.zeros((g.shape[0], BLOCK), g.dtype)
        matrix = outward + layer * (g.shape[1] * BLOCK)
        g = _times(g, matrix, none, scratch, True, PRECISION)
    return g * tl.load(_kept(slopes, layer, start, g.shape[0], BLOCK))


@triton.jit
def _run(
    m, z, species, first, adjust, inward, outward, bias, shift, scales, slopes, scratch,
    row, start, n_layers, PRECISION: tl.constexpr, N_COMP: tl.constexpr, N_IN: tl.constexpr,
    N_HIDDEN: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Features that the block gives."""
    f = tl.arange(0, BLOCK_HIDDEN)
    h = _norms(m, row, scales, N_COMP, N_HIDDEN, BLOCK_HIDDEN) + tl.load(bias + f)[None, :]
    x = tl.zeros((row.shape[0], BLOCK_OUT), h.dtype)
    if z is None:
        kind = tl.load(species + row)
        h += _of_species(first, kind, BLOCK_HIDDEN)
        if adjust is not None:
            x += _of_species(adjust, kind, BLOCK_OUT)
    else:
        sent = _rows(z, row, N_IN, BLOCK_IN)
        h = _times(sent, first, h, scratch, False, PRECISION)
        if adjust is not None:
            x = _times(sent, adjust, x, scratch, False, PRECISION)
        elif outward is not None:
            x = sent
    x = _leave(h, x, outward, shift, 0, slopes, scratch, start, PRECISION)
    for layer in range(1, n_layers + 1):
        offset = tl.load(bias + layer * BLOCK_HIDDEN + f)
        h = tl.zeros((row.shape[0], BLOCK_HIDDEN), x.dtype) + offset[None, :]
        matrix = inward + (layer - 1) * (BLOCK_HIDDEN * BLOCK_OUT)
        h = _times(x, matrix, h, scratch, False, PRECISION)
        x = _leave(h, x, outward, shift, layer, slopes, scratch, start, PRECISION)
    return x


@triton.jit
def _add_energy(energy, x, readout, row, real):
    f = tl.arange(0, x.shape[1])
    total = tl.sum(x * tl.load(readout + f)[None, :], axis=1) + tl.load(readout + x.shape[1])
    place = energy + row
    tl.store(place, tl.load(place, mask=real) + total.to(tl.float64), mask=real)


@triton.jit(do_not_specialize=["n_atoms", "n_layers"])
def forward_kernel(
    m, z, species, first, adjust, inward, outward, bias, shift, readout, scales, scratch,
    out, energy, n_atoms, n_layers,
    PRECISION: tl.constexpr, N_COMP: tl.constexpr, N_IN: tl.constexpr, N_HIDDEN: tl.constexpr,
    N_OUT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Writes features of a tile of atoms and adds their energies."""
    start = tl.program_id(0) * BLOCK_A
    atom = start + tl.arange(0, BLOCK_A)
    real, row = atom < n_atoms, tl.minimum(atom, n_atoms - 1)
    scratch += start * max(BLOCK_IN, BLOCK_HIDDEN, BLOCK_OUT)
    x = _run(
        m, z, species, first, adjust, inward, outward, bias, shift, scales, None, scratch, row,
        start, n_layers, PRECISION, N_COMP, N_IN, N_HIDDEN, BLOCK_IN, BLOCK_HIDDEN, BLOCK_OUT,
    )  # fmt: skip
    _add_energy(energy, x, readout, row, real)
    _write(out, row, x, N_OUT)


@triton.jit(do_not_specialize=["n_atoms", "n_layers"])
def backward_kernel(
    m, z, species, first, adjust, inward, outward, bias, shift, readout, scales, scratch, slopes,
    gradient, gm, gz, energy, n_atoms, n_layers,
    PRECISION: tl.constexpr, N_COMP: tl.constexpr, N_IN: tl.constexpr, N_HIDDEN: tl.constexpr,
    N_OUT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Writes dE/dm and, unless None, dE/dz of a tile of atoms; adds energies unless None."""
    start = tl.program_id(0) * BLOCK_A
    atom = start + tl.arange(0, BLOCK_A)
    real, row = atom < n_atoms, tl.minimum(atom, n_atoms - 1)
    scratch += start * max(BLOCK_IN, BLOCK_HIDDEN, BLOCK_OUT)
    x = _run(
        m, z, species, first, adjust, inward, outward, bias, shift, scales, slopes, scratch, row,
        start, n_layers, PRECISION, N_COMP, N_IN, N_HIDDEN, BLOCK_IN, BLOCK_HIDDEN, BLOCK_OUT,
    )  # fmt: skip
    if energy is not None:
        _add_energy(energy, x, readout, row, real)
    tl.debug_barrier()  # slopes are read by other threads than those that wrote them
    of_energy = tl.load(readout + tl.arange(0, BLOCK_OUT))
    g = tl.zeros((BLOCK_A, BLOCK_OUT), x.dtype) + of_energy[None, :]
    if gradient is not None:
        g += _rows(gradient, row, N_OUT, BLOCK_OUT)
    for layer in range(n_layers, 0, -1):
        of = _pull_leave(g, outward, layer, slopes, scratch, start, BLOCK_HIDDEN, PRECISION)
        if outward is None:
            g = tl.zeros_like(g)
        matrix = inward + (layer - 1) * (BLOCK_HIDDEN * BLOCK_OUT)
        g = _times(of, matrix, g, scratch, True, PRECISION)
    of = _pull_leave(g, outward, 0, slopes, scratch, start, BLOCK_HIDDEN, PRECISION)
    _pull_norms(of, m, gm, row, scales, N_COMP, N_HIDDEN)
    if gz is not None:
        along = tl.zeros((BLOCK_A, BLOCK_IN), x.dtype)
        if adjust is not None:
            along = _times(g, adjust, along, scratch, True, PRECISION)
        elif outward is not None:
            along = g
        _write(gz, row, _times(of, first, along, scratch, True, PRECISION), N_IN)

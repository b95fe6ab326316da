"""Sensitivities, their slope and their curvature: three loops over pairs in vector instructions.

Equations: `radial_reference`. Sums over pairs are those from which `radial_cpu` makes gradients of
parameters, factors that only depend on the sensitivity left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from md_plugin.kernels.radial_ir import (
    BETA,
    DRIFT,
    Table,
    offset,
    over_pairs,
    radial,
    store_row_total,
    store_totals,
    where_felt,
)
from md_plugin.kernels.vector_ir import I64, Emitter, Value, microkernel


@microkernel
def value_kernel(e: Emitter, arrays: list[Value]) -> None:
    """arrays: r, constants, table, scratch, sense, n_nu, width, first, last."""
    r, constants, table, scratch, sense, n, width, first, last = arrays
    rows, b = Table(table, width), e.builder

    def pair(p: Value, k: Value, numbers: list[Value]) -> None:
        q, q_low, c = numbers

        def vector(nu: Value, _: list[Value]) -> list[Value]:
            _, t, _ = offset(e, rows, nu, q, q_low)
            mask = e.head_mask(b.sub(n, nu))
            place = e.at(sense, b.add(b.mul(p, n), nu))

            def felt(gaussian: Value) -> list[Value]:
                e.store(e.mul(gaussian, c), place, mask)
                return []

            return where_felt(e, t, [], felt, lambda: e.store(e.const(0.0), place, mask))

        e.loop(I64(0), n, e.lanes, [], vector)

    def prepare(p: Value) -> Sequence[Value]:
        return radial(e, r, constants, p, last)[:3]

    over_pairs(e, (first, last), scratch, prepare, pair, lambda p, count: None)


@microkernel
def slope_kernel(e: Emitter, arrays: list[Value]) -> None:
    """arrays: r, constants, table, scratch, grad, grad_r, sums, trained, n_nu, width, first, last.

    Adds g s u and g s u^2 to sums, where `trained` is not 0.
    """
    r, constants, table, scratch, grad, grad_r, sums, trained, n, width, first, last = arrays
    rows, moments, b = Table(table, width), Table(sums, width), e.builder
    with_sums = b.icmp_signed("!=", trained, I64(0))

    def pair(p: Value, k: Value, numbers: list[Value]) -> None:
        q, q_low, c, c1, c_q2 = numbers

        def vector(nu: Value, before: list[Value]) -> list[Value]:
            u, t, sigma = offset(e, rows, nu, q, q_low)

            def felt(gaussian: Value) -> list[Value]:
                place = e.at(grad, b.add(b.mul(p, n), nu))
                weight = e.mul(gaussian, e.load(place, e.head_mask(b.sub(n, nu))))
                with e.when(with_sums):
                    moment = e.mul(e.mul(weight, c), u)
                    moments.add(e, nu, (moment, e.mul(moment, u)))
                return [e.fma(weight, e.fma(c_q2, e.mul(sigma, t), c1), before[0])]

            return where_felt(e, t, before, felt, lambda: None)

        (total,) = e.loop(I64(0), n, e.lanes, [e.const(0.0)], vector)
        store_row_total(e, scratch, k, total)

    def prepare(p: Value) -> Sequence[Value]:
        x = radial(e, r, constants, p, last)
        return x.q, x.q_low, x.c, x.c1, e.mul(x.c, e.mul(x.q, x.q))

    def finish(p: Value, count: Value) -> None:
        store_totals(e, scratch, grad_r, p, count)

    over_pairs(e, (first, last), scratch, prepare, pair, finish)


@microkernel
def curvature_kernel(e: Emitter, arrays: list[Value]) -> None:
    """arrays: r, rho, constants, table, scratch, grad, h, grad_r, sums, n_nu, width, first, last.

    Adds G g e, G g c t and G g (u e + c t du) to sums, where du = alpha / mu^2 - rho / r^2.
    """
    r, rho, constants, table, scratch, grad, h, grad_r, sums, n, width, first, last = arrays
    rows, moments, b = Table(table, width), Table(sums, width), e.builder

    def pair(p: Value, k: Value, numbers: list[Value]) -> None:
        q, q_low, c, c1, q2, rho_q2, rho_c1, rho_c2, c_rho_q3 = numbers

        def vector(nu: Value, before: list[Value]) -> list[Value]:
            u, t, sigma = offset(e, rows, nu, q, q_low)
            mask, place = e.head_mask(b.sub(n, nu)), b.add(b.mul(p, n), nu)

            def felt(gaussian: Value) -> list[Value]:
                beta = rows.load(e, BETA, nu)
                du = e.sub(rows.load(e, DRIFT, nu), rho_q2)
                dt = e.fma(sigma, du, e.mul(beta, u))
                c_dt, c_t = e.mul(c, dt), e.mul(c, t)
                e.store(e.mul(gaussian, e.sub(rho_c1, e.mul(t, c_dt))), e.at(h, place), mask)
                weight = e.mul(gaussian, e.load(e.at(grad, place), mask))
                slope = e.fma(t, e.sub(rho_c1, e.mul(t, c_dt)), c_dt)
                moments.add(
                    *(e, nu),
                    [e.mul(weight, x) for x in (slope, c_t, e.fma(u, slope, e.mul(c_t, du)))],
                )
                of_r = e.fma(q2, e.fma(sigma, slope, e.mul(beta, c_t)), rho_c2)
                of_t = e.fma(c1, dt, e.mul(c_rho_q3, sigma))
                return [e.fma(weight, e.sub(of_r, e.mul(t, of_t)), before[0])]

            zero = e.const(0.0)
            return where_felt(e, t, before, felt, lambda: e.store(zero, e.at(h, place), mask))

        (total,) = e.loop(I64(0), n, e.lanes, [e.const(0.0)], vector)
        store_row_total(e, scratch, k, total)

    def prepare(p: Value) -> Sequence[Value]:
        x = radial(e, r, constants, p, last)
        along = e.load(e.at(rho, p), e.head_mask(b.sub(last, p)))
        q2 = e.mul(x.q, x.q)
        rho_q2 = e.mul(along, q2)
        c_rho_q3 = e.mul(e.mul(e.add(x.c, x.c), x.q), rho_q2)
        return (*x[:4], q2, rho_q2, e.mul(along, x.c1), e.mul(along, x.c2), c_rho_q3)

    def finish(p: Value, count: Value) -> None:
        store_totals(e, scratch, grad_r, p, count)

    over_pairs(e, (first, last), scratch, prepare, pair, finish)

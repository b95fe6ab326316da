"""2^x and sin(pi x / 2) of vectors, as polynomials that `vector_ir.Emitter` writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from md_plugin.kernels.vector_ir import Emitter, Value


def chebyshev(
    f: Callable[[np.ndarray], np.ndarray], low: float, high: float, degree: int
) -> list[float]:
    """Coefficients, constant first, of the polynomial that interpolates f at Chebyshev nodes."""
    fit = np.polynomial.Chebyshev.interpolate(f, degree, domain=[low, high])
    plain = fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    return [float(c) for c in plain.coef]


def _sin_over(x2: np.ndarray) -> np.ndarray:
    """sin(pi x / 2) / x as a function of x^2."""
    x = np.sqrt(np.maximum(x2, 1e-300))
    over: np.ndarray = np.sin(0.5 * math.pi * x) / x
    return over


_EXP2_TAYLOR = [math.log(2) ** k / math.factorial(k) for k in range(14)]
_SIN_TAYLOR = [
    (-1) ** k * (math.pi / 2) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(12)
]
# By size in bytes: bits of the mantissa, least exponent of exp2, coefficients of 2^x on
# [-1/2, 1/2] and of sin(pi x / 2) / x in x^2 on [0, 1].
_FORMATS = {
    4: (23, 60.0, chebyshev(np.exp2, -0.5, 0.5, 5), chebyshev(_sin_over, 0.0, 1.0, 5)),
    8: (52, 150.0, _EXP2_TAYLOR, _SIN_TAYLOR),
}


def polynomial(e: Emitter, x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's scheme, constant term first."""
    value = e.const(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = e.fma(value, x, e.const(coefficient))
    return value


def exp2(e: Emitter, x: Value, least: float | None = None) -> Value:
    """2^x for x <= 0; from -60 (float64: -150), or -least, on it stays, so nothing denormal."""
    bits, usual, coefficients, _ = _FORMATS[e.size]
    b = e.builder
    x = e.at_least(x, -(least or usual))
    # Adding 1.5 2^bits rounds to an integer, which the low bits of the sum then hold.
    magic = e.const(1.5 * 2.0**bits)
    shifted = e.add(x, magic)
    fraction = e.sub(x, e.sub(shifted, magic))
    value = polynomial(e, fraction, coefficients)
    exponent = b.shl(b.bitcast(shifted, e.integers), e.const_int(bits))
    return b.bitcast(b.add(b.bitcast(value, e.integers), exponent), e.vector)


def sin_half_pi(e: Emitter, x: Value) -> Value:
    """sin(pi x / 2) for 0 <= x <= 1; relative accuracy up to x = 0."""
    return e.mul(x, polynomial(e, e.mul(x, x), _FORMATS[e.size][3]))

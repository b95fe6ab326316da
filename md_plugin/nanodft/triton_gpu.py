"""The backend of two-electron integrals on CUDA: Triton kernels, in double precision.

`triton_eri` computes the integrals, `triton_gradient` the gradient, both of `triton_parts`.
"""

from __future__ import annotations

from md_plugin.nanodft.triton_eri import eri
from md_plugin.nanodft.triton_gradient import two_electron_gradient

__all__ = ["eri", "two_electron_gradient"]

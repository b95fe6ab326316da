"""The struct that C++ and Python share under pair_style mliap/py, seen from Python.

`View` mirrors `MLIAPView` in plugin/mliap_view.h, which explains each field.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np

_PAIRS = ctypes.CFUNCTYPE(c_int32, c_void_p)
_FORCES = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p)
_EXCHANGE = ctypes.CFUNCTYPE(
    c_int32, c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int32, c_int32
)


class View(ctypes.Structure):
    """Mirror of `MLIAPView` in plugin/mliap_view.h, which explains each field."""

    _fields_ = [
        ("struct_size", c_int32),
        ("lammps_version", c_int32),
        ("rank", c_int32),
        ("nranks", c_int32),
        ("ranks_on_node", c_int32),
        ("node_rank", c_int32),
        ("owns_process", c_int32),
        ("mpi_gpu_aware", c_int32),
        ("mpi_library", c_char_p),
        ("units", c_char_p),
        ("pair", c_void_p),
        ("rcut", c_double),
        ("comm_width", c_int32),
        ("centroid", c_int32),
        ("n_models", c_int32),
        ("finds_pairs", c_int32),
        ("ghostneigh", c_int32),
        ("info", ctypes.c_char * 512),
        ("ntypes", c_int32),
        ("type_map", c_void_p),
        ("nlocal", c_int32),
        ("ntotal", c_int32),
        ("nlist", c_int32),
        ("eflag", c_int32),
        ("vflag", c_int32),
        ("list_count", c_int64),
        ("step", c_int64),
        ("n_pair", c_int64),
        ("whole_list", c_int32),
        ("skin", c_double),
        ("want_std", c_int32),
        ("want_centroid", c_int32),
        ("x", c_void_p),
        ("tag_bytes", c_int32),
        ("tag", c_void_p),
        ("elems", c_void_p),
        ("ilist", c_void_p),
        ("row_ptr", c_void_p),
        ("sender", c_void_p),
        ("f", c_void_p),
        ("eatoms", c_void_p),
        ("energy", c_double),
        ("virial", c_double * 6),
        ("vatom", c_void_p),
        ("cvatom", c_void_p),
        ("force_std", c_void_p),
        ("energy_std", c_void_p),
        ("exchange_missing", c_int64),
        ("header", ctypes.c_char * 160),
        ("row", ctypes.c_char * 160),
        ("n_inside", c_int64),
        ("inside_row", c_void_p),
        ("inside_i", c_void_p),
        ("inside_j", c_void_p),
        ("numneighs", c_void_p),
        ("inside_rij", c_void_p),
        ("list_pairs", _PAIRS),
        ("inside_pairs", _PAIRS),
        ("pair_forces", _FORCES),
        ("exchange", _EXCHANGE),
        ("error_text", c_char_p),
    ]


def view_at(address: int) -> View:
    """The struct at an address, after checking that both sides agree about its layout."""
    view = View.from_address(address)
    if view.struct_size != ctypes.sizeof(View):
        raise RuntimeError(
            f"the compiled plugin and lammps_interface are of different versions (struct of "
            f"{view.struct_size} and {ctypes.sizeof(View)} bytes); remove the plugin's folder from "
            "LAMMPS_PLUGIN_PATH and start LAMMPS again"
        )
    return view


def array_at(address: int | None, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """View of memory as an array; an empty array where there is nothing to view."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not address or not size:
        return np.empty(shape, dtype)
    buffer: Any = (ctypes.c_char * size).from_address(address)
    return np.ndarray(shape, dtype, buffer)

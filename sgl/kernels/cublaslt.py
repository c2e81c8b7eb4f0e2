"""Matrix products through cuBLASLt, which lists the kernels that could run and lets one choose.

The library is the one that torch has loaded, called through ctypes: nothing is compiled.

Axes: T rows    O outputs    I inputs
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper, and torch takes
MOST_PRODUCTS = 16  # asked for; the library lists up to 8
ALIGNMENT = 16  # bytes, of every matrix

# Numbers of cublas_api.h, cublasLt.h and library_types.h
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_32F, _OP_T, _SUCCESS = 68, 1, 0
_DESC_TRANSA = 3
_PREF_MAX_WORKSPACE, _PREF_REDUCTIONS, _PREF_MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_REDUCE_IN_FLOAT32 = 2  # parts of a sum are added up as they were computed


class _Found(Structure):
    """cublasLtMatmulHeuristicResult_t, which begins with the algorithm."""

    _fields_ = (  # type: ignore[mutable-override]
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class ProductShape:
    """out_TO = x_TI @ weight_OI.T, or += if `is_added`, of row-major matrices."""

    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    is_added: bool


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """One kernel for the products of a shape. `layouts` are of weight, x and out."""

    library: CublasLt
    found: _Found
    layouts: tuple[c_void_p, c_void_p, c_void_p]
    is_added: bool

    def run(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> None:
        """Launch it on the current stream. All three are contiguous and aligned."""
        weight, x, out = (c_void_p(tensor.data_ptr()) for tensor in (weight_OI, x_TI, out_TO))
        one, beta = c_float(1), c_float(1 if self.is_added else 0)
        of_weight, of_x, of_out = self.layouts
        lib = self.library
        lib.call(
            "cublasLtMatmul",
            *(lib.handle, lib.desc, byref(one), weight, of_weight, x, of_x),
            *(byref(beta), out, of_out, out, of_out, byref(self.found)),
            *(c_void_p(lib.workspace.data_ptr()), c_size_t(WORKSPACE_BYTES)),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )


class CublasLt:
    """A handle and a workspace on the current device, for one stream at a time.

    To the library, whose matrices are column-major, ours are transposed: what it computes is
    out_OT = weight_IO.T @ x_IT.
    """

    def __init__(self) -> None:
        """Raises OSError where the library is not that of torch's CUDA version."""
        self._lib = ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}")
        self._lib.cublasLtGetVersion.restype = c_size_t
        self._lib.cublasLtMatmulAlgoGetHeuristic.argtypes = (
            *(c_void_p,) * 7,
            *(c_int, POINTER(_Found), POINTER(c_int)),
        )
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self.handle, self.desc, self._preference = c_void_p(), c_void_p(), c_void_p()
        self.call("cublasLtCreate", byref(self.handle))
        float32 = _TYPES[torch.float32]
        self.call("cublasLtMatmulDescCreate", byref(self.desc), _COMPUTE_32F, float32)
        self._set("cublasLtMatmulDesc", self.desc, _DESC_TRANSA, c_int(_OP_T))
        self.call("cublasLtMatmulPreferenceCreate", byref(self._preference))
        self._prefer(_PREF_MAX_WORKSPACE, c_uint64(WORKSPACE_BYTES))
        self._prefer(_PREF_REDUCTIONS, ctypes.c_uint32(_REDUCE_IN_FLOAT32))
        for attribute in _PREF_MIN_ALIGNMENTS:
            self._prefer(attribute, ctypes.c_uint32(ALIGNMENT))

    @property
    def version(self) -> int:
        return int(self._lib.cublasLtGetVersion())

    def products(self, shape: ProductShape) -> Sequence[Product]:
        """What could run, the best guess first; nothing if the library cannot."""
        layouts = (
            self._layout(shape.inputs, shape.outputs, shape.dtype),
            self._layout(shape.inputs, shape.rows, shape.dtype),
            self._layout(shape.outputs, shape.rows, shape.out_dtype),
        )
        of_weight, of_x, of_out = layouts
        found, num_found = (_Found * MOST_PRODUCTS)(), c_int()
        status = self._lib.cublasLtMatmulAlgoGetHeuristic(
            *(self.handle, self.desc, of_weight, of_x, of_out, of_out, self._preference),
            *(MOST_PRODUCTS, found, byref(num_found)),
        )
        if status != _SUCCESS:
            return []
        return [
            Product(self, one, layouts, shape.is_added)
            for one in found[: num_found.value]
            if one.status == _SUCCESS
        ]

    def call(self, function: str, *arguments: object) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status != _SUCCESS:
            raise RuntimeError(f"{function} failed with cuBLAS status {status}")

    def _layout(self, rows: int, columns: int, dtype: torch.dtype) -> c_void_p:
        layout = c_void_p()
        sizes = c_uint64(rows), c_uint64(columns), c_int64(rows)
        self.call("cublasLtMatrixLayoutCreate", byref(layout), _TYPES[dtype], *sizes)
        return layout

    def _prefer(self, attribute: int, value: ctypes._SimpleCData[int]) -> None:
        self._set("cublasLtMatmulPreference", self._preference, attribute, value)

    def _set(
        self, kind: str, owner: c_void_p, attribute: int, value: ctypes._SimpleCData[int]
    ) -> None:
        size = c_size_t(ctypes.sizeof(value))
        self.call(f"{kind}SetAttribute", owner, attribute, byref(value), size)

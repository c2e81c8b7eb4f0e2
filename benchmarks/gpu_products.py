"""Which kernel of cuBLASLt is the fastest for each matrix product of a model, by measurement.

    python -m benchmarks.gpu_products llama8b --rows 64 448 8192 --out results.txt

cuBLAS chooses by a rule; cuBLASLt lists what it could run, best guess first. A product of R rows is
timed as torch runs it and with each of those, every time with weights that are not in the cache,
as in a step. `padded` is the best of the next larger number of rows in the list.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F

SHAPES = {  # outputs, inputs
    "llama8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "llama1b": {
        "qkv": (3072, 2048),
        "o": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
    },
}
ROWS = [64, 128, 192, 256, 288, 320, 352, 384, 416, 448, 480, 512, 576, 640, 704, 768, 832]
ROWS += [896, 960, 1024, 8192]
CACHE_BYTES, WORKSPACE_BYTES, LAUNCHES = 128 << 20, 32 << 20, 24
COMPUTE_32F, CUDA_R_32F, CUDA_R_16BF = 68, 0, 14  # of cublas_api.h and library_types.h
DESC_TRANSA, MAX_WORKSPACE, OP_T = 3, 1, 1  # of cublasLt.h


class Algorithm(Structure):
    _fields_ = [
        ("data", c_uint64 * 8),
        ("workspace_size", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class Products:
    """Products x_RI w_OI^T of one shape through cuBLASLt, in bfloat16."""

    def __init__(self, lib: ctypes.CDLL, rows: int, outputs: int, inputs: int) -> None:
        self.lib = lib
        self.handle, self.desc = c_void_p(), c_void_p()
        self.check(lib.cublasLtCreate(byref(self.handle)))
        self.check(lib.cublasLtMatmulDescCreate(byref(self.desc), COMPUTE_32F, CUDA_R_32F))
        transposed = c_int(OP_T)  # column-major: the weights are [inputs, outputs], as stored
        set_desc = lib.cublasLtMatmulDescSetAttribute
        self.check(set_desc(self.desc, DESC_TRANSA, byref(transposed), c_size_t(4)))
        self.weight = self.layout(inputs, outputs)
        self.x = self.layout(inputs, rows)
        self.out = self.layout(outputs, rows)
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLASLt answered {status}")

    def layout(self, rows: int, columns: int) -> c_void_p:
        layout = c_void_p()
        sizes = c_uint64(rows), c_uint64(columns), c_int64(rows)
        self.check(self.lib.cublasLtMatrixLayoutCreate(byref(layout), CUDA_R_16BF, *sizes))
        return layout

    def algorithms(self, limit: int) -> list[Algorithm]:
        preference, found = c_void_p(), (Algorithm * limit)()
        num_found, workspace = c_int(), c_size_t(WORKSPACE_BYTES)
        self.check(self.lib.cublasLtMatmulPreferenceCreate(byref(preference)))
        set_preference = self.lib.cublasLtMatmulPreferenceSetAttribute
        self.check(set_preference(preference, MAX_WORKSPACE, byref(workspace), c_size_t(8)))
        layouts = self.weight, self.x, self.out, self.out
        heuristic = self.lib.cublasLtMatmulAlgoGetHeuristic
        self.check(
            heuristic(self.handle, self.desc, *layouts, preference, limit, found, byref(num_found))
        )
        return [one for one in found[: num_found.value] if one.state == 0]

    def run(
        self, algorithm: Algorithm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        one, zero = c_float(1), c_float(0)
        pointer = [c_void_p(tensor.data_ptr()) for tensor in (weight, x, out, self.workspace)]
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        self.check(
            self.lib.cublasLtMatmul(
                *(self.handle, self.desc, byref(one), pointer[0], self.weight, pointer[1], self.x),
                *(byref(zero), pointer[2], self.out, pointer[2], self.out, byref(algorithm)),
                *(pointer[3], c_size_t(WORKSPACE_BYTES), stream),
            )
        )


def load_library() -> ctypes.CDLL:
    torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")  # which loads cuBLAS
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    path = next(path for path in paths if "libcublasLt" in path)
    lib = ctypes.CDLL(path)
    lib.cublasLtMatmulAlgoGetHeuristic.argtypes = [c_void_p] * 7 + [
        c_int,
        POINTER(Algorithm),
        POINTER(c_int),
    ]
    return lib


def microseconds(launch: Callable[[int], None]) -> float:
    """The median time of one launch of many in a graph; `launch` gets a number that counts up."""
    for index in range(3):
        launch(index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAUNCHES):
            launch(index)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return sorted(times)[2]


def measure(
    lib: ctypes.CDLL, rows: int, outputs: int, inputs: int, limit: int
) -> dict[str, object]:
    copies = max(1, CACHE_BYTES // (outputs * inputs * 2) + 1)
    x_RI = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
    weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") * 0.02]
    weights += [weights[0].clone() for _ in range(copies - 1)]
    out_RO = torch.empty(rows, outputs, dtype=torch.bfloat16, device="cuda")

    def by_torch(index: int) -> None:
        torch.mm(x_RI, weights[index % copies].t(), out=out_RO)

    torch.backends.cuda.preferred_blas_library("cublas")
    cublas = microseconds(by_torch)
    torch.backends.cuda.preferred_blas_library("cublaslt")
    cublaslt = microseconds(by_torch)
    torch.backends.cuda.preferred_blas_library("cublas")
    expected_RO = F.linear(x_RI, weights[0])
    products = Products(lib, rows, outputs, inputs)
    times: list[tuple[float, int]] = []
    for number, algorithm in enumerate(products.algorithms(limit)):

        def by_algorithm(index: int, algorithm: Algorithm = algorithm) -> None:
            products.run(algorithm, x_RI, weights[index % copies], out_RO)

        out_RO.zero_()
        times.append((round(microseconds(by_algorithm), 2), number))
        error = (out_RO - expected_RO).abs().max().item()
        assert error <= 0.05 * expected_RO.abs().max().item(), f"algorithm {number}: {error}"
    best, number = min(times)
    found = {"cublas": round(cublas, 2), "cublaslt": round(cublaslt, 2), "best": best}
    return found | {"which": number, "first": times[0][0], "tried": len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--limit", type=int, default=24, help="algorithms tried for each product")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lib = load_library()
    lines: list[dict[str, object]] = [
        {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    ]
    for name, (outputs, inputs) in SHAPES[options.model].items():
        padded = float("inf")
        for rows in sorted(options.rows, reverse=True):
            line = {"product": f"{options.model} {name}", "rows": rows}
            line |= measure(lib, rows, outputs, inputs, options.limit)
            best = float(str(line["best"]))
            line |= {"padded": round(padded, 2), "tflops": 2e-6 * rows * outputs * inputs / best}
            padded = best
            lines.append(line)
            print(json.dumps(line), file=sys.stdout, flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()

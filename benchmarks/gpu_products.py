"""Which kernel is the fastest for each matrix product of a model, by measurement.

    python -m benchmarks.gpu_products llama8b --rows 1 64 448 8192 --out results.jsonl

Each product is timed as it usually runs and by every kernel that cuBLASLt lists, or, of one row,
with every tile of ours, in microseconds, as the engine does at its start
(sgl/kernels/tuned_linear.py). `llama8b-of-2` are the products of one of two ranks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sgl.kernels.cublaslt import CublasLt, ProductShape
from sgl.kernels.tuned_linear import Kernels, time_in_graphs

SHAPES = {  # outputs, inputs
    "llama8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "llama8b-of-2": {
        "qkv": (3072, 4096),
        "o": (4096, 2048),
        "gate_up": (14336, 4096),
        "down": (4096, 7168),
    },
    "llama1b": {
        "qkv": (3072, 2048),
        "o": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
    },
}
ROWS = [1, 64, 128, 192, 256, 288, 320, 352, 384, 416, 448, 480, 512, 576, 640, 704, 768, 832]
ROWS += [896, 960, 1024, 8192]


def measure(kernels: Kernels, shape: ProductShape) -> dict[str, object]:
    weight_OI = torch.randn(shape.outputs, shape.inputs, dtype=shape.dtype, device="cuda") * 0.02
    candidates = [kernels.usual(shape), *kernels.products(shape)]
    usual, *times = time_in_graphs(shape, weight_OI, candidates)
    best = min(times)
    return {
        "usual_us": round(usual * 1e3, 2),
        "us": [round(each * 1e3, 2) for each in times],
        "best_over_usual": round(best / usual, 3),
        "tflops": round(2e-9 * shape.rows * shape.outputs * shape.inputs / min(best, usual)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--added", action="store_true", help="products added to what is there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    library = CublasLt()
    kernels = Kernels(library)
    lines: list[dict[str, object]] = [
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cublaslt": library.version,
        }
    ]
    with torch.cuda.stream(torch.cuda.Stream()):  # the default one does not record
        for name, (outputs, inputs) in SHAPES[options.model].items():
            for rows in options.rows:
                types = torch.bfloat16, torch.bfloat16
                shape = ProductShape(rows, outputs, inputs, *types, options.added)
                line = {"product": f"{options.model} {name}", "rows": rows}
                lines.append(line | measure(kernels, shape))
                print(json.dumps(lines[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()

"""Matrix products by the kernel that was the fastest when they were measured.

cuBLAS chooses by a rule, which has holes: of a model with 8 billion weights, 448 rows of the
largest product took 287 us on an H200 where another kernel takes 161 and 512 rows take 180. The
numbers of rows that steps are recorded with are few, so each kernel that could run is timed once
and the choices are kept in a file: a server that is started again multiplies as it did before.
One row is multiplied by a kernel of our own, of which the tile is chosen so.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl.kernels.cublaslt import ALIGNMENT, CublasLt, ProductShape

logger = logging.getLogger(__name__)

MIN_GAIN = 0.02  # of the time of cuBLAS's own choice; less may be noise
UNCACHED_BYTES = 128 << 20  # weights that are read in turn, so that no cache holds the next
MAX_LAUNCHES, ROUNDS = 8, 3
MAX_ROWS = 1024  # of 1152 to 2048 not one was run faster by another kernel than cuBLAS's own choice

_Event: Any = torch.cuda.Event  # which has no types


class Product(Protocol):
    """One way to multiply."""

    def run(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> None: ...


class Library(Protocol):
    def usual(self, shape: ProductShape) -> Product:
        """What runs if nothing is chosen."""
        ...

    def products(self, shape: ProductShape) -> Sequence[Product]:
        """What could run, always in the same order."""
        ...


Stopwatch = Callable[[ProductShape, Tensor, Sequence[Product]], "list[float]"]


class Choices:
    """The kernel of every shape of a product that was asked for; None: the usual one."""

    def __init__(self, library: Library, path: Path, stopwatch: Stopwatch) -> None:
        """`path` is the file of the choices that were made before, if it is there."""
        self._library = library
        self._path = path
        self._stopwatch = stopwatch
        self._known = _read(path)
        self._measured: dict[str, int] = {}
        self._products: dict[ProductShape, Product | None] = {}

    def __getitem__(self, shape: ProductShape) -> Product | None:
        return self._products.get(shape)

    def add(self, shape: ProductShape, weight_OI: Tensor) -> None:
        """Choose for a shape, of which `weight_OI` is an example."""
        if shape in self._products:
            return
        products = self._library.products(shape)
        number = self._known.get(_name(shape), -1)  # counted from 1, 0 is the usual one
        if not 0 <= number <= len(products):
            number = self._fastest(shape, weight_OI, products)
            self._measured[_name(shape)] = number
        self._products[shape] = products[number - 1] if number else None

    def save(self) -> None:
        """Write what was measured into the file, beside what others wrote there meanwhile."""
        if not self._measured:
            return
        self._known = _read(self._path) | self._measured
        self._measured = {}
        part = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._known, indent=0, sort_keys=True), "utf-8")
            part.replace(self._path)
        except OSError as error:
            logger.info("Which matrix kernels are the fastest was not kept: %s", error)

    def summary(self) -> tuple[int, int, int]:
        """Shapes, those of them that were measured, and those with another kernel than usual."""
        others = sum(product is not None for product in self._products.values())
        return len(self._products), len(self._measured), others

    def _fastest(self, shape: ProductShape, weight_OI: Tensor, products: Sequence[Product]) -> int:
        candidates = [self._library.usual(shape), *products]
        usual, *times = self._stopwatch(shape, weight_OI, candidates)
        best = min(times, default=usual)
        return times.index(best) + 1 if best < usual * (1 - MIN_GAIN) else 0


class Kernels:
    """cuBLASLt's kernels; for one row, the tiles of our own."""

    def __init__(self, cublaslt: CublasLt) -> None:
        self._cublaslt = cublaslt

    def usual(self, shape: ProductShape) -> Product:
        if not _is_gemv(shape):
            return OwnChoice(shape)
        from sgl.kernels.triton_gemv import Gemv, usual_tile

        return Gemv(usual_tile(shape.inputs))

    def products(self, shape: ProductShape) -> Sequence[Product]:
        if not _is_gemv(shape):
            return self._cublaslt.products(shape)
        from sgl.kernels.triton_gemv import TILES, Gemv

        return [Gemv(tile) for tile in TILES]


def _is_gemv(shape: ProductShape) -> bool:
    return shape.rows == 1 and not shape.is_added


class OwnChoice:
    """A product by the kernel that cuBLAS chooses."""

    def __init__(self, shape: ProductShape) -> None:
        self._is_added = shape.is_added

    def run(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> None:
        if self._is_added:
            out_TO.addmm_(x_TI, weight_OI.t())
        elif out_TO.dtype == x_TI.dtype:
            torch.mm(x_TI, weight_OI.t(), out=out_TO)
        else:
            torch.mm(x_TI, weight_OI.t(), out_dtype=out_TO.dtype)


_choices: Choices | None = None
_is_measuring = False


@contextmanager
def measuring() -> Iterator[None]:
    """Meanwhile each new shape of a product in `find_product` is measured, on a stream of its own.

    The choices are those of this process from then on.
    """
    global _choices, _is_measuring
    started = time.monotonic()
    try:
        _choices = _choices or _load()
    except OSError as error:
        logger.warning("Matrix products are left to cuBLAS's own choice: %s", error)
        yield
        return
    _is_measuring = True
    try:
        yield
    finally:
        _is_measuring = False
    total, measured, others = _choices.summary()
    if measured:
        logger.info(
            "Measured the kernels of %d matrix products, %d of %d are not the usual choice; "
            "with all else that was done meanwhile %.1f s",
            *(measured, others, total, time.monotonic() - started),
        )
    _choices.save()


def find_product(
    x_TI: Tensor, weight_OI: Tensor, out_dtype: torch.dtype, *, is_added: bool = False
) -> Product | None:
    """The kernel for a product without a bias, if there is a faster one than the usual."""
    if _choices is None or len(x_TI) > MAX_ROWS:
        return None
    if not _is_aligned(x_TI) or not _is_aligned(weight_OI):
        return None
    (rows, inputs), outputs = x_TI.shape, len(weight_OI)
    shape = ProductShape(rows, outputs, inputs, x_TI.dtype, out_dtype, is_added)
    if _is_measuring and not torch.cuda.is_current_stream_capturing():
        _choices.add(shape, weight_OI)
    return _choices[shape]


def time_in_graphs(
    shape: ProductShape, weight_OI: Tensor, products: Sequence[Product]
) -> list[float]:
    """Milliseconds of one launch of each, as in a step: recorded, with weights from memory.

    On a stream other than the default one, which does not record.
    """
    copies = UNCACHED_BYTES // weight_OI.nbytes
    weights = [weight_OI, *(weight_OI.clone() for _ in range(copies))]
    x_TI = torch.randn(shape.rows, shape.inputs, dtype=shape.dtype, device=weight_OI.device)
    out_TO = torch.zeros(shape.rows, shape.outputs, dtype=shape.out_dtype, device=weight_OI.device)
    return [_time(product, x_TI, weights, out_TO) for product in products]


def _time(product: Product, x_TI: Tensor, weights: list[Tensor], out_TO: Tensor) -> float:
    product.run(x_TI, weights[0], out_TO)  # loads the kernel, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    launches = max(2, min(MAX_LAUNCHES, UNCACHED_BYTES // weights[0].nbytes))
    for index in range(launches):
        product.run(x_TI, weights[index % len(weights)], out_TO)
    graph.capture_end()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = _Event(enable_timing=True), _Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / launches)
    return min(times)


def _load() -> Choices:
    library = CublasLt()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgl"
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name())
    path = folder / f"linear-{device}-cublaslt-{library.version}.json"
    return Choices(Kernels(library), path, time_in_graphs)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous()


def _name(shape: ProductShape) -> str:
    types = f"{shape.dtype} {shape.out_dtype}".replace("torch.", "")
    sizes = f"{shape.rows}x{shape.outputs}x{shape.inputs}"
    return f"{sizes} {types}{' added' if shape.is_added else ''}"


def _read(path: Path) -> dict[str, int]:
    """Choices by name; a file that is not what was written is as good as none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: number for name, number in content.items() if type(number) is int}

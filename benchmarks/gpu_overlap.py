"""Would attention of half a batch beside the matrix products of the other half pay? (It did not.)

    python -m benchmarks.gpu_overlap

The layers of a decode step of 896 requests with 640 tokens each (8B shape), milliseconds a step:
one after the other; in two halves on two streams; and with the multiprocessors divided between the
two streams (green contexts), cuBLAS told how many it has.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sgl.kernels.silu_and_mul import silu_and_mul
from sgl.kernels.triton_decode_attention import decode_attention

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
BATCH, LENGTH, NUM_LAYERS = 896, 640, 32
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
KEPT_LAYERS, KEPT_CACHES = 8, 2  # so many different ones are too large for the L2 cache
SECONDS = 1.5  # of each way: the device's power limit counts
CORES = (16, 24, 32, 48)  # of the stream with attention


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02


class Step:
    """Attention and products of some requests of one layer, on the current stream."""

    def __init__(self) -> None:
        slots = (BATCH * LENGTH, KV_HEADS, HEAD_DIM)
        self.caches = [(random(*slots), random(*slots)) for _ in range(KEPT_CACHES)]
        qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        sizes = ((qkv, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN))
        self.weights = [[random(*size) for size in sizes] for _ in range(KEPT_LAYERS)]
        self.x_BD, self.q_BHE = random(BATCH, HIDDEN), random(BATCH, HEADS, HEAD_DIM)
        self.o_BHE = torch.empty_like(self.q_BHE)
        numbers = torch.arange(BATCH * LENGTH, device=DEVICE, dtype=torch.int32)
        self.pages_BL, self.rows_B = numbers.view(BATCH, LENGTH), numbers[:BATCH]
        self.positions_B = torch.full_like(self.rows_B, LENGTH - 1)

    def attend(self, layer: int, part: slice) -> None:
        keys, values = self.caches[layer % KEPT_CACHES]
        decode_attention(
            self.q_BHE[part],
            keys,
            values,
            self.pages_BL,
            self.rows_B[part],
            self.positions_B[part],
            self.o_BHE[part],
            page_size=1,
            scale=HEAD_DIM**-0.5,
        )

    def multiply(self, layer: int, part: slice) -> None:
        qkv, o, gate_up, down = self.weights[layer % KEPT_LAYERS]
        F.linear(self.o_BHE[part].flatten(1), o)
        F.linear(silu_and_mul(F.linear(self.x_BD[part], gate_up)), down)
        F.linear(self.x_BD[part], qkv)

    def one_after_the_other(self) -> None:
        for layer in range(NUM_LAYERS):
            self.attend(layer, slice(BATCH))
            self.multiply(layer, slice(BATCH))

    def in_halves(self, first: torch.cuda.Stream, second: torch.cuda.Stream) -> None:
        """Attention on the first stream, products of the other half on the second; then change."""
        halves = slice(BATCH // 2), slice(BATCH // 2, BATCH)
        current = torch.cuda.current_stream()
        first.wait_stream(current)
        second.wait_stream(current)
        for layer in range(NUM_LAYERS):
            for mine, other in (halves, halves[::-1]):
                with torch.cuda.stream(first):
                    self.attend(layer, mine)
                with torch.cuda.stream(second):
                    self.multiply(layer, other)
                events = [stream.record_event() for stream in (first, second)]
                first.wait_event(events[1])
                second.wait_event(events[0])
        current.wait_stream(first)
        current.wait_stream(second)


def milliseconds(run: Callable[[], None]) -> float:
    run()
    torch.cuda.synchronize()
    started, num = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        num += 5
    return (time.perf_counter() - started) / num * 1e3


def divided(num_cores: int) -> list[tuple[torch.cuda.Stream, int]]:
    """Two streams, one with at least so many multiprocessors and one with the rest; how many."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: object) -> None:
        code = getattr(cuda, name)(*arguments)
        assert code == 0, f"{name} failed with {code}"

    device, one = ctypes.c_int(), ctypes.c_uint(1)
    call("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
    whole, part, rest = (ctypes.create_string_buffer(512) for _ in range(3))  # CUdevResource
    call("cuDeviceGetDevResource", device, whole, 1)
    call("cuDevSmResourceSplitByCount", part, ctypes.byref(one), whole, rest, 0, num_cores)
    found = []
    for resource in (part, rest):
        description, context, stream = (ctypes.c_void_p() for _ in range(3))
        call("cuDevResourceGenerateDesc", ctypes.byref(description), resource, 1)
        call("cuGreenCtxCreate", ctypes.byref(context), description, device, 1)
        call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, 1, 0)
        size = int.from_bytes(resource.raw[96:100], "little")
        found.append((torch.cuda.ExternalStream(stream.value), size))
    return found


def tell_cublas(stream: torch.cuda.Stream, num_cores: int) -> None:
    """How many multiprocessors it may count on; 0: all."""
    library = ctypes.CDLL("libcublas.so.13")
    with torch.cuda.stream(stream):
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        assert library.cublasSetSmCountTarget(handle, num_cores) == 0


@torch.inference_mode()
def main() -> None:
    step = Step()

    def say(how: str, run: Callable[[], None], **more: object) -> None:
        line = {"how": how, "ms": round(milliseconds(run), 2), **more}
        print(json.dumps(line), flush=True)

    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    say("one after the other", step.one_after_the_other)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    say("two streams", lambda: step.in_halves(*streams))
    for num_cores in CORES:
        (first, num_first), (second, num_second) = divided(num_cores)
        tell_cublas(second, num_second)
        say(
            "divided", lambda a=first, b=second: step.in_halves(a, b), cores=[num_first, num_second]
        )
        tell_cublas(second, 0)
    say("one after the other", step.one_after_the_other)


if __name__ == "__main__":
    main()

"""What a model needs of a GPU's memory besides weights and KV cache: found out by running it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from sgl.execution.attention.choice import is_recordable, make_backend
from sgl.execution.kv_cache import KvCache
from sgl.execution.request_table import RequestTable
from sgl.execution.runner import Runner
from sgl.execution.step_graphs import recorded_shapes
from sgl.kernels.collectives import TensorParallel
from sgl.models.pooling import Model, PooledModel

logger = logging.getLogger(__name__)

BYTES_PER_GRAPH = 5 << 20  # the nodes and parameters of one recorded step
BYTES_PER_COUNT = 5  # of each id and row, where penalties are used: made when they first are
LIBRARY_BYTES = 512 << 20  # workspaces that libraries take later, and room for other sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """The largest steps there will be.

    max_tokens   tokens of a step with prompts      max_rows   requests of a step
    max_len      tokens of a request
    max_recorded_decodes, max_recorded_tokens   of recorded steps without prompts and with, 0 if
                                                none are recorded
    """

    max_tokens: int
    max_rows: int
    max_recorded_decodes: int
    max_recorded_tokens: int
    max_len: int


@torch.inference_mode()
def bytes_besides_kv(
    model: Model,
    backend: str,
    vocab_size: int,
    sizes: StepSizes,
    *,
    page_size: int,
    formats: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    tp: TensorParallel,
) -> int:
    """Bytes that must stay free next to the weights, so that no step runs out of memory.

    Runs the largest steps, with a cache of a single page. Every rank must call it.

    formats  of activations and of the KV cache
    """
    started = time.monotonic()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    cache = KvCache(
        model.attention_layers,
        0,
        page_size,
        dtype=formats[1],
        model_dtype=formats[0],
        device=device,
    )
    max_pages = -(-sizes.max_len // page_size)
    table = RequestTable(sizes.max_rows, max_pages, vocab_size, device)
    runner = Runner(model, table, make_backend(backend, model.attention_layers, cache), tp)
    kept = torch.cuda.memory_allocated(device)
    step = _peak(runner, sizes.max_tokens, sizes.max_rows, device) - kept
    graphs = _graph_bytes(runner, sizes, device, kept)
    logger.info(
        "Profiled the largest step in %.1f s: it takes %.2f GiB, recorded steps about %.2f, "
        "the request table %.2f",
        time.monotonic() - started,
        step / 2**30,
        graphs / 2**30,
        (kept - before) / 2**30,
    )
    has_penalties = not isinstance(model, PooledModel)
    penalties = has_penalties * (sizes.max_rows + 1) * vocab_size * BYTES_PER_COUNT
    return step + graphs + (kept - before) + penalties + LIBRARY_BYTES


def _graph_bytes(runner: Runner, sizes: StepSizes, device: torch.device, kept: int) -> int:
    """Recorded steps share the memory of the largest; each has nodes of its own."""
    if not is_recordable(runner.attention):
        return 0
    max_decodes, max_tokens = sizes.max_recorded_decodes, sizes.max_recorded_tokens
    shapes = recorded_shapes(runner.attention, max_decodes, max_tokens)
    largest = {max((s.num_tokens, s.num_outputs) for s in shapes if s.has_prompts is has_prompts)
               for has_prompts in {shape.has_prompts for shape in shapes}}  # fmt: skip
    peaks = [_peak(runner, *num, device) - kept for num in sorted(largest)]
    num_graphs = sum(runner.attention.num_variants(shape) for shape in shapes)
    return num_graphs * BYTES_PER_GRAPH + max(peaks, default=0)


def _peak(runner: Runner, num_tokens: int, num_sampled: int, device: torch.device) -> int:
    runner.warm_up(num_tokens, num_sampled)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    runner.warm_up(num_tokens, num_sampled)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device)

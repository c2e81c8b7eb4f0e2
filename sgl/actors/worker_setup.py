"""From settings to a runner: device, ranks, weights, KV cache, recorded steps. Each says how long.

join the ranks ▸ load the weights ▸ run the largest step ▸ KV cache in what is left ▸ record
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from sgl.actors.actor import Context
from sgl.errors import ConfigError
from sgl.execution.attention import AttentionBackend
from sgl.execution.attention.choice import is_recordable, make_backend
from sgl.execution.kv_cache import KvCache, kv_dtype
from sgl.execution.memory_profile import StepSizes, bytes_besides_kv
from sgl.execution.model_weights import ModelWeights, Source
from sgl.execution.request_table import RequestTable
from sgl.execution.runner import Runner
from sgl.execution.step_graphs import StepGraphs, recorded_shapes
from sgl.hardware import free_memory_gib
from sgl.kernels.collectives import TensorParallel
from sgl.kernels.tuned_linear import measuring
from sgl.models.checkpoint import LoadFormat
from sgl.models.loader import load_model, resolve_dtype
from sgl.models.pooling import Model, PooledModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Formats:
    """Number formats of activations and of the KV cache."""

    model: torch.dtype
    kv: torch.dtype


def set_up(context: Context) -> tuple[Runner, ModelWeights, int]:
    """This rank's runner, what changes its weights, and how many pages of KV all ranks have."""
    device = _open_device(context)
    dtype = resolve_dtype(context.config.dtype, context.model_config, device)
    formats = _Formats(dtype, kv_dtype(context.config.kv_cache_dtype, dtype))
    tp = _join_ranks(context, device, dtype)
    model = _load(context, device, tp)
    num_pages = _num_pages(context, model, formats, device, tp)
    runner = _make_runner(context, model, num_pages, formats, device, tp)
    weights = ModelWeights(
        model,
        context.model_config,
        tp,
        Source(context.bootstrap.paths["model"], _load_format(context)),
        overrides=context.config.model_overrides,
        like=torch.empty(0, dtype=dtype, device=device),
        beat=partial(context.status.beat, context.name),
    )
    return runner, weights, num_pages


def _open_device(context: Context) -> torch.device:
    torch.set_num_threads(context.limits.num_cpu_threads)
    if context.bootstrap.device == "cpu":
        return torch.device("cpu")
    # blocks of any size share the same memory, so that steps of many sizes do not scatter it
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", context.config.base_gpu_id + context.bootstrap.rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new shape
    return device


def _join_ranks(context: Context, device: torch.device, dtype: torch.dtype) -> TensorParallel:
    config, limits = context.config, context.limits
    tp = TensorParallel.join(
        context.bootstrap.rank,
        config.tp_size,
        device=device,
        rendezvous=f"file:///proc/self/fd/{context.bootstrap.rendezvous_fd}",
    )
    if config.disable_custom_all_reduce:
        return tp
    return tp.with_peer_memory(
        device,
        max_rows=limits.max_step_tokens + limits.max_running_requests,
        row_bytes=context.model_config.hidden_size * dtype.itemsize,
        check=config.enable_p2p_check,
    )


def _load(context: Context, device: torch.device, tp: TensorParallel) -> Model:
    started = time.monotonic()
    model, config = load_model(
        context.bootstrap.paths["model"],
        load_format=_load_format(context),
        dtype=context.config.dtype,
        device=device,
        tp=tp,
        overrides=context.config.model_overrides,
        is_embedding=context.config.is_embedding,
    )
    logger.info(
        "Loaded %s as %s in %.1f s",
        config.architecture,
        str(next(model.named_parameters())[1].dtype).removeprefix("torch."),
        time.monotonic() - started,
    )
    return model


def _load_format(context: Context) -> LoadFormat:
    return cast(LoadFormat, context.config.load_format)  # checked by its flag


def _num_pages(
    context: Context, model: Model, formats: _Formats, device: torch.device, tp: TensorParallel
) -> int:
    """As many pages as were asked for, or fit into the memory that may be used."""
    limits, page_size = context.limits, context.config.page_size
    bytes_per_token = KvCache.bytes_per_token(model.attention_layers, formats.kv)
    num_bytes = _bytes_for_kv(context, model, formats, device, tp)
    num_tokens = num_bytes // bytes_per_token
    if limits.max_total_tokens is not None:
        num_tokens = min(num_tokens, limits.max_total_tokens)
    num_pages = tp.smallest(num_tokens // page_size, device)
    if num_pages < 1:
        raise ConfigError(
            f"no memory is left for the KV cache: a token takes {bytes_per_token} bytes; raise "
            "--mem-fraction-static, or use a smaller model, a smaller --chunked-prefill-size or a "
            "larger --tp-size"
        )
    kept_as = str(formats.kv).removeprefix("torch.")
    logger.info("KV cache of %d tokens as %s", num_pages * page_size, kept_as)
    return num_pages


def _bytes_for_kv(
    context: Context, model: Model, formats: _Formats, device: torch.device, tp: TensorParallel
) -> int:
    fraction = context.limits.mem_fraction_static
    if device.type != "cuda":
        return int(free_memory_gib() * 2**30 * fraction) // tp.size
    try:
        others = _bytes_for_steps(context, model, formats, device, tp)
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the GPU's memory does not hold the largest step next to the weights: use a smaller "
            "--chunked-prefill-size or --max-running-requests, or a larger --tp-size"
        ) from None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, min(free - others, int(free - total * (1.0 - fraction))))


def _bytes_for_steps(
    context: Context, model: Model, formats: _Formats, device: torch.device, tp: TensorParallel
) -> int:
    limits = context.limits
    max_decodes, max_tokens = _recorded_limits(context)
    return bytes_besides_kv(
        model,
        context.config.attention_backend,
        context.model_config.vocab_size,
        StepSizes(
            max_tokens=limits.max_step_tokens + limits.max_running_requests,
            max_rows=limits.max_running_requests,
            max_recorded_decodes=max_decodes,
            max_recorded_tokens=max_tokens,
            max_len=context.context_len,
        ),
        page_size=context.config.page_size,
        formats=(formats.model, formats.kv),
        device=device,
        tp=tp,
    )


def _make_runner(
    context: Context,
    model: Model,
    num_pages: int,
    formats: _Formats,
    device: torch.device,
    tp: TensorParallel,
) -> Runner:
    page_size = context.config.page_size
    cache = KvCache(
        model.attention_layers,
        num_pages,
        page_size,
        dtype=formats.kv,
        model_dtype=formats.model,
        device=device,
    )
    max_len = min(context.context_len, num_pages * page_size)
    table = RequestTable(
        context.limits.max_running_requests,
        -(-max_len // page_size),
        context.model_config.vocab_size,
        device,
    )
    attention = make_backend(context.config.attention_backend, model.attention_layers, cache)
    runner = Runner(model, table, attention, tp, _record(context, model, table, attention, tp))
    if device.type == "cuda":
        started = time.monotonic()
        runner.warm_up()
        torch.cuda.synchronize()
        logger.info("First forward pass in %.1f s", time.monotonic() - started)
    return runner


def _record(
    context: Context,
    model: Model,
    table: RequestTable,
    attention: AttentionBackend,
    tp: TensorParallel,
) -> StepGraphs | None:
    if isinstance(model, PooledModel):
        return None
    if not is_recordable(attention) or table.device.type != "cuda":
        return None
    shapes = recorded_shapes(attention, *_recorded_limits(context))
    if not shapes:
        return None
    graphs = StepGraphs(model, table, attention, tp, shapes)
    tuning = nullcontext() if context.config.disable_linear_tuning else measuring()
    with tuning:
        graphs.record()
    return graphs


def _recorded_limits(context: Context) -> tuple[int, int]:
    """Decodes and tokens (of a step with prompts) of the largest steps to be recorded.

    None of a model that gives vectors: a graph leaves logits, and most of its time goes into steps
    of thousands of tokens, which are not recorded anyway.
    """
    config, limits = context.config, context.limits
    if config.disable_cuda_graph or context.model_config.is_pooled:
        return 0, 0
    most_tokens = limits.max_step_tokens + limits.max_running_requests
    return (
        min(config.cuda_graph_max_bs, limits.max_running_requests),
        min(config.cuda_graph_max_tokens, most_tokens),
    )

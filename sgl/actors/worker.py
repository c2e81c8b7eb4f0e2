"""The worker actor: owns one device and runs the scheduler's plans on it, in order.

scheduler ── StepPlan ──▶ runner.run (launches) ──▶ outputs ── StepResult ──▶ scheduler
                          the next plan is launched while this one computes
          ── StartProfile, StopProfile ──▶ profiler ──▶ outputs ── Reply ──▶ scheduler
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import torch

from sgl.actors.actor import Context
from sgl.actors.channel import Poller, Receiver, Sender
from sgl.errors import ConfigError
from sgl.execution.attention.choice import is_recordable, make_backend
from sgl.execution.decode_graphs import DecodeGraphs, graph_sizes
from sgl.execution.kv_cache import KvCache
from sgl.execution.profiler import StepProfiler
from sgl.execution.request_table import RequestTable
from sgl.execution.runner import Runner, StepOutput
from sgl.hardware import free_memory_gib
from sgl.kernels.collectives import TensorParallel
from sgl.messages import (
    Reply,
    SchedulerToWorker,
    StartProfile,
    StepPlan,
    StepResult,
    StopProfile,
    WorkerReady,
    WorkerToScheduler,
)
from sgl.models.batch import CausalLM
from sgl.models.loader import load_model

logger = logging.getLogger(__name__)

SPIN_S = 50e-6  # between two steps the next plan is usually there already, or about to come

Output: TypeAlias = StepOutput | StepResult | Reply


class Worker:
    """Runs plans as they come. `results` is None on all ranks but the first."""

    def __init__(
        self,
        runner: Runner,
        plans: Receiver[SchedulerToWorker],
        results: Sender[WorkerToScheduler] | None,
    ) -> None:
        self.runner = runner
        self.plans = plans
        self.results = results
        self.profiler = StepProfiler(runner.tp.rank, has_gpu=runner.table.device.type == "cuda")
        self.outputs: queue.SimpleQueue[Output] | None = None
        self.sender = threading.Thread(target=self._send_when_ready, name="results", daemon=True)
        if results and runner.table.device.type == "cuda":
            self.outputs = queue.SimpleQueue()
            self.sender.start()

    def turn(self) -> bool:
        """Once around the loop; False means no plan was there."""
        assert self.outputs is None or self.sender.is_alive(), "a step failed: see the log above"
        messages = self.plans.receive()
        for message in messages:
            match message:
                case StepPlan():
                    with self.profiler.step(message.step):
                        self._deliver(self._run(message))
                case StartProfile() | StopProfile():
                    self._deliver(self.profiler.obey(message))
                case _:
                    assert_never(message)
        return bool(messages)

    def _run(self, plan: StepPlan) -> Output:
        try:
            return self.runner.run(plan)
        except torch.OutOfMemoryError as error:
            if self.runner.tp.size > 1:
                raise  # the other ranks wait for us in the middle of the step
            torch.cuda.empty_cache()
            return StepResult(plan.step, b"", error=f"out of memory: {error}")

    def _deliver(self, output: Output) -> None:
        """Send a result; on a GPU a thread waits for it, so that the next step can be launched."""
        if self.outputs is not None:
            self.outputs.put(output)
        elif self.results is not None:
            self._send(output)

    def _send_when_ready(self) -> None:
        assert self.outputs is not None
        torch.cuda.set_device(self.runner.table.device)  # each thread has its own
        while True:
            self._send(self.outputs.get())

    def _send(self, output: Output) -> None:
        assert self.results is not None
        result = output.wait() if isinstance(output, StepOutput) else output
        assert self.results.send(result), "the scheduler does not read its results"


@dataclass(frozen=True, slots=True)
class _Pool:
    """How large the KV cache is, the same on every rank."""

    num_pages: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size


def run(context: Context) -> None:
    """The process: load the model, say so, then run plans for ever."""
    device = _open_device(context)
    tp = TensorParallel.join(
        context.bootstrap.rank,
        context.config.tp_size,
        device=device,
        rendezvous=f"file:///proc/self/fd/{context.bootstrap.rendezvous_fd}",
    )
    started = time.monotonic()
    model, config = load_model(
        context.bootstrap.paths["model"],
        load_format=context.config.load_format,  # type: ignore[arg-type]  # checked by its flag
        dtype=context.config.dtype,
        device=device,
        tp=tp,
        overrides=context.config.model_overrides,
    )
    dtype = next(model.named_parameters())[1].dtype
    pool = _size_pool(context, model, dtype, device, tp)
    logger.info(
        "Loaded %s as %s in %.1f s; KV cache of %d tokens",
        config.architecture,
        str(dtype).removeprefix("torch."),
        time.monotonic() - started,
        pool.num_tokens,
    )
    runner = _make_runner(context, model, pool, dtype, device, tp)
    plans = context.receiver(f"scheduler->{context.name}", SchedulerToWorker)
    results = context.sender("worker0->scheduler") if tp.rank == 0 else None
    tp.barrier()
    if results:
        results.send(WorkerReady(pool.num_pages))
    context.ready()
    worker = Worker(runner, plans, results)
    context.run_turns(worker.turn, Poller([plans]), spin_s=lambda: SPIN_S)


def _open_device(context: Context) -> torch.device:
    torch.set_num_threads(context.limits.num_cpu_threads)
    if context.bootstrap.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", context.config.base_gpu_id + context.bootstrap.rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new shape
    return device


def _make_runner(
    context: Context,
    model: CausalLM,
    pool: _Pool,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
) -> Runner:
    cache = KvCache(
        model.attention_layers, pool.num_pages, pool.page_size, dtype=dtype, device=device
    )
    max_len = min(context.context_len, pool.num_tokens)
    table = RequestTable(
        context.limits.max_running_requests,
        -(-max_len // pool.page_size),
        context.model_config.vocab_size,
        device,
    )
    name = context.config.attention_backend
    attention = make_backend(name, model.attention_layers, cache)
    graphs = None
    if is_recordable(attention) and not context.config.disable_cuda_graph:
        max_size = min(context.config.cuda_graph_max_bs, context.limits.max_running_requests)
        graphs = DecodeGraphs(model, table, attention, graph_sizes(max_size))
        graphs.record()
    runner = Runner(model, table, attention, tp, graphs)
    if device.type == "cuda":
        started = time.monotonic()
        runner.warm_up()
        torch.cuda.synchronize()
        logger.info("First forward pass, kernels compiled, in %.1f s", time.monotonic() - started)
    return runner


def _size_pool(
    context: Context,
    model: CausalLM,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
) -> _Pool:
    """As many pages as were asked for, or fit into the memory that may be used."""
    limits, page_size = context.limits, context.config.page_size
    bytes_per_token = KvCache.bytes_per_token(model.attention_layers, dtype)
    num_tokens = _usable_bytes(limits.mem_fraction_static, device, tp) // bytes_per_token
    if limits.max_total_tokens is not None:
        num_tokens = min(num_tokens, limits.max_total_tokens)
    num_pages = tp.smallest(int(num_tokens) // page_size, device)
    if num_pages < 1:
        raise ConfigError(
            f"no memory is left for the KV cache: a token takes {bytes_per_token} bytes; raise "
            "--mem-fraction-static, or use a smaller model or a larger --tp-size"
        )
    return _Pool(num_pages, page_size)


def _usable_bytes(fraction: float, device: torch.device, tp: TensorParallel) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - total * (1.0 - fraction))
    return int(free_memory_gib() * 2**30 * fraction) // tp.size

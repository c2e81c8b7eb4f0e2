"""The worker actor: owns one device and runs the scheduler's plans on it, in order.

scheduler ── StepPlan ──▶ runner.run (launches) ──▶ outputs ── StepResult ──▶ scheduler
                          the next plan is launched while this one computes
          ── TokenMasks ──▶ waited for between a plan's forward pass and its sampling
          ── StartProfile, StopProfile ──▶ profiler ──▶ outputs ── Reply ──▶ scheduler
          ── UpdateWeights, GetWeight ──▶ weights ──▶ outputs ── Reply ──▶ scheduler
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import TypeAlias, assert_never

import numpy as np
import torch

from sgl.actors.actor import Context
from sgl.actors.channel import Poller, Receiver, Sender
from sgl.actors.worker_setup import set_up
from sgl.execution.model_weights import ModelWeights
from sgl.execution.profiler import StepProfiler
from sgl.execution.runner import NO_MASKS, Runner, StepMasks, StepOutput
from sgl.messages import (
    GetWeight,
    Reply,
    SchedulerToWorker,
    StartProfile,
    StepPlan,
    StepResult,
    StopProfile,
    TokenMasks,
    UpdateWeights,
    WorkerReady,
    WorkerToScheduler,
)

SPIN_S = 50e-6  # between two steps the next plan is usually there already, or about to come

Output: TypeAlias = StepOutput | StepResult | Reply


class Worker:
    """Runs plans as they come. `results` is None on all ranks but the first.

    wait  blocks until there may be a message
    """

    def __init__(
        self,
        runner: Runner,
        weights: ModelWeights,
        plans: Receiver[SchedulerToWorker],
        results: Sender[WorkerToScheduler] | None,
        wait: Callable[[], object],
    ) -> None:
        self.runner = runner
        self.weights = weights
        self.plans = plans
        self.results = results
        self.wait = wait
        self.received: deque[SchedulerToWorker] = deque()
        self.profiler = StepProfiler(runner.tp.rank, has_gpu=runner.table.device.type == "cuda")
        self.outputs: queue.SimpleQueue[Output] | None = None
        self.sender = threading.Thread(target=self._send_when_ready, name="results", daemon=True)
        if results and runner.table.device.type == "cuda":
            self.outputs = queue.SimpleQueue()
            self.sender.start()

    def turn(self) -> bool:
        """Once around the loop; False means no plan was there."""
        assert self.outputs is None or self.sender.is_alive(), "a step failed: see the log above"
        self.received.extend(self.plans.receive())
        has_work = bool(self.received)
        while self.received:
            message = self.received.popleft()
            match message:
                case StepPlan():
                    with self.profiler.step(message.step):
                        self._deliver(self._run(message))
                case StartProfile() | StopProfile():
                    self._deliver(self.profiler.obey(message))
                case UpdateWeights() | GetWeight():
                    self._deliver(self.weights.obey(message))
                case TokenMasks():
                    pass  # of a step that failed before it needed them
                case _:
                    assert_never(message)
        return has_work

    def _masks(self, plan: StepPlan) -> StepMasks:
        """Other ranks than 0 get the tokens from there, and no masks."""
        if not plan.masked:
            return NO_MASKS
        indices_M = np.frombuffer(plan.masked, np.int32)

        @cache
        def fetch() -> tuple[np.ndarray, np.ndarray]:
            message = self._wait_for_masks(plan.step)
            which_M = np.frombuffer(message.which, np.int32)
            words = np.frombuffer(message.words, np.int32)
            return words.reshape(which_M.max() + 1, -1).copy(), which_M

        return StepMasks(indices_M, fetch)

    def _wait_for_masks(self, step: int) -> TokenMasks:
        """What comes before them is left for later."""
        num_seen = 0
        while True:
            for index in range(num_seen, len(self.received)):
                message = self.received[index]
                if isinstance(message, TokenMasks) and message.step == step:
                    del self.received[index]
                    return message
            num_seen = len(self.received)
            while not (messages := self.plans.receive()):
                self.wait()
            self.received.extend(messages)

    def _run(self, plan: StepPlan) -> Output:
        try:
            return self.runner.run(plan, self._masks(plan))
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


def run(context: Context) -> None:
    """The process: load the model, say so, then run plans for ever."""
    runner, weights, num_pages = set_up(context)
    plans = context.receiver(f"scheduler->{context.name}", SchedulerToWorker)
    results = context.sender("worker0->scheduler") if runner.tp.rank == 0 else None
    runner.tp.barrier()
    if results:
        results.send(WorkerReady(num_pages))
    context.ready()
    poller = Poller([plans])
    worker = Worker(runner, weights, plans, results, lambda: poller.wait(None, SPIN_S))
    context.run_turns(worker.turn, poller, spin_s=lambda: SPIN_S)

"""The worker actor: owns one device and runs the scheduler's plans on it, in order.

scheduler ── StepPlan ──▶ runner.run (launches) ──▶ outputs ── StepResult ──▶ scheduler
                          the next plan is launched while this one computes
          ── StartProfile, StopProfile ──▶ profiler ──▶ outputs ── Reply ──▶ scheduler
"""

from __future__ import annotations

import queue
import threading
from typing import TypeAlias, assert_never

import torch

from sgl.actors.actor import Context
from sgl.actors.channel import Poller, Receiver, Sender
from sgl.actors.worker_setup import set_up
from sgl.execution.profiler import StepProfiler
from sgl.execution.runner import Runner, StepOutput
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


def run(context: Context) -> None:
    """The process: load the model, say so, then run plans for ever."""
    runner, num_pages = set_up(context)
    plans = context.receiver(f"scheduler->{context.name}", SchedulerToWorker)
    results = context.sender("worker0->scheduler") if runner.tp.rank == 0 else None
    runner.tp.barrier()
    if results:
        results.send(WorkerReady(num_pages))
    context.ready()
    worker = Worker(runner, plans, results)
    context.run_turns(worker.turn, Poller([plans]), spin_s=lambda: SPIN_S)

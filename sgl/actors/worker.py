"""The worker actor: owns one device and runs the scheduler's plans on it, in order.

scheduler ── StepPlan ──▶ runner.run (launches) ──▶ outputs ── StepResult ──▶ scheduler
                          the next plan is launched while this one computes
"""

from __future__ import annotations

import queue
import threading

import torch

from sgl.actors.actor import Context
from sgl.actors.channel import Poller, Receiver, Sender
from sgl.actors.worker_setup import set_up
from sgl.execution.runner import Runner, StepOutput
from sgl.messages import SchedulerToWorker, StepResult, WorkerReady, WorkerToScheduler

SPIN_S = 50e-6  # between two steps the next plan is usually there already, or about to come


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
        self.outputs: queue.SimpleQueue[StepOutput | StepResult] | None = None
        self.sender = threading.Thread(target=self._send_when_ready, name="results", daemon=True)
        if results and runner.table.device.type == "cuda":
            self.outputs = queue.SimpleQueue()
            self.sender.start()

    def turn(self) -> bool:
        """Once around the loop; False means no plan was there."""
        assert self.outputs is None or self.sender.is_alive(), "a step failed: see the log above"
        plans = self.plans.receive()
        for plan in plans:
            self._deliver(self._run(plan))
        return bool(plans)

    def _run(self, plan: SchedulerToWorker) -> StepOutput | StepResult:
        try:
            return self.runner.run(plan)
        except torch.OutOfMemoryError as error:
            if self.runner.tp.size > 1:
                raise  # the other ranks wait for us in the middle of the step
            torch.cuda.empty_cache()
            return StepResult(plan.step, b"", error=f"out of memory: {error}")

    def _deliver(self, output: StepOutput | StepResult) -> None:
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

    def _send(self, output: StepOutput | StepResult) -> None:
        assert self.results is not None
        result = output if isinstance(output, StepResult) else output.wait()
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

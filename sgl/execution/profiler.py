"""A profile of a worker's steps, recorded by torch and written as a Chrome trace.

    StartProfile ──▶ step 17, step 18 … step 41 ──▶ StopProfile, or the number of steps asked for
                                                └─▶ FOLDER/rank0-STAMP.trace.json.gz

Every step is an annotation "step N" in the trace. Without a profile a step costs nothing more.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from sgl.errors import InvalidRequestError
from sgl.messages import Reply, StartProfile, StopProfile

logger = logging.getLogger(__name__)

FOLDER_VARIABLES = ("SGL_TORCH_PROFILER_DIR", "SGLANG_TORCH_PROFILER_DIR")
COMPRESSION = 3  # of gzip: 6 takes three times as long, while no step can run


@dataclass(slots=True)
class _Recording:
    """A profile that is running."""

    profile: profile
    path: Path
    max_steps: int | None
    num_steps: int = 0


class StepProfiler:
    """Starts and stops the profile of one rank, between two steps."""

    def __init__(self, rank: int, *, has_gpu: bool) -> None:
        self._rank = rank
        self._has_gpu = has_gpu
        self._recording: _Recording | None = None
        self._ended: str | None = None  # what became of one that ended by itself

    def obey(self, message: StartProfile | StopProfile) -> Reply:
        """Start or stop. Whatever goes wrong with that is told, and harms nothing else."""
        ok = False
        try:
            text = self._start(message) if isinstance(message, StartProfile) else self._stop()
            ok = True
        except InvalidRequestError as error:
            text = str(error)
        except (OSError, RuntimeError) as error:  # the disk's, or torch's
            text = f"the profile failed: {error}"
        logger.log(logging.INFO if ok else logging.WARNING, "%s", text)
        return Reply(message.call_id, ok, text)

    def step(self, number: int) -> AbstractContextManager[None]:
        """Around a step: marks it in the trace, and ends a profile that has enough of them."""
        return nullcontext() if self._recording is None else self._marked(self._recording, number)

    @contextmanager
    def _marked(self, recording: _Recording, number: int) -> Iterator[None]:
        with record_function(f"step {number}"):
            yield
        recording.num_steps += 1
        if recording.num_steps == recording.max_steps:
            self._end_by_itself()

    def _end_by_itself(self) -> None:
        try:
            self._ended = self._stop()
            logger.info("%s", self._ended)
        except (OSError, RuntimeError) as error:
            self._ended = f"The profile failed: {error}"
            logger.warning("%s", self._ended)

    def _start(self, wanted: StartProfile) -> str:
        if self._recording is not None:
            raise InvalidRequestError(
                f"a profile is running already, for {self._recording.path}: stop it first"
            )
        activities = self._activities(wanted)
        folder = _writable(Path(wanted.folder or default_folder()).expanduser().absolute())
        path = folder / f"rank{self._rank}-{wanted.stamp}.trace.json.gz"
        started = profile(activities=activities)
        started.start()
        self._recording = _Recording(started, path, wanted.num_steps)
        self._ended = None
        until = f"after {wanted.num_steps} steps" if wanted.num_steps else "when it is stopped"
        return f"Profiling; the trace will be {path}, {until}."

    def _stop(self) -> str:
        recording, self._recording = self._recording, None
        if recording is None:
            ended, self._ended = self._ended, None
            if ended is None:
                raise InvalidRequestError("no profile is running: start one first")
            return ended
        recording.profile.stop()  # waits for the device
        _write(recording.profile, recording.path)
        return f"Profile of {recording.num_steps} steps written to {recording.path}"

    def _activities(self, wanted: StartProfile) -> list[ProfilerActivity]:
        names = wanted.activities or ("CPU", "GPU")
        if not self._has_gpu and "CPU" not in names:
            raise InvalidRequestError("the model runs on the CPU: leave activities out, or add CPU")
        has_cpu, has_gpu = "CPU" in names, "GPU" in names and self._has_gpu
        return [ProfilerActivity.CPU] * has_cpu + [ProfilerActivity.CUDA] * has_gpu


def default_folder() -> str:
    """Where traces go if nobody says: SGL_TORCH_PROFILER_DIR, or the machine's temporary folder."""
    named = (os.environ.get(variable) for variable in FOLDER_VARIABLES)
    return next(filter(None, named), tempfile.gettempdir())


def _writable(folder: Path) -> Path:
    """The folder, made if it is missing; raises InvalidRequestError where nothing can be written.

    It is found out now: after the profile it would be too late.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InvalidRequestError(
            f"no trace can be written to {folder}: {error.strerror}; give another output_dir"
        ) from None
    return folder


def _write(recorded: profile, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".json") as plain:
        recorded.export_chrome_trace(plain.name)
        with open(plain.name, "rb") as source, gzip.open(path, "wb", COMPRESSION) as target:
            shutil.copyfileobj(source, target)

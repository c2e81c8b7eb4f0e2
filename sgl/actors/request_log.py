"""What is told of requests that have ended: a line in the log, and a record on disk.

level 0   names, numbers of tokens, why it ended, how long it took
      1   also sampling parameters and the beginnings of prompt and answer
      2   also the whole prompt and answer
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import orjson

from sgl.actors.request_dump import RequestDump
from sgl.protocol.administration import LogRequest
from sgl.protocol.call import Answer, PromptCall
from sgl.protocol.native_reply import finish_reason

logger = logging.getLogger(__name__)

SHORT_CHARS = 2048  # of a prompt or an answer, at level 1
DUMP_LINES = 1000  # of a file, unless somebody says otherwise


class RequestLog:
    """Off, or at one of the levels; the dump is on or off besides."""

    def __init__(self, *, is_on: bool, level: int) -> None:
        self.is_on = is_on
        self._level = level
        self._num_lines = DUMP_LINES
        self._dump: RequestDump | None = None

    def configure(self, wanted: LogRequest) -> dict[str, Any]:
        """Change what is given; raises InvalidRequestError. Waits for the disk."""
        folder, num_lines = wanted.dump_requests_folder, wanted.dump_requests_threshold
        if folder is not None or num_lines is not None:
            self._open_dump(folder, num_lines or self._num_lines)
        if wanted.log_requests is not None:
            self.is_on = wanted.log_requests
        if wanted.log_requests_level is not None:
            self._level = wanted.log_requests_level
        return self.settings()

    def settings(self) -> dict[str, Any]:
        """In the words of `/configure_logging`."""
        return {
            "log_requests": self.is_on,
            "log_requests_level": self._level,
            "dump_requests_folder": "" if self._dump is None else str(self._dump.folder),
            "dump_requests_threshold": self._num_lines,
        }

    def ended(self, prompt: PromptCall, answer: Answer, seconds: float) -> None:
        """An answer is whole, or was ended."""
        if self.is_on:
            logger.info("Finish: %s", orjson.dumps(self._line(prompt, answer, seconds)).decode())
        if self._dump is not None:
            self._dump.add(partial(_record, prompt, answer, seconds, time.time()))

    def close(self) -> None:
        if self._dump is not None:
            self._dump.close()
            self._dump = None

    def _open_dump(self, folder: str | None, num_lines: int) -> None:
        """Into another folder or other files; None: the folder stays."""
        path = self._dump and self._dump.folder
        if folder is not None:
            path = Path(folder).expanduser().absolute() if folder else None
        dump = RequestDump(path, num_lines) if path else None
        self.close()
        self._dump, self._num_lines = dump, num_lines

    def _line(self, prompt: PromptCall, answer: Answer, seconds: float) -> dict[str, Any]:
        line = _counts(answer, seconds)
        if self._level >= 1:
            length = SHORT_CHARS if self._level == 1 else None
            line["sampling_params"] = _sampling(prompt)
            line["prompt"] = (
                prompt.prompt[:length]
                if isinstance(prompt.prompt, str)
                else prompt.prompt[:length].tolist()
            )
            line["answer"] = answer.text[:length]
        return line


def _record(prompt: PromptCall, answer: Answer, seconds: float, ended_at: float) -> bytes:
    """All that is known; `input_ids` and `sampling_params` can be sent to `/generate` again."""
    return orjson.dumps(
        {
            "ended_at": ended_at,
            **_counts(answer, seconds),
            "prompt": prompt.prompt if isinstance(prompt.prompt, str) else None,
            "input_ids": answer.prompt_ids.tolist(),
            "sampling_params": _sampling(prompt),
            "answer": answer.text,
            "output_ids": answer.output_ids.tolist(),
        }
    )


def _counts(answer: Answer, seconds: float) -> dict[str, Any]:
    return {
        "rid": answer.rid,
        "prompt_tokens": len(answer.prompt_ids),
        "cached_tokens": answer.num_cached,
        "completion_tokens": len(answer.output_ids),
        "finish_reason": answer.finish and finish_reason(answer.finish),
        "seconds": round(seconds, 6),
    }


def _sampling(prompt: PromptCall) -> dict[str, Any]:
    fields = msgspec.structs.asdict(prompt.sampling)
    if fields["logit_bias"]:
        fields["logit_bias"] = {str(key): bias for key, bias in fields["logit_bias"].items()}
    grammar = {} if prompt.grammar is None else {str(prompt.grammar.kind): prompt.grammar.text}
    return fields | grammar

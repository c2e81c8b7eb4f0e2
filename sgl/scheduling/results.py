"""What a step's result means to its requests: tokens, the ends of answers, and who is told what."""

from __future__ import annotations

from collections.abc import Iterator

from sgl.messages import (
    Finish,
    Int32Bytes,
    Logprobs,
    RowLogprobs,
    StepResult,
    TokenDelta,
    unpack,
)
from sgl.scheduling import jump_forward
from sgl.scheduling.planned_step import Part, Step
from sgl.scheduling.queues import Queues
from sgl.scheduling.request import Request

NO_TOKENS_WANTED = Finish("length", length=0)
NOT_A_NUMBER = Finish("abort", message="the model's output is not a number", status=500)


class ResultTaker:
    """Takes results in, in the order of the steps.

    jumps_forward  what a grammar forces is appended without sampling it
    """

    def __init__(self, queues: Queues, *, jumps_forward: bool) -> None:
        self.queues = queues
        self.jumps_forward = jumps_forward

    def take(self, step: Step, result: StepResult) -> list[TokenDelta]:
        """What the step's requests gained; those that have ended are forgotten."""
        deltas: list[TokenDelta] = []
        if result.error:
            rows = step.rows()
            failed = [rows[index] for index in unpack(result.failed)] or rows
            deltas = self._fail(failed, result.error)
            if not result.failed:
                return deltas
        logprobs = {row.index: row for row in result.logprobs}
        deltas += self._take_decodes(step, result.token_ids, logprobs)
        deltas += self._take_prompts(step, result, logprobs)
        return deltas

    def _fail(self, requests: list[Request], error: str) -> list[TokenDelta]:
        """A step left nothing of these requests: they end, the others never notice."""
        finish = Finish("abort", message=error, status=500)
        living = [request for request in requests if not request.is_finished]
        for request in living:
            self.queues.end(request, finish)
        return [request.last_delta(finish) for request in living]

    def _take_decodes(
        self, step: Step, packed_ids: Int32Bytes, logprobs: dict[int, RowLogprobs]
    ) -> list[TokenDelta]:
        """Runs for every token of every request: most of them go the short way."""
        deltas: list[TokenDelta] = []
        skipped, emptied, num_plain = step.skipped, step.emptied, 0
        bytes_of_ids = [packed_ids[start : start + 4] for start in range(0, len(packed_ids), 4)]
        known = zip(step.decodes, unpack(packed_ids), bytes_of_ids, strict=False)  # prompts follow
        for index, (request, token_id, new_ids) in enumerate(known):
            if request.is_finished or (skipped and request in skipped):
                continue
            if not (emptied and request in emptied):
                request.num_computed += 1
            if logprobs or request.matcher is not None or token_id < 0:
                finish = self._accept(request, token_id)
                deltas += self._gained(request, finish, logprobs.get(index))
            else:
                ids = request.token_ids
                ids.append(token_id)
                is_last = len(ids) >= request.max_len or token_id in request.stop_ids
                finish = request.end_at(token_id) if is_last else None
                request.num_told += 1
                num_plain += 1
                deltas.append(TokenDelta(request.request_id, new_ids, finish, request.num_cached))
            if finish:
                self.queues.end(request, finish)
        self.queues.totals.num_output_tokens += num_plain
        return deltas

    def _take_prompts(
        self, step: Step, result: StepResult, logprobs: dict[int, RowLogprobs]
    ) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        num_decodes = len(step.decodes)
        outputs: Iterator[int | bytes] = iter(
            result.vectors or unpack(result.token_ids)[num_decodes:]
        )
        for index, part in enumerate(step.prompts, num_decodes):
            request = part.request
            output = next(outputs) if part.has_output else None
            if not step.wants(request):
                continue
            if request not in step.emptied:
                request.num_computed = part.end
            finish, vector = self._output(part, output)
            found = _with_unknown(part, logprobs.get(index))
            deltas += self._gained(request, finish, found, vector)
            if finish:
                self.queues.end(request, finish)
            elif request not in step.emptied and not request.has_jumped:
                self.queues.store.share(request)
        return deltas

    def _output(self, part: Part, output: int | bytes | None) -> tuple[Finish | None, bytes]:
        """Take in what the step made of a prompt; whether the request ends, and its vector."""
        request = part.request
        if output is None:
            is_end = request.max_new_tokens == 0 and part.end == request.prompt_len
            return NO_TOKENS_WANTED if is_end else None, b""
        if isinstance(output, bytes):
            return (NO_TOKENS_WANTED if output else NOT_A_NUMBER), output
        return self._accept(request, output), b""

    def _accept(self, request: Request, token_id: int) -> Finish | None:
        """Take a sampled token, and what its grammar forces after it."""
        if token_id < 0:
            return request.limit_met or NOT_A_NUMBER
        finish = request.accept(token_id)
        if finish or not self.jumps_forward:
            return finish
        num_dropped = int(request.is_waiting_for_token)
        jumped = jump_forward.jump(request)
        if jumped is None:
            return None
        self.queues.skip_in_flight(request)
        self.queues.count_jump(jumped.num_tokens, num_dropped)
        return jumped.finish

    def _gained(
        self,
        request: Request,
        finish: Finish | None,
        logprobs: RowLogprobs | None,
        vector: bytes = b"",
    ) -> list[TokenDelta]:
        """What the client is to be told of a request now, if anything."""
        new_ids = request.tell()
        self.queues.totals.num_output_tokens += len(new_ids) // 4
        found = logprobs or RowLogprobs(0)
        if not (finish or new_ids or found.input):
            return []
        num_cached = max(request.num_cached, 0)
        return [
            TokenDelta(
                request.request_id, new_ids, finish, num_cached, found.input, found.output, vector
            )
        ]


def _with_unknown(part: Part, logprobs: RowLogprobs | None) -> RowLogprobs | None:
    """The log-probabilities of a part, with the prompt's first token, which has none."""
    request = part.request
    first = request.next_logprob
    if request.logprobs is None or first >= request.prompt_len:
        return logprobs
    request.next_logprob = max(first, min(part.end + 1, request.prompt_len))
    if first > 0:
        return logprobs
    known = logprobs or RowLogprobs(0)
    unknown_first = (known.input or Logprobs()).after_unknown(request.logprobs)
    return RowLogprobs(known.index, unknown_first, known.output)

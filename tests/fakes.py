"""Fakes that work: a tokenizer of letters, and an engine that answers each token with the next."""

from __future__ import annotations

import asyncio
import functools
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sgl.actors.channel import Inbox, LocalChannel, TickSender
from sgl.actors.front import Front, FrontOptions
from sgl.messages import (
    Abort,
    Control,
    DetokenizerToIngress,
    Embed,
    EngineReady,
    Finish,
    Generate,
    GetWeight,
    IngressToScheduler,
    Logprobs,
    NewText,
    Reply,
    StartProfile,
    StopProfile,
    TextDelta,
    UpdateWeights,
    pack,
    unpack,
)

VOCAB_SIZE = 256


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in a loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(test(*args, **named))

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something nobody announces."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class LetterTokenizer:
    """Each character is a token, its code point the id; characters above 255 wrap around."""

    vocab_size = VOCAB_SIZE
    closing_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> array[int]:
        return array("i", [ord(letter) % VOCAB_SIZE for letter in text])

    def encode_continuation(self, text: str) -> array[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(self.token_text, ids))

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def byte_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        return {token_id: self.token_bytes(token_id) for token_id in range(VOCAB_SIZE)}


def vector_of(ids: Sequence[int]) -> bytes:
    """What the fake engine makes of a prompt: 4 float32 numbers."""
    return array("f", [len(ids), ids[0], ids[-1], 0.1]).tobytes()


@dataclass
class _Running:
    message: Generate
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_told: int = 0  # characters and tokens the front has got
    script: str | None = None  # its answer, instead of successors

    @property
    def next_id(self) -> int:
        if self.script is not None:
            return ord(self.script[len(self.token_ids)])
        last = self.token_ids[-1] if self.token_ids else unpack(self.message.prompt_ids)[-1]
        return (last + 1) % VOCAB_SIZE

    def step(self) -> Finish | None:
        """One more token; says why it was the last one."""
        sampling = self.message.sampling
        if sampling.max_new_tokens == 0:
            return Finish("length", length=0)
        if self.script is not None and len(self.token_ids) == len(self.script):
            return Finish("stop", matched=0)
        token_id = self.next_id
        self.token_ids.append(token_id)
        if token_id in sampling.stop_token_ids:
            return Finish("stop", matched=token_id)
        self.text += chr(token_id)
        for stop in sampling.stop:
            if stop in self.text:
                self.text = self.text[: self.text.index(stop)]
                return Finish("stop", matched=stop)
        if len(self.token_ids) == sampling.max_new_tokens:
            return Finish("length", length=sampling.max_new_tokens)
        return None


class FakeEngine:
    """Scheduler, worker and detokenizer in one: after "a" comes "bcd…", all requests in step.

    step_s         pause between two steps
    max_messages   how many requests its ring holds
    """

    def __init__(self, *, step_s: float = 0.0, max_messages: int | None = None) -> None:
        self.requests: LocalChannel[IngressToScheduler] = LocalChannel(max_messages=max_messages)
        self.text: LocalChannel[DetokenizerToIngress] = LocalChannel()
        self.seen: list[Generate] = []
        self.embedded: list[Embed] = []
        self.aborted: list[int] = []
        self.controls: list[str] = []
        self.script: str | None = None  # what it says from now on, letter by letter
        self.updates: list[UpdateWeights] = []
        self.profile: StartProfile | StopProfile | None = None  # the one that is running
        self._step_s = step_s
        self._running: dict[int, _Running] = {}
        self._embedding: dict[int, Embed] = {}
        self._work = asyncio.Event()
        self._failing: Finish | None = None

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._embedding)

    def fail_next(self, message: str, status: int) -> None:
        """End whatever makes its next token with this error."""
        self._failing = Finish("abort", message=message, status=status)

    def open(self, max_total_tokens: int = 4096, max_request_tokens: int = 4096) -> None:
        self.text.sender.send(EngineReady(max_total_tokens, max_request_tokens))

    def receive(self, messages: Iterable[IngressToScheduler]) -> None:
        for message in messages:
            match message:
                case Generate():
                    self.seen.append(message)
                    self._running[message.request_id] = _Running(message, script=self.script)
                case Embed():
                    self.embedded.append(message)
                    self._embedding[message.request_id] = message
                case Abort():
                    self.aborted.append(message.request_id)
                    self._running.pop(message.request_id, None)
                    self._embedding.pop(message.request_id, None)
                case Control():
                    self._control(message)
                case StartProfile() | StopProfile():
                    self._profile(message)
                case UpdateWeights():
                    self._update(message)
                case GetWeight():
                    is_known = message.name == "norm.weight"
                    text = f"[{message.max_rows}.5]" if is_known else "no such weight"
                    self.text.sender.send(Reply(message.call_id, is_known, text))
        self._work.set()

    async def run(self) -> None:
        while True:
            await self._work.wait()
            if not self.num_running:
                self._work.clear()
                continue
            if self._embedding:
                await asyncio.sleep(self._step_s)  # a vector is there after a step, not at once
            deltas = [delta for key in list(self._running) if (delta := self._step(key))]
            deltas += [self._embed(key) for key in list(self._embedding)]
            if deltas:
                self.text.sender.send(NewText(deltas))
            await asyncio.sleep(self._step_s)

    def _control(self, message: Control) -> None:
        self.controls.append(message.action)
        if message.action == "abort_all":
            self._running.clear()
        ok = not self._running
        text = "Cache flushed." if ok else "requests are running"
        self.text.sender.send(Reply(message.call_id, ok, text))

    def _update(self, message: UpdateWeights) -> None:
        is_good = "good" in message.path
        self.updates.append(message)
        self.text.sender.send(Reply(message.call_id, is_good, "Loaded." if is_good else "torn"))

    def _profile(self, message: StartProfile | StopProfile) -> None:
        is_start = isinstance(message, StartProfile)
        ok = is_start == (self.profile is None)
        self.text.sender.send(Reply(message.call_id, ok, "Profiled." if ok else "no, thanks"))
        if ok:
            self.profile = message if is_start else None

    def _embed(self, request_id: int) -> TextDelta:
        ids = unpack(self._embedding.pop(request_id).prompt_ids)
        finish, self._failing = self._failing or Finish("length", length=0), None
        vector = vector_of(ids) if finish.kind == "length" else b""
        return TextDelta(request_id, "", b"", finish, num_cached=len(ids) - 1, vector=vector)

    def _step(self, request_id: int) -> TextDelta | None:
        running = self._running[request_id]
        num_tokens_before, num_chars_before = len(running.token_ids), len(running.text)
        finish = running.step()
        finish, self._failing = self._failing or finish, None
        if finish is not None:
            del self._running[request_id]
        if running.message.text_interval == 0:
            if finish is None:
                return None
            num_tokens_before = num_chars_before = 0
        is_first = (
            finish is not None if running.message.text_interval == 0 else not running.num_told
        )
        running.num_told += 1
        new_ids = running.token_ids[num_tokens_before:]
        return TextDelta(
            request_id,
            running.text[num_chars_before:],
            pack(new_ids),
            finish,
            num_cached=len(running.message.prompt_ids) // 4 - 1,
            input_logprobs=self._input_logprobs(running.message) if is_first else [],
            output_logprobs=self._output_logprobs(running.message, new_ids),
        )

    def _input_logprobs(self, message: Generate) -> list[Logprobs]:
        options = message.logprobs
        if options is None or options.start_len < 0:
            return []
        ids = unpack(message.prompt_ids)[options.start_len :].tolist()
        return [_logprobs(ids, message, is_start=options.start_len == 0)]

    def _output_logprobs(self, message: Generate, ids: list[int]) -> list[Logprobs]:
        return [] if message.logprobs is None or not ids else [_logprobs(ids, message)]


def logprob_of(token_id: int) -> float:
    """What the fake engine gives: exact in float32."""
    return -token_id / 16


def _logprobs(ids: list[int], message: Generate, *, is_start: bool = False) -> Logprobs:
    options = message.logprobs
    assert options is not None
    values = array("f", [logprob_of(token_id) for token_id in ids])
    if is_start:
        values[0] = float("nan")
    tops = [[(token_id + k) % VOCAB_SIZE for k in range(options.top_num)] for token_id in ids]
    top_ids = [token_id for top in tops for token_id in top]
    chosen = [logprob_of(token_id) for token_id in unpack(options.token_ids)] * len(ids)
    return Logprobs(
        values.tobytes(),
        array("f", map(logprob_of, top_ids)).tobytes(),
        pack(top_ids),
        array("f", chosen).tobytes(),
    )


@asynccontextmanager
async def connected_front(
    engine: FakeEngine, *, is_open: bool = True, tokenizer: Any = None, **options: Any
) -> AsyncIterator[Front]:
    """A front whose engine is `engine`; both work as long as the context lasts."""
    loop = asyncio.get_running_loop()
    defaults = {
        "context_len": 4096,
        "vocab_size": VOCAB_SIZE,
        "max_live_requests": 512,
        "max_batch_requests": 128,
    }
    front = Front(
        TickSender(loop, engine.requests.sender),
        tokenizer or LetterTokenizer(),
        FrontOptions(**(defaults | options)),
    )
    inbox = Inbox(loop, _fail)
    inbox.add(engine.requests.receiver, engine.receive)
    inbox.add(engine.text.receiver, front.receive)
    steps = asyncio.create_task(engine.run())
    if is_open:
        engine.open()
        await front.ready.wait()
    try:
        yield front
    finally:
        steps.cancel()
        inbox.close()
        front.close()


def _fail(error: Exception) -> None:
    raise error

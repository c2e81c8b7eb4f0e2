"""`sgl bench serving`: find the server, make the prompts, send them, say what came of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from tqdm import tqdm

from sgl.bench import plot, report
from sgl.bench.backends import BodyMaker
from sgl.bench.datasets import make_conversations
from sgl.bench.discovery import Target, discover, flush_cache, wait_until_ready
from sgl.bench.load import LoadGenerator, Run, arrivals
from sgl.bench.measures import Measures, measure
from sgl.bench.prompts import Content, Conversation, Format, Turn, Writer, continuous
from sgl.bench.servers import Client
from sgl.bench.settings import ServingConfig
from sgl.errors import ConfigError
from sgl.protocol.chat_template import ChatTemplate
from sgl.tokenizer import Tokenizer

WARMUP_OUTPUT_LEN = 16
WARMUP_SEED = 1_000_003  # added to the seed: no prompt of the run may be in the cache already


def run(argv: list[str]) -> int:
    """Exit code 1 means that no request was answered."""
    config = ServingConfig.from_argv(argv)
    for path in (config.output_file, config.plot):
        if path is not None:
            _write(path, "", "a")  # a run may take hours: better to know now
    return uvloop.run(_run(config))


async def _run(config: ServingConfig) -> int:
    async with _session(config) as session:
        await wait_until_ready(session, config)
        bench = Bench(config, session, await discover(session, config))
        all_measures = [await bench.run_at(rate, i) for i, rate in enumerate(config.request_rate)]
    if len(all_measures) > 1:
        print("\n" + report.comparison(config.request_rate, all_measures))
    if config.plot is not None:
        _write(config.plot, plot.draw(config.request_rate, all_measures), "w")
        print(f"\nwrote {config.plot}")
    return 0 if any(measures.completed for measures in all_measures) else 1


@dataclass(frozen=True, slots=True)
class Bench:
    """A server and how to load it."""

    config: ServingConfig
    session: aiohttp.ClientSession
    target: Target

    async def run_at(self, rate: float, number: int) -> Measures:
        """One run, printed and recorded. Runs send different prompts, none of them cached yet."""
        config, target = self.config, self.target
        seed = config.seed + number
        conversations = make_conversations(config, self._writer(seed))
        if len(conversations) < (config.num_prompts or 0):
            print(f"{config.dataset_path} has only {len(conversations)} usable prompts")
        client = Client(self.session, config.url, self._body_maker())
        await self._warm_up(client, conversations, seed)
        if config.flush_cache:
            await flush_cache(self.session, config)
        starts = arrivals(len(conversations), rate, config.burstiness, seed)
        done = await self._send(client, conversations, starts)
        measures = measure(done, config.goals, target.tokenizer)
        print(("\n" if number else "") + report.table(config, target, rate, measures), flush=True)
        if config.output_file is not None:
            line = report.record(config, target, rate, measures)
            line |= {"requests": report.details(done)} if config.output_details else {}
            _write(config.output_file, json.dumps(line) + "\n", "a")
        return measures

    async def _send(
        self, client: Client, conversations: Sequence[Conversation], starts: Sequence[float]
    ) -> Run:
        num_requests = sum(map(len, conversations))
        is_quiet = self.config.disable_tqdm or not sys.stderr.isatty()
        with tqdm(total=num_requests, unit=" requests", leave=False, disable=is_quiet) as bar:
            generator = LoadGenerator(
                client.ask, self._to_content(), self.config.max_concurrency, bar.update
            )
            return await generator.run(conversations, starts)

    async def _warm_up(
        self, client: Client, conversations: Sequence[Conversation], seed: int
    ) -> None:
        """Requests like the first ones, which nobody measures; they must succeed."""
        writer = self._writer(seed + WARMUP_SEED)
        alike = [
            (Turn(writer.like(first.content), min(first.output_len, WARMUP_OUTPUT_LEN)),)
            for first, *_ in conversations[: self.config.warmup_requests]
        ]
        done = await LoadGenerator(client.ask, self._to_content()).run(alike, [0.0] * len(alike))
        for exchange in done.exchanges:
            if exchange.answer.error:
                raise ConfigError(
                    f"{self.config.url} fails the warm-up request, so nothing was measured: "
                    f"{exchange.answer.error}"
                )

    def _writer(self, seed: int) -> Writer:
        target = self.target
        return Writer(seed, target.tokenizer, target.vocab_size, as_ids=self.config.makes_ids)

    def _body_maker(self) -> BodyMaker:
        config = self.config
        return BodyMaker(
            backend=config.server,
            model=self.target.model,
            is_stream=not config.disable_stream,
            ignores_eos=not config.disable_ignore_eos,
            schema_mode=config.json_schema_mode,
            extra=config.extra_body,
        )

    def _to_content(self) -> Format:
        """How the messages of a conversation become a prompt for this server."""
        config, tokenizer = self.config, self.target.tokenizer
        if config.server.api == "chat":
            return list
        if config.apply_chat_template:
            return _templated(_needed(tokenizer, "--apply-chat-template"))
        if config.prompt_format == "ids":
            encode = _needed(tokenizer, "--prompt-format ids").encode
            return lambda messages: encode(continuous(messages)).tolist()
        return continuous


def _templated(tokenizer: Tokenizer) -> Format:
    if tokenizer.chat_template is None:
        raise ConfigError("--apply-chat-template: the tokenizer has no chat template")
    template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    bos = tokenizer.bos_token if tokenizer.adds_bos else ""

    def render(messages: Sequence[dict[str, str]]) -> Content:
        return template.render(messages).removeprefix(bos)  # the server puts its own in front

    return render


def _needed(tokenizer: Tokenizer | None, flag_name: str) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError(f"{flag_name} needs a tokenizer: give --tokenizer")
    return tokenizer


def _session(config: ServingConfig) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    return aiohttp.ClientSession(
        # A connection each: one that the server closes for idleness just as a request goes out
        # would count as a failure of the server.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=config.request_timeout),
        headers=headers,
    )


def _write(path: str, text: str, mode: str) -> None:
    try:
        with Path(path).expanduser().open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None

"""Datasets that come from a file of the user's. What cannot be read is a ConfigError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgl.bench.prompts import Conversation, Turn, Writer
from sgl.bench.settings import DEFAULT_NUM_PROMPTS, ServingConfig
from sgl.errors import ConfigError

MIN_TOKENS = 4  # of a question and of an answer: what is shorter measures nothing
OUTPUT_LEN_NAMES = ("output_len", "max_tokens", "max_new_tokens", "max_completion_tokens")


def sharegpt(config: ServingConfig, writer: Writer) -> list[Conversation]:
    """The first question of each conversation, and its answer's length; in seeded order."""
    records = _read_json(config)
    if not isinstance(records, list):
        raise ConfigError(f"{config.dataset_path} must hold a JSON list of conversations")
    pairs = [pair for record in records if (pair := _first_pair(record)) is not None]
    writer.random.shuffle(pairs)
    chosen: list[Conversation] = []
    for question, answer in pairs:
        if len(chosen) == (config.num_prompts or DEFAULT_NUM_PROMPTS):
            break
        num_in, num_out = writer.num_tokens(question), writer.num_tokens(answer)
        output_len = config.sharegpt_output_len or num_out
        fits = num_in + output_len <= config.sharegpt_context_len
        if fits and min(num_in, num_out) >= MIN_TOKENS:
            chosen.append((Turn(question, output_len),))
    if not chosen:
        raise ConfigError(
            f"{config.dataset_path} has no conversation with a question and an answer that are "
            f"each {MIN_TOKENS} tokens or longer and fit --sharegpt-context-len "
            f"{config.sharegpt_context_len}"
        )
    return chosen


def prompt_file(config: ServingConfig, writer: Writer) -> list[Conversation]:
    """One JSON object a line: `prompt`, a text or token ids, and the length of the answer."""
    lines = [line for line in _read_text(config).splitlines() if line.strip()]
    turns = [
        _line_turn(line, f"{config.dataset_path}, prompt {number}", config.file_output_len)
        for number, line in enumerate(lines[: config.num_prompts], 1)
    ]
    if not turns:
        raise ConfigError(f"{config.dataset_path} holds no prompt")
    if not config.server.takes_ids and any(not isinstance(turn.content, str) for turn in turns):
        raise ConfigError(
            f"{config.dataset_path} holds token ids, and --backend {config.backend} takes text only"
        )
    return [(turn,) for turn in turns]


def _first_pair(record: Any) -> tuple[str, str] | None:
    """Question and answer at the beginning; None where a conversation does not begin so."""
    if not isinstance(record, dict):
        return None
    turns = record.get("conversations") or record.get("conversation") or []
    if len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    question, answer = (turn.get("value") or turn.get("content") for turn in turns[:2])
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    return question, answer


def _line_turn(line: str, where: str, default_len: int) -> Turn:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: the line is not JSON ({error})") from None
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    is_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ConfigError(
            f'{where}: a line must look like {{"prompt": "…", "max_tokens": 64}}; the prompt is a '
            "text or a list of token ids"
        )
    lens = [fields[name] for name in OUTPUT_LEN_NAMES if fields.get(name) is not None]
    output_len = lens[0] if lens else default_len
    if type(output_len) is not int or output_len < 1:
        raise ConfigError(f"{where}: the length of the answer must be 1 or more, got {output_len}")
    return Turn(prompt, output_len)


def _read_json(config: ServingConfig) -> Any:
    try:
        return json.loads(_read_text(config))
    except ValueError as error:
        raise ConfigError(f"{config.dataset_path} is not JSON: {error}") from None


def _read_text(config: ServingConfig) -> str:
    assert config.dataset_path is not None, "checked by ServingConfig"
    try:
        return Path(config.dataset_path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path {config.dataset_path} cannot be read: {error}") from None

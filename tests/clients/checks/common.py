"""What is asked, and what the model of the server answers to it without randomness."""

from __future__ import annotations

import os
from typing import Any

import openai.resources  # noqa: F401  all of it: two threads must not import parts of it

BASE_URL = os.environ["OPENAI_BASE_URL"]
API_KEY = os.environ["OPENAI_API_KEY"]
TIMEOUT_S = 60.0
MODEL = "default"

QUESTION = "What is the capital of France? Answer in one sentence."
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
ANSWER = "The capital of France is Paris."
NUM_QUESTION_TOKENS, NUM_ANSWER_TOKENS = 42, 8  # the last is the end of the turn, without text

PROMPT = "The capital of France is"
PROMPT_IDS = [504, 3575, 282, 4649, 314]
COMPLETION = " Paris."  # two tokens
ITALY, ITALIAN_COMPLETION = "The capital of Italy is", " Rome."
PARIS_ID, DOT_ID = 7042, 30
SHORT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 2}

# answers that differ by seed; what is unlikely is left out, because a rounding error decides
# between two neighbours that are both unlikely
TOPIC = "Name an animal."
VARIED: dict[str, Any] = {"temperature": 1, "top_p": 0.8, "max_tokens": 4}
VARIED_CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": TOPIC}],
    **VARIED,
}
VARIED_TEXT: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", **VARIED}

WANTS_JSON: list[Any] = [{"role": "user", "content": "Give me an example of a person as JSON."}]
PERSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
PERSON_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": PERSON_SCHEMA, "strict": True},
}
EMOJI = "👩‍👧🎉ü日"  # some of its characters are several tokens
TOO_LONG = "a b " * 5000  # about two tokens a time; the context has 8192


def is_person(value: Any) -> bool:
    return set(value) == {"age"} and value["age"] in range(100)

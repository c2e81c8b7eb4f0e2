"""Text that a grammar forces takes fewer passes, and the answers are those of token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import orjson
import pytest

import sgl
from benchmarks.workloads import CHARACTER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Answer = dict[str, Any]

NUM_PROMPTS = 4
NAMES = (
    *("Harry Potter", "Hermione Granger", "Ron Weasley", "Albus Dumbledore", "Severus Snape"),
    *("Draco Malfoy", "Luna Lovegood", "Neville Longbottom", "Sirius Black", "Remus Lupin"),
    *("Rubeus Hagrid", "Minerva McGonagall", "Ginny Weasley", "Bellatrix Lestrange", "Dobby"),
    *("Cedric Diggory", "Cho Chang", "Tom Riddle", "Fred Weasley", "George Weasley"),
)
FORMS = (
    "{} is a character in Harry Potter. Please fill in the following information about them.\n",
    "Describe {} as JSON:\n",
    "Character sheet of {}:\n",
    "Write down what you know of {}.\n",
    "Q: Who is {}?\nA: ",
)
PROMPTS = [form.format(name) for name in NAMES for form in FORMS]
COUNTS = ("num_steps", "num_jumped_tokens", "num_saved_passes")


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[sgl.Engine, sgl.Engine]]:
    """One that jumps, one that does not. In float32: few answers hang on the last bit."""
    common = {"dtype": "float32", "num_cpu_threads": 1, "random_seed": 0}
    with sgl.Engine(**common) as jumping, sgl.Engine(**common, disable_jump_forward=True) as plain:
        yield jumping, plain


def ask(engine: sgl.Engine, prompts: list[str], **sampling: Any) -> tuple[list[Answer], Answer]:
    """The answers, and what was counted meanwhile."""
    before = engine.get_server_info()
    answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 256, **sampling})
    after = engine.get_server_info()
    return answers, {name: after[name] - before[name] for name in COUNTS}


def test_greedy_answers_are_the_same_in_fewer_passes(engines, is_full):
    prompts = PROMPTS if is_full else PROMPTS[:: len(PROMPTS) // NUM_PROMPTS]
    (jumped, counts), (plain, plain_counts) = (
        ask(engine, prompts, regex=CHARACTER) for engine in engines
    )
    assert all(re.fullmatch(CHARACTER, answer["text"]) for answer in jumped + plain)
    same = sum(one["text"] == other["text"] for one, other in zip(jumped, plain, strict=True))
    assert same >= 0.95 * len(prompts)
    assert counts["num_steps"] <= 0.6 * plain_counts["num_steps"]
    assert plain_counts["num_jumped_tokens"] == plain_counts["num_saved_passes"] == 0
    num_tokens = sum(answer["meta_info"]["completion_tokens"] for answer in jumped)
    assert counts["num_saved_passes"] >= 0.4 * num_tokens


def test_prompts_stay_what_they_are(engines):
    """A prompt is found again in the cache only under its own tokens."""
    jumping, _ = engines
    prompts = ["The answer is {", 'JSON: {"na', "A list:\n-"]
    first, _ = ask(jumping, prompts, regex=r'me": "[a-z]{3}"\}')
    again, _ = ask(jumping, prompts, max_new_tokens=1)
    for one, other in zip(first, again, strict=True):
        assert one["text"].startswith('me": "')
        assert other["meta_info"]["cached_tokens"] == one["meta_info"]["prompt_tokens"] - 1


def test_jumps_beside_samples_stops_streams_and_limits(engines):
    jumping, _ = engines
    fixed = r"The capital of France is (Paris|Lyon), of course\. Indeed!"
    outputs = jumping.generate("Q: ", {"regex": fixed, "temperature": 1.0, "n": 3})
    assert all(re.fullmatch(fixed, output["text"]) for output in outputs)
    stopped = jumping.generate("Q: ", {"regex": fixed, "stop": "course"})
    assert re.fullmatch(r"The capital of France is (Paris|Lyon), of ", stopped["text"])
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "course"}
    for num in (1, 2, 3, 4, 7, 9):
        cut = jumping.generate("Q: ", {"regex": fixed, "max_new_tokens": num, "temperature": 0})
        assert cut["meta_info"]["completion_tokens"] == num == len(cut["output_ids"])
        assert cut["meta_info"]["finish_reason"] == {"type": "length", "length": num}
        assert "The capital of France is Paris, of course. Indeed!".startswith(cut["text"])
    text = ""
    for part in jumping.generate("Q: ", {"regex": fixed, "temperature": 0}, stream=True):
        assert part["text"].startswith(text)
        text = part["text"]
    assert re.fullmatch(fixed, text)
    whole = jumping.generate("Q: ", {"regex": "nothing else", "temperature": 0})
    assert whole["text"] == "nothing else"
    assert whole["meta_info"]["finish_reason"]["type"] == "stop"


def test_penalties_count_tokens_that_were_not_sampled(engines):
    """With and without jumps the same tokens are penalised, so greedy answers are the same."""
    sampling = {"regex": CHARACTER, "frequency_penalty": 1.5, "repetition_penalty": 1.3}
    (jumped, counts), (plain, _) = (ask(engine, PROMPTS[:1], **sampling) for engine in engines)
    assert counts["num_jumped_tokens"] > 40
    assert [one["text"] for one in jumped] == [one["text"] for one in plain]


def test_schemas_jump_too(engines):
    jumping, _ = engines
    schema = {
        "type": "object",
        "properties": {
            "temperature_in_degrees_celsius": {"type": "integer", "minimum": 0, "maximum": 50},
            "is_it_raining_at_the_moment": {"type": "boolean"},
        },
        "required": ["temperature_in_degrees_celsius", "is_it_raining_at_the_moment"],
        "additionalProperties": False,
    }
    [answer], counts = ask(jumping, ["The weather: "], json_schema=schema)
    jsonschema.validate(orjson.loads(answer["text"]), schema)
    assert counts["num_jumped_tokens"] >= 8

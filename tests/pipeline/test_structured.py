"""Answers under grammars, of a real model: all of them match, and nobody else notices."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from pipeline.conftest import STRUCTURED
from pipeline.server import Server
from prompts import PROMPTS
from schemas import SCHEMAS, validator_of

import sgl
from benchmarks.workloads import CHARACTER
from sgl.errors import InvalidRequestError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Fields = dict[str, Any]

REGEXES = {
    "The IP address of the Google DNS servers is ": (
        r"((25[0-5]|2[0-4]\d|[01]?\d\d?).){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
    ),
    "The French revolution began on ": r"^\d{4}-\d{2}-\d{2}$",
    "My e-mail address is ": r"[a-z]{1,10}\.[a-z]{1,10}@[a-z]{2,8}\.(com|org)",
    "A greeting in Japanese: ": r"(こんにちは|さようなら|🙂){1,3}",
    "Please describe Harry Potter as JSON: ": CHARACTER,
    "The call was from +": r"\d{2}( \d{3}){3}",
    "#": r"[0-9a-f]{6}(, #[0-9a-f]{6}){2}",
}
SAMPLE = [*SCHEMAS][::5]
FREE = ["short-france", "chat-turns", "short-story"]


def constrained(temperature: float, names: Iterable[str] = SAMPLE) -> list[Fields]:
    """A request for each regex, and for each of these schemas."""
    base = {"temperature": temperature, "max_new_tokens": 100}
    asked = [
        {"prompt": prompt, "sampling_params": {**base, "regex": regex, "seed": number}}
        for number, (prompt, regex) in enumerate(REGEXES.items())
    ]
    return asked + [
        {
            "prompt": f"An example of the JSON schema {json.dumps(SCHEMAS[name])}: ",
            "sampling_params": {**base, "json_schema": SCHEMAS[name], "seed": number},
        }
        for number, name in enumerate(names)
    ]


def check(request: Fields, output: Fields) -> bool:
    """Whether the answer was finished; then it must match."""
    if output["meta_info"]["finish_reason"]["type"] == "length":
        return False
    sampling, text = request["sampling_params"], output["text"]
    if "regex" in sampling:
        assert re.fullmatch(sampling["regex"], text), text
    else:
        validator_of(sampling["json_schema"]).validate(json.loads(text))
    return True


def ask(engine: sgl.Engine, requests: list[Fields]) -> list[Fields]:
    """All at once."""
    return engine.generate(
        [request["prompt"] for request in requests],
        [request["sampling_params"] for request in requests],
    )


def check_beside_free_requests(engine: sgl.Engine, requests: list[Fields]) -> str:
    """Says how many answers were finished; all of these match."""
    sampling = {"temperature": 0, "max_new_tokens": 24}
    free = [{"prompt": PROMPTS[name], "sampling_params": sampling} for name in FREE]
    alone = [engine.generate(**request)["output_ids"] for request in free]
    outputs = ask(engine, requests + free)
    constrained = outputs[: len(requests)]
    finished = [check(*pair) for pair in zip(requests, constrained, strict=True)]
    assert sum(finished) >= 0.8 * len(requests), "numbers and lists may go on for ever"
    assert [output["output_ids"] for output in outputs[len(requests) :]] == alone
    num_schemas = len(requests) - len(REGEXES)
    return (
        f"{sum(finished[: len(REGEXES)])} of {len(REGEXES)} answers under a regex were finished, "
        f"{sum(finished[len(REGEXES) :])} of {num_schemas} under a schema, and all of these match"
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_match_and_their_neighbours_get_what_they_get_alone(
    engine, temperature, is_full, record_property
):
    if not is_full and temperature == 0.0:
        pytest.skip("one of the sample; all with --full")
    requests = constrained(temperature, SCHEMAS if is_full else SAMPLE)
    told = check_beside_free_requests(engine, requests)
    record_property(STRUCTURED, f"temperature {temperature}: {told}")


def test_several_samples_stops_and_log_probabilities(engine):
    sampling = {"temperature": 1.0, "regex": r"(yes|no|perhaps), \d{1,2}\.", "max_new_tokens": 20}
    outputs = engine.generate("Will it rain? ", {**sampling, "n": 4}, return_logprob=True)
    assert len(outputs) == 4
    for output in outputs:
        assert re.fullmatch(sampling["regex"], output["text"])
        logprobs = output["meta_info"]["output_token_logprobs"]
        assert len(logprobs) == len(output["output_ids"])
        assert all(value < 0 for value, *_ in logprobs), "those of the model, not of the grammar"
    stopped = engine.generate("Will it rain? ", {**sampling, "stop": ","})
    assert stopped["text"] in ("yes", "no", "perhaps")
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": ","}
    cut = engine.generate("x", {"regex": "a{100}", "max_new_tokens": 3, "temperature": 0})
    assert cut["meta_info"]["finish_reason"]["type"] == "length"


def test_a_wrong_grammar_is_refused_and_harms_nobody(engine):
    for wrong in ({"regex": "("}, {"json_schema": {"type": "thing"}}, {"ebnf": "root ::= ("}):
        with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
            engine.generate("x", wrong)
    assert engine.generate("x", {"regex": "ab|cd", "temperature": 0})["text"] in ("ab", "cd")


@pytest.mark.alone
def test_the_next_plan_is_sent_before_the_tokens_that_its_masks_need(tmp_path):
    trace = tmp_path / "steps.jsonl"
    sampling = {"temperature": 0, "max_new_tokens": 120, "regex": "[a-z ]{1000}"}
    flags = {"trace_steps": str(trace), "num_cpu_threads": 1, "random_seed": 0}
    with sgl.Engine(**flags) as engine:
        engine.generate("warm", {**sampling, "max_new_tokens": 1})
        engine.generate([PROMPTS[name] for name in FREE], sampling)
    steps = [json.loads(line) for line in trace.read_text().splitlines()][2:]
    pairs = list(itertools.pairwise(steps))
    early = sum(later["sent"] < earlier["arrived"] for earlier, later in pairs)
    assert early / len(pairs) >= 0.9


WAYS = {
    "no overlap": {"disable_overlap_schedule": True},
    "small chunks and pages": {"chunked_prefill_size": 16, "page_size": 4},
}


@pytest.mark.parametrize("engine", WAYS.values(), ids=WAYS, indirect=True)
def test_answers_match_in_other_ways_to_run(engine):
    check_beside_free_requests(engine, constrained(1.0)[:2])


@pytest.mark.parametrize("engine", [{"tp_size": 3}], ids=["three ranks"], indirect=True)
def test_ranks_agree_on_what_a_grammar_allows(engine):
    [output] = ask(engine, [request := constrained(1.0)[1]])
    assert check(request, output)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("server")
    with Server([], folder) as server:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-")


PERSON = SCHEMAS["person"]
MESSAGES = [{"role": "user", "content": "Give me an example of a person as JSON."}]


def test_the_openai_client_gets_what_its_schema_says(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    answer = client.chat.completions.create(
        model="default", messages=MESSAGES, response_format=wanted
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)
    assert answer.choices[0].finish_reason == "stop"


def test_streamed_pieces_are_the_answer(client):
    pieces = client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        stream=True,
        temperature=1.0,
        extra_body={"guided_json": PERSON},
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    jsonschema.validate(json.loads(text), PERSON)


def test_choices_and_wrong_grammars_over_http(client):
    wanted = {"structured_outputs": {"choice": ["cats.", "dogs!"]}}
    answer = client.completions.create(model="default", prompt="I like ", extra_body=wanted)
    assert answer.choices[0].text in ("cats.", "dogs!")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="look-around"):
            client.completions.create(
                model="default", prompt="x", stream=stream, extra_body={"regex": "a(?=b)"}
            )


SHORT_TEXT = {"type": "string", "minLength": 1, "maxLength": 12}
FUNCTIONS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": SHORT_TEXT, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
    },
    "add_person": PERSON,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in FUNCTIONS.items()
]
ADD_PERSON = {"type": "function", "function": {"name": "add_person"}}


CALLING = {
    "model": "default",
    "messages": [{"role": "user", "content": "Will it rain in Paris tomorrow?"}],
    "tools": TOOLS,
    "temperature": 1.0,
}


def test_a_call_that_must_come_fits_its_function(client):
    answer = client.chat.completions.create(
        **CALLING, tool_choice="required", parallel_tool_calls=False
    )
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), FUNCTIONS[call.function.name])
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_streams_of_a_function_that_was_named(client):
    stream = client.chat.completions.create(**CALLING, tool_choice=ADD_PERSON, stream=True, n=2)
    pieces = [piece.choices[0] for piece in stream]
    for index in (0, 1):
        mine = [piece for piece in pieces if piece.index == index]
        told = [call.function for piece in mine for call in piece.delta.tool_calls or []]
        assert [function.name for function in told if function.name] == ["add_person"]
        assert len(told) > 3, "arguments are told while they are written"
        arguments = "".join(function.arguments for function in told)
        jsonschema.validate(json.loads(arguments), PERSON)
        assert mine[-1].finish_reason == "tool_calls"


def test_parameters_that_no_grammar_can_keep_are_refused(client):
    wrong = {"properties": {"a": {"type": "thing"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": wrong}}]
    for stream in (False, True):
        asked = CALLING | {"tools": tools, "tool_choice": "required", "stream": stream}
        with pytest.raises(openai.BadRequestError, match="tools: "):
            client.chat.completions.create(**asked)
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        client.chat.completions.create(**CALLING)

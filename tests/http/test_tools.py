"""Tools and reasoning over HTTP, with the client that people use."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fakes import in_loop
from ingress_server import Server, server

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.city }})"
    "{% endfor %}{% endfor %}{% if enable_thinking is false %}<think></think>{% endif %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "parameters": PARAMETERS, "strict": True}
TOOLS: list[Any] = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": {"name": "f"}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "Is it warm in Rome?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CALLS = f'I look.\n{CALL}\n<tool_call>{{"name": "f", "arguments": {{}}}}</tool_call>'
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    defaults = {"model": "default", "messages": MESSAGES, "tools": TOOLS}
    return client.chat.completions.create(**(defaults | fields))


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    """What the client's own accumulator makes of the stream."""
    tools = TOOLS[:1]
    async with client.chat.completions.stream(
        model="default", messages=MESSAGES, tools=tools, **fields
    ) as stream:
        return await stream.get_final_completion()


def prompt_of(s: Server) -> str:
    ids = s.engine.seen[-1].prompt_ids
    return bytes(ids[::4]).decode()


@in_loop
async def test_calls_of_a_whole_answer() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s, s.openai() as client:
        s.engine.script = CALLS
        answer = await ask(client, n=2)
        assert prompt_of(s) == "[weather][f]<user>Is it warm in Rome?"
        ids = set()
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "I look."
            first, second = choice.message.tool_calls
            assert (first.type, first.function.name) == ("function", "weather")
            assert json.loads(first.function.arguments) == {"city": "Rome"}
            assert (second.function.name, second.function.arguments) == ("f", "{}")
            ids |= {first.id, second.id}
        assert len(ids) == 4
        assert all(call_id.startswith("call_") for call_id in ids)
        s.engine.script = CALL
        assert (await ask(client)).choices[0].message.content is None


@in_loop
async def test_chunks_of_a_stream_have_each_name_once() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s:
        s.engine.script = CALLS
        body = {"messages": MESSAGES, "tools": TOOLS, "n": 2}
        events = [event["choices"][0] for event in await s.events("/v1/chat/completions", body)]
        for index in (0, 1):
            choices = [choice for choice in events if choice["index"] == index]
            deltas = [choice["delta"] for choice in choices]
            assert deltas[0] == {"role": "assistant", "content": None}
            assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
            told = [call for delta in deltas for call in delta.get("tool_calls", [])]
            begun = [call for call in told if "id" in call]
            assert [(c["index"], c["type"], c["function"]) for c in begun] == [
                (0, "function", {"name": "weather", "arguments": ""}),
                (1, "function", {"name": "f", "arguments": ""}),
            ]
            rest = [call for call in told if "id" not in call]
            assert all(set(call) == {"index", "function"} for call in rest)
            arguments = "".join(c["function"]["arguments"] for c in rest if c["index"] == 0)
            assert json.loads(arguments) == {"city": "Rome"}
            reasons = [choice["finish_reason"] for choice in choices]
            assert reasons == [None] * (len(choices) - 1) + ["tool_calls"]


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
@in_loop
async def test_the_client_puts_streams_together(choice: Any) -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s, s.openai() as client:
        s.engine.script = CALL
        answer = await streamed(client, tool_choice=choice)
        [call] = answer.choices[0].message.tool_calls
        assert call.function.parsed_arguments == {"city": "Rome"}
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        grammar = s.engine.seen[-1].grammar
        assert grammar is not None, "strict functions are held to their parameters"
        assert grammar.kind == "tools"


@in_loop
async def test_text_that_is_no_call_stays_text() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s, s.openai() as client:
        for text in ('<tool_call>{"name": "weather", "arg</tool_call>', "<tool_call> is a tag"):
            s.engine.script = text
            whole = (await ask(client)).choices[0]
            assert (whole.message.content, whole.message.tool_calls) == (text, None)
            assert whole.finish_reason == "stop"
            assert (await streamed(client)).choices[0].message.content == text


@in_loop
async def test_an_answer_that_was_cut_says_so() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s, s.openai() as client:
        s.engine.script = CALL
        answer = await ask(client, tool_choice="required", max_tokens=50)
        [call] = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "length"
        assert PARTIAL.startswith(call.function.arguments)
        assert 0 < len(call.function.arguments) < len(PARTIAL)


PARTIAL = '{"city": "Rome"}'


@in_loop
async def test_no_tools_are_shown_where_none_may_be_called() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s, s.openai() as client:
        s.engine.script = CALL
        answer = await ask(client, tool_choice="none")
        assert prompt_of(s) == "<user>Is it warm in Rome?"
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].finish_reason == "stop"


@in_loop
async def test_one_call_at_most_where_the_client_wants_that() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s, s.openai() as client:
        s.engine.script = CALLS
        answer = await ask(client, parallel_tool_calls=False)
        assert [c.function.name for c in answer.choices[0].message.tool_calls] == ["weather"]


@in_loop
async def test_results_go_back_to_the_model() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s, s.openai() as client:
        s.engine.script = CALL
        first = (await ask(client)).choices[0].message
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "30 C"}
        s.engine.script = "Yes."
        history = [*MESSAGES, first.model_dump(), result]
        answer = await ask(client, messages=history)
        assert prompt_of(s) == (
            "[weather][f]<user>Is it warm in Rome?<assistant>(weather Rome)<tool>30 C"
        )
        assert answer.choices[0].message.content == "Yes."
        unfinished = await ask(client, messages=history[:2])
        assert prompt_of(s).endswith("(weather Rome)"), "a call is no beginning of a text"
        assert unfinished.choices[0].message.content == "Yes."


@in_loop
async def test_templates_that_want_texts_as_arguments_get_them() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'json: ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    async with server(template=template, tool_call_parser="hermes") as s, s.openai() as client:
        call = {"id": "x", "type": "function"}
        call |= {"function": {"name": "f", "arguments": '{"a": 1}'}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        await ask(client, messages=[*MESSAGES, turn], max_tokens=1)
        assert prompt_of(s) == 'Is it warm in Rome?json: {"a": 1}'


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name", "letters"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name", "two tools are called weather"),
        ({"tools": [{"type": "web", "function": {"name": "a"}}]}, "tools[0].type", "web"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "function"),
        ({"tools": "all"}, "tools", "array"),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters.type",
            "object",
        ),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"properties": {"b": 5}}}}]},
            "tools[0].function.parameters.properties",
            "schemas",
        ),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"required": "b"}}}]},
            "tools[0].function.parameters.required",
            "list of names",
        ),
        ({"tool_choice": {"function": {"name": "g"}}}, "tool_choice", "weather, f"),
        ({"tool_choice": {"type": "x", "function": {"name": "f"}}}, "tool_choice", "the x 'f'"),
        ({"tool_choice": "sometimes"}, "tool_choice", "auto, none, required"),
        ({"tool_choice": 5}, "tool_choice", "int"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [], "tool_choice": "auto"}, "tool_choice", "needs tools"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "leave out the grammar",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "bool"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", "tools"),
        ({"separate_reasoning": 5}, "separate_reasoning", "bool"),
    ],
)
@in_loop
async def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, why: str) -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s:
        body = {"messages": MESSAGES, "tools": TOOLS} | fields
        status, answer = await s.post("/v1/chat/completions", body)
        assert status == 400
        assert answer["error"]["param"] == param
        assert why in answer["error"]["message"]


@in_loop
async def test_without_a_known_format_tools_are_refused_unless_they_must_be_called() -> None:
    async with server(template=TEMPLATE) as s, s.openai() as client:
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            await ask(client)
        s.engine.script = '{"name": "weather", "parameters": {"city": "Rome"}}'
        answer = await ask(client, tool_choice="required")
        [call] = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Rome"}


@in_loop
async def test_ids_of_mistral_are_what_its_templates_take() -> None:
    async with server(template="[TOOL_CALLS]{{ tools }}") as s, s.openai() as client:
        s.engine.script = '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'
        [call] = (await ask(client)).choices[0].message.tool_calls
        assert len(call.id) == 9
        assert call.id.isalnum()


@in_loop
async def test_reasoning_is_told_apart() -> None:
    async with (
        server(template=TEMPLATE, reasoning_parser="qwen3", tool_call_parser="hermes") as s,
        s.openai() as client,
    ):
        s.engine.script = f"<think>\nRome, so {CALL}?\n</think>\n\n{CALL}"
        message = (await ask(client)).choices[0].message
        assert message.reasoning_content == f"Rome, so {CALL}?"
        assert message.content is None
        assert [call.function.name for call in message.tool_calls] == ["weather"]
        chunks = await ask(client, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in chunks]
        thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert thoughts == message.reasoning_content
        assert any(delta.tool_calls for delta in deltas)

        s.engine.script = "<think>Hm.</think>Yes."
        message = (await ask(client, tools=[])).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
        together = await ask(client, tools=[], extra_body={"separate_reasoning": False})
        message = together.choices[0].message
        assert (message.reasoning_content, message.content) == (None, s.engine.script)


@in_loop
async def test_options_of_the_template_may_turn_thoughts_off() -> None:
    async with server(template=TEMPLATE, reasoning_parser="deepseek-r1") as s, s.openai() as client:
        s.engine.script = "Hm."
        message = (await ask(client, tools=[])).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", None)
        options = {"chat_template_kwargs": {"enable_thinking": False}}
        message = (await ask(client, tools=[], extra_body=options)).choices[0].message
        assert prompt_of(s).endswith("<think></think>")
        assert (message.reasoning_content, message.content) == (None, "Hm.")


@in_loop
async def test_logprobs_of_a_stream_are_complete() -> None:
    async with server(template=TEMPLATE, tool_call_parser="hermes") as s:
        s.engine.script = CALLS
        body = {"messages": MESSAGES, "tools": TOOLS, "logprobs": True}
        events = await s.events("/v1/chat/completions", body)
        logprobs = [event["choices"][0]["logprobs"] for event in events]
        tokens = [token["token"] for each in logprobs if each for token in each["content"]]
        assert "".join(tokens) == CALLS


@in_loop
async def test_texts_are_parsed_on_request() -> None:
    async with server(template=TEMPLATE) as s:
        body = {"text": CALLS, "tools": TOOLS, "tool_call_parser": "qwen25"}
        for path in ("/parse_function_call", "/function_call"):
            assert await s.post(path, body) == (
                200,
                {
                    "normal_text": "I look.",
                    "calls": [
                        {"tool_index": 0, "name": "weather", "parameters": '{"city": "Rome"}'},
                        {"tool_index": 1, "name": "f", "parameters": "{}"},
                    ],
                },
            )
        body = {"text": "Hm.</think> Yes.", "reasoning_parser": "deepseek_r1"}
        assert await s.post("/separate_reasoning", body) == (
            200,
            {"reasoning_text": "Hm.", "text": "Yes."},
        )
        for path, wrong, param in (
            ("/parse_function_call", {"text": "x", "tools": TOOLS}, "tool_call_parser"),
            ("/parse_function_call", body | {"tools": [], "tool_call_parser": "x"}, "hermes"),
            ("/parse_function_call", {"text": "x"}, "tools"),
            ("/separate_reasoning", {"text": "x", "reasoning_parser": "x"}, "reasoning_parser"),
            ("/separate_reasoning", {"text": 5}, "text"),
            ("/separate_reasoning", body | {"text": "x" * 100_001}, "100001"),
        ):
            status, answer = await s.post(path, wrong)
            assert status == 400
            assert param in answer["error"]["message"]
    async with server(reasoning_parser="qwen3", tool_call_parser="hermes") as s:
        status, answer = await s.post("/separate_reasoning", {"text": "<think>a</think>b"})
        assert (status, answer) == (200, {"reasoning_text": "a", "text": "b"})
        status, answer = await s.post("/parse_function_call", {"text": CALL, "tools": TOOLS})
        assert answer["calls"][0]["name"] == "weather"

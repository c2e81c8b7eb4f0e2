"""`/v1` bodies to calls and answers to JSON, without a server."""

from __future__ import annotations

import json
from array import array
from typing import Any

import orjson
import pytest
from fakes import LetterTokenizer

from sgl.constrained.grammar import parse_grammar
from sgl.errors import InvalidRequestError, PromptTooLongError
from sgl.messages import Finish, LogprobOptions, Logprobs, TextDelta, pack
from sgl.protocol.call import Answer
from sgl.protocol.chat_template import ChatTemplate
from sgl.protocol.openai import Server, openai_error
from sgl.protocol.openai_chat import ChatRequest, parse_chat
from sgl.protocol.openai_chat_reply import ChatReply
from sgl.protocol.openai_completions import CompletionRequest, parse_completion
from sgl.protocol.openai_completions_reply import CompletionReply
from sgl.sampling_params import GrammarKind

SERVER = Server(model_name="letters", reports_cached=True)
TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(orjson.dumps({"model": "m", "prompt": "ab"} | fields), SERVER)


def chat(**fields: Any) -> ChatRequest:
    body = orjson.dumps({"model": "m", "messages": HELLO} | fields)
    return parse_chat(body, SERVER, TEMPLATE)


def answer(text: str = "cd", ids: tuple[int, ...] = (99, 100), **fields: Any) -> Answer:
    made = Answer(**({"index": 0, "rid": "r", "prompt_ids": array("i", b"\1\0\0\0")} | fields))
    made.add(TextDelta(1, text, pack(ids), num_cached=1))
    return made


def logprobs(values: list[float], top: list[float], top_ids: list[int]) -> Logprobs:
    return Logprobs(array("f", values).tobytes(), array("f", top).tobytes(), pack(top_ids))


def test_the_defaults_are_those_of_the_api() -> None:
    sampling = completion().call.prompts[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature) == (16, 1.0)
    sampling = chat().call.prompts[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature) == (None, 0.7)


def test_fields_reach_the_sampling_parameters() -> None:
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "seed": 3,
        "stop": ["x"],
        "logit_bias": {"97": -100},
        "n": 2,
        "min_tokens": 1,
        "top_k": 5,
        "repetition_penalty": 1.5,
        "user": "me",
        "store": True,
    }
    request = completion(max_tokens=4, **fields)
    sampling = request.call.prompts[0].sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.top_k) == (4, 1, 5)
    assert sampling.logit_bias == {97: -100.0}
    assert (sampling.stop, sampling.seed, request.call.n) == (("x",), 3, 2)


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("ab", ["ab"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [array("i", [1, 2])]),
        ([[1], [2, 3]], [array("i", [1]), array("i", [2, 3])]),
    ],
)
def test_a_prompt_has_four_shapes(prompt: Any, parsed: list[Any]) -> None:
    assert [call.prompt for call in completion(prompt=prompt).call.prompts] == parsed


def test_the_newer_name_of_max_tokens_wins() -> None:
    sampling = chat(max_tokens=5, max_completion_tokens=3).call.prompts[0].sampling
    assert sampling.max_new_tokens == 3


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (HELLO, "<user>hello<assistant>"),
        (
            [{"role": "developer", "content": "be kind"}, *HELLO],
            "<system>be kind<user>hello<assistant>",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": t} for t in ("hel", "lo")]}],
            "<user>hello<assistant>",
        ),
        ([*HELLO, {"role": "assistant", "content": "Well,"}], "<user>hello<assistant>Well,"),
    ],
)
def test_messages_become_one_prompt(messages: list[Any], prompt: str) -> None:
    request = chat(messages=messages)
    assert request.call.prompts[0].prompt == prompt
    assert not request.call.add_special_tokens


def test_stops_of_the_template_do_not_outlive_the_request() -> None:
    template = ChatTemplate.load("chatml")
    body = {"messages": HELLO, "stop": "mine"}
    first = parse_chat(orjson.dumps(body), SERVER, template)
    second = parse_chat(orjson.dumps({"messages": HELLO}), SERVER, template)
    assert first.call.prompts[0].sampling.stop == ("mine", *template.stop)
    assert second.call.prompts[0].sampling.stop == template.stop


def test_a_request_may_use_up_its_own_stops_beside_those_of_the_template() -> None:
    template = ChatTemplate.load("llama-2")
    mine = [f"stop {number}" for number in range(16)]
    body = orjson.dumps({"messages": HELLO, "stop": mine})
    stops = parse_chat(body, SERVER, template).call.prompts[0].sampling.stop
    assert stops == (*mine, *template.stop)
    with pytest.raises(InvalidRequestError, match="at most 16"):
        parse_chat(orjson.dumps({"messages": HELLO, "stop": ["x"] * 17}), SERVER, template)


def test_an_assistants_last_message_begins_the_answer_in_a_built_in_format() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "So"}]
    call = parse_chat(
        orjson.dumps({"messages": messages}), SERVER, ChatTemplate.load("vicuna_v1.1")
    ).call
    assert str(call.prompts[0].prompt).endswith("ASSISTANT: So")
    assert call.add_special_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "["}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": None}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"n": 0}, "n"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
    ],
)
def test_a_wrong_chat_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": 5}, "stop"),
    ],
)
def test_a_wrong_completion_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_tools_that_may_not_be_called_are_accepted() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools, tool_choice="none").call.prompts[0].prompt == "<user>hello<assistant>"


def test_a_model_without_template_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match="--chat-template"):
        parse_chat(orjson.dumps({"messages": HELLO}), SERVER, None)


def test_errors_have_the_envelope_of_the_api() -> None:
    assert openai_error(PromptTooLongError("too long", param="prompt")) == {
        "error": {
            "message": "too long",
            "type": "BadRequestError",
            "param": "prompt",
            "code": "context_length_exceeded",
        }
    }


def test_errors_name_the_fields_of_the_api() -> None:
    error = InvalidRequestError("min_new_tokens is over max_new_tokens", param="max_new_tokens")
    shown = openai_error(error)["error"]
    assert (shown["message"], shown["param"]) == ("min_tokens is over max_tokens", "max_tokens")


def test_a_completion_counts_a_prompt_once_for_all_samples() -> None:
    request = completion(n=2)
    done = Finish("stop", matched="x")
    answers = [answer(index=0, finish=done), answer(index=1, finish=done)]
    whole = CompletionReply(request, LetterTokenizer()).whole(answers)
    assert whole["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 4,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["choices"][0]["matched_stop"] == "x"
    assert whole["object"] == "text_completion"


def test_echo_and_logprobs_start_with_the_prompt() -> None:
    request = completion(echo=True, logprobs=2)
    assert request.call.prompts[0].logprobs == LogprobOptions(start_len=0, top_num=2)
    growing = answer(
        prompt_ids=array("i", [97, 98]), logprob_options=request.call.prompts[0].logprobs
    )
    growing.input_logprobs.add(logprobs([float("nan"), -1], [0, 0, -1, -2], [97, 97, 98, 99]))
    growing.output_logprobs.add(logprobs([-2, -3], [-1, -2, -3, -4], [98, 99, 100, 100]))
    [choice] = CompletionReply(request, LetterTokenizer()).whole([growing])["choices"]
    assert choice["text"] == "abcd"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "d"],
        "token_logprobs": [None, -1.0, -2.0, -3.0],
        "top_logprobs": [
            None,
            {"b": -1.0, "c": -2.0},
            {"b": -1.0, "c": -2.0},
            {"d": -3.0},
        ],
        "text_offset": [0, 1, 2, 3],
    }


def test_logprobs_zero_gives_the_tokens_alone() -> None:
    request = completion(logprobs=0)
    growing = answer(logprob_options=request.call.prompts[0].logprobs)
    growing.output_logprobs.add(logprobs([-2, -3], [], []))
    [choice] = CompletionReply(request, LetterTokenizer()).whole([growing])["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-2.0, -3.0]
    assert choice["logprobs"]["top_logprobs"] is None


def test_a_completion_stream_tells_the_echo_once_and_offsets_go_on() -> None:
    request = completion(prompt=[97, 98], echo=True, logprobs=0, stream=True)
    stream = CompletionReply(request, LetterTokenizer())
    growing = answer("c", (99,), logprob_options=LogprobOptions())
    growing.output_logprobs.add(logprobs([-1], [], []))
    [first] = stream.progress(growing)
    growing.add(TextDelta(1, "d", pack([100]), finish=Finish("length", length=2)))
    growing.output_logprobs.add(logprobs([-1], [], []))
    [second] = stream.progress(growing)
    assert [event["choices"][0]["text"] for event in (first, second)] == ["abc", "d"]
    assert [event["choices"][0]["finish_reason"] for event in (first, second)] == [None, "length"]
    assert second["choices"][0]["logprobs"]["text_offset"] == [1]
    assert first["id"] == second["id"]


def test_tokens_without_text_make_no_event() -> None:
    growing = answer("", (200,))
    assert CompletionReply(completion(), LetterTokenizer()).progress(growing) == []
    assert ChatReply(chat(), LetterTokenizer()).progress(growing) == []


def test_a_chat_stream_opens_with_the_role_and_ends_with_usage() -> None:
    request = chat(stream=True, stream_options={"include_usage": True})
    stream = ChatReply(request, LetterTokenizer())
    growing = answer("c", (99,))
    [opening] = stream.opening([growing])
    [first] = stream.progress(growing)
    growing.add(TextDelta(1, "", b"", finish=Finish("stop", matched=0)))
    [last] = stream.progress(growing)
    [usage] = stream.closing([growing])
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["choices"][0]["delta"] == {"content": "c"}
    assert first["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert first["usage"] is None
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 1
    assert len({event["id"] for event in (opening, first, last, usage)}) == 1


def test_chat_logprobs_have_the_bytes_of_each_token() -> None:
    request = chat(logprobs=True, top_logprobs=1)
    growing = answer("é", (233,), logprob_options=request.call.prompts[0].logprobs)
    growing.output_logprobs.add(logprobs([-0.5], [-0.5], [233]))
    [choice] = ChatReply(request, LetterTokenizer()).whole([growing])["choices"]
    token = {"token": "é", "bytes": [0xC3, 0xA9], "logprob": -0.5}
    assert choice["logprobs"] == {"content": [token | {"top_logprobs": [token]}]}


def test_chat_logprobs_without_alternatives_have_an_empty_list() -> None:
    request = chat(logprobs=True)
    growing = answer("c", (99,), logprob_options=request.call.prompts[0].logprobs)
    growing.output_logprobs.add(logprobs([-0.5], [], []))
    [choice] = ChatReply(request, LetterTokenizer()).whole([growing])["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


A_OR_B = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": A_OR_B}}


@pytest.mark.parametrize(
    ("fields", "kind", "like"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        ({"response_format": JSON_FORMAT}, "json_schema", A_OR_B),
        ({"json_schema": A_OR_B}, "json_schema", A_OR_B),
        ({"json_schema": json.dumps(A_OR_B)}, "json_schema", A_OR_B),
        ({"guided_json": A_OR_B}, "json_schema", A_OR_B),
        ({"structured_outputs": {"json": A_OR_B}}, "json_schema", A_OR_B),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
        ({"regex": "a+"}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_choice": ["a.b", "c"]}, "regex", r"a\.b|c"),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, "regex", r"a\.b|c"),
        ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
    ],
)
def test_grammars_in_all_spellings(fields: dict[str, Any], kind: str, like: Any) -> None:
    wanted = parse_grammar(GrammarKind(kind), like)
    assert chat(**fields).call.prompts[0].grammar == wanted
    body = orjson.dumps({"prompt": ["x", "y"], **fields})
    both = parse_completion(body, SERVER).call.prompts
    assert [prompt.grammar for prompt in both] == [wanted] * 2


def test_no_grammar_is_none() -> None:
    fields = {"response_format": {"type": "text"}, "regex": None, "structured_outputs": None}
    assert chat(**fields).call.prompts[0].grammar is None


def test_an_unknown_field_is_ignored_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        completion(no_such_field=1)
        chat(no_such_field=1)
    told = [record.message for record in caplog.records if "no_such_field" in record.message]
    assert len(told) == 1

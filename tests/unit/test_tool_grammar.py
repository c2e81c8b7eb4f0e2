"""Grammars of calls and of what comes after thoughts, compiled for a real tokenizer."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from tokenizers import AddedToken

from sgl.constrained.grammar import parse_grammar
from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, VocabularyFacts
from sgl.errors import InvalidRequestError
from sgl.model_files import demo_model_path
from sgl.protocol.answer_format import AnswerFormat, known_markers
from sgl.protocol.answer_parts import Arguments, CallBegun, Content, Thought, joined
from sgl.protocol.reasoning import CLOSE, OPEN, Thinking
from sgl.protocol.tool_formats import TOOL_FORMATS
from sgl.protocol.tools import ChosenFunction, ChosenTool, Tool, tool_use
from sgl.sampling_params import Grammar, GrammarKind
from sgl.tokenizer import Tokenizer

TOKENS = {"<tool_call>": False, "</tool_call>": False, "[TOOL_CALLS]": True, "<|python_tag|>": True}
TOKENS |= {OPEN: False, CLOSE: True}
CITY = {"type": "string", "minLength": 1, "maxLength": 4}
SCHEMAS: dict[str, dict[str, Any] | None] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": CITY,
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
        },
        "required": ["city"],
        "$defs": {"day": {"type": "integer", "minimum": 0, "maximum": 31}},
    },
    "optional": {"properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}},
    "nothing": None,
}


def tools(strict: bool | None = None, **schemas: dict[str, Any] | None) -> list[Tool]:
    functions = [
        {"name": name, "parameters": schema, "strict": strict}
        for name, schema in (schemas or SCHEMAS).items()
    ]
    return [msgspec.convert({"function": function}, Tool) for function in functions]


def named(name: str) -> ChosenTool:
    return ChosenTool(function=ChosenFunction(name=name))


class Model:
    """A vocabulary, with or without tokens of its own for the markers."""

    def __init__(self, has_tokens: bool) -> None:
        self.tokenizer = Tokenizer.load(demo_model_path())
        fast = self.tokenizer._fast
        for text, special in TOKENS.items() if has_tokens else ():
            fast.add_tokens([AddedToken(text, special=special)])
        self.vocab_size = fast.get_vocab_size()
        self.markers = known_markers(fast.token_to_id)
        end_ids = tuple(sorted(self.tokenizer.eos_ids))
        self.vocabulary = GrammarVocabulary(
            VocabularyFacts(self.tokenizer.to_json(), self.vocab_size, end_ids)
        )

    def answers(self, form: str) -> AnswerFormat:
        return AnswerFormat(tools=TOOL_FORMATS[form], markers=self.markers)

    def draw(self, grammar: Grammar, seed: int, most: int = 60) -> str:
        """Draws among the allowed tokens; ends where it can after `most`."""
        rng = random.Random(seed)
        matcher = CompiledGrammar.of(grammar, self.vocabulary).matcher()
        ids: list[int] = []
        words = np.zeros(matcher.num_words, np.uint32)
        while not matcher.has_ended and not (matcher.may_end and len(ids) >= most):
            matcher.write_mask(words)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            choices = sorted(set(np.flatnonzero(bits).tolist()) - self.tokenizer.eos_ids)
            if not choices:
                break
            ids.append(rng.choice(choices))
            assert matcher.take([ids[-1]])
            assert len(ids) < 20 * most
        assert matcher.may_end
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def accepts(self, grammar: Grammar, text: str) -> bool:
        matcher = CompiledGrammar.of(grammar, self.vocabulary).matcher()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return matcher.take(list(ids)) and matcher.may_end


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "no tokens"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


def calls_of(answers: AnswerFormat, text: str, use: Any) -> tuple[str, list[tuple[str, Any]]]:
    reader = answers.reading(use, Thinking.OVER, is_sure=True).reader()
    parts = reader.whole(text)
    names = [part.name for part in parts if isinstance(part, CallBegun)]
    arguments = [""] * len(names)
    for part in parts:
        if isinstance(part, Arguments):
            arguments[part.index] += part.text
    calls = list(zip(names, map(json.loads, arguments), strict=True))
    return "".join(part.text for part in parts if isinstance(part, Content)), calls


def check_calls(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        schema = SCHEMAS[name] or {"type": "object", "maxProperties": 0}
        jsonschema.validate(arguments, schema)
        assert set(arguments) <= set(schema.get("properties", {}))


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("choice", ["required", "one at a time", *SCHEMAS])
def test_whatever_is_drawn_is_a_call_that_fits(model, form, choice):
    is_named = choice in SCHEMAS
    parallel = False if choice == "one at a time" else None
    use = tool_use(tools(), named(choice) if is_named else "required", parallel)
    answers = model.answers(form)
    grammar = answers.grammar(use, None, Thinking.OVER)
    for seed in range(3):
        content, calls = calls_of(answers, model.draw(grammar, seed), use)
        assert content == ""
        assert len(calls) >= 1
        check_calls(calls)
        if is_named:
            assert [name for name, _ in calls] == [choice]
        if parallel is False:
            assert len(calls) == 1


TEXT_OF_CALL = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "X"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "X"}}]',
    "llama3": '{"name": "get_weather", "parameters": {"city": "X"}}',
    "pythonic": '[get_weather(city="X")]',
}


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_strict_functions_are_free_to_be_called(model, form):
    answers, call = model.answers(form), TEXT_OF_CALL[form]
    auto = tool_use(tools(strict=True), "auto", None)
    grammar = answers.grammar(auto, None, Thinking.OVER)
    assert grammar.kind is GrammarKind.TOOLS
    assert model.accepts(grammar, "No, thanks <b>\n")
    assert model.accepts(grammar, call)
    assert not model.accepts(grammar, call.replace('"X"', "5"))
    assert not model.accepts(grammar, call.replace("get_weather", "get_whatever"))
    if form in ("hermes", "mistral"):
        assert model.accepts(grammar, f"I look. {call}")
    assert answers.grammar(tool_use(tools(), "auto", None), None, Thinking.OVER) is None


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_an_answer_with_a_grammar_or_calls(model, form):
    answers, call = model.answers(form), TEXT_OF_CALL[form]
    wanted = parse_grammar(GrammarKind.REGEX, "yes|no")
    auto = tool_use(tools(), None, None)
    if form == "pythonic":
        call = "[nothing()]"
        auto = tool_use(tools(nothing=None, strict=True), None, None)
    grammar = answers.grammar(auto, wanted, Thinking.OVER)
    assert model.accepts(grammar, "yes")
    assert model.accepts(grammar, call)
    assert not model.accepts(grammar, "perhaps")
    with pytest.raises(InvalidRequestError, match="leave out the grammar"):
        answers.grammar(tool_use(tools(), "required", None), wanted, Thinking.OVER)


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_a_grammar_holds_after_thoughts_only(model, form):
    answers = model.answers(form)
    use = tool_use(tools(), "required", None)
    regex = parse_grammar(GrammarKind.REGEX, "yes|no")
    for grammar, text in (
        (answers.grammar(use, None, Thinking.BEGUN), TEXT_OF_CALL[form]),
        (answers.grammar(None, regex, Thinking.BEGUN), "yes"),
    ):
        assert model.accepts(grammar, f"I <b> or {{no}}:\n</think>\n\n{text}")
        assert model.accepts(grammar, f"<think>\nHm.</think>{text}")
        assert not model.accepts(grammar, text)
        assert not model.accepts(grammar, "Hm.</think>\n\nperhaps")
    possible = answers.grammar(None, regex, Thinking.POSSIBLE)
    assert possible.kind is GrammarKind.REGEX
    assert model.accepts(possible, "<think>\n\n</think>\n\nno")
    assert model.accepts(possible, "no")
    assert not model.accepts(possible, "Hm.</think>no")
    assert answers.grammar(None, regex, Thinking.OVER) == regex
    assert answers.grammar(None, None, Thinking.BEGUN) is None


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_a_schema_holds_beside_calls_and_after_thoughts(model, form):
    answers = model.answers(form)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = parse_grammar(GrammarKind.JSON_SCHEMA, schema)
    auto = tool_use(tools(), None, None)
    thought = answers.grammar(None, wanted, Thinking.BEGUN)
    cases = [(thought, "Hm.</think>\n\n")]
    if form in ("hermes", "mistral"):
        cases += [
            (answers.grammar(auto, wanted, Thinking.OVER), ""),
            (answers.grammar(auto, wanted, Thinking.BEGUN), "Hm.</think>"),
        ]
    else:
        with pytest.raises(InvalidRequestError, match="either a call or JSON"):
            answers.grammar(auto, wanted, Thinking.OVER)
    for grammar, before in cases:
        assert model.accepts(grammar, before + '{"a": 5}')
        assert not model.accepts(grammar, before + '{"a": "five"}')
    assert not model.accepts(thought, '{"a": 5}')


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"properties": {"from": {}}}, "no name in Python"),
        ({"properties": {"a-b": {}}}, "no name in Python"),
        ({"anyOf": [{}]}, "'anyOf'"),
        ({"additionalProperties": {"type": "string"}}, "additionalProperties"),
    ],
)
def test_what_python_cannot_write_is_refused(schema, why):
    answers = AnswerFormat(tools=TOOL_FORMATS["pythonic"])
    use = tool_use(tools(f=schema), "required", None)
    with pytest.raises(InvalidRequestError, match=why) as caught:
        answers.grammar(use, None, Thinking.OVER)
    assert caught.value.param == "tools"


def test_a_schema_that_cannot_be_kept_is_refused_when_it_is_compiled(model):
    use = tool_use(tools(f={"properties": {"a": {"type": "thing"}}}), "required", None)
    grammar = model.answers("hermes").grammar(use, None, Thinking.OVER)
    with pytest.raises(InvalidRequestError, match=r"^tools: ") as caught:
        CompiledGrammar.of(grammar, model.vocabulary)
    assert caught.value.param == "tools"
    huge = tools(f={"properties": {"a": {"enum": ["x" * 1_000_000]}}})
    with pytest.raises(InvalidRequestError, match="at most 1000000"):
        model.answers("hermes").grammar(tool_use(huge, "required", None), None, Thinking.OVER)


def test_a_model_of_unknown_format_writes_json_only_if_it_must():
    answers = AnswerFormat(markers=known_markers(lambda text: None))
    with pytest.raises(InvalidRequestError, match="--tool-call-parser"):
        answers.reading(tool_use(tools(), "auto", None), Thinking.OVER, is_sure=False)
    use = tool_use(tools(), named("nothing"), None)
    assert answers.grammar(use, None, Thinking.OVER) is not None
    text = '{"name": "nothing", "parameters": {}}'
    assert calls_of(answers, text, use) == ("", [("nothing", {})])


def test_special_tokens_are_kept_only_where_they_are_needed():
    ids = dict(zip(TOKENS, range(10, 16), strict=True))
    answers = AnswerFormat(tools=TOOL_FORMATS["mistral"], markers=known_markers(ids.get))
    use = tool_use(tools(), "auto", None)
    assert answers.reading(use, Thinking.OVER, is_sure=False).kept_ids == (12,)
    assert answers.reading(use, Thinking.POSSIBLE, is_sure=False).kept_ids == (12, 14, 15)
    assert answers.reading(None, Thinking.OVER, is_sure=False).kept_ids == ()


def test_thoughts_before_a_call_that_was_drawn(model):
    answers = model.answers("hermes")
    use = tool_use(tools(), named("nothing"), None)
    grammar = answers.grammar(use, None, Thinking.BEGUN)
    call = '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'
    text = f"Hm.\n</think>\n{call}"
    assert model.accepts(grammar, text)
    reader = answers.reading(use, Thinking.BEGUN, is_sure=True).reader()
    parts = joined([part for char in text for part in reader.feed(char)] + reader.finish())
    assert parts == [Thought("Hm."), CallBegun(0, "nothing"), Arguments(0, "{}")]

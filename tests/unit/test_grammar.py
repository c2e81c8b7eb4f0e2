"""Grammars as clients write them, compiled for a real tokenizer."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import tokenizers
from grammar_draws import allowed_ids, draw_answer
from tokenizers import decoders, models, normalizers, trainers

from sgl.constrained import compiler as compiler_module
from sgl.constrained.compiler import GrammarCompiler
from sgl.constrained.grammar import parse_grammar
from sgl.constrained.matcher import (
    CompiledGrammar,
    GrammarVocabulary,
    Matcher,
    VocabularyFacts,
)
from sgl.constrained.regex import as_rust_reads_it
from sgl.errors import EngineError, InvalidRequestError, OverloadedError
from sgl.model_files import demo_model_path
from sgl.sampling_params import GrammarKind as Kind
from sgl.tokenizer import Tokenizer

VOCAB_SIZE = 49_160  # of the logits: eight more than the tokenizer has
NUM_IDS = 49_152


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model_path())


@pytest.fixture(scope="module")
def facts(tokenizer) -> VocabularyFacts:
    return VocabularyFacts(tokenizer.to_json(), VOCAB_SIZE, tuple(tokenizer.eos_ids))


@pytest.fixture(scope="module")
def vocabulary(facts) -> GrammarVocabulary:
    return GrammarVocabulary(facts)


def random_answer(kind, source, tokenizer, vocabulary, seed=0) -> str:
    compiled = CompiledGrammar.of(parse_grammar(kind, source), vocabulary)
    answer = draw_answer(compiled, tokenizer, seed)
    assert answer is not None, "it does not end"
    return answer


REGEXES = [
    r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)",
    r"^\d{4}-\d{2}-\d{2}$",
    r"(é|ü|日本|🙂){1,5}",
    r'\{"name": "[\w\d ]{1,16}", "alive": "(Alive|Deceased)"\}',
]


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_matches_the_regex(regex, seed, tokenizer, vocabulary):
    answer = random_answer(Kind.REGEX, regex, tokenizer, vocabulary, seed)
    assert re.fullmatch(regex, answer)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (r"\d{2}[\d.]\\d", r"[0-9]{2}[0-9.]\\d"),
        (r"[]a][^]b]c]", r"[]a][^]b]c]"),
        (r"[[a&&b~]\[", r"[\[a\&\&b\~]\["),
        ("a\\", "a\\"),
    ],
)
def test_a_regex_means_what_python_reads(pattern, wanted):
    assert as_rust_reads_it(pattern) == wanted


SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 3, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["id", "tags", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("source", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_validates(source, seed, tokenizer, vocabulary):
    answer = json.loads(random_answer(Kind.JSON_SCHEMA, source, tokenizer, vocabulary, seed))
    assert set(answer) == {"id", "tags", "ok"}
    assert 3 <= answer["id"] <= 99
    assert set(answer["tags"]) <= {"a", "b"}
    assert len(answer["tags"]) <= 3


def test_ids_that_are_no_tokens_are_never_allowed(vocabulary):
    matcher = CompiledGrammar.of(parse_grammar(Kind.REGEX, r"(.|\n)*"), vocabulary).matcher()
    choices = allowed_ids(matcher)
    assert 0.9 * NUM_IDS < choices.size <= NUM_IDS
    assert choices.max() < NUM_IDS


def test_ebnf_begins_at_root(tokenizer, vocabulary):
    ebnf = 'root ::= "Hello " name\nname ::= "Ann" | "Bob" [0-9]+'
    answer = random_answer(Kind.EBNF, ebnf, tokenizer, vocabulary)
    assert re.fullmatch("Hello (Ann|Bob[0-9]+)", answer)


def test_a_structural_tag_constrains_what_follows_its_trigger(tokenizer, vocabulary):
    tag = {
        "structures": [{"begin": "<call>", "end": "</call>", "schema": SCHEMA}],
        "triggers": ["<call"],
    }
    compiled = CompiledGrammar.of(parse_grammar(Kind.STRUCTURAL_TAG, tag), vocabulary)
    matcher = compiled.matcher()
    assert matcher.take(tokenizer.encode("Let me see. ", add_special_tokens=False))
    assert matcher.may_end
    assert matcher.take(tokenizer.encode("<call>", add_special_tokens=False))
    assert not matcher.take(tokenizer.encode("no", add_special_tokens=False))
    assert matcher.take(tokenizer.encode('{"id": 5', add_special_tokens=False))


def test_forced_tokens_are_those_of_the_tokenizer(tokenizer, vocabulary):
    compiled = CompiledGrammar.of(parse_grammar(Kind.REGEX, r'\{"name": "[a-z]+"\}'), vocabulary)
    matcher = compiled.matcher()
    forced = matcher.forced()
    assert tokenizer.decode(forced) == '{"name": "'
    assert matcher.take(forced)
    assert matcher.forced() == []
    assert not matcher.may_end


def pieces_vocabulary() -> GrammarVocabulary:
    """As SentencePiece's: spaces are part of the pieces, and bytes stand for unknown letters."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    space, end = decoders.Replace("▁", " "), decoders.Strip(" ", 1)
    made.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), end])
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + pieces, show_progress=False
    )
    made.train_from_iterator(["the name of the house is the name"] * 20, trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # as such they were no bytes
    facts = VocabularyFacts(json.dumps(content), made.get_vocab_size(), (2,))
    return GrammarVocabulary(facts)


def test_forced_tokens_of_a_vocabulary_of_pieces():
    vocabulary = pieces_vocabulary()
    source = parse_grammar(Kind.REGEX, "the name[ö]ß of (a|b)x is ?!")
    matcher = CompiledGrammar.of(source, vocabulary).matcher()
    ids: list[int] = []
    while not matcher.has_ended:
        taken = matcher.forced() or allowed_ids(matcher)[:1].tolist()
        assert matcher.take(taken)
        ids += taken
    text = vocabulary.tokenizer.decode_bytes(ids).decode()
    assert re.fullmatch("the nameöß of (a|b)x is ?!", text)
    assert len(ids) < len(text), "pieces, not letters"


def test_matchers_of_one_grammar_go_their_own_ways(tokenizer, vocabulary):
    compiled = CompiledGrammar.of(parse_grammar(Kind.REGEX, "[ab]{2}"), vocabulary)
    one, other = compiled.matcher(), compiled.matcher()
    a, b = (tokenizer.encode(letter, add_special_tokens=False) for letter in "ab")
    assert one.take(a)
    assert one.take(b)
    assert one.may_end
    assert not one.take(a), "a third letter is too many"
    assert not other.may_end
    assert other.take(b)


@pytest.mark.parametrize(
    ("kind", "source", "why"),
    [
        (Kind.REGEX, "[", "unclosed character class"),
        (Kind.REGEX, "a(?=b)", "look-around"),
        (Kind.REGEX, r"(a)\1", "backreferences"),
        (Kind.REGEX, {"a": 1}, "must be a string"),
        (Kind.JSON_SCHEMA, "{", "not valid JSON"),
        (Kind.JSON_SCHEMA, "[1]", "must be a JSON object"),
        (Kind.JSON_SCHEMA, [1], "must be a JSON object"),
        (Kind.JSON_SCHEMA, 5, "must be a JSON object"),
        (Kind.JSON_SCHEMA, {"type": "foo"}, "Invalid type: foo"),
        (Kind.JSON_SCHEMA, {"$ref": "#/nope"}, "'/nope' does not exist"),
        (Kind.JSON_SCHEMA, {"type": "array", "uniqueItems": True}, "uniqueItems"),
        (Kind.EBNF, 'root ::= "a', "ebnf"),
        (Kind.STRUCTURAL_TAG, {"structures": [], "triggers": []}, "structures is empty"),
        (Kind.STRUCTURAL_TAG, {"structures": 3}, "triggers|structures"),
    ],
)
def test_a_wrong_grammar_is_refused_with_a_sentence(kind, source, why, vocabulary):
    with pytest.raises(InvalidRequestError, match=why) as refused:
        CompiledGrammar.of(parse_grammar(kind, source), vocabulary)
    assert refused.value.param == kind


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (Kind.JSON_SCHEMA, nested(2000)),
        (Kind.JSON_SCHEMA, '{"a":' * 100_000),
        (Kind.JSON_SCHEMA, {"properties": {f"p{i}": {"pattern": "a*"} for i in range(10_000)}}),
        (Kind.REGEX, "x" * 1_000_001),
        (Kind.REGEX, "(" * 5000),
        (Kind.REGEX, "a{30000}"),
        (Kind.JSON_SCHEMA, {"$ref": "#"}),
        (Kind.JSON_SCHEMA, '{"minimum": NaN}'),
        (Kind.JSON_SCHEMA, {"type": "integer", "minimum": 10**400}),
        (Kind.JSON_SCHEMA, '{"enum": ["\\ud800"]}'),
        (Kind.EBNF, 'leaf ::= "a"'),
        (Kind.EBNF, "root ::= " + "(" * 100_000),
        (Kind.EBNF, 'root ::= "a"{' + "9" * 5000 + "}"),
    ],
)
def test_an_evil_grammar_is_refused(kind, source, vocabulary):
    with pytest.raises(InvalidRequestError):
        CompiledGrammar.of(parse_grammar(kind, source), vocabulary)


@pytest.mark.parametrize("options", [{"whitespace_pattern": ".*"}, {"lenient": True}, 5])
def test_a_schema_cannot_change_how_the_server_reads_it(options, vocabulary):
    schema = {"type": "integer", "x-guidance": options}
    tag = {"structures": [{"begin": "<", "end": ">", "schema": schema}], "triggers": ["<"]}
    for kind, source in ((Kind.JSON_SCHEMA, schema), (Kind.STRUCTURAL_TAG, tag)):
        with pytest.raises(InvalidRequestError, match="coerce_one_of and nothing else"):
            CompiledGrammar.of(parse_grammar(kind, source), vocabulary)


ONE_OF = {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "integer", "maximum": 9}]}


def test_a_schema_may_take_one_of_for_any_of(tokenizer, vocabulary):
    with pytest.raises(InvalidRequestError, match="coerce_one_of"):
        CompiledGrammar.of(parse_grammar(Kind.JSON_SCHEMA, ONE_OF), vocabulary)
    schema = ONE_OF | {"x-guidance": {"coerce_one_of": True}}
    assert json.loads(random_answer(Kind.JSON_SCHEMA, schema, tokenizer, vocabulary)) is not None


@pytest.mark.parametrize(("space", "is_allowed"), [("", False), ("[ ]{0,3}", True)])
def test_space_in_a_structure_is_the_servers(space, is_allowed, tokenizer, facts):
    item = {"const": 1, "x-guidance": {"whitespace_pattern": "[ ]{5}"}}
    schema = {"type": "array", "items": item, "minItems": 2}
    tag = {"structures": [{"begin": "<", "end": ">", "schema": schema}], "triggers": ["<"]}
    vocabulary = GrammarVocabulary(msgspec.structs.replace(facts, json_space=space))
    for kind, source, begin in (
        (Kind.STRUCTURAL_TAG, tag, "<[1,"),
        (Kind.JSON_SCHEMA, schema, "[1,"),
    ):
        matcher = CompiledGrammar.of(parse_grammar(kind, source), vocabulary).matcher()
        assert matcher.take(tokenizer.encode(begin, add_special_tokens=False))
        assert matcher.take(tokenizer.encode(" ", add_special_tokens=False)) is is_allowed


@pytest.mark.parametrize(
    ("kind", "source", "opening", "why"),
    [
        (Kind.REGEX, r"(.*\w.{60}[aeiou].{60}){30}", "a", "too many states"),
        (Kind.REGEX, "[ab]a{100000000}", "a", "too many states"),
        (Kind.EBNF, "start: r0\n" + "".join(f"r{n}: r{n+1} r{n+1}\n" for n in range(40))
         + 'r40: "a" | ""', "a", "less ambiguous|ms a token"),
    ],
    ids=["states", "counter", "ambiguous"],
)  # fmt: skip
def test_an_answer_that_meets_a_limit_says_why(kind, source, opening, why, tokenizer, vocabulary):
    compiled = CompiledGrammar.of(parse_grammar(kind, source), vocabulary)
    matcher = compiled.matcher()
    [token] = tokenizer.encode(opening, add_special_tokens=False)
    for _ in range(5000):
        choices = allowed_ids(matcher)
        if matcher.error:
            break
        matcher.forced()
        matcher.take([token if token in choices else int(choices[0])])
    assert re.search(why, matcher.error)


def received_some(compiler: GrammarCompiler) -> dict:
    """What comes back next; the descriptor says when to look."""
    assert select.select([compiler], [], [], 20.0)[0], "nothing was told"
    return dict(compiler.receive())


def received(compiler: GrammarCompiler, num: int) -> dict:
    found = {}
    while len(found) < num:
        found |= received_some(compiler)
    assert not select.select([compiler], [], [], 0.0)[0]
    return found


@pytest.fixture
def compiler(facts):
    with closing(GrammarCompiler(lambda: facts)) as compiler:
        yield compiler


def test_grammars_are_compiled_elsewhere_and_kept(tokenizer, compiler):
    good, wrong = (parse_grammar(Kind.REGEX, regex) for regex in ("ab", "["))
    assert compiler.find(good) is None
    compiler.submit(1, good)
    compiler.submit(2, wrong)
    compiler.submit(3, good)
    found = received(compiler, 3)
    assert isinstance(found[2], InvalidRequestError)
    ids = tokenizer.encode("ab", add_special_tokens=False)
    for matcher in (found[1], found[3], compiler.find(good)):
        assert matcher.take(ids)
        assert matcher.has_ended
    assert compiler.find(wrong) is None


def test_the_grammars_used_last_are_kept(compiler, monkeypatch):
    monkeypatch.setattr(compiler_module, "MAX_KEPT_CHARS", 2 * compiler_module.LEAST_CHARS)
    a, b, c = (parse_grammar(Kind.REGEX, regex) for regex in "abc")
    for key, grammar in enumerate((a, b)):
        compiler.submit(key, grammar)
        received(compiler, 1)
    assert compiler.find(a)
    compiler.submit(3, c)
    received(compiler, 1)
    assert compiler.find(b) is None
    assert compiler.find(a)
    assert compiler.find(c)


LINKS = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(10_000)}
CRASHES = {"$defs": LINKS | {"d10000": {"type": "null"}}, "$ref": "#/$defs/d0"}
HANGS = {"allOf": [{"type": "string", "pattern": f"(a|b){{{n}}}a.*b"} for n in range(60)]}


def test_what_crashes_the_compiler_is_refused(compiler):
    compiler.submit(1, parse_grammar(Kind.JSON_SCHEMA, CRASHES))
    compiler.submit(2, parse_grammar(Kind.REGEX, "ab"))
    found = received(compiler, 2)
    assert "breaks the compiler" in str(found[1])
    assert isinstance(found[2], Matcher)


def test_what_hangs_in_the_compiler_is_refused_and_others_do_not_wait(compiler):
    for key in range(6):
        source = HANGS | {"title": f"{key}"}
        compiler.submit(key, parse_grammar(Kind.JSON_SCHEMA, source))
    compiler.submit(99, parse_grammar(Kind.REGEX, "ab"))
    found = {}
    while 99 not in found:
        found |= received_some(compiler)
    assert isinstance(found.pop(99), Matcher)
    assert {type(error) for error in found.values()} <= {OverloadedError}
    while len(found) < 6:
        found |= received_some(compiler)
    took_long = [key for key, error in found.items() if isinstance(error, InvalidRequestError)]
    assert len(took_long) >= 4, "as many as may grow old at a time; the others may be told to wait"
    assert all("to compile: make it smaller" in str(found[key]) for key in took_long)


def state_and_title(pid: int) -> tuple[str, str]:
    folder = Path(f"/proc/{pid}")
    return (folder / "stat").read_text().rpartition(")")[2].split()[0], (
        folder / "cmdline"
    ).read_text()


def test_when_the_process_of_the_trials_is_killed_there_is_another(compiler):
    compiler.submit(1, parse_grammar(Kind.REGEX, "ab"))
    received(compiler, 1)
    children = Path(f"/proc/self/task/{compiler._thread.native_id}/children").read_text().split()
    for pid in map(int, children):
        assert "sgl::grammars" in state_and_title(pid)[1]
        os.kill(pid, signal.SIGKILL)
        while state_and_title(pid)[0] != "Z":
            time.sleep(0.01)
    assert children
    for key in (2, 3):
        compiler.submit(key, parse_grammar(Kind.REGEX, f"a{key}"))
        assert isinstance(received(compiler, 1)[key], Matcher)


def test_those_who_ask_for_one_grammar_at_once_share_it(compiler):
    grammar = parse_grammar(Kind.REGEX, "ab|cd")
    for key in range(5):
        compiler.submit(key, grammar)
    found = received(compiler, 5)
    assert all(isinstance(matcher, Matcher) for matcher in found.values())
    assert len({id(matcher) for matcher in found.values()}) == 5


def test_a_grammar_whose_lexer_is_full_is_compiled_anew(tokenizer, compiler):
    grammar = parse_grammar(Kind.REGEX, "[ab]a{100000000}")
    compiler.submit(1, grammar)
    [matcher] = received(compiler, 1).values()
    allowed_ids(matcher)
    assert matcher.take(tokenizer.encode("b", add_special_tokens=False))
    matcher.forced()
    while not matcher.error:
        [token] = allowed_ids(matcher)
        matcher.take([int(token)])
    assert compiler.find(grammar) is None
    compiler.submit(2, grammar)
    assert allowed_ids(received(compiler, 1)[2]).size > 1


def test_whoever_asks_hears_why_there_are_no_grammars():
    def fail() -> VocabularyFacts:
        raise InvalidRequestError("no tokenizer")

    with closing(GrammarCompiler(fail)) as compiler:
        for key in (7, 8):
            compiler.submit(key, parse_grammar(Kind.REGEX, "a"))
            assert str(received(compiler, 1)[key]) == "no tokenizer"


def test_a_tokenizer_that_cannot_have_grammars_fails_those_who_want_one(tokenizer):
    facts = VocabularyFacts("{}", VOCAB_SIZE, tuple(tokenizer.eos_ids))
    with closing(GrammarCompiler(lambda: facts)) as compiler:
        for key in (7, 8):
            compiler.submit(key, parse_grammar(Kind.REGEX, "a"))
            error = received(compiler, 1)[key]
            assert isinstance(error, EngineError)
            assert "grammars cannot be served" in str(error)

"""Grammars as clients write them, compiled for a real tokenizer."""

from __future__ import annotations

import json
import random
import re
import select
from contextlib import closing

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from sgl.constrained import compiler as compiler_module
from sgl.constrained.compiler import GrammarCompiler
from sgl.constrained.grammar import parse_grammar
from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, VocabularyFacts
from sgl.constrained.regex import as_rust_reads_it
from sgl.errors import InvalidRequestError
from sgl.model_files import demo_model_path
from sgl.sampling_params import GrammarKind as Kind
from sgl.tokenizer import Tokenizer

VOCAB_SIZE = 49_160  # of the logits: eight more than the tokenizer has


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model_path())


@pytest.fixture(scope="module")
def facts(tokenizer) -> VocabularyFacts:
    return VocabularyFacts(tokenizer.to_json(), VOCAB_SIZE, tuple(tokenizer.eos_ids))


@pytest.fixture(scope="module")
def vocabulary(facts) -> GrammarVocabulary:
    return GrammarVocabulary(facts)


def allowed(matcher) -> np.ndarray:
    words = np.zeros(-(-VOCAB_SIZE // 32), np.uint32)
    matcher.write_mask(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert not bits[VOCAB_SIZE:].any()
    return np.flatnonzero(bits)


def random_answer(kind, source, tokenizer, vocabulary, seed=0, most=400) -> str:
    """Draws among the allowed tokens until the end is drawn, ends where it can after `most`."""
    rng = random.Random(seed)
    matcher = CompiledGrammar.of(parse_grammar(kind, source), vocabulary).matcher()
    ids: list[int] = []
    while not matcher.has_ended and len(ids) < 2 * most:
        choices = allowed(matcher)
        ends = sorted(tokenizer.eos_ids & set(choices.tolist()))
        if ends and (len(ids) >= most or rng.random() < 0.2):
            break
        choices = [i for i in choices.tolist() if i not in tokenizer.eos_ids]
        if not choices:
            break
        ids.append(rng.choice(choices))
        assert matcher.take([ids[-1]])
    assert matcher.may_end
    return tokenizer.decode(ids)


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


def test_forced_tokens_of_a_vocabulary_of_pieces():
    """As SentencePiece's: spaces are part of the pieces, and bytes stand for unknown letters."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    made.train_from_iterator(["the name of the house is the name"] * 20, trainer)
    vocabulary = GrammarVocabulary(VocabularyFacts(made.to_str(), made.get_vocab_size(), (2,)))
    compiled = CompiledGrammar.of(
        parse_grammar(Kind.REGEX, "the name[ö]ß of (a|b)x is ?!"), vocabulary
    )
    matcher = compiled.matcher()
    text = ""
    while not matcher.has_ended:
        forced = matcher.forced() or [vocabulary.tokenizer.tokenize_bytes(b"a")[-1]]
        assert matcher.take(forced)
        text += vocabulary.tokenizer.decode_bytes(forced).decode()
    assert text in ("the nameöß of ax is!", "the nameöß of ax is !")


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
    ],
    ids=["deep", "deep text", "properties", "long", "brackets"],
)
def test_an_evil_grammar_is_refused(kind, source, vocabulary):
    with pytest.raises(InvalidRequestError):
        CompiledGrammar.of(parse_grammar(kind, source), vocabulary)


def received(compiler: GrammarCompiler, num: int) -> dict:
    """What comes back, once it is all there; the descriptor says when to look."""
    found = {}
    while len(found) < num:
        assert select.select([compiler], [], [], 20.0)[0], "nothing was told"
        found |= dict(compiler.receive())
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


def test_whoever_asks_hears_why_there_are_no_grammars():
    def fail() -> VocabularyFacts:
        raise InvalidRequestError("no tokenizer")

    with closing(GrammarCompiler(fail)) as compiler:
        for key in (7, 8):
            compiler.submit(key, parse_grammar(Kind.REGEX, "a"))
            assert str(received(compiler, 1)[key]) == "no tokenizer"


def test_a_compiler_that_cannot_work_says_so():
    def fail() -> VocabularyFacts:
        raise ValueError("a broken tokenizer")

    with closing(GrammarCompiler(fail)) as compiler:
        compiler.submit(7, parse_grammar(Kind.REGEX, "a"))
        with pytest.raises(ValueError, match="a broken tokenizer"):
            received(compiler, 1)

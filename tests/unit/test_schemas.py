"""Whatever is drawn under a schema of the corpus validates, forced text included."""

from __future__ import annotations

import json

import pytest
from grammar_draws import draw_answer
from schemas import SCHEMAS, validator_of

from sgl.constrained.grammar import parse_grammar
from sgl.constrained.matcher import CompiledGrammar, GrammarVocabulary, VocabularyFacts
from sgl.model_files import demo_model_path
from sgl.sampling_params import GrammarKind
from sgl.tokenizer import Tokenizer

NUM_DRAWS = 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model_path())


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> GrammarVocabulary:
    facts = VocabularyFacts(tokenizer.to_json(), 49_160, tuple(tokenizer.eos_ids))
    return GrammarVocabulary(facts)


def test_there_are_sixty():
    assert len(SCHEMAS) == 60


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_under_a_schema_validate(name, tokenizer, vocabulary):
    schema = SCHEMAS[name]
    compiled = CompiledGrammar.of(parse_grammar(GrammarKind.JSON_SCHEMA, schema), vocabulary)
    validator = validator_of(schema)
    drawn = [draw_answer(compiled, tokenizer, seed) for seed in range(NUM_DRAWS)]
    finished = [answer for answer in drawn if answer is not None]
    assert finished
    for answer in finished:
        validator.validate(json.loads(answer))

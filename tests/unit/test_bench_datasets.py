"""What the load generator sends: the same for one seed, and as long as asked for."""

from __future__ import annotations

import json
from random import Random

import pytest

from sgl.bench.datasets import make_conversations
from sgl.bench.prompts import Conversation, Turn, Writer, continuous, joined
from sgl.bench.settings import ServingConfig
from sgl.errors import ConfigError
from sgl.model_files import demo_model_path
from sgl.tokenizer import Tokenizer

VOCAB_SIZE = 5000
MADE_UP = ("random", "generated-shared-prefix", "multi-turn", "json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model_path())


def config(name: str = "random", **named) -> ServingConfig:
    return ServingConfig(dataset_name=name, **({"num_prompts": 20} | named))


def make(settings: ServingConfig, seed: int = 1, tokenizer: Tokenizer | None = None):
    writer = Writer(seed, tokenizer, VOCAB_SIZE, as_ids=settings.makes_ids)
    return make_conversations(settings, writer)


def turns(conversations: list[Conversation]) -> list[Turn]:
    return [turn for conversation in conversations for turn in conversation]


@pytest.mark.parametrize("prompt_format", ["auto", "text"])
@pytest.mark.parametrize("name", MADE_UP)
def test_one_seed_makes_one_set_and_another_another(name, prompt_format):
    settings = config(name, prompt_format=prompt_format, gsp_system_prompt_len=50)
    assert make(settings, 1) == make(settings, 1)
    assert make(settings, 1) != make(settings, 2)


def test_random_lengths_lie_between_the_ratio_and_the_limit():
    settings = config(random_input_len=100, random_output_len=10, random_range_ratio=0.5)
    prompts = turns(make(settings))
    assert {type(turn.content) for turn in prompts} == {list}
    assert all(50 <= len(turn.content) <= 100 and 5 <= turn.output_len <= 10 for turn in prompts)
    assert len({len(turn.content) for turn in prompts}) > 5
    exact = turns(make(config(random_input_len=9, random_output_len=4, random_range_ratio=1.0)))
    assert {(len(turn.content), turn.output_len) for turn in exact} == {(9, 4)}


def test_random_ids_are_ordinary_tokens(tokenizer):
    unknown = Writer(1, None, 1000, as_ids=True).ids(5000)
    assert (min(unknown), max(unknown)) == (100, 899)
    known = Writer(1, tokenizer, VOCAB_SIZE, as_ids=True).ids(20000)
    assert max(known) < VOCAB_SIZE
    assert min(known) > 0
    assert not tokenizer.special_ids.intersection(known)
    assert Writer(1, None, 1, as_ids=True).ids(2) == [0, 0]


@pytest.mark.parametrize("num", [1, 7, 300])
def test_texts_have_as_many_tokens_as_asked_for(tokenizer, num):
    writer = Writer(3, tokenizer, VOCAB_SIZE, as_ids=False)
    text = writer.text(num)
    assert len(tokenizer.encode(text)) == writer.num_tokens(text) == num
    assert len(tokenizer.encode(joined(text, writer.text(5)))) == num + 5
    assert writer.num_tokens(writer.like(text)) == num


def test_without_a_tokenizer_a_word_stands_for_a_token():
    writer = Writer(3, None, VOCAB_SIZE, as_ids=False)
    assert len(writer.text(12).split()) == 12
    assert writer.num_tokens("four" * 6) == 6
    assert len(writer.like([1, 2, 3])) == 3


@pytest.mark.parametrize("prompt_format", ["auto", "text"])
def test_prompts_of_a_group_share_their_prefix_and_nothing_else(tokenizer, prompt_format):
    settings = config(
        "generated-shared-prefix",
        num_prompts=None,
        prompt_format=prompt_format,
        gsp_num_groups=3,
        gsp_prompts_per_group=4,
        gsp_system_prompt_len=40,
        gsp_question_len=10,
        gsp_output_len=6,
    )
    prompts = turns(make(settings, tokenizer=tokenizer))
    ids = [
        turn.content if isinstance(turn.content, list) else tokenizer.encode(turn.content).tolist()
        for turn in prompts
    ]
    assert [len(prompt) for prompt in ids] == [50] * 12
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt in ids:
        groups.setdefault(tuple(prompt[:40]), []).append(tuple(prompt[40:]))
    assert [len(set(questions)) for questions in groups.values()] == [4, 4, 4]
    assert {turn.output_len for turn in prompts} == {6}
    order = [tuple(prompt[:40]) for prompt in ids]
    assert order != sorted(order, key=order.index), "groups must be mixed"


def test_a_conversation_has_its_turns():
    settings = config(
        "multi-turn",
        multi_turn_num_turns=3,
        multi_turn_question_len=8,
        multi_turn_output_len=5,
    )
    conversations = make(settings)
    assert {len(conversation) for conversation in conversations} == {3}
    assert {turn.output_len for turn in turns(conversations)} == {5}
    assert {len(turn.content.split()) for turn in turns(conversations)} == {8}


def test_a_conversation_without_roles_continues_where_the_answer_ended():
    roles = ("user", "assistant", "user")
    texts = ("Why?", " Because.", "And then?")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert continuous(messages) == "Why? Because.\n\nAnd then?"


def test_json_prompts_name_the_fields_of_their_schema():
    prompts = turns(make(config("json", json_output_len=33)))
    assert len({turn.content for turn in prompts}) > 10
    for turn in prompts:
        assert turn.output_len == 33
        assert turn.schema["required"] == list(turn.schema["properties"])
        assert all(name in turn.content for name in turn.schema["required"])
        assert "{" not in turn.content


# files


def talk(*texts: str, key: str = "value") -> dict:
    return {"conversations": [{"from": "x", key: text} for text in texts]}


LONG = "word " * 3000
FITTING = [
    (f"What is the answer to question {number}?", "It is " + "very " * number + "long indeed.")
    for number in range(10)
]


@pytest.fixture
def sharegpt_file(tmp_path):
    records = [
        *(talk(question, answer, "more") for question, answer in FITTING),
        talk("Hi", "This answer is long enough to be measured."),
        talk("This question is long enough to be measured.", "Hm"),
        talk(LONG, "This answer is long enough to be measured."),
        talk("only one turn of some length"),
        {"id": "nothing"},
    ]
    Random(0).shuffle(records)
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(records))
    return str(file)


def test_sharegpt_takes_first_pairs_and_leaves_out_what_is_too_short_or_long(
    sharegpt_file, tokenizer
):
    chosen = turns(make(config("sharegpt", dataset_path=sharegpt_file), tokenizer=tokenizer))
    expected = {question: len(tokenizer.encode(answer)) for question, answer in FITTING}
    assert {turn.content: turn.output_len for turn in chosen} == expected
    again = turns(make(config("sharegpt", dataset_path=sharegpt_file), tokenizer=tokenizer))
    other = turns(make(config("sharegpt", dataset_path=sharegpt_file), 2, tokenizer))
    assert chosen == again
    assert chosen != other


def test_sharegpt_lengths_can_be_set(sharegpt_file):
    settings = config("sharegpt", dataset_path=sharegpt_file, sharegpt_output_len=9, num_prompts=3)
    assert [turn.output_len for turn in turns(make(settings))] == [9, 9, 9]
    short = config("sharegpt", dataset_path=sharegpt_file, sharegpt_context_len=8)
    with pytest.raises(ConfigError, match="has no conversation"):
        make(short)


def test_a_file_of_prompts_keeps_its_order(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one", "max_tokens": 3}\n\n{"prompt": [1, 2], "output_len": 4}\n'
        '{"prompt": "three"}\n'
    )
    settings = config("file", dataset_path=str(file), file_output_len=7, num_prompts=None)
    assert make(settings) == [(Turn("one", 3),), (Turn([1, 2], 4),), (Turn("three", 7),)]
    assert len(make(config("file", dataset_path=str(file), num_prompts=2))) == 2
    with pytest.raises(ConfigError, match="--backend openai-chat takes text only"):
        make(config("file", dataset_path=str(file), backend="openai-chat"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompt"),
        ("{", r"prompt 1: the line is not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', r"prompt 2: a line must look like \{\"prompt\""),
        ('{"prompt": [1, "b"]}', "a text or a list of token ids"),
        ('{"prompt": "a", "max_tokens": 0}', "must be 1 or more, got 0"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        make(config("file", dataset_path=str(file)))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--dataset-path /nowhere cannot be read"):
        make(config("sharegpt", dataset_path="/nowhere"))
    file = tmp_path / "talks.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match="must hold a JSON list"):
        make(config("sharegpt", dataset_path=str(file)))
    file.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        make(config("sharegpt", dataset_path=str(file)))

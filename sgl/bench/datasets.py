"""The datasets: settings and a seeded `Writer` in, conversations out.

random                   independent prompts of random lengths
generated-shared-prefix  groups of prompts that begin alike
multi-turn               conversations; a turn holds all turns and answers before it
json                     a text, and the request to extract its facts as JSON
sharegpt, file           from a file, see dataset_files.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sgl.bench.dataset_files import prompt_file, sharegpt
from sgl.bench.prompts import Conversation, Schema, Turn, Writer, joined
from sgl.bench.settings import DEFAULT_NUM_PROMPTS, ServingConfig


def make_conversations(config: ServingConfig, writer: Writer) -> list[Conversation]:
    """What a run sends; for one seed always the same."""
    return _MAKERS[config.dataset_name](config, writer)


def random_prompts(config: ServingConfig, writer: Writer) -> list[Conversation]:
    def length(longest: int) -> int:
        shortest = max(1, int(longest * config.random_range_ratio))
        return writer.random.randint(shortest, longest)

    return [
        (Turn(writer.prompt(length(config.random_input_len)), length(config.random_output_len)),)
        for _ in range(config.num_prompts or DEFAULT_NUM_PROMPTS)
    ]


def shared_prefixes(config: ServingConfig, writer: Writer) -> list[Conversation]:
    """Prompts of all groups, shuffled, so that those of a group are spread over the run."""
    prompts = []
    for _ in range(config.gsp_num_groups):
        system = writer.prompt(config.gsp_system_prompt_len)
        prompts += [
            joined(system, writer.prompt(config.gsp_question_len))
            for _ in range(config.gsp_prompts_per_group)
        ]
    writer.random.shuffle(prompts)
    return [(Turn(prompt, config.gsp_output_len),) for prompt in prompts[: config.num_prompts]]


def multi_turn(config: ServingConfig, writer: Writer) -> list[Conversation]:
    def turn() -> Turn:
        question = writer.prompt(config.multi_turn_question_len)
        return Turn(question, config.multi_turn_output_len)

    return [
        tuple(turn() for _ in range(config.multi_turn_num_turns))
        for _ in range(config.num_prompts or DEFAULT_NUM_PROMPTS)
    ]


def json_extraction(config: ServingConfig, writer: Writer) -> list[Conversation]:
    conversations: list[Conversation] = []
    for _ in range(config.num_prompts or DEFAULT_NUM_PROMPTS):
        text, schema = writer.random.choice(_RECORDS)
        facts = {name: writer.random.choice(values) for name, values in _FACTS.items()}
        number = writer.random.randint(100, 99999)
        prompt = (
            f"{text.format(**facts, number=number)}\n\nExtract {', '.join(schema['properties'])} "
            "from the text above. Answer with one JSON object and nothing else.\n"
        )
        conversations.append((Turn(prompt, config.json_output_len, schema),))
    return conversations


def _object(**properties: dict[str, Any]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "maxLength": 40}
_NUMBER = {"type": "integer"}
_FACTS = {
    "name": ("Ada Moreau", "Kofi Mensah", "Lin Wei", "Rosa Delgado", "Tom Becker", "Aiko Mori"),
    "city": ("Lisbon", "Accra", "Hanoi", "Oslo", "Quito", "Leipzig", "Perth", "Nairobi"),
    "job": ("baker", "surveyor", "nurse", "welder", "translator", "pilot", "archivist"),
    "thing": ("desk lamp", "bicycle pump", "rice cooker", "raincoat", "chess set", "ladder"),
    "colour": ("red", "dark green", "white", "blue", "grey"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"),
}
_RECORDS: tuple[tuple[str, Schema], ...] = (
    (
        "{name} has worked as a {job} in {city} since the spring. The staff number is {number}, "
        "and the office is closed on every {day}.",
        _object(name=_TEXT, job=_TEXT, city=_TEXT, staff_number=_NUMBER, closed_on=_TEXT),
    ),
    (
        "Order {number}: one {thing}, {colour}, to be sent to {name} in {city}. It leaves the "
        "warehouse on {day}; nobody needs to sign for it.",
        _object(
            order=_NUMBER,
            item=_object(name=_TEXT, colour={"enum": list(_FACTS["colour"])}),
            recipient=_object(name=_TEXT, city=_TEXT),
            needs_signature={"type": "boolean"},
        ),
    ),
    (
        "On {day} a {colour} {thing} was found at the station of {city}. Whoever misses it may "
        "ask for {name} at the counter and give the number {number}.",
        _object(
            lost_item=_TEXT, place=_TEXT, contact=_TEXT, reference=_NUMBER, weekday=_TEXT
        ),
    ),
)  # fmt: skip

_MAKERS: Mapping[str, Callable[[ServingConfig, Writer], list[Conversation]]] = {
    "random": random_prompts,
    "generated-shared-prefix": shared_prefixes,
    "multi-turn": multi_turn,
    "json": json_extraction,
    "sharegpt": sharegpt,
    "file": prompt_file,
}

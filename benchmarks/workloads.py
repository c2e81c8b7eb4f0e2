"""The offline workloads that engines are compared on; the same seeds give everyone the same work.

w1  1000 requests at once, 64 to 1024 tokens in, 32 to 512 out
w2  64 groups of 16 requests: 1024 tokens shared in the group, 128 own, 64 out; shuffled
w3  one request, 128 in, 256 out
w4  64 requests at once, 128 in, 256 out

CHARACTER is the JSON of a character in a novel, as a regular expression with much that is forced.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

IDS = (1000, 120_000)  # away from special tokens
CHARACTER = (
    r"\{\n"
    r'    "name": "[\w\d\s]{1,16}",\n'
    r'    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",\n'
    r'    "blood status": "(Pure-blood|Half-blood|Muggle-born)",\n'
    r'    "occupation": "(student|teacher|auror|ministry of magic|death eater)",\n'
    r'    "wand": \{\n'
    r'        "wood": "[\w\d\s]{1,16}",\n'
    r'        "core": "[\w\d\s]{1,16}",\n'
    r'        "length": [0-9]{1,2}\.[0-9]{0,2}\n'
    r"    \},\n"
    r'    "alive": "(Alive|Deceased)",\n'
    r'    "patronus": "[\w\d\s]{1,16}",\n'
    r'    "bogart": "[\w\d\s]{1,16}"\n'
    r"\}"
)


@dataclass(frozen=True)
class Work:
    """Prompts as token ids, and how many tokens each is to be answered with."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_input(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output(self) -> int:
        return sum(self.output_lens)


def mixed(seed: int, num_requests: int = 1000) -> Work:
    """w1"""
    rng = random.Random(seed)
    lens = [(rng.randint(64, 1024), rng.randint(32, 512)) for _ in range(num_requests)]
    return Work([_ids(rng, num_in) for num_in, _ in lens], [num_out for _, num_out in lens])


def shared_prefixes(seed: int, num_groups: int = 64, group_size: int = 16) -> Work:
    """w2"""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_groups):
        prefix = _ids(rng, 1024)
        prompts += [prefix + _ids(rng, 128) for _ in range(group_size)]
    rng.shuffle(prompts)
    return Work(prompts, [64] * len(prompts))


def equal(
    seed: int, num_requests: int, num_in: int, num_out: int, ids: tuple[int, int] = IDS
) -> Work:
    """w3 and w4; other `ids` for a model with a small vocabulary"""
    rng = random.Random(seed)
    prompts = [_ids(rng, num_in, ids) for _ in range(num_requests)]
    return Work(prompts, [num_out] * num_requests)


def _ids(rng: random.Random, num: int, ids: tuple[int, int] = IDS) -> list[int]:
    return [rng.randrange(*ids) for _ in range(num)]

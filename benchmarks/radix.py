"""What the radix tree costs: time per operation, memory per cached token, growth over time.

    python -m benchmarks.radix              every case
    python -m benchmarks.radix churn match  some of them

Run it from the repository root. Each case runs in a process of its own, so that none sees memory
which another one freed. Prints a JSON line for each figure, and a table at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from sgl.scheduling.radix_cache import RadixCache
from sgl.scheduling.slots import Slots

ROOT = Path(__file__).parents[1]
VOCABULARY_LEN = 32_000
LEAF_LEN = 64

Figures = dict[str, float | int | str]


class Pool:
    """A radix cache and its pages as a scheduler uses them: page size 1, evicting when full."""

    def __init__(self, num_pages: int) -> None:
        self.slots = Slots(num_pages, 1)
        self.cache = RadixCache(1)

    def insert(self, token_ids: array[int]) -> None:
        num_missing = len(token_ids) - self.slots.num_free
        if num_missing > 0:
            self.slots.give(self.cache.evict(num_missing))
        mine = self.slots.take(len(token_ids))
        inserted = self.cache.insert(token_ids, mine)
        self.slots.give(mine[: inserted.num_cached])


def random_run(rng: random.Random, length: int) -> array[int]:
    return array("i", rng.choices(range(VOCABULARY_LEN), k=length))


def measure_us(work: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1000


def spread(samples_us: list[float]) -> Figures:
    ordered = sorted(samples_us)
    return {
        "min_us": round(ordered[0], 1),
        "median_us": round(ordered[len(ordered) // 2], 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)], 1),
        "max_us": round(ordered[-1], 1),
        "num_samples": len(ordered),
    }


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def churn(num_leaves: int = 50_000, num_pairs: int = 2_000) -> Iterator[Figures]:
    """A full pool: evict 64 tokens and insert 64 others."""
    rng = random.Random(0)
    for order in ("oldest first", "all used again in random order"):
        pool = Pool(num_leaves * LEAF_LEN)
        runs = [random_run(rng, LEAF_LEN) for _ in range(num_leaves)]
        for run in runs:
            pool.insert(run)
        if order != "oldest first":
            rng.shuffle(runs)
            for run in runs:
                pool.cache.match(run)
        fresh = [random_run(rng, LEAF_LEN) for _ in range(num_pairs)]
        samples = [measure_us(partial(pool.insert, run)) for run in fresh]
        what = f"evict + insert {LEAF_LEN} tokens, {num_leaves:,} leaves, {order}"
        yield {"what": what, **spread(samples)}


def chain(depth: int = 100_000) -> Iterator[Figures]:
    """One path of nodes of one token each, made by splitting one token off the end at a time."""
    cache = RadixCache(1)
    run = array("i", range(depth))
    cache.insert(run, run)
    lengths = range(depth - 1, 0, -1)
    splits = [measure_us(partial(cache.match, run, limit=limit)) for limit in lengths]
    assert cache.num_nodes == depth, f"{cache.num_nodes} nodes instead of {depth}"
    yield {"what": f"chain of {depth:,} nodes: split off one", **spread(splits)}
    end = cache.match(run).node
    for name, work in {
        "match": partial(cache.match, run),
        "match_len": partial(cache.match_len, run),
        "pin": partial(cache.pin, end),
        "unpin": partial(cache.unpin, end),
        "evict all": cache.reset,
    }.items():
        yield {"what": f"chain of {depth:,} nodes: {name}", "median_us": round(measure_us(work))}


def match() -> Iterator[Figures]:
    """A cached prompt in one edge and in 64, and the whole queue of a busy server."""
    rng = random.Random(1)
    cache = RadixCache(1)
    prompt = random_run(rng, 4_096)
    cache.insert(prompt, array("i", range(4_096)))
    for num_edges in (1, 64):
        for limit in range(4_096 // num_edges, 4_096, 4_096 // num_edges):
            cache.match(prompt, limit=limit)
        samples = [measure_us(partial(cache.match, prompt)) for _ in range(2_000)]
        yield {"what": f"match 4,096 tokens in {num_edges} edges", **spread(samples)}
    queue = [prompt[:512] + random_run(rng, 512) for _ in range(128)]
    for index, each in enumerate(queue[::2]):
        own_pages = array("i", range(4_096 + index * 512, 4_608 + index * 512))
        cache.insert(each, cache.match(each).pages + own_pages)
    samples = [measure_us(lambda: [cache.match_len(each) for each in queue]) for _ in range(500)]
    yield {"what": "match_len of 128 prompts of 1,024 tokens, half cached", **spread(samples)}
    queue = [random_run(rng, 131_072) for _ in range(128)]
    samples = [measure_us(lambda: [cache.match_len(each) for each in queue]) for _ in range(50)]
    yield {"what": "match_len of 128 prompts of 131,072 tokens, not cached", **spread(samples)}


def path_to(number: int, num_children: int) -> array[int]:
    """Tokens on the way to a node of a complete tree whose nodes are numbered row by row from 0."""
    path = array("i")
    while number:
        number, place = divmod(number - 1, num_children)
        path.append(1_000 + place)
    path.reverse()
    return path


def memory(num_children: int, num_tokens: int) -> Iterator[Figures]:
    """The worst case of a compact tree: each node holds one token and has `num_children`."""
    cache = RadixCache(1)
    gc.collect()
    before = rss_bytes()
    if num_children == 1:
        run = array("i", range(num_tokens))
        cache.insert(run, run)
        for limit in range(num_tokens - 1, 0, -1):
            cache.match(run, limit=limit)
    else:
        for number in range(1, num_tokens + 1):
            run = path_to(number, num_children)
            cache.insert(run, cache.match(run).pages + array("i", [number]))
    gc.collect()
    assert cache.num_nodes == num_tokens, f"{cache.num_nodes} nodes instead of {num_tokens}"
    size = (rss_bytes() - before) / num_tokens
    what = f"memory, {num_tokens:,} one-token nodes, {num_children:,} children each"
    yield {"what": what, "bytes_per_token": round(size, 1)}


def growth(num_inserts: int = 1_000_000, run_len: int = 16) -> Iterator[Figures]:
    """Resident memory over a million inserts into a full pool; half of them extend a cached run."""
    rng = random.Random(2)
    pool = Pool(200_000)
    sizes = []
    run = random_run(rng, run_len)
    start = time.perf_counter()
    for index in range(num_inserts):
        head = run if index % 2 else array("i")
        run = head + random_run(rng, run_len)
        pool.insert(run)
        if index % (num_inserts // 20) == 0:
            sizes.append(rss_bytes())
    settled = sizes[len(sizes) // 5 :]
    middle = sum(settled) / len(settled)
    yield {
        "what": f"growth over {num_inserts:,} inserts into {pool.slots.num_pages:,} full pages",
        "rss_mb": round(middle / 1e6, 1),
        "rss_low_percent": round(100 * (min(settled) / middle - 1), 2),
        "rss_high_percent": round(100 * (max(settled) / middle - 1), 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


CASES: dict[str, Callable[[], Iterator[Figures]]] = {
    "churn": churn,
    "chain": chain,
    "match": match,
    "memory-chain": lambda: memory(1, 100_000),
    "memory-binary": lambda: memory(2, 300_000),
    "memory-8": lambda: memory(8, 300_000),
    "memory-9": lambda: memory(9, 300_000),
    "memory-star": lambda: memory(300_000, 300_000),
    "growth": growth,
}


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_case(name: str) -> None:
    for figures in CASES[name]():
        print(json.dumps({"case": name, **figures}), flush=True)


def print_table(rows: list[Figures]) -> None:
    print(f"\n{'':74} {'median':>12} {'p99':>12} {'max':>12}")
    for row in rows:
        columns = {key: value for key, value in row.items() if key not in UNPRINTED}
        times = [columns.pop(key) for key in ("median_us", "p99_us", "max_us") if key in columns]
        cells = [f"{each:>9,} µs" for each in times]
        cells += [f"{key} {value}" for key, value in columns.items()]
        print(f"{row['what']:74} {' '.join(cells)}")


HEADER: Figures = {
    "commit": commit(),
    "python": platform.python_version(),
    "device": f"{platform.machine()}, {os.cpu_count()} CPUs",
}


UNPRINTED = {"case", "what", "min_us", "num_samples", *HEADER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is given")
    parser.add_argument("--here", action="store_true", help="in this process, without a table")
    args = parser.parse_args()
    if args.here:
        for name in args.cases:
            run_case(name)
        return
    rows: list[Figures] = []
    for name in args.cases or CASES:
        command = [sys.executable, "-m", "benchmarks.radix", "--here", name]
        output = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        for line in output.splitlines():
            rows.append({**json.loads(line), **HEADER})
            print(json.dumps(rows[-1]), flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()

"""The radix tree against a model that knows no tree: one entry for each cached page."""

from __future__ import annotations

import gc
import random
from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl.scheduling.radix_cache import Node, RadixCache
from sgl.scheduling.slots import Slots

few_tokens = st.lists(st.integers(0, 2), max_size=12)  # three tokens make collisions common
sizes = st.sampled_from([1, 2, 3])


def ids(tokens) -> array[int]:
    return array("i", tokens)


def whole(tokens, page_size):
    return tokens[: len(tokens) - len(tokens) % page_size]


def fill(cache: RadixCache, tokens, first_page: int = 0, namespace: str = ""):
    """Insert a run under pages first_page, first_page + 1, …"""
    num_pages = len(tokens) // cache.page_size
    pages = array("i", range(first_page, first_page + num_pages))
    return cache.insert(ids(tokens), pages, namespace)


def test_an_empty_cache_matches_nothing():
    match = RadixCache(1).match(ids([1, 2, 3]))
    assert match.pages == array("i")
    assert match.num_tokens == 0


def test_a_cached_run_is_found_with_its_pages():
    cache = RadixCache(2)
    fill(cache, [1, 2, 3, 4], first_page=7)
    match = cache.match(ids([1, 2, 3, 4, 5, 6]))
    assert match.pages == array("i", [7, 8])
    assert match.num_tokens == 4


def test_matching_half_an_edge_splits_it_and_both_halves_stay():
    cache = RadixCache(1)
    fill(cache, range(10))
    assert cache.num_nodes == 1
    half = cache.match(ids([0, 1, 2, 3, 99]))
    assert (half.num_tokens, half.pages, cache.num_nodes) == (4, array("i", range(4)), 2)
    assert cache.match(ids(range(10))).pages == array("i", range(10))
    cache.check()


def test_a_node_stays_the_end_of_its_run_when_edges_above_it_split():
    cache = RadixCache(1)
    end = fill(cache, range(10)).node
    cache.pin(end)
    cache.match(ids([0, 1, 2]))
    cache.match(ids([0, 1, 2, 3, 4]))
    assert cache.num_pinned == 10
    assert cache.evict(10) == array("i")
    cache.unpin(end)
    assert (cache.num_pinned, cache.num_evictable) == (0, 10)
    cache.check()


def test_a_pin_keeps_what_leads_to_its_node_and_no_more():
    cache = RadixCache(1)
    fill(cache, range(10))
    cache.pin(cache.match(ids(range(4))).node)
    assert (cache.num_pinned, cache.num_evictable) == (4, 6)
    assert sorted(cache.reset()) == [4, 5, 6, 7, 8, 9]
    assert cache.match_len(ids(range(10))) == 4


def test_a_node_pinned_twice_needs_two_unpins():
    cache = RadixCache(1)
    end = fill(cache, range(3)).node
    cache.pin(end)
    cache.pin(end)
    cache.unpin(end)
    assert cache.num_evictable == 0
    cache.unpin(end)
    assert cache.num_evictable == 3
    with pytest.raises(AssertionError, match="unpinned more often"):
        cache.unpin(end)


def test_pinning_an_evicted_node_is_refused():
    cache = RadixCache(1)
    end = fill(cache, range(3)).node
    cache.reset()
    with pytest.raises(AssertionError, match="was evicted"):
        cache.pin(end)


def test_pinning_where_nothing_matched_costs_nothing():
    cache = RadixCache(1)
    fill(cache, [1, 2])
    for namespace in ("", "empty"):
        nowhere = cache.match(ids([9]), namespace).node
        cache.pin(nowhere)
        assert cache.num_pinned == 0
        cache.unpin(nowhere)
    cache.check()


def test_inserting_a_cached_run_again_returns_the_pages_of_the_tree():
    cache = RadixCache(2)
    first = fill(cache, [1, 2, 3, 4, 5, 6], first_page=0)
    again = fill(cache, [1, 2, 3, 4, 5, 6], first_page=50)
    assert again == (first.node, first.pages, 6)
    longer = fill(cache, [1, 2, 3, 4, 5, 6, 7, 8], first_page=60)
    assert longer.pages == array("i", [0, 1, 2, 63])
    assert (longer.num_cached, cache.num_evictable) == (6, 4)
    cache.check()


def test_inserting_where_runs_part_in_mid_edge_keeps_the_shared_pages_once():
    cache = RadixCache(2)
    fill(cache, [1, 2, 3, 4, 5, 6], first_page=0)
    other = fill(cache, [1, 2, 3, 9, 5, 6], first_page=10)
    assert other.pages == array("i", [0, 11, 12])  # tokens 2 and 3 share a page and differ
    assert other.num_cached == 2
    cache.check()


def test_an_insert_needs_one_page_for_each_page_of_tokens():
    with pytest.raises(AssertionError, match="do not hold"):
        RadixCache(4).insert(ids(range(8)), array("i", [0]))


@pytest.mark.parametrize("page_size", [2, 16, 64])
def test_a_part_of_a_page_is_never_cached_nor_matched(page_size):
    cache = RadixCache(page_size)
    run = list(range(3 * page_size - 1))
    assert len(fill(cache, run).pages) == 2
    assert cache.match_len(ids(run)) == 2 * page_size
    assert cache.match_len(ids(run), limit=2 * page_size - 1) == page_size
    assert cache.match(ids(run), limit=page_size - 1).num_tokens == 0
    cache.check()


@pytest.mark.parametrize("limit", [-1, 0])
def test_a_limit_without_tokens_matches_nothing(limit):
    cache = RadixCache(1)
    fill(cache, range(4))
    assert cache.match(ids(range(4)), limit=limit).num_tokens == 0
    assert cache.match_len(ids(range(4)), limit=limit) == 0


def test_namespaces_share_nothing_and_leave_nothing_behind():
    cache = RadixCache(1)
    fill(cache, [1, 2, 3], first_page=0, namespace="adapter a")
    fill(cache, [1, 2, 3], first_page=10, namespace="adapter b")
    assert cache.match_len(ids([1, 2, 3])) == 0
    assert cache.match(ids([1, 2, 3]), "adapter a").pages == array("i", [0, 1, 2])
    assert cache.match(ids([1, 2, 3]), "adapter b").pages == array("i", [10, 11, 12])
    cache.reset()
    cache.check()  # an empty namespace that stayed would fail here
    assert cache.num_nodes == 0


def test_the_least_recently_used_run_goes_first():
    cache = RadixCache(1)
    for start in (0, 10, 20):
        fill(cache, range(start, start + 3), first_page=start)
    cache.match(ids([0, 1, 2]))
    cache.match_len(ids([10, 11, 12]))  # looking is not using
    assert set(cache.evict(3)) == {10, 11, 12}
    assert set(cache.evict(3)) == {20, 21, 22}
    assert set(cache.evict(3)) == {0, 1, 2}


def test_only_as_many_pages_as_asked_for_go_from_the_end_of_the_run():
    cache = RadixCache(2)
    fill(cache, range(20))
    assert cache.evict(3) == array("i", [7, 8, 9])
    assert cache.match_len(ids(range(20))) == 14
    assert cache.evict(-1) == cache.evict(0) == array("i")
    assert cache.num_evictable == 7
    cache.check()


def test_a_parent_goes_after_its_last_child_when_it_was_used_later():
    cache = RadixCache(1)
    fill(cache, [1, 2, 3])
    fill(cache, [1, 2, 4], first_page=10)
    fill(cache, [5, 6], first_page=20)
    cache.match(ids([1, 2]))
    assert list(cache.evict(2)) == [2, 12]
    assert set(cache.evict(2)) == {20, 21}
    assert set(cache.evict(2)) == {0, 1}


def test_what_is_unpinned_counts_as_used_now():
    cache = RadixCache(1)
    old = fill(cache, [1]).node
    cache.pin(old)
    fill(cache, [2], first_page=1)
    cache.unpin(old)
    assert list(cache.evict(1)) == [1]


def test_finding_gives_the_deepest_node_whose_run_is_wholly_there():
    cache = RadixCache(1)
    upper = fill(cache, range(4)).node
    lower = fill(cache, range(10)).node
    assert cache.find(ids(range(12))) is cache.find(ids(range(10))) is lower
    assert cache.find(ids(range(9))) is cache.find(ids(range(10)), limit=9) is upper
    nowhere = [cache.find(ids(range(3))), cache.find(ids([7])), cache.find(ids(range(10)), "other")]
    assert [node.num_pages for node in nowhere] == [0, 0, 0]


def test_finding_is_not_using():
    cache = RadixCache(1)
    fill(cache, [1, 2])
    fill(cache, [3, 4], first_page=10)
    cache.find(ids([1, 2]))
    assert set(cache.evict(2)) == {0, 1}


@given(st.lists(few_tokens, max_size=8), few_tokens, sizes)
def test_finding_splits_nothing_and_ends_where_a_match_would_or_above_its_split(
    inserted, query, page_size
):
    cache, next_page = RadixCache(page_size), 1
    fill(cache, [0] * page_size)
    for tokens in inserted:
        fill(cache, tokens, next_page)
        next_page += len(tokens)
    num_nodes = cache.num_nodes
    found = cache.find(ids(query))
    assert cache.num_nodes == num_nodes
    end = cache.match(ids(query)).node
    assert found is (end if cache.num_nodes == num_nodes else end.parent)


@given(st.lists(few_tokens, max_size=8), few_tokens, sizes)
def test_match_finds_exactly_the_longest_prefix_ever_inserted(inserted, query, page_size):
    cache, next_page = RadixCache(page_size), 0
    for tokens in inserted:
        fill(cache, tokens, next_page)
        next_page += len(tokens)
        cache.check()
    stored = {
        tuple(tokens[:end]) for tokens in inserted for end in range(0, len(tokens) + 1, page_size)
    }
    expected = max(
        (end for end in range(0, len(query) + 1, page_size) if tuple(query[:end]) in stored),
        default=0,
    )
    assert cache.match_len(ids(query)) == expected
    assert cache.match(ids(query)).num_tokens == expected
    cache.check()


@given(st.lists(few_tokens, min_size=1, max_size=8), sizes, st.data())
def test_every_prefix_keeps_the_pages_it_was_first_inserted_with(inserted, page_size, data):
    cache, first_pages, next_page = RadixCache(page_size), {}, 0
    for tokens in inserted:
        fill(cache, tokens, next_page)
        for index in range(len(tokens) // page_size):
            first_pages.setdefault(tuple(tokens[: (index + 1) * page_size]), next_page + index)
        next_page += len(tokens)
    query = data.draw(st.sampled_from(inserted))
    expected = [
        first_pages[tuple(query[: end + page_size])]
        for end in range(0, len(whole(query, page_size)), page_size)
    ]
    assert list(cache.match(ids(query)).pages) == expected


@pytest.mark.parametrize("num_children", [1, 8, 9, 200])
def test_a_node_finds_each_of_its_children_however_many_come_and_go(num_children):
    cache = RadixCache(2)
    for child in range(num_children):
        fill(cache, [0, 0, child, 0, child, 1], first_page=3 * child)
    cache.check()
    for child in range(num_children):
        assert cache.match_len(ids([0, 0, child, 0, child, 1])) == 6
    for left in range(num_children - 1, -1, -1):
        cache.evict(2)
        cache.check()
        found = [cache.match_len(ids([0, 0, child, 0])) for child in range(num_children)]
        assert found.count(4) == left


def cut_everywhere(cache: RadixCache) -> None:
    """Split every run into nodes of one token, as matches of each length would, in seconds less."""
    for num_tokens in (1_000, 1):
        upper_len = num_tokens * ids([0]).itemsize
        for node in list(cache._each_node()):
            while len(node.tokens) > upper_len:
                cache._split(node, upper_len)


def test_a_chain_of_100000_nodes_overflows_no_stack():
    depth = 100_000
    cache, run = RadixCache(1), ids(range(depth))
    cache.insert(run, run)
    cut_everywhere(cache)
    assert cache.num_nodes == depth
    match = cache.match(run)
    assert match.pages == run
    assert cache.match_len(run) == depth
    cache.pin(match.node)
    assert cache.num_pinned == depth
    cache.unpin(match.node)
    cache.check()
    assert list(cache.evict(10)) == list(range(depth - 1, depth - 11, -1))
    assert "1 pages" in repr(cache.match(run).node)
    del cache, match
    gc.collect()  # frees what is left of the chain in one go


def test_evicted_nodes_are_freed_at_once_without_the_garbage_collector():
    def num_nodes_alive():
        return sum(issubclass(type(each), Node) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        num_before = num_nodes_alive()
        cache = RadixCache(1)
        for child in range(20):
            fill(cache, [0, child, child], first_page=3 * child)
        assert num_nodes_alive() > num_before
        cache.reset()
        assert num_nodes_alive() == num_before
    finally:
        gc.enable()


@dataclass(slots=True)
class CachedPage:
    page: int
    used_at: int
    num_pins: int = 0


@dataclass
class Model:
    """Each cached page by the letters that lead to it, one letter a page. No tree, no nodes."""

    pages: dict[tuple[str, str], CachedPage] = field(default_factory=dict)
    now: int = 0

    def along(self, namespace: str, letters: str) -> list[CachedPage]:
        """The cached pages of a run, from its start."""
        keys = ((namespace, letters[:end]) for end in range(1, len(letters) + 1))
        found = []
        for key in keys:
            if key not in self.pages:
                break
            found.append(self.pages[key])
        return found

    def use(self, namespace: str, letters: str) -> None:
        self.now += 1
        for each in self.along(namespace, letters):
            each.used_at = self.now

    def insert(self, namespace: str, letters: str, pages: array[int]) -> list[int]:
        for end, page in enumerate(pages, start=1):
            self.pages.setdefault((namespace, letters[:end]), CachedPage(page, 0))
        self.use(namespace, letters)
        return [each.page for each in self.along(namespace, letters)]

    def pin(self, namespace: str, letters: str) -> None:
        for each in self.along(namespace, letters):
            each.num_pins += 1

    def unpin(self, namespace: str, letters: str) -> None:
        self.now += 1
        for each in self.along(namespace, letters):
            each.num_pins -= 1
            if not each.num_pins:
                each.used_at = self.now

    def evict(self, num_pages: int) -> set[int]:
        """The pages used longest ago; of those used together, the last of the run first."""
        unpinned = [key for key, each in self.pages.items() if not each.num_pins]
        unpinned.sort(key=lambda key: (self.pages[key].used_at, -len(key[1])))
        return {self.pages.pop(key).page for key in unpinned[:num_pages]}


@dataclass
class Runner:
    """A request of the simulation: letters, the pages it uses, and what it has pinned of them."""

    namespace: str
    letters: str
    pages: array[int]
    node: Node
    num_shared: int  # leading pages that are the tree's, pinned

    @property
    def num_private(self) -> int:
        return len(self.pages) - self.num_shared


class Simulation:
    """Requests come, grow, share what they computed, end or are aborted, in any order."""

    NUM_PAGES = 60

    def __init__(self, page_size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.slots = Slots(self.NUM_PAGES, page_size)
        self.cache = RadixCache(page_size)
        self.model = Model()
        self.runners: list[Runner] = []
        # a page's tokens by its letter; two of them differ in the last token only
        zeros = [0] * (page_size - 1)
        self.alphabet = {"a": [*zeros, 0], "b": [*zeros, 1], "c": [2, *zeros]}

    def tokens(self, letters: str) -> array[int]:
        return ids([token for letter in letters for token in self.alphabet[letter]])

    def step(self) -> None:
        actions = [self.start] * 4 + [self.share] * 2 + [self.finish] * 2
        actions += [self.abort, self.look, self.use, self.evict]
        self.rng.choice(actions)()
        if self.rng.random() < 0.002:
            self.reset()
        private = sum(runner.num_private for runner in self.runners)
        cached = self.cache.num_evictable + self.cache.num_pinned
        assert self.slots.num_free + cached + private == self.NUM_PAGES
        assert cached == len(self.model.pages)

    def start(self) -> None:
        namespace, letters = self.draw()
        if len(self.runners) > 8:
            return
        match = self.match(namespace, letters, limit=self.rng.randrange(len(letters) + 1))
        num_shared = len(match.pages)
        self.cache.pin(match.node)
        self.model.pin(namespace, letters[:num_shared])
        runner = Runner(namespace, letters, match.pages, match.node, num_shared)
        self.runners.append(runner)
        num_new = len(letters) - num_shared
        self.evict(num_new - self.slots.num_free)
        if num_new <= self.slots.num_free:
            runner.pages += self.slots.take(num_new)
        else:
            self.end(runner)

    def share(self) -> None:
        """Put some of what a request has into the tree, and let it run on with the tree's pages."""
        if not self.runners:
            return
        runner = self.rng.choice(self.runners)
        num_pages = self.rng.randint(runner.num_shared, len(runner.pages))
        run = runner.letters[:num_pages]
        inserted = self.insert(runner, num_pages)
        self.cache.pin(inserted.node)
        self.model.pin(runner.namespace, run)
        self.unpin(runner)
        runner.pages[:num_pages] = inserted.pages
        runner.node, runner.num_shared = inserted.node, num_pages

    def finish(self) -> None:
        if self.runners:
            runner = self.rng.choice(self.runners)
            num_pages = self.rng.randint(runner.num_shared, len(runner.pages))
            self.insert(runner, num_pages)
            self.end(runner, num_pages)

    def abort(self) -> None:
        if self.runners:
            self.end(self.rng.choice(self.runners))

    def look(self) -> None:
        namespace, letters = self.draw()
        expected = len(self.model.along(namespace, letters)) * self.cache.page_size
        partial = ids([1] * self.rng.randrange(self.cache.page_size))
        found = self.cache.match_len(self.tokens(letters) + partial, namespace)
        assert found == expected

    def use(self) -> None:
        namespace, letters = self.draw()
        self.match(namespace, letters, self.rng.randrange(len(letters) + 1))

    def evict(self, num_pages: int | None = None) -> None:
        """The tree must hand out the very pages that the model does, so none that is pinned."""
        wanted = max(0, self.rng.randrange(8) if num_pages is None else num_pages)
        evicted = self.cache.evict(wanted)
        assert set(evicted) == self.model.evict(wanted)
        self.slots.give(evicted)

    def reset(self) -> None:
        evicted = self.cache.reset()
        assert set(evicted) == self.model.evict(self.NUM_PAGES)
        assert self.cache.num_evictable == 0
        self.slots.give(evicted)

    def draw(self) -> tuple[str, str]:
        letters = self.rng.choices("abc", weights=(3, 2, 1), k=self.rng.randint(1, 12))
        return self.rng.choice(["", "", "other"]), "".join(letters)

    def match(self, namespace: str, letters: str, limit: int):
        match = self.cache.match(
            self.tokens(letters), namespace, limit=limit * self.cache.page_size
        )
        expected = [each.page for each in self.model.along(namespace, letters[:limit])]
        assert list(match.pages) == expected
        assert match.num_tokens == len(expected) * self.cache.page_size
        self.model.use(namespace, letters[:limit])
        return match

    def insert(self, runner: Runner, num_pages: int):
        """Also gives back the private pages for which the tree has others."""
        letters, mine = runner.letters[:num_pages], runner.pages[:num_pages]
        num_cached = len(self.model.along(runner.namespace, letters))
        inserted = self.cache.insert(self.tokens(letters), mine, runner.namespace)
        assert inserted.num_cached == num_cached * self.cache.page_size
        assert list(inserted.pages) == self.model.insert(runner.namespace, letters, mine)
        doubles = [page for page, its in zip(mine, inserted.pages, strict=True) if page != its]
        self.slots.give(ids(doubles))
        return inserted

    def end(self, runner: Runner, num_inserted: int = 0) -> None:
        self.slots.give(runner.pages[max(num_inserted, runner.num_shared) :])
        self.unpin(runner)
        self.runners.remove(runner)

    def unpin(self, runner: Runner) -> None:
        self.cache.unpin(runner.node)
        self.model.unpin(runner.namespace, runner.letters[: runner.num_shared])

    def check_every_owner(self) -> None:
        self.slots.check()
        self.cache.check()
        private = [page for each in self.runners for page in each.pages[each.num_shared :]]
        cached = [each.page for each in self.model.pages.values()]
        free = list(self.slots.take(self.slots.num_free))
        self.slots.give(ids(free))
        assert sorted(private + cached + free) == list(range(self.NUM_PAGES))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_random_requests_leave_tree_and_pages_as_the_model_has_them(page_size, seed):
    simulation = Simulation(page_size, seed)
    for step in range(17_000):
        simulation.step()
        if step % 100 == 0:
            simulation.check_every_owner()
    for runner in list(simulation.runners):
        simulation.end(runner)
    simulation.reset()
    assert simulation.slots.num_free == Simulation.NUM_PAGES
    assert simulation.cache.num_nodes == simulation.cache.num_pinned == 0
    simulation.check_every_owner()

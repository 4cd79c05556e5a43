"""balance against verl's algorithm; token_batches: what every epoch must keep."""

import heapq
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkern.data import balance, token_batches


class Part:
    def __init__(self):
        self.total, self.items = 0, []

    def key(self):
        return (self.total, len(self.items), self.items)


def karmarkar_karp(lengths, k, equal):
    """Written from the description of verl's: parts of a state are ordered by sum, number and items; the two states of
    the widest spread (among equals, the largest part) are merged, the largest part with the smallest of the other."""
    ordered = sorted((length, item) for item, length in enumerate(lengths))
    heap = []

    def push(parts):
        parts.sort(key=Part.key, reverse=True)
        total, count, items = parts[0].key()
        # greater parts first: all keys are negated, and no two largest parts hold the same first item
        heapq.heappush(heap, (-(total - parts[-1].total), -total, -count, [(-i, -v) for i, v in items], parts))

    for start in range(0, len(ordered), k if equal else 1):
        parts = [Part() for _ in range(k)]
        for part, (length, item) in zip(parts, ordered[start : start + (k if equal else 1)], strict=False):
            part.total, part.items = length, [(item, length)]
        push(parts)
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[-1], heapq.heappop(heap)[-1]
        for part, other in zip(first, reversed(second), strict=True):
            part.total += other.total
            part.items += other.items
        push(first)
    return [sorted(item for item, _ in part.items) for part in heap[0][-1]]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 8), st.booleans())
def test_parts_are_verl_s(lengths, k, equal):
    k = min(k, len(lengths))
    if equal:
        lengths = lengths[: len(lengths) // k * k]
    parts = balance(lengths, k, equal_size=equal)
    assert sorted(index for part in parts for index in part.tolist()) == list(range(len(lengths)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert [part.tolist() for part in parts] == karmarkar_karp(lengths, k, equal)
    if equal:
        assert {len(part) for part in parts} == {len(lengths) // k}


def test_a_large_balance_is_verl_s():
    lengths = np.random.default_rng(0).lognormal(6, 1, 2000).astype(int)
    for k, equal in [(8, False), (8, True), (64, False)]:
        n = len(lengths) // k * k
        parts = balance(lengths[:n], k, equal_size=equal)
        assert [part.tolist() for part in parts] == karmarkar_karp(lengths[:n].tolist(), k, equal)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, pa.array])
def test_kinds(kind):
    parts = balance(kind([8, 7, 6, 5, 4]), 2)
    assert [part.tolist() for part in parts] == [[1, 3, 4], [0, 2]]


@pytest.mark.parametrize(
    ("lengths", "k", "equal", "error", "message"),
    [
        ([1, -2, 3], 2, False, ValueError, "lengths must not be negative, got -2 in row 1"),
        ([1, 2], 3, False, ValueError, "k must be at least 1 and at most the number of lengths 2, got 3"),
        ([1, 2, 3], 2, True, ValueError, "k must divide the number of lengths with equal_size=True, got 3"),
        ([1, 2], 0, False, ValueError, "k must be an integer of at least 1 that fits int64, got 0"),
        ([2**62, 2**62], 1, False, ValueError, "the sum of lengths must fit int64"),
        ([1, 2.5], 1, False, TypeError, "lengths[1] must be an integer that fits int64, got float 2.5"),
        (pa.array([1, None]), 1, False, ValueError, "lengths[1] is null"),
    ],
)
def test_balance_refuses(lengths, k, equal, error, message):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.balance: {message}")):
        balance(lengths, k, equal_size=equal)


@st.composite
def samplers(draw):
    budget = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(0, budget), min_size=8, max_size=60))
    options = {"ranks": draw(st.integers(1, 4)), "seed": draw(st.integers(0, 2**63 - 1)), "padded": draw(st.booleans())}
    return lengths, budget, options


def made(lengths, budget, options, **more):
    """The sampler, or None where rows would have to be split."""
    try:
        return token_batches(lengths, budget, **(options | more))
    except ValueError as error:
        assert re.search(r"rows cannot make \d+ batches, the least multiple of ranks=\d", str(error))  # noqa: PT017
        return None


@settings(max_examples=200, deadline=None)
@given(samplers(), st.integers(0, 5))
def test_every_epoch(case, epoch):
    lengths, budget, options = case
    sampler = made(lengths, budget, options)
    if sampler is None:
        return
    try:
        sampler.set_epoch(epoch)
        count = len(sampler)
    except ValueError:
        return
    batches = list(sampler)
    assert len(batches) == count
    assert count % options["ranks"] == 0
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[index] for index in batch]
        assert (max(own) * len(own) if options["padded"] else sum(own)) <= budget
    again = token_batches(lengths, budget, **options)
    again.set_epoch(epoch)
    assert list(again) == batches
    # every rank by itself: the same batches by turns, the same number of them
    for rank in range(options["ranks"]):
        alone = token_batches(lengths, budget, **options, rank=rank)
        alone.set_epoch(epoch)
        assert len(alone) == count // options["ranks"]
        assert list(alone) == batches[rank :: options["ranks"]]


@settings(max_examples=60, deadline=None)
@given(samplers(), st.integers(0, 30))
def test_resumed_where_it_stood(case, stop):
    lengths, budget, options = case
    if made(lengths, budget, options) is None:
        return
    sampler = token_batches(lengths, budget, **options, rank=0)
    everything = list(sampler)
    again = token_batches(lengths, budget, **options, rank=0)
    iterator = iter(again)
    first = [next(iterator) for _ in range(min(stop, len(everything)))]
    resumed = token_batches(lengths, budget, **options, rank=0)
    resumed.load_state_dict(again.state_dict())
    if len(first) < len(everything):
        resumed.set_epoch(0)  # as trainers do at the beginning of the epoch
        assert first + list(resumed) == everything
    else:
        assert resumed.state_dict()["epoch"] == 1
    assert resumed.state_dict()["epoch"] == 1
    by_count = token_batches(lengths, budget, **options, rank=0)
    by_count.load_state_dict(token_batches(lengths, budget, **options, rank=0).state_dict(done=len(first)))
    assert first + list(by_count) == everything


def test_epochs_differ_and_waste_little():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6, 0.7, 20_000).clip(1, 4096).astype(int)
    for padded in (True, False):
        sampler = token_batches(lengths, 16_384, 8, padded=padded)
        first, second = list(sampler), list(sampler)
        assert sampler.state_dict()["epoch"] == 2
        alike = {tuple(batch) for batch in first} & {tuple(batch) for batch in second}
        assert len(alike) < 0.01 * len(first)  # batches of the few longest rows may meet again
        costs = [lengths[b].max() * len(b) if padded else lengths[b].sum() for b in first]
        # a batch is cut at 16384 cells: on average half a row of about 500 tokens is left free, or far less when packed
        assert lengths.sum() > (0.93 if padded else 0.98) * 16_384 * len(first)
        steps = np.reshape(costs, (-1, 8))
        assert np.mean(steps.max(1) / steps.min(1)) < 1.05
        # steps of long and of short rows come in no order: no correlation beyond 4 standard deviations
        means = np.reshape([lengths[batch].mean() for batch in first], (-1, 8)).mean(1)
        assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 4 / len(means) ** 0.5


def test_as_batch_sampler_of_a_dataloader():
    rows = [torch.full((length,), index) for index, length in enumerate([5, 3, 9, 2, 4, 7, 1])]
    sampler = token_batches([len(row) for row in rows], 10, seed=3)
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler, collate_fn=list)
    assert len(loader) == len(sampler)
    for _ in range(2):
        assert sorted(int(row[0]) for batch in loader for row in batch) == list(range(7))


def test_indices_are_plain_ints():
    """As those of torch's samplers: a dataset may seed a generator with them."""

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, index):
            assert type(index) is int
            return float(torch.rand((), generator=torch.Generator().manual_seed(index)))

        def __len__(self):
            return 7

    batches = token_batches([1, 2, 3, 4, 3, 2, 1], 5)
    assert all(type(batch) is list for batch in batches)
    loader = torch.utils.data.DataLoader(Rows(), batch_sampler=batches)
    assert sum(len(batch) for batch in loader) == 7


def test_with_datasets():
    from datasets import Dataset

    from prefkern.data import collate_scored

    rows = [{"prompt_ids": [index], "completion_ids": [1] * (index % 4), "score": float(index)} for index in range(20)]
    dataset = Dataset.from_list(rows)
    sampler = token_batches([1 + index % 4 for index in range(20)], 12, ranks=2, rank=1)
    seen = []
    for rows_in, options in (
        (dataset, {"batch_sampler": sampler}),
        (dataset.with_format("arrow"), {"sampler": sampler}),
    ):
        options |= {"batch_size": None} if "sampler" in options else {}
        sampler.set_epoch(0)
        loader = torch.utils.data.DataLoader(rows_in, collate_fn=lambda r: collate_scored(r, pad_token_id=0), **options)
        seen.append([batch["score"].tolist() for batch in loader])
    assert seen[0] == seen[1]
    assert 0 < sum(map(len, seen[0])) < 20


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            ([1, 9, 2, 8], 5),
            {},
            ValueError,
            "lengths must not exceed budget 5, got 9 in rows 1 and 3: truncate or split",
        ),
        (([1, -9], 5), {}, ValueError, "lengths must not be negative, got -9 in row 1"),
        (
            ([5, 5, 5], 5, 2),
            {},
            ValueError,
            "3 rows cannot make 4 batches, the least multiple of ranks=2 that budget=5",
        ),
        (([5], 5, 0), {}, ValueError, "ranks must be an integer of at least 1 that fits int64, got 0"),
        (([5], 0), {}, ValueError, "budget must be an integer of at least 1 that fits int64, got 0"),
        (([5, 5], 5, 2), {"rank": 2}, ValueError, "rank must be below ranks=2, got 2"),
        (([5], 5), {"seed": -1}, ValueError, "seed must be an integer of at least 0 that fits int64, got -1"),
        (([5.5], 5), {}, TypeError, "lengths[0] must be an integer that fits int64, got float 5.5"),
    ],
)
def test_token_batches_refuses(arguments, options, error, message):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.token_batches: {message}")):
        token_batches(*arguments, **options)


def test_states_of_others_are_refused():
    state = token_batches([1, 2, 3], 5, seed=1).state_dict()
    for other, name in [(([1, 2, 3], 5), "seed"), (([1, 2, 4], 5, 1, 1), "tokens"), (([1, 2, 3], 6, 1, 1), "budget")]:
        with pytest.raises(ValueError, match=f"prefkern.data.token_batches: state must be of the same {name}, got"):
            token_batches(*other).load_state_dict(state)
    with pytest.raises(ValueError, match=re.escape("state['done'] must be at most the epoch's 2 batches, got 3")):
        token_batches([1, 2, 3], 5, seed=1).load_state_dict(state | {"done": 3})


@pytest.mark.parametrize("rank", [None, 1])
def test_a_pass_over_nothing_is_an_epoch(rank):
    empty = token_batches([], 4, ranks=2, rank=rank)
    assert [list(empty), empty.epoch, list(empty), empty.epoch] == [[], 1, [], 2]
    trained = token_batches([1, 2, 3, 4], 4, ranks=2, rank=rank)
    trained.load_state_dict(trained.state_dict(done=len(trained)))  # all of epoch 0
    assert list(trained) == []
    assert trained.state_dict() | {"epoch": 1, "done": 0} == trained.state_dict()
    assert len(list(trained)) == len(token_batches([1, 2, 3, 4], 4, ranks=2, rank=rank))


def test_a_state_of_the_same_lengths_in_another_order_is_refused():
    state = token_batches([1, 2, 3], 5).state_dict()
    with pytest.raises(ValueError, match=r"state must be of the same lengths, got \d+, not \d+"):
        token_batches([1, 3, 2], 5).load_state_dict(state)

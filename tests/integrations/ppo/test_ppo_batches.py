"""How a rollout is cut: mini-batches of equal tokens, and processes of equal work."""

import numpy as np
import pytest

from prefkern.integrations.ppo.rollout import Rows, deal, mini_batches


def lengths(count: int) -> Rows:
    """As a rollout's are: most answers are short, some are long."""
    made = np.random.default_rng(0)
    return made.integers(32, 65, count) + np.minimum(made.geometric(1 / 120, count), 512)


@pytest.mark.parametrize(("count", "parts"), [(64, 4), (63, 4), (12, 2), (5, 5), (7, 1), (1, 1)])
def test_mini_batches_hold_every_row_once_and_as_many_each(count: int, parts: int) -> None:
    cut = mini_batches(lengths(count), parts, np.random.default_rng(1))
    assert sorted(np.concatenate(cut).tolist()) == list(range(count))
    sizes = [len(rows) for rows in cut]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def test_mini_batches_hold_as_many_tokens_and_other_rows_in_every_epoch() -> None:
    tokens, parts, epochs = lengths(64), 4, 50
    together = np.zeros((64, 64))
    heaviest = {"random": 0.0, "balanced": 0.0}
    for epoch in range(epochs):
        balanced = mini_batches(tokens, parts, np.random.default_rng(epoch))
        random = np.array_split(np.random.default_rng(epoch).permutation(64), parts)
        for name, cut in (("random", random), ("balanced", balanced)):
            heaviest[name] += max(tokens[rows].sum() for rows in cut) / tokens.sum() * parts / epochs
        for rows in balanced:
            together[np.ix_(rows, rows)] += 1 / epochs
    assert heaviest["random"] > 1.1
    assert heaviest["balanced"] < 1.03
    # two rows of 64 meet in 15 of 63 epochs; the deviation of 50 draws is 0.06
    pairs = together[np.triu_indices(64, 1)]
    assert pairs.mean() == pytest.approx(15 / 63)
    assert pairs.std() < 0.1
    assert pairs.max() < 0.75


@pytest.mark.parametrize(("count", "parts", "ranks"), [(64, 4, 2), (64, 3, 4), (3, 4, 2), (5, 1, 3)])
def test_processes_have_as_many_batches_as_little_padding_and_as_much_work(count: int, parts: int, ranks: int) -> None:
    tokens, rows = lengths(count), np.random.default_rng(2).permutation(count)
    shares = [deal(tokens, rows, parts, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {parts}
    assert sorted(np.concatenate([batch for share in shares for batch in share]).tolist()) == list(range(count))

    def cells(batches: list[Rows]) -> int:
        return sum(len(batch) * int(tokens[batch].max(initial=0)) for batch in batches)

    single = deal(tokens, rows, parts * ranks, 0, 1)
    work = [cells(share) for share in shares]
    assert sum(work) == cells(single)
    neighbours = [cells(single[rank::ranks]) for rank in range(ranks)]
    if count == 64:
        assert max(work) < 0.95 * max(neighbours)
    else:
        assert max(work) <= max(neighbours)

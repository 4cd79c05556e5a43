"""How well rollouts are cut: tokens of mini-batches, work of processes, padding. `bench/ppo.py batches` writes it."""

import statistics

import numpy as np

from prefkern.integrations.ppo.rollout import Rows, deal, mini_batches

QUERY = (32, 65)


def measured(epochs: int) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of rollouts of mostly short answers, of which some are long."""
    made, rows = np.random.default_rng(0), []
    for count, parts, ranks, accumulated in ((64, 4, 2, 2), (64, 4, 4, 4), (512, 8, 8, 2)):
        lengths = made.integers(*QUERY, count) + np.minimum(made.geometric(1 / 120, count), 512)
        found: dict[str, list[float]] = {}
        for epoch in range(epochs):
            random = np.array_split(np.random.default_rng(epoch).permutation(count), parts)
            balanced = mini_batches(lengths, parts, np.random.default_rng(epoch))
            for name, cut in (("random", random), ("balanced", balanced)):
                found.setdefault(name, []).append(_above_mean([int(lengths[part].sum()) for part in cut]))
            batches = [deal(lengths, part, accumulated * ranks, 0, 1) for part in balanced]
            shares = [[deal(lengths, part, accumulated, n, ranks) for n in range(ranks)] for part in balanced]
            neighbours = [[whole[n::ranks] for n in range(ranks)] for whole in batches]
            for name, dealt in (("neighbours", neighbours), ("dealt", shares)):
                heaviest = [_above_mean([_cells(lengths, share) for share in each]) for each in dealt]
                found.setdefault(name, []).append(statistics.mean(heaviest))
            padded = sum(_cells(lengths, whole) for whole in batches), sum(_cells(lengths, [part]) for part in balanced)
            for name, cells in zip(("by length", "together"), padded, strict=True):
                found.setdefault(name, []).append(cells / float(lengths.sum()) - 1)
        shown = {name: f"{statistics.mean(values):.1%}" for name, values in found.items()}
        rows.append(
            [f"{count} episodes, {parts} mini-batches, {ranks} processes, {accumulated} parts", *shown.values()]
        )
    columns = ["", "tokens of the heaviest mini-batch above the mean: at random", "balanced"]
    columns += ["cells of the heaviest process above the mean: neighbours", "balanced"]
    columns += ["padding: by length", "in one part"]
    return columns, rows


def _cells(lengths: Rows, parts: list[Rows]) -> int:
    return sum(len(part) * int(lengths[part].max(initial=0)) for part in parts)


def _above_mean(values: list[int]) -> float:
    return max(values) / statistics.mean(values) - 1

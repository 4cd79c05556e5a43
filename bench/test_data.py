"""The Rust core beside TRL's Python, and beside what the memory allows."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from prefkern.data import ArrowRows, collate_pairs, gae, pack
from prefkern.integrations.trl.collators import DataCollatorForPreference

GAMMA, LAM = 0.99, 0.95


def loop_over_positions(rewards, values):
    """As TRL's PPO trainer wrote it: one step per position, all rows at once."""
    steps, last = [], torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        steps.append(last)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, advantages + values


@pytest.mark.parametrize("shape", [(64, 1024), (256, 2048), (1024, 4096)], ids=str)
@pytest.mark.parametrize("name", ["loop over positions", "prefkern", "copy"])
def test_gae(benchmark, name, shape):
    rewards, values = torch.randn(shape), torch.randn(shape)
    out = (torch.empty(shape), torch.empty(shape))

    def copy():  # the least that must move: two arrays in, two out
        out[0].copy_(rewards)
        out[1].copy_(values)

    def ours():
        return gae(rewards, values, gamma=GAMMA, lam=LAM, out=out)

    for got, want in zip(ours(), loop_over_positions(rewards.double(), values.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    steps = {"loop over positions": lambda: loop_over_positions(rewards, values), "prefkern": ours, "copy": copy}
    benchmark.group = f"gae {shape}"
    benchmark(steps[name])


@pytest.mark.parametrize("name", ["TRL", "prefkern"])
def test_pack(benchmark, name):
    data_utils = pytest.importorskip("trl.data_utils")
    lengths = np.random.default_rng(0).integers(1, 128, 100_000)  # short: TRL also copies the tokens
    capacity = 256
    packs = pack(lengths, capacity)
    bins = [packs.order[a:b] for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)]
    assert max(lengths[items].sum() for items in bins) <= capacity
    assert sorted(packs.order) == list(range(len(lengths)))
    benchmark.group = "pack 100 000 lengths"
    if name == "prefkern":
        benchmark(pack, lengths, capacity)
        return
    table = pa.table(
        {"ids": pa.ListArray.from_arrays(np.concatenate(([0], lengths.cumsum())), pa.nulls(lengths.sum()))}
    )
    benchmark.pedantic(data_utils._pack_bfd, (table, capacity), rounds=2)


@pytest.mark.parametrize("name", ["TRL", "prefkern, lists", "prefkern, Arrow"])
def test_collate_pairs(benchmark, name):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    generator = np.random.default_rng(0)

    def ids(low, high):
        return generator.integers(0, 50_000, generator.integers(low, high)).tolist()

    rows = [
        {"prompt_ids": ids(100, 600), "chosen_ids": ids(100, 900), "rejected_ids": ids(100, 900)} for _ in range(64)
    ]
    table = pa.Table.from_pylist(rows)
    theirs = trainer.DataCollatorForPreference(pad_token_id=0)
    for given in (rows, table):
        batch = collate_pairs(given, pad_token_id=0)
        assert all(torch.equal(batch[key], want) for key, want in theirs(rows).items())
    benchmark.group = "collate_pairs, 64 pairs"
    if name == "TRL":
        benchmark(theirs, rows)
    else:
        benchmark(collate_pairs, rows if name.endswith("lists") else table, pad_token_id=0)


@pytest.mark.parametrize("name", ["TRL", "prefkern"])
def test_fetch_and_collate_pairs(benchmark, name):
    """What a DataLoader does for one batch: rows out of a dataset, and tensors of them."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets = pytest.importorskip("datasets")
    generator = np.random.default_rng(0)
    longest = {"prompt_ids": 600, "chosen_ids": 900, "rejected_ids": 900}
    dataset = datasets.Dataset.from_list(
        [
            {
                column: generator.integers(0, 50_000, generator.integers(100, high)).tolist()
                for column, high in longest.items()
            }
            for _ in range(1000)
        ]
    )
    indices = generator.permutation(len(dataset))[:64].tolist()
    loaders = {
        "TRL": (dataset, trainer.DataCollatorForPreference(pad_token_id=0)),
        "prefkern": (ArrowRows(dataset), DataCollatorForPreference(pad_token_id=0)),
    }
    batches = [collate(rows.__getitems__(indices)) for rows, collate in loaders.values()]
    assert all(torch.equal(batches[1][key], want) for key, want in batches[0].items())
    rows, collate = loaders[name]
    benchmark.group = "fetch and collate 64 pairs"
    benchmark(lambda: collate(rows.__getitems__(indices)))

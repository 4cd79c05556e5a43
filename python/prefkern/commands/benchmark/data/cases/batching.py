"""Collation beside TRL's, padding-free batches beside transformers', packing beside TRL's, balancing beside verl's, and
how the time grows with the number of tokens."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from prefkern.commands.benchmark.data.cases.batching_peers import verl_balance
from prefkern.commands.benchmark.data.cases.case import OURS, DataCase, Goal, Prepared, Step
from prefkern.data import balance, collate_pairs, flatten, pack

LISTS, FETCHED = "prefkern, lists", "prefkern, with the fetch"
TRL, TRL_FETCHED, COPY = "TRL", "TRL, with the fetch", "copy of the outputs"
TRANSFORMERS, VERL = "transformers", "verl's algorithm"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
Rows = list[dict[str, list[int]]]


def preference_rows(pairs: int, scale: int) -> Rows:
    """Sequences of about ``scale`` tokens."""
    random = np.random.default_rng(0)
    bounds = {"prompt_ids": (scale // 10, 3 * scale // 5), "chosen_ids": (scale // 10, 11 * scale // 10)}
    bounds["rejected_ids"] = bounds["chosen_ids"]
    lengths = {name: random.integers(low, high, pairs) for name, (low, high) in bounds.items()}
    return [{name: random.integers(0, 50_000, lengths[name][row]).tolist() for name in IDS} for row in range(pairs)]


def _differ(got: dict[str, Any], want: dict[str, Any]) -> str | None:
    wrong = [
        name for name, value in want.items() if not torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value))
    ]
    return f"{', '.join(wrong)} differ" if wrong else None


def pairs_case(pairs: int, scale: int) -> Prepared:
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = preference_rows(pairs, scale)
    dataset = Dataset.from_list(rows)
    by_arrow, table, theirs = dataset.with_format("arrow"), pa.Table.from_pylist(rows), DataCollatorForPreference(0)
    ours = partial(collate_pairs, pad_token_id=0)
    order = np.random.default_rng(1).permutation(pairs).tolist()
    want = theirs(rows)
    outputs = [value.clone() for value in want.values()]

    def copy() -> None:
        for name, into in zip(want, outputs, strict=True):
            into.copy_(want[name])

    def check() -> str | None:
        given = {"Arrow": table, "lists": rows}
        for kind, these in given.items():
            if wrong := _differ(ours(these), want):
                return f"from {kind}: {wrong}"
        return _differ(ours(by_arrow[order]), theirs([rows[index] for index in order]))

    steps: dict[str, Step] = {
        OURS: partial(ours, table),
        LISTS: partial(ours, rows),
        FETCHED: lambda: ours(by_arrow[order]),
        TRL: partial(theirs, rows),
        TRL_FETCHED: lambda: theirs(dataset.__getitems__(order)),
        COPY: copy,
    }
    goals = (Goal(TRL, 1 / 100), Goal(TRL, 1 / 50, contender=LISTS), Goal(TRL_FETCHED, 1 / 10, contender=FETCHED))
    return Prepared(steps, check, (COPY,), goals)


def flatten_case(rows: int, scale: int) -> Prepared:
    from transformers import DataCollatorWithFlattening

    lists = [row["chosen_ids"] for row in preference_rows(rows, scale)]
    array, features = pa.array(lists), [{"input_ids": ids} for ids in lists]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def ours(given: Any) -> dict[str, Any]:
        return flatten(given).model_inputs(labels=True)

    def check() -> str | None:
        want = theirs(features)
        return _differ(ours(array), want) or _differ(ours(lists), want)

    steps: dict[str, Step] = {OURS: partial(ours, array), LISTS: partial(ours, lists)}
    steps[TRANSFORMERS] = partial(theirs, features)
    return Prepared(steps, check, (), (Goal(TRANSFORMERS, 1 / 100),))


def pack_case(count: int) -> Prepared:
    from trl.data_utils import _pack_bfd

    capacity = 2048
    lengths = np.random.default_rng(0).integers(1, capacity + 1, count)
    # TRL's packer also moves the tokens; a column of nulls has none, so that its search for bins is what is timed.
    offsets = pa.array(np.concatenate(([0], lengths.cumsum())), pa.int64())
    table = pa.table({"ids": pa.LargeListArray.from_arrays(offsets, pa.nulls(int(lengths.sum())))})

    def check() -> str | None:
        got, want = pack(lengths, capacity), _pack_bfd(table, capacity)["seq_lengths"].combine_chunks()
        bounds, packed = want.offsets.to_numpy(), want.values.to_numpy()
        same = np.array_equal(bounds, got.offsets) and np.array_equal(packed, lengths[got.order])
        return None if same else "the bins are not TRL's"

    return Prepared(
        {OURS: partial(pack, lengths, capacity), TRL: partial(_pack_bfd, table, capacity)},
        check,
        (),
        (Goal(TRL, 1 / 500),),
        {"lightbinpack": "has no wheel"},
    )


def balance_case(count: int, k: int) -> Prepared:
    lengths = np.random.default_rng(0).lognormal(6, 1, count).astype(np.int64)
    theirs = partial(verl_balance, lengths.tolist(), k)

    def check() -> str | None:
        same = [part.tolist() for part in balance(lengths, k)] == theirs()
        return None if same else "the parts are not verl's"

    return Prepared({OURS: partial(balance, lengths, k), VERL: theirs}, check, (), (Goal(VERL, 1 / 100),))


def growth_case(tokens: int) -> Prepared:
    """Rows of 1000 tokens: their collation, and a copy of as much as it writes."""
    rows = max(1, tokens // 1000)
    width = tokens // rows
    values, offsets = np.arange(tokens, dtype=np.int32), np.arange(rows + 1) * width
    array = pa.LargeListArray.from_arrays(offsets, values)
    source, into = (torch.zeros(tokens, dtype=torch.int64) for _ in range(2))

    def copy() -> None:
        for _ in range(3):
            into.copy_(source)

    def check() -> str | None:
        flat = flatten(array)
        same = torch.equal(flat.input_ids, torch.arange(tokens)) and int(flat.cu_seqlens[-1]) == tokens
        return None if same else "tokens were lost"

    return Prepared({OURS: partial(flatten, array), COPY: copy}, check, (COPY,))


CASES = [
    DataCase("collate pairs", "64 pairs of about 1000 tokens", partial(pairs_case, 64, 1000)),
    DataCase("padding-free", "128 rows of about 600 tokens", partial(flatten_case, 128, 1000)),
    DataCase("pack", "100 000 lengths", partial(pack_case, 100_000)),
    DataCase("pack", "1 000 000 lengths", partial(pack_case, 1_000_000)),
    DataCase("balance", "65 536 lengths, 8 parts", partial(balance_case, 65_536, 8)),
    *(
        DataCase("growth", f"{10**power:_} tokens".replace("_", " "), partial(growth_case, 10**power))
        for power in range(3, 9)
    ),
    DataCase("collate pairs", "4 pairs of about 40 tokens", partial(pairs_case, 4, 40), quick=True),
    DataCase("padding-free", "8 rows", partial(flatten_case, 8, 40), quick=True),
    DataCase("pack", "50 lengths", partial(pack_case, 50), quick=True),
    DataCase("balance", "100 lengths, 4 parts", partial(balance_case, 100, 4), quick=True),
    DataCase("growth", "2000 tokens", partial(growth_case, 2000), quick=True),
]

"""collate_rollouts against plain loops, against shift_labels, and inside a PPO step."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefkern as pk
from prefkern.data import collate_rollouts, gae

RECORDED = ("logprobs", "ref_logprobs", "values", "rewards")


@st.composite
def rollouts(draw):
    token = st.integers(0, 2**40)
    number = st.floats(-100, 100, width=32)
    masked, recorded, scored = draw(st.booleans()), draw(st.sets(st.sampled_from(RECORDED))), draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        n = draw(st.integers(0, 6))
        row = {"query_ids": draw(st.lists(token, min_size=1, max_size=6))}
        row["response_ids"] = draw(st.lists(token, min_size=n, max_size=n))
        if masked:
            row["response_mask"] = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        row |= {name: draw(st.lists(number, min_size=n, max_size=n)) for name in RECORDED if name in recorded}
        if scored:
            row["score"] = draw(number)
        rows.append(row)
    return rows


def by_loops(rows, pad, layout, multiple, align):
    """The same batch, one cell at a time."""
    left = max(len(row["query_ids"]) for row in rows) if layout == "left_padded" else None
    begins = [0 if left is None else left - len(row["query_ids"]) for row in rows]
    ends = [begin + len(row["query_ids"]) + len(row["response_ids"]) for begin, row in zip(begins, rows, strict=True)]
    width = -(-max(ends) // multiple) * multiple
    shape = (len(rows), width)
    batch = {"input_ids": torch.full(shape, pad)}
    batch |= {name: torch.zeros(shape, dtype=torch.int64) for name in ("attention_mask", "completion_mask")}
    batch["position_ids"], batch["targets"] = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    batch["target_mask"] = torch.zeros(shape, dtype=torch.int64)
    batch |= {name: torch.zeros(shape) for name in RECORDED if name in rows[0]}
    for b, (begin, row) in enumerate(zip(begins, rows, strict=True)):
        for position, token in enumerate(row["query_ids"] + row["response_ids"]):
            batch["input_ids"][b, begin + position] = token
            batch["attention_mask"][b, begin + position] = 1
            batch["position_ids"][b, begin + position] = position
        first = begin + len(row["query_ids"])
        for j, token in enumerate(row["response_ids"]):
            if row.get("response_mask", [True] * (j + 1))[j]:
                batch["completion_mask"][b, first + j] = 1
                batch["targets"][b, first + j - 1] = token
                batch["target_mask"][b, first + j - 1] = 1
            for name in RECORDED:
                if name in row:
                    batch[name][b, first + j - (align == "targets")] = row[name][j]
    if "score" in rows[0]:
        batch["score"] = torch.tensor([row["score"] for row in rows])
    return batch


def same(got, expected):
    assert set(got) == set(expected)
    for name, wanted in expected.items():
        assert got[name].dtype == wanted.dtype, name
        np.testing.assert_array_equal(got[name], wanted, err_msg=name)


layouts = st.sampled_from(["concatenated", "left_padded"])
alignments = st.sampled_from(["targets", "tokens"])


@settings(max_examples=80, deadline=None)
@given(rollouts(), st.integers(0, 2**40), layouts, st.sampled_from([None, 1, 3, 8]), alignments)
def test_every_cell(rows, pad, layout, multiple, align):
    got = collate_rollouts(rows, pad_token_id=pad, layout=layout, pad_to_multiple_of=multiple, align=align)
    same(got, by_loops(rows, pad, layout, multiple or 1, align))
    np.testing.assert_array_equal(
        got["targets"], pk.shift_labels(got["input_ids"], mask=got["completion_mask"] == 1), err_msg="shift_labels"
    )
    np.testing.assert_array_equal(got["targets"] != -100, got["target_mask"] == 1)


@settings(max_examples=40, deadline=None)
@given(rollouts(), layouts, st.data())
def test_arrow_is_the_same_as_lists(rows, layout, data):
    table = pa.Table.from_pylist([*rows[:1], *rows, *rows[:1]])
    cut = data.draw(st.integers(0, len(table)))
    table = pa.concat_tables([table[:cut], table[cut:]])[1:-1]
    expected = collate_rollouts(rows, pad_token_id=1, layout=layout)
    same(collate_rollouts(table, pad_token_id=1, layout=layout), expected)
    named = {name: [row[name] for row in rows] for name in rows[0]}
    same(collate_rollouts(named, pad_token_id=1, layout=layout), expected)
    arrays = [
        {name: torch.tensor(value) if name in RECORDED else np.array(value, None if value else np.int64)}
        if isinstance(value, list)
        else {name: value}
        for row in rows
        for name, value in row.items()
    ]
    width = len(rows[0])
    joined = [{k: v for cell in arrays[i * width : (i + 1) * width] for k, v in cell.items()} for i in range(len(rows))]
    same(collate_rollouts(joined, pad_token_id=1, layout=layout), expected)


def test_other_names():
    rows = [{"prompt_ids": [1, 2], "completion_ids": [3]}, {"prompt_ids": [4], "completion_ids": [5, 6]}]
    renamed = [{"query_ids": row["prompt_ids"], "response_ids": row["completion_ids"]} for row in rows]
    same(collate_rollouts(pa.Table.from_pylist(rows), pad_token_id=0), collate_rollouts(renamed, pad_token_id=0))


def test_float64_where_torch_says_so():
    row = {"query_ids": [1], "response_ids": [2], "values": [1 / 3], "score": 1 / 3}
    torch.set_default_dtype(torch.float64)
    try:
        batch = collate_rollouts([row], pad_token_id=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch["values"].tolist() == [[1 / 3, 0.0]]
    assert batch["score"].tolist() == [1 / 3]


@pytest.mark.parametrize("layout", ["concatenated", "left_padded"])
def test_a_ppo_step(layout):
    """Log-probabilities of the collated batch stand where the recorded ones do: all ratios are 1; padding is inert."""
    generator = torch.Generator().manual_seed(0)
    embedding, head = torch.randn(11, 8, generator=generator), torch.randn(11, 8, generator=generator)

    def logps_of(ids, targets):
        return pk.linear_token_logprobs(embedding[ids], head, targets).logps

    rows = []
    for query, response in [(3, 4), (1, 2), (5, 0), (2, 6)]:
        ids = torch.randint(11, (query + response,), generator=generator)
        recorded = logps_of(ids[:-1], ids[1:])[query - 1 :]
        rewards, values = torch.randn(2, response, generator=generator)
        row = {"query_ids": ids[:query], "response_ids": ids[query:], "logprobs": recorded}
        rows.append(row | {"rewards": rewards, "values": values})
    batch = collate_rollouts(rows, pad_token_id=0, layout=layout)
    logps = logps_of(batch["input_ids"], batch["targets"])
    np.testing.assert_allclose(logps, batch["logprobs"], rtol=0, atol=2e-6)
    found = gae(batch["rewards"], batch["values"], mask=batch["target_mask"])
    for b, row in enumerate(rows):
        scored = batch["target_mask"][b] == 1
        if len(row["rewards"]):
            alone = gae(row["rewards"][None], row["values"][None]).advantages[0]
            np.testing.assert_array_equal(found.advantages[b][scored], alone)
    out = pk.ppo_loss(logps, batch["logprobs"], found.advantages, batch["target_mask"])
    expected = -found.advantages.sum() / batch["target_mask"].sum()
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"query_ids": []}, {}, ValueError, "query_ids[1] must hold at least one token: one that predicts"),
        ({"query_ids": [1, -2]}, {}, ValueError, "query_ids[1][1] must be a token id, got the negative number -2"),
        ({"response_ids": [-3, 1]}, {}, ValueError, "response_ids[1][0] must be a token id, got the negative number"),
        ({"response_ids": [1.5, 1]}, {}, TypeError, "response_ids[1][0] must be an integer that fits int64, got float"),
        ({"response_mask": [1]}, {}, ValueError, "response_ids[1] and response_mask[1] must have the same length"),
        ({"response_mask": [1, 2]}, {}, ValueError, "response_mask[1][1] must be 0 or 1 (or a bool), got 2"),
        ({"logprobs": [0.5] * 3}, {}, ValueError, "response_ids[1] and logprobs[1] must have the same length"),
        ({"logprobs": [0.5, "x"]}, {}, TypeError, "logprobs[1][1] must be a number, got str 'x'"),
        ({"logprobs": np.array([1, 2])}, {}, TypeError, "logprobs[1] must hold floating-point numbers, got int64 (2,)"),
        ({"score": "high"}, {}, TypeError, "score[1] must be a number, got str 'high'"),
        ({}, {"pad_token_id": -1}, ValueError, "pad_token_id must be an integer of at least 0 that fits int64, got -1"),
        ({}, {"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be an integer of at least 1"),
        ({}, {"layout": "right"}, ValueError, "layout must be one of 'concatenated', 'left_padded', got 'right'"),
        ({}, {"align": "left"}, ValueError, "align must be one of 'targets', 'tokens', got 'left'"),
    ],
)
def test_refused(change, options, error, message):
    row = {"query_ids": [1], "response_ids": [2, 3], "response_mask": [1, 0], "logprobs": [-1.0, -2.0], "score": 1.0}
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.collate_rollouts: {message}")):
        collate_rollouts([row, row | change], **({"pad_token_id": 0} | options))


def test_missing_columns_are_refused():
    with pytest.raises(ValueError, match=re.escape("rows[1] must have the keys query_ids, response_ids, values;")):
        collate_rollouts(
            [{"query_ids": [1], "response_ids": [2], "values": [0.5]}, {"query_ids": [1], "response_ids": [2]}],
            pad_token_id=0,
        )
    with pytest.raises(ValueError, match="rows must hold at least one row, got none"):
        collate_rollouts([], pad_token_id=0)

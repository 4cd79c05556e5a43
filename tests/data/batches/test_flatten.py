"""flatten and unflatten: inverse of each other, the batches of transformers and of TRL, rows apart from each other."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import prefkern as pk
from prefkern.data import flatten, unflatten
from prefkern.data.types import Flat

tokens = st.integers(0, 2**40)


@st.composite
def padded(draw):
    """Ids and a mask with padding on the left, on the right, or anywhere."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    ids = torch.tensor(draw(st.lists(tokens, min_size=rows * width, max_size=rows * width)), dtype=torch.int64)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)), dtype=torch.bool)
    mask = mask.view(rows, width)
    side = draw(st.sampled_from(["left", "right", "anywhere"]))
    if side != "anywhere":
        mask = mask.long().sort(dim=1, descending=side == "right").values.bool()
    return ids.view(rows, width), mask


def check(flat, rows):
    assert flat.input_ids.tolist() == [token for row in rows for token in row]
    assert flat.position_ids.tolist() == [position for row in rows for position in range(len(row))]
    assert flat.cu_seqlens.tolist() == [0, *np.cumsum([len(row) for row in rows]).tolist()]
    assert flat.max_seqlen == max(map(len, rows))
    dtypes = (flat.input_ids.dtype, flat.position_ids.dtype, flat.indices.dtype, flat.cu_seqlens.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int64, torch.int32)


@settings(max_examples=150, deadline=None)
@given(padded(), st.sampled_from([torch.bool, torch.int64, torch.int32, torch.uint8]), st.integers(-5, 5))
def test_padded_there_and_back(batch, dtype, fill):
    ids, mask = batch
    flat = flatten(ids, mask.to(dtype))
    check(flat, [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)])
    np.testing.assert_array_equal(flat.indices, mask.flatten().nonzero().flatten())
    np.testing.assert_array_equal(unflatten(flat.input_ids, flat, fill=fill), ids.masked_fill(~mask, fill))
    np.testing.assert_array_equal(ids.flatten(0, 1)[flat.indices], flat.input_ids)
    features = torch.randn(*ids.shape, 2, 3)
    np.testing.assert_array_equal(
        unflatten(features.flatten(0, 1)[flat.indices], flat), features * mask[..., None, None]
    )
    by_numpy = flatten(ids.numpy(), mask.numpy())
    np.testing.assert_array_equal(by_numpy.indices, flat.indices)
    assert unflatten(by_numpy.input_ids.numpy(), by_numpy).dtype == np.int64


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**30), max_size=7), min_size=1, max_size=6), st.data())
def test_rows_of_every_kind(rows, data):
    width = max(map(len, rows))
    expected = flatten(rows)
    check(expected, rows)
    right = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
    filled = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
    as_padded = flatten(filled, right)
    kind = data.draw(st.sampled_from([pa.list_, pa.large_list]))(data.draw(st.sampled_from([pa.int32(), pa.int64()])))
    array = pa.array([[9, 9], *rows, [8]], kind)
    cut = data.draw(st.integers(0, len(array)))
    chunked = pa.chunked_array([array[:cut], array[cut:]])
    others = [as_padded, flatten(array[1:-1]), flatten(chunked[1:-1]), flatten([np.array(r, np.int64) for r in rows])]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(expected[:3], other[:3], strict=True))
        assert torch.equal(other.indices, expected.indices)
        assert other[3::2] == expected[3::2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=6))
def test_batches_of_transformers_and_trl(rows):
    flat = flatten(rows)
    features = [{"input_ids": row} for row in rows]
    for expected in (
        DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features),
        DataCollatorForLanguageModeling(0, padding_free=True)(features),
    ):
        expected.pop("seq_idx", None)
        got = flat.model_inputs(labels=True)
        assert set(got) == set(expected)
        assert set(flat.model_inputs()) == set(expected) - {"labels"}
        for name, wanted in expected.items():
            if isinstance(wanted, torch.Tensor):
                assert got[name].dtype == wanted.dtype, name
                np.testing.assert_array_equal(got[name], wanted, err_msg=name)
            else:
                assert got[name] == wanted, name
        # labels stand with the tokens; targets with the rows that predict them
        targets = pk.shift_labels(flat.input_ids, cu_seqlens=flat.cu_seqlens)
        np.testing.assert_array_equal(targets[:-1], expected["labels"][0, 1:])


def test_labels_of_empty_rows():
    flat = flatten([[], [1, 2], [], [3, 4], []])
    assert flat.model_inputs(labels=True)["labels"].tolist() == [[-100, 2, -100, 4]]
    assert flat.input_ids.tolist() == [1, 2, 3, 4]
    # elsewhere they are made where the batch is: every row's first position, and no other, is 0
    assert flat.input_ids.masked_fill(flat.position_ids == 0, -100).tolist() == [-100, 2, -100, 4]
    moved = Flat(*(part.to("meta") if isinstance(part, torch.Tensor) else part for part in flat))
    labels = moved.model_inputs(labels=True)["labels"]
    assert (labels.device.type, labels.shape, labels.dtype) == ("meta", (1, 4), torch.int64)


def test_no_token_influences_another_row():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaModel(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(50, (length,), generator=generator) for length in (5, 1, 7, 3)]

    @torch.no_grad()
    def hidden(flat):
        inputs = {name: flat.model_inputs()[name] for name in ("input_ids", "position_ids")}
        return model(**inputs, use_cache=False).last_hidden_state[0]

    flat = flatten(rows)
    together = hidden(flat)
    alone = torch.cat([hidden(flatten([row])) for row in rows])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-12)
    changed = [row if index != 2 else (row + 1) % 50 for index, row in enumerate(rows)]
    difference = (hidden(flatten(changed)) - together).abs().amax(dim=1)
    own = torch.zeros(len(difference), dtype=torch.bool)
    own[flat.cu_seqlens[2] : flat.cu_seqlens[3]] = True
    assert difference[~own].max() < 1e-12
    assert difference[own].min() > 1e-3
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        expected = model(input_ids=padded, attention_mask=mask).last_hidden_state
    np.testing.assert_allclose(unflatten(together, flat), expected * mask[..., None], rtol=0, atol=1e-12)


def test_gradients_flow_back():
    flat = flatten([[1, 2], [3]])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unflatten(x, flat, fill=7), x)


def test_large_batches_on_several_threads():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 3000, 600)  # 29 MB of outputs, above what one thread does alone
    rows = [rng.integers(0, 50_000, n) for n in lengths]
    mask = np.arange(3000) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(rows)
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            for flat in (flatten(rows), flatten(ids, mask), flatten(ids, mask.astype(np.int64))):
                np.testing.assert_array_equal(flat.input_ids, np.concatenate(rows))
                np.testing.assert_array_equal(flat.position_ids, np.concatenate([np.arange(n) for n in lengths]))
                cells = np.stack(np.unravel_index(flat.indices.numpy(), flat.shape))
                np.testing.assert_array_equal(cells, np.nonzero(mask[:, : flat.shape[1]]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (torch.ones(2, 3).long(), None, ValueError, "mask must be given with padded input_ids, got int64"),
        (
            torch.ones(2, 3).long(),
            np.ones((2, 3), complex),
            TypeError,
            "mask must be bool or numbers 0 and 1, got comp",
        ),
        (
            torch.ones(2, 3).long(),
            torch.ones(2, 3) / 2,
            ValueError,
            "mask must hold only 0 and 1 (or be bool), got 0.5",
        ),
        (torch.ones(2, 3).long(), torch.ones(2, 2), ValueError, "input_ids and mask must have the same shape"),
        (torch.ones(2, 3).long(), torch.ones(2, 2).long(), ValueError, "input_ids and mask must have the same shape"),
        (torch.ones(2, 3), torch.ones(2, 3).long(), TypeError, "input_ids must hold integers that fit int64"),
        (torch.ones(3).long(), torch.ones(3).long(), ValueError, "input_ids must be [B, T], got int64 (3,)"),
        (np.ones((1, 2), int), np.array([[1, 2]]), ValueError, "mask must hold only 0 and 1 (or be bool), got 2"),
        (np.array([[4, 5], [6, -7]]), np.ones((2, 2), bool), ValueError, "input_ids[1][1] must be a token id"),
        ([[1, 2], [3, -4]], None, ValueError, "input_ids[1][1] must be a token id, got the negative number -4"),
        ([[1, 2], None], None, TypeError, "input_ids[1] must be a list or a one-dimensional array, got NoneType None"),
        (pa.array([[1], None]), None, ValueError, "input_ids[1] is null; drop such rows first"),
        (pa.array([[1]]), [[1]], ValueError, "mask is for padded input_ids; the rows of an Arrow list array have"),
    ],
)
def test_refused(ids, mask, error, message):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.flatten: {message}")):
        flatten(ids, mask)


def test_masks_of_floats_are_masks():
    ids, mask = torch.tensor([[7, 8, 9], [5, 6, 4]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    for floats in (mask, mask.double().numpy(), mask.tolist()):
        assert flatten(ids, floats).input_ids.tolist() == [7, 8, 6, 4]


def test_unflatten_refuses():
    flat = flatten([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"prefkern.data.unflatten: x must have one row for each of the 3 tokens, got"):
        unflatten(torch.ones(2), flat)
    with pytest.raises(TypeError, match=r"prefkern.data.unflatten: x must be a torch.Tensor, got list \[1\]"):
        unflatten([1], flat)


def test_negative_ids_under_padding_are_not_read():
    flat = flatten(np.array([[-1, 5], [6, -1]]), np.array([[0, 1], [1, 0]]))
    assert flat.input_ids.tolist() == [5, 6]

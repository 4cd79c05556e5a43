"""collate_pairs against TRL's collators."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from prefkern.data import collate_pairs

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]},
    {"prompt_ids": [13], "chosen_ids": [14, 15, 16, 17], "rejected_ids": [18, 19]},
]


def same(got, expected):
    assert list(got) == list(expected)
    for name, wanted in expected.items():
        assert type(got[name]) is type(wanted), name
        if isinstance(wanted, torch.Tensor):
            assert got[name].dtype == wanted.dtype, name
            assert got[name].shape == wanted.shape, name
            np.testing.assert_array_equal(got[name], wanted, err_msg=name)
        else:
            assert got[name] == wanted, name


def trl(rows, pad_token_id=0, **options):
    return DataCollatorForPreference(pad_token_id=pad_token_id, **options)(rows)


@st.composite
def batches(draw, low=0):
    """Rows with completions of at least ``low`` tokens; the first sequences are not empty (TRL then returns floats)."""
    token = st.integers(0, 2**40)
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row = {"prompt_ids": draw(st.lists(token, min_size=0 if rows else 1, max_size=9))}
        row |= {name: draw(st.lists(token, min_size=low, max_size=9)) for name in IDS[1:]}
        rows.append(row)
    if draw(st.booleans()):
        for row in rows:
            row |= {name: draw(st.floats(-1e3, 0)) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    return rows


cuts = st.fixed_dictionaries(
    {
        "max_length": st.none() | st.integers(1, 20),
        "truncation_mode": st.sampled_from(["keep_start", "keep_end"]),
        "pad_to_multiple_of": st.sampled_from([None, 1, 3, 8]),
    }
)


def collated(rows, **options):
    """The batch; a case whose completion is emptied is refused, and then of no further interest."""
    cut = options["max_length"] is not None and options["truncation_mode"] == "keep_start"
    if cut and any(row[name] and len(row["prompt_ids"]) >= options["max_length"] for row in rows for name in IDS[1:]):
        with pytest.raises(ValueError, match="leaves no completion token"):
            collate_pairs(rows, **options)
        assume(False)
    return collate_pairs(rows, **options)


@settings(max_examples=200, deadline=None)
@given(batches(), cuts, st.integers(0, 2**40))
def test_tensors_are_trl_s(rows, options, pad_token_id):
    same(collated(rows, pad_token_id=pad_token_id, **options), trl(rows, pad_token_id, **options))


@settings(max_examples=100, deadline=None)
@given(batches(), cuts)
def test_interleaved_is_a_permutation(rows, options):
    concatenated = collated(rows, pad_token_id=0, **options)
    order = torch.arange(2 * len(rows)).reshape(2, -1).T.reshape(-1)
    tensors = ("input_ids", "attention_mask", "completion_mask")
    expected = {name: value[order] if name in tensors else value for name, value in concatenated.items()}
    same(collate_pairs(rows, pad_token_id=0, layout="interleaved", **options), expected)


@settings(max_examples=100, deadline=None)
@given(batches(low=1), cuts, st.sampled_from(["concatenated", "interleaved"]))
def test_padding_free_is_trl_s_sft_batch(rows, options, layout):
    pad = 2**41
    got = collated(rows, pad_token_id=pad, layout=layout, padding_free=True, **options)
    padded = collate_pairs(rows, pad_token_id=pad, layout=layout, **options)
    inside = padded["attention_mask"].bool()
    sequences = [ids[keep].tolist() for ids, keep in zip(padded["input_ids"], inside, strict=True)]
    scored = padded["completion_mask"][inside]
    collator = DataCollatorForLanguageModeling(pad, True)
    expected = collator([{"input_ids": ids} for ids in sequences])
    del expected["labels"]
    got = {name: value for name, value in got.items() if not name.startswith("ref_")}
    completion_mask = got.pop("completion_mask")
    assert completion_mask.shape == got["input_ids"].shape
    filling = got["input_ids"].shape[1] - len(scored)
    assert filling == -len(scored) % (options["pad_to_multiple_of"] or 1)
    last = len(sequences[-1]) + filling  # the filling continues the last sequence, where TRL makes sequences of it
    assert got["max_length_q"] == got["max_length_k"] == max(expected["max_length_q"], last)
    assert got["position_ids"].max() == expected["position_ids"].max()
    for name, fill in (("input_ids", pad), ("position_ids", None), ("seq_idx", len(sequences) - 1)):
        same({name: got[name][:, : len(scored)]}, {name: expected[name]})
        assert fill is None or (got[name][:, len(scored) :] == fill).all()
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert got[name].tolist() == [*expected[name].tolist()[:-1], len(scored) + filling]
    np.testing.assert_array_equal(completion_mask[0, : len(scored)], scored)
    assert not completion_mask[0, len(scored) :].any()


def test_padding_free_keeps_the_boundaries_of_empty_sequences():
    rows = [
        {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [5]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []},
    ]
    got = collate_pairs(rows, pad_token_id=0, padding_free=True)
    assert got["cu_seq_lens_q"].tolist() == [0, 0, 2, 3, 4]
    assert got["input_ids"].tolist() == [[1, 2, 5, 1]]
    assert got["seq_idx"].tolist() == [[1, 1, 2, 3]]


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


@settings(max_examples=100, deadline=None)
@given(batches(), st.data())
def test_arrow_is_the_same_as_lists(rows, data):
    rows = [row | {name: [token % 2**31 for token in row[name]] for name in IDS} for row in rows]
    make = {name: data.draw(st.sampled_from([pa.list_, pa.large_list])) for name in IDS}
    dtype = {name: data.draw(st.sampled_from([pa.int32(), pa.int64(), pa.uint32()])) for name in IDS}
    before, after = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    everything = ROWS[:before] + rows + ROWS[:after]
    extra = {name: -1.0 for name in rows[0] if name not in IDS}
    arrays = {}
    for name, column in columns([extra | row for row in everything]).items():
        array = pa.array(column, make[name](dtype[name]) if name in IDS else pa.float64())
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(array)))
            array = pa.chunked_array([array[:at], array[at:]])
        arrays[name] = array
    table = pa.table(arrays).slice(before, len(rows))
    same(collate_pairs(table, pad_token_id=3), trl(rows, 3))
    same(collate_pairs({name: table.column(name) for name in table.column_names}, pad_token_id=3), trl(rows, 3))


def test_other_containers():
    expected = trl(ROWS)
    named = columns(ROWS)
    batch = pa.RecordBatch.from_pydict(named)
    for rows in [
        tuple(ROWS),
        [row | {"text": "ignored"} for row in ROWS],
        named,
        batch,
        pa.table(named),
        [{name: tuple(row[name]) for name in IDS} for row in ROWS],
        [{name: np.array(row[name], np.int32) for name in IDS} for row in ROWS],
        [{name: torch.tensor(row[name]) for name in IDS} for row in ROWS],
        [{name: np.array(row[name], np.uint16) if i % 2 else row[name] for name in IDS} for i, row in enumerate(ROWS)],
        [{name: [np.int64(token) for token in row[name]] for name in IDS} for row in ROWS],
        {name: np.array([*column, None], object)[:-1] for name, column in named.items()},
    ]:
        same(collate_pairs(rows, pad_token_id=0), expected)
    equal = {name: [[1, 2], [3, 4]] for name in IDS}
    for rows in [
        {name: np.array(column, ">i8") for name, column in equal.items()},
        {name: torch.tensor(column).T.contiguous().T for name, column in equal.items()},
        {name: pa.array([[9, 9], *column], pa.list_(pa.int16(), 2))[1:] for name, column in equal.items()},
    ]:
        same(collate_pairs(rows, pad_token_id=0), trl([{name: equal[name][i] for name in IDS} for i in range(2)]))


def test_datasets_rows():
    from datasets import Dataset

    dataset = Dataset.from_list(ROWS)
    for kind in (None, "numpy", "torch", "arrow"):
        same(collate_pairs(dataset.with_format(kind)[1:], pad_token_id=0), trl(ROWS[1:]))
    shuffled = dataset.shuffle(seed=0).with_format("arrow")
    same(collate_pairs(shuffled[:2], pad_token_id=0), trl(list(shuffled.with_format(None))[:2]))


def test_reference_logps():
    rows = [row | {"ref_chosen_logps": -1.1 * i, "ref_rejected_logps": -2.0} for i, row in enumerate(ROWS)]
    expected = trl(rows)
    same(collate_pairs(rows, pad_token_id=0), expected)
    named = columns(rows)
    for convert in (np.array, torch.tensor, pa.array):
        scalars = {name: convert(named[name]) for name in ("ref_chosen_logps", "ref_rejected_logps")}
        same(collate_pairs(named | scalars, pad_token_id=0), expected)


def test_arrow_columns_are_not_copied(monkeypatch):
    from prefkern import _core

    seen = []
    monkeypatch.setattr(_core, "fill_sequences", lambda _place, _names, ids, *_, **__: seen.extend(ids))
    table = pa.table(
        {
            name: pa.array([[1, 2], [3]], pa.list_(kind))
            for name, kind in zip(IDS, [pa.int32(), pa.int64(), pa.int32()], strict=True)
        }
    )
    collate_pairs(table[1:], pad_token_id=0)
    for name, values in zip(IDS, seen, strict=True):
        assert values.tolist() == [3]
        buffer = table.column(name).chunk(0).values.buffers()[1]
        assert values.ctypes.data == buffer.address + 2 * values.itemsize


def test_a_large_batch_on_several_threads():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1500, (3, 200))
    rows = [
        {name: rng.integers(0, 50000, n).tolist() for name, n in zip(IDS, column, strict=True)} for column in lengths.T
    ]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append([collate_pairs(rows, pad_token_id=0, padding_free=free) for free in (False, True)])
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        same(many, one)
    same(results[0][0], trl(rows))

"""collate_unpaired against TRL's KTO collator and its dataset preparation; collate_scored against collate_unpaired."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from prefkern.data import collate_pairs, collate_scored, collate_unpaired

ROWS = [
    {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "label": True},
    {"prompt_ids": [7, 8], "completion_ids": [9], "label": False},
    {"prompt_ids": [13], "completion_ids": [14, 15, 16, 17], "label": True},
]


def same(got, expected):
    assert list(got) == list(expected)
    for name, wanted in expected.items():
        if isinstance(wanted, torch.Tensor):
            assert got[name].dtype == wanted.dtype, name
            np.testing.assert_array_equal(got[name], wanted, err_msg=name)
        else:
            assert got[name] == wanted, name


@st.composite
def batches(draw):
    ids = st.lists(st.integers(0, 2**40), max_size=8)
    kl, refs = draw(st.booleans()), draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row = {"prompt_ids": draw(ids), "completion_ids": draw(ids), "label": draw(st.booleans())}
        if kl:
            row["KL_completion_ids"] = draw(ids)
        if refs:
            row["ref_logps"] = draw(st.floats(-1e3, 0))
        if refs and kl:
            row["ref_KL_logps"] = draw(st.floats(-1e3, 0))
        rows.append(row)
    return rows


cuts = st.fixed_dictionaries(
    {"max_length": st.none() | st.integers(1, 16), "pad_to_multiple_of": st.sampled_from([None, 1, 3, 8])}
)


def emptied(rows, max_length):
    names = [name for name in ("completion_ids", "KL_completion_ids") if name in rows[0]]
    return max_length is not None and any(
        row[name] and len(row["prompt_ids"]) >= max_length for row in rows for name in names
    )


@settings(max_examples=100, deadline=None)
@given(batches(), cuts, st.integers(0, 2**40))
def test_tensors_are_trl_s(rows, options, pad_token_id):
    if emptied(rows, options["max_length"]):
        with pytest.raises(ValueError, match=r"leaves no completion token in (KL_)?completion of row"):
            collate_unpaired(rows, pad_token_id=pad_token_id, **options)
        return
    expected = DataCollatorForUnpairedPreference(pad_token_id=pad_token_id, **options)(rows)
    same(collate_unpaired(rows, pad_token_id=pad_token_id, **options), expected)
    same(collate_unpaired(pa.Table.from_pylist(rows), pad_token_id=pad_token_id, **options), expected)


@settings(max_examples=50, deadline=None)
@given(batches(), cuts)
def test_mismatched_completions_are_those_of_trl_s_preparation(rows, options):
    rows = [{name: row[name] for name in ("prompt_ids", "completion_ids", "label")} for row in rows]
    assume(len(rows) > 1)
    completions = [row["completion_ids"] for row in rows]
    cycled = [completions[-1], *completions[:-1]]  # as KTOTrainer's get_kl_completion_ids
    prepared = [row | {"KL_completion_ids": other} for row, other in zip(rows, cycled, strict=True)]
    assume(not emptied(prepared, options["max_length"]))
    expected = DataCollatorForUnpairedPreference(pad_token_id=0, **options)(prepared)
    same(collate_unpaired(rows, pad_token_id=0, mismatched=True, **options), expected)


@settings(max_examples=40, deadline=None)
@given(batches(), cuts, st.booleans())
def test_the_end_is_kept_as_for_pairs(rows, options, padding_free):
    """Pairs of twice the same completion are tested against TRL: their first half is the unpaired batch."""
    options |= {"pad_token_id": 5, "truncation_mode": "keep_end", "padding_free": padding_free}
    if padding_free:
        options["pad_to_multiple_of"] = None
    got = collate_unpaired(rows, **options)
    for prefix, name in (("", "completion_ids"), ("KL_", "KL_completion_ids")):
        if name not in rows[0]:
            continue
        twice = [{"prompt_ids": r["prompt_ids"], "chosen_ids": r[name], "rejected_ids": r[name]} for r in rows]
        pairs = collate_pairs(twice, **options)
        ids = pairs["input_ids"]
        half = (slice(None), slice(ids.shape[1] // 2)) if padding_free else slice(len(rows))
        for key in ("input_ids", "completion_mask", "position_ids" if padding_free else "attention_mask"):
            np.testing.assert_array_equal(got[prefix + key], pairs[key][half], err_msg=prefix + key)
        if padding_free:
            bounds = pairs["cu_seq_lens_q"][: len(rows) + 1]
            np.testing.assert_array_equal(got[prefix + "cu_seq_lens_q"], bounds)
            assert got[prefix + "max_length_k"] == max(bounds.diff())


def test_labels_of_every_kind():
    expected = torch.tensor([True, False, True])
    numbers = ([1, 0, 1], [1.0, 0.0, 1.0], np.array([1, 0, 1]), torch.tensor([1.0, 0.0, 1.0]))
    for labels in ([True, False, True], torch.tensor([True, False, True]), *numbers):
        named = {"prompt_ids": [[1]] * 3, "completion_ids": [[2]] * 3, "label": labels}
        assert torch.equal(collate_unpaired(named, pad_token_id=0)["label"], expected)
    rows = [row | {"label": np.bool_(row["label"])} for row in ROWS]
    assert torch.equal(collate_unpaired(rows, pad_token_id=0)["label"], expected)


def test_numbers_that_no_float_can_hold_name_their_row():
    rows = {"prompt_ids": [[1]] * 2, "completion_ids": [[2]] * 2, "label": [1, 0], "ref_logps": [-1, -(10**400)]}
    with pytest.raises(ValueError, match=r"ref_logps\[1\] must be a number that a float can hold, got int -1000"):
        collate_unpaired(rows, pad_token_id=0)
    scored = {"prompt_ids": [[1]], "completion_ids": [[2]], "score": [10**5000]}
    with pytest.raises(ValueError, match=r"score\[0\] must be a number that a float can hold, got int of too many"):
        collate_scored(scored, pad_token_id=0)


@settings(max_examples=40, deadline=None)
@given(batches(), cuts, st.data())
def test_scored_is_unpaired_with_a_score(rows, options, data):
    assume(not emptied(rows, options["max_length"]))
    unpaired = collate_unpaired(rows, pad_token_id=0, **options)
    names = ("input_ids", "attention_mask", "completion_mask")
    scores = [data.draw(st.floats(-10, 10)) for _ in rows]
    expected = {name: unpaired[name] for name in names} | {"score": torch.tensor(scores)}
    for response, score in [("response_ids", "score"), ("completion_ids", "reward")]:
        scored = [
            {"prompt_ids": row["prompt_ids"], response: row["completion_ids"], score: number}
            for row, number in zip(rows, scores, strict=True)
        ]
        same(collate_scored(scored, pad_token_id=0, **options), expected)
        same(collate_scored(pa.Table.from_pylist(scored), pad_token_id=0, **options), expected)


def refused(function, rows, error, message, **options):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.{function.__name__}: {message}")):
        function(rows, **({"pad_token_id": 0} | options))


def test_refused():
    refused(
        collate_unpaired,
        ROWS,
        ValueError,
        "max_length=2 leaves no completion token in completion of rows 0 and 1: their prompts fill it",
        max_length=2,
    )
    # row 1 keeps its own completion, but not all of row 0's prompt would leave room for the mismatched one
    short = [ROWS[0] | {"completion_ids": []}, ROWS[1]]
    refused(
        collate_unpaired,
        short,
        ValueError,
        "max_length=3 leaves no completion token in mismatched completion of row 0",
        max_length=3,
        mismatched=True,
    )
    kl = [row | {"KL_completion_ids": [1]} for row in ROWS]
    refused(collate_unpaired, kl, ValueError, "mismatched=True is for rows without KL_completion_ids", mismatched=True)
    refused(collate_unpaired, ROWS[:1], ValueError, "mismatched=True needs at least two rows", mismatched=True)
    refused(collate_unpaired, [ROWS[0] | {"label": 2}], TypeError, "label[0] must be True or False (or 1 or 0)")
    refused(
        collate_unpaired,
        [ROWS[0], ROWS[1] | {"label": None}],
        TypeError,
        "label[1] must be True or False (or 1 or 0), got NoneType None",
    )
    refused(collate_unpaired, [{"prompt_ids": [1]}], ValueError, "rows[0] must have the keys prompt_ids, comp")
    negative = [kl[0], kl[1] | {"KL_completion_ids": [3, -1]}]
    refused(collate_unpaired, negative, ValueError, "KL_completion_ids[1][1] must be a token id, got the negative")
    negative = [ROWS[0], ROWS[1] | {"completion_ids": [-4]}]
    refused(collate_unpaired, negative, ValueError, "completion_ids[1][0] must be a token id, got the negative")
    scored = {"prompt_ids": [1], "response_ids": [2], "score": float("nan")}
    refused(collate_scored, [scored | {"score": 0.5}, scored], ValueError, "score[1] must be a finite number, got nan")
    refused(collate_scored, [scored | {"score": "good"}], TypeError, "score[0] must be a number, got str 'good'")
    refused(collate_scored, [{"prompt_ids": [1], "score": 1}], ValueError, "rows[0] must have the keys prompt_ids")

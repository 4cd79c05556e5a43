"""The collators against TRL's own: equal tensors for every option, from lists and from Arrow."""

import dataclasses
import inspect
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer import dpo_trainer, kto_trainer, reward_trainer, sft_trainer

from prefkern.integrations.trl import collators as ours
from prefkern.integrations.trl.trainers import surface

PAIRS = [
    (ours.DataCollatorForPreference, dpo_trainer.DataCollatorForPreference),
    (ours.DataCollatorForLanguageModeling, sft_trainer.DataCollatorForLanguageModeling),
    (ours.RewardDataCollatorForPreference, reward_trainer.DataCollatorForPreference),
    (ours.DataCollatorForUnpairedPreference, kto_trainer.DataCollatorForUnpairedPreference),
]
token = st.integers(0, 2**31 - 1)
multiple = st.sampled_from([None, 1, 3, 8])


def ids(low: int = 0, high: int = 9) -> st.SearchStrategy[list[int]]:
    return st.lists(token, min_size=low, max_size=high)


def same(got: dict, expected: dict) -> None:
    assert list(got) == list(expected)
    for name, wanted in expected.items():
        assert type(got[name]) is type(wanted), name
        if isinstance(wanted, torch.Tensor):
            assert (got[name].dtype, got[name].shape) == (wanted.dtype, wanted.shape), name
            np.testing.assert_array_equal(got[name], wanted, err_msg=name)
        else:
            assert got[name] == wanted, name


def check(make: int, rows: list[dict], **options: object) -> None:
    mine, theirs = (cls(**options) for cls in PAIRS[make])
    expected = theirs([dict(row) for row in rows])
    same(mine(rows), expected)
    if all(row.keys() == rows[0].keys() for row in rows):
        same(mine(pa.Table.from_pylist(rows)), expected)
    same(pickle.loads(pickle.dumps(mine))(rows, return_tensors="pt"), expected)


@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_signatures_are_trl_s(mine: type, theirs: type) -> None:
    assert inspect.signature(mine) == inspect.signature(theirs)
    assert [field.name for field in dataclasses.fields(mine)] == [field.name for field in dataclasses.fields(theirs)]


@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_public_names_are_trl_s(mine: type, theirs: type) -> None:
    assert surface(theirs).items() <= surface(mine).items()


@pytest.mark.parametrize("lengths", [[[5]], [[3, 2]], [[2, 2], [3]], [[1], [1, 4, 1], [2]]], ids=str)
def test_positions_of_packed_sequences(lengths: list[list[int]]) -> None:
    """A public function of TRL's class, which its own tests and subclasses call."""
    mine, theirs = (cls.get_position_ids_from_packed_seq_lengths(lengths) for cls in PAIRS[1])
    assert [row.dtype for row in mine] == [row.dtype for row in theirs]
    assert [row.tolist() for row in mine] == [row.tolist() for row in theirs]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_preference(data: st.DataObject) -> None:
    row = st.fixed_dictionaries(dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), ids(1)))
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    if data.draw(st.booleans()):
        rows = [row | {"ref_chosen_logps": -1.5 * i, "ref_rejected_logps": -0.1} for i, row in enumerate(rows)]
    longest = max(len(row["prompt_ids"]) for row in rows)
    check(
        0,
        rows,
        pad_token_id=data.draw(token),
        max_length=data.draw(st.none() | st.integers(longest + 1, longest + 12)),
        truncation_mode=data.draw(st.sampled_from(["keep_start", "keep_end"])),
        pad_to_multiple_of=data.draw(multiple),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_unpaired_preference(data: st.DataObject) -> None:
    row = st.fixed_dictionaries({"prompt_ids": ids(), "completion_ids": ids(1), "label": st.booleans()})
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    if data.draw(st.booleans()):
        rows = [row | {"KL_completion_ids": data.draw(ids(1)), "ref_KL_logps": -3.0} for row in rows]
    if data.draw(st.booleans()):
        rows = [row | {"ref_logps": -0.3 * i} for i, row in enumerate(rows)]
    longest = max(len(row["prompt_ids"]) for row in rows)
    check(
        3,
        rows,
        pad_token_id=data.draw(token),
        max_length=data.draw(st.none() | st.integers(longest + 1, longest + 12)),
        pad_to_multiple_of=data.draw(multiple),
    )


@st.composite
def sequences(draw: st.DrawFn) -> list[dict]:
    """Rows with or without labels; where rows are packed, of sequences that are not empty."""
    rows = [{"input_ids": ids} for ids in draw(st.lists(ids(1), min_size=1, max_size=5))]
    labelled = draw(st.sampled_from(["none", "all", "some"]))
    for row in rows:
        if labelled == "all" or (labelled == "some" and draw(st.booleans())):
            row["labels"] = [draw(st.sampled_from([-100, token])) for token in row["input_ids"]]
    if draw(st.booleans()):
        for row in rows:
            cuts = sorted({0, len(row["input_ids"])} | set(draw(st.lists(st.integers(1, len(row["input_ids"]))))))
            row["seq_lengths"] = np.diff(cuts).tolist()
    return rows


@settings(max_examples=150, deadline=None)
@given(sequences(), st.booleans(), st.booleans(), multiple, token)
def test_language_modeling(
    rows: list[dict], padding_free: bool, positions: bool, multiple: int | None, pad: int
) -> None:
    options = {"padding_free": padding_free, "return_position_ids": positions, "pad_to_multiple_of": multiple}
    check(1, rows, pad_token_id=pad, **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reward_preference(data: st.DataObject) -> None:
    row = st.fixed_dictionaries({"chosen_ids": ids(1), "rejected_ids": ids(1)})
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    if data.draw(st.booleans()):
        rows = [row | {"margin": 0.1 * i} for i, row in enumerate(rows)]
    check(2, rows, pad_token_id=data.draw(token), pad_to_multiple_of=data.draw(multiple))


def test_an_empty_row_beside_others() -> None:
    rows = [{"input_ids": [1, 2]}, {"input_ids": []}, {"input_ids": [3]}]
    for padding_free in (False, True):
        got = ours.DataCollatorForLanguageModeling(0, padding_free)(rows)
        want = sft_trainer.DataCollatorForLanguageModeling(0, padding_free)(rows)
        if not padding_free:  # torch.tensor([]) is of floats, and TRL's mask then too
            want = {name: value.long() for name, value in want.items()}
        want["labels"], want["input_ids"] = want["labels"].long(), want["input_ids"].long()
        same(got, want)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"input_ids": [1, 2], "labels": [1]}],
            r"input_ids\[0\] and labels\[0\] must have the same length, got 2 and 1",
        ),
        ([{"input_ids": [1]}, {"input_ids": [2, -3]}], r"input_ids\[1\] must hold no negative ids, got -3"),
        ([{"input_ids": []}], "at least one token"),
        ([], "at least one token"),
        ([{"input_ids": [1]}, {"labels": [2]}], r"rows\[1\] must have the keys input_ids"),
        ([{"input_ids": [1.5]}], r"input_ids\[0\]\[0\]"),
        ({"labels": [[1]]}, r"must have the columns input_ids; input_ids is missing from \['labels'\]"),
        ({"input_ids": [[1], [2]], "seq_lengths": [[1]]}, "same number of rows, got 2 and 1"),
        (
            [{"input_ids": [1, 2], "seq_lengths": [2]}, {"input_ids": [3, 4], "seq_lengths": [1]}],
            r"seq_lengths\[1\] adds up to 1, input_ids\[1\] has 2 tokens",
        ),
        ([{"input_ids": [1, 2], "seq_lengths": [3, -1]}], "must not be negative"),
        (3, "got int"),
    ],
)
def test_language_modeling_refuses(rows: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ours.DataCollatorForLanguageModeling(0, True)(rows)


def test_refusals() -> None:
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    with pytest.raises(ValueError, match="leaves no completion token"):
        ours.DataCollatorForPreference(0, max_length=2)([pair])
    with pytest.raises(ValueError, match="truncation_mode must be one of"):
        ours.DataCollatorForPreference(0, max_length=2, truncation_mode="middle")([pair])
    with pytest.raises(ValueError, match="return_tensors must be one of 'pt', got 'np'"):
        ours.DataCollatorForPreference(0)([pair], return_tensors="np")
    with pytest.raises(ValueError, match="join_prompt=True"):
        ours.RewardDataCollatorForPreference(0)([pair])
    with pytest.raises(ValueError, match="join_prompt=True"):
        ours.RewardDataCollatorForPreference(0)(pa.Table.from_pylist([pair]))
    with pytest.raises(ValueError, match=r"rejected_ids is missing from \['chosen_ids'\]"):
        ours.RewardDataCollatorForPreference(0)([{"chosen_ids": [1]}])


def test_trl_s_own_are_instances() -> None:
    for mine, theirs in PAIRS:
        assert isinstance(theirs(pad_token_id=0), mine)
        assert isinstance(mine(pad_token_id=0), mine)
        assert not isinstance(theirs, mine)
    assert not isinstance(dpo_trainer.DataCollatorForPreference(0), ours.RewardDataCollatorForPreference)
    assert not isinstance(ours.DataCollatorForPreference(0), ours.DataCollatorForLanguageModeling)


def test_margins_that_begin_in_a_later_row_are_missed() -> None:
    """TRL's collator looks for them in the first row and would train without."""
    rows = [{"chosen_ids": [1], "rejected_ids": [2]}, {"chosen_ids": [1], "rejected_ids": [2], "margin": 0.5}]
    with pytest.raises(ValueError, match=r"rows\[0\] must have the keys .*; margin is missing"):
        ours.RewardDataCollatorForPreference(0)(rows)
    rows[0]["margin"] = 10**400
    with pytest.raises(ValueError, match=r"margin\[0\] must be a number that a float can hold"):
        ours.RewardDataCollatorForPreference(0)(rows)

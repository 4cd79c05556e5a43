"""What collate_pairs refuses: the message names the argument, the row and the position."""

import collections
import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from prefkern.data import collate_pairs

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]},
    {"prompt_ids": [13], "chosen_ids": [14, 15, 16, 17], "rejected_ids": [18, 19]},
]


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def refused(error, message, rows=ROWS, **options):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.collate_pairs: {message}")):
        collate_pairs(rows, **({"pad_token_id": 0} | options))


def test_emptied_completions_are_refused():
    refused(
        ValueError,
        "max_length=3 leaves no completion token in chosen of row 0 and rejected of row 0: their prompts fill it; "
        'raise max_length, shorten these prompts, or use truncation_mode="keep_end"',
        max_length=3,
    )
    refused(
        ValueError,
        "max_length=2 leaves no completion token in chosen of rows 0 and 1 and rejected of rows 0 and 1",
        max_length=2,
    )
    one_empty = [ROWS[0] | {"rejected_ids": []}, *ROWS[1:]]
    refused(ValueError, "max_length=3 leaves no completion token in chosen of row 0:", one_empty, max_length=3)
    kept = collate_pairs(ROWS, pad_token_id=0, max_length=1, truncation_mode="keep_end")
    assert kept["input_ids"].tolist() == [[5], [9], [17], [6], [12], [19]]


def test_rows_are_refused():
    refused(ValueError, "rows must hold at least one row, got none", [])
    refused(
        ValueError,
        "rows must hold at least one row, got none",
        pa.table({name: pa.array([], pa.list_(pa.int64())) for name in IDS}),
    )
    refused(TypeError, "rows must be a list of dicts, a dict of columns or a pyarrow.Table, got str", "rows")
    refused(TypeError, "rows[1] must be a dict, got a list of 1", [ROWS[0], [1]])
    refused(
        ValueError,
        "rows[1] must have the keys prompt_ids, chosen_ids, rejected_ids; chosen_ids is missing from ['prompt_ids']",
        [ROWS[0], {"prompt_ids": [1]}],
    )
    refused(
        ValueError,
        "rows must have the columns prompt_ids, chosen_ids, rejected_ids; prompt_ids is missing from ['prompt']",
        pa.table({"prompt": ["x"]}),
    )
    refused(ValueError, "rows must have the columns", {"prompt_ids": [[1]], "chosen_ids": [[2]]})
    refused(
        ValueError,
        "prompt_ids, chosen_ids and rejected_ids must have the same number of rows, got 3, 3 and 2",
        columns(ROWS) | {"rejected_ids": [[1], [2]]},
    )
    refused(
        ValueError,
        "rows[1] must have the keys prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps;",
        [ROWS[0] | {"ref_chosen_logps": -1.0}, ROWS[1]],
    )


def test_ids_are_refused_by_row():
    for bad, error, message in [
        ([1, -5], ValueError, "chosen_ids[1][1] must be a token id, got the negative number -5"),
        (np.array([1, -5]), ValueError, "chosen_ids[1][1] must be a token id, got the negative number -5"),
        ([1, 2.5], TypeError, "chosen_ids[1][1] must be an integer that fits int64, got float 2.5"),
        (["x"], TypeError, "chosen_ids[1][0] must be an integer that fits int64, got str 'x'"),
        ([None], TypeError, "chosen_ids[1][0] must be an integer that fits int64, got NoneType None"),
        (None, TypeError, "chosen_ids[1] must be a list or a one-dimensional array, got NoneType None"),
        (7, TypeError, "chosen_ids[1] must be a list or a one-dimensional array, got int 7"),
        ([[1]], TypeError, "chosen_ids[1][0] must be an integer that fits int64, got list [1]"),
        (np.array([[1]]), TypeError, "chosen_ids[1] must be a list or a one-dimensional array, got int64 (1, 1)"),
        (np.array([1.0]), TypeError, "chosen_ids[1] must hold integers, got float64 (1,)"),
        (torch.tensor([1], device="meta"), ValueError, "chosen_ids[1] must be on the CPU"),
    ]:
        refused(error, message, [ROWS[0], ROWS[1] | {"chosen_ids": bad}, ROWS[2]])
    # the position counts from the start of the row, also when the row is cut there
    late = [{"prompt_ids": [1, 2, -3], "chosen_ids": [4], "rejected_ids": [5]}]
    refused(
        ValueError,
        "prompt_ids[0][2] must be a token id, got the negative number -3",
        late,
        max_length=2,
        truncation_mode="keep_end",
    )


def test_arrow_ids_are_refused_by_row():
    table = pa.table(columns(ROWS))

    def replaced(values, kind=None):
        return table.set_column(1, "chosen_ids", pa.array(values, kind))

    refused(ValueError, "chosen_ids[1] is null; drop such rows first", replaced([[1], None, [2]]))
    refused(ValueError, "chosen_ids[0] is null; drop such rows first", replaced([[1], None, [2]])[1:])
    refused(ValueError, "chosen_ids[2][1] is null", replaced([[1], [], [2, None]]))
    refused(ValueError, "chosen_ids[1][1] is null", replaced([[1], [], [2, None]])[1:])
    refused(ValueError, "chosen_ids[2][0] must be a token id, got the negative number -2", replaced([[1], [3], [-2]]))
    refused(TypeError, "chosen_ids must hold integers that fit int64, got float64", replaced([[1.0], [], []]))
    refused(
        TypeError,
        "chosen_ids must hold integers that fit int64, got uint64",
        replaced([[1], [], []], pa.list_(pa.uint64())),
    )
    refused(TypeError, "chosen_ids must hold integers that fit int64, got bool", replaced([[True], [], []]))
    refused(
        TypeError, "chosen_ids must be an Arrow list, large_list or fixed_size_list array, got", replaced([1, 2, 3])
    )


def test_reference_logps_are_refused_by_row():
    named = columns(ROWS)
    refused(
        ValueError,
        "ref_chosen_logps must hold one number for each of the 3 rows, got a list of 2",
        named | {"ref_chosen_logps": [1.0, 2.0]},
    )
    refused(
        TypeError,
        "ref_chosen_logps[1] must be a number, got NoneType None",
        named | {"ref_chosen_logps": pa.array([1.0, None, 2.0])},
    )
    refused(
        TypeError, "ref_chosen_logps[2] must be a number, got str 'x'", named | {"ref_chosen_logps": [1.0, 2.0, "x"]}
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pad_token_id": None}, TypeError, "pad_token_id must be an integer, got NoneType None"),
        ({"pad_token_id": -100}, ValueError, "pad_token_id must be an integer of at least 0 that fits int64, got -100"),
        ({"max_length": 0}, ValueError, "max_length must be an integer of at least 1 that fits int64, got 0"),
        ({"max_length": 8.0}, TypeError, "max_length must be an integer, got float 8.0"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be an integer of at least 1"),
        ({"layout": "stacked"}, ValueError, "layout must be one of 'concatenated', 'interleaved', got 'stacked'"),
        (
            {"truncation_mode": "middle"},
            ValueError,
            "truncation_mode must be one of 'keep_start', 'keep_end', got 'middle'",
        ),
    ],
)
def test_options_are_refused(options, error, message):
    refused(error, message, **options)


def test_a_row_that_makes_what_it_lacks_is_refused_and_stays_as_it_was():
    rows = [collections.defaultdict(list, {"prompt_ids": [1], "chosen_ids": [2]}) for _ in range(2)]
    with pytest.raises(ValueError, match=r"rows\[0\] must have the keys .*; rejected_ids is missing from"):
        collate_pairs(rows, pad_token_id=0)
    assert [sorted(row) for row in rows] == [["chosen_ids", "prompt_ids"]] * 2
    mixed = [rows[0] | {"rejected_ids": [3]}, {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [4]}]
    assert collate_pairs(mixed, pad_token_id=0)["input_ids"].tolist() == [[1, 2], [1, 2], [1, 3], [1, 4]]

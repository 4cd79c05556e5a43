"""prepare: which rows and arguments are refused, and the sentence for each."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from preparing import GOOD, assistant, ids, quiet, user, write

from prefkern.data import RefusedRows
from prefkern.data.text.prepare import SHOWN

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("dataset_cache"),
]

BAD: dict[str, tuple[dict[str, Any] | str | int, str]] = {
    "missing": ({"prompt": "a", "label": True}, "completion is missing"),
    "null": ({"prompt": "a", "completion": None, "label": True}, "completion is null"),
    "empty": ({"prompt": "a", "completion": "", "label": True}, "completion is empty"),
    "empty list": ({"prompt": user("a"), "completion": [], "label": True}, "completion is empty"),
    "no messages": ({"prompt": [], "completion": assistant("a"), "label": True}, "prompt is a list of no messages"),
    "type": ({"prompt": 5, "completion": "a", "label": True}, "prompt must be text or a list of messages, got int 5"),
    "list": ({"prompt": ["a"], "completion": "a", "label": True}, "prompt must be text or a list of messages"),
    "mixed": (
        {"prompt": "a", "completion": assistant("b"), "label": True},
        "prompt is text but completion is a list of messages; if it begins with the prompt",
    ),
    "label": ({"prompt": "a", "completion": "b", "label": 1}, "label must be true or false, got int 1"),
    "label text": ({"prompt": "a", "completion": "b", "label": "no"}, "label must be true or false, got str 'no'"),
    "role": (
        {"prompt": [{"role": "usr", "content": "a"}], "completion": assistant("b"), "label": True},
        r"prompt[0] must have a role of system, developer, user, assistant, tool, got str 'usr'",
    ),
    "no role": ({"prompt": [{"content": "a"}], "completion": assistant("b"), "label": True}, "prompt[0] must have a"),
    "no content": (
        {"prompt": user("a"), "completion": [{"role": "assistant"}], "label": True},
        "completion[0] must have text as its content, got NoneType None",
    ),
    "image": (
        {"prompt": user([{"type": "image"}]), "completion": assistant("b"), "label": True},  # type: ignore[arg-type]
        "prompt[0] must have text as its content",
    ),
    "template": (
        {"prompt": user("boom"), "completion": assistant("b"), "label": True},
        "the chat template refuses it: no bombs",
    ),
    "tools": (
        {"prompt": user("a"), "completion": assistant("b"), "label": True, "tools": "{"},
        "tools is text that is not JSON",
    ),
    "arguments": (
        {"prompt": user("a"), "completion": assistant("b"), "label": True, "chat_template_kwargs": "x"},
        "chat_template_kwargs must be a dict, got str 'x'",
    ),
    "no object": (7, "a row must be an object with named fields, got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_rows_of_objects(words: Any, name: str, tmp_path: Path) -> None:
    bad, reason = BAD[name]
    with pytest.raises(RefusedRows) as caught:
        quiet([GOOD, GOOD, bad], words)
    assert str(caught.value).startswith(f"prefkern.data.prepare: 1 of 3 rows cannot be used: row 2: {reason}")
    assert str(caught.value).endswith("; pass on_bad='report' to leave them out")
    assert [row for row, _ in caught.value.refused] == [2]
    got = quiet(write(tmp_path / "rows.jsonl", [bad, GOOD, bad, GOOD]), words, on_bad="report")
    assert [row for row, _ in got.refused] == [0, 2]
    assert all(why.startswith(reason) for _, why in got.refused)
    assert got.rows == 4
    assert got.dataset[:]["prompt_ids"] == [ids("ab")] * 2
    assert got.dataset._indices is None


NUMBERS = {
    math.nan: "must be a finite number, got nan",
    -math.inf: "must be a finite number, got -inf",
    True: "must be a number, got bool True",
    "1": "must be a number, got str '1'",
    None: "is null",
}


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_refused_numbers(words: Any, value: Any) -> None:
    reason = NUMBERS[value]
    row = {"prompt": "a", "completion": "b", "reward": 1.0}
    assert quiet([row, row | {"reward": value}], words, on_bad="report").refused == ((1, f"reward {reason}"),)
    row = {"prompt": "a", "response": "b", "score": 1}
    assert quiet([row | {"score": value}, row], words, on_bad="report").refused == ((0, f"score {reason}"),)
    if isinstance(value, float):
        dataset = Dataset.from_list([row, row | {"score": value}])
        assert quiet(dataset, words, on_bad="report").refused == ((1, f"score {reason}"),)


def test_refused_rows_of_a_dataset(words: Any) -> None:
    rows = [GOOD, GOOD | {"completion": None}, GOOD | {"completion": "", "label": None}]
    got = quiet(Dataset.from_list(rows), words, on_bad="report")
    assert got.refused == ((1, "completion is null"), (2, "label is null"))
    with pytest.raises(
        RefusedRows,
        match=r"3 of 3 .* rows 0, 2: label must be true or false, got int 0; row 1: label must be .* int 1$",
    ):
        quiet(Dataset.from_dict({"prompt": ["a"] * 3, "completion": ["b"] * 3, "label": [0, 1, 0]}), words)
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "reward": ["high"]})
    with pytest.raises(RefusedRows, match=r"reward must be a number, got str 'high'$"):
        quiet(dataset, words, on_bad="report")


def test_refused_pairs(words: Any) -> None:
    rows = [
        {"chosen": "ab", "rejected": "ab"},
        {"chosen": "ab", "rejected": "cd"},
        {"chosen": "x", "rejected": "xy"},
        {"chosen": user("a") + assistant("b"), "rejected": user("c") + assistant("b")},
        {"chosen": "a b", "rejected": "a c"},
    ]
    assert quiet(rows, words, on_bad="report").refused == (
        (0, "chosen and rejected are the same, so that there is no telling where their prompt ends"),
        *((row, "chosen and rejected share no beginning that could be their prompt") for row in (1, 2, 3)),
    )


def test_many_refused_rows_are_grouped(words: Any) -> None:
    rows = [GOOD | {"completion": ""}] * (SHOWN + 5) + [GOOD | {"label": f"{i}"} for i in range(SHOWN + 2)] + [GOOD]
    with pytest.raises(RefusedRows) as caught:
        quiet(rows, words)
    message = str(caught.value)
    assert f"rows {', '.join(map(str, range(SHOWN)))} and 5 more: completion is empty" in message
    assert "and 3 more reasons" in message
    assert [row for row, _ in caught.value.refused] == list(range(2 * SHOWN + 7))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"text": "a"}],
            {},
            r"the columns text make none of the formats: chosen, rejected \(preference\); ",
        ),
        ([{"text": "a"}], {"format": "sft"}, "format 'sft' needs the column prompt; the columns are text"),
        ([GOOD | {"reward": 1.0}], {}, "make several formats; pass format='unpaired' or 'rewarded'"),
        ([GOOD], {"format": "dpo"}, "format must be one of 'preference', "),
        ([GOOD], {"columns": {"prompt": "q"}}, "columns names 'q' for prompt, but the columns are prompt, completion"),
        ([GOOD], {"columns": {"question": "prompt"}}, "the keys of columns must be one of"),
        ([GOOD], {"join_prompt": True}, "join_prompt is for preference pairs, but the columns make the format 'unpa"),
        ([GOOD], {"on_bad": "drop"}, "on_bad must be one of 'raise', 'report', got 'drop'"),
        ([GOOD], {"max_length": 0}, "max_length must be an integer of at least 1"),
        ([GOOD], {"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ([GOOD], {"num_proc": 0}, "num_proc must be an integer of at least 1"),
        ([], {}, "make none of the formats"),
        (Dataset.from_dict({"prompt": [], "completion": []}), {}, "dataset must have at least one row"),
        ({"train": Dataset.from_list([GOOD])}, {}, "must be one set of rows, got dict with train"),
        (datasets.DatasetDict(train=Dataset.from_list([GOOD])), {}, "must be one set of rows, got DatasetDict with tr"),
        (5, {}, "dataset must be a datasets.Dataset or IterableDataset, a path .* got int"),
        (Dataset.from_list([GOOD]).with_transform(lambda batch: batch), {}, "has a transform"),
    ],
)
def test_arguments(words: Any, rows: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        quiet(rows, words, **options)


def test_files(words: Any, tmp_path: Path) -> None:
    for name, content, message in (
        ("rows.csv", b"a", r"must end with \.parquet, \.jsonl or \.ndjson or \.json, got rows\.csv"),
        ("rows.parquet", b"not parquet", r"rows\.parquet cannot be read: "),
        ("rows.jsonl", b'{"prompt": "\xff"}', r"rows\.jsonl cannot be read: UnicodeDecodeError"),
        ("rows.json", b'[{"prompt": "a"}]', "begins with a JSON array; JSON lines have one object on each line"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            quiet(path, words)
    with pytest.raises(ValueError, match=r"there is no file .*nowhere"):
        quiet("nowhere.jsonl", words)
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got str"):
        quiet([GOOD], "gpt2")

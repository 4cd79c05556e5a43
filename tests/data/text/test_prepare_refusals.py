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
    "label": ({"prompt": "a", "completion": "b", "label": 2}, "label must be true or false, got int 2"),
    "signed label": ({"prompt": "a", "completion": "b", "label": -1}, "label must be true or false, got int -1"),
    "half a label": ({"prompt": "a", "completion": "b", "label": 0.5}, "label must be true or false, got float 0.5"),
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
    "empty turn": (
        {"prompt": user("a"), "completion": assistant(""), "label": True},
        "completion[0] is an assistant's turn that is empty",
    ),
    "later empty turn": (
        {"prompt": user("a"), "completion": assistant("b") + user("c") + assistant(""), "label": True},
        "completion[2] is an assistant's turn that is empty",
    ),
    "empty blocks": (
        {"prompt": user("a"), "completion": assistant([{"type": "text", "text": ""}]), "label": True},  # type: ignore[arg-type]
        "completion[0] is an assistant's turn that is empty",
    ),
    "speaker": (
        {"prompt": [{"from": "bing", "value": "a"}], "completion": assistant("b"), "label": True},
        "prompt[0] must be from one of system, human, user, gpt, assistant, observation, tool, got str 'bing'",
    ),
    "no value": (
        {"prompt": [{"from": "human"}], "completion": assistant("b"), "label": True},
        "prompt[0] must have text as its content, got NoneType None",
    ),
    "surrogate": (
        {"prompt": "a\ud83d", "completion": "b", "label": True},
        "its text holds U+D83D, half of a surrogate pair, which is no character",
    ),
    "surrogate in a message": (
        {"prompt": user("a"), "completion": assistant("b\ude00"), "label": True},
        "its text holds U+DE00, half of a surrogate pair, which is no character",
    ),
    "surrogate as a role": (
        {"prompt": [{"role": "\ud83d", "content": "a"}], "completion": assistant("b"), "label": True},
        "prompt[0] must have a role of system, developer, user, assistant, tool, got str '\\ud83d'",
    ),
    "images": (
        {"prompt": "<image> a", "completion": "b", "label": True, "images": ["cat.png"]},
        "images is not empty: only a model's processor can read it, and prepare tokenises text; columns={'images': ",
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


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:12])
def test_refused_numbers(words: Any, value: Any) -> None:
    reason = NUMBERS[value]
    row = {"prompt": "a", "completion": "b", "reward": 1.0}
    assert quiet([row, row | {"reward": value}], words, on_bad="report").refused == ((1, f"reward {reason}"),)
    row = {"prompt": "a", "response": "b", "score": 1}
    assert quiet([row | {"score": value}, row], words, on_bad="report").refused == ((0, f"score {reason}"),)
    if isinstance(value, float):
        dataset = Dataset.from_list([row, row | {"score": value}])
        assert quiet(dataset, words, on_bad="report").refused == ((1, f"score {reason}"),)


def test_numbers_beyond_floats(words: Any) -> None:
    row = {"prompt": "a", "completion": "b", "reward": 1.0}
    rows = [row | {"reward": 10**400}, row, row | {"reward": -(10**400)}, row | {"reward": 10**5000}]
    got = quiet(rows, words, on_bad="report")
    assert [number for number, _ in got.refused] == [0, 2, 3]
    assert got.refused[0].reason.startswith("reward must be a number that a float can hold, got int 1000000")
    assert len(got.refused[0].reason) < 120
    assert got.refused[2].reason.startswith("the row cannot be read: Exceeds the limit")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}
    with pytest.raises(RefusedRows, match="margin must be a number that a float can hold"):
        quiet([pair], words)


def test_refused_rows_of_a_dataset(words: Any) -> None:
    rows = [GOOD, GOOD | {"completion": None}, GOOD | {"completion": "", "label": None}]
    got = quiet(Dataset.from_list(rows), words, on_bad="report")
    assert got.refused == ((1, "completion is null"), (2, "label is null"))
    with pytest.raises(
        RefusedRows,
        match=r"3 of 3 .* rows 0, 2: label must be true or false, got int 2; row 1: label must be .* int 3$",
    ):
        quiet(Dataset.from_dict({"prompt": ["a"] * 3, "completion": ["b"] * 3, "label": [2, 3, 2]}), words)
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "reward": ["high"]})
    with pytest.raises(RefusedRows, match=r"reward must be a number, got str 'high'$"):
        quiet(dataset, words, on_bad="report")


def test_refused_pairs(words: Any) -> None:
    rows = [
        {"chosen": "ab", "rejected": "ab"},
        {"chosen": "ab", "rejected": "cd"},
        {"chosen": user("a") + assistant("b"), "rejected": user("c") + assistant("b")},
        {"chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("b") + user("c")},
        {"chosen": "a b", "rejected": "a c"},
    ]
    nothing = (
        "chosen and rejected share no beginning that could be their prompt; where a column holds it, name that with "
        "columns={'prompt': ...}"
    )
    assert quiet(rows, words, on_bad="report").refused == (
        (0, "chosen and rejected are the same, so that there is no telling where their prompt ends"),
        (1, nothing),
        (2, nothing),
        (3, "chosen is the beginning of rejected, so that no message of it would be scored"),
    )


def test_many_refused_rows_are_grouped(words: Any) -> None:
    rows = [GOOD | {"completion": ""}] * (SHOWN + 5) + [GOOD | {"label": f"{i}"} for i in range(SHOWN + 2)] + [GOOD]
    with pytest.raises(RefusedRows) as caught:
        quiet(rows, words)
    message = str(caught.value)
    assert f"rows {', '.join(map(str, range(SHOWN)))} and 5 more: completion is empty" in message
    assert "and 3 more reasons" in message
    assert len(message) <= 2000
    assert [row for row, _ in caught.value.refused] == list(range(2 * SHOWN + 7))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"body": "a"}],
            {},
            r"the columns body make none of the formats: chosen, rejected \(preference\); ",
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
        ([7, GOOD["prompt"]], {}, "no row can be read: row 0: a row must be an object with named fields, got int"),
        ([GOOD], {"truncation_mode": "keep_middle"}, "truncation_mode must be one of 'keep_start', 'keep_end'"),
        (
            [{"messages": user("a")}],
            {"format": "unpaired"},
            r"needs the column prompt; .*last answer .* split off: rows",
        ),
    ],
)
def test_arguments(words: Any, rows: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        quiet(rows, words, **options)


def test_files(words: Any, tmp_path: Path) -> None:
    for name, content, message in (
        ("rows.csv", b"a", r"must end with \.parquet, \.jsonl or \.ndjson or \.json, got rows\.csv"),
        ("rows.parquet", b"not parquet", r"rows\.parquet cannot be read: "),
        (
            "rows.jsonl",
            b'{"prompt": "\xff"}',
            r"no row can be read: line 1: the line holds the byte 0xff, which is not",
        ),
        (
            "rows.json",
            b'[{"prompt": "a"}',
            r"rows\.json begins as a JSON array and is none: Expecting ',' delimiter: l",
        ),
        ("two.json", b"[1]\n[2]", r"two\.json begins as a JSON array and is none: Extra data: line 2 column 1"),
        ("byte.json", b'[\n{"prompt":\n"a\xe9b"}]', r"line 3 of .*byte\.json holds the byte 0xe9, which is not UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            quiet(path, words)
    with pytest.raises(ValueError, match=r"there is no file .*nowhere"):
        quiet("nowhere.jsonl", words)
    with pytest.raises(ValueError, match=r"no file org/name; .* datasets\.load_dataset\('org/name', split='train'\)"):
        quiet("org/name", words)
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got str"):
        quiet([GOOD], "gpt2")

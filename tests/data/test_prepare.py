"""prepare: every source and format, what is refused and how, caching, processes, and what it says."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefkern.data import RefusedRows, collate_pairs, prepare
from prefkern.data.prepare import SHOWN

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

LETTERS = "abcdefghijklmnopqrstuvwxyz:"
ID = {letter: index + 2 for index, letter in enumerate(LETTERS)}
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('no bombs') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}~{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token a letter; ~ is the end; spaces vanish."""
    made = Tokenizer(models.WordLevel({"~": 0, "?": 1} | ID, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="~", unk_token="?")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(text: str) -> list[int]:
    return [0 if letter == "~" else ID[letter] for letter in text]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIRS = [{"prompt": "ab", "chosen": "c", "rejected": "de~"}, {"prompt": "f", "chosen": "gh", "rejected": "i"}]
PAIR_IDS = {
    "prompt_ids": [ids("ab"), ids("f")],
    "chosen_ids": [ids("c~"), ids("gh~")],
    "rejected_ids": [ids("de~"), ids("i~")],
}


def quiet(rows: Any, tokenizer: Any, **options: Any) -> Any:
    return prepare(rows, tokenizer, progress=False, **options)


def write(path: Path, rows: list[Any]) -> Path:
    lines = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return path


def test_every_source_gives_the_same(words: Any, tmp_path: Path) -> None:
    dataset = Dataset.from_list(PAIRS)
    dataset.to_parquet(tmp_path / "pairs.parquet")
    sources = {
        "list": PAIRS,
        "tuple": tuple(PAIRS),
        "dataset": dataset,
        "formatted": dataset.with_format("numpy"),
        "rows selected": Dataset.from_list([PAIRS[1], PAIRS[0]]).select([1, 0]),
        "iterable": IterableDataset.from_generator(lambda: iter(PAIRS)),
        "streamed": dataset.to_iterable_dataset(num_shards=2),
        "lines": write(tmp_path / "pairs.jsonl", PAIRS),
        "lines as text": str(write(tmp_path / "pairs.json", PAIRS)),
        "compressed": write(tmp_path / "pairs.jsonl.gz", PAIRS),
        "parquet": tmp_path / "pairs.parquet",
    }
    for name, source in sources.items():
        got = quiet(source, words)
        assert got.dataset[:] == PAIR_IDS, name
        assert got.format == "preference"
        assert (got.rows, got.conversational, got.refused, got.unused) == (2, 0, (), ())
        assert str(got.dataset.features["prompt_ids"]) == "List(Value('int32'))"
        collate_pairs(got.dataset.with_format("arrow")[:], pad_token_id=0)


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unpaired": (
        {"prompt": "ab", "completion": "c", "label": True},
        {"prompt_ids": ids("ab"), "completion_ids": ids("c~"), "label": True},
    ),
    "rewarded": (
        {"prompt": "ab", "completion": "c", "reward": -1.5},
        {"prompt_ids": ids("ab"), "completion_ids": ids("c~"), "reward": -1.5},
    ),
    "scored": (
        {"prompt": "ab", "response": "c", "score": 2},
        {"prompt_ids": ids("ab"), "response_ids": ids("c~"), "score": 2.0},
    ),
    "sft": ({"prompt": "ab", "completion": "c"}, {"input_ids": ids("abc~"), "labels": [-100, -100, *ids("c~")]}),
    "preference": (
        {"prompt": "ab", "chosen": "c", "rejected": "d", "ref_chosen_logps": -1, "ref_rejected_logps": -2.5},
        {"prompt_ids": ids("ab"), "chosen_ids": ids("c~"), "rejected_ids": ids("d~")}
        | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.5},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chat", [False, True])
def test_formats(words: Any, name: str, chat: bool) -> None:
    row, expected = FORMATS[name]
    if chat:  # the prompt is then u:ab~a: and the completion c~
        row = {key: value if not isinstance(value, str) else user(value) for key, value in row.items()}
        row |= {key: assistant(row[key][0]["content"]) for key in row if key in ("chosen", "completion")}
        row |= {key: assistant(row[key][0]["content"]) for key in row if key in ("rejected", "response")}
        prompt = ids("u:ab~a:")
        expected = expected | {"prompt_ids": prompt}
        if name == "sft":
            expected = {"input_ids": prompt + ids("c~"), "labels": [-100] * len(prompt) + ids("c~")}
    for rows in ([row], Dataset.from_list([row])):
        got = quiet(rows, words)
        assert got.format == name
        assert got.dataset[0] == expected
        assert got.conversational == chat


def test_prompts_that_are_implicit(words: Any) -> None:
    got = quiet([{"chosen": "ab c", "rejected": "ab d"}], words).dataset[0]
    assert got == {"prompt_ids": ids("ab"), "chosen_ids": ids("c~"), "rejected_ids": ids("d~")}
    chat = {"chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("c")}
    got = quiet([chat], words).dataset[0]
    assert got == {"prompt_ids": ids("u:a~a:"), "chosen_ids": ids("b~"), "rejected_ids": ids("c~")}
    got = quiet([chat], words, join_prompt=True).dataset[0]
    assert got == {"chosen_ids": ids("u:a~a:b~"), "rejected_ids": ids("u:a~a:c~")}


def test_text_and_conversations_together(words: Any) -> None:
    rows = [PAIRS[0], {"prompt": user("f"), "chosen": assistant("g"), "rejected": assistant("i")}, PAIRS[1]]
    got = quiet(rows, words, batch_size=2)
    assert got.conversational == 1
    assert got.dataset["prompt_ids"][:] == [ids("ab"), ids("u:f~a:"), ids("f")]
    assert got.dataset["rejected_ids"][:] == [ids("de~"), ids("i~"), ids("i~")]


def test_columns_of_other_names(words: Any) -> None:
    rows = [{"q": "ab", "completion": "old", "best": "c", "worst": "d", "id": 7}]
    names = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    for given in (rows, Dataset.from_list(rows)):
        got = quiet(given, words, columns=names)
        assert got.dataset[0] == {"prompt_ids": ids("ab"), "chosen_ids": ids("c~"), "rejected_ids": ids("d~")}
        assert got.columns == names
        assert got.unused == ("completion", "id")
    both = [{"prompt": "x", "chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("c")}]
    with pytest.raises(RefusedRows, match=r"prompt is text but chosen is a list .* pass columns=\{'prompt': None\}"):
        quiet(both, words)
    assert quiet(both, words, columns={"prompt": None}).dataset[0]["prompt_ids"] == ids("u:a~a:")


def test_max_length_cuts_as_the_collators_do(words: Any) -> None:
    rows = [PAIRS[0], {"prompt": "abc", "chosen": "defg", "rejected": "h"}]
    got = quiet(rows, words, max_length=4)
    assert got.dataset["chosen_ids"][:] == [ids("c~"), ids("d")]
    assert (got.cut, got.merged) == (2, 0)
    whole = quiet(rows, words).dataset
    batches = [collate_pairs(list(made), pad_token_id=0, max_length=4) for made in (got.dataset, whole)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])
    refused = quiet(rows, words, max_length=3, on_bad="report").refused
    assert refused == ((1, "the prompt alone fills max_length=3"),)
    single = [{"prompt": "ab", "completion": text, "label": True} for text in ("c", "cdefghij")]
    unpaired = quiet(single, words, max_length=4)
    assert unpaired.dataset["completion_ids"][:] == [ids("c~"), ids("cdef")]  # behind an empty prompt these would show
    assert unpaired.cut == 1
    joined = quiet(rows, words, max_length=5, join_prompt=True, on_bad="report")
    assert joined.refused == ((1, "prompt and chosen have more than max_length=5 tokens"),)


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
GOOD = {"prompt": "ab", "completion": "c", "label": True}


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


def merging() -> Any:
    """Pairs of letters are tokens too."""
    made = Tokenizer(models.BPE({"~": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="~")


def test_tokens_that_merge_across_the_boundary() -> None:
    rows = [
        {"prompt": "ba", "completion": "b"},
        {"prompt": "b", "completion": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    got = quiet(rows, merging(), on_bad="report")
    assert got.dataset["input_ids"][:] == [[2, 3, 0], [2, 2, 0]]
    assert got.dataset["labels"][:] == [[-100, 3, 0], [-100, 2, 0]]
    assert got.merged == 1
    assert got.refused == ((2, "the tokens of the prompt alone are not those that prompt and completion begin with"),)


def test_completions_without_tokens(words: Any) -> None:
    rows = [{"prompt": "a", "completion": " "}, {"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}]
    got = quiet(rows, words, add_eos=False, on_bad="report")
    assert got.refused == ((0, "completion has no tokens"),)
    assert got.dataset["input_ids"][:] == [ids("ab"), ids("b")]
    bare = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer)
    with pytest.raises(RefusedRows, match=r"no end-of-sequence token to put behind text; pass add_eos=False"):
        quiet(rows[1:], bare)
    assert quiet(rows[1:], bare, add_eos=False).dataset["input_ids"][:] == [ids("ab"), ids("b")]
    with pytest.raises(RefusedRows, match="it is a conversation, and the tokenizer has no chat template"):
        quiet([{"prompt": user("a"), "completion": assistant("b")}], bare)


def test_lines_of_a_file(words: Any, tmp_path: Path) -> None:
    lines = [GOOD, "", "{", GOOD, "  ", '{"prompt": "a", "completion": "b\\u2028c", "label": true, "x": NaN}', "[]"]
    path = write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(RefusedRows, match=r"2 of 5 rows cannot be used: line 3: .* not JSON.*; line 7: .* got list;"):
        quiet(path, words)
    got = quiet(path, words, on_bad="report")
    assert [row for row, _ in got.refused] == [2, 6]
    assert (got.rows, len(got.dataset), got.unused) == (5, 3, ("x",))
    spaced = quiet(write(tmp_path / "spaced.jsonl", [GOOD, ""]), words)
    assert (spaced.rows, len(spaced.dataset), spaced.refused) == (1, 1, ())


def test_values_of_numpy_and_torch(words: Any) -> None:
    rows = [{"prompt": "a", "completion": "b", "reward": value} for value in (np.float32(0.5), torch.tensor(2), 1)]
    assert quiet(rows, words).dataset["reward"][:] == [0.5, 2.0, 1.0]
    rows = [{"prompt": "a", "completion": "b", "label": value} for value in (np.bool_(True), False, b"x")]
    got = quiet(rows, words, on_bad="report")
    assert got.dataset["label"][:] == [True, False]
    assert got.refused == ((2, "the row cannot be read: it holds a bytes"),)


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


def test_results_are_found_again(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, GOOD | {"completion": ""}, GOOD])
    first = quiet(path, words, on_bad="report")
    monkeypatch.setattr("prefkern.data._tokenize.Tokenize.__call__", None)  # not called again
    again = quiet(path, words, on_bad="report")
    assert again.refused == first.refused == ((1, "completion is empty"),)
    assert again.dataset[:] == first.dataset[:]
    with pytest.raises(TypeError):
        quiet(path, words, max_length=5)


def test_results_are_files_that_are_mapped(words: Any, tmp_path: Path) -> None:
    """Of objects too, so that what is read once need not fit into memory."""
    rows = IterableDataset.from_generator(lambda: ({"prompt": "ab", "completion": "c"} for _ in range(2500)))
    got = quiet(rows, words, cache_dir=tmp_path / "here", batch_size=400).dataset
    assert len(got) == 2500
    assert [Path(file["filename"]).parent for file in got.cache_files] == [tmp_path / "here"]


@pytest.mark.filterwarnings("ignore")  # of forking a process with threads
def test_several_processes(words: Any) -> None:
    rows = [GOOD | {"completion": LETTERS[i % 26] * (i % 4)} for i in range(50)]
    one, two = (quiet(rows, words, num_proc=n, batch_size=7, on_bad="report") for n in (None, 2))
    assert two.dataset[:] == one.dataset[:]
    assert two.refused == one.refused
    assert [row for row, _ in one.refused] == [i for i in range(50) if i % 4 == 0]


def test_what_it_says(words: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [GOOD | {"id": 3}, GOOD | {"completion": ""}, GOOD | {"completion": "cdefg"}]
    got = prepare(rows, words, on_bad="report", max_length=6)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Tokenizing" in err
    line = (
        "unpaired (text): 3 rows of prompt, completion, label -> prompt_ids, completion_ids, label; 1 refused; "
        "1 cut to max_length; columns left out: id"
    )
    assert err.endswith(f"\nprefkern.data.prepare: {line}\n")
    assert str(got) == line
    prepare(rows, words, on_bad="report", progress=False)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_without_datasets() -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "import prefkern as pk\n"
        "class Words:\n    eos_token = ''\n    def __call__(self): ...\n"
        "try: pk.data.prepare([], Words())\n"
        "except pk.MissingDependency as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("prefkern.data.prepare needs datasets: pip install datasets")

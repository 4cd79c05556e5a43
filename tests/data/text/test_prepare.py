"""prepare: every source and format, caching, processes, and what it says. What it refuses: test_prepare_refusals.py."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from preparing import GOOD, LETTERS, assistant, ids, quiet, user, write
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prefkern.data import RefusedRows, collate_pairs, prepare

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("dataset_cache"),
]

PAIRS = [{"prompt": "ab", "chosen": "c", "rejected": "de~"}, {"prompt": "f", "chosen": "gh", "rejected": "i"}]
PAIR_IDS = {
    "prompt_ids": [ids("ab"), ids("f")],
    "chosen_ids": [ids("c~"), ids("gh~")],
    "rejected_ids": [ids("de~"), ids("i~")],
}


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


def test_results_are_found_again(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, GOOD | {"completion": ""}, GOOD])
    first = quiet(path, words, on_bad="report")
    monkeypatch.setattr("prefkern.data.text.tokenize.Tokenize.__call__", None)  # not called again
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

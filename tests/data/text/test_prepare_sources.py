"""prepare: files as they are found (arrays, byte-order marks, other encodings), and special tokens that stand once."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from preparing import GOOD, ids, quiet, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefkern.data import RefusedRows, collate_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("dataset_cache"),
]
ROWS = [GOOD, GOOD | {"completion": "d", "label": False}]
EXPECTED = {"prompt_ids": [ids("ab")] * 2, "completion_ids": [ids("c~"), ids("d~")], "label": [True, False]}


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("begin", ["", "\n \n", "\ufeff"])
def test_a_file_that_is_one_json_array(words: Any, tmp_path: Path, indent: int | None, begin: str) -> None:
    text = begin + json.dumps([*ROWS, 7], indent=indent)
    for name, content in (("rows.json", text.encode()), ("rows.jsonl.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(content)
        got = quiet(tmp_path / name, words, on_bad="report")
        assert got.dataset[:] == EXPECTED
        assert got.refused == ((2, "a row must be an object with named fields, got int"),)
    with pytest.raises(RefusedRows, match="1 of 3 rows cannot be used: row 2: "):
        quiet(tmp_path / "rows.json", words)


def test_a_byte_order_mark_costs_no_row(words: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    got = quiet(path, words)
    assert got.dataset[:] == EXPECTED
    assert got.unused == ()


def test_a_byte_that_is_not_utf_8_names_its_line(words: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, {**GOOD, "completion": "@"}])
    path.write_bytes(path.read_bytes().replace(b"@", b"\xe9"))  # Latin-1
    for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        packed = tmp_path / f"rows.jsonl{suffix}"
        packed.write_bytes(compress(path.read_bytes()))
        with pytest.raises(
            ValueError, match=rf"line 3 of .*rows\.jsonl\{suffix} holds the byte 0xe9, which is not UTF-8"
        ):
            quiet(packed, words, on_bad="report")
    with pytest.raises(RefusedRows, match=r"1 of 3 .*: line 3: the line holds the byte 0xe9, which is not UTF-8; pass"):
        quiet(path, words)
    got = quiet(path, words, on_bad="report")
    assert got.dataset[:] == EXPECTED
    cut = write(tmp_path / "cut.jsonl", [{**GOOD, "completion": "\u00e9"}, *ROWS])
    cut.write_bytes(cut.read_bytes().replace(b"\\u00e9", "é".encode()[:1]))
    assert quiet(cut, words, on_bad="report").refused == ((0, "the line holds the byte 0xc3, which is not UTF-8"),)
    line = json.dumps(GOOD).replace("ab", "a\x1ab")  # a letter that JSON does not allow, and that is UTF-8
    got = quiet(write(tmp_path / "control.jsonl", [line, *ROWS]), words, on_bad="report")
    assert [row for row, _ in got.refused] == [0]


BOS, EOS = 1, 2
VOCABULARY = {"?": 0, "<": BOS, "~": EOS} | {letter: 3 + at for at, letter in enumerate("abcdefg:")}


def adding(before: bool, after: bool) -> Any:
    """A tokenizer that puts BOS before, EOS behind every text by itself."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    single = "< " * before + "$A" + " ~" * after
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<", BOS), ("~", EOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<", eos_token="~", unk_token="?")
    tokenizer.chat_template = (
        "<{% for m in messages %}{{ m.role[0] }}:{{ m.content }}~{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


def tokens(text: str) -> list[int]:
    return [VOCABULARY[letter] for letter in text]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_special_tokens_of_the_tokenizer_stand_once(before: bool, after: bool) -> None:
    """TRL gives two of them to text that has its own, and ends each sequence twice."""
    words, begin = adding(before, after), "<" * before
    for completion in ("c", "c~"):
        for given in ("ab", "<ab"):
            expected = begin + given.removeprefix("<") if before else given
            got = quiet([{"prompt": given, "completion": completion}], words)
            assert got.dataset[0] == {
                "input_ids": tokens(f"{expected}c~"),
                "labels": [-100] * len(expected) + tokens("c~"),
            }
            assert (got.merged, got.reworded) == (0, 0)
    pair = quiet([{"prompt": "ab~", "chosen": "c", "rejected": "d"}], words).dataset[0]
    assert pair["prompt_ids"] == tokens(f"{begin}ab~"), "the end of an earlier turn is the prompt's own"
    joined = quiet([{"prompt": "<ab", "chosen": "c~", "rejected": "d"}], words, join_prompt=True).dataset[0]
    assert joined == {"chosen_ids": tokens("<abc~"), "rejected_ids": tokens("<abd~")}
    assert quiet([{"text": "<ab~"}], words).dataset[0]["input_ids"] == tokens("<ab~")
    bare = quiet([{"prompt": "a", "completion": "b"}], words, add_eos=False).dataset[0]
    assert bare["input_ids"] == tokens(f"{begin}ab")
    chat = [{"prompt": [{"role": "a", "content": "b"}], "completion": "c"}]
    with pytest.raises(RefusedRows):
        quiet(chat, words)
    turns = {role: [{"role": role, "content": "b"}] for role in ("user", "assistant")}
    got = quiet([{"messages": turns["assistant"]}], words).dataset[0]
    assert got["input_ids"] == tokens("<a:b~")


def test_a_prompt_that_merges_whole_is_refused_behind_a_bos_too() -> None:
    """Only the first token, which says nothing, is shared."""
    made = Tokenizer(models.BPE({"~": 0, "<": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    made.post_processor = processors.TemplateProcessing(single="< $A", special_tokens=[("<", 1)])
    words = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<", eos_token="~")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "ba", "completion": "b"}]
    got = quiet(rows, words, on_bad="report")
    assert got.refused == ((0, "the tokens of the prompt alone are not those that prompt and completion begin with"),)
    assert got.dataset["labels"][:] == [[-100, -100, 4, 0]]
    assert got.merged == 1


LONG = [
    {"prompt": "abcdef", "chosen": "gh", "rejected": "ijkl"},
    {"prompt": "a", "chosen": "bcdefghij", "rejected": "k"},
    {"prompt": "abcdefghijkl", "chosen": "mn", "rejected": "o"},
    {"prompt": "ab", "chosen": "c", "rejected": "d"},
]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [3, 5, 8, 40])
def test_prepared_rows_are_cut_as_collators_with_the_same_options_cut(words: Any, mode: str, max_length: int) -> None:
    options = {"max_length": max_length, "truncation_mode": mode}
    got = quiet(LONG, words, on_bad="report", **options)
    full = quiet(LONG, words).dataset
    refused = [row for row, _ in got.refused]
    assert refused == [row for row in range(4) if mode == "keep_start" and len(LONG[row]["prompt"]) >= max_length]
    kept = [full[row] for row in range(4) if row not in refused]
    batches = [collate_pairs(rows, pad_token_id=0, **options) for rows in (list(got.dataset), kept)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])
    lengths = [len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) + 1 for row in LONG]
    assert got.cut == sum(length > max_length for row, length in enumerate(lengths) if row not in refused)
    if max_length == 8 and mode == "keep_end":
        assert got.dataset["prompt_ids"][0] == ids("bcdef")
        assert got.dataset["chosen_ids"][1] == ids("cdefghij~")[-8:]

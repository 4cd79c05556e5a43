"""The shipped preference set, and what is refused of a user's."""

import json
import re
from pathlib import Path

import pytest

from prefkern.commands.demo import data

PAIRS = data.read(data.SHIPPED)


def test_the_shipped_set_is_worth_training_on() -> None:
    assert len(PAIRS) == 120
    for texts in zip(*PAIRS, strict=True):
        assert len(set(texts)) == 120
    for pair in PAIRS:
        assert len(pair.chosen) < 0.75 * len(pair.rejected), pair.prompt
        assert 2 <= len(re.findall(r"[.!?](?:\s|$)", pair.rejected)) <= 5, pair.prompt
        assert len(re.findall(r"[.!?](?:\s|$)", pair.chosen)) <= 4, pair.prompt
        assert pair.prompt.strip() == pair.prompt
        assert re.match(r"[A-Z].*\?$", pair.prompt), pair.prompt


def test_the_split_is_the_same_every_time_and_holds_out() -> None:
    first, second = data.split(PAIRS, 48), data.split(PAIRS, 48)
    assert first == second
    assert (len(first.train), len(first.held_out)) == (48, 12)
    assert not set(first.train) & set(first.held_out)
    assert data.split(PAIRS, 20).held_out == first.held_out, "the number of steps must not change what is held out"
    small = data.split(PAIRS[:8], 100)
    assert (len(small.train), len(small.held_out)) == (6, 2)


def test_columns() -> None:
    pair = data.Pair("Why?", "Because.", "Well.")
    assert data.columns([pair], chat=True)["chosen"] == [[{"role": "assistant", "content": "Because."}]]
    assert data.columns([pair], chat=False) == {
        "prompt": ["Question: Why?\nAnswer:"],
        "chosen": [" Because."],
        "rejected": [" Well."],
    }


GOOD = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{"], r"line 2 is not JSON"),
        ([GOOD, '{"prompt": "a", "answer": "b"}'], r"line 2 .* chosen and rejected, got \['answer', 'prompt'\]$"),
        ([GOOD, "[1]"], r"line 2 .* got list$"),
        ([GOOD, GOOD.replace('"c"', "3")], r"line 2 .* got rejected = 3$"),
        ([GOOD, GOOD.replace('"c"', '" "')], r"line 2 .* got rejected = ' '$"),
        ([GOOD] * 7, r"has 7 pairs; the demo needs at least 8"),
        ([], r"has 0 pairs"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(data.Refused, match=message) as refused:
        data.read(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(data.Refused, match="UTF-8"):
        data.read(path)


def test_blank_lines_and_extra_columns_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = json.dumps({"prompt": "ü", "chosen": "b", "rejected": "c", "source": 3}, ensure_ascii=False)
    path.write_text(f"{row}\n\n" * 8, encoding="utf-8")
    assert data.read(path) == [data.Pair("ü", "b", "c")] * 8

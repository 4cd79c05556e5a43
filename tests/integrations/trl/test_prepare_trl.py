"""prefkern.data.prepare against the preparation of TRL's trainers: the same rows, a real tokenizer, equal tokens."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_trl as tiny
import transformers
import trl
from datasets import Dataset

from prefkern.commands.demo import data as demo_data
from prefkern.commands.demo import model as demo_model
from prefkern.data import prepare

# what TRL, transformers and datasets warn about in each other is theirs
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = 40
SYSTEM = {"role": "system", "content": "You are terse."}


@cache
def tokenizer(name: str) -> Any:
    if name == "words":
        made = tiny.tokenizer()
        made.chat_template = (
            "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}assistant : {% endif %}"
        )
        return made
    file = demo_model.packaged_file()
    return transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@cache
def texts() -> list[demo_data.Pair]:
    return demo_data.read(demo_data.SHIPPED)[:ROWS]


def pairs(kind: str) -> list[dict[str, Any]]:
    """The demo's preferences in each form that TRL takes."""
    rows: list[dict[str, Any]] = []
    for index, (prompt, chosen, rejected) in enumerate(texts()):
        if kind.startswith("text"):
            gap = "" if index % 3 == 0 else " "  # a prompt that ends in a space merges with the word behind it
            row = {"prompt": f"Q: {prompt}\nA:{gap}", "chosen": f"{' '[len(gap) :]}{chosen}", "rejected": rejected}
            row["chosen"] += "<|im_end|>" if index % 4 == 0 else ""
        else:
            start = [SYSTEM] if index % 2 else []
            start += said("user", "Hello") + said("assistant", "Hi") if index % 5 == 0 else []
            row = {
                "prompt": start + said("user", prompt),
                "chosen": said("assistant", chosen),
                "rejected": said("assistant", rejected) + (said("user", "So?") if index % 7 == 0 else []),
            }
        if kind.endswith("implicit"):
            row = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        rows.append(row)
    return rows


def single(kind: str, **extra: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"]} | {name: value(index) for name, value in extra.items()}
        for index, row in enumerate(pairs(kind))
    ]


def by_trl(cls: type, rows: list[dict[str, Any]], words: Any, **options: Any) -> Dataset:
    """The rows as TRL's trainer prepares them when it is made."""
    trainer = object.__new__(cls)
    trainer._tokenizer, trainer.chat_template = words, None
    trainer.calculate_KL, trainer.completion_only_loss = False, True
    trainer.desirable_weight = trainer.undesirable_weight = 1.0
    settings = {
        "dataset_num_proc": None,
        "max_length": None,
        "truncation_mode": "keep_start",
        "dataset_text_field": "text",
        "assistant_only_loss": False,
        "shuffle_dataset": False,
    }
    args = SimpleNamespace(**settings | options)
    others = (False, None) if cls is trl.SFTTrainer else ()
    return trainer._prepare_dataset(Dataset.from_list(rows), words, args, *others, "train")


def same(got: Any, expected: Dataset) -> None:
    assert len(got.dataset) == len(expected) > 0
    for name in got.dataset.column_names:
        assert got.dataset[:][name] == expected[:][name], name


KINDS = ("text", "text, implicit", "chat", "chat, implicit")
NAMES = ("SmolLM2", "words")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_preference(name: str, kind: str) -> None:
    words, rows = tokenizer(name), pairs(kind)
    got = prepare(rows, words, progress=False)
    same(got, by_trl(trl.DPOTrainer, rows, words))
    assert got.dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert got.conversational == (0 if kind.startswith("text") else ROWS)
    merges = name == "SmolLM2" and kind == "text"  # letter by letter, an implicit prompt ends inside words too
    assert got.merged >= ROWS // 2 if merges else got.merged >= 0


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("name", NAMES)
def test_unpaired(name: str, kind: str) -> None:
    words, rows = tokenizer(name), single(kind, label=lambda index: index % 3 == 0)
    got = prepare(rows, words, progress=False)
    same(got, by_trl(trl.KTOTrainer, rows, words))
    assert got.dataset.column_names == ["prompt_ids", "completion_ids", "label"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_joined_for_reward_models(name: str, kind: str) -> None:
    words, rows = tokenizer(name), [row | {"margin": 0.5 * i} for i, row in enumerate(pairs(kind))]
    got = prepare(rows, words, join_prompt=True, progress=False)
    same(got, by_trl(trl.RewardTrainer, rows, words))
    assert got.dataset.column_names == ["chosen_ids", "rejected_ids", "margin"]


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("max_length", [None, 48])
def test_supervised(kind: str, max_length: int | None) -> None:
    words, rows = tokenizer("SmolLM2"), single(kind)
    got = prepare(rows, words, max_length=max_length, on_bad="report", progress=False)
    same(got, by_trl(trl.SFTTrainer, rows, words, max_length=max_length))
    assert (got.cut > 0) == (max_length is not None)


@pytest.mark.parametrize("max_length", [None, 48])
@pytest.mark.parametrize("name", NAMES)
def test_language_modelling(name: str, max_length: int | None) -> None:
    """Text and conversations of which every token is scored; TRL's labels are the ids where there are none."""
    words = tokenizer(name)
    for kind, column in (("text", "text"), ("chat", "messages")):
        rows = [{column: row["prompt"] + row["chosen"]} for row in pairs(kind)]
        got = prepare(rows, words, max_length=max_length, progress=False)
        expected = by_trl(trl.SFTTrainer, rows, words, max_length=max_length)
        assert got.format == column
        assert got.dataset["input_ids"][:] == got.dataset["labels"][:] == expected["input_ids"][:]


@pytest.mark.parametrize("max_length", [24, 48])
def test_the_end_is_kept_as_in_trl(max_length: int) -> None:
    words, rows = tokenizer("SmolLM2"), pairs("chat")
    options = {"max_length": max_length, "truncation_mode": "keep_end"}
    got = prepare(rows, words, progress=False, **options)
    expected = by_trl(trl.DPOTrainer, rows, words, **options)
    theirs = trl.trainer.dpo_trainer.DataCollatorForPreference(0, **options)
    batches = [theirs(list(made)) for made in (got.dataset, expected)]
    assert all(batches[0][key].equal(batches[1][key]) for key in batches[1])
    assert got.cut > 0
    shorter = prepare(rows, words, progress=False, **options).dataset
    assert max(map(len, shorter["prompt_ids"])) < max(map(len, expected["prompt_ids"]))


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_judged_completions_are_tokenised_like_unpaired_ones(kind: str) -> None:
    words = tokenizer("SmolLM2")
    want = by_trl(trl.KTOTrainer, single(kind, label=lambda index: True), words)
    rewarded = prepare(single(kind, reward=lambda index: 0.1 * index), words, progress=False).dataset
    assert rewarded[:] == {name: want[:][name] for name in ("prompt_ids", "completion_ids")} | {
        "reward": [0.1 * index for index in range(ROWS)]
    }
    rows = single(kind, score=lambda index: index)
    scored = prepare(rows, words, columns={"response": "completion"}, progress=False).dataset
    assert scored["response_ids"][:] == want["completion_ids"][:]
    assert scored["score"][:] == [float(index) for index in range(ROWS)]


def test_rows_that_max_length_leaves_out_are_those_of_trl() -> None:
    """TRL drops them without a word; here they are listed."""
    words, rows = tokenizer("SmolLM2"), pairs("chat")
    lengths = [len(ids) for ids in prepare(rows, words, progress=False).dataset["prompt_ids"]]
    limit = sorted(lengths)[ROWS // 2]
    got = prepare(rows, words, max_length=limit, on_bad="report", progress=False)
    expected = by_trl(trl.DPOTrainer, rows, words, max_length=limit)
    assert [row for row, _ in got.refused] == [row for row, length in enumerate(lengths) if length >= limit]
    mine = trl.trainer.dpo_trainer.DataCollatorForPreference(0, max_length=limit)
    batches = [mine(list(made)) for made in (got.dataset, expected)]
    assert all(batches[0][key].equal(batches[1][key]) for key in batches[1])
    longest = prepare(rows, words, join_prompt=True, progress=False).dataset["rejected_ids"]
    limit = sorted(map(len, longest))[ROWS // 2]
    joined = prepare(rows, words, max_length=limit, join_prompt=True, on_bad="report", progress=False)
    same(joined, by_trl(trl.RewardTrainer, rows, words, max_length=limit))
    assert 0 < len(joined.refused) < ROWS


def test_tools_and_template_arguments_of_a_row() -> None:
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, eos_token="<eos>")
    words.chat_template = (
        "{% if tools %}{{ tools | length }} w1 {% endif %}{{ flavour }} {% for m in messages %}{{ m.content }} "
        "{% if m.tool_calls is defined %}w2 {% endif %}<eos> {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
    )
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    rows = [
        {
            "prompt": said("user", "w5 w6"),
            "completion": [{"role": "assistant", "content": "w7", "tool_calls": [{"function": {"name": "f"}}]}],
            "label": True,
            "tools": tools,
            "chat_template_kwargs": {"flavour": flavour},
        }
        for flavour, tools in (("w9", [tool]), ("w8", [tool, tool]), ("w9", []))
    ]
    got = prepare(rows, words, progress=False)
    same(got, by_trl(trl.KTOTrainer, rows, words))
    assert len({tuple(ids) for ids in got.dataset["prompt_ids"]}) == 3
    assert got.unused == ()

"""prepare on rows as other people have them: late columns, nulls that Arrow filled in, ShareGPT, merging prompts."""

import functools
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, IterableDataset
from preparing import GOOD, assistant, ids, quiet, user, write
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prefkern.data import ArrowRows, RefusedRows, prepare
from prefkern.data.types import RefusedRow

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("dataset_cache"),
]

CALLS = (
    "{% if tools is not none %}t:{{ tools | length }}~{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "~{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def with_template(words: Any, template: str) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, eos_token="~", unk_token="?")
    made.chat_template = template
    return made


@functools.cache
def compiled(template: str) -> Any:
    import jinja2

    return jinja2.Environment().from_string(template)


class Verbatim:
    """A tokenizer whose tokens are the letters' code points."""

    eos_token, eos_token_id, all_special_ids = "~", ord("~"), (ord("~"),)

    def __init__(self, template: str = "") -> None:
        self.chat_template = template or None

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [ord(letter) for letter in texts]}
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return compiled(self.chat_template).render(**{"tools": None, **options, "messages": messages})


def text_of(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


AS: dict[str, Callable[[list[Any], Path], Any]] = {
    "list": lambda rows, folder: rows,
    "iterable": lambda rows, folder: IterableDataset.from_generator(lambda: iter(rows)),
    "lines": lambda rows, folder: write(folder / "rows.jsonl", rows),
    "array": lambda rows, folder: write(folder / "rows.json", ["[", *_with_commas(rows), "]"]),
}


def _with_commas(rows: list[Any]) -> list[str]:
    return [json.dumps(row) + "," * (row is not rows[-1]) for row in rows]


@pytest.mark.parametrize("kind", AS)
def test_columns_may_begin_behind_the_first_thousand_rows(words: Any, tmp_path: Path, kind: str) -> None:
    tokenizer = Verbatim(CALLS)
    row = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}
    late = row | {"tools": [{"name": "f"}, {"name": "g"}]}
    got = quiet(AS[kind]([row] * 1000 + [late], tmp_path), tokenizer)
    alone = quiet([late], tokenizer).dataset[0]
    assert got.dataset[1000] == alone
    assert text_of(alone["prompt_ids"]) == "t:2~u:a~a:"
    assert text_of(got.dataset[999]["prompt_ids"]) == "u:a~a:"
    assert "tools" in got.columns
    assert got.unused == ()
    unused = quiet(AS[kind]([row] * 1000 + [row | {"note": 1}], tmp_path), tokenizer)
    assert unused.unused == ("note",)


@pytest.mark.parametrize("kind", AS)
def test_a_prompt_of_its_own_counts_in_the_row_that_has_one(words: Any, tmp_path: Path, kind: str) -> None:
    rows = [{"chosen": "abc", "rejected": "abd"}] * 1000 + [{"prompt": "x", "chosen": "abc", "rejected": "abd"}]
    got = quiet(AS[kind](rows, tmp_path), words)
    assert got.dataset[1000] == {"prompt_ids": ids("x"), "chosen_ids": ids("abc~"), "rejected_ids": ids("abd~")}
    assert got.dataset[0] == {"prompt_ids": ids("ab"), "chosen_ids": ids("c~"), "rejected_ids": ids("d~")}
    assert got.implicit == 1000
    assert "1000 without a prompt, which is what chosen and rejected share" in str(got)
    null = [{"prompt": None, "chosen": "abc", "rejected": "abd"}]
    assert quiet([*rows, *null], words, on_bad="report").refused == ((1001, "prompt is null"),)


def test_keys_are_found_again(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, GOOD | {"x": 1}])
    assert quiet(path, words, num_proc=2).unused == ("x",)
    monkeypatch.setattr("prefkern.data.text.rows.parse", None)
    monkeypatch.setattr("prefkern.data.text.tokenize.parse", None)
    assert quiet(path, words, num_proc=2).unused == ("x",)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def test_arguments_of_tools_are_their_own(tmp_path: Path) -> None:
    """Arrow gives every call the arguments of all others, as nulls, and TRL renders them."""
    tokenizer = Verbatim(CALLS)
    schema = {"type": "object", "properties": {"role": {"type": "integer"}}}
    rows = [
        {"prompt": user("a"), "completion": [call("move", x=0, y=1)], "label": True, "tools": [schema]},
        {"prompt": user("b"), "completion": [call("ask", city="Rome", deep={"p": [1, None]})], "label": False},
        {"prompt": user("c"), "completion": assistant("d"), "label": False, "tools": []},
    ]
    dataset = Dataset.from_list(rows)
    assert dataset[0]["completion"][0]["tool_calls"][0]["function"]["arguments"]["city"] is None
    dataset.to_parquet(tmp_path / "rows.parquet")
    got = quiet(rows, tokenizer)
    assert text_of(got.dataset[0]["completion_ids"]) == 'Nonemove({"x": 0, "y": 1})~'
    assert text_of(got.dataset[1]["completion_ids"]) == 'Noneask({"city": "Rome", "deep": {"p": [1, null]}})~'
    assert text_of(got.dataset[2]["completion_ids"]) == "d~"
    import trl.trainer.utils as trl_utils

    remedy = dataset.with_transform(trl_utils.remove_none_values)
    streamed = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True
    )
    for source in (dataset, tmp_path / "rows.parquet", dataset.to_iterable_dataset(), streamed):
        assert quiet(source, tokenizer).dataset[:] == got.dataset[:]
    kept = quiet(remedy, tokenizer).dataset["completion_ids"][:]  # the transform takes the content of calls too
    assert [text_of(tokens).removeprefix("None") for tokens in kept] == [
        'move({"x": 0, "y": 1})~',
        'ask({"city": "Rome", "deep": {"p": [1, null]}})~',
        "d~",
    ]


def test_a_transform_is_read_through_once(words: Any) -> None:
    seen = []

    def double(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        seen.extend(batch["completion"])
        return batch | {"completion": [text * 2 for text in batch["completion"]]}

    rows = Dataset.from_list([GOOD, GOOD | {"completion": "d"}]).with_transform(double)
    assert quiet(rows, words).dataset["completion_ids"][:] == [ids("cc~"), ids("dd~")]
    assert seen == ["c", "d"]


def test_an_empty_list_of_tools_is_none() -> None:
    tokenizer = Verbatim(CALLS)
    row = {"prompt": user("a"), "completion": assistant("b"), "label": True}
    without = quiet([row], tokenizer).dataset[0]
    assert text_of(without["prompt_ids"]) == "u:a~a:"
    for empty in ([], "[]", "", None):
        assert quiet([row | {"tools": empty}], tokenizer).dataset[0] == without, empty
    assert quiet([row | {"chat_template_kwargs": {"tools": []}}], tokenizer).dataset[0] == without
    assert text_of(quiet([row | {"tools": '[{"a": 1}]'}], tokenizer).dataset[0]["prompt_ids"]) == "t:1~u:a~a:"


def test_messages_of_sharegpt(words: Any) -> None:
    """From and value; one message that is a dict; a conversation under either name."""
    ours = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}
    theirs = {
        "prompt": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"role": "assistant", "content": "c"},
    }
    expected = quiet([ours], words).dataset[:]
    assert quiet([theirs], words).dataset[:] == expected
    named = {"conversations": theirs["prompt"], "chosen": theirs["chosen"], "rejected": theirs["rejected"]}
    assert quiet(Dataset.from_list([named]), words, columns={"prompt": "conversations"}).dataset[:] == expected
    with pytest.raises(RefusedRows, match=r"where a column holds it, name that with columns=\{'prompt': \.\.\.\}"):
        quiet([named], words)
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d")]
    rows = [{"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "id": 3}]
    for source in (rows, Dataset.from_list(rows)):
        got = quiet(source, words)
        assert got.format == "messages"
        assert got.columns == {"messages": "conversations"}
        assert got.unused == ("id",)
        assert got.dataset[0]["input_ids"] == got.dataset[0]["labels"] == ids("s:s~u:a~a:b~t:c~a:d~")


def test_text_and_messages_are_scored_whole(words: Any) -> None:
    got = quiet([{"text": "ab"}, {"text": "cd~"}, {"text": "efg"}], words, max_length=3)
    assert got.dataset["input_ids"][:] == got.dataset["labels"][:] == [ids("ab~"), ids("cd~"), ids("efg")]
    assert (got.format, got.cut, got.merged, got.implicit) == ("text", 1, 0, 0)
    assert str(got) == "text (text): 3 rows of text -> input_ids, labels; 1 cut to max_length; every token is scored"
    got = quiet([{"messages": user("a") + assistant("b"), "text": "x", "label": 1}], words)
    assert got.format == "messages"
    assert got.dataset[0] == {"input_ids": ids("u:a~a:b~"), "labels": ids("u:a~a:b~")}
    assert quiet([{"text": "x", "prompt": "a", "completion": "b"}], words).format == "sft"
    bad = [{"text": ""}, {"text": "a"}, {"text": 5}, {}]
    assert [row for row, _ in quiet(bad, words, on_bad="report").refused] == [0, 2, 3]
    empty = [{"messages": user("a") + assistant("")}, {"messages": user("a") + assistant("b")}]
    assert quiet(empty, words, on_bad="report").refused == ((0, "messages[1] is an assistant's turn that is empty"),)


def test_turns_that_say_something_without_words(words: Any) -> None:
    thought = {"role": "assistant", "content": "", "reasoning_content": "b"}
    asked = call("f") | {"content": ""}
    rows = [{"prompt": user("a") + assistant(""), "completion": [turn], "label": True} for turn in (thought, asked)]
    assert quiet(rows, Verbatim(CALLS)).refused == ()


def test_labels_of_either_kind(words: Any) -> None:
    rows = [GOOD | {"label": label} for label in (True, False, 1, 0, 1.0, 0.0)]
    expected = [True, False] * 3
    assert quiet(rows, words).dataset["label"][:] == expected
    for values in ([1, 0] * 3, [1.0, 0.0] * 3):
        rows = Dataset.from_dict({"prompt": ["a"] * 6, "completion": ["b"] * 6, "label": values})
        assert quiet(rows, words).dataset["label"][:] == expected


def test_a_text_that_begins_the_other_is_the_prompt(words: Any) -> None:
    """TRL splits before the last letter that both share, and scores it in both."""
    rows = [{"chosen": "ab", "rejected": "abcd"}, {"chosen": "abc", "rejected": "a"}]
    got = quiet(rows, words).dataset
    assert got["prompt_ids"][:] == [ids("ab"), ids("a")]
    assert got["chosen_ids"][:] == [ids("~"), ids("bc~")]
    assert got["rejected_ids"][:] == [ids("cd~"), ids("~")]
    assert quiet([{"chosen": "2+2? A: 4", "rejected": "2+2? A: 4, since"}], Verbatim()).dataset[0] == {
        "prompt_ids": [ord(letter) for letter in "2+2? A: 4"],
        "chosen_ids": [ord("~")],
        "rejected_ids": [ord(letter) for letter in ", since~"],
    }
    refused = quiet([*rows, {"chosen": "ab", "rejected": "ac"}], words, add_eos=False, on_bad="report").refused
    assert refused == ((0, "chosen has no tokens"), (1, "rejected has no tokens"))


def test_no_token_of_an_implicit_prompt_is_scored_in_both() -> None:
    """A space of its own, or the first byte of two letters."""
    bytes_of = {chr(letter): letter for letter in range(256)}
    made = Tokenizer(models.BPE(bytes_of, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="~")
    got = quiet([{"chosen": "ab c", "rejected": "ab d"}], tokenizer).dataset[0]
    assert got == {
        "prompt_ids": [*b"ab "],
        "chosen_ids": [*b"c~"],
        "rejected_ids": [*b"d~"],
    }


COUNTING = (
    "{{ '<' }}{{ messages | length }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}~{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
THINKING = (
    "{{ '<' }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}~{% endfor %}"
    "{% if add_generation_prompt %}a:think {% endif %}"
)


class Begun(Verbatim):
    all_special_ids = (ord("~"), ord("<"))


@pytest.mark.parametrize("begin", ["", "<"])
def test_a_template_that_renders_the_prompt_otherwise_is_refused(begin: str) -> None:
    """It writes how many messages there are; a first token that it shares is no excuse."""
    row = {"prompt": user("hello"), "completion": assistant("b"), "label": True}
    reason = (
        "the chat template renders the prompt otherwise when a completion follows it, so that part of the prompt would "
        "be scored"
    )
    for rows in ([row], [row | {"prompt": [{"role": "system", "content": "s"}, *user("hello")]}]):
        with pytest.raises(RefusedRows, match=reason):
            quiet(rows, Begun(COUNTING.replace("{{ '<' }}", begin)))


def test_a_template_that_opens_the_answer_otherwise_is_taken_and_counted(words: Any) -> None:
    got = quiet([{"prompt": user("b"), "completion": assistant("c"), "label": True}], Begun(THINKING))
    assert text_of(got.dataset[0]["prompt_ids"]) == "<u:b~a:"
    assert text_of(got.dataset[0]["completion_ids"]) == "c~"
    assert (got.reworded, got.merged) == (1, 0)
    assert "1 whose prompt the chat template ends otherwise before a completion" in str(got)
    plain = quiet([{"prompt": user("b"), "completion": assistant("c"), "label": True}], words)
    assert (plain.reworded, plain.merged) == (0, 0)


@pytest.mark.parametrize("name", ["images", "image", "video", "audios"])
def test_images_beside_text_need_a_processor(words: Any, name: str) -> None:
    row = {"prompt": user("a <image>"), "completion": assistant("b"), "label": True}
    rows = [row | {name: []}, row | {name: ["cat.png"]}, row | {name: None}, row | {name: "dog.png"}, row]
    got = quiet(rows, words, on_bad="report")
    assert [number for number, _ in got.refused] == [1, 3]
    assert all(reason.startswith(f"{name} is not empty: only a model's processor") for _, reason in got.refused)
    assert len(quiet(rows, words, columns={name: None}).dataset) == 5
    assert got.unused == ()


def test_columns_of_pictures_need_a_processor(words: Any) -> None:
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("prompt", "completion")}
        | {"images": datasets.List(datasets.Image())}
    )
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "images": [[]]}, features=features)
    message = (
        r"the column images holds images, which only a model's processor .* columns=\{'images': None\} leaves it out"
    )
    with pytest.raises(ValueError, match=message):
        quiet(rows, words)
    assert quiet(rows, words, columns={"images": None}).dataset["input_ids"][:] == [ids("ab~")]


class Moody(Verbatim):
    """Raises for a whole batch because of one text."""

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            raise TypeError("only batches")
        if any("z" in text for text in texts):
            raise OverflowError("too odd\nfor me")
        return super().__call__(texts, **options)


def test_a_tokenizer_that_raises_refuses_the_row() -> None:
    rows = [GOOD, GOOD | {"completion": "z"}, GOOD | {"prompt": "z"}, GOOD | {"completion": "d"}]
    got = quiet(rows, Moody(), on_bad="report")
    reason = "the tokenizer refuses it: OverflowError: too odd"
    assert got.refused == ((1, reason), (2, reason))
    assert [text_of(tokens) for tokens in got.dataset["completion_ids"]] == ["c~", "d~"]


def test_reasons_that_are_no_unicode_or_long_are_kept_readable() -> None:
    class Loud(Verbatim):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            raise ValueError(messages[0]["content"] * 100)

    rows = [{"prompt": user("\ud83d" * 20), "completion": assistant("b"), "label": True}, GOOD]
    reason = quiet(rows, Loud("x"), on_bad="report").refused[0].reason
    assert reason.startswith(r"the chat template refuses it: \ud83d\ud83d")
    assert len(reason) == 300


def test_no_message_is_endless(words: Any) -> None:
    rows = [GOOD | {"label": f"{index} {'x' * 500}"} for index in range(50)]
    with pytest.raises(RefusedRows) as caught:
        quiet(rows, words)
    assert len(str(caught.value)) <= 2000
    with pytest.raises(ValueError, match="make none of the formats") as columns:
        quiet([{f"column {index} {'x' * 100}": 1 for index in range(500)}], words)
    assert len(str(columns.value)) <= 2000


def refusing(_: int) -> None:
    raise RefusedRows("no good", (RefusedRow(3, "empty"), RefusedRow(7, "null")))


def test_refused_rows_survive_pickling_and_processes() -> None:
    error = pickle.loads(pickle.dumps(RefusedRows("no good", (RefusedRow(3, "empty"),))))
    assert (str(error), error.refused) == ("no good", ((3, "empty"),))
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool, pytest.raises(RefusedRows) as caught:
        list(pool.map(refusing, [1]))
    assert caught.value.refused == ((3, "empty"), (7, "null"))
    assert isinstance(caught.value.refused[0], RefusedRow)


def test_arrow_rows_take_what_prepare_returns(words: Any) -> None:
    made = prepare([GOOD, GOOD], words, progress=False)
    rows = ArrowRows(made)
    assert len(rows) == 2
    assert rows[1] == made.dataset[1] == ArrowRows(made.dataset)[1]

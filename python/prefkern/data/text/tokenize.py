"""Batches of rows into token ids: the function that `datasets` maps over a dataset."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefkern.data.text.formats import FORMATS, Example, Format, Refuse, read

ROW, REFUSED, MERGED, CUT, CHAT = "_row", "_refused", "_merged", "_cut", "_conversational"
JSON = "_json"
UNREADABLE = "_unreadable"
"""The one field of an object that had no JSON: why."""
BLANK = ""
"""In place of a reason: the line of a file was blank, and no row."""
IGNORED = -100


class Options(NamedTuple):
    format: str
    names: Mapping[str, str]
    """The source's name of each column that is read."""
    joined: bool
    add_eos: bool
    max_length: int | None

    @property
    def known(self) -> Format:
        return FORMATS[self.format]

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns of token ids that come out."""
        if self.format == "sft":
            return ("input_ids", "labels")
        texts = tuple(f"{name}_ids" for name in self.known.texts)
        return texts if self.joined else ("prompt_ids", *texts)

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(name for name in (*self.known.numbers, *self.known.optional) if name in self.names)


class Rendered(NamedTuple):
    """A row as strings: the prompt, where it is apart, and then the prompt with each text."""

    strings: list[str]
    example: Example


class Tokenize:
    """Called with a batch of columns and the numbers of its rows; rows that cannot be used come out with a reason."""

    def __init__(self, tokenizer: Any, options: Options) -> None:
        self.tokenizer = tokenizer
        self.options = options

    def __call__(self, batch: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        rendered = [self._render(row) for row in _rows(batch)]
        chats = [row for row in rendered if isinstance(row, Rendered) and row.example.conversational]
        plain = [row for row in rendered if isinstance(row, Rendered) and not row.example.conversational]
        tokens = {
            True: iter(self._tokens([text for row in chats for text in row.strings], add_special_tokens=False)),
            False: iter(self._tokens([text for row in plain for text in row.strings])),
        }
        columns: dict[str, list[Any]] = {name: [] for name in output_columns(self.options)}
        for number, row in zip(rows, rendered, strict=True):
            made: dict[str, Any] = {REFUSED: row}
            if isinstance(row, Rendered):
                parts = [next(tokens[row.example.conversational]) for _ in row.strings]
                try:
                    made = self._ids(row.example, parts) | row.example.values | {CHAT: row.example.conversational}
                except Refuse as reason:
                    made = {REFUSED: str(reason)}
            for name, column in columns.items():
                column.append(number if name == ROW else made.get(name))
        return columns

    def _render(self, row: Any) -> Rendered | str:
        """The row's strings, or the reason why there are none."""
        options = self.options
        if isinstance(row, str):
            return row
        try:
            example = read(row, options.known, options.names, joined=options.joined)
            strings = self._chat(example) if example.conversational else self._plain(example)
        except Refuse as reason:
            return str(reason)
        return Rendered(strings[1:] if options.joined else strings, example)

    def _plain(self, example: Example) -> list[str]:
        prompt, end = example.prompt or "", self.tokenizer.eos_token if self.options.add_eos else ""
        if end is None:
            raise Refuse("the tokenizer has no end-of-sequence token to put behind text; pass add_eos=False")
        return [prompt, *(prompt + (text if text.endswith(end) else text + end) for text in example.texts)]

    def _chat(self, example: Example) -> list[str]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise Refuse("it is a conversation, and the tokenizer has no chat template")
        prompt = example.prompt or []
        first = [] if self.options.joined else [(prompt, True)]
        strings = [""] if self.options.joined else []
        for messages, generation in [*first, *((prompt + text, False) for text in example.texts)]:
            try:
                strings.append(
                    self.tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=generation, **example.template
                    )
                )
            except Exception as error:  # templates raise what they like
                raise Refuse(f"the chat template refuses it: {str(error).splitlines()[0] or repr(error)}") from error
        return strings

    def _tokens(self, strings: list[str], **special: bool) -> list[list[int]]:
        if not strings:
            return []
        return list(self.tokenizer(strings, return_attention_mask=False, verbose=False, **special)["input_ids"])

    def _ids(self, example: Example, parts: list[list[int]]) -> dict[str, Any]:
        """The columns of token ids of one row: TRL's, cut to max_length as its collators cut them."""
        options, names = self.options, self.options.known.texts
        if options.joined:
            for name, ids in zip(names, parts, strict=True):
                if options.max_length is not None and len(ids) > options.max_length:
                    raise Refuse(f"prompt and {name} have more than max_length={options.max_length} tokens")
            return dict(zip(options.ids, parts, strict=True)) | {MERGED: 0, CUT: 0}
        prompt, *whole = parts
        # The text begins where prompt and prompt + text diverge: tokens may merge across the boundary, and templates
        # may render a prompt otherwise when nothing follows it.
        shared = min(_common(prompt, ids) for ids in whole)
        if prompt and not shared:
            raise Refuse("the tokens of the prompt alone are not those that prompt and completion begin with")
        for name, ids in zip(names, whole, strict=True):
            if len(ids) <= shared:
                raise Refuse(f"{name} has no tokens")
        cut = 0
        if options.max_length is not None:
            if shared >= options.max_length:
                raise Refuse(f"the prompt alone fills max_length={options.max_length}")
            cut = sum(max(0, len(ids) - options.max_length) for ids in whole)
            # KTO's baseline puts a completion behind prompts of other lengths: it is cut as far as none of them shows
            spared = shared if options.format == "unpaired" else 0
            whole = [ids[: options.max_length + spared] for ids in whole]
        result: dict[str, Any] = {MERGED: len(prompt) - shared, CUT: cut}
        if options.format == "sft":
            return result | {"input_ids": whole[0], "labels": [IGNORED] * shared + whole[0][shared:]}
        return result | dict(zip(options.ids, [prompt[:shared], *(ids[shared:] for ids in whole)], strict=True))


def output_columns(options: Options) -> dict[str, str]:
    """The columns that come out, and Arrow's name of their types ("ids": a list of int32)."""
    columns = dict.fromkeys(options.ids, "ids") | dict.fromkeys(options.numbers, "float64")
    if options.known.flag is not None:
        columns[options.known.flag] = "bool"
    return columns | {ROW: "int64", REFUSED: "string", MERGED: "int32", CUT: "int32", CHAT: "bool"}


def parse(line: str) -> dict[str, Any] | str:
    """A line of JSON as a row, or the reason why it is none."""
    if not line.strip():
        return BLANK
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    if not isinstance(row, dict):
        return f"a row must be an object with named fields, got {type(row).__name__}"
    return str(row[UNREADABLE]) if UNREADABLE in row else row


def _rows(batch: Mapping[str, Sequence[Any]]) -> list[Any]:
    if JSON in batch:
        return [parse(line) for line in batch[JSON]]
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _common(ids: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next(
        (index for index, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other),
        min(len(ids), len(others)),
    )

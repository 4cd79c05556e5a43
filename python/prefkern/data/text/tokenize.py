"""Batches of rows into token ids: the function that `datasets` maps over a dataset."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prefkern.data.batches.truncation import Truncation
from prefkern.data.text.boundary import Specials, common, common_words, prompt_end, specials_of
from prefkern.data.text.formats import FORMATS, TEMPLATE, Example, Format, read
from prefkern.data.text.messages import Refuse, without_nulls
from prefkern.data.text.rows import JSON, parse

ROW, REFUSED = "_row", "_refused"
COUNTED = CHAT, MERGED, REWORDED, SHARED, CUT = "conversational", "merged", "reworded", "implicit", "cut"
"""The fields of `Prepared` that count rows."""
IGNORED = -100
LONGEST_REASON = 300


class Options(NamedTuple):
    format: str
    names: Mapping[str, str]
    """The source's name of each column that is read."""
    joined: bool
    add_eos: bool
    truncation: Truncation | None
    structs: frozenset[str] = frozenset()
    """Columns of the source in which a null may be one that Arrow filled in."""

    @property
    def known(self) -> Format:
        return FORMATS[self.format]

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns of token ids that come out."""
        if self.language:
            return ("input_ids", "labels")
        texts = tuple(f"{name}_ids" for name in self.known.texts)
        return texts if self.joined else ("prompt_ids", *texts)

    @property
    def language(self) -> bool:
        """One sequence with labels comes out."""
        return self.format == "sft" or self.known.prompt == "none"

    @property
    def whole(self) -> bool:
        """The prompt is not looked for: there is none, or it stays in the texts."""
        return self.joined or self.known.prompt == "none"

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(name for name in (*self.known.numbers, *self.known.optional) if name in self.names)


class Rendered(NamedTuple):
    """A row as strings: the prompt, where it is apart, and then the prompt with each text. ``reworded``: the template
    ends the prompt otherwise when nothing follows it."""

    strings: list[str]
    example: Example
    reworded: bool = False


class Tokenize:
    """Called with a batch of columns and the numbers of its rows; rows that cannot be used come out with a reason."""

    def __init__(self, tokenizer: Any, options: Options) -> None:
        self.tokenizer = tokenizer
        self.options = options

    def __call__(self, batch: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        rendered = [self._render(row) for row in self._rows(batch)]
        chats = [row for row in rendered if isinstance(row, Rendered) and row.example.conversational]
        plain = [row for row in rendered if isinstance(row, Rendered) and not row.example.conversational]
        specials = specials_of(self.tokenizer, text=bool(plain))
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
                    made = self._ids(row, parts, specials) | row.example.values
                    made |= {CHAT: row.example.conversational, SHARED: row.example.shared}
                except Refuse as reason:
                    made = {REFUSED: str(reason)}
            if REFUSED in made:
                made[REFUSED] = _storable(made[REFUSED])
            for name, column in columns.items():
                column.append(number if name == ROW else made.get(name))
        return columns

    def _rows(self, batch: Mapping[str, Sequence[Any]]) -> Iterator[Any]:
        rows = map(parse, batch[JSON]) if JSON in batch else _of_columns(batch)
        given = {column: name for name, column in self.options.names.items() if column in self.options.structs}
        # a message's own content may be null, beside a call of tools
        kept = {column: () if name in TEMPLATE else ("content",) for column, name in given.items()}
        for row in rows:
            if isinstance(row, str) or not kept:
                yield row
            else:
                yield row | {column: without_nulls(row[column], kept[column]) for column in kept.keys() & row.keys()}

    def _render(self, row: Any) -> Rendered | str:
        """The row's strings, or the reason why there are none."""
        options = self.options
        if isinstance(row, str):
            return row
        try:
            example = read(row, options.known, options.names, joined=options.joined)
            rendered = self._chat(example) if example.conversational else self._plain(example)
            _refuse_surrogates(rendered.strings)
        except Refuse as reason:
            return str(reason)
        return rendered

    def _plain(self, example: Example) -> Rendered:
        prompt, end = example.prompt or "", self.tokenizer.eos_token if self.options.add_eos else ""
        if end is None:
            raise Refuse("the tokenizer has no end-of-sequence token to put behind text; pass add_eos=False")
        whole = [prompt + (text if end and text.endswith(end) else text + end) for text in example.texts]
        return Rendered(whole if self.options.whole else [prompt, *whole], example)

    def _chat(self, example: Example) -> Rendered:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise Refuse("it is a conversation, and the tokenizer has no chat template")
        messages = example.prompt or []
        whole = [self._template(messages + text, example, prompt=False) for text in example.texts]
        if self.options.whole:
            return Rendered(whole, example)
        prompt = self._template(messages, example, prompt=True)
        reworded = not all(text.startswith(prompt) for text in whole)
        if reworded:  # what opens the answer may differ, such as a block of thoughts, but not what was asked
            asked = common(prompt, self._template(messages, example, prompt=False))
            if min(common(prompt, text) for text in whole) < asked:
                raise Refuse(
                    "the chat template renders the prompt otherwise when a completion follows it, so that part of the "
                    "prompt would be scored"
                )
        return Rendered([prompt, *whole], example, reworded)

    def _template(self, messages: list[Any], example: Example, *, prompt: bool) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **example.template
            )
        except Exception as error:  # templates raise what they like
            raise Refuse(f"the chat template refuses it: {_first_line(error)}") from error
        return rendered

    def _tokens(self, strings: list[str], **special: bool) -> list[list[int] | Refuse]:
        """The tokens of each string, or why it has none."""
        if not strings:
            return []
        options = {"return_attention_mask": False, "verbose": False, **special}
        try:
            return list(self.tokenizer(strings, **options)["input_ids"])
        except Exception as error:  # of one string, and raised for all
            if len(strings) == 1:
                return [Refuse(f"the tokenizer refuses it: {type(error).__name__}: {_first_line(error)}")]
        return [ids for text in strings for ids in self._tokens([text], **special)]

    def _ids(self, row: Rendered, parts: list[list[int] | Refuse], specials: Specials) -> dict[str, Any]:
        """The columns of token ids of one row: TRL's, cut to max_length as its collators cut them."""
        options, names = self.options, self.options.known.texts
        tokens: list[list[int]] = []
        for index, ids in enumerate(parts):
            if isinstance(ids, Refuse):
                raise ids
            prompt = index == 0 and not options.whole
            tokens.append(ids if row.example.conversational else specials.once(ids, prompt=prompt))
        result: dict[str, Any] = dict.fromkeys((MERGED, REWORDED, CUT), 0)
        if options.joined:
            for name, ids in zip(names, tokens, strict=True):
                if options.truncation is not None and len(ids) > options.truncation.max_length:
                    raise Refuse(f"prompt and {name} have more than max_length={options.truncation.max_length} tokens")
            return result | dict(zip(options.ids, tokens, strict=True))
        begin, prompt_ids, whole = 0, [], tokens
        if not options.whole:
            prompt_ids, *whole = tokens
            begin = prompt_end(prompt_ids, whole, specials.all)
            result[REWORDED if row.reworded else MERGED] = len(prompt_ids) - begin
            if row.example.shared and not row.example.conversational:
                begin += common_words([ids[begin:] for ids in whole], specials.all)
        for name, ids in zip(names, whole, strict=True):
            if len(ids) <= begin:
                raise Refuse(f"{name} has no tokens")
        prompt_ids, texts = whole[0][:begin], [ids[begin:] for ids in whole]
        if options.truncation is not None:
            if options.truncation.mode == "keep_start" and len(prompt_ids) >= options.truncation.max_length:
                raise Refuse(f"the prompt alone fills max_length={options.truncation.max_length}")
            baseline = options.format == "unpaired"
            prompt_ids, texts, result[CUT] = options.truncation.cut(prompt_ids, texts, baseline=baseline)
        if options.language:
            labels = [IGNORED] * len(prompt_ids) + texts[0]
            return result | {"input_ids": prompt_ids + texts[0], "labels": labels}
        return result | dict(zip(options.ids, [prompt_ids, *texts], strict=True))


def output_columns(options: Options) -> dict[str, str]:
    """The columns that come out, and Arrow's name of their types ("ids": a list of int32)."""
    columns = dict.fromkeys(options.ids, "ids") | dict.fromkeys(options.numbers, "float64")
    if options.known.flag is not None:
        columns[options.known.flag] = "bool"
    counts = dict.fromkeys((MERGED, REWORDED, CUT), "int32") | dict.fromkeys((CHAT, SHARED), "bool")
    return columns | {ROW: "int64", REFUSED: "string"} | counts


def _of_columns(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _refuse_surrogates(strings: list[str]) -> None:
    for text in strings:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise Refuse(f"its text holds {code}, half of a surrogate pair, which is no character") from None


def _storable(reason: str) -> str:
    """A reason that Arrow can hold, and a message can quote."""
    reason = reason.encode(errors="backslashreplace").decode()
    return reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 3]}..."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or repr(error)

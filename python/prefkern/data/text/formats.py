"""Row formats: which columns make one, and what a row must hold to be used."""

import json
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from prefkern import check
from prefkern.data.text.messages import Refuse, refuse_empty_turns, short, text_or_messages


class Format(NamedTuple):
    """``texts``: the columns that follow the prompt; ``flag``, ``numbers``: those of the judgement, if any.

    ``prompt``: it is a column (``apart``), or may be the beginning that the texts share (``shared``), or there is
    ``none``, and every token of the text is scored.
    """

    texts: tuple[str, ...]
    flag: str | None = None
    numbers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    prompt: Literal["apart", "shared", "none"] = "apart"

    @property
    def required(self) -> tuple[str, ...]:
        prompt = ("prompt",) if self.prompt == "apart" else ()
        return prompt + self.texts + self.numbers + (() if self.flag is None else (self.flag,))


FORMATS = {
    "preference": Format(
        ("chosen", "rejected"), optional=("ref_chosen_logps", "ref_rejected_logps", "margin"), prompt="shared"
    ),
    "unpaired": Format(("completion",), flag="label", optional=("ref_logps",)),
    "rewarded": Format(("completion",), numbers=("reward",)),
    "scored": Format(("response",), numbers=("score",)),
    "sft": Format(("completion",)),
    "messages": Format(("messages",), prompt="none"),
    "text": Format(("text",), prompt="none"),
}
LESSER = ("sft", "messages", "text")
"""Formats whose columns may stand among those of others: of several that are found, the last of these gives way."""
OTHER_NAMES = {"messages": "conversations"}
TEMPLATE = ("tools", "chat_template_kwargs")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
FIELDS = frozenset(
    {name for known in FORMATS.values() for name in ("prompt", *known.required, *known.optional)} | {*TEMPLATE, *MEDIA}
)
SHOWN_COLUMNS = 20


class Example(NamedTuple):
    """A row that can be tokenised: strings, or lists of messages; ``prompt`` is None where the texts hold it or where
    there is none. ``shared``: it was found as the beginning of both texts."""

    prompt: Any
    texts: list[Any]
    values: dict[str, Any]
    conversational: bool
    template: dict[str, Any]
    shared: bool = False


def recognise(where: str, columns: Collection[str], given: Collection[str], wanted: str | None) -> str:
    """The format that the known columns make; ``wanted`` settles it where they make several. ``given``: all columns."""
    found = [name for name, known in FORMATS.items() if set(known.required) <= set(columns)]
    if wanted is not None:
        check.one_of(where, "format", wanted, FORMATS)
        missing = [name for name in FORMATS[wanted].required if name not in columns]
        if missing:
            advice = _split_advice(missing, columns)
            check.fail(
                where, f"format {wanted!r} needs the column {missing[0]}; the columns are {listed(given)}{advice}"
            )
        return wanted
    for lesser in reversed(LESSER):
        if len(found) > 1 and lesser in found:
            found.remove(lesser)
    if len(found) > 1:
        several = " or ".join(map(repr, found))
        check.fail(where, f"the columns {listed(columns)} make several formats; pass format={several}")
    if not found:
        formats = "; ".join(f"{', '.join(known.required)} ({name})" for name, known in FORMATS.items())
        check.fail(
            where,
            f"the columns {listed(given)} make none of the formats: {formats}. Name columns that differ with "
            "columns={'prompt': 'question', ...}",
        )
    return found[0]


def listed(columns: Collection[str]) -> str:
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in list(columns)[:SHOWN_COLUMNS]]
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    return ", ".join(shown) + more or "(none)"


def _split_advice(missing: Collection[str], columns: Collection[str]) -> str:
    if "messages" not in columns or not {"prompt", "completion"} & {*missing}:
        return ""
    return (
        ". The last answer of a conversation can be split off: rows.map(lambda row: {'prompt': row['messages'][:-1], "
        "'completion': row['messages'][-1:]})"
    )


def read(row: Mapping[str, Any], known: Format, names: Mapping[str, str], *, joined: bool) -> Example:
    """The row's parts, checked; `Refuse` says what is wrong with them. ``names``: the row's name of each column."""
    _refuse_media(row, names)
    wanted = {"prompt", *known.texts}
    if known.prompt == "shared" and names.get("prompt") not in row:
        wanted.remove("prompt")  # other rows have one
    parts = {name: _part(name, row, column) for name, column in names.items() if name in wanted}
    kinds = {name: isinstance(part, list) for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        _refuse_mixed(kinds)
    values: dict[str, Any] = {
        name: _number(name, row, names[name]) for name in (*known.numbers, *known.optional) if name in names
    }
    if known.flag is not None:
        values[known.flag] = _flag(known.flag, row, names[known.flag])
    prompt, texts = parts.get("prompt"), [parts[name] for name in known.texts]
    shared = prompt is None and known.prompt == "shared"
    for name, text in zip(known.texts, texts, strict=True):
        if not text:
            raise Refuse(f"{name} is empty")
    if shared and not joined:
        prompt, texts = split_prompt(*texts)
    conversational = isinstance(texts[0], list)
    if conversational:
        for name, messages in zip(known.texts, texts, strict=True):
            refuse_empty_turns(name, messages)
        if prompt is not None and not prompt:
            raise Refuse("prompt is a list of no messages")
    template = _template(row, names) if conversational else {}
    return Example(prompt, texts, values, conversational, template, shared)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """The beginning that both share, and the rest of each: letter by letter, or message by message.

    The space before the first letter that differs belongs to the rest, as in TRL. Where one text is the beginning of
    the other it is the prompt, and its completion is only the end of the sequence; TRL's has the last letter too.
    """
    if chosen == rejected:
        raise Refuse("chosen and rejected are the same, so that there is no telling where their prompt ends")
    shorter = min(len(chosen), len(rejected))
    at = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter)
    if at == shorter and not isinstance(chosen, str):
        first, other = ("chosen", "rejected") if len(chosen) == shorter else ("rejected", "chosen")
        raise Refuse(f"{first} is the beginning of {other}, so that no message of it would be scored")
    if 0 < at < shorter and chosen[at - 1] == " ":
        at -= 1
    if at == 0:
        raise Refuse(
            "chosen and rejected share no beginning that could be their prompt; where a column holds it, name that "
            "with columns={'prompt': ...}"
        )
    return chosen[:at], [chosen[at:], rejected[at:]]


def _refuse_media(row: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for name in MEDIA:
        held = row.get(names[name]) if name in names else None
        if held is not None and (not isinstance(held, list | str | dict) or len(held)):
            raise Refuse(
                f"{name} is not empty: only a model's processor can read it, and prepare tokenises text; "
                f"columns={{{name!r}: None}} leaves it out"
            )


def _part(name: str, row: Mapping[str, Any], column: str) -> Any:
    return text_or_messages(name, _given(name, row, column))


def _number(name: str, row: Mapping[str, Any], column: str) -> float:
    value = _given(name, row, column)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Refuse(f"{name} must be a number, got {short(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise Refuse(f"{name} must be a number that a float can hold, got {short(value)}") from None
    if not math.isfinite(number):
        raise Refuse(f"{name} must be a finite number, got {number}")
    return number


def _flag(name: str, row: Mapping[str, Any], column: str) -> bool:
    value = _given(name, row, column)
    if not isinstance(value, numbers.Real) or value not in (0, 1):  # True and False are such numbers
        raise Refuse(f"{name} must be true or false, got {short(value)}")
    return bool(value)


def _given(name: str, row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise Refuse(f"{name} is missing")
    if row[column] is None:
        raise Refuse(f"{name} is null")
    return row[column]


def _template(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of the chat template that come with the row; an empty list of tools is no tools."""
    tools, options = (row.get(names[name]) if name in names else None for name in TEMPLATE)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise Refuse(f"tools is text that is not JSON ({error.msg})") from error
    if options is not None and not isinstance(options, dict):
        raise Refuse(f"chat_template_kwargs must be a dict, got {short(options)}")
    template = {"tools": tools, **(options or {})}
    return template | {"tools": template["tools"] or None}


def _refuse_mixed(kinds: Mapping[str, bool]) -> NoReturn:
    text = next(name for name, messages in kinds.items() if not messages)
    messages = next(name for name, messages in kinds.items() if messages)
    advice = "; if it begins with the prompt, pass columns={'prompt': None}" if text == "prompt" else ""
    raise Refuse(f"{text} is text but {messages} is a list of messages{advice}")

"""Row formats: which columns make one, and what a row must hold to be used."""

import json
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn

from prefkern import check
from prefkern.data.arrays.views import describe

ROLES = ("system", "developer", "user", "assistant", "tool")


class Format(NamedTuple):
    """``texts``: the columns that follow the prompt; ``flag``, ``numbers``: those of the judgement, if any."""

    title: str
    texts: tuple[str, ...]
    flag: str | None = None
    numbers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    implicit_prompt: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        prompt = () if self.implicit_prompt else ("prompt",)
        return prompt + self.texts + self.numbers + (() if self.flag is None else (self.flag,))


FORMATS = {
    "preference": Format(
        "preference pairs",
        ("chosen", "rejected"),
        optional=("ref_chosen_logps", "ref_rejected_logps", "margin"),
        implicit_prompt=True,
    ),
    "unpaired": Format("unpaired preferences", ("completion",), flag="label", optional=("ref_logps",)),
    "rewarded": Format("rewarded completions", ("completion",), numbers=("reward",)),
    "scored": Format("scored responses", ("response",), numbers=("score",)),
    "sft": Format("prompts with completions", ("completion",)),
}
TEMPLATE = ("tools", "chat_template_kwargs")


class Refuse(Exception):  # noqa: N818 - it is the row's, not a fault
    """The row cannot be used; the message says why."""


class Example(NamedTuple):
    """A row that can be tokenised: strings, or lists of messages; ``prompt`` is None where the texts hold it."""

    prompt: Any
    texts: list[Any]
    values: dict[str, Any]
    conversational: bool
    template: dict[str, Any]


def recognise(where: str, columns: Collection[str], given: Collection[str], wanted: str | None) -> str:
    """The format that the known columns make; ``wanted`` settles it where they make several. ``given``: all columns."""
    found = [name for name, known in FORMATS.items() if set(known.required) <= set(columns)]
    if wanted is not None:
        check.one_of(where, "format", wanted, FORMATS)
        missing = [name for name in FORMATS[wanted].required if name not in columns]
        if missing:
            check.fail(where, f"format {wanted!r} needs the column {missing[0]}; the columns are {_listed(given)}")
        return wanted
    if len(found) > 1 and "sft" in found:
        found.remove("sft")  # its columns are among those of others
    if len(found) > 1:
        several = " or ".join(map(repr, found))
        check.fail(where, f"the columns {_listed(columns)} make several formats; pass format={several}")
    if not found:
        formats = "; ".join(f"{', '.join(known.required)} ({name})" for name, known in FORMATS.items())
        check.fail(
            where,
            f"the columns {_listed(given)} make none of the formats: {formats}. Name columns that differ with "
            "columns={'prompt': 'question', ...}",
        )
    return found[0]


def read(row: Mapping[str, Any], known: Format, names: Mapping[str, str], *, joined: bool) -> Example:
    """The row's parts, checked; `Refuse` says what is wrong with them. ``names``: the row's name of each column."""
    parts = {name: _part(name, row, column) for name, column in names.items() if name in ("prompt", *known.texts)}
    kinds = {name: isinstance(part, list) for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        _refuse_mixed(kinds)
    values: dict[str, Any] = {
        name: _number(name, row, names[name]) for name in (*known.numbers, *known.optional) if name in names
    }
    if known.flag is not None:
        values[known.flag] = _flag(known.flag, row, names[known.flag])
    prompt, texts = parts.get("prompt"), [parts[name] for name in known.texts]
    if prompt is None and not joined:
        prompt, texts = split_prompt(*texts)
    for name, text in zip(known.texts, texts, strict=True):
        if not text:
            raise Refuse(f"{name} is empty")
    conversational = isinstance(texts[0], list)
    if conversational and prompt is not None and not prompt:
        raise Refuse("prompt is a list of no messages")
    template = _template(row, names) if conversational else {}
    return Example(prompt, texts, values, conversational, template)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """The beginning that both share, and the rest of each, where TRL splits them: letter by letter, or message by
    message; the space before the first letter that differs belongs to the rest."""
    if chosen == rejected:
        raise Refuse("chosen and rejected are the same, so that there is no telling where their prompt ends")
    shorter = min(len(chosen), len(rejected))
    at = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter - 1)
    if at > 0 and chosen[at] != rejected[at] and chosen[at - 1] == " ":
        at -= 1
    if at <= 0:
        raise Refuse("chosen and rejected share no beginning that could be their prompt")
    return chosen[:at], [chosen[at:], rejected[at:]]


def _part(name: str, row: Mapping[str, Any], column: str) -> Any:
    part = _given(name, row, column)
    if isinstance(part, str):
        return part
    if not isinstance(part, list) or not all(isinstance(message, dict) for message in part):
        raise Refuse(f"{name} must be text or a list of messages, got {_short(part)}")
    for index, message in enumerate(part):
        _check_message(f"{name}[{index}]", message)
    return part


def _check_message(name: str, message: dict[str, Any]) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise Refuse(f"{name} must have a role of {', '.join(ROLES)}, got {_short(role)}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    blocks = content if isinstance(content, list) else [None]
    for block in blocks:
        if not isinstance(block, dict) or not isinstance(block.get("text"), str) or block.get("type") != "text":
            raise Refuse(f"{name} must have text as its content, got {_short(content)}")


def _number(name: str, row: Mapping[str, Any], column: str) -> float:
    value = _given(name, row, column)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Refuse(f"{name} must be a number, got {_short(value)}")
    if not math.isfinite(value):
        raise Refuse(f"{name} must be a finite number, got {value}")
    return float(value)


def _flag(name: str, row: Mapping[str, Any], column: str) -> bool:
    value = _given(name, row, column)
    if not isinstance(value, bool):
        raise Refuse(f"{name} must be true or false, got {_short(value)}")
    return value


def _given(name: str, row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise Refuse(f"{name} is missing")
    if row[column] is None:
        raise Refuse(f"{name} is null")
    return row[column]


def _template(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of the chat template that come with the row."""
    tools, options = (row.get(names[name]) if name in names else None for name in TEMPLATE)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise Refuse(f"tools is text that is not JSON ({error.msg})") from error
    if options is not None and not isinstance(options, dict):
        raise Refuse(f"chat_template_kwargs must be a dict, got {_short(options)}")
    return {"tools": tools, **(options or {})}


def _refuse_mixed(kinds: Mapping[str, bool]) -> NoReturn:
    text = next(name for name, messages in kinds.items() if not messages)
    messages = next(name for name, messages in kinds.items() if messages)
    advice = "; if it begins with the prompt, pass columns={'prompt': None}" if text == "prompt" else ""
    raise Refuse(f"{text} is text but {messages} is a list of messages{advice}")


def _short(value: object) -> str:
    text = describe(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(columns: Collection[str]) -> str:
    return ", ".join(columns) or "(none)"

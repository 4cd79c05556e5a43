"""Preference pairs: the shipped set or a user's JSON-lines file, checked before anything slow begins."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).with_name("preferences.jsonl")
COLUMNS = ("prompt", "chosen", "rejected")
LEAST, HELD_OUT = 8, 12


class Refused(Exception):  # noqa: N818 - it is the user's to correct, not a fault
    """Something the user gave cannot be used; the message is one sentence."""


class Pair(NamedTuple):
    """One question with the answer to prefer and the one to avoid."""

    prompt: str
    chosen: str
    rejected: str


class Split(NamedTuple):
    train: list[Pair]
    held_out: list[Pair]


def read(path: Path) -> list[Pair]:
    """The pairs of a JSON-lines file: one object a line, with the texts ``prompt``, ``chosen`` and ``rejected``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(f"cannot read the dataset {path}: {reason}") from error
    pairs = [_pair(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len(pairs) < LEAST:
        raise Refused(f"{path} has {len(pairs)} pairs; the demo needs at least {LEAST}, some of which it holds out")
    return pairs


def _pair(path: Path, number: int, line: str) -> Pair:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Refused(f"{path} is not a JSON-lines file: line {number} is not JSON ({error.msg})") from error
    where = f"line {number} of {path} must be an object with the texts prompt, chosen and rejected"
    if not isinstance(row, dict):
        raise Refused(f"{where}, got {type(row).__name__}")
    if not row.keys() >= set(COLUMNS):
        raise Refused(f"{where}, got {sorted(row)}")
    for column in COLUMNS:
        if not isinstance(row[column], str) or not row[column].strip():
            raise Refused(f"{where}, got {column} = {row[column]!r:.60}")
    return Pair(*(row[column] for column in COLUMNS))


def split(pairs: list[Pair], needed: int) -> Split:
    """Held-out pairs, the same every time, and ``needed`` others for training (fewer if there are no more)."""
    shuffled = random.Random(0).sample(pairs, len(pairs))
    held_out = min(HELD_OUT, len(pairs) // 4)
    return Split(shuffled[held_out:][:needed], shuffled[:held_out])


def columns(pairs: list[Pair], *, chat: bool) -> dict[str, list[Any]]:
    """As TRL takes them: conversations where the model has a chat template, else question and answer as plain text."""

    def said(role: str, text: str) -> Any:
        if chat:
            return [{"role": role, "content": text}]
        return plain_prompt(text) if role == "user" else f" {text}"

    return {
        "prompt": [said("user", pair.prompt) for pair in pairs],
        "chosen": [said("assistant", pair.chosen) for pair in pairs],
        "rejected": [said("assistant", pair.rejected) for pair in pairs],
    }


def plain_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"

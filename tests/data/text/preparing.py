"""What the tests of `prefkern.data.prepare` share: a tokenizer of letters, messages, and files of rows."""

import gzip
import json
from pathlib import Path
from typing import Any

from prefkern.data import prepare

LETTERS = "abcdefghijklmnopqrstuvwxyz:"
ID = {letter: index + 2 for index, letter in enumerate(LETTERS)}
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('no bombs') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}~{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
GOOD = {"prompt": "ab", "completion": "c", "label": True}


def ids(text: str) -> list[int]:
    return [0 if letter == "~" else ID[letter] for letter in text]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def quiet(rows: Any, tokenizer: Any, **options: Any) -> Any:
    return prepare(rows, tokenizer, progress=False, **options)


def write(path: Path, rows: list[Any]) -> Path:
    lines = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return path

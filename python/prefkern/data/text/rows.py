"""Rows as JSON in one column of a dataset: each is judged by itself, whatever the types of the others."""

import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

JSON = "_json"
UNREADABLE = "_unreadable"
"""The one field of an object that had no JSON: why."""
BLANK = ""
"""In place of a reason: the line of a file was blank, and no row."""
NOT_UTF8 = "\x1a"
"""In a line, before the two digits of a byte that is not UTF-8; JSON has no such letter."""
BYTE_ORDER = "\ufeff"
"""What some programs put before the first line of a file."""
_AT_ONCE = 1000


def parse(line: str) -> dict[str, Any] | str:
    """A line of JSON as a row, or the reason why it is none."""
    line = line.removeprefix(BYTE_ORDER)
    if not line.strip():
        return BLANK
    at = line.find(NOT_UTF8)
    if at >= 0:
        return f"the line holds the byte 0x{line[at + 1 : at + 3]}, which is not UTF-8"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    if not isinstance(row, dict):
        return f"a row must be an object with named fields, got {type(row).__name__}"
    return str(row[UNREADABLE]) if UNREADABLE in row else row


def stored(datasets: Any, rows: Iterable[Any], cache_dir: Path | None) -> tuple[Any, list[str]]:
    """Rows in an Arrow file, so that what is read once need not fit into memory, and all of their keys.

    The file lives as long as the process, or in ``cache_dir``.
    """
    import pyarrow as pa

    folder = cache_dir or Path(datasets.fingerprint.get_temporary_cache_files_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows-{uuid.uuid4().hex}.arrow"
    schema = pa.schema({JSON: pa.large_string()})
    remaining, keys = iter(rows), dict[str, None]()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        while some := list(itertools.islice(remaining, _AT_ONCE)):
            keys.update(dict.fromkeys(str(key) for row in some if isinstance(row, dict) for key in row))
            batch = pa.array(map(_encoded, some), pa.large_string())
            stream.write_batch(pa.record_batch([batch], schema=schema))
    return datasets.Dataset.from_file(str(path)), list(keys)


def keys_of(datasets: Any, dataset: Any, num_proc: int | None) -> list[str]:
    """The keys of all rows: a column may begin anywhere. They are found again in the cache, as the tokens are."""
    found = dataset.map(
        _keys,
        batched=True,
        num_proc=num_proc,
        remove_columns=[JSON],
        features=datasets.Features({"key": datasets.Value("string")}),
        desc="Reading columns",
    )
    return list(dict.fromkeys(found["key"]))


def _keys(batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    rows = map(parse, batch[JSON])
    keys = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    return {"key": [key.encode(errors="backslashreplace").decode() for key in keys]}


def _encoded(row: Any) -> str:
    try:
        return json.dumps(row, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps({UNREADABLE: f"the row cannot be read: {error}"})


def _plain(value: Any) -> Any:
    """Numpy's and torch's numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")

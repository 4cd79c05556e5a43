"""Where rows come from, as a ``datasets.Dataset``: itself, a file, or Python objects written to disk as JSON."""

import itertools
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefkern import check
from prefkern.data.text.tokenize import JSON, UNREADABLE, parse

LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".bz2", ".xz", ".zst")
SAMPLE = 1000
"""Rows of JSON whose keys are taken for the columns."""


class Source(NamedTuple):
    """``dataset`` has the ``columns``, or one column of JSON objects with these keys. ``lines``: rows are a file's."""

    dataset: Any
    columns: list[str]
    lines: bool


def source(where: str, given: Any, cache_dir: Path | None) -> Source:
    datasets = check.require("datasets", f"prefkern.{where}", "pip install datasets")
    if isinstance(given, str | os.PathLike):
        return _file(where, datasets, Path(given).expanduser(), cache_dir)
    if isinstance(given, datasets.Dataset):
        if given.format["type"] == "custom":
            check.fail(
                where,
                "dataset has a transform (with_transform), which may differ at every reading; "
                "apply it with dataset.map(...) first",
            )
        return Source(given.with_format(None), list(given.column_names), lines=False)
    if isinstance(given, Mapping):  # datasets.DatasetDict is one
        check.fail_type(
            where, f"dataset must be one set of rows, got {type(given).__name__} with {', '.join(map(str, given))}"
        )
    if not isinstance(given, list | tuple | datasets.IterableDataset):
        check.fail_type(
            where,
            "dataset must be a datasets.Dataset or IterableDataset, a path to JSON lines or Parquet, or a list of "
            f"dicts, got {type(given).__name__}",
        )
    return _objects(datasets, given, cache_dir)


def _file(where: str, datasets: Any, path: Path, cache_dir: Path | None) -> Source:
    if not path.is_file():
        check.fail(where, f"there is no file {path}")
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    kind = suffixes[-1] if suffixes else ""
    if kind != ".parquet" and kind not in LINES:
        check.fail(where, f"the name of the file must end with .parquet, {' or '.join(LINES)}, got {path.name}")
    builder, options = ("parquet", {}) if kind == ".parquet" else ("text", {"features": _json_column(datasets)})
    try:
        dataset = datasets.load_dataset(
            builder, data_files=str(path), split="train", cache_dir=str(cache_dir) if cache_dir else None, **options
        )
    except Exception as error:  # the builders wrap what Arrow, the codec or the file system raised
        cause = error.__cause__ or error
        raise ValueError(f"prefkern.{where}: {path} cannot be read: {type(cause).__name__}: {cause}") from error
    if kind == ".parquet":
        return Source(dataset, list(dataset.column_names), lines=False)
    if len(dataset) and dataset[0][JSON].lstrip().startswith("["):
        check.fail(where, f"{path} begins with a JSON array; JSON lines have one object on each line")
    return Source(dataset, _keys(dataset), lines=True)


def _objects(datasets: Any, rows: Iterable[Any], cache_dir: Path | None) -> Source:
    """Rows as JSON in an Arrow file, so that each is judged by itself whatever the types of the others, and so that
    what is read once need not fit into memory. The file lives as long as the process, or in ``cache_dir``."""
    import pyarrow as pa

    folder = cache_dir or Path(datasets.fingerprint.get_temporary_cache_files_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows-{uuid.uuid4().hex}.arrow"
    schema = pa.schema({JSON: pa.large_string()})
    remaining = iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        while batch := [_encoded(row) for row in itertools.islice(remaining, SAMPLE)]:
            stream.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
    dataset = datasets.Dataset.from_file(str(path))
    return Source(dataset, _keys(dataset), lines=False)


def _encoded(row: Any) -> str:
    try:
        return json.dumps(row, default=_plain)
    except (TypeError, ValueError) as error:
        return json.dumps({UNREADABLE: f"the row cannot be read: {error}"})


def _plain(value: Any) -> Any:
    """Numpy's and torch's numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")


def _keys(dataset: Any) -> list[str]:
    rows = (parse(line) for line in dataset[:SAMPLE][JSON]) if len(dataset) else ()
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def _json_column(datasets: Any) -> Any:
    return datasets.Features({JSON: datasets.Value("large_string")})

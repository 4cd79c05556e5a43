"""Where rows come from, as a ``datasets.Dataset``: itself, a file, or Python objects written to disk as JSON."""

import codecs
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefkern import check
from prefkern.data.text.formats import MEDIA
from prefkern.data.text.rows import BYTE_ORDER, JSON, NOT_UTF8, keys_of, parse, stored

LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".bz2", ".xz", ".zst")
_LOOKED_AT = 100


class Source(NamedTuple):
    """``dataset`` has the ``columns``, or one column of JSON objects with these keys. ``lines``: rows are a file's.
    ``structs``: columns in which a null may be one that Arrow filled in."""

    dataset: Any
    columns: list[str]
    lines: bool = False
    structs: frozenset[str] = frozenset()

    def media(self) -> dict[str, str]:
        """Columns of images, videos or sounds, and which of them."""
        kinds = ((name, kind) for name in MEDIA for kind in ("Image", "Video", "Audio"))
        features = self._features()
        return {name: kind for name, kind in kinds if name in features and f"{kind}(" in repr(features[name])}

    def _features(self) -> Mapping[str, Any]:
        return {} if JSON in self.dataset.column_names else self.dataset.features


def source(where: str, given: Any, cache_dir: Path | None, num_proc: int | None) -> Source:
    """The rows of anything that `prepare` takes."""
    found = _source(where, given, cache_dir, num_proc)
    if JSON in found.dataset.column_names and not found.columns:
        reasons = ((number, parse(line)) for number, line in enumerate(found.dataset[:_LOOKED_AT][JSON]))
        number, reason = next(((number, reason) for number, reason in reasons if reason), (0, None))
        if isinstance(reason, str):
            row = f"line {number + 1}" if found.lines else f"row {number}"
            check.fail(where, f"no row can be read: {row}: {reason}")
    return found


def _source(where: str, given: Any, cache_dir: Path | None, num_proc: int | None) -> Source:
    datasets = check.require("datasets", f"prefkern.{where}", "pip install datasets")
    if isinstance(given, str | os.PathLike):
        return _file(where, datasets, Path(given).expanduser(), cache_dir, num_proc)
    if isinstance(given, datasets.Dataset) and given.format["type"] != "custom":
        return _of_arrow(given.with_format(None))
    if isinstance(given, Mapping):  # datasets.DatasetDict is one
        check.fail_type(
            where, f"dataset must be one set of rows, got {type(given).__name__} with {', '.join(map(str, given))}"
        )
    # a transform (with_transform) may give another row at every reading: the rows are read through it once
    if not isinstance(given, list | tuple | datasets.Dataset | datasets.IterableDataset):
        check.fail_type(
            where,
            "dataset must be a datasets.Dataset or IterableDataset, a path to JSON or Parquet, or a list of "
            f"dicts, got {type(given).__name__}",
        )
    made, columns = stored(datasets, given, cache_dir)
    # streamed from Arrow or Parquet, or from tables that a builder made of JSON
    tables = getattr(getattr(given, "_ex_iterable", None), "iter_arrow", None)
    features = getattr(given, "features", None) if isinstance(given, datasets.IterableDataset) else None
    filled = tables is not None or features is not None
    return Source(made, columns, structs=_structs(features, columns) if filled else frozenset())


def _of_arrow(dataset: Any) -> Source:
    columns = list(dataset.column_names)
    return Source(dataset, columns, structs=_structs(dataset.features, columns))


def _structs(features: Mapping[str, Any] | None, columns: list[str]) -> frozenset[str]:
    """Those whose type is not JSON, which Arrow holds as it is."""
    kinds = features or {}
    return frozenset(name for name in columns if "Json(" not in repr(kinds.get(name)))


def _file(where: str, datasets: Any, path: Path, cache_dir: Path | None, num_proc: int | None) -> Source:
    if not path.is_file():
        check.fail(
            where,
            f"there is no file {path}; a dataset of the Hub is loaded first: datasets.load_dataset({str(path)!r}, "
            "split='train')",
        )
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    kind = suffixes[-1] if suffixes else ""
    if kind != ".parquet" and kind not in LINES:
        check.fail(where, f"the name of the file must end with .parquet, {' or '.join(LINES)}, got {path.name}")
    options: dict[str, Any] = {}
    if kind != ".parquet":
        codecs.register_error(_DECODING, _undecoded)
        columns = datasets.Features({JSON: datasets.Value("large_string")})
        options = {"features": columns, "encoding": "utf-8", "encoding_errors": _DECODING}
    builder = "parquet" if kind == ".parquet" else "text"
    try:
        dataset = datasets.load_dataset(
            builder, data_files=str(path), split="train", cache_dir=str(cache_dir) if cache_dir else None, **options
        )
    except Exception as error:  # the builders wrap what Arrow, the codec or the file system raised
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):  # of a compressed file, which is opened without these options
            byte, line = cause.object[cause.start], _line_of_bad_byte(path)
            check.fail(where, f"line {line} of {path} holds the byte 0x{byte:02x}, which is not UTF-8")
        raise ValueError(f"prefkern.{where}: {path} cannot be read: {type(cause).__name__}: {cause}") from error
    if kind == ".parquet":
        return _of_arrow(dataset)
    if _is_array(dataset):
        return Source(*stored(datasets, _array(where, path, dataset), cache_dir))
    return Source(dataset, keys_of(datasets, dataset, num_proc), lines=True)


_DECODING = "prefkern.names_the_byte"


def _undecoded(error: UnicodeError) -> tuple[str, int]:
    """A byte that is not UTF-8 as a letter that no JSON has, and its two digits: the line is refused by its number."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(f"{NOT_UTF8}{byte:02x}" for byte in error.object[error.start : error.end]), error.end


def _line_of_bad_byte(path: Path) -> int | str:
    import lzma

    import pyarrow as pa

    with lzma.open(path) if path.suffix == ".xz" else io.BufferedReader(pa.input_stream(str(path))) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return "a"


def _is_array(dataset: Any) -> bool:
    """Whether the first letter of a file begins a JSON array."""
    begins = (line.removeprefix(BYTE_ORDER).lstrip()[:1] for batch in dataset.iter(100) for line in batch[JSON])
    return next((letter for letter in begins if letter), "") == "["


def _array(where: str, path: Path, dataset: Any) -> list[Any]:
    """The rows of a file that is one JSON array, as most demonstrations of chat data are. It is read whole."""
    text = "\n".join(dataset[:][JSON]).removeprefix(BYTE_ORDER)
    at = text.find(NOT_UTF8)
    if at >= 0:
        byte, line = text[at + 1 : at + 3], text.count("\n", 0, at) + 1
        check.fail(where, f"line {line} of {path} holds the byte 0x{byte}, which is not UTF-8")
    try:
        rows: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        check.fail(where, f"{path} begins as a JSON array and is none: {error}")
    return rows

"""Rows of text into columns of token ids."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from prefkern import check
from prefkern.data.arrays.views import whole
from prefkern.data.batches.truncation import Truncation, TruncationMode
from prefkern.data.text.formats import FIELDS, FORMATS, MEDIA, OTHER_NAMES, TEMPLATE, listed, recognise
from prefkern.data.text.rows import BLANK, JSON
from prefkern.data.text.sources import Source, source
from prefkern.data.text.tokenize import COUNTED, REFUSED, ROW, Options, Tokenize, output_columns
from prefkern.data.types import Prepared, RefusedRow

WHERE = "data.prepare"
SHOWN = 20
LONGEST_MESSAGE = 1800


class RefusedRows(ValueError):  # noqa: N818 - the rows are what it names
    """Rows that cannot be used; ``refused`` lists them all."""

    def __init__(self, message: str, refused: tuple[RefusedRow, ...]) -> None:
        super().__init__(message)
        self.refused = refused

    def __reduce__(self) -> tuple[type["RefusedRows"], tuple[str, tuple[RefusedRow, ...]]]:
        return type(self), (str(self), self.refused)


def prepare(
    dataset: Any,
    tokenizer: Any,
    *,
    format: Literal["preference", "unpaired", "rewarded", "scored", "sft", "messages", "text"] | None = None,
    columns: Mapping[str, str | None] | None = None,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    join_prompt: bool = False,
    add_eos: bool = True,
    on_bad: Literal["raise", "report"] = "raise",
    num_proc: int | None = None,
    batch_size: int = 1000,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Prepared:
    """Rows of text or conversations, tokenised as TRL 1.16 tokenises them, in the columns that the collators take.

    ``dataset``: a ``datasets.Dataset``; a path to JSON lines or a JSON array (``.jsonl``, ``.ndjson``, ``.json``, also
    compressed) or Parquet; a list of dicts; or a ``datasets.IterableDataset``, which is read once, to its end, as is a
    dataset with a transform. The format is recognised from the columns of all rows, or chosen with ``format``:

    ==============  ==============================  ==========================================  =======================
    format          columns                         gives                                       for
    ==============  ==============================  ==========================================  =======================
    ``preference``  ``prompt, chosen, rejected``    ``prompt_ids, chosen_ids, rejected_ids``    `collate_pairs`
    ``unpaired``    ``prompt, completion, label``   ``prompt_ids, completion_ids, label``       `collate_unpaired`
    ``rewarded``    ``prompt, completion, reward``  ``prompt_ids, completion_ids, reward``      `collate_scored`
    ``scored``      ``prompt, response, score``     ``prompt_ids, response_ids, score``         `collate_scored`
    ``sft``         ``prompt, completion``          ``input_ids, labels``                       `collate_language`
    ``messages``    ``messages``                    ``input_ids, labels``                       `collate_language`
    ``text``        ``text``                        ``input_ids, labels``                       `collate_language`
    ==============  ==============================  ==========================================  =======================

    Each text is a string, or a list of messages with ``role`` and ``content`` (or ``from`` and ``value``), which the
    tokenizer's chat template renders with the row's ``tools`` and ``chat_template_kwargs``, where there are such
    columns. Where a row has no ``prompt``, ``chosen`` and ``rejected`` hold it, and it is the beginning that both
    share. ``messages`` may be called ``conversations``; in it and in ``text`` every token is scored. Numbers
    ``ref_chosen_logps``, ``ref_rejected_logps``, ``ref_logps`` and ``margin`` are carried along. ``columns`` names
    those that differ, ``{"prompt": "question"}``, and hides one with ``{"prompt": None}``.

    As TRL does: the end-of-sequence token is put behind text that does not end with it (not behind conversations;
    ``add_eos=False``: nowhere); the prompt ends where the tokens of prompt and prompt + completion part, and ``merged``
    counts the rows where tokens merge across its own end. Special tokens that the tokenizer adds by itself stand once.
    ``max_length`` cuts sequences at their end, or with ``truncation_mode="keep_end"`` at their beginning, as far as the
    collators with these options would (they cut the rest, so give them the same): ``unpaired`` completions keep
    ``max_length`` tokens of their own, since KTO's baseline reads them behind other prompts. ``join_prompt=True`` gives
    ``chosen_ids`` and ``rejected_ids`` with the prompt in them and never cut, as TRL's RewardTrainer takes them.

    Rows are refused, with their numbers (from 0; in a file of lines the number of the line less one) and the reason,
    for: fields that are missing, null or of a wrong type, empty completions or assistant's turns, numbers that are not
    finite, labels that are not true or false (or 1 or 0), unknown roles, content that is not text, images beside it,
    text that is not Unicode, lines that are not JSON, what the chat template or the tokenizer raises on, no common
    prompt, a prompt that the sequence does not begin with, and a prompt (with ``join_prompt``: a sequence) too long for
    ``max_length``. ``on_bad="raise"`` raises `RefusedRows` with all of them; ``"report"`` leaves them out and lists
    them in the result.

    Tokenising runs in batches of ``batch_size`` rows in ``num_proc`` processes through ``datasets``' ``map``: results
    stream to Arrow files in its cache (or ``cache_dir``) and are found there the next time, so that a dataset need not
    fit into memory (a JSON array must); of Python lists, iterables and JSON arrays the files last as long as the
    process. ``progress`` shows a bar and says in one line on stderr what was recognised.

    Raises:
        RefusedRows: rows cannot be used and ``on_bad="raise"``, or no row can.
        ValueError, TypeError: the columns make no format or several, or an argument is not what it must be.
        MissingDependency: ``datasets`` is not installed.
    """
    check.one_of(WHERE, "on_bad", on_bad, ("raise", "report"))
    check.one_of(WHERE, "truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token"):
        inner = ", for a processor its .tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        check.fail_type(WHERE, f"tokenizer must be a transformers tokenizer{inner}, got {type(tokenizer).__name__}")
    batch_size = whole(WHERE, "batch_size", batch_size, low=1)
    if max_length is not None:
        max_length = whole(WHERE, "max_length", max_length, low=1)
    if num_proc is not None:
        num_proc = whole(WHERE, "num_proc", num_proc, low=1)
    with _bars(progress):
        rows = source(WHERE, dataset, None if cache_dir is None else Path(cache_dir), num_proc)
        truncation = None if max_length is None else Truncation(max_length, truncation_mode)
        options = _options(rows, format, columns, join_prompt, add_eos, truncation)
        if len(rows.dataset) == 0:
            check.fail(WHERE, "dataset must have at least one row, got none")
        made = _map(rows, Tokenize(tokenizer, options), batch_size, num_proc)
        result = _result(made, rows, options, on_bad, num_proc)
    if progress:
        print(f"prefkern.{WHERE}: {result}", file=sys.stderr)
    return result


def _options(
    rows: Source,
    format: str | None,
    columns: Mapping[str, str | None] | None,
    join_prompt: bool,
    add_eos: bool,
    truncation: Truncation | None,
) -> Options:
    given = dict(columns or {})
    for name, column in given.items():
        check.one_of(WHERE, "the keys of columns", name, sorted(FIELDS))
        if column is not None and column not in rows.columns:
            check.fail(WHERE, f"columns names {column!r} for {name}, but the columns are {listed(rows.columns)}")
    free = [name for name in rows.columns if name not in given.values()]
    names = {name: name for name in free if name in FIELDS and name not in given}
    others = {name: other for name, other in OTHER_NAMES.items() if other in free and name not in {*names, *given}}
    names |= others | {name: column for name, column in given.items() if column is not None}
    found = recognise(WHERE, list(names), rows.columns, format)
    known = FORMATS[found]
    if join_prompt and found != "preference":
        check.fail(WHERE, f"join_prompt is for preference pairs, but the columns make the format {found!r}")
    for name, kind in rows.media().items():
        if name in names:
            check.fail(
                WHERE,
                f"the column {name} holds {kind.lower()}s, which only a model's processor can read, and prepare "
                f"tokenises text; columns={{{name!r}: None}} leaves it out",
            )
    prompt = ("prompt",) if known.prompt != "none" else ()
    wanted = dict.fromkeys((*prompt, *known.required, *known.optional, *TEMPLATE, *MEDIA))
    names = {name: names[name] for name in wanted if name in names}
    return Options(found, names, join_prompt, add_eos, truncation, rows.structs)


def _map(rows: Source, tokenize: Tokenize, batch_size: int, num_proc: int | None) -> Any:
    import datasets  # a Dataset was made with it

    read = rows.dataset
    if JSON not in read.column_names:
        read = read.select_columns(list(dict.fromkeys(tokenize.options.names.values())))
    types = output_columns(tokenize.options)
    ids = datasets.List(datasets.Value("int32"))
    return read.map(
        tokenize,
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc,
        remove_columns=read.column_names,
        features=datasets.Features({n: ids if kind == "ids" else datasets.Value(kind) for n, kind in types.items()}),
        desc="Tokenizing",
    )


def _result(made: Any, rows: Source, options: Options, on_bad: str, num_proc: int | None) -> Prepared:
    import numpy as np
    import pyarrow.compute as pc

    notes = {name: made.data.column(name) for name in (ROW, REFUSED, *COUNTED)}
    bad = np.flatnonzero(pc.is_valid(notes[REFUSED]).to_numpy())
    reasons = notes[REFUSED].take(bad).to_pylist()
    numbers = notes[ROW].take(bad).to_pylist()
    refused = tuple(RefusedRow(row, reason) for row, reason in zip(numbers, reasons, strict=True) if reason != BLANK)
    blank = len(bad) - len(refused)
    counts = (pc.sum(pc.greater(notes[name].cast("int64"), 0)).as_py() or 0 for name in COUNTED)
    result = Prepared(
        dataset=made.select_columns([name for name in made.column_names if name not in notes]),
        format=options.format,
        columns={name: column for name, column in options.names.items() if name not in MEDIA},
        rows=len(made) - blank,
        refused=refused,
        unused=tuple(name for name in rows.columns if name not in options.names.values()),
        **dict(zip(COUNTED, counts, strict=True)),
    )
    if refused and (on_bad == "raise" or len(refused) == result.rows):
        advice = "" if len(refused) == result.rows else "; pass on_bad='report' to leave them out"
        raise RefusedRows(
            f"prefkern.{WHERE}: {len(refused)} of {result.rows} rows cannot be used: "
            f"{_by_reason(refused, rows.lines)}{advice}",
            refused,
        )
    if len(bad):
        # written anew, so that what is kept lies together and nothing of the others is read again
        kept = result.dataset.select(np.delete(np.arange(len(made)), bad))
        result = result._replace(dataset=kept.flatten_indices(num_proc=num_proc))
    if result.cut and options.truncation is not None:
        result.dataset.info.description = options.truncation.mark
    return result


def _by_reason(refused: Sequence[RefusedRow], lines: bool) -> str:
    rows = defaultdict(list)
    for row, reason in refused:
        rows[reason].append(row + lines)
    unit = "line" if lines else "row"
    parts: list[str] = []
    for reason, numbers in list(rows.items())[:SHOWN]:
        more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
        several = "s" if len(numbers) > 1 else ""
        part = f"{unit}{several} {', '.join(map(str, numbers[:SHOWN]))}{more}: {reason}"
        if parts and sum(map(len, parts)) + len(part) > LONGEST_MESSAGE:
            break
        parts.append(part)
    if len(rows) > len(parts):
        parts.append(f"and {len(rows) - len(parts)} more reasons")
    return "; ".join(parts)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Without ``datasets``' progress bars, if they are not to be shown."""
    datasets = check.require("datasets", f"prefkern.{WHERE}", "pip install datasets")
    hide = not shown and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()

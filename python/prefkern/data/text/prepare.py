"""Rows of text into columns of token ids."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from prefkern import check
from prefkern.data.arrays.views import whole
from prefkern.data.text.formats import FORMATS, TEMPLATE, recognise
from prefkern.data.text.sources import Source, source
from prefkern.data.text.tokenize import BLANK, CHAT, CUT, JSON, MERGED, REFUSED, ROW, Options, Tokenize, output_columns
from prefkern.data.types import Prepared, RefusedRow

WHERE = "data.prepare"
SHOWN = 20


class RefusedRows(ValueError):  # noqa: N818 - the rows are what it names
    """Rows that cannot be used; ``refused`` lists them all."""

    def __init__(self, message: str, refused: tuple[RefusedRow, ...]) -> None:
        super().__init__(message)
        self.refused = refused


def prepare(
    dataset: Any,
    tokenizer: Any,
    *,
    format: Literal["preference", "unpaired", "rewarded", "scored", "sft"] | None = None,
    columns: Mapping[str, str | None] | None = None,
    max_length: int | None = None,
    join_prompt: bool = False,
    add_eos: bool = True,
    on_bad: Literal["raise", "report"] = "raise",
    num_proc: int | None = None,
    batch_size: int = 1000,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Prepared:
    """Rows of text or conversations, tokenised as TRL 1.16 tokenises them, in the columns that the collators take.

    ``dataset``: a ``datasets.Dataset``; a path to JSON lines (``.jsonl``, ``.ndjson``, ``.json``, also compressed) or
    Parquet; a list of dicts; or a ``datasets.IterableDataset``, which is read once, to its end. The format is
    recognised from the columns, or chosen with ``format``:

    ==============  ==============================  ==========================================  =======================
    format          columns                         gives                                       for
    ==============  ==============================  ==========================================  =======================
    ``preference``  ``prompt, chosen, rejected``    ``prompt_ids, chosen_ids, rejected_ids``    `collate_pairs`
    ``unpaired``    ``prompt, completion, label``   ``prompt_ids, completion_ids, label``       `collate_unpaired`
    ``rewarded``    ``prompt, completion, reward``  ``prompt_ids, completion_ids, reward``      `collate_scored`
    ``scored``      ``prompt, response, score``     ``prompt_ids, response_ids, score``         `collate_scored`
    ``sft``         ``prompt, completion``          ``input_ids, labels``                       `collate_language`
    ==============  ==============================  ==========================================  =======================

    Each text is a string or a list of messages (``role`` and ``content``), which the tokenizer's chat template renders
    with the row's ``tools`` and ``chat_template_kwargs``, where there are such columns. Without a ``prompt``,
    ``chosen`` and ``rejected`` hold it, and it is the beginning that both share. Numbers ``ref_chosen_logps``,
    ``ref_rejected_logps``, ``ref_logps`` and ``margin`` are carried along. ``columns`` names those that differ,
    ``{"prompt": "question"}``, and hides one with ``{"prompt": None}``.

    As TRL does: the end-of-sequence token is put behind text that does not end with it (not behind conversations;
    ``add_eos=False``: nowhere); the prompt ends where the tokens of prompt and prompt + completion part, and ``merged``
    counts the rows where that is before its own end. ``max_length`` cuts sequences at their end, where TRL's collators
    cut them; ``unpaired`` completions only to ``max_length`` tokens of their own, since KTO's baseline reads them
    behind other prompts (`collate_unpaired` cuts the rest). ``join_prompt=True`` gives ``chosen_ids`` and
    ``rejected_ids`` with the prompt in them and never cut, as TRL's RewardTrainer takes them.

    Rows are refused, with their numbers (from 0; in a file the number of the line less one) and the reason, for:
    fields that are missing, null or of a wrong type, empty completions, numbers that are not finite, labels that are
    not bool, unknown roles, content that is not text, lines that are not JSON, what the chat template raises on, no
    common prompt, a prompt whose tokens the sequence does not begin with, and a prompt (with ``join_prompt``: a
    sequence) too long for ``max_length``. ``on_bad="raise"`` raises `RefusedRows` with all of them; ``"report"`` leaves
    them out and lists them in the result.

    Tokenising runs in batches of ``batch_size`` rows in ``num_proc`` processes through ``datasets``' ``map``: results
    stream to Arrow files in its cache (or ``cache_dir``) and are found there the next time, so that a dataset need not
    fit into memory; of Python lists and iterables the files last as long as the process. ``progress`` shows a bar and
    says in one line on stderr what was recognised.

    Raises:
        RefusedRows: rows cannot be used and ``on_bad="raise"``, or no row can.
        ValueError, TypeError: the columns make no format or several, or an argument is not what it must be.
        MissingDependency: ``datasets`` is not installed.
    """
    check.one_of(WHERE, "on_bad", on_bad, ("raise", "report"))
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token"):
        inner = ", for a processor its .tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        check.fail_type(WHERE, f"tokenizer must be a transformers tokenizer{inner}, got {type(tokenizer).__name__}")
    batch_size = whole(WHERE, "batch_size", batch_size, low=1)
    if max_length is not None:
        max_length = whole(WHERE, "max_length", max_length, low=1)
    if num_proc is not None:
        num_proc = whole(WHERE, "num_proc", num_proc, low=1)
    with _bars(progress):
        rows = source(WHERE, dataset, None if cache_dir is None else Path(cache_dir))
        options = _options(rows, format, columns, join_prompt, add_eos, max_length)
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
    max_length: int | None,
) -> Options:
    given = dict(columns or {})
    fields = {name for known in FORMATS.values() for name in ("prompt", *known.required, *known.optional)} | {*TEMPLATE}
    for name, column in given.items():
        check.one_of(WHERE, "the keys of columns", name, sorted(fields))
        if column is not None and column not in rows.columns:
            check.fail(WHERE, f"columns names {column!r} for {name}, but the columns are {', '.join(rows.columns)}")
    taken = set(given.values())
    names = {name: name for name in rows.columns if name in fields and name not in given and name not in taken}
    names |= {name: column for name, column in given.items() if column is not None}
    found = recognise(WHERE, list(names), rows.columns, format)
    known = FORMATS[found]
    if join_prompt and found != "preference":
        check.fail(WHERE, f"join_prompt is for preference pairs, but the columns make the format {found!r}")
    wanted = ("prompt", *known.required, *known.optional, *TEMPLATE)
    return Options(
        found, {name: names[name] for name in dict.fromkeys(wanted) if name in names}, join_prompt, add_eos, max_length
    )


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

    notes = {name: made.data.column(name) for name in (ROW, REFUSED, MERGED, CUT, CHAT)}
    bad = np.flatnonzero(pc.is_valid(notes[REFUSED]).to_numpy())
    reasons = notes[REFUSED].take(bad).to_pylist()
    numbers = notes[ROW].take(bad).to_pylist()
    refused = tuple(RefusedRow(row, reason) for row, reason in zip(numbers, reasons, strict=True) if reason != BLANK)
    blank = len(bad) - len(refused)
    counts = {name: pc.sum(pc.greater(notes[name].cast("int64"), 0)).as_py() or 0 for name in (CHAT, MERGED, CUT)}
    result = Prepared(
        dataset=made.select_columns([name for name in made.column_names if name not in notes]),
        format=options.format,
        columns=options.names,
        rows=len(made) - blank,
        conversational=counts[CHAT],
        merged=counts[MERGED],
        cut=counts[CUT],
        refused=refused,
        unused=tuple(name for name in rows.columns if name not in options.names.values()),
    )
    if refused and (on_bad == "raise" or len(refused) == result.rows):
        advice = "" if len(refused) == result.rows else "; pass on_bad='report' to leave them out"
        raise RefusedRows(
            f"prefkern.{WHERE}: {len(refused)} of {result.rows} rows cannot be used: "
            f"{_by_reason(refused, rows.lines)}{advice}",
            refused,
        )
    if len(bad) == 0:
        return result
    # written anew, so that what is kept lies together and nothing of the others is read again
    kept = result.dataset.select(np.delete(np.arange(len(made)), bad))
    return result._replace(dataset=kept.flatten_indices(num_proc=num_proc))


def _by_reason(refused: Sequence[RefusedRow], lines: bool) -> str:
    rows = defaultdict(list)
    for row, reason in refused:
        rows[reason].append(row + lines)
    unit = "line" if lines else "row"
    parts = []
    for reason, numbers in list(rows.items())[:SHOWN]:
        more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
        several = "s" if len(numbers) > 1 else ""
        parts.append(f"{unit}{several} {', '.join(map(str, numbers[:SHOWN]))}{more}: {reason}")
    if len(rows) > SHOWN:
        parts.append(f"and {len(rows) - SHOWN} more reasons")
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

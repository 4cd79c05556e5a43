"""Batches of preference pairs, of unpaired preferences and of scored responses."""

from typing import Any, Literal

from prefkern import check
from prefkern.data.arrays.columns import columns, either, ids, labels, scalars
from prefkern.data.batches.sequences import Sequences, options
from prefkern.data.batches.truncation import TruncationMode

REF_PAIR = ("ref_chosen_logps", "ref_rejected_logps")
REF_UNPAIRED = ("ref_logps", "ref_KL_logps")


def collate_pairs(
    rows: Any,
    *,
    pad_token_id: int,
    layout: Literal["concatenated", "interleaved"] = "concatenated",
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    pad_to_multiple_of: int | None = None,
    padding_free: bool = False,
) -> dict[str, Any]:
    """Preference pairs as one batch, the tensors of TRL's ``DataCollatorForPreference`` under its keys.

    ``rows``: a list of dicts, a dict of columns, or a ``pyarrow.Table`` (whole, sliced or chunked), with the token ids
    ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, and optionally the numbers ``ref_chosen_logps`` and
    ``ref_rejected_logps``. Ids are lists, numpy arrays, torch CPU tensors or Arrow lists of any integer type; int32 and
    int64 ids of an Arrow table in one chunk are read where they lie.

    Sequence = prompt + completion, cut to ``max_length`` tokens at its end (``"keep_start"``) or its beginning
    (``"keep_end"``); batches of `ArrowRows` that `prepare` has cut at the other end are refused. ``layout``: all B
    chosen sequences and then all B rejected ones, or chosen and rejected by turns.

    Returns int64 ``input_ids``, ``attention_mask`` and ``completion_mask`` ``[2 B, L]``, padded on the right, L the
    longest sequence rounded up to ``pad_to_multiple_of``; the reference log-probabilities ``[B]`` in torch's default
    dtype where they were given. With ``padding_free``: ``input_ids``, ``position_ids``, ``completion_mask`` ``[1, N]``,
    the int32 boundaries ``cu_seq_lens_q``, ``cu_seq_lens_k`` and ``seq_idx [1, N]``, and the ints ``max_length_q``,
    ``max_length_k``, as TRL's padding-free SFT collator names them. ``pad_to_multiple_of`` then rounds N up with
    padding tokens that continue the last sequence and are not scored: the boundaries are those of the 2 B sequences, as
    losses take them, where that collator would make each of these tokens a sequence.

    An empty prompt or completion is kept as it is. A completion that ``max_length`` empties is a ValueError that names
    its rows, as are null rows, missing columns, unequal row counts and negative ids.
    """
    where = "data.collate_pairs"
    check.one_of(where, "layout", layout, ("concatenated", "interleaved"))
    checked = options(
        where,
        rows,
        pad_token_id=pad_token_id,
        max_length=max_length,
        truncation_mode=truncation_mode,
        pad_to_multiple_of=pad_to_multiple_of,
        padding_free=padding_free,
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    given = columns(where, rows, names, REF_PAIR)
    tokens = {name: ids(where, name, given[name]) for name in names}
    sequences = Sequences(where, tokens, checked, interleaved=layout == "interleaved")
    batch = sequences.batch()
    batch |= {name: scalars(where, name, given[name], sequences.rows) for name in REF_PAIR if name in given}
    return batch


def collate_unpaired(
    rows: Any,
    *,
    pad_token_id: int,
    mismatched: bool = False,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    pad_to_multiple_of: int | None = None,
    padding_free: bool = False,
) -> dict[str, Any]:
    """Completions with a label each as one batch, the tensors of TRL's ``DataCollatorForUnpairedPreference``.

    ``rows``, as in `collate_pairs`, with the token ids ``prompt_ids`` and ``completion_ids`` and a bool (or 0 or 1)
    ``label``; optionally the token ids ``KL_completion_ids`` of mismatched completions, and the numbers ``ref_logps``
    and ``ref_KL_logps``. KTO estimates its baseline, `prefkern.kto_kl`, on prompts with completions of other prompts:
    `KTO: Model Alignment as Prospect Theoretic Optimization <https://arxiv.org/abs/2402.01306>`_. ``mismatched=True``
    makes them for rows without ``KL_completion_ids``: each prompt gets the completion of the row before it, the first
    prompt that of the last row, as TRL's dataset preparation does within each batch; it takes at least two rows.

    Returns int64 ``input_ids``, ``attention_mask`` and ``completion_mask`` ``[B, L]``; the same three under ``KL_``,
    with their own L, where there are mismatched completions; the reference log-probabilities ``[B]`` in torch's default
    dtype where they were given; ``label [B]``, bool. The options, ``padding_free`` and the errors are those of
    `collate_pairs`.
    """
    where = "data.collate_unpaired"
    checked = options(
        where,
        rows,
        pad_token_id=pad_token_id,
        max_length=max_length,
        truncation_mode=truncation_mode,
        pad_to_multiple_of=pad_to_multiple_of,
        padding_free=padding_free,
    )
    given = columns(where, rows, ("prompt_ids", "completion_ids", "label"), ("KL_completion_ids", *REF_UNPAIRED))
    tokens = {name: ids(where, name, given[name]) for name in ("prompt_ids", "completion_ids")}
    sequences = Sequences(where, tokens, checked)
    batch = sequences.batch()
    if "KL_completion_ids" in given:
        if mismatched:
            check.fail(where, "mismatched=True is for rows without KL_completion_ids, but they have them")
        name = "KL_completion_ids"
        other = {"prompt_ids": tokens["prompt_ids"], name: ids(where, name, given[name])}
        batch |= Sequences(where, other, checked).batch("KL_")
    elif mismatched:
        if sequences.rows < 2:
            check.fail(where, "mismatched=True needs at least two rows: a single prompt has no other completion")
        other = {"prompt_ids": tokens["prompt_ids"], "mismatched completion_ids": tokens["completion_ids"]}
        batch |= Sequences(where, other, checked, shifted=True).batch("KL_")
    batch |= {name: scalars(where, name, given[name], sequences.rows) for name in REF_UNPAIRED if name in given}
    batch["label"] = labels(where, "label", given["label"], sequences.rows)
    return batch


def collate_scored(
    rows: Any,
    *,
    pad_token_id: int,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    pad_to_multiple_of: int | None = None,
    padding_free: bool = False,
) -> dict[str, Any]:
    """Responses with a score each as one batch, for losses that weigh a likelihood by a score.

    ``rows``, as in `collate_pairs`, with the token ids ``prompt_ids`` and ``response_ids`` (or ``completion_ids``), and
    the number ``score`` (or ``reward``).

    Returns int64 ``input_ids``, ``attention_mask`` and ``completion_mask`` ``[B, L]``, and ``score [B]`` in torch's
    default dtype. The options, ``padding_free`` and the errors are those of `collate_pairs`; a score that is not finite
    is a ValueError that names its row.
    """
    where = "data.collate_scored"
    checked = options(
        where,
        rows,
        pad_token_id=pad_token_id,
        max_length=max_length,
        truncation_mode=truncation_mode,
        pad_to_multiple_of=pad_to_multiple_of,
        padding_free=padding_free,
    )
    response, score = either(rows, "response_ids", "completion_ids"), either(rows, "score", "reward")
    given = columns(where, rows, ("prompt_ids", response, score))
    tokens = {name: ids(where, name, given[name]) for name in ("prompt_ids", response)}
    sequences = Sequences(where, tokens, checked)
    batch = sequences.batch()
    batch["score"] = scalars(where, score, given[score], sequences.rows, finite=True)
    return batch

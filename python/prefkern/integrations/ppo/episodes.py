"""Episodes: queries with their responses and rewards, checked before anything changes."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefkern import check

WHERE = "PPOTrainer.step"
Ids = NDArray[np.int64]


class Episode(NamedTuple):
    """One query with its response. ``score`` is added at the end of the response, ``rewards [r]`` at its tokens;
    ``mask [r]`` says which tokens the policy wrote (the others came from a tool)."""

    query: Ids
    response: Ids
    score: float
    rewards: NDArray[np.float64] | None
    mask: NDArray[np.bool_]
    ref_logps: NDArray[np.float64] | None


class Limits(NamedTuple):
    """What the model can take."""

    vocabulary: int
    positions: int | None


def tokens(where: str, name: str, given: Any, tokenizer: Any) -> list[Ids]:
    """Rows of token ids: one-dimensional tensors, lists of ids, or strings and lists of messages, which the tokenizer
    encodes."""
    if isinstance(given, str) or not isinstance(given, Sequence | Tensor | np.ndarray):
        check.fail_type(where, f"{name} must be a list with one tensor of token ids each, got {type(given).__name__}")
    return [_row(where, f"{name}[{index}]", row, tokenizer) for index, row in enumerate(given)]


def _row(where: str, name: str, row: Any, tokenizer: Any) -> Ids:
    if isinstance(row, list | tuple) and len(row) and isinstance(row[0], dict):
        if tokenizer is None or not tokenizer.chat_template:
            check.fail(where, f"{name} is a list of messages, which needs a tokenizer with a chat template")
        row = tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=True)["input_ids"]
    elif isinstance(row, str):
        if tokenizer is None:
            check.fail_type(where, f"{name} is a string, which needs a tokenizer; pass token ids")
        row = tokenizer(row, add_special_tokens="responses" not in name)["input_ids"]
    if isinstance(row, Tensor):
        row = row.detach().cpu().numpy()
    array = np.asarray(row)
    if array.ndim != 1:
        check.fail(where, f"{name} must have one dimension, got shape {array.shape}; pass one row for each episode")
    if array.size and array.dtype.kind not in "iu":
        check.fail_type(where, f"{name} must hold token ids (int64), got {array.dtype}")
    return array.astype(np.int64)


def check_step(
    queries: Any,
    responses: Any,
    rewards: Any,
    response_masks: Any,
    ref_logps: Any,
    *,
    tokenizer: Any,
    limits: Limits,
) -> list[Episode]:
    """The episodes of this process, or an error that names the first argument and row that cannot be used."""
    query_rows, response_rows = (
        tokens(WHERE, name, given, tokenizer) for name, given in (("queries", queries), ("responses", responses))
    )
    columns = {"rewards": rewards, "response_masks": response_masks, "ref_logps": ref_logps}
    for name, column in columns.items():
        if column is not None and not hasattr(column, "__len__"):
            check.fail_type(WHERE, f"{name} must be a list with one entry per response, got {type(column).__name__}")
    lengths = {"queries": len(query_rows), "responses": len(response_rows)}
    lengths |= {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        check.fail(WHERE, f"there must be one response and one reward for every query, got {found}")
    if not query_rows:
        check.fail(WHERE, "queries must hold at least one query, got none")
    return [
        _episode(
            index,
            query,
            response,
            rewards[index],
            None if response_masks is None else response_masks[index],
            None if ref_logps is None else ref_logps[index],
            limits,
        )
        for index, (query, response) in enumerate(zip(query_rows, response_rows, strict=True))
    ]


def _episode(i: int, query: Ids, response: Ids, reward: Any, mask: Any, ref_logps: Any, limits: Limits) -> Episode:
    for name, row in ((f"queries[{i}]", query), (f"responses[{i}]", response)):
        if not len(row):
            why = "a response needs a token before it" if name[0] == "q" else "there is nothing to learn from"
            check.fail(WHERE, f"{name} must have at least one token, got none: {why}")
        if row.min() < 0 or row.max() >= limits.vocabulary:
            wrong = row[(row < 0) | (row >= limits.vocabulary)][0]
            check.fail(WHERE, f"{name} must hold ids in [0, {limits.vocabulary}), the model's vocabulary, got {wrong}")
    total = len(query) + len(response)
    if limits.positions is not None and total > limits.positions:
        check.fail(
            WHERE,
            f"queries[{i}] and responses[{i}] together must have at most the model's {limits.positions} positions, "
            f"got {len(query)} + {len(response)} = {total} tokens",
        )
    values = _numbers(f"rewards[{i}]", reward)
    if values.size not in (1, len(response)):
        check.fail(
            WHERE, f"rewards[{i}] must be one number, or one for each of {len(response)} tokens, got {values.size}"
        )
    scored = np.ones(len(response), dtype=np.bool_)
    if mask is not None:
        flags = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
        if flags.shape != response.shape or not np.isin(flags, (0, 1)).all():
            check.fail(WHERE, f"response_masks[{i}] must hold 0 or 1 for each of {len(response)} tokens, got {flags!r}")
        scored = flags.astype(np.bool_)
        if not scored.any():
            check.fail(WHERE, f"response_masks[{i}] must mark at least one token that the policy wrote, got none")
    given = None if ref_logps is None else _numbers(f"ref_logps[{i}]", ref_logps)
    if given is not None and given.shape != response.shape:
        check.fail(
            WHERE, f"ref_logps[{i}] must be one number for each of {len(response)} tokens, got shape {given.shape}"
        )
    if values.size == 1:
        return Episode(query, response, float(values.reshape(())), None, scored, given)
    return Episode(query, response, 0.0, np.where(scored, values, 0.0), scored, given)


def _numbers(name: str, given: Any) -> NDArray[np.float64]:
    try:
        array = np.asarray(given.detach().cpu().double() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"prefkern.{WHERE}: {name} must be a number or numbers, got {type(given).__name__}") from error
    if array.ndim > 1:
        check.fail(WHERE, f"{name} must be one number or one per token, got shape {array.shape}")
    if not np.isfinite(array).all():
        check.fail(WHERE, f"{name} must be finite, got {array if array.size < 9 else array[~np.isfinite(array)][0]}")
    return array


def as_tensors(rows: Sequence[Ids]) -> list[Tensor]:
    return [torch.from_numpy(row) for row in rows]


def padding(tokenizer: Any) -> int:
    """The id that fills rows; attention never sees it."""
    if tokenizer is None:
        return 0
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    used = tokenizer.eos_token_id or 0
    warnings.warn(
        f"prefkern.PPOTrainer: the tokenizer has no pad token: rows are filled with id {used} "
        f"({tokenizer.convert_ids_to_tokens(used)!r}), which is masked out",
        stacklevel=3,
    )
    return int(used)

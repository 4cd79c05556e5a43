"""Episodes: queries with their responses and rewards, checked before anything changes."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prefkern import check
from prefkern.integrations.ppo.tokens import Ids, rows_of

WHERE = "PPOTrainer.step"
_LEAST = 4
"""Tokens of queries that their responses repeat; fewer may be chance."""


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
    """What the model can take, how a response ends, and what fills it up behind its end."""

    vocabulary: int
    positions: int | None
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    masked: Ids = np.array([], dtype=np.int64)
    """Ids whose logits the model masks: it never says them."""


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
        rows_of(WHERE, name, given, tokenizer) for name, given in (("queries", queries), ("responses", responses))
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
    if response_masks is None:
        _check_no_query(query_rows, response_rows)
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


def _check_no_query(queries: list[Ids], responses: list[Ids]) -> None:
    """A step on whole rows goes through and learns the prompts: the ratio is right and the KL is not."""
    repeated = [
        np.array_equal(response[: len(query)], query) for query, response in zip(queries, responses, strict=True)
    ]
    if all(repeated) and sum(map(len, queries)) >= _LEAST:
        check.fail(
            WHERE,
            f"responses must not contain their queries, but each of the {len(queries)} begins with its own, as "
            "generate(return_prompt=True) gives it: pass response[len(query):] (if the policy did write its query "
            "again, pass response_masks)",
        )


def _episode(i: int, query: Ids, response: Ids, reward: Any, mask: Any, ref_logps: Any, limits: Limits) -> Episode:
    for name, row in ((f"queries[{i}]", query), (f"responses[{i}]", response)):
        if not len(row):
            why = "a response needs a token before it" if name[0] == "q" else "there is nothing to learn from"
            check.fail(WHERE, f"{name} must have at least one token, got none: {why}")
        if row.min() < 0 or row.max() >= limits.vocabulary:
            wrong = row[(row < 0) | (row >= limits.vocabulary)][0]
            check.fail(WHERE, f"{name} must hold ids in [0, {limits.vocabulary}), the model's vocabulary, got {wrong}")
    never = response[np.isin(response, limits.masked)]
    if len(never):
        check.fail(WHERE, f"responses[{i}] must hold ids that the model can say, got {never[0]}, whose logit it masks")
    total = len(query) + len(response)
    if limits.positions is not None and total > limits.positions:
        check.fail(
            WHERE,
            f"queries[{i}] and responses[{i}] together must have at most the model's {limits.positions} positions, "
            f"got {len(query)} + {len(response)} = {total} tokens",
        )
    if mask is None:
        _check_end(f"responses[{i}]", response, limits)
    values = numbers(f"rewards[{i}]", reward)
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
    given = None if ref_logps is None else numbers(f"ref_logps[{i}]", ref_logps)
    if given is not None and given.shape != response.shape:
        check.fail(
            WHERE, f"ref_logps[{i}] must be one number for each of {len(response)} tokens, got shape {given.shape}"
        )
    if values.size == 1:
        return Episode(query, response, float(values.reshape(())), None, scored, given)
    return Episode(query, response, 0.0, np.where(scored, values, 0.0), scored, given)


def _check_end(name: str, response: Ids, limits: Limits) -> None:
    """Padding behind the end would be scored as if it had been sampled."""
    ends = np.flatnonzero(np.isin(response, limits.stop_token_ids))
    behind = response[ends[0] + 1 :] if len(ends) else response[:0]
    if len(behind) and np.isin(behind, (*limits.stop_token_ids, limits.pad_token_id)).all():
        check.fail(
            WHERE,
            f"{name} must end with its end token {response[ends[0]]}, got {len(behind)} tokens of padding behind it: "
            f"pass the first {ends[0] + 1} tokens",
        )


def numbers(name: str, given: Any) -> NDArray[np.float64]:
    """One finite number, or a row of them."""
    try:
        array = np.asarray(given.detach().cpu().double() if isinstance(given, Tensor) else given, dtype=np.float64)
    except OverflowError as error:
        raise ValueError(f"prefkern.{WHERE}: {name} must be finite in float64, got a larger integer") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"prefkern.{WHERE}: {name} must be a number or numbers, got {type(given).__name__}") from error
    if array.ndim > 1:
        check.fail(WHERE, f"{name} must be one number or one per token, got shape {array.shape}")
    if not np.isfinite(array).all():
        check.fail(WHERE, f"{name} must be finite, got {array if array.size < 9 else array[~np.isfinite(array)][0]}")
    return array

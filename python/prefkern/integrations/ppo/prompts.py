"""The queries of a dataset, in an order that depends on the seed only, and the call of a reward function."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from prefkern import check
from prefkern.integrations.ppo.tokens import Ids, rows_of

WHERE = "PPOTrainer.train"
NAMES = ("prompt", "query", "input_ids")


class Prompts:
    """Rows of a dataset: strings, lists of messages, token ids, or dicts with one of these as ``prompt``, ``query`` or
    ``input_ids``; the other columns go to the reward function."""

    def __init__(self, dataset: Any, tokenizer: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, str | dict):
            check.fail_type(WHERE, f"dataset must be a list or a datasets.Dataset, got {type(dataset).__name__}")
        if not len(dataset):
            check.fail(WHERE, "dataset must hold at least one row, got none")
        self._dataset, self._tokenizer = dataset, tokenizer

    def __len__(self) -> int:
        return len(self._dataset)

    def order(self, step: int, size: int, seed: int) -> list[int]:
        """The rows of step 0, 1, ...: permutations of the dataset, one after the other, cut into steps."""
        rows: list[int] = []
        first = step * size
        while len(rows) < size:
            epoch, start = divmod(first + len(rows), len(self))
            order = np.random.default_rng((seed, 2**31, epoch)).permutation(len(self))
            rows += order[start : start + size - len(rows)].tolist()
        return rows

    def take(self, rows: list[int]) -> tuple[list[Ids], list[dict[str, Any]]]:
        """The token ids of some rows, and their columns (``prompt`` as it was given)."""
        found = [self._columns(row) for row in rows]
        queries = rows_of(WHERE, "queries", [columns["prompt"] for columns in found], self._tokenizer)
        for row, query in zip(rows, queries, strict=True):
            if not len(query):
                check.fail(WHERE, f"dataset[{row}] must have at least one token, got none")
        return queries, found

    def _columns(self, row: int) -> dict[str, Any]:
        entry = self._dataset[row]
        if not isinstance(entry, dict):
            return {"prompt": entry}
        name = next((name for name in NAMES if name in entry), None)
        if name is None:
            check.fail(WHERE, f"dataset[{row}] must have one of {', '.join(NAMES)}, got {', '.join(entry)}")
        return {**entry, "prompt": entry[name]}


def rewards(
    reward_fn: Callable[..., Any], tokenizer: Any, columns: list[dict[str, Any]], responses: list[Any]
) -> list[Any]:
    """``reward_fn(prompts, responses)``, with those of the dataset's columns, and ``response_ids``, that it has
    arguments for. Responses are strings where there is a tokenizer."""
    shown = responses if tokenizer is None else [tokenizer.decode(each, skip_special_tokens=True) for each in responses]
    prompts = [row["prompt"] for row in columns]
    given = list(reward_fn(prompts, shown, **_further(reward_fn, columns, responses)))
    if len(given) != len(responses):
        check.fail(WHERE, f"reward_fn must return one reward per response, got {len(given)} for {len(responses)}")
    return given


def _further(reward_fn: Callable[..., Any], columns: list[dict[str, Any]], responses: list[Any]) -> dict[str, Any]:
    """What a reward function names beside its first two arguments; refused where a name says two things, or nothing."""
    parameters = list(inspect.signature(reward_fn).parameters.values())
    first = {each.name for each in parameters[:2] if each.kind is each.POSITIONAL_OR_KEYWORD}
    further = {each.name: each for each in parameters if each.name not in first}
    everything = any(each.kind is each.VAR_KEYWORD for each in parameters)
    there = {name: None for row in columns for name in row}  # of all rows: a list's may have different ones
    found: dict[str, Any] = {}
    for name in there:
        if name == "prompt":
            continue
        same = all(row.get(name) is row["prompt"] for row in columns)  # the prompts, under the name in the dataset
        if (name in first and not same) or (name == "response_ids" and (everything or name in further)):
            what = "the ids of the responses" if name == "response_ids" else f"reward_fn's own argument {name}"
            check.fail(
                WHERE,
                f"dataset has a column {name!r}, which is also {what}: rename the column (dataset.rename_column), or "
                "leave it out",
            )
        if name not in first and (everything or name in further):
            found[name] = [row.get(name) for row in columns]
    if everything or "response_ids" in further:
        found["response_ids"] = responses
    for name, each in further.items():
        if (
            name not in found
            and each.default is each.empty
            and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        ):
            check.fail(WHERE, f"reward_fn asks for {name}, but the dataset's columns are {', '.join(there)}")
    return found

"""Rows of token ids, from strings, conversations, lists and tensors; the ids that end a response and fill a row."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefkern import check
from prefkern.integrations.ppo.config import PPOConfig

Ids = NDArray[np.int64]


def rows_of(where: str, name: str, given: Any, tokenizer: Any) -> list[Ids]:
    """Rows of token ids: one-dimensional tensors, lists of ids, or strings and lists of messages, which the tokenizer
    encodes.

    Args:
        where, name: the function and its argument, for errors; ``responses`` are encoded as they are, anything else as
            a query: the beginning token that the tokenizer puts before a text once, and no end token behind it, whether
            the tokenizer or the text has put it there, as nothing is to be said after an end.
    """
    if isinstance(given, str) or not isinstance(given, Sequence | Tensor | np.ndarray):
        check.fail_type(where, f"{name} must be a list with one tensor of token ids each, got {type(given).__name__}")
    return [_row(where, f"{name}[{index}]", row, tokenizer) for index, row in enumerate(given)]


def as_tensors(rows: list[Ids]) -> list[Tensor]:
    return [torch.from_numpy(row) for row in rows]


def _row(where: str, name: str, row: Any, tokenizer: Any) -> Ids:
    if isinstance(row, dict):
        check.fail_type(
            where, f"{name} is a dict: a conversation is a list of messages, [{{'role': ..., 'content': ...}}]"
        )
    if isinstance(row, list | tuple) and len(row) and isinstance(row[0], dict):
        if tokenizer is None or not tokenizer.chat_template:
            check.fail(where, f"{name} is a list of messages, which needs a tokenizer with a chat template")
        row = _encoded(where, name, _conversation, tokenizer, row)
    elif isinstance(row, str):
        if tokenizer is None:
            check.fail_type(where, f"{name} is a string, which needs a tokenizer; pass token ids")
        row = _encoded(where, name, _bare if "responses" in name else _query, tokenizer, row)
    if isinstance(row, Tensor):
        row = row.detach().cpu().numpy()
    array = np.asarray(row)
    if array.ndim != 1:
        check.fail(where, f"{name} must have one dimension, got shape {array.shape}; pass one row for each episode")
    if array.size and array.dtype.kind not in "iu":
        check.fail_type(where, f"{name} must hold token ids (int64), got {array.dtype}")
    return array.astype(np.int64)


def _encoded(where: str, name: str, encode: Any, tokenizer: Any, given: Any) -> list[int]:
    try:
        found: list[int] = encode(tokenizer, given)
    except Exception as error:  # whatever a tokenizer or a template raises, half a surrogate pair for one
        why = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"prefkern.{where}: {name} cannot be encoded by the tokenizer ({why})") from error
    return found


def _conversation(tokenizer: Any, messages: Any) -> Any:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _bare(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _query(tokenizer: Any, text: str) -> list[int]:
    bare, ids = _bare(tokenizer, text), list(tokenizer(text)["input_ids"])
    begun = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), 0)
    if begun and bare[:begun] == ids[:begun]:  # a text that is already rendered begins by itself
        ids = bare
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def padding(tokenizer: Any) -> int:
    """The id that fills rows; it is masked out, so that any will do."""
    if tokenizer is None:
        return 0
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    used = tokenizer.eos_token_id or 0
    warnings.warn(
        f"prefkern.PPOTrainer: the tokenizer has no pad token: rows are filled with id {used} "
        f"({tokenizer.convert_ids_to_tokens(used)!r}), which is masked out",
        stacklevel=4,
    )
    return int(used)


def stop_tokens(args: PPOConfig, tokenizer: Any, model: Any, vocabulary: int) -> tuple[int, ...]:
    """The ids at any of which a response ends: those of the options, else the tokenizer's end and those that the model
    itself was made to end with (``generation_config``: chat models have several)."""
    if args.stop_token_id is not None:
        return ids_in("PPOConfig", "stop_token_id", args.stop_token_id, vocabulary)
    if tokenizer is None and args.stop_token is None:
        return ()
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_tokenizer = None if tokenizer is None else tokenizer.eos_token_id
    found = [each for given in (of_tokenizer, of_model) for each in _several(given)]
    if not found and args.stop_token is not None:
        check.fail("PPOTrainer", "stop_token='eos' needs a tokenizer or a model with an end token: give stop_token_id")
    return tuple(dict.fromkeys(found))


def ids_in(where: str, name: str, given: Any, vocabulary: int) -> tuple[int, ...]:
    """One id or several of the vocabulary, as a tuple; empty for None."""
    found = _several(given)
    for each in found:
        if type(each) is not int or not 0 <= each < vocabulary:
            check.fail(where, f"{name} must hold ids in [0, {vocabulary}), the model's vocabulary, got {each!r}")
    return tuple(found)


def _several(given: Any) -> list[int]:
    if given is None:
        return []
    found: list[int] = np.atleast_1d(np.asarray(given.tolist() if isinstance(given, Tensor) else given)).tolist()
    return found

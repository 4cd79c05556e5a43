"""The compiled module. Arrays are contiguous and aligned; the wrappers in `prefkern.data` see to it."""

from collections.abc import Sequence
from typing import Any, Literal

from numpy import float32, float64, int32, int64, uint8
from numpy.typing import NDArray

__all__ = [
    "balance_lengths",
    "discounted_returns",
    "fill_sequences",
    "flatten",
    "flatten_tokens",
    "gae",
    "group_advantages",
    "kept_lengths",
    "masked_moments",
    "pack",
    "place_rows",
    "sequence_lengths",
    "standardise",
    "token_batches",
    "token_rewards",
]

def gae(
    rewards: NDArray[float32] | NDArray[float64],
    values: NDArray[float32] | NDArray[float64],
    advantages: NDArray[float32] | NDArray[float64],
    returns: NDArray[float32] | NDArray[float64],
    *,
    gamma: float,
    lam: float,
    masked: Literal["skip", "zero", "none"],
    exact: bool = False,
    moments: bool = False,
    terminated: NDArray[uint8] | None = None,
    mask: NDArray[uint8] | None = None,
    bootstrap: NDArray[float32] | NDArray[float64] | None = None,
    cu_seqlens: NDArray[int64] | None = None,
    threads: int = 1,
) -> tuple[int, float, float] | None: ...
def discounted_returns(
    rewards: NDArray[float32] | NDArray[float64],
    returns: NDArray[float32] | NDArray[float64],
    *,
    gamma: float,
    masked: Literal["skip", "zero", "none"],
    terminated: NDArray[uint8] | None = None,
    mask: NDArray[uint8] | None = None,
    bootstrap: NDArray[float32] | NDArray[float64] | None = None,
    cu_seqlens: NDArray[int64] | None = None,
    threads: int = 1,
) -> None: ...
def masked_moments(
    place: str,
    x: NDArray[float32] | NDArray[float64],
    *,
    mask: NDArray[uint8] | None = None,
    threads: int = 1,
) -> tuple[int, float, float]: ...
def standardise(
    place: str,
    x: NDArray[float32] | NDArray[float64],
    out: NDArray[float32] | NDArray[float64],
    *,
    center: float,
    scale: float,
    shift: float,
    mask: NDArray[uint8] | None = None,
    threads: int = 1,
) -> None: ...
def group_advantages(
    rewards: NDArray[float32] | NDArray[float64],
    advantages: NDArray[float32] | NDArray[float64],
    *,
    method: Literal["per_group", "per_batch", "centered", "leave_one_out", "whitened"],
    ids: NDArray[int64] | None = None,
    size: int = 1,
) -> None: ...
def token_rewards(
    logps: NDArray[float32] | NDArray[float64],
    ref_logps: NDArray[float32] | NDArray[float64],
    scores: NDArray[float32] | NDArray[float64],
    rewards: NDArray[float32] | NDArray[float64],
    *,
    kl_coef: float,
    kl_estimator: Literal["k1", "k2", "k3"],
    after_last: bool,
    mask: NDArray[uint8] | None = None,
    cu_seqlens: NDArray[int64] | None = None,
    threads: int = 1,
) -> None: ...
def flatten_tokens(
    name: str,
    ids: NDArray[int32] | NDArray[int64],
    mask: NDArray[uint8] | NDArray[int64] | None,
    bounds: NDArray[int64],
    flat_ids: NDArray[int64],
    positions: NDArray[int64],
    indices: NDArray[int64],
    *,
    threads: int = 1,
) -> int: ...
def kept_lengths(mask: NDArray[uint8] | NDArray[int64], counts: NDArray[int64]) -> None: ...
def balance_lengths(lengths: NDArray[int64], parts: int, equal: bool, part_of: NDArray[int64]) -> None: ...
def token_batches(
    lengths: NDArray[int64],
    order: NDArray[int64],
    offsets: NDArray[int64],
    *,
    budget: int,
    padded: bool,
    ranks: int,
    seed: int,
    epoch: int,
) -> int: ...
def pack(lengths: NDArray[int64], capacity: int, order: NDArray[int64], offsets: NDArray[int64]) -> tuple[int, int]: ...
def sequence_lengths(
    place: str,
    names: Sequence[str],
    offsets: Sequence[NDArray[int64]],
    lengths: NDArray[int64],
    *,
    max_length: int | None,
    keep_end: bool,
    interleaved: bool,
    shifted: bool,
) -> None: ...
def fill_sequences(
    place: str,
    names: Sequence[str],
    ids: Sequence[NDArray[int32] | NDArray[int64]],
    offsets: Sequence[NDArray[int64]],
    input_ids: NDArray[int64],
    completion_mask: NDArray[int64],
    attention_mask: NDArray[int64] | None,
    position_ids: NDArray[int64] | None,
    *,
    pad_token_id: int,
    max_length: int | None,
    keep_end: bool,
    interleaved: bool,
    shifted: bool,
    cu_seqlens: NDArray[int64] | None = None,
    pivot: int | None = None,
    threads: int = 1,
) -> None: ...
def place_rows(
    place: str,
    values: NDArray[int64] | NDArray[float32] | NDArray[float64],
    offsets: NDArray[int64],
    starts: NDArray[int64],
    out: NDArray[int64] | NDArray[float32] | NDArray[float64],
    *,
    blank: int,
    threads: int = 1,
) -> None: ...
def flatten(
    place: str,
    name: str,
    rows: list[Any] | tuple[Any, ...],
    values: NDArray[int64] | NDArray[float64],
    integers: bool,
    nested: bool,
) -> None: ...

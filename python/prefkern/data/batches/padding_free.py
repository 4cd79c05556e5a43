"""Padding-free batches: the tokens of all rows behind each other, and back."""

from typing import Any

import numpy as np
import torch

from prefkern import check
from prefkern.data.arrays.columns import ids
from prefkern.data.arrays.ragged import is_column
from prefkern.data.arrays.views import Array, core, describe, flags, is_arrow, packed, threads, view
from prefkern.data.batches.sequences import fresh
from prefkern.data.types import Flat

WHERE = "data.flatten"


def flatten(input_ids: Any, mask: Any = None) -> Flat:
    """The tokens of all rows behind each other, with what a padding-free model needs to keep the rows apart.

    ``input_ids``: integers ``[B, T]`` (a numpy array or a torch CPU tensor) with ``mask [B, T]``, bool or 0/1,
    1 at tokens and 0 at padding, wherever it is; or, without ``mask``, rows of any lengths: a list of lists, arrays or
    tensors, or an Arrow list array (whole, sliced or chunked).

    ``Flat``: int64 ``input_ids [N]``; int64 ``position_ids [N]``, which start at 0 in each row; the int32 boundaries
    ``cu_seqlens [B + 1]``, row b being ``[cu_seqlens[b], cu_seqlens[b + 1])``, empty rows included; the int
    ``max_seqlen``; int64 ``indices [N]``, the place of each token in the padded batch read row by row (of rows: padded
    on the right to the longest); and ``shape``, that batch's (B, T). A padded tensor ``x [B, T, ...]`` is packed by
    ``x.flatten(0, 1)[flat.indices]`` and a packed one padded again by `unflatten`. ``flat.model_inputs()`` has the
    keyword arguments of a transformers model, those of ``DataCollatorWithFlattening`` without labels. Losses take
    ``cu_seqlens``, `prefkern.shift_labels` too::

        >>> flat = flatten([[5, 6, 7], [8, 9]])
        >>> flat.input_ids.tolist(), flat.position_ids.tolist(), flat.cu_seqlens.tolist(), flat.indices.tolist()
        ([5, 6, 7, 8, 9], [0, 1, 2, 0, 1], [0, 3, 5], [0, 1, 2, 3, 4])
        >>> unflatten(flat.input_ids, flat, fill=-1).tolist()
        [[5, 6, 7], [8, 9, -1]]

    Raises ValueError or TypeError, naming row and position, for negative ids, masks that are not 0 and 1 or of another
    shape, null rows, and ids that are no integers; for tensors on an accelerator.
    """
    if mask is None and not is_column(input_ids):
        check.fail(WHERE, f"mask must be given with padded input_ids, got {describe(input_ids)} without mask")
    if mask is None:
        rows = ids(WHERE, "input_ids", input_ids)
        return _flat(rows.values, None, rows.offsets)
    if is_arrow(input_ids):
        check.fail(WHERE, "mask is for padded input_ids; the rows of an Arrow list array have lengths of their own")
    tokens = _padded("input_ids", torch.as_tensor(input_ids) if is_column(input_ids) else input_ids)
    if tokens.dtype.kind not in "iu" or not np.can_cast(tokens.dtype, np.int64):
        check.fail_type(WHERE, f"input_ids must hold integers that fit int64, got {describe(tokens)}")
    kept = _padded("mask", torch.as_tensor(mask) if is_column(mask) else mask)
    if kept.dtype.kind == "f":
        kept = flags(WHERE, "mask", kept)
    elif kept.dtype.kind not in "biu":
        check.fail_type(WHERE, f"mask must be bool or numbers 0 and 1, got {describe(kept)}")
    if kept.shape != tokens.shape:
        check.fail(WHERE, f"input_ids and mask must have the same shape, got {tokens.shape} and {kept.shape}")
    kept = packed(kept.view(np.uint8) if kept.dtype == np.bool_ else kept.astype(np.int64, copy=False))
    bounds = np.zeros(len(kept) + 1, dtype=np.int64)
    core().kept_lengths(kept, bounds[1:])
    np.cumsum(bounds, out=bounds)
    return _flat(packed(tokens.astype(np.int64, copy=False)), kept, bounds)


def unflatten(x: Any, flat: Flat, *, fill: float = 0) -> Any:
    """Packed ``x [N, ...]`` as the padded batch ``[B, T, ...]`` that `flatten` read, ``fill`` at the padding.

    ``x``: a torch tensor of any dtype on any device, through which gradients flow, or a numpy array; the result is of
    the same kind.
    """
    if isinstance(x, np.ndarray):
        return unflatten(torch.from_numpy(packed(x)), flat, fill=fill).numpy()
    where = "data.unflatten"
    check.tensor(where, "x", x)
    if x.ndim == 0 or len(x) != len(flat.indices):
        check.fail(where, f"x must have one row for each of the {len(flat.indices)} tokens, got {describe(x)}")
    rows, width = flat.shape
    padded = x.new_full((rows * width, *x.shape[1:]), fill)
    return padded.index_copy(0, flat.indices.to(x.device), x).unflatten(0, (rows, width))


def _padded(name: str, value: Any) -> Array:
    array = view(WHERE, name, value)
    if array.ndim != 2:
        check.fail(WHERE, f"{name} must be [B, T], got {describe(array)}")
    return array


def _flat(tokens: Array, mask: Array | None, bounds: Array) -> Flat:
    total = int(bounds[-1])
    if total >= 2**31:
        check.fail(WHERE, f"a batch must hold less than 2^31 tokens, whose boundaries are int32, got {total}")
    outputs = fresh(3, (total,))
    longest = core().flatten_tokens("input_ids", tokens, mask, bounds, *outputs, threads=threads())
    input_ids, position_ids, indices = (torch.from_numpy(output) for output in outputs)
    cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    width = longest if mask is None else tokens.shape[1]
    return Flat(input_ids, position_ids, cu_seqlens, longest, indices, (len(bounds) - 1, width))

"""Positions of padded and of packed rows."""

from typing import Any

import torch
from torch import Tensor

from prefkern import check as checks


def count_positions(attention_mask: Tensor) -> Tensor:
    """``[B, T]``: each token's number among the tokens of its row, from 0; 0 at padding before them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def pack(where: str, rows: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
    """What transformers calls the offsets of packed sequences, and their positions ``[1, N]``."""
    N = rows.numel()
    if rows.shape[0] != 1:
        checks.fail(where, f"input_ids must be packed, [N] or [1, N], with cu_seqlens, got {checks.describe(rows)}")
    checks.offsets(where, cu_seqlens, N)
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=N)
    offsets, longest = cu_seqlens.to(torch.int32), int(lengths.max()) if len(lengths) else 0
    return {
        "position_ids": (torch.arange(N, device=rows.device) - starts)[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }

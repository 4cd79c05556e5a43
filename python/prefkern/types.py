"""What the public functions return, and the literals they accept. Results are read by name, never by position."""

from typing import Literal, NamedTuple

from torch import Tensor

Output = Literal["logps", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1"]
Reduction = Literal["mean", "sum", "none"]
Direction = Literal["forward", "reverse"]
DivergenceOutput = Literal["divergence", "entropy"]
Temperature = float | Tensor
"""One temperature, or one per row."""
LoRA = tuple[Tensor, Tensor, float]
"""A low-rank adapter of a weight ``[V, H]``: ``(A [r, H], B [V, r], scale)``, which stands for ``W + scale B A``."""
Coupling = Literal["token", "sequence", "pair", "batch"]
"""What the gradient of one token depends on: itself, its sequence, its pair of sequences, or the whole batch."""


class TokenStats(NamedTuple):
    """Per-token results of the waist, float32 (float64 for float64 input), shaped like ``targets``; 0 where not scored.

    A field that was not asked for in ``outputs`` is None. ``logps`` carries a gradient; ``entropy`` does only with
    ``entropy_grad=True``; the others never do.
    """

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


class LossOutput(NamedTuple):
    """A loss (scalar, or unreduced with ``reduction="none"``) and its detached metrics, under TRL's names."""

    loss: Tensor
    metrics: dict[str, Tensor]


class PairLogps(NamedTuple):
    """Sequence log-probabilities of preference pairs, each ``[B]``, with the scored length of each sequence."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


class TokenDivergence(NamedTuple):
    """Per-token divergence of two heads and the entropy of the policy, float32 (float64 for float64 input), shaped like
    the rows; 0 where not scored. Only ``divergence`` carries a gradient."""

    divergence: Tensor
    entropy: Tensor | None = None

"""What proves a kernel or a loss: seeded inputs, float64 oracles and their plain eager twins, derived tolerances, guard
bands and poisoned allocations. Plain torch; used by the tests and by the benchmark."""

from prefkern.testing.divergences import (
    DivergenceCase,
    divergence_case,
    divergence_from_hidden,
    divergence_from_logits,
    divergence_grads,
    unscaled_divergence,
)
from prefkern.testing.guards import Guards, guarded, poison_empty, poisoned
from prefkern.testing.inputs import IGNORE, HeadCase, LogitCase, head_case, logit_case
from prefkern.testing.oracles import (
    HeadGrads,
    grads_from_hidden,
    grads_from_logits,
    stats_from_hidden,
    stats_from_logits,
    unscaled_from_logits,
)
from prefkern.testing.tolerance import assert_not_worse

__all__ = [
    "IGNORE",
    "DivergenceCase",
    "Guards",
    "HeadCase",
    "HeadGrads",
    "LogitCase",
    "assert_not_worse",
    "divergence_case",
    "divergence_from_hidden",
    "divergence_from_logits",
    "divergence_grads",
    "grads_from_hidden",
    "grads_from_logits",
    "guarded",
    "head_case",
    "logit_case",
    "poison_empty",
    "poisoned",
    "stats_from_hidden",
    "stats_from_logits",
    "unscaled_divergence",
    "unscaled_from_logits",
]

"""The mathematics on log-probabilities: pure functions of tensors, each with a declared coupling, without input checks.

Importing the package declares every objective (``declare.OBJECTIVES``).
"""

from prefkern.losses import policy, preference
from prefkern.losses.objective import OBJECTIVES, Objective, objective
from prefkern.objectives import cpo, distillation, kto, likelihood, orpo

__all__ = [
    "OBJECTIVES",
    "Objective",
    "cpo",
    "distillation",
    "kto",
    "likelihood",
    "objective",
    "orpo",
    "policy",
    "preference",
]

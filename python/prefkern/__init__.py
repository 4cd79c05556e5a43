"""prefkern: losses for preference and policy optimisation of language models.

Token log-probabilities from hidden states in the fewest matrix products, exact to float32, and every loss as ordinary
autograd on them. Importing this package loads torch only: Triton, the compiled core and the trainers load at first use.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from prefkern._check import MissingDependency
from prefkern.logprobs import linear_token_logprobs, token_logprobs

if TYPE_CHECKING:
    from prefkern import data, integrations

__version__ = version("prefkern")

__all__ = [
    "MissingDependency",
    "data",
    "integrations",
    "linear_token_logprobs",
    "token_logprobs",
]


def __getattr__(name: str) -> object:
    if name in ("data", "integrations"):
        return importlib.import_module(f"prefkern.{name}")
    raise AttributeError(f"module 'prefkern' has no attribute {name!r}")

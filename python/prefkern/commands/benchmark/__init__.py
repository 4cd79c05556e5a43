"""The side-by-side benchmark: naive eager, TRL, Liger and prefkern on the same tensors.

First the correctness gate: every contender's log-probabilities and gradients against float64 of the same operands;
nothing is timed unless prefkern passes the derived tolerance. Then memory, then interleaved timed runs, with the bare
matrix products of the same shapes as one more contender: the floor.
"""

from prefkern.commands.benchmark.head.command import main

__all__ = ["main"]

"""The likelihood of the targets: one value per token."""

from torch import Tensor

from prefkern.losses.objective import objective
from prefkern.losses.reduce import scored


@objective("token")
def negative_log_likelihood(logps: Tensor, mask: Tensor | None, token_weights: Tensor | None) -> Tensor:
    """``-w lp`` per token, 0 where not scored; no gradient reaches the weights."""
    losses = -scored(logps, mask)
    return losses if token_weights is None else losses * scored(token_weights, mask).detach()

"""Advantages of completions relative to the other completions of their prompt."""

from typing import Any, Literal

import numpy as np

from prefkern import check
from prefkern.data.arrays.ragged import like_array
from prefkern.data.arrays.views import core, floats, indices, vector, whole

WHERE = "data.group_advantages"
METHODS = {"dr_grpo": "centered", "rloo": "leave_one_out", "reinforce++": "whitened"}
SCALES = {"group": "per_group", "batch": "per_batch", "none": "centered"}


def group_advantages(
    rewards: Any,
    groups: Any,
    *,
    method: Literal["grpo", "dr_grpo", "rloo", "reinforce++"] = "grpo",
    scale: Literal["group", "batch", "none"] = "group",
) -> Any:
    r"""One advantage for each completion, from its reward R and those of its group.

    - ``"grpo"``: ``(R - mean) / (std + 1e-4)``, ``mean`` that of the group, ``std`` that of the group, or with
      ``scale="batch"`` that of all rewards, or with ``scale="none"`` no division. `DeepSeekMath
      <https://arxiv.org/abs/2402.03300>`_.
    - ``"dr_grpo"``: ``R - mean``. `Understanding R1-Zero-Like Training <https://arxiv.org/abs/2503.20783>`_.
    - ``"rloo"``: ``R - mean of the others``. `Back to Basics <https://arxiv.org/abs/2402.14740>`_.
    - ``"reinforce++"``: the baseline form, ``A = R - mean`` and then ``A / sqrt(var A + 1e-8)`` over the batch; where
      the batch is to be whitened over tokens instead of completions, take ``"dr_grpo"``, spread it over the tokens and
      `whiten`. `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_.

    ``rewards [B]``: float32 or float64, a numpy array, a torch CPU tensor or a list; the result is of the same kind.
    ``groups``: integer ids ``[B]`` of any values in any order, or one integer, the size of consecutive groups.
    Standard deviations are unbiased (n - 1). Sums run in float64; equal rewards give exactly 0.

    A NaN reward is that of a completion that could not be scored: it counts in no mean and its advantage is 0. So is
    that of a completion alone in its group::

        >>> group_advantages([1.0, 3.0, 5.0, float("nan"), 7.0], [8, 8, 8, 8, -1], method="rloo")
        [-3.0, 0.0, 3.0, 0.0, 0.0]

    Raises ValueError or TypeError for infinite rewards, ids that are no integers, numbers of ids and rewards that
    differ, a size that does not divide their number, a ``scale`` for a method other than ``"grpo"``.
    """
    check.one_of(WHERE, "method", method, ("grpo", *METHODS))
    check.one_of(WHERE, "scale", scale, tuple(SCALES))
    if method != "grpo" and scale != "group":
        check.fail(WHERE, f"scale is for method='grpo', got scale={scale!r} with method={method!r}, which has its own")
    values = floats(WHERE, "rewards", vector(WHERE, "rewards", rewards, integers=False))
    size, ids = 1, None
    if isinstance(groups, int | np.integer):
        size = whole(WHERE, "groups", groups, low=1)
    else:
        ids = indices(WHERE, "groups", groups)
    advantages = np.empty(values.shape, values.dtype)
    rule = SCALES[scale] if method == "grpo" else METHODS[method]
    core().group_advantages(values, advantages, method=rule, ids=ids, size=size)
    return like_array(advantages, rewards)

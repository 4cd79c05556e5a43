"""Every plan of the head for given shapes, as lines of a table: those of `prefkern.plan`, and what the cross-entropy in
one pass (`prefkern.stream`) and the divergence of two heads (`prefkern.head_divergence`) take.

Their bytes are counted from those modules' allocations as `plan.choose` counts its own, and held to them by a test.
"""

from typing import NamedTuple

from prefkern import plan, stream
from prefkern.plan import Head, Plan

BLOCKS = 6
"""Temporaries of a divergence's passes on a CPU: the log-probabilities and probabilities of both heads, and two of the
block before them, which the next replaces."""


class Line(NamedTuple):
    """One plan: what is wanted, and what it takes."""

    wanted: str
    plan: Plan
    seconds: float
    """Of the products at the given FLOP/s and of the tile's passes at the given bandwidth: a floor, not a forecast."""


def lines(base: Head, max_memory: int | None, flops: float, bandwidth: float) -> list[Line]:
    """Every plan for a trainable head's shapes ``base``; the reference of the divergence has the same."""
    scoring, frozen = base._replace(grad_hidden=False, grad_weight=False), base._replace(grad_weight=False)
    plans = {
        "scoring, no gradient": (scoring, plan.choose(scoring, max_memory)),
        "frozen head": (frozen, plan.choose(frozen, max_memory)),
        "frozen head, gradient of the entropy": _with_entropy(frozen, max_memory),
        "trainable head": (base, plan.choose(base, max_memory)),
        "trainable head, gradient of the entropy": _with_entropy(base, max_memory),
        "trainable head, max_memory=0": (base, plan.choose(base, 0)),
    }
    found = []
    for wanted, (head, chosen) in plans.items():
        found.append(_line(wanted, head, chosen, _tile_passes(head, chosen), flops, bandwidth))
    once = cross_entropy(base, max_memory)
    found.append(_line("cross-entropy in one pass", base, once, 3 * base.wide + base.compute_bytes, flops, bandwidth))
    pair = divergence(base, max_memory)
    recomputed = 1 - pair.kept_rows / max(base.N, 1)
    passes = 2 * _tile_passes(base, pair) - base.compute_bytes * (1 + recomputed)  # two tiles of logits, one of u
    found.append(_line("divergence of two heads", base, pair, passes, flops, bandwidth))
    return found


def _with_entropy(head: Head, max_memory: int | None) -> tuple[Head, Plan]:
    head = head._replace(entropy_grad=True)
    return head, plan.choose(head, max_memory)


def _line(wanted: str, head: Head, chosen: Plan, passes: float, flops: float, bandwidth: float) -> Line:
    products = chosen.products * 2 * head.N * head.H * head.V
    return Line(wanted, chosen, products / flops + head.N * head.V * passes / bandwidth)


def _tile_passes(head: Head, chosen: Plan) -> float:
    """Bytes per entry of the tile: logits written and read for the statistics; where gradients are wanted read again
    and ``u`` written; of a row that is not kept the logits written and read once more; a pass more for the entropy."""
    wide, narrow = head.wide, head.compute_bytes
    recomputed = 1 - chosen.kept_rows / max(head.N, 1)
    wants = head.grad_hidden or head.grad_weight
    kept = (wide + narrow) * (1 + head.entropy_grad)
    return 2 * wide + (kept * (1 - recomputed) + (2 * wide + narrow) * recomputed) * wants


def cross_entropy(head: Head, max_memory: int | None = None) -> Plan:
    """``linear_cross_entropy`` of a mean or a sum, with its metrics: gradients in the forward, a panel at a time."""
    N, H, V, wide = head.N, head.H, head.V, head.wide
    in_place = not head.accelerator
    narrow = wide if in_place else head.compute_bytes  # of u
    tiling = stream.tiling(H, V, wide, 0 if in_place else narrow, max_memory)
    rows = stream.even(N, tiling.panel)
    chunk = min(tiling.chunk, rows)
    tile = chunk * plan.row_elements(V, wide, head.accelerator) * wide
    if not in_place:
        tile += rows * head.row * narrow
    gradients = head.gradient_bytes
    several = rows < N
    total = V * H * wide * (head.grad_weight and several and head.weight_bytes != wide)
    operand = chunk * H * (head.compute_bytes * (head.hidden_bytes != head.compute_bytes))
    operand += chunk * H * wide * (in_place and head.compute_bytes != wide)
    logits = plan.casts(head, V, logits=True) + operand
    fold = 0 if head.accelerator else 2 * plan.block_elements(chunk, V) * wide  # p, and the entropy's terms
    hidden = plan.casts(head._replace(compute_bytes=narrow), V, logits=False) if narrow != head.weight_bytes else 0
    hidden += rows * H * wide * (head.hidden_bytes != wide)
    weight = rows * H * (narrow + head.compute_bytes * (head.hidden_bytes != head.compute_bytes))
    if head.weight_bytes != narrow and not several and not (head.accelerator and head.weight_bytes == wide):
        weight += min(plan.cast_columns(H, V, wide, head.accelerator), V) * H * wide
    made = max(logits, fold, hidden * head.grad_hidden, weight * head.grad_weight)
    forward = gradients + total + tile + made + 8 * wide * N
    products = 1.0 + head.grad_hidden + head.grad_weight
    return Plan(f"stream({rows})", 0, products, 0, forward, 0, gradients)


def divergence(head: Head, max_memory: int | None = None) -> Plan:
    """``linear_kl_divergence`` with a reference of the same shapes and dtypes, in the forward direction."""
    N, H, V, wide, narrow = head.N, head.H, head.V, head.wide, head.compute_bytes
    wants = head.grad_hidden or head.grad_weight
    K = min(N, plan.limits(H, V, narrow, plan.budget(H, V, max_memory)).held) if wants else 0
    held = K * V * narrow
    step = min(N, plan.chunk_rows(V, 2 * wide))
    tiles = step * V * wide * (1 + (K < N or not head.direct))
    cast = N * H * narrow * (head.hidden_bytes != narrow)
    upcast = H * wide * (not head.accelerator and narrow != wide)
    logits = plan.casts(head, V, logits=True) + step * upcast
    fold = 0 if head.accelerator else BLOCKS * plan.block_elements(step, V) * wide
    forward = held + tiles + 2 * cast + max(logits, fold) + 7 * wide * N
    backward = 0
    if wants:
        rest = N - K
        columns, slices, recomputing = V, 0, 0
        if rest:
            element = narrow + (1 if head.direct else 2) * wide
            columns = plan.slice_columns(N, V, element)
            slices = columns * (N * narrow + rest * wide * (element - narrow) // wide)
            slices += 2 * rest * H * narrow * (head.hidden_bytes != narrow)
            recomputing = plan.casts(head, columns, logits=True) + rest * upcast
            if not head.accelerator:
                recomputing = max(recomputing, BLOCKS * plan.block_elements(rest, columns) * wide)
        rows = N * H * (narrow * head.grad_weight + wide * (head.grad_hidden and head.hidden_bytes != wide))
        made = max(plan.casts(head, columns, logits=False), recomputing, plan.products_beside(head, N, columns))
        backward = held + rows + slices + made + 9 * wide * N
    products = 2.0 + head.grad_hidden + head.grad_weight + 2 * (N - K) / max(N, 1) * wants
    return Plan(f"hold({K})", K, products, held, forward, backward, head.gradient_bytes * wants)

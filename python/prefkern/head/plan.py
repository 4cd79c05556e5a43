"""How much is kept from the forward to the backward pass, in which blocks the head is computed, and what that takes.

Decided from shapes, dtypes and ``max_memory`` alone, never from free memory, so that runs repeat. The products of
``2 N H V`` floating-point operations each:

| plan      | when                                                       | trainable head  | frozen head     |
|-----------|------------------------------------------------------------|-----------------|-----------------|
| score     | nothing needs a gradient                                   | 1               | 1               |
| frozen(F) | only the hidden states do: F rows of ``W[y] - E_p[W]`` kept |                 | 2 + (N - F) / N |
| hold(K)   | K rows of unscaled gradient kept, N - K recomputed         | 3 + (N - K) / N | 2 + (N - K) / N |

A gradient of the entropy costs the frozen plan one more product and keeps a second row; it costs hold none, but with a
softcap it is recomputed as with K = 0.

The bytes are counted from the allocations of the engine (`prefkern.head.costs`; here those of the cross-entropy in one
pass and of the divergence of two heads), and held to them by a test: the peak beyond inputs and returned gradients,
within 5 %.
"""

from typing import NamedTuple

from prefkern.head import costs
from prefkern.head.costs import Call, Plan
from prefkern.head.engine import blocks, memory, one_pass
from prefkern.kernels.reference.rows import block_elements

BLOCKS = 6
"""Temporaries of a divergence's passes on a CPU: the log-probabilities and probabilities of both heads, and two of the
block before them, which the next replaces."""


class Line(NamedTuple):
    """One plan: what is wanted, and what it takes."""

    wanted: str
    plan: Plan
    seconds: float
    """Of the products at the given FLOP/s and of the tile's passes at the given bandwidth: a floor, not a forecast."""


def explain(
    tokens: int,
    hidden: int,
    vocab: int,
    *,
    itemsize: int = 2,
    weight_itemsize: int | None = None,
    max_memory: int | None = None,
    accelerator: bool = True,
    flops: float = 790e12,
    bandwidth: float = 4.3e12,
) -> list[Line]:
    """Every plan for so many scored tokens: products of ``2 N H V`` operations, bytes, and a floor of the time.

    Of ``linear_token_logprobs`` and the losses on it, of ``linear_cross_entropy``, and of ``linear_kl_divergence`` with
    a reference of the same shapes.

    Args:
        tokens, hidden, vocab: N, H and V.
        itemsize, weight_itemsize: bytes per element of the operands, and of the weight if it is another.
        max_memory: as in ``linear_token_logprobs``.
        accelerator: False for a CPU, which works in other blocks.
        flops, bandwidth: of the machine, per second; by default an H200's as measured.
    """
    weight = itemsize if weight_itemsize is None else weight_itemsize
    base = Call(tokens, hidden, vocab, itemsize, weight, itemsize, accelerator=accelerator)
    return lines(base, max_memory, flops, bandwidth)


def lines(base: Call, max_memory: int | None, flops: float, bandwidth: float) -> list[Line]:
    """Every plan for a trainable head's shapes ``base``; the reference of the divergence has the same."""
    scoring, frozen = base._replace(grad_hidden=False, grad_weight=False), base._replace(grad_weight=False)
    plans = {
        "scoring, no gradient": (scoring, costs.choose(scoring, max_memory)),
        "frozen head": (frozen, costs.choose(frozen, max_memory)),
        "frozen head, gradient of the entropy": _with_entropy(frozen, max_memory),
        "trainable head": (base, costs.choose(base, max_memory)),
        "trainable head, gradient of the entropy": _with_entropy(base, max_memory),
        "trainable head, max_memory=0": (base, costs.choose(base, 0)),
    }
    found = []
    for wanted, (call, chosen) in plans.items():
        found.append(_line(wanted, call, chosen, _tile_passes(call, chosen), flops, bandwidth))
    once = cross_entropy(base, max_memory)
    found.append(_line("cross-entropy in one pass", base, once, 3 * base.wide + base.compute_bytes, flops, bandwidth))
    pair = divergence(base, max_memory)
    recomputed = 1 - pair.kept_rows / max(base.N, 1)
    passes = 2 * _tile_passes(base, pair) - base.compute_bytes * (1 + recomputed)  # two tiles of logits, one of u
    found.append(_line("divergence of two heads", base, pair, passes, flops, bandwidth))
    return found


def _with_entropy(call: Call, max_memory: int | None) -> tuple[Call, Plan]:
    call = call._replace(entropy_grad=True)
    return call, costs.choose(call, max_memory)


def _line(wanted: str, call: Call, chosen: Plan, passes: float, flops: float, bandwidth: float) -> Line:
    products = chosen.products * 2 * call.N * call.H * call.V
    return Line(wanted, chosen, products / flops + call.N * call.V * passes / bandwidth)


def _tile_passes(call: Call, chosen: Plan) -> float:
    """Bytes per entry of the tile: logits written and read for the statistics; where gradients are wanted read again
    and ``u`` written; of a row that is not kept the logits written and read once more; a pass more for the entropy."""
    wide, narrow = call.wide, call.compute_bytes
    recomputed = 1 - chosen.kept_rows / max(call.N, 1)
    wants = call.grad_hidden or call.grad_weight
    kept = (wide + narrow) * (1 + call.entropy_grad)
    return 2 * wide + (kept * (1 - recomputed) + (2 * wide + narrow) * recomputed) * wants


def cross_entropy(call: Call, max_memory: int | None = None) -> Plan:
    """``linear_cross_entropy`` of a mean or a sum, with its metrics: gradients in the forward, a panel at a time."""
    N, H, V, wide = call.N, call.H, call.V, call.wide
    in_place = not call.accelerator
    narrow = wide if in_place else call.compute_bytes  # of u
    tiling = one_pass.tiling(H, V, wide, 0 if in_place else narrow, max_memory)
    rows = one_pass.even(N, tiling.panel)
    chunk = min(tiling.chunk, rows)
    tile = chunk * blocks.row_elements(V, wide, call.accelerator) * wide
    if not in_place:
        tile += rows * call.row * narrow
    gradients = call.gradient_bytes
    several = rows < N
    total = V * H * wide * (call.grad_weight and several and call.weight_bytes != wide)
    operand = chunk * H * (call.compute_bytes * (call.hidden_bytes != call.compute_bytes))
    operand += chunk * H * wide * (in_place and call.compute_bytes != wide)
    logits = costs.casts(call, V, logits=True) + operand
    fold = 0 if call.accelerator else 2 * block_elements(chunk, V) * wide  # p, and the entropy's terms
    hidden = costs.casts(call._replace(compute_bytes=narrow), V, logits=False) if narrow != call.weight_bytes else 0
    hidden += rows * H * wide * (call.hidden_bytes != wide)
    weight = rows * H * (narrow + call.compute_bytes * (call.hidden_bytes != call.compute_bytes))
    if call.weight_bytes != narrow and not several and not (call.accelerator and call.weight_bytes == wide):
        weight += min(blocks.cast_columns(H, V, wide, call.accelerator), V) * H * wide
    made = max(logits, fold, hidden * call.grad_hidden, weight * call.grad_weight)
    forward = gradients + total + tile + made + 8 * wide * N
    products = 1.0 + call.grad_hidden + call.grad_weight
    return Plan(f"stream({rows})", 0, products, 0, forward, 0, gradients)


def divergence(call: Call, max_memory: int | None = None) -> Plan:
    """``linear_kl_divergence`` with a reference of the same shapes and dtypes, in the forward direction."""
    N, H, V, wide, narrow = call.N, call.H, call.V, call.wide, call.compute_bytes
    wants = call.grad_hidden or call.grad_weight
    K = min(N, memory.limits(H, V, narrow, memory.budget(H, V, max_memory)).held) if wants else 0
    held = K * V * narrow
    step = min(N, blocks.chunk_rows(V, 2 * wide))
    tiles = step * V * wide * (1 + (K < N or not call.direct))
    cast = N * H * narrow * (call.hidden_bytes != narrow)
    upcast = H * wide * (not call.accelerator and narrow != wide)
    logits = costs.casts(call, V, logits=True) + step * upcast
    fold = 0 if call.accelerator else BLOCKS * block_elements(step, V) * wide
    forward = held + tiles + 2 * cast + max(logits, fold) + 7 * wide * N
    backward = 0
    if wants:
        rest = N - K
        columns, slices, recomputing = V, 0, 0
        if rest:
            element = narrow + (1 if call.direct else 2) * wide
            columns = blocks.slice_columns(N, V, element)
            slices = columns * (N * narrow + rest * wide * (element - narrow) // wide)
            slices += 2 * rest * H * narrow * (call.hidden_bytes != narrow)
            recomputing = costs.casts(call, columns, logits=True) + rest * upcast
            if not call.accelerator:
                recomputing = max(recomputing, BLOCKS * block_elements(rest, columns) * wide)
        rows = N * H * (narrow * call.grad_weight + wide * (call.grad_hidden and call.hidden_bytes != wide))
        made = max(costs.casts(call, columns, logits=False), recomputing, costs.product_scratch_bytes(call, N, columns))
        backward = held + rows + slices + made + 9 * wide * N
    products = 2.0 + call.grad_hidden + call.grad_weight + 2 * (N - K) / max(N, 1) * wants
    return Plan(f"hold({K})", K, products, held, forward, backward, call.gradient_bytes * wants)

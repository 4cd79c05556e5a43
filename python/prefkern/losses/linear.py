"""Any objective on hidden states: a function of the token statistics, on the engine of the waist."""

from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, HeadOptions
from prefkern.head.logprobs import token_stats
from prefkern.losses.reduce import masked_mean
from prefkern.options import read, takes
from prefkern.types import LossOutput, Output, TokenStats

WHERE = "linear_loss"


@takes(Head)
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    fn: Callable[[TokenStats], Tensor | tuple[Tensor, Mapping[str, Tensor]]],
    *,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
    **options: Unpack[HeadOptions],
) -> LossOutput:
    """Your own objective: ``fn(linear_token_logprobs(hidden, weight, targets, ...))``, in as few matrix products.

    The gradient of a log-probability with respect to the logits does not depend on the loss, so the head is done with
    the vocabulary before ``fn`` is called, and asks of it one number per token. SimPO, https://arxiv.org/abs/2405.14734,
    in a few lines:

    >>> import torch, prefkern as pk
    >>> hidden, weight = torch.ones(4, 3, 8, requires_grad=True), torch.eye(16, 8)
    >>> targets = torch.tensor([[0, 1, -100], [0, 1, 2], [9, 9, 9], [0, -100, -100]])  # two chosen, two rejected
    >>> def simpo(stats):
    ...     pairs = pk.pair_logps(stats.logps, targets=targets, average=True)
    ...     margins = pairs.chosen - pairs.rejected
    ...     loss = -torch.nn.functional.logsigmoid(2.0 * margins - 0.5).mean()
    ...     return loss, {"margins": margins.mean()}
    >>> loss, metrics = pk.linear_loss(hidden, weight, targets, simpo)
    >>> loss.backward()
    >>> round(loss.item(), 3), round(metrics["margins"].item(), 3)
    (0.588, 0.5)

    Args:
        hidden, weight, targets: ``[..., H]``, ``[V, H]``, ``[...]``, aligned (``shift_labels``).
        fn: a function of ``TokenStats``, whose fields are shaped like ``targets`` and 0 where not scored; it is
            differentiable in ``logps``, and in ``entropy`` with ``entropy_grad=True``; the others are constants, used
            as ``stats.entropy.detach()``. It returns the loss, a scalar tensor (or an unreduced one), or
            ``(loss, metrics)``.
        outputs, entropy_grad: which statistics ``fn`` reads, as in ``linear_token_logprobs``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the loss of ``fn``, with its graph, and its metrics, detached.

    Raises:
        TypeError: ``fn`` returns something that is not a floating tensor, or metrics that are not tensors by name.
        ValueError: ``fn`` returns a tensor without a graph where a gradient is wanted, or a loss that depends on a
            statistic without a gradient (not seen under ``torch.compile``).
        What ``linear_token_logprobs`` refuses, by name.
    """
    head = read(WHERE, options, Head)
    if not callable(fn):
        check.fail_type(WHERE, f"fn must be a function of TokenStats that returns the loss, got {check.describe(fn)}")
    stats = token_stats(WHERE, hidden, weight, targets, head, outputs, entropy_grad=entropy_grad)
    with_graph = torch.is_grad_enabled() and stats.logps.requires_grad
    if not with_graph or torch.compiler.is_compiling():
        return _loss_output(fn(stats), with_graph=with_graph)
    watched, leaves = _watch(stats)
    output = _loss_output(fn(watched), with_graph=True)
    _check_unread(output.loss, leaves)
    return output


def _watch(stats: TokenStats) -> tuple[TokenStats, dict[str, Tensor]]:
    """The statistics, those without a gradient as copies of leaves: the graph of a loss shows which it would need."""
    values = {name: value for name, value in stats._asdict().items() if value is not None}
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in values.items()
        if value.is_floating_point() and not value.requires_grad
    }
    return stats._replace(**{name: leaf.clone() for name, leaf in leaves.items()}), leaves


def _check_unread(loss: Tensor, leaves: Mapping[str, Tensor]) -> None:
    """No leaf is in the graph of the loss: its gradient would be left out, without a word."""
    nodes, seen = [loss.grad_fn] if leaves else [], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        for name, leaf in leaves.items():
            if variable is leaf:
                hint = " (stats.entropy has a gradient only with entropy_grad=True)" if name == "entropy" else ""
                check.fail(
                    WHERE,
                    f"the loss of fn depends on stats.{name}, which has no gradient{hint}: write stats.{name}.detach() "
                    "where it is a constant",
                )
        nodes += [following for following, _ in node.next_functions]


def _loss_output(result: object, *, with_graph: bool) -> LossOutput:
    """What ``fn`` returned, held to its contract."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    keep = "return tensors as they are, without .item(), float() or .tolist()"
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        check.fail_type(
            WHERE, f"fn must return a floating tensor, or (tensor, metrics), got {check.describe(loss)}: {keep}"
        )
    if with_graph and not loss.requires_grad:
        check.fail(
            WHERE,
            f"fn must return a loss with a graph to stats.logps, got {check.describe(loss)} without one: use no "
            ".detach(), .item() or no_grad() inside fn (stats.entropy has a gradient only with entropy_grad=True)",
        )
    if not isinstance(metrics, Mapping):
        check.fail_type(WHERE, f"the metrics of fn must be a dict of tensors, got {check.describe(metrics)}")
    for name, value in metrics.items():
        if not isinstance(value, Tensor):
            check.fail_type(WHERE, f"metrics[{name!r}] of fn must be a tensor, got {check.describe(value)}: {keep}")
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def sequence_form(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: Head,
    loss: Callable[[TokenStats], LossOutput],
    *,
    chosen: Tensor,
    metrics: bool,
    scored: Tensor | None = None,
    outputs: tuple[Output, ...] = (),
) -> LossOutput:
    """Returns ``loss(stats)`` with the means over tokens that TRL shows: the entropy over ``scored`` (by default all
    scored targets), the logits of its chosen and its other tokens, and how often a chosen one was first. ``outputs``:
    what the loss reads beside the log-probabilities."""
    shown_outputs: tuple[Output, ...] = ("entropy", "mean_logit", "is_top1") if metrics else ()
    stats = token_stats(where, hidden, weight, targets, head, ("logps", *shown_outputs, *outputs))
    value, shown = loss(stats)
    if metrics:
        shown = shown | _token_metrics(stats, targets != head.ignore_index if scored is None else scored, chosen)
    return LossOutput(value, shown)


@torch.no_grad()
def _token_metrics(stats: TokenStats, mask: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    assert stats.entropy is not None
    assert stats.mean_logit is not None
    assert stats.is_top1 is not None
    return {
        "entropy": masked_mean(stats.entropy, mask),
        "logits/chosen": masked_mean(stats.mean_logit, mask & chosen),
        "logits/rejected": masked_mean(stats.mean_logit, mask & ~chosen),
        "mean_token_accuracy": masked_mean(stats.is_top1, mask & chosen),
    }


def token_form(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: Head,
    loss: Callable[[Tensor, Tensor | None], LossOutput],
    *,
    entropy: bool,
    entropy_grad: bool,
) -> LossOutput:
    """Returns ``loss(logps, entropy)``: the entropy where it is shown, with its gradient where it is part of the
    loss."""
    outputs: tuple[Output, ...] = ("logps", "entropy") if entropy or entropy_grad else ("logps",)
    stats = token_stats(where, hidden, weight, targets, head, outputs, entropy_grad=entropy_grad)
    return loss(stats.logps, stats.entropy)

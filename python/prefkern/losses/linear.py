"""Any objective on hidden states: a function of the token statistics, on the engine of the waist."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.logprobs import linear_token_logprobs
from prefkern.losses._head import Head
from prefkern.types import LoRA, LossOutput, Output, Temperature, TokenStats

WHERE = "linear_loss"


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    fn: Callable[[TokenStats], Tensor | tuple[Tensor, Mapping[str, Tensor]]],
    *,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
    vocab_mask: Tensor | None = None,
    lora: LoRA | None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
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
            differentiable in ``logps``, and in ``entropy`` with ``entropy_grad=True``. It returns the loss, a scalar
            tensor (or an unreduced one), or ``(loss, metrics)``.
        outputs, entropy_grad: which statistics ``fn`` reads, as in ``linear_token_logprobs``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the loss of ``fn``, with its graph, and its metrics, detached.

    Raises:
        TypeError: ``fn`` returns something that is not a floating tensor, or metrics that are not tensors by name.
        ValueError: ``fn`` returns a tensor without a graph where a gradient is wanted.
        What ``linear_token_logprobs`` refuses, by name.
    """
    if not callable(fn):
        check.fail_type(WHERE, f"fn must be a function of TokenStats that returns the loss, got {check.describe(fn)}")
    logits = bias, temperature, logit_scale, softcap, ignore_index
    head = Head(*logits, vocab_mask, lora, compute_dtype, max_memory, num_scored, group)
    stats = linear_token_logprobs(hidden, weight, targets, outputs=outputs, entropy_grad=entropy_grad, **head._asdict())
    return _loss_output(fn(stats), with_graph=torch.is_grad_enabled() and stats.logps.requires_grad)


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

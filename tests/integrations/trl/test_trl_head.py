"""The replacement itself against TRL's function: results, gradients, what it saves, and the memory it takes."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from trl.kernels import ChunkedLogProbFunction as Theirs

from prefkern.commands.demo.measure import peak_bytes
from prefkern.head import costs
from prefkern.head.engine import blocks
from prefkern.head.engine import memory as alive
from prefkern.head.engine.products import count_products
from prefkern.integrations.trl import memory
from prefkern.integrations.trl.patching import _head as ours

ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def inputs(N: int, H: int, V: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[Any, ...]:
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * 2 / H**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_() if bias else None, torch.randint(V, (N,))


def step(
    head: Any, case: tuple[Any, ...], *, autocast: torch.dtype | None = None, entropy: bool = False, **options: Any
) -> tuple[list[Any], list[Tensor]]:
    """All outputs and the gradients of a loss with one weight per token, of either sign."""
    hidden, weight, bias, targets = case
    values = {"temperature": 0.8, "softcap": None, "scale": 1.0, "outputs": ALL, **options}
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        results = head.apply(
            hidden, weight, bias, targets, values["temperature"], 32768, values["softcap"], values["scale"],
            values["outputs"],
        )  # fmt: skip
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    if not leaves or not torch.is_grad_enabled():
        return list(results), []
    factor = torch.linspace(-1, 1, len(targets))
    loss = (results[0] * factor).sum()
    if entropy:
        loss = loss + (results[1] * factor.cos()).sum()
    return list(results), list(torch.autograd.grad(loss, leaves))


def exact(case: tuple[Any, ...], **options: Any) -> tuple[list[Any], list[Tensor]]:
    hidden, weight, bias, targets = (
        None if value is None else value.detach().double().requires_grad_() if value.is_floating_point() else value
        for value in case
    )

    class Plain:
        @staticmethod
        def apply(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int,
            softcap: float | None, scale: float, outputs: tuple[str, ...],
        ) -> tuple[Tensor, ...]:  # fmt: skip
            logits = torch.nn.functional.linear(hidden, weight, bias) * scale
            logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
            logp = logits.log_softmax(-1)
            return (
                logp.gather(1, targets.unsqueeze(1)).squeeze(1),
                -(logp.exp() * logp).sum(-1),
                (2 * logp).logsumexp(-1),
                logits.mean(-1),
                logits.argmax(-1) == targets,
            )

    return step(Plain, (hidden, weight, bias, targets), **options)


def error(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [float((one.double() - other.double()).abs().max().detach()) for one, other in zip(got, want, strict=True)]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.5, "scale": 0.3}, {"scale": 4.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_accurate_than_trl(dtype: torch.dtype, options: dict[str, float], entropy: bool) -> None:
    case = inputs(33, 24, 131, dtype, bias=True)
    want, want_grads = exact(case, entropy=entropy, **options)
    got, got_grads = step(ours, case, entropy=entropy, **options)
    their, their_grads = step(Theirs, case, entropy=entropy, **options)
    assert [value.dtype for value in got] == [value.dtype for value in their]
    assert torch.equal(got[4], want[4])
    for one, other in zip(error(got[:4], want[:4]), error(their[:4], want[:4]), strict=True):
        assert one <= 2 * other + 1e-6
    for one, other, reference in zip(
        error(got_grads, want_grads), error(their_grads, want_grads), want_grads, strict=True
    ):
        assert one <= 2 * other + torch.finfo(dtype).eps * float(reference.abs().max())


def test_autocast_decides_the_dtype_and_keeps_float32_gradients() -> None:
    case = inputs(33, 24, 131)
    rounded = [value.detach().bfloat16() if value.is_floating_point() else value for value in (*case[:2], case[3])]
    want, _ = exact((rounded[0], rounded[1], None, rounded[2]))
    got, grads = step(ours, case, autocast=torch.bfloat16)
    assert max(error(got[:4], want[:4])) <= 1e-5  # products of the rounded operands, and nothing else rounded
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    same_as_float32, _ = step(ours, case, autocast=None)
    assert max(error(got[:1], same_as_float32[:1])) > 1e-4


def test_outputs_that_were_not_asked_for() -> None:
    case = inputs(5, 8, 11)
    results, _ = step(ours, case, outputs=("log_probs", "is_top1"))
    assert [value is None for value in results] == [False, True, True, True, False]


def test_no_rows() -> None:
    """An all-masked microbatch on one rank: gradients are zero tensors, so that the others do not wait."""
    results, grads = step(ours, inputs(0, 8, 11))
    assert [value.shape for value in results] == [(0,)] * 5
    assert [float(grad.abs().sum()) for grad in grads] == [0.0, 0.0]


def test_products() -> None:
    case = inputs(64, 16, 300)
    with count_products() as count:
        step(ours, case)
    assert count.products(64, 16, 300) == 3.0
    with count_products() as count, torch.no_grad():
        step(ours, case)
    assert count.products(64, 16, 300) == 1.0


def test_no_vocabulary_sized_tensor_reaches_saved_tensor_hooks() -> None:
    N, H, V = 12, 8, 500
    case = inputs(N, H, V)
    plain = step(ours, case)
    seen: list[int] = []

    def offload(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor.clone()

    with saved_tensors_hooks(offload, lambda tensor: tensor):
        hooked = step(ours, case)
    assert seen, "the loss after the head still goes through the hooks"
    assert max(seen) < N * V
    assert max(seen) < V * H
    for one, other in zip(plain[0] + plain[1], hooked[0] + hooked[1], strict=True):
        assert torch.equal(one, other)


def test_a_graph_without_a_backward_is_freed() -> None:
    case = inputs(40, 8, 300)
    before = alive.held_bytes(case[0].device)
    loss = ours.apply(*case, 1.0, 32768)[0].sum()
    assert alive.held_bytes(case[0].device) - before == 40 * 300 * 4
    del loss
    assert alive.held_bytes(case[0].device) == before


def test_an_in_place_change_between_forward_and_backward_is_found() -> None:
    hidden, weight, _, targets = inputs(4, 8, 11)
    loss = ours.apply(hidden, weight, None, targets, 1.0, 32768)[0].sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified in place"):
        loss.backward()


@pytest.mark.parametrize(("N", "H", "V"), [(64, 32, 1000), (100, 32, 49152), (700, 8, 8000), (40, 32, 100_000)])
@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
def test_peak_memory_in_float32(N: int, H: int, V: int, trained: str) -> None:
    case = inputs(N, H, V)
    case[0].requires_grad_(trained != "nothing")
    case[1].requires_grad_(trained == "all")
    peaks = [peak_bytes(lambda head=head: step(head, case, entropy=trained == "all")) for head in (ours, Theirs)]
    assert peaks[0] <= peaks[1]


@pytest.mark.parametrize(("N", "H", "V"), [(150, 64, 49152), (40, 288, 49152), (300, 144, 24576)])
@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_peak_memory_in_16_bits(autocast: torch.dtype | None, trained: str, N: int, H: int, V: int) -> None:
    """Also for few tokens: neither the weight's cast nor its upcast is made whole."""
    case = inputs(N, H, V, torch.float32 if autocast else torch.bfloat16)
    case[0].requires_grad_(trained != "nothing")
    case[1].requires_grad_(trained == "all")
    peaks = [peak_bytes(lambda head=head: step(head, case, autocast=autocast)) for head in (ours, Theirs)]
    assert peaks[0] <= peaks[1]


def test_the_count_of_our_own_buffers_holds() -> None:
    """The budget is right only if what is counted beside it is what is allocated."""
    case = inputs(100, 64, 49152)
    hidden, weight = case[:2]
    head = memory.head_of(hidden, weight, 100)
    held = min(memory.bounds_of(hidden, weight).held, hidden.shape[0] * weight.shape[0] * 4)
    assert held == 100 * 49152 * 4
    assert peak_bytes(lambda: step(ours, case)) <= (memory.own_peak(head) + held) * 1.02
    assert memory.trl_peak(head) <= peak_bytes(lambda: step(Theirs, case))


def test_where_nothing_is_left_nothing_is_held() -> None:
    """A vocabulary so large that the held rows alone would be more than TRL's peak."""
    case = inputs(40, 8, 400_000)
    assert memory.bounds_of(*case[:2]).held == 0
    with count_products() as count:
        step(ours, case)
    assert count.products(40, 8, 400_000) == 4.0


def test_the_budget_on_an_accelerator() -> None:
    """16-bit, all trainable, 8192 tokens: 6 V H + 6 N H and a tile of 268 MB, less what we need ourselves."""
    N, H, V = 8192, 4096, 128256
    head = costs.Call(N, H, V, 2, 2, 2, accelerator=True)
    assert memory.trl_peak(head) == 6 * V * H + 6 * N * H + 4096 * 32768 * 2
    held = memory.trl_peak(head) - memory.own_peak(head)
    assert abs(held - 4 * V * H) < 0.1 * 4 * V * H
    autocast = head._replace(hidden_bytes=4, weight_bytes=4)  # float32 weights: cast whole, but before any gradient
    assert memory.trl_peak(autocast) > memory.own_peak(autocast)
    frozen = head._replace(grad_weight=False)
    assert memory.trl_peak(frozen) == 6 * N * H + 4096 * 32768 * 2
    assert 0 < memory.trl_peak(frozen) - memory.own_peak(frozen) < 200e6


@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
@pytest.mark.parametrize("weight_bytes", [2, 4])
@pytest.mark.parametrize(("H", "V"), [(896, 151_936), (4096, 128_256), (2304, 256_000), (8192, 32_000)])
def test_never_above_the_peak_on_an_accelerator(H: int, V: int, weight_bytes: int, trained: str) -> None:
    """By arithmetic, for 16-bit products, float32 weights under autocast among them, and any number of tokens."""
    for N in (16, 64, 256, 512, 1024, 2048, 4096, 20_000):
        head = costs.Call(
            N, H, V, 2, weight_bytes, 2, trained != "nothing", trained == "all", accelerator=True
        )  # fmt: skip
        held, scratch = memory.bounds(head, head)
        ours = memory.own_peak(head._replace(scratch=scratch)) + held
        assert ours <= memory.trl_peak(head), (N, held, scratch)
        assert (scratch == blocks.SCRATCH_BYTES) == (memory.own_peak(head) <= memory.trl_peak(head))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_new_length_is_not_a_new_compilation() -> None:
    """As TRL calls it: the scored rows are selected before, their number changes with every batch."""
    torch._dynamo.reset()
    weight = torch.randn(50, 8, requires_grad=True)

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        mask = labels != -100
        logps = ours.apply(hidden[mask], weight, None, labels[mask], 1.0, 32768, None, 1.0, ("entropy",))[0]
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum()

    compiled = torch.compile(loss, backend="aot_eager")
    graphs = []
    for length in (7, 9, 12, 15, 11, 20, 21, 22, 30):
        hidden, labels = torch.randn(2, length, 8, requires_grad=True), torch.randint(50, (2, length))
        labels[0, :3] = -100
        got = torch.autograd.grad(compiled(hidden, labels), (hidden, weight))
        want = torch.autograd.grad(loss(hidden, labels), (hidden, weight))
        assert max(error(list(got), list(want))) <= 1e-6
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1], f"one for the first length, one for all others: {graphs}"

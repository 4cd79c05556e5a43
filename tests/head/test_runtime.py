"""The operators inside the runtime: opcheck, compilation, products counted, and what is refused."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

import prefkern as pk
from prefkern import testing
from prefkern.head.engine import blocks
from prefkern.head.engine.products import count_products


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("held_rows", "scratch"), [(100, blocks.SCRATCH_BYTES), (4, blocks.SCRATCH_BYTES), (0, 1024)])
def test_opcheck_from_hidden(dtype: torch.dtype, held_rows: int, scratch: int) -> None:
    case = testing.head_case(9, 8, 300, dtype=dtype, bias=True)
    leaves = [value.clone().requires_grad_() for value in case[:3]]
    arguments = (
        *leaves,
        None,
        None,
        case.targets,
        None,
        0.7,
        3.0,
        -100,
        1.2,
        1.0,
        ["entropy", "is_top1"],
        dtype,
        held_rows,
        0,
        False,
        scratch,
    )
    results = opcheck(torch.ops.prefkern.linear_logprobs_fwd, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_opcheck_from_logits() -> None:
    case = testing.logit_case(9, 32)
    arguments = (case.logits.clone().requires_grad_(), case.targets, torch.rand(9) + 0.5, 1.0, None, -100, ["entropy"])
    assert set(opcheck(torch.ops.prefkern.logprobs_fwd, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_one_compilation_for_50_lengths(source: str, entropy: bool) -> None:
    torch._dynamo.reset()
    weight = torch.randn(32, 8, requires_grad=True)

    def loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        options = {"outputs": ("logps", "entropy"), "entropy_grad": True} if entropy else {}
        if source == "hidden":
            stats = pk.linear_token_logprobs(hidden, weight, targets, **options)
        else:
            stats = pk.token_logprobs(hidden @ weight.T, targets, **options)
        return -stats.logps.mean() - (stats.entropy.mean() if entropy else 0.0)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)

    def both(n: int) -> None:
        hidden, targets = torch.randn(n, 8), torch.randint(0, 32, (n,))
        targets[0] = -100  # ignored rows stay in the batch under compilation
        values = []
        for function in (compiled, loss):
            leaf = hidden.clone().requires_grad_()
            weight.grad = None
            value = function(leaf, targets)
            value.backward()
            values.append((value.detach(), leaf.grad, weight.grad))
        for got, want in zip(*values, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    both(7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in range(2, 102, 2):
            both(n)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_inductor_keeps_float32() -> None:
    torch._dynamo.reset()
    case = testing.head_case(21, 16, 64)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return pk.linear_token_logprobs(hidden, case.weight, case.targets, temperature=0.7, softcap=4.0).logps.sum()

    leaf, plain = (case.hidden.clone().requires_grad_() for _ in range(2))
    got, want = torch.compile(loss, fullgraph=True)(leaf), loss(plain)
    got.backward()
    want.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("memory_rows", "frozen", "products"),
    [(None, False, 3), (None, True, 2), (0, False, 4), (0, True, 3), (20, False, 3.5)],
)
def test_products(memory_rows: int | None, frozen: bool, products: float, dtype: torch.dtype) -> None:
    N, H, V = 40, 16, 300
    case = testing.head_case(N, H, V, dtype=dtype, ignored=0.0)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    memory = None if memory_rows is None else memory_rows * V * dtype.itemsize
    with count_products() as count:
        pk.linear_token_logprobs(hidden, weight, case.targets, max_memory=memory).logps.sum().backward()
    assert count.products(N, H, V) == products


def test_scoring_is_one_product_of_the_scored_rows_only() -> None:
    case = testing.head_case(40, 16, 300, ignored=0.5)
    scored = int((case.targets != -100).sum())
    weight = case.weight.requires_grad_()
    with torch.no_grad(), count_products() as count:
        pk.linear_token_logprobs(case.hidden, weight, case.targets)
    assert count.products(scored, 16, 300) == 1
    assert scored < 40


def test_an_unused_entropy_costs_no_product_and_no_pass() -> None:
    case = testing.head_case(40, 16, 300, ignored=0.0)
    hidden = case.hidden.requires_grad_()
    with count_products() as count:
        stats = pk.linear_token_logprobs(hidden, case.weight, case.targets, outputs=("logps", "entropy"))
        stats.logps.sum().backward()
    assert count.products(40, 16, 300) == 2
    assert not stats.entropy.requires_grad
    assert stats.logps.requires_grad


def test_nothing_of_the_size_of_the_logits_outlives_a_forward_without_gradients() -> None:
    case = testing.head_case(40, 16, 300)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pk.linear_token_logprobs(case.hidden, case.weight, case.targets)
        assert saved == []
        pk.linear_token_logprobs(case.hidden.requires_grad_(), case.weight, case.targets, max_memory=0)
    assert all(shape.numel() < 300 * 17 for shape in saved)


def test_second_derivatives_are_refused_with_a_sentence() -> None:
    case = testing.head_case(5, 8, 32)
    hidden = case.hidden.requires_grad_()
    logps = pk.linear_token_logprobs(hidden, case.weight, case.targets).logps
    (grad,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functorch_is_refused_with_a_sentence(transform) -> None:
    case = testing.head_case(5, 8, 32)
    function = transform(lambda hidden: pk.linear_token_logprobs(hidden, case.weight, case.targets).logps.sum())
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        function(case.hidden)


def test_checkpoint_and_autocast_backward() -> None:
    """Legal, if wasteful: the numbers stay right."""
    case = testing.head_case(10, 8, 32)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return pk.linear_token_logprobs(hidden, case.weight, case.targets).logps.sum()

    one, two = (case.hidden.clone().requires_grad_() for _ in range(2))
    torch.utils.checkpoint.checkpoint(loss, one, use_reentrant=False).backward()
    loss(two).backward()
    assert torch.equal(one.grad, two.grad)


def test_import_is_light() -> None:
    """A fresh process: nothing optional is loaded, and at most 50 ms of processor time go beyond importing torch."""
    code = (
        "import sys, time, torch; a = time.process_time(); import prefkern; b = time.process_time();"
        "print(b - a, *[m for m in ('triton', 'trl', 'transformers', 'prefkern._core') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(4)]
    outputs = [run.stdout.split() for run in runs]
    assert all(len(output) == 1 for output in outputs), outputs
    assert min(float(output[0]) for output in outputs) <= 0.05

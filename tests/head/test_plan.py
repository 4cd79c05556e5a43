"""The plan's predictions against what the engine does."""

import pytest
import torch

import prefkern as pk
from prefkern import testing
from prefkern.commands.benchmark.measure import peak_extra_bytes
from prefkern.head import costs, plan
from prefkern.head.engine import blocks, memory, products
from prefkern.head.engine.products import count_products

N, H, V = 40, 16, 300


def held_rows(case: testing.HeadCase, max_memory: int | None) -> int:
    """Rows of the held tile among the saved tensors."""
    rows: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2 and tensor.shape[1] == V and tensor.shape[0] <= N:
            rows.append(tensor.shape[0])
        return tensor.detach()  # an output packed as itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pk.linear_token_logprobs(*case[:2], case.targets, max_memory=max_memory)
    assert len(rows) == 1
    return rows[0]


def head_of(dtype: torch.dtype, **changes: object) -> costs.Call:
    size = dtype.itemsize
    return costs.Call(N, H, V, size, size, size, accelerator=False)._replace(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 0, 1, 25, 1000])
def test_the_plan_agrees_with_the_engine(rows: int | None, dtype: torch.dtype) -> None:
    case = testing.head_case(N, H, V, dtype=dtype, ignored=0.0)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    memory = None if rows is None else rows * V * dtype.itemsize
    predicted = costs.choose(head_of(dtype), memory)
    assert predicted.kept_rows == held_rows(case, memory)
    assert predicted.held_bytes == predicted.kept_rows * V * dtype.itemsize
    assert memory is None or predicted.held_bytes <= memory
    with count_products() as count:
        pk.linear_token_logprobs(*case[:2], case.targets, max_memory=memory).logps.sum().backward()
    assert count.products(N, H, V) == pytest.approx(predicted.products)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", [None, 0, 10])
def test_the_frozen_plan_agrees_with_the_engine(rows: int | None, entropy: bool) -> None:
    case = testing.head_case(N, H, V, ignored=0.0)
    memory = None if rows is None else rows * H * 4 * (1 + entropy)
    predicted = costs.choose(head_of(torch.float32, grad_weight=False, entropy_grad=entropy), memory)
    assert predicted.name == f"frozen({N if rows is None else rows})"
    with count_products() as count:
        stats = pk.linear_token_logprobs(
            case.hidden.requires_grad_(),
            case.weight,
            case.targets,
            max_memory=memory,
            outputs=("entropy",),
            entropy_grad=entropy,
        )
        forward = count.multiply_adds
        (stats.logps.sum() + (stats.entropy.sum() if entropy else 0)).backward()
    assert count.products(N, H, V) == pytest.approx(predicted.products)
    if rows is None:
        assert count.multiply_adds == forward  # none in the backward


def test_forwards_before_one_backward_share_the_memory() -> None:
    case = testing.head_case(N, H, V, ignored=0.0)
    weight = case.weight.requires_grad_()
    before = memory.held_bytes(weight.device)

    def products(count: int) -> float:
        with count_products() as counted:
            parts = [
                pk.linear_token_logprobs(case.hidden, weight, case.targets, max_memory=before + 50 * V * 4).logps.sum()
                for _ in range(count)
            ]
            assert memory.held_bytes(weight.device) - before == min(50, N * count) * V * 4
            sum(parts).backward()
        return counted.products(N, H, V)

    assert products(1) == 2
    assert products(2) == 4 + (80 - 50) / N
    assert products(1) == 2  # what the backward has freed counts no more
    assert memory.held_bytes(weight.device) == before


CASES = {
    "float32": (torch.float32, torch.float32, {}),
    "bfloat16": (torch.bfloat16, torch.bfloat16, {}),
    "float32 weight": (torch.bfloat16, torch.float32, {}),
    "frozen": (torch.bfloat16, torch.bfloat16, {"grad_weight": False}),
    "scoring": (torch.float32, torch.float32, {"grad_hidden": False, "grad_weight": False}),
    "entropy": (torch.float32, torch.float32, {"entropy_grad": True}),
}


@pytest.mark.parametrize("rows", [None, 150, 0])
@pytest.mark.parametrize("name", CASES)
def test_predicted_bytes_are_within_5_percent_of_the_measured_ones(name: str, rows: int | None) -> None:
    n, h, v = 500, 96, 16384
    dtype, weight_dtype, changes = CASES[name]
    head = costs.Call(n, h, v, dtype.itemsize, weight_dtype.itemsize, dtype.itemsize, accelerator=False)
    head = head._replace(**changes, native=products.native(dtype))
    memory = None if rows is None else rows * (h if head.frozen else v) * dtype.itemsize
    hidden = torch.randn(n, h).to(dtype).requires_grad_(head.grad_hidden)
    weight = (torch.randn(v, h) / h**0.5).to(weight_dtype).requires_grad_(head.grad_weight)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    targets = torch.randint(v, (n,))

    def step() -> list[torch.Tensor]:
        entropy = head.entropy_grad
        outputs = ("logps", "entropy") if entropy else ("logps",)
        stats = pk.linear_token_logprobs(
            hidden, weight, targets, max_memory=memory, outputs=outputs, entropy_grad=entropy
        )
        if not leaves:
            return [stats.logps]
        return list(torch.autograd.grad(stats.logps.sum() + (stats.entropy.sum() if entropy else 0), leaves))

    measured = peak_extra_bytes(step, torch.device("cpu"))
    predicted = costs.choose(head, memory).extra_bytes
    assert abs(predicted - measured) <= 0.05 * measured, (predicted, measured)


FORMS = {
    "float32": (torch.float32, torch.float32, {}),
    "bfloat16": (torch.bfloat16, torch.bfloat16, {}),
    "float32 weight": (torch.bfloat16, torch.float32, {}),
    "frozen": (torch.bfloat16, torch.bfloat16, {"grad_weight": False}),
}


@pytest.mark.parametrize(
    ("form", "rows"), [("stream", None), ("stream", 150), ("divergence", None), ("divergence", 150), ("divergence", 0)]
)
@pytest.mark.parametrize("name", FORMS)
def test_the_other_forms_take_what_is_predicted(name: str, form: str, rows: int | None) -> None:
    n, h, v = 500, 96, 16384
    dtype, weight_dtype, changes = FORMS[name]
    head = costs.Call(n, h, v, dtype.itemsize, weight_dtype.itemsize, dtype.itemsize, accelerator=False)
    head = head._replace(**changes, native=products.native(dtype))
    hidden, ref_hidden = (torch.randn(n, h).to(dtype) for _ in range(2))
    weight, ref_weight = ((torch.randn(v, h) / h**0.5).to(weight_dtype) for _ in range(2))
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if head.grad_weight else [])]
    targets = torch.randint(v, (n,))
    entry = 4 if form == "stream" else dtype.itemsize  # what max_memory bounds: float32 logits, or what is held
    memory = None if rows is None else rows * v * entry

    def step() -> list[torch.Tensor]:
        if form == "stream":
            loss = pk.linear_cross_entropy(hidden, weight, targets, max_memory=memory).loss
        else:
            loss = pk.linear_kl_divergence(hidden, weight, ref_hidden, ref_weight, max_memory=memory).sum()
        return list(torch.autograd.grad(loss, leaves))

    predict = plan.cross_entropy if form == "stream" else plan.divergence
    predicted = predict(head, memory)
    with count_products() as count:
        measured = peak_extra_bytes(step, torch.device("cpu"))
    assert abs(predicted.extra_bytes - measured) <= 0.05 * measured, (predicted, measured)
    runs = round(count.products(n, h, v) / predicted.products)  # some to warm up
    assert runs >= 1
    assert count.products(n, h, v) == pytest.approx(runs * predicted.products)


def test_every_plan_and_form_has_a_line() -> None:
    lines = {line.wanted: line for line in plan.explain(8192, 4096, 128256)}
    products_ = {name: line.plan.products for name, line in lines.items()}
    assert products_ == {
        "scoring, no gradient": 1,
        "frozen head": 2,
        "frozen head, gradient of the entropy": 3,
        "trainable head": 3,
        "trainable head, gradient of the entropy": 3,
        "trainable head, max_memory=0": 4,
        "cross-entropy in one pass": 3,
        "divergence of two heads": 4,
    }
    for line in lines.values():
        floor = line.plan.products * 2 * 8192 * 4096 * 128256 / 790e12
        assert floor < line.seconds < 1.5 * floor, line
    assert lines["cross-entropy in one pass"].plan.held_bytes == 0
    assert plan.divergence(head_of(torch.float32), 0).products == 6
    assert plan.divergence(head_of(torch.float32, grad_hidden=False, grad_weight=False)).products == 2


def test_the_default_is_peak_neutral_and_independent_of_the_length() -> None:
    assert memory.limits(4096, 128256, 2, memory.budget(4096, 128256, None)).held == 2 * 4096  # 4VH bytes
    assert memory.limits(64, 32768, 4, memory.budget(64, 32768, None)).held == (1 << 30) // (32768 * 4)  # the floor
    assert costs.choose(head_of(torch.float32, grad_hidden=False, grad_weight=False)).products == 1
    assert costs.choose(head_of(torch.float32, grad_weight=False)).products == 2
    assert costs.choose(head_of(torch.float32, N=0)).products == 3


def test_blocks_cover_the_vocabulary_in_aligned_slices() -> None:
    for rows, columns, itemsize in ((7, 50257, 6), (100_000, 151_936, 6), (1, 1, 4), (4096, 262_144, 8)):
        step = blocks.slice_columns(rows, columns, itemsize)
        assert 1 <= step <= columns
        assert step == columns or step % blocks.ALIGNMENT == 0
        assert step <= blocks.ALIGNMENT or rows * step * itemsize <= blocks.SCRATCH_BYTES

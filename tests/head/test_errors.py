"""Bad input: the function, the argument, what was expected, what was got."""

import pytest
import torch

import prefkern as pk

HIDDEN, WEIGHT, TARGETS = torch.zeros(4, 8), torch.zeros(10, 8), torch.zeros(4, dtype=torch.long)

CASES = [
    (
        {"hidden": torch.zeros(4, 8, dtype=torch.long)},
        TypeError,
        "hidden must be float16, bfloat16, float32 or float64",
    ),
    ({"weight": torch.zeros(10, 8, dtype=torch.int8)}, TypeError, "weight must be .* dequantise it first"),
    ({"weight": torch.zeros(10, 8).to(torch.float8_e4m3fn)}, TypeError, "weight must be .* dequantise it first"),
    ({"hidden": [1.0]}, TypeError, r"hidden must be a torch\.Tensor, got list"),
    ({"hidden": None}, TypeError, r"hidden must be a torch\.Tensor, got NoneType"),
    ({"targets": None}, TypeError, r"targets must be a torch\.Tensor, got NoneType"),
    ({"weight": torch.zeros(10, 7)}, ValueError, r"hidden must be \[\.\.\., H\] and weight \[V, H\] with one H"),
    ({"weight": torch.zeros(8)}, ValueError, r"weight \[V, H\]"),
    ({"bias": torch.zeros(9)}, ValueError, r"bias must be \[V\] = \[10\], got float32 \(9,\)"),
    ({"targets": torch.zeros(4)}, TypeError, "targets must be int64 or int32, got float32"),
    ({"targets": torch.zeros(5, dtype=torch.long)}, ValueError, r"targets must have shape \(4,\)"),
    (
        {"targets": torch.zeros(4, 0, dtype=torch.long)},
        ValueError,
        r"targets must have shape \(4,\), or \(4,\) \+ \(Kt,\)",
    ),
    ({"targets": torch.zeros(2, 4, 1, dtype=torch.long)}, ValueError, "several targets per row, got int64"),
    (
        {"targets": torch.zeros(4, 2, dtype=torch.long), "outputs": ("is_top1",)},
        ValueError,
        "is_top1 is not defined for several targets per row",
    ),
    ({"targets": torch.tensor([[0, 1], [2, 10]] * 2)}, ValueError, "got 10 at row 1"),
    ({"targets": torch.tensor([0, 10, 0, 0])}, ValueError, r"targets must lie in \[0, 10\) .* got 10 at row 1"),
    ({"targets": torch.tensor([0, -1, 0, 0])}, ValueError, "got -1 at row 1"),
    ({"targets": TARGETS.to("meta")}, ValueError, "on one device, got hidden on cpu.* targets on meta"),
    ({"temperature": 0.0}, ValueError, r"temperature must be a finite number in \(0\.0, inf\)"),
    ({"temperature": float("nan")}, ValueError, "temperature must be a finite number"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must be .* shaped like targets \(4,\)"),
    ({"temperature": torch.zeros(4)}, ValueError, "temperature must be positive in every row"),
    ({"temperature": torch.ones(4, requires_grad=True)}, ValueError, "temperature gets no gradient"),
    ({"softcap": 0.0}, ValueError, "softcap must be a finite number"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be a finite number"),
    ({"outputs": ("logp",)}, ValueError, "every entry of outputs must be one of 'logps'"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
    ({"max_memory": -1}, ValueError, "max_memory must be bytes >= 0: .*, got -1"),
    ({"max_memory": 1.5}, ValueError, "max_memory must be bytes >= 0"),
    ({"num_scored": 3}, ValueError, "num_scored must be the number of scored targets, 4, got 3"),
    ({"compute_dtype": torch.int32}, TypeError, "compute_dtype must be float16"),
    ({"lora": (1, 2, 3)}, TypeError, r"lora A must be a torch\.Tensor, got int"),
    ({"lora": torch.zeros(3)}, TypeError, r"lora must be \(A \[r, H\], B \[V, r\], scale\), got float32 \(3,\)"),
    (
        {"lora": (torch.zeros(2, 7), torch.zeros(10, 2), 1.0)},
        ValueError,
        r"lora must be A \[r, H = 8\] and B \[V = 10, r\]",
    ),
    ({"lora": (torch.zeros(2, 8), torch.zeros(10, 3), 1.0)}, ValueError, "with one r >= 1"),
    ({"lora": (torch.zeros(2, 8), torch.zeros(10, 2), None)}, TypeError, "lora's scale must be a number"),
    ({"lora": (torch.zeros(2, 8).int(), torch.zeros(10, 2), 1.0)}, TypeError, "lora A must be float16"),
    ({"vocab_mask": torch.ones(9)}, ValueError, r"vocab_mask must have shape \(10,\)"),
    ({"vocab_mask": torch.full((10,), 0.5)}, ValueError, "vocab_mask must hold only 0 and 1"),
    (
        {"vocab_mask": torch.arange(10) % 3 != 2, "targets": torch.tensor([1, 2, -100, 5])},
        ValueError,
        "vocab_mask excludes 2 of 3 scored targets, token 2 first, whose log-probability would be -inf: allow them, "
        "or give them ignore_index=-100",
    ),
    ({"group": object()}, ValueError, "group is not supported by this version"),
]


@pytest.mark.parametrize(("change", "error", "message"), CASES)
def test_linear_token_logprobs(change, error, message) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change}
    with pytest.raises(error, match=r"^prefkern\.linear_token_logprobs: .*" + message):
        pk.linear_token_logprobs(**arguments)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (torch.zeros(4, 5, dtype=torch.long), TARGETS, TypeError, "logits must be float16"),
        (torch.zeros(4, 0), TARGETS, ValueError, r"logits must be \[\.\.\., V\] with V >= 1"),
        (torch.zeros(3, 5), TARGETS, ValueError, r"targets must have shape \(3,\)"),
        (torch.zeros(4, 5), TARGETS + 5, ValueError, r"targets must lie in \[0, 5\)"),
    ],
)
def test_token_logprobs(logits, targets, error, message) -> None:
    with pytest.raises(error, match=r"^prefkern\.token_logprobs: .*" + message):
        pk.token_logprobs(logits, targets)


def test_entropy_gradient_needs_the_entropy() -> None:
    with pytest.raises(ValueError, match="entropy_grad=True needs 'entropy' in outputs"):
        pk.token_logprobs(torch.zeros(4, 5), TARGETS, entropy_grad=True)

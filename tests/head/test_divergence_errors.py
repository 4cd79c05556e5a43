"""Bad input: the function, the argument, what was expected, what was got."""

import pytest
import torch

import prefkern as pk

GIVEN = {
    "hidden": torch.zeros(4, 8),
    "weight": torch.zeros(10, 8),
    "ref_hidden": torch.zeros(4, 6),
    "ref_weight": torch.zeros(10, 6),
    "targets": torch.zeros(4, dtype=torch.long),
}
BIAS = torch.zeros(10)

CASES = [
    ({"hidden": None}, TypeError, r"hidden must be a torch\.Tensor, got NoneType"),
    ({"ref_hidden": [1.0]}, TypeError, r"ref_hidden must be a torch\.Tensor, got list"),
    ({"weight": None}, TypeError, r"weight must be a torch\.Tensor, got NoneType"),
    ({"ref_weight": None}, TypeError, r"ref_weight must be a torch\.Tensor, got NoneType"),
    (
        {"targets": None, "num_scored": 3},
        ValueError,
        "num_scored must be the number of rows, 4, without targets, got 3",
    ),
    ({"weight": torch.zeros(10, 8, dtype=torch.int8)}, TypeError, "weight must be .* dequantise it first"),
    ({"ref_weight": torch.zeros(10, 6, dtype=torch.long)}, TypeError, "ref_weight must be float16"),
    ({"weight": torch.zeros(10, 7)}, ValueError, r"hidden must be \[\.\.\., H\] and weight \[V, H\] with one H"),
    ({"ref_weight": torch.zeros(10, 8)}, ValueError, r"ref_hidden must be \[\.\.\., H\] and ref_weight \[V, H\]"),
    ({"ref_weight": torch.zeros(11, 6)}, ValueError, r"weight and ref_weight the same vocabulary .* float32 \(11, 6\)"),
    ({"ref_hidden": torch.zeros(5, 6)}, ValueError, r"must have the same rows, .* float32 \(5, 6\)"),
    ({"bias": torch.zeros(9)}, ValueError, r"bias must be \[V\] = \[10\], got float32 \(9,\)"),
    (
        {"bias": BIAS},
        ValueError,
        r"bias is given, so the reference's head needs its own: pass ref_bias \(zeros: none\)",
    ),
    ({"ref_bias": torch.zeros(3)}, ValueError, r"ref_bias must be \[V\]"),
    ({"softcap": 5.0}, ValueError, r"softcap is given, .* pass ref_softcap \(math\.inf: none\)"),
    ({"logit_scale": 0.5}, ValueError, r"logit_scale is given, .* pass ref_logit_scale \(1\.0: none\)"),
    ({"softcap": 0.0, "ref_softcap": 5.0}, ValueError, "softcap must be a finite number"),
    ({"ref_softcap": -1.0}, ValueError, "ref_softcap must be a finite number"),
    ({"ref_logit_scale": float("nan")}, ValueError, "ref_logit_scale must be a finite number"),
    ({"temperature": 0.0}, ValueError, r"temperature must be a finite number in \(0\.0, inf\)"),
    ({"ref_temperature": 0.0}, ValueError, r"ref_temperature must be a finite number in \(0\.0, inf\)"),
    ({"ref_temperature": torch.ones(3)}, ValueError, r"ref_temperature must be .* shaped like targets \(4,\)"),
    ({"ref_temperature": torch.zeros(4)}, ValueError, "ref_temperature must be positive in every row"),
    ({"ref_temperature": torch.ones(4, requires_grad=True)}, ValueError, "ref_temperature gets no gradient"),
    ({"targets": torch.zeros(4)}, TypeError, "targets must be int64 or int32, got float32"),
    ({"targets": torch.zeros(5, dtype=torch.long)}, ValueError, r"targets must have shape \(4,\)"),
    ({"targets": torch.tensor([0, 10, 0, 0])}, ValueError, r"targets must lie in \[0, 10\) .* got 10 at row 1"),
    ({"targets": GIVEN["targets"].to("meta")}, ValueError, "on one device, got hidden on cpu.* targets on meta"),
    ({"direction": "backward"}, ValueError, "direction must be one of 'forward', 'reverse', got 'backward'"),
    ({"direction": "reverse", "jsd_beta": 0.5}, ValueError, "direction must be left at its default when jsd_beta"),
    ({"jsd_beta": 1.5}, ValueError, r"jsd_beta must be a finite number in \[0\.0, 1\.0\], got 1\.5"),
    ({"jsd_beta": "half"}, TypeError, "jsd_beta must be a number"),
    ({"outputs": ("logps",)}, ValueError, "every entry of outputs must be one of 'divergence', 'entropy'"),
    ({"max_memory": -1}, ValueError, "max_memory must be bytes >= 0: .*, got -1"),
    ({"num_scored": 3}, ValueError, "num_scored must be the number of scored targets, 4, got 3"),
    ({"compute_dtype": torch.int32}, TypeError, "compute_dtype must be float16"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
]


@pytest.mark.parametrize(("change", "error", "message"), CASES)
def test_linear_kl_divergence(change, error, message) -> None:
    with pytest.raises(error, match=r"^prefkern\.linear_kl_divergence: .*" + message):
        pk.linear_kl_divergence(**{**GIVEN, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": None}, TypeError, r"logits must be a torch\.Tensor"),
        ({"logits": torch.zeros(4, 5, dtype=torch.long)}, TypeError, "logits must be float16"),
        ({"ref_logits": torch.zeros(4, 5, dtype=torch.long)}, TypeError, "ref_logits must be float16"),
        ({"ref_logits": torch.zeros(4, 6)}, ValueError, r"logits and ref_logits must have the same shape"),
        ({"logits": torch.zeros(4, 0), "ref_logits": torch.zeros(4, 0)}, ValueError, r"logits must be \[\.\.\., V\]"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, ValueError, r"targets must have shape \(4,\)"),
        ({"ref_logits": torch.zeros(4, 5, device="meta")}, ValueError, "on one device, got logits on cpu, ref_logits"),
        ({"jsd_beta": -0.1}, ValueError, r"jsd_beta must be a finite number in \[0\.0, 1\.0\]"),
        ({"ref_temperature": -1.0}, ValueError, "ref_temperature must be a finite number"),
    ],
)
def test_kl_divergence(change, error, message) -> None:
    given = {"logits": torch.zeros(4, 5), "ref_logits": torch.zeros(4, 5), **change}
    with pytest.raises(error, match=r"^prefkern\.kl_divergence: .*" + message):
        pk.kl_divergence(**given)


def test_softcap_infinity_and_scale_1_say_that_the_reference_has_none() -> None:
    given = {name: torch.randn(value.shape) for name, value in GIVEN.items() if value.is_floating_point()}
    got = pk.linear_kl_divergence(**given, softcap=5.0, ref_softcap=float("inf"), logit_scale=2.0, ref_logit_scale=1.0)
    logits = 5.0 * torch.tanh(2.0 * (given["hidden"] @ given["weight"].T) / 5.0)
    torch.testing.assert_close(got, pk.kl_divergence(logits, given["ref_hidden"] @ given["ref_weight"].T))

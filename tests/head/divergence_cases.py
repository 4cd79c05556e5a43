"""What the divergence tests share: the kinds of divergence, the forms of logits, and one run of the public function."""

from typing import Any

import torch
from torch import Tensor

import prefkern as pk
from prefkern import testing
from prefkern.kernels.interface import Logits

N, H, REF_H, V = 45, 24, 16, 301
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"direction": "reverse"},
    "jsd": {"jsd_beta": 0.3},
}
BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}
# a form's name -> the policy's and the reference's
FORMS = {
    "plain": (Logits(), Logits()),
    "temperatures": (Logits(temperature=0.7), Logits(temperature=torch.linspace(0.5, 1.5, N))),
    "all": (
        Logits(logit_scale=1.2, softcap=6.0, temperature=torch.linspace(1.4, 0.6, N)),
        Logits(logit_scale=0.8, softcap=9.0, temperature=1.1),
    ),
}


def arguments(form: Logits, ref_form: Logits) -> dict[str, Any]:
    """The options of the public function that say a form; biases come with the case."""
    names = ("logit_scale", "softcap", "temperature")
    return {name: getattr(form, name) for name in names} | {f"ref_{name}": getattr(ref_form, name) for name in names}


def run(
    case: testing.DivergenceCase, g: Tensor, *, trainable: bool = True, targets: Tensor | None = None, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The divergence of the case, and the gradients of ``sum g D``."""
    given = [value for value in case[:3] if value is not None]
    leaves = [value.detach().clone().requires_grad_(trainable or i == 0) for i, value in enumerate(given)]
    divergence = pk.linear_kl_divergence(
        leaves[0],
        leaves[1],
        case.ref_hidden,
        case.ref_weight,
        case.targets if targets is None else targets,
        bias=None if case.bias is None else leaves[2],
        ref_bias=case.ref_bias,
        **options,
    )
    return divergence, torch.autograd.grad((divergence * g).sum(), [leaf for leaf in leaves if leaf.requires_grad])


def upstream(seed: int = 1, n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))

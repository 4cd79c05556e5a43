"""What is computed: shapes, cases and the seeded tensors that all contenders share."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Head = Literal["trainable", "frozen", "scoring", "cross-entropy"]
HEADS: tuple[Head, ...] = ("trainable", "frozen", "scoring", "cross-entropy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Shape(NamedTuple):
    """``N`` scored tokens, hidden width ``H``, vocabulary ``V``."""

    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"N={self.N} H={self.H} V={self.V}"


class Case(NamedTuple):
    """One shape, one dtype of the operands, one kind of head.

    trainable: gradients of hidden and weight. frozen: of hidden only. scoring: under ``no_grad``. cross-entropy: the
    mean over tokens and its gradients of hidden and weight, where nothing per token is given back.
    """

    shape: Shape
    dtype: torch.dtype
    head: Head

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def products(self) -> int:
        """The fewest products of ``2 N H V`` operations that this case can be done in."""
        return {"trainable": 3, "frozen": 2, "scoring": 1, "cross-entropy": 3}[self.head]

    @property
    def trains_weight(self) -> bool:
        return self.head in ("trainable", "cross-entropy")

    def __str__(self) -> str:
        return f"{self.dtype_name}, {self.head}, {self.shape}"


class Operands(NamedTuple):
    """``hidden [N, H]``, ``weight [V, H]``, ``targets [N]`` and the per-token upstream gradient ``upstream [N]``."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor


def make_operands(shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> Operands:
    """Logits of standard deviation about 3; every fourth token is confident (its target has p near 1), as in a
    trained model. Upstream gradients are normal, of both signs, as a policy loss gives them."""
    N, H, V = shape
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(N, H, device=device, generator=generator)
    weight = torch.randn(V, H, device=device, generator=generator).mul_(3.0 / H**0.5)
    targets = torch.randint(V, (N,), device=device, generator=generator)
    hidden[::4] += 2.0 * weight[targets[::4]]
    upstream = torch.randn(N, device=device, generator=generator)
    return Operands(hidden.to(dtype), weight.to(dtype), targets, upstream)

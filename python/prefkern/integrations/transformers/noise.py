"""Training without randomness: two passes in train mode give the same numbers, which are those of eval mode."""

import copy
import re
from types import TracebackType
from typing import Any

from torch import nn

_NOISE = re.compile("drop|jitter|noise")
"""In the name of a number that is a rate of dropout or layerdrop, or a width of noise, in every architecture known."""


class Quiet:
    """What `without_noise` returns. As a context manager it gives the noise back at the end of the block."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self._hooks: list[Any] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def in_eval(self, module: nn.Module) -> None:
        self._hooks.append(module.register_forward_pre_hook(_eval))

    def undo(self) -> None:
        while self._before:
            setattr(*self._before.pop())
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def without_noise(model: nn.Module) -> Quiet:
    """Turns every source of randomness in the forward off, in train mode too: from now on, or in ``with`` for a block.

    The modes stay: gradient checkpointing, which only trains in ``train()``, works as before. Turned off are dropout
    (``nn.Dropout``; functional dropout, whatever attribute or configuration field holds its rate), layerdrop, the
    jitter of routers, and routers that sample their experts (PhiMoE), which decide as in ``eval()``. So the
    log-probabilities of two passes differ by what was learned between them and by nothing else, as PPO's ratio needs.

    A configuration that is read in the forward (Falcon, GPT-J) is replaced by a copy in the parts that read it; that
    of the model itself, which ``save_pretrained`` writes, keeps its rates.

    Example:
        >>> import torch
        >>> model, x = torch.nn.Sequential(torch.nn.Dropout(0.5)), torch.ones(4)
        >>> with without_noise(model):
        ...     model(x)
        tensor([1., 1., 1., 1.])
        >>> model[0].p
        0.5
    """
    quiet = Quiet()
    copies: dict[int, Any] = {}
    for module in model.modules():
        if "Router" in type(module).__name__:
            quiet.in_eval(module)  # its noise is more than a rate: the rate of PhiMoE's is a threshold too
            continue
        for name in _rates(module):
            quiet.set(module, name, 0.0)
        config = getattr(module, "config", None)
        if config is None or _is_saved(module):
            continue
        if id(config) not in copies:
            copies[id(config)] = _silent(config)
        if copies[id(config)] is not config:
            quiet.set(module, "config", copies[id(config)])
    return quiet


def _rates(owner: Any) -> list[str]:
    names = [name for name, value in vars(owner).items() if isinstance(value, float) and value and _NOISE.search(name)]
    if isinstance(owner, nn.modules.dropout._DropoutNd) and owner.p:
        names.append("p")
    return names


def _silent(config: Any) -> Any:
    """The configuration itself where it holds no rate."""
    names = _rates(config)
    if not names:
        return config
    silent = copy.copy(config)
    for name in names:
        setattr(silent, name, 0.0)
    return silent


def _is_saved(module: Any) -> bool:
    """A language model or a peft model, whose configuration is written to files; a trunk is not."""
    return hasattr(module, "save_pretrained") and getattr(module, "base_model", module) is not module


def _eval(module: nn.Module, inputs: Any) -> None:
    module.training = False

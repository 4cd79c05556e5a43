"""TRL: one replacement gives its SFT, DPO, KTO, GRPO and RLOO trainers prefkern's head.

    import prefkern

    prefkern.integrations.trl.patch()
    trl.DPOTrainer(...).train()

TRL 1.15 and 1.16 compute the log-probabilities of all these trainers in one autograd function, which spends four matrix
products on a training step (the logits twice) and rounds 16-bit logits. In its place stands `linear_token_logprobs`:
three products, exact logits, and rows held only as far as TRL's own peak memory allows. Trainers that exist already are
reached too: TRL looks the function up at every call.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from prefkern.check import MissingDependency, fail, require
from prefkern.head.inputs import Head
from prefkern.head.logprobs import token_stats
from prefkern.integrations.trl import memory
from prefkern.integrations.trl.replaced import Replaced

__all__ = ["MissingDependency", "Patch", "patch", "unpatch"]

_WHERE = "integrations.trl"
_FIRST, _BELOW = (1, 15), (1, 17)
_WORKS = "TRL 1.15 and 1.16 (pip install 'trl>=1.15,<1.17')"
_SIGNATURE = (
    "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs"
)
_FIELDS = {
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_NO_TARGET = -(1 << 62)  # TRL passes scored rows only: no target may mean "ignored"


class _Head:
    """Stands where TRL has its autograd function: the same ``apply``, positional arguments and five results."""

    def __init__(self) -> None:
        self.calls = 0

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(_FIELDS)[1:],
    ) -> tuple[Tensor | None, ...]:
        if hasattr(weight, "ds_id"):
            fail(
                _WHERE,
                "DeepSpeed ZeRO-3 takes the head's weight away between forward and backward, which this version does "
                "not support: train with ZeRO-2 or FSDP2, or call unpatch()",
            )
        self.calls += 1
        held, scratch = memory.bounds_of(hidden, weight)
        with _kept_on_device():
            stats = token_stats(
                f"{_WHERE}.patch",
                hidden,
                weight,
                targets,
                Head(
                    bias=bias,
                    temperature=float(temperature),
                    logit_scale=float(logit_scale),
                    softcap=final_logit_softcapping,
                    ignore_index=_NO_TARGET,
                    max_memory=held,
                    num_scored=targets.shape[0],
                ),
                [_FIELDS[name] for name in ("log_probs", *outputs)],  # type: ignore[misc]
                entropy_grad="entropy" in outputs,
                scratch_bytes=scratch,
            )
        return tuple(getattr(stats, field) for field in _FIELDS.values())


def _kept_on_device() -> AbstractContextManager[Any]:
    """What the head saves stays where it is, also under hooks that would offload it: the held tile is the largest
    tensor of the step and is needed first in the backward. In-place changes are still found, as without hooks.
    Detached: an output that is packed as itself keeps its own graph alive, also where no backward ever runs."""
    return nullcontext() if torch.compiler.is_compiling() else saved_tensors_hooks(_keep, _kept)


def _keep(saved: Tensor) -> tuple[Tensor, int]:
    return saved.detach(), saved._version


def _kept(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:
        raise RuntimeError(
            f"prefkern: a tensor of shape {tuple(saved.shape)} needed for the gradient of the log-probabilities was "
            "modified in place after the forward pass (an optimizer step before backward does that)"
        )
    return saved


_head = _Head()
_replaced_head, _replaced_data = Replaced(), Replaced()


class Patch:
    """What `patch` returns. As a context manager it ends the replacement at the end of the block, if it began it."""

    def __init__(self, *, collators: bool = False) -> None:
        self._collators = collators
        self._began = _install(collators)
        self._calls = _head.calls

    @property
    def calls(self) -> int:
        """Calls of the head that prefkern has served since this `patch`."""
        return _head.calls - self._calls

    def __enter__(self) -> "Patch":
        self._began += _install(self._collators)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._began:
            self._began.pop().undo()


def patch(*, collators: bool = False) -> Patch:
    """Replaces TRL's head in this process, for trainers made before and after; patching twice changes nothing.

    Supports gradient checkpointing of the backbone, activation offloading, gradient accumulation, autocast, softcap,
    logit scale, PEFT adapters outside the head, and the entropy as a metric or with a gradient. On the CPU only the
    scored positions are computed; TRL's own path computes all of them there.

    ``collators=True`` also replaces the collators of the DPO, KTO, SFT and reward trainers that are made from then on
    by those of `prefkern.integrations.trl.collators`, lets their dataloaders fetch rows as Arrow, and lets the DPO and
    KTO trainers take datasets of `prefkern.data.prepare` as they are: batches are equal, the time to make them is not.

    Raises:
        MissingDependency: TRL is not installed.
        ImportError: its version is not one of those that this replacement is known to fit.
    """
    return Patch(collators=collators)


def unpatch() -> None:
    """Gives TRL its own head, collators and dataloaders back; does nothing where `patch` is not in force."""
    _replaced_head.undo()
    _replaced_data.undo()


_INSTALL = ("prefkern.integrations.trl", "pip install 'prefkern[trl]'")


def _install(collators: bool) -> list[Replaced]:
    """Replaces what was not replaced before, and says what that was."""
    wanted = [_replaced_head] + [_replaced_data] * collators
    began = [replaced for replaced in wanted if not replaced]
    utils: Any = _supported_trl() if _replaced_head in began else None
    data: Any = None
    if _replaced_data in began:
        data = importlib.import_module("prefkern.integrations.trl.trainers")
        if _version() < data.FIRST or not data.fits():
            raise _unknown("patch(collators=True)", data.WORKS)
    if utils is not None:
        _replaced_head.set(utils, "_ChunkedLogProbFunction", _head)
        compacts = getattr(utils, "_use_triton", None)
        if compacts is not None:  # TRL's switch for handing over scored positions only
            _replaced_head.set(utils, "_use_triton", lambda device: device.type == "cpu" or compacts(device))
    if data is not None:
        data.replace(_replaced_data)
    return began


def _supported_trl() -> ModuleType:
    """TRL's module, if its version and the signature of its function are those this file was written for."""
    utils = require("trl.trainer.utils", *_INSTALL)
    numbers = _version()
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    if function is None and numbers == _FIRST:
        require("triton", "TRL 1.15's head", "pip install triton")
    found = "" if function is None else ", ".join(inspect.signature(function.forward).parameters)
    if not _FIRST <= numbers < _BELOW or found != _SIGNATURE:
        raise _unknown("this replacement", _WORKS)
    return utils


def _version() -> tuple[int, ...]:
    numbers = importlib.metadata.version("trl").split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in numbers)


def _unknown(what: str, works: str) -> ImportError:
    version = importlib.metadata.version("trl")
    return ImportError(
        f"prefkern.{_WHERE}: TRL {version} is not known to fit {what}, which works with {works}; nothing was replaced"
    )

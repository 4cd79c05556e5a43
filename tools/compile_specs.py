"""What `compile_report.py` compiles: every kernel in its real specialisations, as the launchers would call it.

No torch here: an old Triton is tried in an environment that has none. The kernels are loaded through a bare package, so
that ``prefkern/__init__.py`` (which imports torch) does not run.
"""

import importlib
import sys
import types
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent / "python" / "prefkern"
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Spec(NamedTuple):
    """One specialisation: a kernel and what it is given, its tile, and what may not be exceeded.

    An argument is described by a type as in ``*fp32:16`` (a pointer to float32, aligned to 16 bytes) or ``i32``, by a
    number if it is known when the kernel is compiled, by None if it is absent, or by a tuple of these.
    """

    kernel: Any
    label: str
    arguments: dict[str, Any]
    tile: Any
    bytes_per_element: int  # read in a main loop
    instructions: float  # ceiling, per element of a main loop
    registers: int = 64  # ceiling: then four blocks of 256 threads share a multiprocessor

    @property
    def name(self) -> str:
        """The kernel's, shortened."""
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")


def load(name: str) -> types.ModuleType:
    """Returns ``prefkern.kernels.triton.<name>`` without running ``prefkern/__init__.py``."""
    for parts in ((), ("kernels",), ("kernels", "triton")):
        package, path = ".".join(("prefkern", *parts)), ROOT.joinpath(*parts)
        if package not in sys.modules:
            bare = types.ModuleType(package)
            bare.__path__ = [str(path)]
            sys.modules[package] = bare
    return importlib.import_module(f"prefkern.kernels.triton.{name}")


def specs() -> list[Spec]:
    return [*_of_logits(), *_of_a_head(), *_scale(), *_divergence()]


# as in `prefkern.kernels.interface`, which imports torch
RowStats = namedtuple("RowStats", "logps row_max log_sum entropy log_sum_sq_probs mean_logit is_top1")
Factors = namedtuple("Factors", "c e")
DivergenceStats = namedtuple("DivergenceStats", "row_max log_sum ref_row_max ref_log_sum center")
DivergenceResults = namedtuple("DivergenceResults", "divergence entropy stats")
SOFTCAP_REGISTERS = 80  # bound by its arithmetic


def _pointer(dtype: str, given: bool = True) -> str | None:
    return f"*{dtype}:16" if given else None


def _matrix(dtype: str | None) -> Any:
    """A tile whose rows are aligned, or none."""
    return None if dtype is None else load("launch").Matrix(_pointer(dtype), "i32:16")


def _form(*, bias: bool = False, scale: bool = False, softcap: bool = False) -> Any:
    """How logits are made, with one temperature for all rows."""
    return load("launch").Form(
        _pointer("fp32", bias), "fp32" if scale else None, "fp32" if softcap else None, None, "fp32"
    )


def _stats(wanted: str) -> Any:
    """``"eqmt"``: entropy, log sum p^2, mean logit, top-1."""
    floats = (_pointer("fp32", letter in wanted) for letter in "eqm")
    return RowStats(*[_pointer("fp32")] * 3, *floats, _pointer("i1", "t" in wanted))


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _tile_fwd(dtype: str, held: str | None, wanted: str, form: Any, label: str, ceiling: float) -> Spec:
    module = load("logprobs")
    arguments = {"tile": _matrix(dtype), "targets_ptr": _pointer("i64"), "stats": _stats(wanted)}
    arguments |= {"held": _matrix(held), "form": form, "ignore_index": "i32", "V": "i32"}
    size = SIZES[dtype]
    tile = (module.SOFTCAP_FORWARD if form.softcap else module.FORWARD)[size]
    registers = SOFTCAP_REGISTERS if form.softcap else 64
    reads = size + (4 if form.bias else 0)
    return Spec(module._tile_fwd_kernel, label, arguments, tile, reads, ceiling, registers)


def _tile_bwd(dtype: str, out: str, factors: Any, form: Any, label: str, ceiling: float) -> Spec:
    module = load("logprobs")
    arguments = {"tile": _matrix(dtype), "targets_ptr": _pointer("i64"), "stats": _stats("e" if factors.e else "")}
    arguments |= {"factors": factors, "out": _matrix(out), "form": form}
    arguments |= {"ignore_index": "i32", "v_start": "i32", "V": "i32"}
    registers = SOFTCAP_REGISTERS if form.softcap else 64
    size = SIZES[dtype]
    return Spec(module._tile_bwd_kernel, label, arguments, module.BACKWARD[size], size, ceiling, registers)


def _of_logits() -> list[Spec]:
    """Logits of any dtype, whose gradient is written in it."""
    out = []
    for dtype, wanted, softcap, ceiling in (
        ("bf16", "", False, 8.5),
        ("bf16", "e", False, 11.5),
        ("bf16", "eqmt", False, 15.0),
        ("bf16", "e", True, 35.0),
        ("fp16", "e", False, 11.5),
        ("fp32", "e", False, 12.0),
    ):
        named = {"": "", "e": "entropy", "eqmt": "all"}[wanted]
        label = _words("logits", dtype, named, "softcap" if softcap else "")
        out.append(_tile_fwd(dtype, None, wanted, _form(softcap=softcap), label, ceiling))
    for dtype, entropy, softcap, ceiling in (
        ("bf16", False, False, 10.5),
        ("bf16", True, False, 16.0),
        ("bf16", True, True, 44.0),
        ("fp16", True, False, 15.5),
        ("fp32", True, False, 14.0),
    ):
        label = _words("logits", dtype, "entropy" if entropy else "", "softcap" if softcap else "")
        factors = Factors(_pointer("fp32"), _pointer("fp32", entropy))
        out.append(_tile_bwd(dtype, dtype, factors, _form(softcap=softcap), label, ceiling))
    return out


def _of_a_head() -> list[Spec]:
    """The float32 tile of a head's product, whose unscaled gradient is held in the operands' dtype."""
    out = []
    for held, wanted, full, ceiling in (
        (None, "", False, 9.5),
        ("bf16", "", False, 9.5),
        ("bf16", "e", False, 13.0),
        ("fp32", "e", False, 13.0),
        ("bf16", "eqmt", True, 42.0),
    ):
        named = {"": "", "e": "entropy", "eqmt": "all"}[wanted]
        label = _words("held", held or "none", named, "bias scale softcap" if full else "")
        form = _form(bias=full, scale=full, softcap=full)
        out.append(_tile_fwd("fp32", held, wanted, form, label, ceiling))
    for dtype, full, ceiling in (("bf16", False, 8.0), ("bf16", True, 44.0)):
        factors = Factors(_pointer("fp32", full), _pointer("fp32", full))
        label = _words(dtype, "c e scale softcap" if full else "")
        out.append(_tile_bwd("fp32", dtype, factors, _form(scale=full, softcap=full), label, ceiling))
    module = load("logprobs")
    for dtype in ("bf16", "fp32"):
        arguments = {"held": _matrix(dtype), "targets_ptr": _pointer("i64"), "stats": _stats("e")}
        arguments |= {"factors": Factors(_pointer("fp32"), _pointer("fp32")), "out": _matrix(dtype)}
        arguments |= {"ignore_index": "i32", "v_start": "i32", "V": "i32"}
        size = SIZES[dtype]
        out.append(Spec(module._held_bwd_kernel, dtype, arguments, module.BACKWARD[size], size, 26.5))
    return out


def _scale() -> list[Spec]:
    """Hidden states for their product, a product narrowed and in place, a frozen head's two gradients."""
    module = load("scale")
    out = []
    for dtype, written, post, other, ceiling in (
        ("bf16", "bf16", False, False, 5.0),
        ("fp16", "fp16", False, False, 5.0),
        ("fp32", "bf16", False, False, 6.0),
        ("fp32", "fp32", False, False, 6.0),
        ("fp32", "fp16", True, False, 6.0),
        ("bf16", "bf16", False, True, 8.5),
    ):
        label = _words(f"{dtype} to {written}", "post" if post else "", "other" if other else "")
        second = module.Other(_pointer(dtype), "i32:16", _pointer("fp32")) if other else None
        arguments = {"x": _matrix(dtype), "row_ptr": _pointer("fp32"), "row_step": "i32", "other": second}
        arguments |= {"post_ptr": _pointer("fp32", post), "out": _matrix(written), "H": "i32:16"}
        size = SIZES[dtype]
        tile = module.SCALE[size]
        out.append(Spec(module._scale_rows_kernel, label, arguments, tile, size * (1 + other), ceiling))
    return out


_MODES = {"forward": 0, "reverse": 1, "jsd": 2}


def _two(dtype: str, full: bool) -> Any:
    """Two tiles of logits, plain or with everything."""
    form = _form(bias=full, scale=full, softcap=full)
    return load("divergence").Two(_matrix(dtype), _matrix(dtype), form, form, _pointer("i1", full))


def _divergence_spec(
    kernel: Any, label: str, arguments: dict[str, Any], kind: str, written: str | None, ceiling: float
) -> Spec:
    module = load("divergence")
    two = arguments["two"]
    size = SIZES[two.tile.ptr.strip("*").removesuffix(":16")]
    arguments |= {"kind": module.Kind("fp32", "fp32" if written == "fp16" else None), "V": "i32", "MODE": _MODES[kind]}
    reads = 2 * size + (8 if two.form.bias else 0)
    registers = SOFTCAP_REGISTERS if two.form.softcap else 64
    return Spec(kernel, label, arguments, module.FORWARD[size], reads, ceiling, registers)


def _divergence() -> list[Spec]:
    module = load("divergence")
    stats = DivergenceStats(*[_pointer("fp32")] * 5)
    out = []
    for dtype, held, kind, full, ceiling in (
        ("fp32", "bf16", "forward", False, 28.0),
        ("fp32", "fp16", "reverse", False, 28.0),
        ("fp32", "bf16", "jsd", False, 48.0),
        ("fp32", "bf16", "forward", True, 85.0),
        ("fp32", "bf16", "jsd", True, 110.0),
        ("bf16", None, "reverse", False, 28.0),
    ):
        label = _words(kind, dtype, "held", held or "none", "all" if full else "")
        results = DivergenceResults(_pointer("fp32"), _pointer("fp32", full), stats)
        arguments = {"two": _two(dtype, full), "results": results, "held": _matrix(held)}
        out.append(_divergence_spec(module._divergence_fwd_kernel, label, arguments, kind, held, ceiling))
    for dtype, written, kind, full, ceiling in (
        ("fp32", "bf16", "forward", False, 19.0),
        ("fp32", "fp16", "reverse", False, 20.0),
        ("fp32", "bf16", "jsd", True, 108.0),
        ("bf16", "bf16", "reverse", False, 20.0),
    ):
        label = _words(kind, dtype, "to", written, "all" if full else "")
        arguments = {"two": _two(dtype, full), "kept": stats, "c_ptr": _pointer("fp32", dtype == "bf16")}
        arguments |= {"out": _matrix(written)}
        out.append(_divergence_spec(module._divergence_bwd_kernel, label, arguments, kind, written, ceiling))
    return out

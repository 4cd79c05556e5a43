"""What `compile_report.py` compiles: every kernel in its real specialisations, as the launchers would call it.

No torch here: an old Triton is tried in an environment that has none. The kernels are loaded through a bare package, so
that ``prefkern/__init__.py`` (which imports torch) does not run.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent / "python" / "prefkern"
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Spec(NamedTuple):
    """One specialisation: a kernel, what its pointers point to (absent ones are None), its flags and tile."""

    kernel: Any
    name: str  # the kernel's, shortened
    label: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    bytes_per_element: int  # read in a main loop
    instructions: float  # ceiling, per element of a main loop
    registers: int  # ceiling
    multiples: tuple[str, ...] = ()  # arguments that are multiples of 16 beside pointers and strides


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
    return [*_rowwise(), *_fold(), *_scale(), *_divergence()]


_STATS = {"logps_ptr": "fp32", "row_max_ptr": "fp32", "log_sum_ptr": "fp32"}
_OPTIONAL = {"entropy_ptr": "fp32", "log_sq_ptr": "fp32", "mean_ptr": "fp32", "top1_ptr": "i1"}
_FLAGS = ("HAS_ENTROPY", "HAS_SQ", "HAS_MEAN", "HAS_TOP1")


def _spec(
    module: Any, name: str, label: str, tile: Any, reads: int, ceiling: float, pointers: dict[str, str], **flags: Any
) -> Spec:
    kernel = getattr(module, f"_{name}_kernel")
    constants = {flag: flags.get(flag, False) for flag in kernel.arg_names if flag.startswith("HAS_")}
    constants |= {"MODE": flags["MODE"]} if "MODE" in flags else {}
    constants |= {"LANES": tile.lanes, "PER_LANE": tile.per_lane, "STAGES": tile.num_stages}
    # with 64 registers four blocks of 256 threads share a multiprocessor; the softcap is bound by its arithmetic
    registers = 80 if flags.get("HAS_SOFTCAP") else 64
    return Spec(kernel, name, label, pointers, constants, tile.num_warps, reads, ceiling, registers)


def _optional(wanted: str) -> tuple[dict[str, str], dict[str, bool]]:
    """``"eqmt"``: entropy, log sum p^2, mean logit, top-1."""
    chosen = [letter in wanted for letter in "eqmt"]
    pointers = {name: kind for (name, kind), on in zip(_OPTIONAL.items(), chosen, strict=True) if on}
    return pointers, dict(zip(_FLAGS, chosen, strict=True))


def _rowwise() -> list[Spec]:
    module = load("rowwise")
    out = []
    for dtype, wanted, softcap, ceiling in (
        ("bf16", "", False, 8.5),
        ("bf16", "e", False, 11.5),
        ("bf16", "eqmt", False, 15.0),
        ("bf16", "e", True, 35.0),
        ("fp16", "e", False, 11.5),
        ("fp32", "e", False, 12.0),
    ):
        pointers, flags = _optional(wanted)
        label = f"{dtype}{' entropy' if wanted == 'e' else ' all' if wanted else ''}{' softcap' if softcap else ''}"
        pointers = {"logits_ptr": dtype, "targets_ptr": "i64"} | _STATS | pointers
        size = SIZES[dtype]
        tile = (module.SOFTCAP_FORWARD if softcap else module.FORWARD)[size]
        out.append(_spec(module, "logprobs_fwd", label, tile, size, ceiling, pointers, HAS_SOFTCAP=softcap, **flags))
    for dtype, entropy, softcap, ceiling in (
        ("bf16", False, False, 10.5),
        ("bf16", True, False, 16.0),
        ("bf16", True, True, 44.0),
        ("fp16", True, False, 15.5),
        ("fp32", True, False, 14.0),
    ):
        label = f"{dtype}{' entropy' if entropy else ''}{' softcap' if softcap else ''}"
        pointers = {"logits_ptr": dtype, "targets_ptr": "i64", "c_ptr": "fp32", "grad_ptr": dtype} | _STATS
        pointers |= {"entropy_ptr": "fp32", "e_ptr": "fp32"} if entropy else {}
        size = SIZES[dtype]
        flags = {"HAS_SOFTCAP": softcap, "HAS_E": entropy}
        out.append(_spec(module, "logprobs_bwd", label, module.BACKWARD[size], size, ceiling, pointers, **flags))
    return out


def _fold() -> list[Spec]:
    module, backward = load("logprobs"), load("logprobs_bwd")
    out = []
    for held, wanted, bias, softcap, ceiling in (
        (None, "", False, False, 9.5),
        ("bf16", "", False, False, 9.5),
        ("bf16", "e", False, False, 13.0),
        ("fp32", "e", False, False, 13.0),
        ("bf16", "eqmt", True, True, 42.0),
    ):
        pointers, flags = _optional(wanted)
        label = f"held {held or 'none'}{' entropy' if wanted == 'e' else ' all' if wanted else ''}"
        label += f"{' bias' if bias else ''}{' softcap' if softcap else ''}"
        pointers = {"tile_ptr": "fp32", "targets_ptr": "i64"} | _STATS | pointers
        pointers |= ({"held_ptr": held} if held else {}) | ({"bias_ptr": "fp32"} if bias else {})
        reads = 8 if bias else 4
        flags |= {"HAS_HELD": held is not None, "HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
        out.append(_spec(module, "tile_fwd", label, module.FORWARD, reads, ceiling, pointers, **flags))
    for dtype, c, e, softcap, ceiling in (("bf16", False, False, False, 8.0), ("bf16", True, True, True, 44.0)):
        label = f"{dtype}{' c' if c else ''}{' e' if e else ''}{' softcap' if softcap else ''}"
        pointers = {"tile_ptr": "fp32", "targets_ptr": "i64", "out_ptr": dtype} | _STATS
        pointers |= ({"c_ptr": "fp32"} if c else {}) | ({"e_ptr": "fp32", "entropy_ptr": "fp32"} if e else {})
        flags = {"HAS_C": c, "HAS_E": e, "HAS_SOFTCAP": softcap}
        out.append(_spec(backward, "tile_bwd", label, backward.TILE_BACKWARD, 4, ceiling, pointers, **flags))
    for dtype in ("bf16", "fp32"):
        pointers = dict.fromkeys(("logps_ptr", "entropy_ptr", "c_ptr", "e_ptr"), "fp32")
        pointers |= {"held_ptr": dtype, "targets_ptr": "i64", "out_ptr": dtype}
        size = SIZES[dtype]
        out.append(_spec(backward, "held_bwd", dtype, backward.HELD_BACKWARD[size], size, 26.5, pointers))
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
        label = f"{dtype} to {written}{' post' if post else ''}{' other' if other else ''}"
        pointers = {"x_ptr": dtype, "row_ptr": "fp32", "out_ptr": written} | ({"post_ptr": "fp32"} if post else {})
        pointers |= {"other_ptr": dtype, "other_row_ptr": "fp32"} if other else {}
        size = SIZES[dtype]
        flags = {"HAS_POST": post, "HAS_OTHER": other}
        spec = _spec(module, "scale_rows", label, module.SCALE[size], size * (1 + other), ceiling, pointers, **flags)
        out.append(spec._replace(multiples=("H",)))
    return out


_ROW_STATS = dict.fromkeys(("row_max_ptr", "log_sum_ptr", "ref_row_max_ptr", "ref_log_sum_ptr", "center_ptr"), "fp32")
_MODES = {"forward": 0, "reverse": 1, "jsd": 2}


def _divergence() -> list[Spec]:
    module, backward = load("divergence"), load("divergence_bwd")
    out = []
    for dtype, held, kind, full, ceiling in (
        ("fp32", "bf16", "forward", False, 28.0),
        ("fp32", "fp16", "reverse", False, 28.0),
        ("fp32", "bf16", "jsd", False, 48.0),
        ("fp32", "bf16", "forward", True, 85.0),
        ("fp32", "bf16", "jsd", True, 110.0),
        ("bf16", None, "reverse", False, 28.0),
    ):
        label = f"{kind} {dtype} held {held or 'none'}{' all' if full else ''}"
        pointers = {"tile_ptr": dtype, "ref_tile_ptr": dtype, "divergence_ptr": "fp32"} | _ROW_STATS
        pointers |= {"held_ptr": held} if held else {}
        pointers |= {"scored_ptr": "i1", "entropy_ptr": "fp32"} if full else {}
        pointers |= {"bias_ptr": "fp32", "ref_bias_ptr": "fp32"} if full else {}
        flags = dict.fromkeys(
            ("HAS_SCORED", "HAS_ENTROPY", "HAS_BIAS", "HAS_REF_BIAS", "HAS_SOFTCAP", "HAS_REF_SOFTCAP"), full
        )
        flags |= {"HAS_HELD": held is not None, "HAS_PEAK": held == "fp16", "MODE": _MODES[kind]}
        size = SIZES[dtype]
        reads = 2 * size + (8 if full else 0)
        tile = module.FORWARD[size]
        out.append(_spec(module, "divergence_fwd", label, tile, reads, ceiling, pointers, **flags))
    for dtype, written, kind, full, ceiling in (
        ("fp32", "bf16", "forward", False, 19.0),
        ("fp32", "fp16", "reverse", False, 20.0),
        ("fp32", "bf16", "jsd", True, 108.0),
        ("bf16", "bf16", "reverse", False, 20.0),
    ):
        label = f"{kind} {dtype} to {written}{' all' if full else ''}"
        pointers = {"tile_ptr": dtype, "ref_tile_ptr": dtype, "out_ptr": written} | _ROW_STATS
        pointers |= {"scored_ptr": "i1", "bias_ptr": "fp32", "ref_bias_ptr": "fp32"} if full else {}
        pointers |= {"c_ptr": "fp32"} if dtype == "bf16" else {}
        flags = dict.fromkeys(("HAS_SCORED", "HAS_BIAS", "HAS_REF_BIAS", "HAS_SOFTCAP", "HAS_REF_SOFTCAP"), full)
        flags |= {"HAS_C": dtype == "bf16", "HAS_PEAK": written == "fp16", "MODE": _MODES[kind]}
        size = SIZES[dtype]
        reads = 2 * size + (8 if full else 0)
        tile = backward.BACKWARD[size]
        out.append(_spec(backward, "divergence_bwd", label, tile, reads, ceiling, pointers, **flags))
    return out

"""The one-line breaks that `mutants.py` makes: in a function of a kernel file, one text becomes another."""

from typing import NamedTuple

import mutant_divergence


class Mutant(NamedTuple):
    """``old`` stands exactly once in ``function``. ``survives`` says why no test can catch it without a GPU."""

    file: str
    function: str
    old: str
    new: str
    survives: str = ""


# Which tests see a break in a function soonest; a survivor of these meets all kernel tests.
_ROW_STATISTICS = (
    "test_rowwise and (argmax or special_rows or lowest or offset or far or exact_shapes or (statistics and float32))"
)
_ROW_GRADIENT = "test_rowwise and (special_rows or not_read or exact_shapes or (gradient and float32))"
_TILE_BWD = "test_fold and ((recomputed and float32) or not_read or offsets)"
_HELD_BWD = "held_tile or outside_a_slice or not_read or special_rows or offsets_beyond or log2 or expm1"
QUICK = {
    "expm1": "expm1",
    "log2": "log2",
    "tanh": "slope",
    "logits": "infinite or (test_forward and float32 and (plain or all))",
    "load_logits": "not_read or (test_forward and float32 and plain)",
    "_add": _ROW_STATISTICS,
    "_statistics": _ROW_STATISTICS,
    "_final": _ROW_STATISTICS,
    "write_statistics": _ROW_STATISTICS,
    "_gradient": _ROW_GRADIENT,
    "write_gradient": _ROW_GRADIENT,
    "_logprobs_fwd_kernel": "test_rowwise and ((statistics and float32) or far or offsets)",
    "logprobs_fwd": "test_rowwise and ((statistics and float32) or contiguous)",
    "_logprobs_bwd_kernel": "test_rowwise and ((gradient and float32) or any_ignore or offsets)",
    "logprobs_bwd": "test_rowwise and ((gradient and float32) or contiguous or grid)",
    "_tile_fwd_kernel": "test_fold and ((forward and float32) or not_read or offsets)",
    "tile_fwd": "test_fold and ((forward and float32) or contiguous)",
    "_tile_bwd_kernel": _TILE_BWD,
    "tile_bwd": _TILE_BWD,
    "_held_gradient": _HELD_BWD,
    "_held_bwd_kernel": _HELD_BWD,
    "held_bwd": _HELD_BWD,
    "_scale_rows_kernel": "test_scale and (float16 or not_read or one_factor or edges or offsets)",
    "scale_rows": "test_scale and (float16 or one_factor or strided or grid or plain_torch)",
}

_MATH = [
    ("expm1", "1.0 + x * (1.0 / 3.0) * series", "1.0 + x * (1.0 / 4.0) * series"),
    ("expm1", "x > -0.5", "x > -5.0"),
    ("expm1", "x > -0.5", "x > 0.5"),
    ("expm1", "tl.exp2(x * LOG2E) - 1.0", "tl.exp2(x) - 1.0"),
    ("log2", "exponent << 23", "exponent << 22"),
    ("log2", "0.48093945", "0.48103945"),
    ("log2", "bits - 0x3F3504F3", "bits - 0x3F800000"),
    ("log2", "bitcast=True) - 1.0", "bitcast=True) - 0.5"),
    ("tanh", "-2.0 * LOG2E", "-1.0 * LOG2E"),
    ("tanh", "1.0 - 2.0 * qr", "1.0 - qr"),
    ("tanh", "tl.abs(x) < 0.6", "tl.abs(x) < 1.0"),
    ("tanh", "tl.abs(x) < 0.6", "tl.abs(x) < 0.01"),
    ("tanh", "tl.where(x < 0.0, -far, far)", "tl.where(x < 0.0, far, far)"),
    ("tanh", "4.0 * qr * r", "4.0 * qr"),
    ("tanh", "1.0 - near * near", "1.0 - near"),
    ("tanh", "0.333332986", "0.333342986"),
    ("logits", "a = a + bias", "a = a - bias"),
    ("logits", "a = a * logit_scale", "a = a"),
    ("logits", "a * (1.0 / softcap)", "a * softcap"),
    ("logits", 'tl.where(a == float("-inf"), a, softcap * t)', "softcap * t"),
    ("load_logits", "row_ptr + cols, mask=mask, other=0.0", "row_ptr + cols"),
    ("load_logits", "bias_ptr + cols, mask=mask, other=0.0", "bias_ptr + cols"),
]

_STATISTICS = [
    ("_add", "best > m", "best >= m"),
    ("_add", "tl.maximum(m, best)", "best"),
    ("_add", "x - new[:, None]", "x - m[:, None]"),
    ("_add", "(e + step * s) * decay", "e * decay"),
    ("_add", "tl.where(decay > 0.0, (e + step * s) * decay, 0.0)", "(e + step * s) * decay"),
    ("_add", "tl.maximum(gap, LOWEST)", "gap"),
    ("_add", "q * decay * decay", "q * decay"),
    ("_add", "w * w, 1", "w, 1"),
    ("_add", "s = s * decay", "s = s"),
    ("_statistics", "log2e_t = LOG2E / temperature", "log2e_t = LOG2E * temperature"),
    ("_statistics", "(LANES,), LOWEST, tl.float32", "(LANES,), 0.0, tl.float32"),
    ("_statistics", "V // TILE * TILE", "(V + TILE - 1) // TILE * TILE"),
    ("_statistics", "V // TILE * TILE", "V // TILE * TILE - V % 2"),
    ("_statistics", 'tl.where(cols < V, x, float("-inf"))\n        m', "x\n        m"),
    ("_statistics", "main + groups, log2e_t", "groups, log2e_t"),
    ("_statistics", "tl.sum(s * decay, 0)", "tl.sum(s, 0)"),
    ("_statistics", "0) / mass / temperature", "0) / mass"),
    ("_statistics", "q * decay * decay, 0", "q * decay, 0"),
    ("_statistics", "2.0 * log_sum", "1.0 * log_sum"),
    ("_statistics", "dead = mass == 0.0", "dead = mass < 0.0"),
    ("_statistics", "/ V / temperature", "/ V"),
    ("_statistics", "m == row_max, argmax, V", "m == row_max, argmax, 0"),
    ("_statistics", "cols, V), 0) == y", "cols, V), 0) <= y"),
    ("_statistics", "(x_y - row_max) / temperature", "(x_y - row_max)"),
    (
        "_statistics",
        "tl.minimum((x_y - row_max) / temperature - log_sum, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "(x_y - row_max) / temperature - log_sum",
        "only a fused multiply-add makes it positive, and the interpreter fuses nothing; "
        "`test_log_probabilities_are_never_positive` sees it on a GPU",
    ),
    ("_statistics", 'row_max = tl.where(dead, float("-inf"), row_max)', "row_max = row_max"),
    ("_final", 'tl.where(outside, float("nan"), value)', "value"),
    ("_final", "value), 0.0)", "value), 1.0)"),
    ("write_statistics", "(target < 0) | (target >= V)", "(target >= V)"),
    ("write_statistics", "(target < 0) | (target >= V)", "(target < 0) | (target > V)"),
    ("write_statistics", "scored & (target >= 0) & (target < V), target", "scored, target"),
    ("write_statistics", "top1 & scored", "top1"),
]

_GRADIENT = [
    ("_gradient", "* log2e_t - log2_sum", "* log2e_t + log2_sum"),
    ("_gradient", "(x - row_max)", "x"),
    ("_gradient", "tl.where(cols == y, at_target, p)", "tl.where(cols == y, p + at_target, p)"),
    ("_gradient", "g = g * c", "g = g"),
    ("_gradient", "* LN2 + entropy", "+ entropy"),
    ("_gradient", "* LN2 + entropy", "* LN2 - entropy"),
    ("_gradient", "tl.maximum(log2_p, -1000.0)", "log2_p"),
    ("_gradient", "tl.maximum(log2_p, -1000.0)", "tl.maximum(log2_p, -5.0)"),
    ("_gradient", "g = g * slope", "g = g"),
    ("write_gradient", 'scored & (row_max > float("-inf"))', "scored"),
    ("write_gradient", 'scored & (row_max > float("-inf"))', 'row_max > float("-inf")'),
    ("write_gradient", "tl.where(scored, log_sum * LOG2E, 0.0)", "log_sum * LOG2E"),
    ("write_gradient", "tl.where(scored, log_sum * LOG2E, 0.0)", "tl.where(scored, log_sum, 0.0)"),
    ("write_gradient", 'scored & (logps != float("-inf"))', "scored"),
    ("write_gradient", "LOG2E / tl.where(scored, temperature, 1.0)", "LOG2E / temperature"),
    ("write_gradient", "entropy = tl.where(scored, entropy, 0.0)", "entropy = entropy + 0.0"),
    ("write_gradient", "c = tl.where(scored, c, 0.0)", "c = c + 0.0"),
    ("write_gradient", "e = tl.where(scored, e, 0.0)", "e = e + 0.0"),
    ("write_gradient", "V // TILE * TILE", "(V + TILE - 1) // TILE * TILE"),
    ("write_gradient", "cols, scored, logit_scale", "cols, None, logit_scale"),
    ("write_gradient", "(y >= v)", "(y > v)"),
    ("write_gradient", "(y < v + TILE)", "(y < v + TILE - 1)"),
    ("write_gradient", "y >= main", "y > main"),
    ("write_gradient", "(cols < V) & scored", "cols < V"),
    ("write_gradient", "(cols < V) & scored", "(cols < V + 1) & scored"),
    ("write_gradient", "mask=cols < V)", "mask=cols < V + 1)"),
]

_FWD, _BWD = "_logprobs_fwd_kernel", "_logprobs_bwd_kernel"
_ROWWISE = [
    (_FWD, "row * stride", "row * V"),
    (_FWD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_FWD, "tl.load(temperature_ptr + row)", "tl.load(temperature_ptr)"),
    (_FWD, "tl.load(targets_ptr + row).to(tl.int64)", "tl.load(targets_ptr + row).to(tl.int32)"),
    (_FWD, "        entropy_ptr,\n        log_sq_ptr,", "        log_sq_ptr,\n        entropy_ptr,"),
    (_BWD, "logits_ptr + row * stride", "logits_ptr + row * grad_stride"),
    (_BWD, "row * grad_stride", "row * stride"),
    (_BWD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_BWD, "tl.load(temperature_ptr + row)", "tl.load(temperature_ptr)"),
    (_BWD, "target != ignore_index", "target != -100"),
    (_BWD, "-tl.load(c_ptr + row) / temperature", "tl.load(c_ptr + row) / temperature"),
    (_BWD, "-tl.load(c_ptr + row) / temperature", "-tl.load(c_ptr + row)"),
    (_BWD, "-tl.load(e_ptr + row) / temperature", "-tl.load(e_ptr + row)"),
    (_BWD, "tl.load(row_max_ptr + row)", "tl.load(log_sum_ptr + row)"),
    ("logprobs_fwd", "HAS_SOFTCAP=softcap is not None", "HAS_SOFTCAP=False"),
    ("logprobs_fwd", "HAS_ENTROPY=stats.entropy is not None", "HAS_ENTROPY=False"),
    ("logprobs_fwd", "[(N,)]", "[(N - 1,)]"),
    ("logprobs_bwd", "HAS_SOFTCAP=softcap is not None", "HAS_SOFTCAP=False"),
    ("logprobs_bwd", "            logits.stride(0),", "            V,"),
    ("logprobs_bwd", "[(N,)]", "[(1, N)]"),
    ("logprobs_bwd", "c=c, e=e", "e=e"),
]

_TILE = "_tile_fwd_kernel"
_FOLD = [
    (_TILE, "tile_ptr + row * stride", "tile_ptr + row * V"),
    (_TILE, "row * held_stride", "row * stride"),
    (_TILE, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_TILE, "tl.load(temperature_ptr + row)", "tl.load(temperature_ptr)"),
    (_TILE, "target != ignore_index", "target >= 0"),
    (_TILE, "            logps,\n            row_max,", "            row_max,\n            logps,"),
    (_TILE, "            log_sum,\n            0.0,", "            row_max,\n            0.0,"),
    (_TILE, "        HAS_BIAS,\n        True,", "        HAS_BIAS,\n        False,"),
    (_TILE, "            HAS_BIAS,\n            True,", "            HAS_BIAS,\n            False,"),
    (_TILE, "            HAS_BIAS,\n            True,", "            False,\n            True,"),
    ("tile_fwd", "HAS_TEMPERATURE=rows is not None", "HAS_TEMPERATURE=False"),
    ("tile_fwd", "HAS_SQ=stats.log_sum_sq_probs is not None", "HAS_SQ=False"),
    ("tile_fwd", "            tile.stride(0),", "            V,"),
    ("tile_fwd", "[(C,)]", "[(C - 1,)]"),
    ("tile_fwd", "temperature=rows, held=held)", "temperature=rows)"),
]

_TBWD, _HGRAD, _HBWD = "_tile_bwd_kernel", "_held_gradient", "_held_bwd_kernel"
_FOLD_BWD = [
    (_TBWD, "tile_ptr + row * stride", "tile_ptr + row * V"),
    (_TBWD, "row * out_stride", "row * stride"),
    (_TBWD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_TBWD, "target - v_start", "target"),
    (_TBWD, "tl.load(entropy_ptr + row)", "tl.load(log_sum_ptr + row)"),
    (_TBWD, "target != ignore_index", "target != -1"),
    (_TBWD, "        HAS_BIAS,\n        True,", "        HAS_BIAS,\n        False,"),
    (_HGRAD, "tl.where(cols == y, p_y, u)", "u"),
    (_HGRAD, "u = tl.where(cols == y, u_y, u)", "u = u + 0.0"),
    (_HGRAD, "c * u", "c * p"),
    (_HGRAD, "log2(p) * LN2", "log2(p)"),
    (_HBWD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_HBWD, "scored & (target >= 0) & (target < V), target", "scored, target"),
    (_HBWD, "tl.where(scored, tl.load(entropy_ptr + row), 0.0)", "tl.load(entropy_ptr + row)"),
    (_HBWD, "tl.where(scored, tl.load(c_ptr + row), 0.0)", "tl.load(c_ptr + row)"),
    (_HBWD, "tl.where(scored, tl.load(e_ptr + row), 0.0)", "tl.load(e_ptr + row)"),
    (_HBWD, "tl.exp2(logps * LOG2E)", "tl.exp2(logps)"),
    (_HBWD, 'tl.where(logps == float("-inf"), 0.0, expm1(logps))', "expm1(logps)"),
    (_HBWD, "held_ptr + row * stride", "held_ptr + row * out_stride"),
    (_HBWD, "row * out_stride", "row * stride"),
    (_HBWD, "(y >= v)", "(y > v)"),
    (_HBWD, "(y < v + TILE)", "(y < v + TILE - 1)"),
    (_HBWD, "y >= main", "y > main"),
    (_HBWD, "mask=(cols < V) & scored", "mask=cols < V"),
    (_HBWD, "mask=(cols < V) & scored", "mask=(cols < V + 1) & scored"),
    (_HBWD, "mask=cols < V)", "mask=cols < V + 1)"),
    ("tile_bwd", "            out.stride(0),", "            V,"),
    ("held_bwd", "[(K,)]", "[(K - 1,)]"),
]

_SCALE_ROWS = "_scale_rows_kernel"
_SCALE = [
    (_SCALE_ROWS, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_SCALE_ROWS, "row * row_step", "row"),
    (_SCALE_ROWS, "tl.load(other_row_ptr + row)", "tl.load(other_row_ptr)"),
    (_SCALE_ROWS, "factor = factor * post\n        other", "factor = factor + post\n        other"),
    (_SCALE_ROWS, "other_factor = other_factor * post", "other_factor = other_factor + 0.0"),
    (_SCALE_ROWS, "(factor != 0.0) | (other_factor != 0.0)", "factor != 0.0"),
    (_SCALE_ROWS, "(factor != 0.0) | (other_factor != 0.0)", "(factor != 0.0) & (other_factor != 0.0)"),
    (_SCALE_ROWS, "(factor != 0.0) | (other_factor != 0.0)", "factor == factor"),
    (_SCALE_ROWS, "[:, None] * PER_LANE", "[:, None] * (PER_LANE + 1)"),
    (_SCALE_ROWS, "cols < H", "cols < H + 1"),
    (_SCALE_ROWS, "cols < H", "cols < H - 1"),
    (_SCALE_ROWS, "x_ptr + row * stride", "x_ptr + row * out_stride"),
    (_SCALE_ROWS, "other=0.0).to(tl.float32) * factor", "other=0.0).to(tl.float32)"),
    (_SCALE_ROWS, "row * other_stride", "row * stride"),
    (_SCALE_ROWS, "y += z.to", "y = z.to"),
    (_SCALE_ROWS, "row * out_stride", "row * stride"),
    (_SCALE_ROWS, "y.to(dtype), mask=inside)", "y.to(dtype), mask=inside & read)"),
    ("scale_rows", "x.contiguous()", "x"),
    ("scale_rows", "x is not out", "x is out"),
    (
        "scale_rows",
        "min(x.element_size(), 4)",
        "4",
        "a tile of half the lanes' width gives the same numbers: the load width is the compile report's to assert",
    ),
    ("scale_rows", "[(N,)]", "[(N - 1,)]"),
    ("scale_rows", "other_row=second_row, out=out)", "other_row=second_row)"),
    ("scale_rows", "            row.stride(0),", "            1,"),
    ("scale_rows", "HAS_POST=post is not None", "HAS_POST=False"),
]

MUTANTS = [
    Mutant(file, *entry)
    for file, entries in (
        *mutant_divergence.ENTRIES.items(),
        ("math.py", _MATH),
        ("row.py", _STATISTICS),
        ("row_gradient.py", _GRADIENT),
        ("rowwise.py", _ROWWISE),
        ("logprobs.py", _FOLD),
        ("logprobs_bwd.py", _FOLD_BWD),
        ("scale.py", _SCALE),
    )
    for entry in entries
]


def quick_tests(mutant: Mutant) -> str:
    """The tests that should see a break soonest; a function's name may stand in several files."""
    return mutant_divergence.QUICK.get((mutant.file, mutant.function)) or QUICK[mutant.function]

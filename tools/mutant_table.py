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
    "test_logprobs and (argmax or special_rows or lowest or offset or far or exact_shapes or statistics or any_ignore)"
)
_ROW_GRADIENT = "test_logprobs_backward and (special_rows or not_read or exact_shapes or (gradient and float32) or far)"
_FORWARD = "test_logprobs and ((forward and float32) or statistics or not_read or offsets or contiguous or grid)"
_TILE_BWD = "(recomputed and float32) or not_read or beyond or (test_gradient and float32) or any_ignore or contiguous"
_HELD_BWD = "held_tile or outside_a_slice or not_read or special_rows or beyond or log2 or expm1"
QUICK = {
    "expm1": "expm1",
    "log2": "log2",
    "tanh": "slope",
    "temperature_of": "test_logprobs and (statistics or (test_gradient and float32))",
    "_load": "not_read or exact_shapes or (test_forward and float32 and plain)",
    "load_logits": "infinite or not_read or (test_forward and float32 and (plain or all))",
    "_add": _ROW_STATISTICS,
    "_add_total": _ROW_STATISTICS,
    "_store": _ROW_STATISTICS,
    "write_statistics": _ROW_STATISTICS,
    "_gradient": _ROW_GRADIENT,
    "write_gradient": _ROW_GRADIENT,
    "_tile_fwd_kernel": _FORWARD,
    "tile_fwd": _FORWARD,
    "_tile_bwd_kernel": _TILE_BWD,
    "tile_bwd": _TILE_BWD,
    "_held_gradient": _HELD_BWD,
    "_held_bwd_kernel": _HELD_BWD,
    "held_bwd": _HELD_BWD,
    "matrix": "test_logprobs and ((forward and float32) or beyond)",
    "form_of": "test_logprobs and ((forward and float32) or statistics)",
    "launch": "test_logprobs and ((forward and float32) or exact_shapes or grid)",
    "check_rows": "contiguous or strided",
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
]

_LOGITS = [
    ("temperature_of", "form.row_temperature + i", "form.row_temperature"),
    ("temperature_of", "form.row_temperature is not None", "form.row_temperature is None"),
    ("_load", "ptr, mask=mask, other=0.0", "ptr"),
    ("load_logits", "x = x + _load(row.form.bias + cols, mask)", "x = x - _load(row.form.bias + cols, mask)"),
    ("load_logits", "_load(row.form.bias + cols, mask)", "_load(row.form.bias + cols, None)"),
    ("load_logits", "_load(row.ptr + cols, mask)", "_load(row.ptr + cols, None)"),
    ("load_logits", "x = x * row.form.scale", "x = x"),
    ("load_logits", "x * (1.0 / row.form.softcap)", "x * row.form.softcap"),
    ("load_logits", 'tl.where(x == float("-inf"), x, row.form.softcap * t)', "row.form.softcap * t"),
]

_WRITE = "write_statistics"
_STATISTICS = [
    ("_add", "best > sums.m", "best >= sums.m"),
    ("_add", "tl.maximum(sums.m, best)", "best"),
    ("_add", "x - new[:, None]", "x - sums.m[:, None]"),
    ("_add", "(e + step * sums.s) * decay", "e * decay"),
    ("_add", "tl.where(decay > 0.0, (e + step * sums.s) * decay, 0.0)", "(e + step * sums.s) * decay"),
    ("_add", "tl.maximum(gap, LOWEST)", "gap"),
    ("_add", "q * decay * decay", "q * decay"),
    ("_add", "w * w, 1", "w, 1"),
    ("_add", "sums.s * decay + tl.sum(w, 1)", "sums.s + tl.sum(w, 1)"),
    ("_add_total", "total -= tl.sum(-x, 1)", "total -= tl.sum(-x, 1) * 0.5"),
    ("_store", 'tl.where(outside, float("nan"), value)', "value"),
    ("_store", "value), 0.0)", "value), 1.0)"),
    (_WRITE, "(target < 0) | (target >= V)", "(target >= V)"),
    (_WRITE, "(target < 0) | (target >= V)", "(target < 0) | (target > V)"),
    (_WRITE, "tl.where(scored & ~outside, target, 0)", "tl.where(scored, target, 0)"),
    (_WRITE, "tl.where(scored, V, 0)", "V"),
    (_WRITE, "log2e_t = LOG2E / row.temperature", "log2e_t = LOG2E * row.temperature"),
    (_WRITE, "(LANES,), LOWEST, tl.float32", "(LANES,), 0.0, tl.float32"),
    (_WRITE, "columns // STEP * STEP", "(columns + STEP - 1) // STEP * STEP"),
    (_WRITE, "columns // STEP * STEP", "columns // STEP * STEP - columns % 2"),
    (_WRITE, 'tl.where(cols < columns, x, float("-inf")), main', "x, main"),
    (_WRITE, "main + groups, log2e_t", "groups, log2e_t"),
    (_WRITE, "tl.sum(sums.s * decay, 0)", "tl.sum(sums.s, 0)"),
    (_WRITE, "e / mass / row.temperature", "e / mass"),
    (_WRITE, "sums.q * decay * decay, 0", "sums.q * decay, 0"),
    (_WRITE, "2.0 * log_sum", "1.0 * log_sum"),
    (_WRITE, "dead = mass == 0.0", "dead = mass < 0.0"),
    (_WRITE, "/ columns / row.temperature", "/ columns"),
    (_WRITE, "sums.m == row_max, sums.argmax, columns", "sums.m == row_max, sums.argmax, 0"),
    (_WRITE, "cols, columns), 0) == y", "cols, columns), 0) <= y"),
    (_WRITE, "top1 & scored & ~outside", "top1 & ~outside"),
    (_WRITE, "stats.entropy + i, log_sum", "stats.entropy, log_sum"),
    (_WRITE, "(x_y - row_max) / row.temperature", "(x_y - row_max)"),
    (
        _WRITE,
        "tl.minimum((x_y - row_max) / row.temperature - log_sum, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "(x_y - row_max) / row.temperature - log_sum",
        "only a fused multiply-add makes it positive, and the interpreter fuses nothing; "
        "`test_log_probabilities_are_never_positive` sees it on a GPU",
    ),
    (_WRITE, 'tl.where(dead, float("-inf"), row_max)', "row_max"),
]

_GRADIENT = [
    ("_gradient", "* entry.log2e_t - entry.log2_sum", "* entry.log2e_t + entry.log2_sum"),
    ("_gradient", "(x - entry.row_max)", "x"),
    ("_gradient", "tl.where(cols == entry.y, entry.at_target, p)", "tl.where(cols == entry.y, p + entry.at_target, p)"),
    ("_gradient", "g = g * entry.c", "g = g"),
    ("_gradient", "* LN2 + entry.entropy", "+ entry.entropy"),
    ("_gradient", "* LN2 + entry.entropy", "* LN2 - entry.entropy"),
    ("_gradient", "tl.maximum(log2_p, -1000.0)", "log2_p"),
    ("_gradient", "tl.maximum(log2_p, -1000.0)", "tl.maximum(log2_p, -5.0)"),
    ("_gradient", "g = g * slope", "g = g"),
    ("write_gradient", 'scored & (given.row_max > float("-inf"))', "scored"),
    ("write_gradient", 'scored & (given.row_max > float("-inf"))', 'given.row_max > float("-inf")'),
    ("write_gradient", "tl.where(scored, given.log_sum * LOG2E, 0.0)", "given.log_sum * LOG2E"),
    ("write_gradient", "tl.where(scored, given.log_sum * LOG2E, 0.0)", "tl.where(scored, given.log_sum, 0.0)"),
    ("write_gradient", 'scored & (given.logps != float("-inf"))', "scored"),
    ("write_gradient", "LOG2E / tl.where(scored, row.temperature, 1.0)", "LOG2E / row.temperature"),
    ("write_gradient", "entropy = tl.where(scored, entropy, 0.0)", "entropy = entropy + 0.0"),
    ("write_gradient", "c = tl.where(scored, c, 0.0)", "c = c + 0.0"),
    ("write_gradient", "e = tl.where(scored, e, 0.0)", "e = e + 0.0"),
    ("write_gradient", "V // STEP * STEP", "(V + STEP - 1) // STEP * STEP"),
    ("write_gradient", "cols, scored)", "cols, None)"),
    ("write_gradient", "(y >= v)", "(y > v)"),
    ("write_gradient", "(y < v + STEP)", "(y < v + STEP - 1)"),
    ("write_gradient", "y >= main", "y > main"),
    ("write_gradient", "(cols < V) & scored", "cols < V"),
    ("write_gradient", "(cols < V) & scored", "(cols < V + 1) & scored"),
    ("write_gradient", "mask=cols < V)", "mask=cols < V + 1)"),
]

_TILE, _TBWD, _HGRAD, _HBWD = "_tile_fwd_kernel", "_tile_bwd_kernel", "_held_gradient", "_held_bwd_kernel"
_LOGPROBS = [
    (_TILE, "tile.ptr + i * tile.stride", "tile.ptr + i * V"),
    (_TILE, "i * held.stride", "i * tile.stride"),
    (_TILE, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_TILE, "tl.load(targets_ptr + i).to(tl.int64)", "tl.load(targets_ptr + i).to(tl.int32)"),
    (_TILE, "temperature_of(form, i)", "temperature_of(form, 0)"),
    (_TILE, "y != ignore_index", "y >= 0"),
    (_TILE, "y, logps, row_max, log_sum", "y, row_max, logps, log_sum"),
    (_TILE, "y, logps, row_max, log_sum", "y, logps, row_max, row_max"),
    ("tile_fwd", "targets, stats, matrix(held)", "targets, stats._replace(log_sum_sq_probs=None), matrix(held)"),
    ("tile_fwd", "held=held, form=form", "form=form"),
    ("tile_fwd", "stats=stats, ", ""),
    (_TBWD, "tile.ptr + i * tile.stride", "tile.ptr + i * V"),
    (_TBWD, "i * out.stride", "i * tile.stride"),
    (_TBWD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_TBWD, "temperature_of(form, i)", "temperature_of(form, 0)"),
    (_TBWD, "y - v_start", "y"),
    (_TBWD, "tl.load(stats.entropy + i)", "tl.load(stats.log_sum + i)"),
    (_TBWD, "tl.load(stats.row_max + i)", "tl.load(stats.log_sum + i)"),
    (_TBWD, "y != ignore_index", "y != -1"),
    (_TBWD, "y != ignore_index", "y != -100"),
    (_TBWD, "tl.load(factors.c + i) if factors.c is not None else None", "None"),
    (_TBWD, "tl.load(factors.e + i)", "tl.load(factors.e)"),
    ("tile_bwd", "factors=factors, ", ""),
    ("tile_bwd", "matrix(out), form", "matrix(tile), form"),
    ("tile_bwd", "logits.ignore_index", "-100"),
    (_HGRAD, "tl.where(cols == entry.y, entry.p_y, u)", "u"),
    (_HGRAD, "u = tl.where(cols == entry.y, entry.u_y, u)", "u = u + 0.0"),
    (_HGRAD, "entry.c * u", "entry.c * p"),
    (_HGRAD, "log2(p) * LN2", "log2(p)"),
    (_HBWD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_HBWD, "target - v_start", "target"),
    (_HBWD, "scored & (y >= 0) & (y < V), y", "scored, y"),
    (_HBWD, "tl.where(scored, tl.load(stats.entropy + i), 0.0)", "tl.load(stats.entropy + i)"),
    (_HBWD, "tl.where(scored, tl.load(factors.c + i), 0.0)", "tl.load(factors.c + i)"),
    (_HBWD, "tl.where(scored, tl.load(factors.e + i), 0.0)", "tl.load(factors.e + i)"),
    (_HBWD, "tl.exp2(logps * LOG2E)", "tl.exp2(logps)"),
    (_HBWD, 'tl.where(logps == float("-inf"), 0.0, expm1(logps))', "expm1(logps)"),
    (_HBWD, "held.ptr + i * held.stride", "held.ptr + i * out.stride"),
    (_HBWD, "i * out.stride", "i * held.stride"),
    (_HBWD, "(y >= v)", "(y > v)"),
    (_HBWD, "(y < v + STEP)", "(y < v + STEP - 1)"),
    (_HBWD, "y >= main", "y > main"),
    (_HBWD, "mask=(cols < V) & scored", "mask=cols < V"),
    (_HBWD, "mask=(cols < V) & scored", "mask=(cols < V + 1) & scored"),
    (_HBWD, "mask=cols < V)", "mask=cols < V + 1)"),
    ("held_bwd", "held=held, ", ""),
    ("held_bwd", "v_start, held.shape[1]", "0, held.shape[1]"),
]

_LAUNCH = [
    ("matrix", "tensor.stride(0)", "tensor.shape[1]"),
    ("form_of", "logits.logit_scale == 1.0", "logits.logit_scale != 1.5"),
    (
        "form_of",
        "Form(logits.bias, scale, logits.softcap, None, logits.temperature)",
        "Form(None, scale, logits.softcap, None, logits.temperature)",
    ),
    ("form_of", "logits.softcap, logits.temperature, None", "None, logits.temperature, None"),
    ("launch", "rows.shape[0] == 0", "rows.shape[0] == 1"),
    ("launch", "[(rows.shape[0],)]", "[(rows.shape[0] - 1,)]"),
    ("launch", "[(rows.shape[0],)]", "[(1, rows.shape[0])]"),
    ("check_rows", "value.shape[-1] > 1", "value.shape[-1] > 4"),
    ("check_rows", "value.stride(-1) != 1", "value.stride(0) == 0"),
    ("check_rows", "check_rows(where, **value._asdict())", "pass"),
]

_SCALE_ROWS = "_scale_rows_kernel"
_SCALE = [
    (_SCALE_ROWS, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    (_SCALE_ROWS, "i * row_step", "i"),
    (_SCALE_ROWS, "tl.load(other.row_ptr + i)", "tl.load(other.row_ptr)"),
    (_SCALE_ROWS, " factor = factor * tl.load(post_ptr)", " factor = factor + tl.load(post_ptr)"),
    (_SCALE_ROWS, "other_factor = other_factor * tl.load(post_ptr)", "other_factor = other_factor + 0.0"),
    (_SCALE_ROWS, "read | (other_factor != 0.0)", "read"),
    (_SCALE_ROWS, "read | (other_factor != 0.0)", "read & (other_factor != 0.0)"),
    (_SCALE_ROWS, "read = factor != 0.0", "read = factor == factor"),
    (_SCALE_ROWS, "[:, None] * PER_LANE", "[:, None] * (PER_LANE + 1)"),
    (_SCALE_ROWS, "cols < H", "cols < H + 1"),
    (_SCALE_ROWS, "cols < H", "cols < H - 1"),
    (_SCALE_ROWS, "x.ptr + i * x.stride", "x.ptr + i * out.stride"),
    (_SCALE_ROWS, "other=0.0).to(tl.float32) * factor", "other=0.0).to(tl.float32)"),
    (_SCALE_ROWS, "i * other.stride", "i * x.stride"),
    (_SCALE_ROWS, "y += z.to", "y = z.to"),
    (_SCALE_ROWS, "i * out.stride", "i * x.stride"),
    (_SCALE_ROWS, "y.to(dtype), mask=inside)", "y.to(dtype), mask=inside & read)"),
    ("scale_rows", "x.contiguous()", "x"),
    ("scale_rows", "x is not out", "x is out"),
    (
        "scale_rows",
        "min(x.element_size(), 4)",
        "4",
        "a tile of half the lanes' width gives the same numbers: the load width is the compile report's to assert",
    ),
    ("scale_rows", "other_row=second_row, out=out)", "other_row=second_row)"),
    ("scale_rows", "row.stride(0)", "1"),
    ("scale_rows", "given, post, matrix", "given, None, matrix"),
]

MUTANTS = [
    Mutant(file, *entry)
    for file, entries in (
        *mutant_divergence.ENTRIES.items(),
        ("math.py", _MATH),
        ("launch.py", _LAUNCH),
        ("row.py", _LOGITS + _STATISTICS + _GRADIENT),
        ("logprobs.py", _LOGPROBS),
        ("scale.py", _SCALE),
    )
    for entry in entries
]


def quick_tests(mutant: Mutant) -> str:
    """The tests that should see a break soonest; a function's name may stand in several files."""
    return mutant_divergence.QUICK.get((mutant.file, mutant.function)) or QUICK[mutant.function]

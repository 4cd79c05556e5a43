"""The fold of two logit tiles into a divergence and back, against float64, through guard bands and poison."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from cases import FLOAT, ROWS, guarded
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import DivergenceResults, DivergenceStats, Logits, TilePair

BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}
PEAK = 2.0**14


def case_of(
    name: str, device: torch.device, columns: int, rows: int = ROWS, dtype: torch.dtype = FLOAT, ignored: float = 0.2
) -> TilePair:
    """``plain``, or ``all``: bias, scale, softcap and a temperature per row of both heads, each its own."""
    one = testing.logit_case(rows, columns, device=device, dtype=dtype, ignored=ignored)
    two = testing.logit_case(rows, columns, device=device, dtype=dtype, seed=1)
    scored = one.targets != testing.IGNORE if ignored else None
    if name == "plain":
        return TilePair(one.logits, two.logits, scored, Logits(), Logits())
    bias, ref_bias = torch.randn(2, columns, generator=torch.Generator().manual_seed(2)).to(device)
    temperature = torch.linspace(0.5, 1.7, rows).to(device)
    form = Logits(bias, 0.8, 5.0, temperature)
    return TilePair(one.logits, two.logits, scored, form, Logits(ref_bias, 1.3, 7.0, temperature.flip(0).contiguous()))


class Folded(NamedTuple):
    divergence: Tensor
    entropy: Tensor | None
    stats: DivergenceStats
    held: Tensor | None


def _guarded(case: TilePair, guard: testing.Guards, row_gap: int, ref_row_gap: int) -> TilePair:
    tiles = guard(case.tile, row_gap=row_gap), guard(case.ref_tile, row_gap=ref_row_gap)
    return TilePair(*tiles, guard(case.scored), guarded(case.logits, guard), guarded(case.ref_logits, guard))


def fold(
    case: TilePair,
    beta: float,
    held_dtype: torch.dtype | None = FLOAT,
    *,
    entropy: bool = True,
    peak: float | None = None,
) -> Folded:
    """`tile_fwd` behind guards, with gaps between the rows."""
    from prefkern.kernels.triton import divergence as kernels

    guard = testing.Guards()
    N, device = len(case.tile), case.tile.device

    def new() -> Tensor:
        return guard(testing.poisoned(N, dtype=FLOAT, device=device))

    held = None
    if held_dtype is not None:
        held = guard(testing.poisoned(*case.tile.shape, dtype=held_dtype, device=device), row_gap=3)
    results = DivergenceResults(new(), new() if entropy else None, DivergenceStats._make(new() for _ in range(5)))
    kernels.tile_fwd(_guarded(case, guard, 5, 7), results, held, beta=beta, peak=peak)
    guard.check()
    return Folded(*results, held)


def tile_bwd(
    case: TilePair,
    stats: DivergenceStats,
    beta: float,
    c: Tensor | None = None,
    dtype: torch.dtype = FLOAT,
    *,
    peak: float | None = None,
) -> Tensor:
    from prefkern.kernels.triton import divergence as kernels

    guard = testing.Guards()
    out = guard(testing.poisoned(*case.tile.shape, dtype=dtype, device=case.tile.device), row_gap=4)
    given = DivergenceStats._make(map(guard, stats))
    kernels.tile_bwd(_guarded(case, guard, 2, 1), given, guard(c), out, beta=beta, peak=peak)
    guard.check()
    return out


def oracle(case: TilePair) -> dict[str, Any]:
    return {"scored": case.scored, "form": case.logits, "ref_form": case.ref_logits}


def unscaled(
    case: TilePair, beta: float, factor: Tensor | None = None, out: torch.dtype = FLOAT
) -> tuple[Tensor, Tensor]:
    """``u`` in float64, and by float32 rounded to ``out``; times a row's factor."""
    scale = 1.0 if factor is None else factor[:, None].double()
    want = testing.unscaled_divergence(case.tile, case.ref_tile, beta=beta, **oracle(case)) * scale
    eager = testing.unscaled_divergence(case.tile, case.ref_tile, beta=beta, dtype=FLOAT, **oracle(case)) * scale
    return want, eager.to(out)


def assert_values(got: Folded, case: TilePair, beta: float) -> None:
    wide = [
        testing.divergence_from_logits(*case[:2], beta=beta, dtype=d, **oracle(case)) for d in (torch.float64, FLOAT)
    ]
    testing.assert_not_worse(got.divergence, *wide, name="divergence")
    if got.entropy is not None:
        none = torch.zeros(len(case.tile), dtype=torch.int64, device=case.tile.device)
        if case.scored is not None:
            none = none.masked_fill(~case.scored, testing.IGNORE)
        options = case.logits._asdict()
        wide = [testing.stats_from_logits(case.tile, none, dtype=d, **options).entropy for d in (torch.float64, FLOAT)]
        testing.assert_not_worse(got.entropy, *wide, name="entropy")


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("plain", FLOAT), ("plain", torch.float16), ("all", FLOAT), ("all", torch.bfloat16)], ids=str
)
def test_forward_and_recomputed_gradient(
    name: str, kind: str, dtype: torch.dtype, device: torch.device, columns: int
) -> None:
    """``u`` of whole rows, and again in two slices of the vocabulary with a factor for each row."""
    case, beta = case_of(name, device, columns), BETAS[kind]
    got = fold(case, beta, dtype)
    assert_values(got, case, beta)
    assert got.held is not None
    testing.assert_not_worse(got.held, *unscaled(case, beta, out=dtype), name="u")
    c = torch.randn(ROWS, generator=torch.Generator().manual_seed(3)).to(device)
    cut = columns // 2 + 1
    parts = []
    for part in (slice(0, cut), slice(cut, columns)):
        forms = [form.columns(part) for form in case[3:]]
        some = TilePair(case.tile[:, part], case.ref_tile[:, part], case.scored, *forms)
        parts.append(tile_bwd(some, got.stats, beta, c, dtype))
    testing.assert_not_worse(torch.cat(parts, 1), *unscaled(case, beta, c, dtype), name="c u")


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_16_bit_logits(dtypes: tuple[torch.dtype, ...], kind: str, device: torch.device, columns: int) -> None:
    case, beta = case_of("plain", device, columns), BETAS[kind]
    case = case._replace(tile=case.tile.to(dtypes[0]), ref_tile=case.ref_tile.to(dtypes[1]))
    got = fold(case, beta, None, entropy=False)
    assert_values(got, case, beta)
    testing.assert_not_worse(
        tile_bwd(case, got.stats, beta, dtype=dtypes[0]), *unscaled(case, beta, out=dtypes[0]), name="u"
    )


@pytest.mark.parametrize("kind", BETAS)
def test_special_rows(kind: str, device: torch.device, columns: int) -> None:
    """Masked in both, in one, whole tiles of it, everything; a probability that underflows; equal rows."""
    case, beta = case_of("plain", device, columns, ignored=0.0), BETAS[kind]
    tile, ref_tile = case.tile.clone(), case.ref_tile.clone()
    tile[0, 5:9] = ref_tile[0, 5:9] = -math.inf
    tile[1, 130:] = ref_tile[1, 130:] = -math.inf  # whole tiles
    tile[2, :-3] = ref_tile[2, :-3] = -math.inf
    tile[3, 7] = -math.inf
    ref_tile[4, columns - 1] = -math.inf
    tile[5] = -math.inf
    ref_tile[6] = -math.inf
    tile[7, 40], ref_tile[7, 40] = -math.inf, -300.0
    ref_tile[8, 200], tile[8, 200] = -math.inf, -300.0
    ref_tile[9] = tile[9]
    tile[10, :200] = ref_tile[10, 200:] = -math.inf  # nothing in common
    case = case._replace(tile=tile, ref_tile=ref_tile)
    got = fold(case, beta, entropy=False)
    assert_values(got, case, beta)
    infinite = {"forward": [3, 7, 10], "reverse": [4, 8, 10], "jsd": []}[kind]
    assert got.divergence.isinf().nonzero().flatten().tolist() == infinite
    assert got.divergence.isnan().nonzero().flatten().tolist() == [5, 6]
    assert got.divergence[9] == 0
    want, eager = unscaled(case, beta)
    assert got.held is not None
    for value in (got.held, tile_bwd(case, got.stats, beta)):
        testing.assert_not_worse(value, want, eager, name="u")
    assert (got.held[0, 5:9] == 0).all()


@pytest.mark.parametrize("kind", BETAS)
def test_ignored_rows_are_zero_and_not_read(kind: str, device: torch.device, columns: int) -> None:
    case, beta = case_of("all", device, columns), BETAS[kind]
    assert case.scored is not None
    ignored = ~case.scored
    assert 2 <= ignored.sum() < ROWS
    nan = ignored[:, None]
    temperatures = [form.temperature.masked_fill(ignored, math.nan) for form in case[3:]]
    forms = [form._replace(temperature=t) for form, t in zip(case[3:], temperatures, strict=True)]
    case = TilePair(case.tile.masked_fill(nan, math.nan), case.ref_tile.masked_fill(nan, math.nan), case.scored, *forms)
    got = fold(case, beta)
    for value in (got.divergence, got.entropy, got.held, *got.stats):
        assert not value[ignored].any()
        assert value[~ignored].isfinite().all()
    for value in got.stats:
        value[ignored] = math.nan  # nor are their statistics
    c = torch.ones(ROWS, device=device).masked_fill(ignored, math.nan)
    out = tile_bwd(case, got.stats, beta, c)
    assert not out[ignored].any()
    assert out[~ignored].isfinite().all()


@pytest.mark.parametrize("kind", BETAS)
def test_float16_is_held_times_peak_over_the_bound(kind: str, device: torch.device, columns: int) -> None:
    case, beta = case_of("plain", device, columns), BETAS[kind]
    near = case._replace(ref_tile=case.tile + 1e-4 * case.ref_tile)  # differences that float16 does not have
    far = case._replace(tile=case.tile * 30.0)  # divergences of 100
    for tiles in (near, far):
        got = fold(tiles, beta, torch.float16, peak=PEAK)
        factor = PEAK / got.stats.bound(beta)
        want, eager = unscaled(tiles, beta, factor, torch.float16)
        assert want.abs().amax() <= PEAK
        assert got.held is not None
        testing.assert_not_worse(got.held, want, eager, name="u")
        again = tile_bwd(tiles, got.stats, beta, None, torch.float16, peak=PEAK)
        testing.assert_not_worse(again, want, eager, name="again")


@pytest.mark.parametrize("kind", BETAS)
def test_a_common_offset_costs_nothing(kind: str, device: torch.device, columns: int) -> None:
    """Also where the maximum comes late in the row, and early in the other."""
    ramp = torch.arange(columns, device=device) / 16.0
    tile = torch.stack([ramp, ramp.flip(0), ramp.sin() * 4]).mul(64).round().div(64)
    ref_tile = torch.stack([ramp.flip(0), ramp, ramp.cos() * 4]).mul(64).round().div(64)
    case = TilePair(tile, ref_tile, None, Logits(), Logits(temperature=0.7))
    plain, moved = (
        fold(case, BETAS[kind]),
        fold(case._replace(tile=tile + 2**14, ref_tile=ref_tile - 2**14), BETAS[kind]),
    )
    assert_values(plain, case, BETAS[kind])
    assert torch.equal(plain.divergence, moved.divergence)
    assert plain.held is not None
    assert torch.equal(plain.held, moved.held)


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (2, 3), (3, 128), (2, 129), (2, 256)], ids=str)
def test_small_and_exact_shapes(shape: tuple[int, int], kind: str, device: torch.device) -> None:
    case, beta = case_of("plain", device, shape[1], shape[0], ignored=0.0), BETAS[kind]
    got = fold(case, beta)
    assert_values(got, case, beta)
    want, eager = unscaled(case, beta)
    assert got.held is not None
    testing.assert_not_worse(got.held, want, eager, name="u")
    testing.assert_not_worse(tile_bwd(case, got.stats, beta), want, eager, name="tile_bwd")


@pytest.mark.parametrize("kind", BETAS)
def test_confident_rows_at_a_low_temperature(kind: str, device: torch.device, columns: int) -> None:
    """Log-probabilities of -600: the gradient cannot be nearer than a few roundings of such a number."""
    case, beta = case_of("plain", device, columns), BETAS[kind]
    form = Logits(temperature=0.05)
    case = case._replace(tile=case.tile * 5, logits=form, ref_logits=form)
    got = fold(case, beta, entropy=False)
    assert_values(got, case, beta)
    assert got.held is not None
    error = (got.held - unscaled(case, beta)[0]).abs().amax()
    assert error <= 4 * torch.finfo(FLOAT).eps * got.divergence.clamp(min=1.0).amax()


def test_offsets_beyond_32_bits(device: torch.device, columns: int) -> None:
    """The last row begins after 2^31 elements, though its number and the stride fit in 32 bits."""
    from prefkern.kernels.triton import divergence as kernels

    stride = 2**30 + 24

    def far(dtype: torch.dtype) -> Tensor:
        memory = torch.empty(2 * stride + columns, dtype=dtype, device=device)
        return memory.as_strided((3, columns), (stride, 1))

    case = case_of("plain", device, columns, 3, ignored=0.0)
    tile, ref_tile, held, out = far(FLOAT), far(FLOAT), far(torch.bfloat16), far(torch.bfloat16)
    tile.copy_(case.tile)
    ref_tile.copy_(case.ref_tile)
    near = fold(case, 1.0, torch.bfloat16, entropy=False)
    pair = case._replace(tile=tile, ref_tile=ref_tile)
    stats = DivergenceStats._make(torch.empty(5, 3, device=device).unbind(0))
    results = DivergenceResults(torch.empty(3, device=device), None, stats)
    kernels.tile_fwd(pair, results, held, beta=1.0, peak=None)
    got, want = (results.divergence, held, *stats), (near.divergence, near.held, *near.stats)
    assert all(map(torch.equal, got, want))
    kernels.tile_bwd(pair, stats, None, out, beta=1.0, peak=None)
    assert torch.equal(out, tile_bwd(case, near.stats, 1.0, None, torch.bfloat16))


def test_rows_lie_on_the_first_axis_of_the_grid(device: torch.device, spied: Any) -> None:
    """The others end at 65535."""
    from prefkern.kernels.triton import divergence as kernels

    grids = spied(kernels, "_divergence_fwd_kernel", "_divergence_bwd_kernel")
    N = 70_000
    tile, row = torch.zeros(1, 8, device=device).expand(N, 8), torch.zeros(N, device=device)
    pair, stats = TilePair(tile, tile, None, Logits(), Logits()), DivergenceStats(row, row, row, row, row)
    kernels.tile_fwd(pair, DivergenceResults(row, None, stats), None, beta=0.0, peak=None)
    kernels.tile_bwd(pair, stats, None, tile, beta=0.0, peak=None)
    assert grids == [(N,)] * 2


def test_columns_must_be_contiguous(device: torch.device) -> None:
    from prefkern.kernels.triton import divergence as kernels

    good, row = torch.zeros(4, 6, device=device), torch.zeros(4, device=device)
    bad = torch.zeros(6, 4, device=device).T
    two = torch.zeros(4, 2, device=device)[:, 0]
    pair, stats = TilePair(good, good, None, Logits(), Logits()), DivergenceStats(row, row, row, row, row)
    results, plain = DivergenceResults(row, None, stats), {"beta": 0.0, "peak": None}
    where = r"prefkern\.kernels\.divergence\."
    with pytest.raises(ValueError, match=where + "tile_fwd: held must have a unit stride"):
        kernels.tile_fwd(pair, results, bad, **plain)
    with pytest.raises(ValueError, match=where + "tile_fwd: ref_tile must have a unit stride"):
        kernels.tile_fwd(pair._replace(ref_tile=bad), results, None, **plain)
    with pytest.raises(ValueError, match=where + "tile_fwd: ref_bias must have a unit stride"):
        kernels.tile_fwd(pair._replace(ref_logits=Logits(bad[0])), results, None, **plain)
    with pytest.raises(ValueError, match=where + "tile_fwd: center must have a unit stride"):
        kernels.tile_fwd(pair, results._replace(stats=stats._replace(center=two)), None, **plain)
    with pytest.raises(ValueError, match=where + "tile_bwd: out must have a unit stride"):
        kernels.tile_bwd(pair, stats, None, bad, **plain)
    assert kernels.IN_PLACE is False

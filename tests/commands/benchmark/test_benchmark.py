"""The side-by-side benchmark: its truth, its clocks and its memory counter are right, and nothing is timed when
prefkern is wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prefkern import MissingDependency
from prefkern.commands.benchmark import report
from prefkern.commands.benchmark.head import command, contenders, plot
from prefkern.commands.benchmark.head.accuracy import Errors, case_values, errors, head_values, tolerance
from prefkern.commands.benchmark.head.contenders import OURS, Contender, run
from prefkern.commands.benchmark.head.floors import bare_products, tile_bytes
from prefkern.commands.benchmark.head.operands import HEADS, Case, Shape, make_operands
from prefkern.commands.benchmark.head.pieces import fold_kernels, row_kernels
from prefkern.commands.benchmark.measure import Budget, Spread, interleave, peak_extra_bytes
from prefkern.head import logprobs
from prefkern.kernels.reference import logprobs as reference
from prefkern.testing import grads_from_hidden, stats_from_hidden

CPU = torch.device("cpu")
SHAPE = Shape(24, 16, 101)


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the contenders that take seconds to import."""

    def left_out(device: torch.device) -> None:
        raise ImportError("left out")

    for name in ("_trl", "_liger_chunked", "_liger_scaled", "_liger_linear"):
        monkeypatch.setattr(contenders, name, left_out)


# ------------------------------------------------------------------------------------------------------- the whole run


@pytest.mark.slow
def test_a_quick_run_from_outside_writes_numbers_and_a_plot(tmp_path: Path) -> None:
    """All contenders that are installed, in a fresh process, as from an installed wheel."""
    arguments = ["-m", "prefkern", "bench", "--quick", "--json", "--plot", "--output", "out"]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert results["gate"] is True
    assert len(results["cases"]) == 8
    for case in results["cases"]:
        names = {entry["name"].split()[0]: entry for entry in case["contenders"]}
        assert {"naive", "TRL", "Liger", "prefkern"} <= set(names)
        (ours,) = (entry for entry in case["contenders"] if entry["name"] == OURS)
        for field, bound in case["tolerance"].items():
            assert ours["errors"][field] is None or 0 <= ours["errors"][field] <= bound
        assert ours["errors"]["logps"] <= 1e-5
        assert ours["products"] == case["floor_products"]
        assert ours["seconds"]["low"] <= ours["seconds"]["median"] <= ours["seconds"]["high"]
        assert len(ours["seconds"]["runs"]) == results["rounds"] == 2
        assert ours["times_eager"] == pytest.approx(ours["seconds"]["median"] / case["eager_seconds"])
        assert ours["times_floor"] == pytest.approx(ours["seconds"]["median"] / case["floor_seconds"]["median"])
        (linear,) = (entry for entry in case["contenders"] if entry["name"].endswith("linear CE"))
        assert linear["seconds"] is None
        assert linear["note"]
    assert (tmp_path / "out" / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert done.stdout.count("naive eager") >= 8


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu_measures_the_pieces_too(tmp_path: Path) -> None:
    assert command.main(["--device", "cuda", "--quick", "--json", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["copy_bytes_per_second"] > 1e9
    ours = [entry for case in results["cases"] for entry in case["contenders"] if entry["name"] == OURS]
    assert all(entry["seconds"]["median"] > 0 and entry["extra_bytes"] > 0 for entry in ours)
    assert len(results["pieces"]) == 2 + 3 + 3
    assert all(piece["rate"] > 0 for piece in results["pieces"]), results["pieces"]


@pytest.mark.usefixtures("without_peers")
def test_products_are_three_held_four_recomputed_two_frozen_one_scoring(tmp_path: Path) -> None:
    assert command.main(["--quick", "--json", "--dtype", "float32", "--output", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    found = {(c["head"], e["name"]): e["products"] for c in cases for e in c["contenders"] if e["products"]}
    recompute = f"{OURS}, max_memory=0"
    assert found == {
        ("trainable", OURS): 3.0,
        ("trainable", recompute): 4.0,
        ("frozen", OURS): 2.0,
        ("frozen", recompute): 3.0,
        ("scoring", OURS): 1.0,
        ("cross-entropy", OURS): 3.0,
    }


@pytest.mark.usefixtures("without_peers")
@pytest.mark.parametrize("broken", ["logps", "gradient", "nan", "raises"])
def test_nothing_is_timed_when_prefkern_is_wrong(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = logprobs.linear_token_logprobs

    def wrong(hidden, weight, targets, **options):
        if broken == "raises":
            raise ValueError("no such thing")
        logps = real(hidden, weight, targets, **options).logps
        if broken == "logps":
            logps = logps + 1e-3
        elif broken == "nan":
            logps = logps.where(targets != targets[0], math.nan)
        else:
            logps = logps.detach() + 1.01 * (logps - logps.detach())
        return SimpleNamespace(logps=logps)

    monkeypatch.setattr(logprobs, "linear_token_logprobs", wrong)
    assert command.main(["--quick", "--json", "--plot", "--dtype", "float32", "--output", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "nothing is timed" in err
    assert "spread" not in out
    assert "log-prob error" in out
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["gate"] is False
    assert all(entry["seconds"] is None for case in results["cases"] for entry in case["contenders"])
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.usefixtures("without_peers")
def test_a_spent_budget_is_said_and_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--dtype", "float32", "--budget-s", "1e-9"]) == 0
    assert "prefkern: not timed: out of time" in capsys.readouterr().out


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--tokens", "0"], ["--dtype", "int8"], ["--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "discover", lambda device: pytest.fail("something ran"))
    with pytest.raises(MissingDependency, match=r"pip install 'prefkern\[bench\]'"):
        command.main(["--quick", "--plot"])
    with pytest.raises(MissingDependency):
        plot.check()


# -------------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_truth_is_what_autograd_says(dtype: torch.dtype) -> None:
    operands = make_operands(SHAPE, torch.float32, CPU)
    found = head_values(operands, dtype)
    rest = (operands.weight, operands.targets)
    logps = stats_from_hidden(operands.hidden, *rest, dtype=dtype).logps
    grads = grads_from_hidden(operands.hidden, *rest, operands.upstream, dtype=dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.logps, logps, rtol=0, atol=32 * torch.finfo(logps.dtype).eps)
    for got, want in zip(found[1:], grads, strict=False):
        torch.testing.assert_close(got, want, rtol=0, atol=4 * eps * float(want.abs().amax()))


@pytest.mark.usefixtures("without_peers")
def test_the_cross_entropy_is_held_to_a_truth_of_its_own() -> None:
    operands = make_operands(SHAPE, torch.float32, CPU)
    case = Case(SHAPE, torch.float32, "cross-entropy")
    truth = case_values(operands, case, torch.float64)
    leaves = [value.double().requires_grad_() for value in operands[:2]]
    loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, operands.targets)
    for got, want in zip(truth, (loss.view(1), *torch.autograd.grad(loss, leaves)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    limits = tolerance(operands, case, truth)
    assert limits.logps <= 1e-5
    for contender in contenders.discover(CPU):
        forward = contender.of(case)
        if contender.name in (contenders.EAGER, OURS):
            assert errors(run(forward, operands, case), truth).within(limits)
    wrong = [truth.logps * 1.0001, *truth[1:]]
    assert not errors(wrong, truth).within(limits)


def test_the_truth_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(SHAPE, torch.float32, CPU)
    whole = head_values(operands, torch.float64)
    monkeypatch.setattr("prefkern.commands.benchmark.head.accuracy._ROWS", 7)
    for a, b in zip(whole, head_values(operands, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_errors_find_what_was_added() -> None:
    operands = make_operands(SHAPE, torch.float32, CPU)
    truth = head_values(operands, torch.float64)
    moved = [value.clone() for value in truth]
    moved[0][3] += 0.25
    moved[1][5, 2] += 0.5 * float(truth.grad_hidden.abs().amax())
    found = errors(moved, truth)
    assert found.logps == pytest.approx(0.25)
    assert found.grad_hidden == pytest.approx(0.5)
    assert found.grad_weight == 0.0
    moved[2][0, 0] = math.inf
    assert math.isnan(errors(moved, truth).grad_weight)
    assert errors(moved[:1], truth)[1:] == (None, None)


def test_tolerance_is_a_few_roundings_and_bfloat16_eager_logits_are_outside_it() -> None:
    operands = make_operands(Shape(64, 64, 1001), torch.bfloat16, CPU)
    truth = head_values(operands, torch.float64)
    limits = tolerance(operands, Case(Shape(64, 64, 1001), torch.bfloat16, "trainable"), truth)
    assert limits.logps <= 1e-5
    assert 2**-7 <= limits.grad_hidden <= 2**-4
    case = Case(Shape(64, 64, 1001), torch.bfloat16, "trainable")
    eager = errors(run(contenders._eager, operands, case), truth)
    assert eager.logps > 100 * limits.logps
    assert not eager.within(limits)
    assert errors(run(contenders._prefkern, operands, case), truth).within(limits)
    assert not Errors(math.nan).within(limits)


def test_the_memory_counter_counts_what_is_beyond_what_is_returned() -> None:
    block = 1 << 20

    def step() -> tuple[torch.Tensor, ...]:
        kept = torch.ones(block, dtype=torch.uint8)
        first = torch.ones(2 * block, dtype=torch.uint8)
        del first
        second = torch.ones(3 * block, dtype=torch.uint8)
        del second
        return (kept,)

    assert peak_extra_bytes(step, CPU) == pytest.approx(3 * block, rel=1e-3)
    assert peak_extra_bytes(step, CPU) == pytest.approx(3 * block, rel=1e-3)


def test_naive_eager_needs_two_tiles_and_prefkern_less() -> None:
    shape = Shape(512, 32, 2048)
    operands, case = make_operands(shape, torch.float32, CPU), Case(shape, torch.float32, "trainable")
    tile = shape.N * shape.V * 4
    eager = peak_extra_bytes(lambda: run(contenders._eager, operands, case), CPU)
    ours = peak_extra_bytes(lambda: run(contenders._prefkern, operands, case), CPU)
    assert 1.9 * tile <= eager <= 3.1 * tile
    assert ours <= 0.6 * eager


def test_rounds_are_interleaved_and_end_with_the_budget() -> None:
    order: list[str] = []
    rounds: list[int] = []
    steps = {name: (lambda name=name: order.append(name) or ()) for name in "ab"}
    times = interleave(steps, CPU, rounds=5, budget=Budget(0.0), on_round=rounds.append)
    assert "".join(order) == "ababab"
    assert rounds == [1, 2, 3]
    assert len(times["a"].runs) == 3
    assert interleave(steps, CPU, rounds=2, budget=Budget(None), on_round=rounds.append)["b"].low >= 0
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, (3.0, 1.0, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_is_the_bare_products(dtype: torch.dtype) -> None:
    operands = make_operands(SHAPE, dtype, CPU)
    for head in HEADS:
        case = Case(SHAPE, dtype, head)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            bare_products(operands, case)()
        products = sum(event.count for event in recorded.key_averages() if event.key == "aten::mm")
        assert products == case.products
    assert tile_bytes(Case(SHAPE, torch.bfloat16, "trainable")) == 24 * 101 * 6
    assert tile_bytes(Case(SHAPE, torch.bfloat16, "scoring")) == 24 * 101 * 4


@pytest.mark.parametrize("kernels", [row_kernels, fold_kernels])
def test_pieces_are_timed_where_they_are_right_and_refused_where_not(kernels) -> None:
    """With the reference in place of the kernels."""
    shape = Shape(80, 1, 300)
    good = list(kernels(reference, shape, torch.bfloat16, CPU, Budget(None)))
    assert all(piece.time is not None and piece.rate > 0 and piece.note == "" for piece in good)

    def wrong(*args, **options):
        reference.tile_fwd(*args, **options)
        args[2].logps.add_(1e-3)

    broken = SimpleNamespace(tile_fwd=wrong, tile_bwd=reference.tile_bwd)
    first = next(iter(kernels(broken, shape, torch.bfloat16, CPU, Budget(None))))
    assert first.time is None
    assert first.note.startswith("not timed: error 1.0e-03 exceeds ")
    late = list(kernels(reference, shape, torch.bfloat16, CPU, Budget(0.0)))
    assert {piece.note for piece in late} == {"not timed: out of time"}


def test_a_contender_that_cannot_run_is_a_remark() -> None:
    def build(device: torch.device):
        raise OSError("libsomething.so is not there\nand more")

    found = contenders._build("peer", build, CPU)
    assert found == Contender("peer", None, "cannot be imported: OSError: libsomething.so is not there")
    assert contenders._build("linear", contenders._liger_linear, CPU).note == "its Triton kernels do not run on a CPU"


def test_trls_file_alone_gives_the_same_numbers_as_eager() -> None:
    pytest.importorskip("transformers")
    if contenders._version("trl") == "(missing)":
        pytest.skip("needs trl")
    function = contenders._trl_file_alone().ChunkedLogProbFunction
    operands = make_operands(SHAPE, torch.float32, CPU)
    truth = head_values(operands, torch.float64)

    def forward(hidden, weight, targets):
        return function.apply(hidden, weight, None, targets, 1.0, contenders.TRL_CHUNK, None, 1.0, ())[0]

    found = errors(run(forward, operands, Case(SHAPE, torch.float32, "trainable")), truth)
    assert max(found) < 1e-5


def test_tables_align_and_units_read_well() -> None:
    rows = [["a", "1 s", "-"], ["longer", "20 ms", "2.00"], ["peer", "left out"]]
    assert report.plain(report.Table("title", ["name", "time", "ratio"], rows)).splitlines() == [
        "title",
        "name     time  ratio",
        "--------------------",
        "a         1 s      -",
        "longer  20 ms   2.00",
        "peer: left out",
    ]
    assert [report.si_seconds(value) for value in (12.345, 0.0012, 2.5e-6, 3e-9)] == [
        "12.3 s",
        "1.2 ms",
        "2.5 us",
        "3 ns",
    ]
    assert [report.si_bytes(value) for value in (1.5e9, 2e6, 10)] == ["1.5 GB", "2 MB", "10 B"]


@pytest.mark.parametrize("units", [False, True])
def test_16_bit_operands_are_measured_at_a_size_that_the_processor_can_bear(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "native", lambda dtype: units or dtype == torch.float32)
    sizes = {case.dtype: case.shape for case in command.cases(command._parser().parse_args([]))}
    assert sizes[torch.float32] == (2048, 1024, 32768)
    assert sizes[torch.bfloat16] == ((2048, 1024, 32768) if units else (128, 256, 8192))
    given = command._parser().parse_args(["--tokens", "300", "--dtype", "bfloat16"])
    assert command.cases(given)[0].shape.N == 300

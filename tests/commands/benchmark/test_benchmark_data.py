"""The data benchmark: peers are what they claim, nothing is timed when it is wrong, and ratios are what they say."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from prefkern.commands.benchmark.data import command, run
from prefkern.commands.benchmark.data.cases import advantages, areas
from prefkern.commands.benchmark.data.cases.advantage_peers import trl_gae, verl_gae
from prefkern.commands.benchmark.data.cases.case import FLOOR, OURS, DataCase, Goal, Prepared
from prefkern.commands.benchmark.data.plot import growth_plot
from prefkern.commands.benchmark.head import command as head_command


def nothing() -> None:
    return None


def test_a_quick_run_writes_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "--quick", "--only", "GAE", "--json", "--output", str(tmp_path)]
    assert head_command.main(arguments) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    quick = [case for case in areas()["advantages"] if case.quick]
    assert [case["name"] for case in results["cases"]] == [case.name for case in quick if "GAE" in case.name]
    for case in results["cases"]:
        found = {entry["name"]: entry for entry in case["contenders"]}
        floor = min(entry["seconds"]["median"] for name, entry in found.items() if name.startswith("copy"))
        assert case["floor_seconds"] == floor
        for entry in found.values():
            assert len(entry["seconds"]["runs"]) == results["rounds"] == 2
            assert entry["times_floor"] == entry["seconds"]["median"] / floor
            assert entry["times_ours"] == entry["seconds"]["median"] / found[OURS]["seconds"]["median"]
        assert case["goals"][0]["of"] == FLOOR
        for goal in case["goals"]:
            of = floor if goal["of"] == FLOOR else found[goal["of"]]["seconds"]["median"]
            assert goal["met"] == (found[OURS]["seconds"]["median"] <= goal["factor"] * of + goal["plus"])
    assert f"{quick[0].name}, {quick[0].size}" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def untimed() -> None:
        raise AssertionError("a wrong case was timed")

    case = DataCase(
        "case", "[1]", lambda: Prepared({OURS: untimed}, lambda: "it is wrong", goals=(Goal("x", 2.0),)), True
    )
    monkeypatch.setattr(command, "areas", lambda: {"some": [case]})
    assert command.main(["--quick"]) == 1
    captured = capsys.readouterr()
    assert "not timed, case [1]: it is wrong" in captured.err
    assert "<= 2 x x: not measured" in captured.out


@pytest.mark.parametrize("prepare", [advantages.plain, advantages.masked])
def test_the_check_sees_a_wrong_number(prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args, **options):
        found = right(*args, **options)
        found.returns[3, 11] += 1e-3
        return found

    right = advantages.gae
    assert prepare((8, 64)).check() is None
    monkeypatch.setattr(advantages, "gae", off)
    assert prepare((8, 64)).check().startswith("returns differ from float64 by")


def test_peers_equal_the_recursion() -> None:
    given = advantages.batch((8, 64))
    rewards, values, mask = given.rewards.double(), given.values.double(), given.mask.double()
    everywhere = np.ones((8, 64), bool)
    for got, want in zip(
        trl_gae(rewards, values, advantages.GAMMA, advantages.LAM),
        advantages.recursion(rewards.numpy(), values.numpy(), everywhere),
        strict=True,
    ):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)
    scored = given.mask.numpy()
    white, returns = verl_gae(rewards, values, mask, advantages.GAMMA, advantages.LAM)
    raw, want = advantages.recursion(rewards.numpy(), values.numpy(), scored)
    np.testing.assert_allclose(returns.numpy()[scored], want[scored], rtol=1e-12, atol=1e-12)
    numbers = raw[scored]
    standard = (numbers - numbers.mean()) / numbers.std(ddof=1)
    np.testing.assert_allclose(white.numpy()[scored], standard, rtol=1e-6, atol=1e-6)


def test_short_calls_are_repeated_and_long_ones_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"short": 0, "long": 0}

    def count(name: str) -> None:
        calls[name] += 1

    def once(step) -> float:
        step()
        return 1e-4 if step is short else 3.0

    short, long = partial(count, "short"), partial(count, "long")
    monkeypatch.setattr(run, "once", once)
    monkeypatch.setattr(run, "CONTENDER_S", 0.0)
    assert run.sample(short, []) == 1e-4
    assert calls["short"] == 1 + 1 + run.MOST_CALLS
    found = run.measure(
        DataCase("case", "[1]", lambda: Prepared({OURS: long, "peer": short}, nothing)),
        rounds=4,
        on_round=lambda _: None,
    )
    assert [len(entry.time.runs) for entry in found.entries] == [1, 1]
    assert calls["long"] == 2
    assert found.seconds(OURS) == 3.0
    assert found.seconds(FLOOR) is None


def test_goals_are_sentences() -> None:
    goal = Goal("peer", 0.01, contender="prefkern, lists")
    assert goal.met(0.9, 100.0)
    assert not goal.met(1.1, 100.0)
    written = {**goal._asdict(), "ratio": 0.005, "met": True}
    assert command.goal_text(written) == "prefkern, lists: >= 100 x faster than peer: 200, met"
    written = {**Goal(FLOOR, 2.0, 1e-5)._asdict(), "ratio": 4.0, "met": False}
    assert command.goal_text(written) == "<= 2 x floor + 10 us: 4, missed"


def test_no_such_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--only", "nothing at all"]) == 2
    assert "no case contains 'nothing at all'" in capsys.readouterr().err


def test_full_cases_have_the_shapes_that_are_promised() -> None:
    sizes = {case.size for case in areas()["advantages"] if case.name == "GAE" and not case.quick}
    assert sizes == {
        f"[{rows}, {width}] float32" for rows, width in ((64, 1024), (256, 2048), (1024, 4096), (4096, 128))
    }


def test_growth_is_a_picture_of_what_was_measured(tmp_path) -> None:
    def case(size: str, seconds: float | None) -> dict[str, object]:
        entry = {"name": "prefkern", "seconds": None if seconds is None else {"median": seconds}}
        return {"name": "growth", "size": size, "wrong": None, "contenders": [entry]}

    path = tmp_path / "growth.png"
    assert not growth_plot([case("1 000 tokens", 1e-6)], path)
    assert not growth_plot([case("1 000 tokens", 1e-6), case("10 000 tokens", None)], path)
    assert not path.exists()
    assert growth_plot([case("1 000 tokens", 1e-6), case("10 000 tokens", 1e-5)], path)
    assert path.read_bytes()[:4] == b"\x89PNG"

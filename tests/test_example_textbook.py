"""The side-by-side example: its data, its losses, and a whole run with a tiny model."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import prefkern as pk

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and datasets warn about in each other


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def textbook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("textbook", EXAMPLES / "textbook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / "data" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a tokenizer of the words of the data."""
    texts = [row[key] for name in ("preference", "held_out") for row in rows(name) for key in row]
    words = [
        "<pad>",
        "<eos>",
        "<unk>",
        "Question:",
        "Answer:",
        *sorted({word for text in texts for word in text.split()}),
    ]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(words), **shape, tie_word_embeddings=True, eos_token_id=1)
    path = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_four_formats_hold_the_same_answers() -> None:
    pairs = rows("preference")
    better, worse = ([(row["prompt"], row[side]) for row in pairs] for side in ("chosen", "rejected"))
    for name, text, judgement in (
        ("rewarded", "completion", lambda row: row["reward"] > 0),
        ("unpaired", "completion", lambda row: row["label"]),
        ("scored", "response", lambda row: row["score"] > 0.5),
    ):
        found = [(judgement(row), (row["prompt"], row[text])) for row in rows(name)]
        assert [answer for good, answer in found if good] == better, name
        assert [answer for good, answer in found if not good] == worse, name
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in rows("held_out")}


def test_a_run_shows_what_every_method_did(textbook, folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(textbook, "TOKENS", 5)
    output = tmp_path / "out"
    arguments = ["--model", str(folder), "--updates", "8", "--learning-rate", "3e-3", "--output", str(output)]
    textbook.main(arguments)
    histories = json.loads((output / "history.json").read_text())
    assert list(histories) == ["PPO", "DPO", "KTO", "DPO + KL", "ORPO", "score-weighted"]
    for name, history in histories.items():
        assert [point["update"] for point in history] == [0, 2, 4, 6, 8]
        first, last = history[0], history[-1]
        assert first == histories["PPO"][0], "every method begins with the same model"
        assert (first["margin"], first["kl"]) == (0.0, 0.0)
        assert last["margin"] > 0.1 or name == "ORPO", name  # its odds weigh a tenth, which 8 updates do not show
        assert last["kl"] > 1e-4, name
        assert 0 <= last["length"] <= 5
    assert histories["DPO + KL"][-1]["kl"] < histories["DPO"][-1]["kl"], "the penalty holds it to the reference"
    assert histories["ORPO"][-1]["chosen"] > histories["DPO"][-1]["chosen"], "the likelihood is part of ORPO only"
    assert (output / "textbook.png").stat().st_size > 10_000
    report = (output / "report.md").read_text()
    assert report.count("\n| ") == 9
    assert report in capsys.readouterr().out


def test_methods_are_their_formulas(textbook, folder) -> None:
    """From full logits, on the first batch, after the model has moved a little."""
    loaded = textbook.model.load(str(folder))
    student = textbook.Student(loaded)
    first = {name: textbook.batches(student, name)[0] for name in textbook.METHODS}
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    ref = transformers.LlamaForCausalLM.from_pretrained(folder)

    def logps(model: Any, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch.ids, attention_mask=batch.attention).logits.log_softmax(-1)
        tokens = logits.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
        return torch.where(batch.targets != -100, tokens, 0.0)

    with torch.no_grad():
        got = {name: textbook.METHODS[name].loss(student, first[name], torch.zeros(())) for name in ("DPO", "ORPO")}
        batch = first["DPO"]
        D = (logps(loaded.model, batch) - logps(ref, batch)).sum(1)
        want = -torch.nn.functional.logsigmoid(0.1 * (D[:2] - D[2:])).mean()
        torch.testing.assert_close(got["DPO"], want, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["ORPO"].targets, batch.targets), "the better responses first, as in the pairs"
        batch = first["PPO"]
        lp, mask = logps(loaded.model, batch), batch.targets != -100
        old, A = lp + 0.1 * torch.rand(lp.shape), torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
        ratio, x = (lp - old).exp(), logps(ref, batch) - lp
        surrogate = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) + 0.05 * (x.exp() - x - 1)
        torch.testing.assert_close(textbook.ppo(student, batch, old), surrogate[mask].mean(), rtol=1e-5, atol=1e-6)
        batch, other = first["KTO"], first["KTO"].mismatched
        kl = (logps(loaded.model, other) - logps(ref, other)).sum(1).mean().clamp(min=0)
        D = (logps(loaded.model, batch) - logps(ref, batch)).sum(1)
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
        want = torch.sigmoid(-0.1 * sign * (D - kl)).mean()
        torch.testing.assert_close(textbook.kto(student, batch, torch.zeros(())), want, rtol=1e-5, atol=1e-6)
        batch = first["score-weighted"]
        averages = pk.sequence_logps(logps(loaded.model, batch), targets=batch.targets, average=True)
        want = ((0.5 - batch.values) * averages).mean()
        torch.testing.assert_close(textbook.score_weighted(student, batch, torch.zeros(())), want, rtol=1e-5, atol=1e-6)


def test_too_few_updates_are_refused(textbook, folder, capsys) -> None:
    with pytest.raises(SystemExit):
        textbook.main(["--model", str(folder), "--updates", "1"])
    assert "--updates must be at least 4, got 1" in capsys.readouterr().err

"""Every block of Python in the README and the documents runs, top to bottom, on a tiny model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from tokenizers import Tokenizer, models, pre_tokenizers

import prefkern

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "trainers.md"]


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config)


def names() -> dict[str, Any]:
    """What the documents take as given: a model, a batch of two pairs, rollouts, rows of tokens."""
    input_ids = torch.randint(1, 64, (4, 9))
    mask = torch.ones_like(input_ids)
    completion = mask.clone()
    completion[:, :4] = 0
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 8, 7], "labels": [-100, 8, 7]}]
    unpaired = [{"prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "label": label} for label in (True, False, True)]
    return {
        "model": model(),
        "ref_model": model(),
        "input_ids": input_ids,
        "attention_mask": mask,
        "completion_mask": completion,
        "ref_logps": torch.full((4,), -20.0),
        "token_rewards": torch.randn(4, 9),
        "tokenizer": tokenizer(),
        "queries": ["w3 w4 w5", "w6 w7"],
        "rewards": [1.0, -1.0],
        "values": torch.randn(4, 9),
        "old_logps": -4.0 * torch.rand(4, 9),
        "rows": rows,
        "unpaired_rows": unpaired,
    }


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(64)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2", unk_token="w1")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_of_python_runs(path: Path) -> None:
    sybil = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])
    document = sybil.parse(path)
    document.namespace.update(names())
    examples = list(document.examples())
    assert examples, "no block of Python was found"
    before = torch.is_grad_enabled()
    try:
        for example in examples:
            example.evaluate()
    finally:
        prefkern.integrations.trl.unpatch()
    assert torch.is_grad_enabled() == before
    assert math.isfinite(document.namespace["loss"].item())

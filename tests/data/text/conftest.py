"""Fixtures of the tests of `prefkern.data.prepare`; what they import is loaded where they are used."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def words() -> Any:
    """One token a letter; ~ is the end; spaces vanish."""
    from preparing import ID, TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"~": 0, "?": 1} | ID, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="~", unk_token="?")
    tokenizer.chat_template = TEMPLATE
    return tokenizer

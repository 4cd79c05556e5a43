"""TRL's text collators, under its names and with its arguments: equal tensors in a fraction of the time.

    from prefkern.integrations.trl.collators import DataCollatorForPreference

    trl.DPOTrainer(..., data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=1024))

``prefkern.integrations.trl.patch(collators=True)`` puts them into TRL's trainers. Each takes what TRL's takes, a list
of row dicts, and also a ``pyarrow.Table``: in a DataLoader over `prefkern.data.ArrowRows` no row becomes Python lists.

Where TRL's would go on with a batch that cannot be right, these refuse it with the row: completions that ``max_length``
leaves no token of, negative ids, missing or null columns.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from prefkern.check import fail, one_of
from prefkern.data import collate_pairs, collate_unpaired
from prefkern.data.arrays.columns import columns, names_of, scalars
from prefkern.data.batches import language

__all__ = [
    "DataCollatorForLanguageModeling",
    "DataCollatorForPreference",
    "DataCollatorForUnpairedPreference",
    "RewardDataCollatorForPreference",
]

_WHERE = "integrations.trl.collators"


class _StandsFor(type):
    """``isinstance`` holds for TRL's own collator too: its trainers ask for the class by the name that was replaced."""

    stands_for: str

    def __instancecheck__(cls, instance: object) -> bool:
        known = (f"{base.__module__}.{base.__qualname__}" for base in type(instance).__mro__)
        return super().__instancecheck__(instance) or cls.stands_for in known


class _Collator(metaclass=_StandsFor):
    stands_for: ClassVar[str] = ""
    return_tensors: str

    def __call__(self, features: Any, return_tensors: str | None = None) -> dict[str, Any]:
        one_of(_WHERE, "return_tensors", return_tensors or self.return_tensors, ("pt",))
        return self.torch_call(features)

    def torch_call(self, examples: Any) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class DataCollatorForPreference(_Collator):
    """Of the DPO trainer: `prefkern.data.collate_pairs` of ``prompt_ids``, ``chosen_ids``, ``rejected_ids``."""

    stands_for: ClassVar[str] = "trl.trainer.dpo_trainer.DataCollatorForPreference"

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: Any) -> dict[str, Any]:
        return collate_pairs(
            examples,
            pad_token_id=self.pad_token_id,
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,  # type: ignore[arg-type]
            pad_to_multiple_of=self.pad_to_multiple_of,
        )


@dataclass
class DataCollatorForUnpairedPreference(_Collator):
    """Of the KTO trainer: `prefkern.data.collate_unpaired` of ``prompt_ids``, ``completion_ids``, ``label`` and, where
    rows have them, the ``KL_completion_ids`` of its baseline."""

    stands_for: ClassVar[str] = "trl.trainer.kto_trainer.DataCollatorForUnpairedPreference"

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: Any) -> dict[str, Any]:
        return collate_unpaired(
            examples,
            pad_token_id=self.pad_token_id,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )


@dataclass
class DataCollatorForLanguageModeling(_Collator):
    """Of the SFT trainer, padded or padding-free: `prefkern.data.collate_language` of ``input_ids``, ``labels``; each
    token that rounds a padding-free batch up is a sequence, as in TRL."""

    stands_for: ClassVar[str] = "trl.trainer.sft_trainer.DataCollatorForLanguageModeling"

    pad_token_id: int
    padding_free: bool = False
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: Any) -> dict[str, Any]:
        return language.collate(
            examples,
            self.pad_token_id,
            self.pad_to_multiple_of,
            padding_free=self.padding_free,
            return_position_ids=self.return_position_ids,
            filling="apart",
        )

    @staticmethod
    def get_position_ids_from_packed_seq_lengths(batch_seq_lengths: list[list[int]]) -> list[torch.Tensor]:
        """The positions of the tokens of each row, whose packed sequences have these lengths."""
        rows = [[torch.arange(length) for length in lengths] for lengths in batch_seq_lengths]
        return [torch.cat([torch.arange(0), *positions]) for positions in rows]


@dataclass
class RewardDataCollatorForPreference(_Collator):
    """Of the reward trainer, where its name is DataCollatorForPreference too: whole conversations ``chosen_ids`` and
    ``rejected_ids`` (`prefkern.data.prepare` makes them with ``join_prompt=True``), and optionally their ``margin``."""

    stands_for: ClassVar[str] = "trl.trainer.reward_trainer.DataCollatorForPreference"

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: Any) -> dict[str, Any]:
        given = _reward_columns(examples)
        count = len(given["chosen_ids"])
        margins = given.pop("margin", None)
        given["prompt_ids"] = [[]] * count
        batch = collate_pairs(given, pad_token_id=self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
        del batch["completion_mask"]
        if margins is not None:
            batch["margin"] = scalars(_WHERE, "margin", margins, count).float()
        return batch


def _reward_columns(rows: Any) -> dict[str, Any]:
    names = names_of(rows)
    if "prompt_ids" in names:
        fail(
            _WHERE,
            "a reward model reads prompt and completion together, but these rows keep their prompts apart in "
            "prompt_ids; prepare them with prefkern.data.prepare(..., join_prompt=True)",
        )
    return dict(columns(_WHERE, rows, ("chosen_ids", "rejected_ids"), ("margin",)))

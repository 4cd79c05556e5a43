"""The data side of `prefkern.integrations.trl.patch`: collators, fetching and prepared datasets in TRL's trainers.

The modules of TRL are looked up when they are needed; importing this one loads none.
"""

import importlib
import inspect
from typing import Any, NamedTuple

from prefkern.check import fail
from prefkern.data import ArrowRows
from prefkern.data.batches.truncation import refuse_other_end, truncation_of
from prefkern.integrations.trl import collators
from prefkern.integrations.trl.replaced import Replaced

FIRST = (1, 16)
WORKS = "TRL 1.16 (pip install 'trl>=1.16,<1.17')"
_WHERE = "integrations.trl"
_PREPARE = ["self", "dataset", "processing_class", "args"]
_OURS = tuple(getattr(collators, name) for name in collators.__all__)
_ROWS_SHOWN = 10


class _Trainer(NamedTuple):
    module: str
    name: str
    collator: str
    ours: Any

    def load(self) -> tuple[Any, Any]:
        module = importlib.import_module(f"trl.trainer.{self.module}")
        return module, getattr(module, self.name)


_TRAINERS = (
    _Trainer("dpo_trainer", "DPOTrainer", "DataCollatorForPreference", collators.DataCollatorForPreference),
    _Trainer(
        "kto_trainer",
        "KTOTrainer",
        "DataCollatorForUnpairedPreference",
        collators.DataCollatorForUnpairedPreference,
    ),
    _Trainer(
        "sft_trainer",
        "SFTTrainer",
        "DataCollatorForLanguageModeling",
        collators.DataCollatorForLanguageModeling,
    ),
    _Trainer(
        "reward_trainer",
        "RewardTrainer",
        "DataCollatorForPreference",
        collators.RewardDataCollatorForPreference,
    ),
)


def fits() -> bool:
    """Whether the installed TRL has the classes and signatures that `replace` is written for."""
    for known in _TRAINERS:
        module, trainer = known.load()
        collator = getattr(module, known.collator, None)
        if collator is None or surface(collator).items() - surface(known.ours).items():
            return False
        if list(inspect.signature(trainer._prepare_dataset).parameters)[: len(_PREPARE)] != _PREPARE:
            return False
        if not hasattr(trainer, "_remove_unused_columns"):
            return False
    return True


def surface(collator: Any) -> dict[str, str]:
    """The public names of a class with how each is called, and how it is made."""
    found = {"": str(inspect.signature(collator))}
    for name in ("__call__", *(name for name in dir(collator) if not name.startswith("_"))):
        member = inspect.getattr_static(collator, name)
        callable_ = callable(member) or isinstance(member, staticmethod | classmethod)
        parameters = inspect.signature(getattr(collator, name)).parameters if callable_ else ""
        found[name] = f"{type(member).__name__} {', '.join(parameters)}"
    return found


def replace(replaced: Replaced) -> None:
    for known in _TRAINERS:
        module, trainer = known.load()
        replaced.set(module, known.collator, known.ours)
        replaced.set(trainer, "_remove_unused_columns", _fetching_arrow(trainer._remove_unused_columns))
        take = _TAKE.get(known.name)
        if take is not None:
            replaced.set(trainer, "_prepare_dataset", _prepared(trainer._prepare_dataset, take))


def _fetching_arrow(original: Any) -> Any:
    """The trainer calls this on the dataset that it then gives to its DataLoader."""

    def _remove_unused_columns(self: Any, dataset: Any, description: str | None = None) -> Any:
        dataset = original(self, dataset, description)
        ours = type(self.data_collator) in _OURS  # a subclass may expect row dicts
        return ArrowRows(dataset) if ours and dataset.format["type"] is None else dataset

    return _remove_unused_columns


def _prepared(original: Any, take: Any) -> Any:
    def _prepare_dataset(self: Any, dataset: Any, processing_class: Any, args: Any, *others: Any, **named: Any) -> Any:
        taken = take(self, dataset, args)
        return original(self, dataset, processing_class, args, *others, **named) if taken is None else taken

    return _prepare_dataset


def _take_pairs(trainer: Any, dataset: Any, args: Any) -> Any:
    """A dataset that is tokenised already; TRL's trainer would look for the texts in it."""
    if not {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names or ()):
        return None
    if args.max_length is not None:
        refuse_other_end(_WHERE, truncation_of(dataset), args.truncation_mode)
    if args.truncation_mode == "keep_start":
        _check_prompts(dataset, args.max_length)
    return dataset


def _take_unpaired(trainer: Any, dataset: Any, args: Any) -> Any:
    """The same for KTO, with the mismatched completions of its baseline: each prompt gets the one of the row before it,
    within the batches that TRL makes them in."""
    if not {"prompt_ids", "completion_ids", "label"} <= set(dataset.column_names or ()):
        return None
    if args.max_length is not None:
        refuse_other_end(_WHERE, truncation_of(dataset), "keep_start")
    _check_prompts(dataset, args.max_length)
    if not trainer.calculate_KL or "KL_completion_ids" in dataset.column_names:
        return dataset
    batches = {"batched": True, "batch_size": args.per_device_train_batch_size}
    if hasattr(dataset, "__len__"):  # a datasets.IterableDataset takes neither
        batches |= {"num_proc": args.dataset_num_proc, "desc": "Pairing prompts with other completions"}
    return dataset.map(_shifted, **batches)


def _shifted(rows: Any) -> dict[str, Any]:
    completions = list(rows["completion_ids"])
    return {"KL_completion_ids": completions[-1:] + completions[:-1]}


def _take_joined(trainer: Any, dataset: Any, args: Any) -> Any:
    if "prompt_ids" in (dataset.column_names or ()):
        fail(
            _WHERE,
            "a reward model reads prompt and completion together, but this dataset keeps its prompts apart in "
            "prompt_ids; prepare it with prefkern.data.prepare(..., join_prompt=True)",
        )
    return None  # TRL's trainer knows these columns itself


def _check_prompts(dataset: Any, max_length: int | None) -> None:
    """Refuses prompts that leave no room for a completion; TRL would leave such rows out without a word."""
    if max_length is None or not hasattr(dataset, "__len__"):
        return
    import pyarrow.compute as pc

    full, row = [], 0
    for table in dataset.select_columns("prompt_ids").with_format("arrow").iter(batch_size=10_000):
        long = pc.greater_equal(pc.list_value_length(table.column("prompt_ids")), max_length).to_numpy()
        full += [row + int(at) for at in long.nonzero()[0]]
        row += len(table)
    if full:
        shown = ", ".join(map(str, full[:_ROWS_SHOWN])) + (", ..." if len(full) > _ROWS_SHOWN else "")
        fail(
            _WHERE,
            f"the prompts of {len(full)} rows ({shown}) fill max_length={max_length} and leave no completion token; "
            f"prepare the dataset with prefkern.data.prepare(..., max_length={max_length}), which reports such rows",
        )


_TAKE = {"DPOTrainer": _take_pairs, "KTOTrainer": _take_unpaired, "RewardTrainer": _take_joined}

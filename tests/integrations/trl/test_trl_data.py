"""patch(collators=True): what it replaces, what it gives back, and that TRL's trainers then train the same."""

from pathlib import Path

import pytest
import tiny_trl as tiny
import torch
import trl
from datasets import Dataset, load_from_disk
from trl.trainer import dpo_trainer, kto_trainer, reward_trainer, sft_trainer
from trl.trainer import utils as trl_utils

from prefkern.data import ArrowRows, collate_pairs, prepare
from prefkern.integrations.trl import collators
from prefkern.integrations.trl.patching import patch, unpatch

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # what TRL, transformers and datasets warn about in each other is theirs

NAMES = {
    (dpo_trainer, "DataCollatorForPreference"): collators.DataCollatorForPreference,
    (kto_trainer, "DataCollatorForUnpairedPreference"): collators.DataCollatorForUnpairedPreference,
    (reward_trainer, "DataCollatorForPreference"): collators.RewardDataCollatorForPreference,
    (sft_trainer, "DataCollatorForLanguageModeling"): collators.DataCollatorForLanguageModeling,
}
THEIRS = {place: getattr(*place) for place in NAMES}
TRAINERS = (trl.DPOTrainer, trl.KTOTrainer, trl.SFTTrainer, trl.RewardTrainer)
METHODS = {cls: dict(vars(cls)) for cls in TRAINERS}
HEAD = trl_utils._ChunkedLogProbFunction


def untouched() -> bool:
    return all(getattr(*place) is theirs for place, theirs in THEIRS.items()) and all(
        dict(vars(cls)) == methods for cls, methods in METHODS.items()
    )


def replaced() -> bool:
    return all(getattr(*place) is ours for place, ours in NAMES.items())


@pytest.fixture(autouse=True)
def _restored() -> object:
    yield
    unpatch()
    assert untouched()


def test_the_default_leaves_the_collators_alone() -> None:
    with patch():
        assert untouched()


def test_replaces_and_restores() -> None:
    with patch(collators=True):
        assert replaced()
        assert trl_utils._ChunkedLogProbFunction is not HEAD
    assert untouched()
    patch(collators=True)
    patch(collators=True)
    unpatch()
    assert untouched()
    assert trl_utils._ChunkedLogProbFunction is HEAD


def test_a_block_inside_ends_only_what_it_began() -> None:
    with patch():
        with patch(collators=True):
            assert replaced()
        assert untouched()
        assert trl_utils._ChunkedLogProbFunction is not HEAD
    with patch(collators=True):
        with patch():
            pass
        assert replaced()


@pytest.mark.parametrize("place", NAMES, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_another_signature_is_refused(place: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(self, pad_token_id: int, side: str = "right") -> None:
            raise AssertionError

    with monkeypatch.context() as changed:
        changed.setattr(*place, Other)
        with pytest.raises(ImportError, match="nothing was replaced"):
            patch(collators=True)
        assert getattr(*place) is Other
        assert trl_utils._ChunkedLogProbFunction is HEAD
        with patch():  # the head is known still
            assert trl_utils._ChunkedLogProbFunction is not HEAD


@pytest.mark.parametrize("place", NAMES, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_a_public_name_that_ours_lack_is_refused(place: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL's tests and subclasses may call it."""
    with monkeypatch.context() as changed:
        changed.setattr(THEIRS[place], "crop", staticmethod(lambda rows: rows), raising=False)
        with pytest.raises(ImportError, match="nothing was replaced"):
            patch(collators=True)
        changed.undo()
        changed.setattr(THEIRS[place], "torch_call", lambda self, examples, device: None)
        with pytest.raises(ImportError, match="nothing was replaced"):
            patch(collators=True)


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setattr("importlib.metadata.version", lambda name: "1.17.0")
        with pytest.raises(ImportError, match=r"TRL 1\.17\.0 .*nothing was replaced"):
            patch(collators=True)
        changed.setattr("importlib.metadata.version", lambda name: "1.15.2")
        message = r"TRL 1\.15\.2 is not known to fit patch\(collators=True\), which works with TRL 1\.16 .*nothing was"
        with pytest.raises(ImportError, match=message):
            patch(collators=True)
        assert trl_utils._ChunkedLogProbFunction is HEAD


@pytest.mark.parametrize("kind", ["dpo", "kto", "sft"])
@pytest.mark.parametrize("options", [{}, {"max_length": 6}, {"dataloader_num_workers": 1}], ids=str)
def test_the_same_training(kind: str, options: dict, tmp_path: Path) -> None:
    if kind == "sft" and not options:
        options = {"padding_free": True, "max_length": None}
    start = tiny.model()
    with patch():
        expected = tiny.run(kind, tmp_path / "theirs", start, **options)
    with patch(collators=True):
        made = tiny.trainer(kind, tmp_path / "ours", start, **options)
        assert type(made.data_collator) in NAMES.values()
        assert isinstance(made.get_train_dataloader().dataset, ArrowRows)
        got = tiny.run(kind, tmp_path / "ours", start, **options)
    assert len(got) == len(expected) >= 3
    for mine, theirs in zip(got, expected, strict=True):
        same = {name: value for name, value in theirs.items() if "runtime" not in name and "per_second" not in name}
        assert {name: mine[name] for name in same} == same  # equal batches: equal to the last bit


def test_reference_log_probabilities_and_evaluation(tmp_path: Path) -> None:
    start = tiny.model()
    options = {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 2}
    with patch():
        expected = tiny.run("dpo", tmp_path / "theirs", start, **options)
    with patch(collators=True):
        got = tiny.run("dpo", tmp_path / "ours", start, **options)
    losses = [line.get("loss", line.get("eval_loss")) for line in expected]
    assert [line.get("loss", line.get("eval_loss")) for line in got] == losses
    assert len(losses) >= 4


def test_a_collator_of_one_s_own_gets_row_dicts(tmp_path: Path) -> None:
    seen = []

    class Mine(collators.DataCollatorForPreference):
        def torch_call(self, examples: list[dict]) -> dict:
            seen.extend(examples)
            return super().torch_call(examples)

    with patch(collators=True):
        made = tiny.trainer("dpo", tmp_path, tiny.model(), steps=1)
        made.data_collator = Mine(pad_token_id=0)
        made.train()
    assert len(seen) >= 4
    assert all(set(row) == {"prompt_ids", "chosen_ids", "rejected_ids"} for row in seen)


@pytest.mark.parametrize("kind", ["dpo", "kto", "sft"])
def test_prepared_datasets_train_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL on its own with the texts, and on the dataset that `prepare` made of them."""
    start, texts = tiny.model(), tiny.dataset(kind)
    options = {"max_length": 9, "per_device_train_batch_size": 5}
    expected = tiny.run(kind, tmp_path, start, **options)
    made = prepare(texts, tiny.tokenizer(), max_length=9, progress=False)
    assert made.cut > 0
    monkeypatch.setattr(tiny, "dataset", lambda kind: made.dataset)
    with patch(collators=True):
        got = tiny.run(kind, tmp_path, start, **options)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), "only the head differs"
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def pairs(rows: int = 12) -> Dataset:
    """The DPO rows of tiny_trl, tokenised."""
    words, source = tiny.tokenizer(), tiny.dataset("dpo", rows)
    return Dataset.from_list(
        [
            {"prompt_ids": words(row["prompt"])["input_ids"]}
            | {f"{name}_ids": words(row[name] + "<eos>")["input_ids"] for name in ("chosen", "rejected")}
            for row in source
        ]
    )


def trainer_on(dataset: Dataset, folder: Path, **options: object) -> trl.DPOTrainer:
    settings = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    return trl.DPOTrainer(
        model=tiny.model(),
        ref_model=tiny.model(),
        args=trl.DPOConfig(**settings | options),
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
    )


def test_tokenised_pairs_are_taken_as_they_are(tmp_path: Path) -> None:
    dataset = pairs()
    with patch(collators=True):
        made = trainer_on(dataset, tmp_path)
    assert made.train_dataset is dataset


def test_prompts_that_fill_max_length_are_refused(tmp_path: Path) -> None:
    dataset = pairs()
    lengths = [len(prompt) for prompt in dataset["prompt_ids"]]
    rows = [row for row, length in enumerate(lengths) if length >= 5]
    assert 0 < len(rows) < 10
    with patch(collators=True):
        message = rf"the prompts of {len(rows)} rows \({', '.join(map(str, rows))}\) fill max_length=5"
        with pytest.raises(ValueError, match=message):
            trainer_on(dataset, tmp_path, max_length=5)
        kept = [row for row in range(12) if row not in rows]
        trainer_on(dataset.select(kept), tmp_path, max_length=5)
        trainer_on(dataset, tmp_path, max_length=None)


@pytest.mark.parametrize("kind", ["dpo", "kto", "sft"])
def test_datasets_in_torch_s_format_train_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own collators add and measure lists, and stumble over tensors."""
    start, made = tiny.model(), prepare(tiny.dataset(kind), tiny.tokenizer(), progress=False).dataset
    results = []
    for dataset in (made, made.with_format("torch")):
        monkeypatch.setattr(tiny, "dataset", lambda kind, dataset=dataset: dataset)
        with patch(collators=True):
            results.append([line["loss"] for line in tiny.run(kind, tmp_path, start, per_device_train_batch_size=5)])
    assert results[0] == results[1]
    ours = {"dpo": collators.DataCollatorForPreference, "kto": collators.DataCollatorForUnpairedPreference}
    collator = ours.get(kind, collators.DataCollatorForLanguageModeling)(0)
    expected, got = (collator([rows[row] for row in range(3)]) for rows in (made, made.with_format("torch")))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("cut", "kept"), [("keep_start", "keep_end"), ("keep_end", "keep_start")])
def test_rows_that_lost_one_end_are_not_cut_to_keep_it(cut: str, kept: str, tmp_path: Path) -> None:
    """TRL would keep the wrong tokens without a word."""
    options = {"max_length": 8, "truncation_mode": cut}
    texts = tiny.dataset("dpo")
    made = prepare(texts, tiny.tokenizer(), on_bad="report", progress=False, **options)
    assert made.cut > 0
    message = (
        f"truncation_mode='{kept}' would cut rows that prefkern.data.prepare has cut already, with max_length=8 and "
        f"truncation_mode='{cut}': prepare them with truncation_mode='{kept}'"
    )
    dataset = made.dataset.shuffle(seed=0)
    dataset.save_to_disk(tmp_path / "rows")
    for rows in (dataset, dataset.select(range(3)), load_from_disk(tmp_path / "rows")):
        with patch(collators=True), pytest.raises(ValueError, match=message):
            trainer_on(rows, tmp_path, max_length=8, truncation_mode=kept)
        with pytest.raises(ValueError, match=f"prefkern.data.collate_pairs: {message}"):
            collate_pairs(ArrowRows(rows).__getitems__([0, 1]), pad_token_id=0, max_length=8, truncation_mode=kept)
        with patch(collators=True):
            trainer_on(rows, tmp_path, **options)
        collate_pairs(ArrowRows(rows).__getitems__([0, 1]), pad_token_id=0, **options)
    whole = prepare(texts, tiny.tokenizer(), max_length=50, progress=False).dataset
    with patch(collators=True):
        trainer_on(whole, tmp_path, max_length=8, truncation_mode="keep_end")


def test_a_reward_model_does_not_train_without_prompts(tmp_path: Path) -> None:
    with patch(collators=True):
        made = object.__new__(trl.RewardTrainer)
        with pytest.raises(ValueError, match="join_prompt=True"):
            made._prepare_dataset(pairs(), tiny.tokenizer(), None, "train")


def test_arrow_rows_in_a_loader() -> None:
    dataset = pairs().shuffle(seed=3)
    rows = ArrowRows(dataset)
    assert len(rows) == 12
    assert rows[2] == dataset[2]
    mine = collators.DataCollatorForPreference(0)
    theirs = dpo_trainer.DataCollatorForPreference(0)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(rows, batch_size=5, collate_fn=mine, num_workers=workers)
        plain = torch.utils.data.DataLoader(dataset, batch_size=5, collate_fn=theirs)
        for got, want in zip(loader, plain, strict=True):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(TypeError, match=r"datasets\.Dataset, got list"):
        ArrowRows([1])

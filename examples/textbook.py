"""PPO, DPO, KTO and ORPO side by side on SmolLM2-135M-Instruct, on the CPU, offline: as introductions present them.

    make textbook                     # or: python examples/textbook.py --updates 12 --output textbook-example

The same questions in the four row formats, one a method (``examples/data``):

    PPO    prompt, completion, reward     E min(r A, clip(r) A), held to the reference by a KL penalty
    DPO    prompt, chosen, rejected       -log s(beta (D_chosen - D_rejected))
    KTO    prompt, completion, label      each example by itself, against a baseline
    ORPO   prompt, response, score        the likelihood of the better response, and its odds against the worse one's

Dashed, the forms in which introductions write the last two: for KTO ``L_DPO + lambda KL(pi || pi_ref)``; for ORPO
``L_MLE - lambda R``, where a score of the data as R has no gradient: the score-weighted likelihood stands for it.
Prints a table, and writes a plot of log-probabilities, margin, KL and length on questions that no method saw.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import prefkern as pk
from prefkern import data
from prefkern.commands.benchmark.machine import processor
from prefkern.commands.demo import model

DATA = Path(__file__).parent / "data"
QUESTIONS = 2
"""Questions in a batch, each with its better and its worse answer."""
TOKENS = 48
"""The longest answer that is generated."""
POINTS = 4
"""Measurements after the first."""
PLOTTED = (
    ("chosen", "log-probability of a token (thin: worse answers)"),
    ("margin", "margin gained, nats per answer"),
    ("kl", "KL(policy || reference), nats per token"),
    ("length", "tokens of a greedy answer"),
)


History = list[dict[str, float]]
"""What was measured, from before the first update on."""


class Batch(NamedTuple):
    """Rows of the model's input, aligned targets, and what the reference makes of them."""

    ids: Tensor
    attention: Tensor
    targets: Tensor
    ref_hidden: Tensor
    values: Tensor | None = None  # rewards, labels or scores
    mismatched: "Batch | None" = None  # prompts with the answers of others, for KTO's baseline


class Student:
    """The model that is trained, and the reference that it was: its head, and its hidden states of every batch."""

    def __init__(self, loaded: model.Loaded) -> None:
        self.model, self.tokenizer = loaded.model.eval(), loaded.tokenizer
        self.pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.ref_weight = self.weight.detach().clone()

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.model.lm_head.weight
        return weight

    def hidden(self, batch: Batch) -> Tensor:
        """The states that the head multiplies: no logits are made."""
        states: Tensor = self.model.model(input_ids=batch.ids, attention_mask=batch.attention).last_hidden_state
        return states

    def batch(self, columns: Mapping[str, Tensor], prefix: str = "") -> Batch:
        """A collated batch, with the hidden states of the model as it is now for the reference's."""
        ids, attention, mask = (columns[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask"))
        values = next((columns[name] for name in ("score", "label") if name in columns), None)
        mismatched = self.batch(columns, "KL_") if not prefix and "KL_input_ids" in columns else None
        made = Batch(ids, attention, pk.shift_labels(ids, mask=mask), torch.empty(0), values, mismatched)
        with torch.no_grad():
            return made._replace(ref_hidden=self.hidden(made))

    def logps(self, batch: Batch, *, of_reference: bool = False) -> Tensor:
        """Of the targets, without a gradient."""
        with torch.no_grad():
            if of_reference:
                return pk.linear_token_logprobs(batch.ref_hidden, self.ref_weight, batch.targets).logps
            return pk.linear_token_logprobs(self.hidden(batch), self.weight, batch.targets).logps

    def reference(self, batch: Batch) -> dict[str, Tensor]:
        return {"ref_hidden": batch.ref_hidden, "ref_weight": self.ref_weight}


# ------------------------------------------------------------------------------------------------ the methods


def ppo(student: Student, batch: Batch, old: Tensor) -> Tensor:
    """``-min(r A, clip(r, 0.8, 1.2) A) + 0.05 k3``; A is the reward less the mean of its question, and r the ratio to
    ``old``, the policy that first saw the batch."""
    advantages = data.group_advantages(batch.values, QUESTIONS, method="dr_grpo")
    model_of = (student.hidden(batch), student.weight, batch.targets)
    return pk.linear_ppo_loss(*model_of, old, advantages, **student.reference(batch), kl_coef=0.05).loss


def dpo(student: Student, batch: Batch, old: Tensor) -> Tensor:
    """``-log s(0.1 (D_chosen - D_rejected))``, ``D = log pi - log pi_ref`` of an answer."""
    model_of = (student.hidden(batch), student.weight, batch.targets)
    return pk.linear_dpo_loss(*model_of, **student.reference(batch), beta=0.1).loss


def kl_guided(student: Student, batch: Batch, old: Tensor) -> Tensor:
    """``L_DPO + 0.1 KL(pi || pi_ref)``, the KL exact over the vocabulary."""
    model_of = (student.hidden(batch), student.weight, batch.targets)
    return pk.linear_kl_guided_dpo_loss(*model_of, **student.reference(batch), beta=0.1, kl_coef=0.1).loss


def kto(student: Student, batch: Batch, old: Tensor) -> Tensor:
    """``1 - s(0.1 (D - kl))`` of a good answer, ``1 - s(0.1 (kl - D))`` of a bad one; kl from mismatched answers."""
    assert batch.values is not None
    assert batch.mismatched is not None
    other, sums = batch.mismatched, []
    for of_reference in (False, True):
        logps = student.logps(other, of_reference=of_reference)
        sums.append(pk.sequence_logps(logps, targets=other.targets))
    model_of = (student.hidden(batch), student.weight, batch.targets, batch.values)
    return pk.linear_kto_loss(*model_of, **student.reference(batch), kl=pk.kto_kl(*sums), beta=0.1).loss


def orpo(student: Student, batch: Batch, old: Tensor) -> Tensor:
    """``L_MLE(better) - 0.1 log s(log odds(better) - log odds(worse))``, without a reference."""
    return pk.linear_orpo_loss(student.hidden(batch), student.weight, batch.targets, beta=0.1).loss


def score_weighted(student: Student, batch: Batch, old: Tensor) -> Tensor:
    """``-(score - 1/2) log pi`` of every answer, per token: how ``L_MLE - lambda R`` can learn from a score."""
    assert batch.values is not None
    model_of = (student.hidden(batch), student.weight, batch.targets, batch.values)
    return pk.linear_score_weighted_loss(*model_of, baseline=0.5).loss


def best_first(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scored responses, two to a question, as the rows of pairs: all better ones, then all worse ones."""
    better = columns["score"].view(-1, 2).argmax(1)
    first = torch.arange(0, columns["score"].numel(), 2)
    order = torch.cat([first + better, first + 1 - better])
    return {name: value[order] for name, value in columns.items()}


class Method(NamedTuple):
    """A loss, its rows, and how many updates in a row each batch serves."""

    loss: Callable[[Student, Batch, Tensor], Tensor]
    rows: str
    collate: Callable[..., dict[str, Any]]
    colour: str
    dashed: bool = False
    repeats: int = 1


METHODS = {
    "PPO": Method(ppo, "rewarded", data.collate_scored, "C0", repeats=2),
    "DPO": Method(dpo, "preference", data.collate_pairs, "C1"),
    "KTO": Method(kto, "unpaired", data.collate_unpaired, "C2"),
    "DPO + KL": Method(kl_guided, "preference", data.collate_pairs, "C2", dashed=True),
    "ORPO": Method(orpo, "scored", lambda rows, **given: best_first(data.collate_scored(rows, **given)), "C3"),
    "score-weighted": Method(score_weighted, "scored", data.collate_scored, "C3", dashed=True),
}


# ------------------------------------------------------------------------------------------------ data


def read(name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a file, as conversations where the tokenizer has a template, tokenised."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {"prompt": "user", **dict.fromkeys(("chosen", "rejected", "completion", "response"), "assistant")}
    for row in rows:
        for column, role in texts.items():
            if column in row and tokenizer.chat_template:
                row[column] = [{"role": role, "content": row[column]}]
            elif column in row:
                row[column] = f"Question: {row[column]}\nAnswer:" if role == "user" else f" {row[column]}"
    return list(data.prepare(rows, tokenizer, progress=False).dataset)


def batches(student: Student, name: str) -> list[Batch]:
    method = METHODS[name]
    rows, size = read(method.rows, student.tokenizer), QUESTIONS * (1 if method.rows == "preference" else 2)
    more = {"mismatched": True} if method.rows == "unpaired" else {}
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [student.batch(method.collate(part, pad_token_id=student.pad, **more)) for part in parts]


# ------------------------------------------------------------------------------------------------ training


def train(
    student: Student, name: str, held_out: Batch, prompts: list[list[int]], updates: int, learning_rate: float
) -> History:
    """One method from the start: what is measured before it, and after every fourth part of the updates."""
    method, seen = METHODS[name], batches(student, name)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    history = [measure(student, held_out, prompts) | {"update": 0}]
    measured = {round(updates * point / POINTS) for point in range(1, POINTS + 1)}
    for update in range(updates):
        batch = seen[update // method.repeats % len(seen)]
        if update % method.repeats == 0:
            old = student.logps(batch) if method.repeats > 1 else torch.empty(0)
        loss = method.loss(student, batch, old)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        if update + 1 in measured:
            history.append(measure(student, held_out, prompts) | {"update": update + 1, "loss": loss.item()})
    student.model.load_state_dict(student.start)
    return history


@torch.no_grad()
def measure(student: Student, batch: Batch, prompts: list[list[int]]) -> dict[str, float]:
    """On pairs that no method saw: all better answers, then all worse ones."""
    hidden = student.hidden(batch)
    policy, ref = (
        pk.pair_logps(logps, targets=batch.targets)
        for logps in (
            pk.linear_token_logprobs(hidden, student.weight, batch.targets).logps,
            student.logps(batch, of_reference=True),
        )
    )
    heads = (hidden, student.weight, batch.ref_hidden, student.ref_weight, batch.targets)
    kl = pk.linear_kl_divergence(*heads, direction="reverse")
    margin = (policy.chosen - policy.rejected) - (ref.chosen - ref.rejected)
    return {
        "chosen": (policy.chosen.sum() / policy.chosen_lengths.sum()).item(),
        "rejected": (policy.rejected.sum() / policy.rejected_lengths.sum()).item(),
        "margin": margin.mean().item(),
        "kl": kl.sum().item() / int((batch.targets != -100).sum()),
        "length": sum(map(len, answers(student, prompts))) / len(prompts),
    }


def answers(student: Student, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers, of at most ``TOKENS`` tokens."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[student.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    attention = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    given = {"attention_mask": attention, "max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": student.pad}
    made = student.model.generate(input_ids=ids, **given)[:, longest:].tolist()
    end = student.tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in made]


def run(loaded: model.Loaded, updates: int, learning_rate: float) -> dict[str, History]:
    """The history of every method."""
    student = Student(loaded)
    rows = read("held_out", student.tokenizer)
    held_out = student.batch(data.collate_pairs(rows, pad_token_id=student.pad))
    prompts, histories = [list(row["prompt_ids"]) for row in rows], {}
    for name in METHODS:
        start = time.perf_counter()
        histories[name] = train(student, name, held_out, prompts, updates, learning_rate)
        print(f"{name}: {updates} updates in {time.perf_counter() - start:.0f} s", flush=True)
    return histories


# ------------------------------------------------------------------------------------------------ what is shown


def table(title: str, histories: dict[str, History]) -> str:
    """The last measurement of every method, as Markdown."""
    shown = ("chosen", "rejected", "margin", "kl", "length")
    lines = [f"{title}; {datetime.date.today()}, {processor()}.", ""]
    lines.append("| | log-prob, better | worse | margin gained | KL | tokens |")
    lines.append("| --- |" + " ---: |" * len(shown))
    first = next(iter(histories.values()))[0]
    for name, last in {"before": first, **{name: history[-1] for name, history in histories.items()}}.items():
        lines.append(f"| {name} | " + " | ".join(f"{last[key]:.3f}" for key in shown) + " |")
    return "\n".join(lines) + "\n"


def plot(histories: dict[str, History], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(PLOTTED))
    for name, history in histories.items():
        method = METHODS[name]
        line = {"color": method.colour, "linestyle": "--" if method.dashed else "-"}
        updates = [point["update"] for point in history]
        for axis, (key, _) in zip(axes, PLOTTED, strict=True):
            axis.plot(updates, [point[key] for point in history], label=name, **line)
        axes[0].plot(updates, [point["rejected"] for point in history], linewidth=0.7, **line)
    for axis, (_, title) in zip(axes, PLOTTED, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(histories), frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=12, help="of each method, at least 4")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--model", help="a model of transformers, by folder or name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, default=Path("textbook-example"))
    given = parser.parse_args(arguments)
    if given.updates < POINTS:
        parser.error(f"--updates must be at least {POINTS}, got {given.updates}")

    model.check(given.model)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = model.load(given.model)
    histories = run(loaded, given.updates, given.learning_rate)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "history.json").write_text(json.dumps(histories, indent=1))
    text = table(f"{loaded.name}, {given.updates} updates of {2 * QUESTIONS} answers each", histories)
    (given.output / "report.md").write_text(text)
    plot(histories, given.output / "textbook.png")
    print(f"\n{text}\nplot: {given.output / 'textbook.png'}")


if __name__ == "__main__":
    main()

"""Checkpoints that are whole or absent, and resume bit for bit."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefkern import check
from prefkern.check import require
from prefkern.integrations.ppo.state import State

NUMBERS = "ppo.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def save(state: State, folder: Path | None = None) -> Path:
    """Model, optimiser and random state of every process, by accelerate; the run's own numbers beside them."""
    target = folder or Path(state.args.output_dir) / f"checkpoint-{state.global_step}"
    with _whole(state, target) as partial:
        state.accelerator.save_state(str(partial), safe_serialization=False)
        if state.accelerator.is_main_process:
            numbers = {
                "global_step": state.global_step,
                "episode": state.episode,
                "kl_coef": state.controller.coef,
                "history": state.history,
                "args": state.args.to_dict(),
            }
            (partial / NUMBERS).write_text(json.dumps(numbers))  # floats are written so that they read back exactly
    if folder is None and state.args.save_total_limit and state.accelerator.is_main_process:
        for old in _all(target.parent)[: -state.args.save_total_limit]:
            shutil.rmtree(old)
    return target


def load(state: State, folder: Path) -> None:
    file = folder / NUMBERS
    if not file.is_file():
        check.fail("PPOTrainer", f"{folder} must be a checkpoint of this trainer, got a folder without {NUMBERS}")
    numbers = json.loads(file.read_text())
    changed = {
        name: (value, now)
        for name, now in plain(state.args.to_dict()).items()
        if name in _SAME and (value := plain(numbers["args"]).get(name)) != now
    }
    if changed:
        found = "; ".join(f"{name}: {value!r} there, {now!r} here" for name, (value, now) in changed.items())
        check.fail("PPOTrainer", f"{folder} must have been saved with the options of this run, got {found}")
    state.accelerator.load_state(str(folder))
    state.global_step, state.episode = numbers["global_step"], numbers["episode"]
    state.controller.coef = numbers["kl_coef"]
    state.history = numbers["history"]


_SAME = ("seed", "batch_size")
"""What the position in the data is counted with."""


def newest(output_dir: str) -> Path | None:
    """The checkpoint of the latest step, if there is one."""
    return next(reversed(_all(Path(output_dir))), None)


def _all(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_pretrained(state: State, folder: Path) -> None:
    safetensors = require("safetensors.torch", "PPOTrainer.save_pretrained", "pip install 'prefkern[ppo]'")
    weights = state.accelerator.get_state_dict(state.model)
    with _whole(state, folder) as partial:
        if not state.accelerator.is_main_process:
            return
        policy = {name.removeprefix("policy."): value for name, value in weights.items() if name.startswith("policy.")}
        value = {name: tensor.contiguous() for name, tensor in weights.items() if name.startswith("value_")}
        model = state.accelerator.unwrap_model(state.model).policy
        model.save_pretrained(partial, state_dict=policy)
        safetensors.save_file(value, str(partial / "value_model.safetensors"))
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(partial)


@contextlib.contextmanager
def _whole(state: State, target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` when all processes have written and all is on disk. Until then,
    and where it fails, ``target`` is what it was."""
    partial = target.with_name(f".{target.name}.partial")
    main = state.accelerator.is_main_process
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    state.accelerator.wait_for_everyone()
    yield partial
    state.accelerator.wait_for_everyone()
    if main:
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        with contextlib.suppress(OSError):  # a folder cannot be opened on Windows
            handle = os.open(target.parent, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(old, ignore_errors=True)
    state.accelerator.wait_for_everyone()


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON and trackers take them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

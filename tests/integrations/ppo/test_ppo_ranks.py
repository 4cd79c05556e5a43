"""DDP and FSDP2 on two processes equal one process with all their episodes."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_ppo
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of a fork, since Python 3.12

# the longest response is on the second process, whose first part of a mini-batch is therefore the longer one
LENGTHS = ((3, 5), (4, 2), (2, 6), (5, 7), (3, 1), (6, 4))
OPTIONS: dict[str, Any] = {
    "num_ppo_epochs": 3,
    "num_mini_batches": 2,
    "per_device_train_batch_size": 1,
    "kl_controller": "adaptive",
    "entropy_coef": 0.01,
    "whiten_rewards": True,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,  # Adam divides rounding by rounding where a gradient is near 0
    "response_length": 4,
}
STEPS = 2


def episodes(rank: int | None) -> list[Any]:
    """All of them, or those of one process: an uneven part."""
    part = {None: slice(None), 0: slice(0, 2), 1: slice(2, None)}[rank]
    return [column[part] for column in tiny_ppo.episodes(LENGTHS)]


def run(trainer: Any, rank: int | None, folder: Path | None = None) -> dict[str, Any]:
    found = [trainer.step(*episodes(rank)) for _ in range(STEPS)]
    if folder is not None:  # a checkpoint in the middle, which must change nothing
        trainer.save_checkpoint(folder / "checkpoint")
        trainer.step(*episodes(rank))
        trainer.load_checkpoint(folder / "checkpoint")
    weights = trainer.accelerator.get_state_dict(trainer.model)
    return {"stats": found, "weights": {name: value.clone() for name, value in weights.items()}}


def accelerator(sharded: bool) -> Accelerator:
    made = Accelerator(cpu=True)
    if sharded:  # what accelerate does itself on an accelerator; on the CPU it has no setting for it
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        plugin.transformer_cls_names_to_wrap = ["Qwen2DecoderLayer"]
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return made


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1"}  # accelerate warns where it is not set
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for index, kind in enumerate(("ddp", "fsdp2")):
        os.environ["MASTER_PORT"] = str(_port(folder, index))
        AcceleratorState._reset_state(True)
        trainer = tiny_ppo.trainer(accelerator=accelerator(kind == "fsdp2"), **OPTIONS)
        assert trainer.accelerator.num_processes == 2
        assert trainer.sharded == (kind == "fsdp2")
        result = run(trainer, rank, Path(folder) / kind)
        queries, responses, rewards = episodes(rank)
        generated = trainer.generate(queries, do_sample=False)
        try:  # bad input of one process is refused on both
            trainer.step(queries, responses, rewards[:-1] if rank else rewards)
        except ValueError as error:
            result["refused"] = str(error)
        trainer.save_pretrained(Path(folder) / kind / "model")
        torch.save(result | {"generated": generated}, f"{folder}/{kind}-{rank}.pt")
        dist.destroy_process_group()


def _port(folder: str, index: int) -> int:
    return int((Path(folder) / f"port-{index}").read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for index in range(2):
        (folder / f"port-{index}").write_text(str(_free_port()))
    # forked, as everything is imported already: a spawned process takes 10 s for that
    mp.start_processes(process, args=(str(folder),), nprocs=2, start_method="fork")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(results: Path, kind: str) -> None:
    # the same parts of mini-batches: what is cut differently rounds differently
    single = tiny_ppo.trainer(**OPTIONS)
    expected = run(single, None)
    first, second = (torch.load(results / f"{kind}-{rank}.pt", weights_only=False) for rank in range(2))
    close = {"rtol": 0, "atol": 1e-5}
    moved = 0.0
    start = tiny_ppo.trainer(**OPTIONS).model.state_dict()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(_value(first["weights"], kind, name), value, **close)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-2
    tiny_ppo.assert_same(first["stats"], second["stats"])
    for theirs, ours in zip(first["stats"], expected["stats"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-5)

    assert first["refused"] == second["refused"]
    assert "got 4 queries, 4 responses, 3 rewards" in first["refused"]
    greedy = single.generate(episodes(None)[0], do_sample=False)
    tiny_ppo.assert_same(first["generated"] + second["generated"], greedy)
    loaded = type(single.model.policy).from_pretrained(results / kind / "model")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected["weights"][f"policy.{name}"], **close)


def _value(weights: dict[str, Tensor], kind: str, name: str) -> Tensor:
    return weights[name] if name in weights else weights[f"module.{name}"]

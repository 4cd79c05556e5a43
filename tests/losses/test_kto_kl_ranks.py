"""KTO's baseline over processes: a mean over all examples of all ranks; a rank without any is legal."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prefkern.losses import kto_kl

DIFFERENCES = [[3.0, 5.0, -1.0], []]  # per rank
SECOND = [[-9.0], [2.0, 1.0, 2.0]]


def rank(index: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    found = []
    for case in (DIFFERENCES, SECOND):
        ref = torch.zeros(len(case[index]))
        found.append(kto_kl(torch.tensor(case[index]), ref, group=dist.group.WORLD).item())
        found.append(kto_kl(torch.tensor(case[index]), ref).item())
    torch.save(found, f"{results}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_baseline_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{index}.pt") for index in range(2))
    assert first == [torch.tensor(7 / 3).item(), torch.tensor(7 / 3).item(), 0.0, 0.0]  # second case: relu(-4 / 4)
    assert second == [torch.tensor(7 / 3).item(), 0.0, 0.0, torch.tensor(5 / 3).item()]

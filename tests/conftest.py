"""Set up before any test module is imported: Triton's interpreter where there is no CUDA device, threads, seeds."""

import os
import re
import sys

import pytest
import torch

if re.search(r"-m\0(?!not )[^\0]*\bptx\b", "\0".join(sys.argv)):  # `pytest -m ptx`: kernels run on the PTX machine
    os.environ.setdefault("PREFKERN_PTX", "sm_90")
if "PREFKERN_PTX" in os.environ:
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():  # must be set before the first `import triton`, and stay set
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device; the interpreter runs the same case")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""Lazy logits under DDP and FSDP2, on one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_heads import tiny, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prefkern.integrations.transformers import lazy_logits, patch

IDS = tokens()


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def gradients(model: Any) -> list[torch.Tensor]:
    grads = [each.grad for each in model.parameters() if each.grad is not None]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in grads]


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.filterwarnings("ignore:find_unused")
def test_ddp_is_as_without(unused: bool) -> None:
    own, model = tiny(), tiny()
    own(input_ids=IDS, labels=IDS).loss.backward()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    with lazy_logits(wrapped) as lazy:
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert lazy.made_real == 0
    for got, expected in zip(gradients(model), gradients(own), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("resharded", [True, False])
def test_fsdp_with_the_loss_inside_the_wrapped_forward_is_as_without(resharded: bool) -> None:
    own, model = tiny(), tiny()
    with lazy_logits(model) as lazy:
        sharded(model, reshard_after_forward=resharded)
        for _ in range(2):  # accumulation
            own(input_ids=IDS, labels=IDS).loss.backward()
            model(input_ids=IDS, labels=IDS).loss.backward()
    assert (lazy.made_real, lazy.answered) == (0, 2)
    for got, expected in zip(gradients(model), gradients(own), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_fsdp_with_the_loss_outside_is_refused_with_the_remedy() -> None:
    model = tiny()
    with lazy_logits(model):
        sharded(model, reshard_after_forward=True)
        logits = model(input_ids=IDS).logits
        assert logits.shape == (2, 7, 48)
        with pytest.raises(ValueError, match=r"because FSDP has sharded it again, .*pass labels to model\(\.\.\.\)"):
            logits.logsumexp(-1)
        with pytest.raises(ValueError, match="because FSDP has sharded it again"):
            logits.sort(-1)


def test_a_model_that_is_sharded_already_needs_check_false() -> None:
    model = sharded(tiny())
    with pytest.raises(ValueError, match=r"are sharded or on meta, .* or pass check=False"):
        patch(model)
    with lazy_logits(model, check=False) as lazy:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert lazy.made_real == 0


def test_zero_3_is_refused() -> None:
    model = tiny()
    model.lm_head.weight.ds_id = 0  # as DeepSpeed marks its parameters
    with pytest.raises(ValueError, match=r"ZeRO-3 takes the output layer's weight away.*train with ZeRO-2 or FSDP2"):
        patch(model)
    del model.lm_head.weight.ds_id
    with lazy_logits(model):
        model.lm_head.weight.ds_id = 0
        with pytest.raises(ValueError, match="ZeRO-3"):
            model(input_ids=IDS)

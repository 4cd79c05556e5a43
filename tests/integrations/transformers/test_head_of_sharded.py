"""Heads of models under DDP and FSDP2, on one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_heads import head_logps, tiny, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prefkern.integrations.transformers import head_of, last_hidden


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cohere() -> Any:
    return tiny("cohere", logit_scale=0.25, tie_word_embeddings=False)


def sharded(model: Any, whole: Any = None) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model if whole is None else whole)


class Scored(nn.Module):
    """A module whose forward holds the model's trunk and the loss, as FSDP needs it."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, ids: Tensor) -> Tensor:
        return head_logps(self.policy, ids, ids).clone()


def test_a_model_in_ddp_is_unwrapped() -> None:
    model, ids = cohere(), tokens()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert head_of(wrapped)["weight"] is model.lm_head.weight
    torch.testing.assert_close(last_hidden(wrapped, ids), last_hidden(model, ids))


def test_what_was_compared_before_sharding_holds_after_it() -> None:
    model = cohere()
    head_of(model)
    head = head_of(sharded(model))
    assert isinstance(head["weight"], DTensor)
    assert head["logit_scale"] == 0.25


def test_a_sharded_model_cannot_be_compared() -> None:
    model = sharded(cohere())
    with pytest.raises(
        ValueError, match=r"are sharded or on meta, .* call head_of.model. once before they are sharded, or"
    ):
        head_of(model)
    assert head_of(model, check=False)["logit_scale"] == 0.25


@pytest.mark.parametrize("checked", [True, False])
def test_inside_the_wrapped_forward_the_weights_are_whole(checked: bool) -> None:
    model, ids = cohere(), tokens()
    expected = head_logps(cohere(), ids, ids)
    if checked:
        head_of(model)
    scored = sharded(model, Scored(model))
    if not checked:
        scored.policy = model
        with pytest.raises(ValueError, match="are sharded or on meta"):
            scored(ids)
        return
    got = scored(ids)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert isinstance(model.lm_head.weight.grad, DTensor)

"""No signature drifts: linear forms follow from the loss and the waist, modules from the loss."""

import inspect
from collections.abc import Callable

import pytest
import torch

from prefkern import losses
from prefkern.logprobs import linear_token_logprobs
from prefkern.losses import dpo_loss, linear_cross_entropy, linear_dpo_loss, pair_logps


def options_of(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function, eval_str=True).parameters)


WAIST = options_of(linear_token_logprobs)
DECIDED_BY_THE_LOSS = {"outputs", "entropy_grad"}
REFERENCE = {"ref_logps", "ref_hidden", "ref_weight", "ref_bias"}
FROM_TARGETS = {
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_lengths",
    "rejected_lengths",
}


def assert_signature(linear: Callable[..., object], own: dict[str, inspect.Parameter]) -> None:
    """hidden, weight, targets, the loss's own, then the waist's options: names, kinds, defaults and annotations."""
    head = ("hidden", "weight", "targets")
    rest = {name: p for name, p in WAIST.items() if name not in {*head, *DECIDED_BY_THE_LOSS}}
    want = {**{name: WAIST[name] for name in head}, **own, **rest}
    got = options_of(linear)
    assert list(got) == list(want)
    for name, parameter in want.items():
        assert (got[name].default, got[name].annotation) == (parameter.default, parameter.annotation), name
        positional = name in head or name == "ref_logps"
        assert (got[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD) == positional, name


def test_linear_dpo_signature() -> None:
    pairs, got = options_of(pair_logps), options_of(linear_dpo_loss)
    own = {name: got[name] for name in got if name in REFERENCE}
    own |= {name: p for name, p in options_of(dpo_loss).items() if name not in FROM_TARGETS}
    own |= {name: pairs[name] for name in ("cu_seqlens", "ld_alpha")}
    assert_signature(linear_dpo_loss, own)


def test_linear_cross_entropy_signature() -> None:
    got = options_of(linear_cross_entropy)
    assert_signature(
        linear_cross_entropy, {name: got[name] for name in ("reduction", "normalizer", "token_weights", "metrics")}
    )


LOSS_OF = {"DPOLoss": "dpo_loss", "KTOLoss": "kto_loss", "ORPOLoss": "orpo_loss", "PPOLoss": "ppo_loss"}


@pytest.mark.parametrize("name", LOSS_OF)
def test_module_is_its_loss_split_in_options_and_tensors(name) -> None:
    module, function = getattr(losses, name), options_of(getattr(losses, LOSS_OF[name]))
    options, tensors = options_of(module), options_of(module.forward)
    tensors.pop("self")
    assert not set(options) & set(tensors)
    assert set(options) | set(tensors) == set(function)
    for key, parameter in {**options, **tensors}.items():
        assert (parameter.default, parameter.annotation) == (function[key].default, function[key].annotation), key
    assert [key for key in function if key in tensors] == list(tensors)


@pytest.mark.parametrize("name", LOSS_OF)
def test_module_passes_every_argument_on(name, monkeypatch) -> None:
    function = getattr(losses, LOSS_OF[name])
    source = f"prefkern.losses.{function.__module__.rpartition('.')[2]}.{LOSS_OF[name]}"
    monkeypatch.setattr(source, lambda *args, **kwargs: inspect.signature(function).bind(*args, **kwargs).arguments)
    tensors = {key: object() for key in options_of(getattr(losses, name).forward) if key != "self"}
    module = getattr(losses, name)(0.7)
    assert module(**tensors) == {**tensors, **module.options}
    assert 0.7 in module.options.values()


def test_modules_compute_their_loss() -> None:
    x = [-torch.rand(4) for _ in range(4)]
    labels = torch.tensor([1, 0, 1, 0])
    torch.testing.assert_close(losses.DPOLoss(0.3, loss_type="hinge")(*x), dpo_loss(*x, beta=0.3, loss_type="hinge"))
    got = losses.KTOLoss(0.3, undesirable_weight=2.0)(x[0], x[1], labels, kl=0.1)
    torch.testing.assert_close(got, losses.kto_loss(x[0], x[1], labels, kl=0.1, beta=0.3, undesirable_weight=2.0))
    torch.testing.assert_close(losses.ORPOLoss(0.3)(*x[:3]), losses.orpo_loss(*x[:3], beta=0.3))
    got = losses.PPOLoss(0.1, kl_coef=0.2)(*x[:3], ref_logps=x[3], normalizer=9)
    torch.testing.assert_close(got, losses.ppo_loss(*x[:3], cliprange=0.1, kl_coef=0.2, ref_logps=x[3], normalizer=9))
    assert repr(losses.ORPOLoss(0.3)) == "ORPOLoss(beta=0.3, reduction='mean', metrics=True)"

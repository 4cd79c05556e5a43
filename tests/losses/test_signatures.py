"""No signature drifts: every option is written once, and reaches what reads it."""

import inspect
import math
import re
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import prefkern as pk
from prefkern import linear_kl_divergence, linear_token_logprobs, losses
from prefkern.head import inputs as head_inputs
from prefkern.head.inputs import Head, Reference
from prefkern.losses import cross_entropy, ppo
from prefkern.losses.modules import _Loss
from prefkern.options import fields, read, takes

KINDS: dict[type, set[str]] = {}
"""Every options class, with the public functions that take it."""


def parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def typed_dict(function: Callable[..., object]) -> type:
    """The TypedDict that a function's ``**options`` are declared to be."""
    (hint,) = typing.get_args(inspect.unwrap(function).__annotations__["options"])
    return hint


LINEAR = [name for name in losses.__all__ if name.startswith("linear_")]
WITH_REFERENCE = ["linear_dpo_loss", "linear_kl_guided_dpo_loss", "linear_kto_loss", "linear_ppo_loss"]
WITH_REFERENCE += ["linear_grpo_loss"]
    "linear_dpo_loss",
    "linear_kl_guided_dpo_loss",
    "linear_kto_loss",
    "linear_ppo_loss",
    "linear_grpo_loss",
]
TAKING = [linear_token_logprobs, linear_kl_divergence, losses.dpo_loss, losses.kto_loss, losses.orpo_loss]
TAKING += [losses.reward_loss, losses.kl_guided_dpo_loss, losses.reward_regularized_loss, losses.score_weighted_loss]
TAKING += [losses.cpo_loss, losses.ppo_loss, losses.value_loss, *(getattr(losses, name) for name in LINEAR)]
TAKING += [losses.grpo_loss, losses.rloo_loss, losses.importance_weights]


@pytest.mark.parametrize("function", TAKING, ids=lambda function: function.__name__)
def test_the_keywords_of_type_checkers_are_the_options(function) -> None:
    """Names and types of the TypedDict are those that the signature shows, which come from the options' classes."""
    own = {name for name in inspect.getfullargspec(function).kwonlyargs if name not in typed_hints(function)}
    shown = {name: p.annotation for name, p in parameters(function).items() if p.kind is p.KEYWORD_ONLY}
    assert {name: hint for name, hint in shown.items() if name not in own} == typed_hints(function)


def loss_behind(linear: str) -> Callable[..., object] | None:
    """The loss on log-probabilities of a linear form, where it has one."""
    name = linear.removeprefix("linear_")
    return getattr(losses, name) if name in losses.__all__ else None


def typed_hints(function: Callable[..., object]) -> dict[str, Any]:
    return typing.get_type_hints(typed_dict(function))


@pytest.mark.parametrize("function", TAKING, ids=lambda function: function.__name__)
def test_every_option_has_a_default(function) -> None:
    for name in typed_hints(function):
        assert parameters(function)[name].default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("name", LINEAR)
def test_linear_forms_take_every_option_of_the_head_and_of_their_loss(name) -> None:
    shown = parameters(getattr(losses, name))
    for option, hint, default in fields(Head):
        assert (shown[option].annotation, shown[option].default) == (hint, default), option
    loss = loss_behind(name)
    if loss is None:
        return
    for option in typed_hints(loss):
        assert shown[option] == parameters(loss)[option], option


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_linear_forms_with_a_reference_take_its_head(name) -> None:
    shown = parameters(getattr(losses, name))
    assert {"ref_logps", "ref_hidden", "ref_weight", *Reference._fields} <= set(shown)


R, T, H, V = 4, 3, 5, 6


def tensors() -> dict[str, Any]:
    """Valid arguments for every linear form."""
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(R, T, H, generator=g),
        "weight": torch.randn(V, H, generator=g),
        "targets": torch.randint(V, (R, T), generator=g),
        "old_logps": -4.0 * torch.rand(R, T, generator=g),
        "advantages": torch.randn(R, T, generator=g),
        "is_desirable": torch.tensor([1, 0, 1, 0]),
        "scores": torch.tensor([0.9, 0.1, 0.4, 0.7]),
        "rewards": torch.tensor([0.9, 0.1, 0.4, 0.7]),
        "fn": lambda stats: stats.logps.sum(),
    }


ALSO: dict[str, dict[str, Any]] = {"linear_grpo_loss": {"normalizer": R * T}}
"""What a form cannot do without, beside its positional arguments."""


def loss_of(name: str, **given: Any) -> torch.Tensor:
    function = getattr(losses, name)
    arguments = {key: tensors()[key] for key, p in parameters(function).items() if p.default is p.empty}
    arguments |= ALSO.get(name, {})
    if not any(key.startswith("ref_") for key in given):
        arguments |= reference(name)
    return function(**{**arguments, **given}).loss


def reference(name: str) -> dict[str, Any]:
    """What a linear form cannot do without: log-probabilities of sequences, or of tokens."""
    if name == "linear_kl_guided_dpo_loss":
        return {"ref_logps": torch.linspace(-3.0, -1.0, R * T).view(R, T), "kl_estimator": "k2"}
    return {"ref_logps": torch.linspace(-9.0, -3.0, R)} if name in ("linear_dpo_loss", "linear_kto_loss") else {}


HEAD_VALUES = {
    "bias": torch.linspace(-1.0, 1.0, V),
    "temperature": 0.7,
    "logit_scale": 1.5,
    "softcap": 2.0,
    "vocab_mask": None,  # depends on the targets: below
    "lora": (torch.ones(1, H), torch.linspace(0.0, 1.0, V)[:, None], 0.5),
    "compute_dtype": torch.bfloat16,
}


@pytest.mark.parametrize("option", HEAD_VALUES)
@pytest.mark.parametrize("name", LINEAR)
def test_every_option_of_the_head_changes_what_it_should(name, option) -> None:
    """As it changes the log-probabilities of the waist."""
    value = HEAD_VALUES[option]
    if option == "vocab_mask":
        value = torch.zeros(V, dtype=torch.bool).index_fill(0, tensors()["targets"].unique(), True)
        value[: V - 1] = True
        assert not value.all() or V - 1 in tensors()["targets"]
    logps = linear_token_logprobs(*(tensors()[key] for key in ("hidden", "weight", "targets"))).logps
    arguments = [tensors()[key] for key in ("hidden", "weight", "targets")]
    changes = not torch.equal(linear_token_logprobs(*arguments, **{option: value}).logps, logps)
    assert (loss_of(name, **{option: value}).item() != loss_of(name).item()) == changes


@pytest.mark.parametrize("name", LINEAR)
def test_options_of_rows_and_memory_reach_the_head(name) -> None:
    assert loss_of(name, max_memory=0).item() == pytest.approx(loss_of(name).item(), rel=1e-6)
    assert loss_of(name, num_scored=R * T).item() == loss_of(name).item()
    with pytest.raises(ValueError, match="num_scored must be the number of scored targets"):
        loss_of(name, num_scored=1)
    with pytest.raises(ValueError, match="max_memory must be bytes"):
        loss_of(name, max_memory=-1)
    with pytest.raises(ValueError, match="group is not supported"):
        loss_of(name, group=object())
    ignored = tensors()["targets"].clone()
    ignored[:, -1] = -7
    other = tensors()["targets"].clone()
    other[:, -1] = -100
    assert loss_of(name, targets=ignored, ignore_index=-7).item() == loss_of(name, targets=other).item()


class Change(NamedTuple):
    """An option with a value that is not its default, and what else it needs."""

    value: Any
    needs: dict[str, Any] = {}


TOKENS = torch.linspace(-1.0, 0.5, R * T).view(R, T)
CRITIC = {"values": TOKENS, "old_values": TOKENS.flip(0), "returns": TOKENS.flip(1)}
VESPO = {"loss_type": "vespo", "old_logps": -1.8 + 0.1 * TOKENS}
MILD = {"old_logps": -2.0 + 0.2 * TOKENS}  # ratios near 1: nothing is clipped away
COV = {"loss_type": "clip_cov", "cov_ratio": 1.0, "epsilon": 1.0, "epsilon_high": 1e6}  # all that lies within
SAME = Change("unbiased", {"ref_logps": TOKENS, "kl_coef": 0.1})
"""The value is the same without the ratio; the gradient is compared below."""
CHANGES: dict[str, dict[str, Change]] = {
    "linear_dpo_loss": {
        "beta": Change(0.3),
        "loss_type": Change(["hinge", "sft"]),
        "label_smoothing": Change(0.1),
        "loss_weights": Change([0.5]),
        "f_divergence_type": Change("js_divergence"),
        "f_alpha_divergence_coef": Change(0.7, {"f_divergence_type": "alpha_divergence"}),
        "discopop_tau": Change(0.5, {"loss_type": "discopop"}),
        "reduction": Change("sum"),
    },
    "linear_reward_regularized_loss": {"reward_coef": Change(0.3), "reduction": Change("sum")},
    "linear_score_weighted_loss": {"baseline": Change(0.3), "reduction": Change("sum")},
    "linear_kto_loss": {
        "beta": Change(0.3),
        "desirable_weight": Change(0.5),
        "undesirable_weight": Change(0.5),
        "loss_type": Change("apo_zero_unpaired", {"kl": 0.7}),
        "reduction": Change("sum"),
    },
    "linear_orpo_loss": {"beta": Change(0.3), "reduction": Change("sum")},
    "linear_cpo_loss": {
        "beta": Change(0.3),
        "loss_type": Change("hinge"),
        "label_smoothing": Change(0.1),
        "cpo_alpha": Change(0.5),
        "simpo_gamma": Change(0.7, {"loss_type": "simpo"}),
        "alpha": Change(0.2),
        "reduction": Change("sum"),
    },
    "linear_ppo_loss": {
        "values": Change(TOKENS, {**CRITIC, "values": TOKENS * 2}),
        "old_values": Change(TOKENS, {**CRITIC, "old_values": TOKENS * 9, "cliprange_value": 0.01}),
        "returns": Change(TOKENS, {**CRITIC, "returns": TOKENS * 2}),
        "value_mask": Change(TOKENS > 0, CRITIC),
        "cliprange": Change(0.01),
        "cliprange_high": Change(0.01),
        "delta": Change(1.01),
        "kl_coef": Change(0.3, {"ref_logps": TOKENS}),
        "kl_estimator": Change("k1", {"ref_logps": TOKENS, "kl_coef": 0.1}),
        "kl_gradient": SAME,
        "entropy_coef": Change(0.2),
        "positive_nll_coef": Change(0.2, {"is_correct": torch.tensor([1, 0, 1, 0])}),
        "vf_coef": Change(0.3, CRITIC),
        "cliprange_value": Change(0.01, {**CRITIC, "old_values": TOKENS * 3}),
        "reduction": Change("sequence_sum"),
        "max_completion_length": Change(31.0, {"reduction": "fixed"}),
    },
    "linear_grpo_loss": {
        "epsilon": Change(0.01),
        "epsilon_high": Change(0.01),
        "delta": Change(1.01),
        "loss_type": Change("sapo"),
        "importance_sampling_level": Change("sequence"),
        "beta": Change(0.3, {"ref_logps": TOKENS}),
        "use_bias_correction_kl": Change(False, {"ref_logps": TOKENS, "beta": 0.1}),
        "kl_estimator": Change("k1", {"ref_logps": TOKENS, "beta": 0.1}),
        "kl_gradient": Change("unbiased", {"ref_logps": TOKENS, "beta": 0.1}),
        "entropy_coef": Change(0.2),
        "positive_nll_coef": Change(0.2, {"is_correct": torch.tensor([1, 0, 1, 0])}),
        "sapo_temperature_pos": Change(2.0, {"loss_type": "sapo"}),
        "sapo_temperature_neg": Change(2.0, {"loss_type": "sapo"}),
        "vespo_k_pos": Change(0.5, VESPO),
        "vespo_lambda_pos": Change(0.5, VESPO),
        "vespo_k_neg": Change(0.5, VESPO),
        "vespo_lambda_neg": Change(0.5, VESPO),
        "importance_tau": Change(0.5, {"loss_type": "importance_mask"}),
        "cov_ratio": Change(0.9, {"loss_type": "kl_cov"}),
        "clip_cov_low": Change(0.0, {**COV, "clip_cov_high": 99.0}),
        "clip_cov_high": Change(0.1, {**COV, "clip_cov_low": 0.0}),
        "kl_cov_coef": Change(0.5, {"loss_type": "kl_cov"}),
        "dro_beta": Change(0.5, {"loss_type": "dro", "dro_beta": 0.1}),
        "reduction": Change("sequence_sum"),
        "max_completion_length": Change(31.0, {"reduction": "fixed"}),
    },
    "linear_rloo_loss": {
        "epsilon": Change(0.01, MILD),
        "epsilon_high": Change(0.01, MILD),
        "delta": Change(1.01),
        "entropy_coef": Change(0.2),
        "reduction": Change("sequence_sum"),
        "max_completion_length": Change(31.0, {"reduction": "fixed"}),
    },
}


CHANGES["linear_kl_guided_dpo_loss"] = CHANGES["linear_dpo_loss"] | {"kl_coef": Change(0.3)}


def test_every_option_of_every_loss_has_a_change() -> None:
    for name in LINEAR:
        loss = loss_behind(name)
        if loss is not None:
            assert set(CHANGES[name]) == set(typed_hints(loss)) - {"metrics"}, name


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in CHANGES for option in CHANGES[name]])
def test_linear_form_passes_every_option_of_the_loss_on(name, option) -> None:
    """It changes the linear form as it changes the loss of the log-probabilities, which the layout tests compare."""
    value, needs = CHANGES[name][option]
    changed = loss_of(name, **{**needs, option: value}).item() != loss_of(name, **needs).item()
    assert changed == (CHANGES[name][option] is not SAME)


def test_linear_ppo_passes_the_gradient_of_the_divergence_on() -> None:
    def gradient(form: str) -> torch.Tensor:
        hidden = tensors()["hidden"].requires_grad_()
        given = {"hidden": hidden, "ref_logps": TOKENS, "kl_coef": 0.1, "kl_gradient": form}
        return torch.autograd.grad(loss_of("linear_ppo_loss", **given), hidden)[0]

    assert not torch.allclose(gradient("plain"), gradient("unbiased"))


@pytest.mark.parametrize("name", [name for name in LINEAR if name != "linear_loss"])
def test_metrics_can_be_left_out(name) -> None:
    arguments = {key: tensors()[key] for key, p in parameters(getattr(losses, name)).items() if p.default is p.empty}
    arguments |= reference(name)
    arguments |= ALSO.get(name, {})
    arguments |= reference(name)
    assert getattr(losses, name)(**arguments, metrics=False).metrics == {}
    assert getattr(losses, name)(**arguments).metrics


@pytest.mark.parametrize("function", TAKING, ids=lambda function: function.__name__)
def test_a_misspelt_option_is_answered_with_the_nearest(function) -> None:
    arguments = [torch.zeros(1)] * sum(p.default is p.empty for p in parameters(function).values())
    known = next(iter(typed_hints(function)))
    with pytest.raises(
        TypeError, match=rf"^prefkern\.{function.__name__}: there is no option '{known}x': did you mean"
    ):
        function(*arguments, **{f"{known}x": 1})


def test_an_option_that_resembles_none_is_answered_with_the_list() -> None:
    with pytest.raises(
        TypeError,
        match=r"no option 'zzz': its options are beta, loss_type, label_smoothing, loss_weights",
    ):
        losses.dpo_loss(*[torch.zeros(1)] * 4, zzz=1)


class Sample(NamedTuple):
    size: typing.Annotated[float | None, head_inputs.above(0.0)] = None
    word: typing.Literal["a", "b"] = "a"
    maybe: typing.Literal["x", "y"] | None = None
    free: object = None


@takes(Sample)
def sample(**options: Any) -> Sample:
    return read("sample", options, Sample)


def test_options_are_read_in_their_ranges() -> None:
    assert sample() == Sample()
    assert sample(size=2, word="b", maybe="x", free=[]) == Sample(2.0, "b", "x", [])
    with pytest.raises(
        ValueError, match=re.escape("prefkern.sample: size must be a finite number in (0.0, inf), got 0")
    ):
        sample(size=0)
    with pytest.raises(ValueError, match="word must be one of 'a', 'b', got 'c'"):
        sample(word="c")
    with pytest.raises(ValueError, match="maybe must be one of 'x', 'y', got 'z'"):
        sample(maybe="z")
    with pytest.raises(ValueError, match="size must be a finite number"):
        sample(size=math.inf)


MODULES = {"CPOLoss": "cpo_loss", "DPOLoss": "dpo_loss", "KTOLoss": "kto_loss", "ORPOLoss": "orpo_loss"}
MODULES |= {"PPOLoss": "ppo_loss", "RewardLoss": "reward_loss", "KLGuidedDPOLoss": "kl_guided_dpo_loss"}
MODULES |= {"RewardRegularizedLoss": "reward_regularized_loss", "ScoreWeightedLoss": "score_weighted_loss"}
MODULES |= {"PPOLoss": "ppo_loss", "GRPOLoss": "grpo_loss", "RLOOLoss": "rloo_loss"}


def test_every_module_is_compared() -> None:
    found = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    assert found == set(MODULES)
    assert all(issubclass(getattr(losses, name), _Loss) for name in found)


@pytest.mark.parametrize("name", MODULES)
def test_module_is_its_loss_split_in_options_and_tensors(name) -> None:
    module, function = getattr(losses, name), parameters(getattr(losses, MODULES[name]))
    options, given = parameters(module), parameters(module.forward)
    given.pop("self")
    assert not set(options) & set(given)
    assert {**options, **given}.keys() == function.keys()
    for key, parameter in {**options, **given}.items():
        assert (parameter.default, parameter.annotation) == (function[key].default, function[key].annotation), key
    assert typing.get_type_hints(typed_dict(module.__init__)).keys() == options.keys()


def test_modules_compute_their_loss() -> None:
    x = [-torch.rand(4) for _ in range(4)]
    labels = torch.tensor([1, 0, 1, 0])
    got = losses.DPOLoss(0.3, loss_type="hinge")(*x)
    torch.testing.assert_close(got, losses.dpo_loss(*x, beta=0.3, loss_type="hinge"))
    got = losses.KTOLoss(0.3, undesirable_weight=2.0)(x[0], x[1], labels, kl=0.1)
    torch.testing.assert_close(got, losses.kto_loss(x[0], x[1], labels, kl=0.1, beta=0.3, undesirable_weight=2.0))
    torch.testing.assert_close(losses.ORPOLoss(0.3)(*x[:3]), losses.orpo_loss(*x[:3], beta=0.3))
    torch.testing.assert_close(losses.CPOLoss(0.3)(*x[:3]), losses.cpo_loss(*x[:3], beta=0.3))
    got = losses.PPOLoss(0.1, kl_coef=0.2)(*x[:3], ref_logps=x[3], normalizer=9)
    torch.testing.assert_close(got, losses.ppo_loss(*x[:3], cliprange=0.1, kl_coef=0.2, ref_logps=x[3], normalizer=9))
    torch.testing.assert_close(losses.RewardLoss(0.3)(*x[:2]), losses.reward_loss(*x[:2], center_coefficient=0.3))
    got = losses.KLGuidedDPOLoss(0.3, kl_coef=0.7, loss_type="hinge")(*x, x[0])
    torch.testing.assert_close(got, losses.kl_guided_dpo_loss(*x, x[0], beta=0.3, kl_coef=0.7, loss_type="hinge"))
    got = losses.RewardRegularizedLoss(0.3)(*x[:2])
    torch.testing.assert_close(got, losses.reward_regularized_loss(*x[:2], reward_coef=0.3))
    torch.testing.assert_close(losses.ScoreWeightedLoss(0.3)(*x[:2]), losses.score_weighted_loss(*x[:2], baseline=0.3))
    got = losses.GRPOLoss(0.1, beta=0.2)(*x[:3], ref_logps=x[3], normalizer=9)
    torch.testing.assert_close(got, losses.grpo_loss(*x[:3], epsilon=0.1, beta=0.2, ref_logps=x[3], normalizer=9))
    grid = [value[:, None] for value in x[:3]]
    got = losses.RLOOLoss(0.1)(*grid, normalizer=9)
    torch.testing.assert_close(got, losses.rloo_loss(*grid, epsilon=0.1, normalizer=9))
    assert repr(losses.ORPOLoss(0.3)) == "ORPOLoss(beta=0.3, reduction='mean', metrics=True)"


@pytest.mark.parametrize("name", MODULES)
def test_an_attribute_of_a_module_is_its_option(name) -> None:
    """Annealing works, and a value that the constructor refuses is refused."""
    module = getattr(losses, name)()
    first = next(iter(parameters(getattr(losses, name))))
    setattr(module, first, 0.7)
    assert getattr(module, first) == 0.7
    assert f"{first}=0.7" in repr(module)
    for bad in (-math.inf,) if first == "baseline" else (-1.0, -math.inf):
        with pytest.raises(ValueError, match=rf"^prefkern\.{name}: {first} must be a finite number in"):
            setattr(module, first, bad)
    assert getattr(module, first) == 0.7


def test_annealed_beta_is_that_of_the_loss() -> None:
    x = [torch.tensor([v]) for v in (-10.0, -12.0, -11.0, -11.0)]
    module = pk.DPOLoss(0.2)
    module.beta = 0.5
    assert module(*x).loss.item() == pytest.approx(0.3132617)  # log(1 + e^-1)


def test_options_apart_from_tensors() -> None:
    """What a module is made with holds no tensor: the value model's come in the call."""
    assert not set(ppo.PPO._fields) & set(ppo.Critic._fields)
    assert set(cross_entropy.CrossEntropy._fields) == {"reduction", "dft", "metrics"}

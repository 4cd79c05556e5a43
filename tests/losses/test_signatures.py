"""No signature drifts: linear forms follow from the loss and the waist, modules from the loss."""

import ast
import inspect
import re
import sys
import typing
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from prefkern import linear_kl_divergence, losses
from prefkern.head.logprobs import linear_token_logprobs
from prefkern.losses import dpo_loss, linear_cross_entropy, linear_loss, pair_logps
from prefkern.losses._head import Head


def options_of(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function, eval_str=True).parameters)


WAIST = options_of(linear_token_logprobs)
DECIDED_BY_THE_LOSS = {"outputs", "entropy_grad"}
HEAD = ("hidden", "weight", "targets")
DIVERGENCE = options_of(linear_kl_divergence)
REFERENCE = ("ref_logps", "ref_hidden", "ref_weight", "ref_bias")
REFERENCE_FORM = ("ref_temperature", "ref_logit_scale", "ref_softcap")  # as in linear_kl_divergence


class Form(NamedTuple):
    """A linear form: its loss, the arguments of that loss that the head gives, and what the head's side adds."""

    loss: str
    from_head: set[str]
    first: tuple[str, ...] = ()  # options of its own, before those of the loss
    last: tuple[str, ...] = ()  # options of pair_logps, after those of the loss


FORMS = {
    "linear_cpo_loss": Form(
        "cpo_loss", {"chosen_logps", "rejected_logps", "chosen_nll"}, first=("nll_targets",), last=("cu_seqlens",)
    ),
    "linear_dpo_loss": Form(
        "dpo_loss",
        {"chosen_logps", "rejected_logps", "ref_rejected_logps", "chosen_lengths", "rejected_lengths"},
        last=("cu_seqlens", "ld_alpha"),
    ),
    "linear_kto_loss": Form("kto_loss", {"logps"}, last=("cu_seqlens",)),
    "linear_orpo_loss": Form(
        "orpo_loss",
        {"chosen_avg_logps", "rejected_avg_logps", "chosen_nll"},
        first=("nll_targets",),
        last=("cu_seqlens",),
    ),
    "linear_ppo_loss": Form("ppo_loss", {"logps", "entropy"}),
}


def assert_signature(
    linear: Callable[..., object], own: dict[str, inspect.Parameter], positional: set[str] = frozenset()
) -> None:
    """hidden, weight, targets, the loss's own, then the waist's options: names, kinds, defaults and annotations."""
    rest = {name: p for name, p in WAIST.items() if name not in {*HEAD, *DECIDED_BY_THE_LOSS}}
    want = {**{name: WAIST[name] for name in HEAD}, **own, **rest}
    got = options_of(linear)
    assert list(got) == list(want)
    for name, parameter in want.items():
        assert (got[name].default, got[name].annotation) == (parameter.default, parameter.annotation), name
        by_position = got[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert by_position == (name in {*HEAD, *positional}), name


def implied(form: Form) -> tuple[dict[str, inspect.Parameter], set[str]]:
    """The arguments of the loss that the head does not give, in its order; a required reference, which becomes optional
    since there are two ways to give it, after the required ones; its other forms beside it; then what the head adds."""
    tensor = inspect.Parameter("_", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
    own = dict.fromkeys(form.first, tensor)
    given = {name.replace("ref_chosen", "ref"): p for name, p in options_of(getattr(losses, form.loss)).items()}
    given = {name: p for name, p in given.items() if name not in form.from_head}
    positional = {name for name, p in given.items() if p.kind != inspect.Parameter.KEYWORD_ONLY}
    if "ref_logps" in positional:
        required = {name: p for name, p in given.items() if name in positional - {"ref_logps"}}
        given = {**required, "ref_logps": tensor, **{name: p for name, p in given.items() if name not in positional}}
    for name, parameter in given.items():
        own |= {name: parameter} if name != "ref_logps" else dict.fromkeys(REFERENCE, tensor)
        own |= {} if name != "ref_logps" else {name: DIVERGENCE[name] for name in REFERENCE_FORM}
    return own | {name: options_of(pair_logps)[name] for name in form.last}, positional


def test_every_linear_form_is_compared() -> None:
    assert {name for name in losses.__all__ if re.fullmatch("linear_.+_loss", name)} == set(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_linear_form_signature(name) -> None:
    own, positional = implied(FORMS[name])
    assert_signature(getattr(losses, name), own, positional)


def test_linear_cross_entropy_signature() -> None:
    got = options_of(linear_cross_entropy)
    assert_signature(
        linear_cross_entropy, {name: got[name] for name in ("reduction", "normalizer", "token_weights", "metrics")}
    )


def test_linear_loss_is_the_waist_and_a_function() -> None:
    got = options_of(linear_loss)
    assert list(got)[:4] == [*HEAD, "fn"]
    del got["fn"]
    assert got == WAIST


def test_options_of_the_head_are_those_of_the_waist() -> None:
    assert Head._fields == tuple(name for name in WAIST if name not in {*HEAD, *DECIDED_BY_THE_LOSS})
    assert typing.get_type_hints(Head) == {name: WAIST[name].annotation or type(None) for name in Head._fields}


@pytest.mark.parametrize("name", [*FORMS, "linear_loss"])
def test_bodies_are_short(name) -> None:
    (function,) = ast.parse(inspect.getsource(getattr(losses, name))).body
    first, last = function.body[1].lineno, function.body[-1].end_lineno
    lines = inspect.getsource(getattr(losses, name)).splitlines()[first - 1 : last]
    assert len([line for line in lines if line.strip()]) < 15


R, T, H, V = 4, 3, 5, 6
TENSORS = {
    "hidden": torch.zeros(R, T, H),
    "weight": torch.zeros(V, H),
    "targets": torch.zeros(R, T, dtype=torch.long),
    "old_logps": torch.zeros(R, T),
    "advantages": torch.zeros(R),
    "is_desirable": torch.zeros(R),
    "fn": lambda stats: stats.logps.sum(),
}


def required(name: str, **given: object) -> dict[str, object]:
    """Valid arguments of a linear form, and those given."""
    parameters = options_of(getattr(losses, name))
    arguments = {key: TENSORS[key] for key, p in parameters.items() if p.default is p.empty}
    if name in ("linear_dpo_loss", "linear_kto_loss"):
        arguments["ref_logps"] = torch.zeros(R)
    return {**arguments, **given}


class Recorded(Exception):  # noqa: N818 - carries what a function was called with
    pass


def record(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
    signature = inspect.signature(getattr(sys.modules[module], function))

    def recorder(*args: object, **kwargs: object) -> None:
        raise Recorded(signature.bind(*args, **kwargs).arguments)

    monkeypatch.setattr(sys.modules[module], function, recorder)


@pytest.mark.parametrize("name", [*FORMS, "linear_loss"])
def test_linear_form_passes_every_option_of_the_head_on(name, monkeypatch) -> None:
    sentinels = {option: object() for option in Head._fields} | {"ignore_index": -7}
    record(monkeypatch, "prefkern.losses.linear", "linear_token_logprobs")
    with pytest.raises(Recorded) as caught:
        getattr(losses, name)(**required(name, **sentinels))
    (passed,) = caught.value.args
    assert {option: passed[option] for option in Head._fields} == sentinels


@pytest.mark.parametrize("name", ["linear_dpo_loss", "linear_kto_loss", "linear_ppo_loss"])
def test_linear_form_scores_the_reference_with_the_options_of_the_head(name, monkeypatch) -> None:
    """All but those of the policy's own weights and of a backward."""
    sentinels = {option: object() for option in Head._fields} | {"ignore_index": -7}
    reference = {"ref_hidden": object(), "ref_weight": object(), "ref_bias": object(), "ref_logps": None}
    form = {"temperature": object(), "logit_scale": 1.5, "softcap": 7.0}
    reference |= {f"ref_{option}": value for option, value in form.items()}
    record(monkeypatch, "prefkern.losses._head", "linear_token_logprobs")
    with pytest.raises(Recorded) as caught:
        getattr(losses, name)(**required(name, **sentinels, **reference))
    (passed,) = caught.value.args
    want = sentinels | form | {"bias": reference["ref_bias"], "lora": None, "max_memory": None}
    assert {option: passed[option] for option in Head._fields} == want
    assert (passed["hidden"], passed["weight"]) == (reference["ref_hidden"], reference["ref_weight"])


TOKENS = torch.ones(R, T)
ANOTHER = {  # of each option a value that is not its default
    "beta": 0.3,
    "loss_type": {"cpo_loss": "simpo", "dpo_loss": "hinge", "kto_loss": "apo_zero_unpaired"},
    "label_smoothing": 0.1,
    "weights": torch.ones(R // 2),
    "reduction": {
        **dict.fromkeys(("cpo_loss", "dpo_loss", "kto_loss", "orpo_loss"), "sum"),
        "ppo_loss": "sequence_sum",
    },
    "cpo_alpha": 0.5,
    "simpo_gamma": 0.6,
    "alpha": 0.2,
    "metrics": False,
    "kl": 0.7,
    "desirable_weight": 0.5,
    "undesirable_weight": 0.6,
    "is_desirable": torch.ones(R, dtype=torch.bool),
    "ref_logps": {"kto_loss": torch.ones(R), "ppo_loss": TOKENS},
    "old_logps": TOKENS,
    "advantages": TOKENS,
    "cliprange": 0.3,
    "cliprange_high": 0.4,
    "delta": 3.0,
    "kl_coef": 0.1,
    "kl_estimator": "k1",
    "entropy_coef": 0.2,
    "values": TOKENS,
    "old_values": TOKENS,
    "returns": TOKENS,
    "value_mask": TOKENS,
    "vf_coef": 0.3,
    "cliprange_value": 0.4,
    "normalizer": 7.0,
}
OPTIONS = [
    (name, option)
    for name, form in FORMS.items()
    for option in options_of(getattr(losses, form.loss))
    if option in options_of(getattr(losses, name)) and option not in ("mask", "cu_seqlens")  # those meet the targets
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_linear_form_passes_every_option_of_the_loss_on(name, option, monkeypatch) -> None:
    loss = FORMS[name].loss
    value = ANOTHER[option][loss] if isinstance(ANOTHER[option], dict) else ANOTHER[option]
    record(monkeypatch, f"prefkern.losses.{name.removesuffix('_loss')}", loss)
    with pytest.raises(Recorded) as caught:
        getattr(losses, name)(**required(name, **{option: value}))
    (passed,) = caught.value.args
    assert passed[option] is value
    defaults = {key: p.default for key, p in options_of(getattr(losses, loss)).items() if p.default is not p.empty}
    others = {key: passed[key] for key in passed if key in ANOTHER and key in defaults and key != option}
    assert others == {key: defaults[key] for key in others}


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

"""The calls that `recorded_calls` makes, but for those of ``prefkern.data``.

To extend: yield another `Case` from one of the generators in `EVERY`: a public name, a label, arguments and options.
"""

import itertools

import torch
from torch import Tensor

import prefkern
from prefkern.losses.policy import POLICY_LOSSES
from recorded_inputs import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    Cases,
    choices,
    flags,
    head,
    head_options,
    logps,
    normal,
    reference,
    rows_of,
    token_ids,
)

ALL = ("logps", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
BOUNDS = torch.tensor([0, 5, 9, 18, 24])
LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Tensor]]] = {
    "padded": ((4, 6), {}),
    "packed": ((24,), {"cu_seqlens": BOUNDS}),
}
REDUCTIONS = ("mean", "sum", "none")
MEMORY = (None, 4000, 600, 0)
"""Everything, many rows, few rows and nothing is kept from forward to backward."""


# ------------------------------------------------------------------------------------------------ log-probabilities


def waist() -> Cases:
    for dtype, entropy_grad in itertools.product((F16, BF16, F32, F64), (False, True)):
        given = {"logits": normal(7, 3, 101, seed=1, scale=3, dtype=dtype, grad=True)}
        given["targets"] = token_ids(7, 3, V=101, seed=2)
        for options in ({}, {"temperature": 0.7}, {"softcap": 4.0, "temperature": normal(7, 3, seed=3).abs() + 0.5}):
            yield Case("token_logprobs", str(dtype), given, {"outputs": ALL, "entropy_grad": entropy_grad, **options})
    impossible = normal(24, 101, seed=1, scale=3).masked_fill(flags(24, 101, seed=4, share=0.1), -torch.inf)
    given = {"logits": impossible.requires_grad_(), "targets": token_ids(24, V=101, seed=2)}
    yield Case("token_logprobs", "infinite", given, {"outputs": ALL, "entropy_grad": True})
    large = {"logits": normal(200, 8192, seed=1, scale=3), "targets": token_ids(200, V=8192, seed=2)}
    yield Case("token_logprobs", "large", large, {"outputs": ALL})

    name = "linear_token_logprobs"
    plans = ("hidden weight", "hidden", "weight", "")
    for dtype, trained, memory in itertools.product((F16, BF16, F32, F64), plans, MEMORY):
        yield Case(name, f"{dtype} {trained}", head(4, 6, dtype=dtype, trained=trained), {"max_memory": memory})
    for trained, memory, entropy in itertools.product(plans, MEMORY, (False, True)):
        shared = {"outputs": ALL, "entropy_grad": entropy, "max_memory": memory}
        for label, options in head_options(4, 6, trained="weight" in trained).items():
            yield Case(name, f"{label}, {trained}", head(4, 6, trained=trained), {**options, **shared})
        several = {**head(4, 6, trained=trained), "targets": token_ids(4, 6, 5, V=101, seed=9)}
        shared["outputs"] = ALL[:-1]
        for label in ("bias", "temperature per row", "softcap"):
            options = head_options(4, 6, trained="weight" in trained)[label]
            yield Case(name, f"several targets, {label}, {trained}", several, {**options, **shared})
    for dtype, memory in itertools.product((BF16, F32), (None, 0)):
        shared = {"outputs": ALL, "max_memory": memory}
        given = head(24, dtype=dtype)
        scored = int((given["targets"] != -100).sum())
        yield Case(name, f"counted {dtype}", given, {**shared, "num_scored": scored})
        yield Case(name, f"int32 {dtype}", {**given, "targets": given["targets"].int()}, shared)
        yield Case(name, f"nothing scored {dtype}", {**given, "targets": torch.full((24,), -100)}, shared)
        yield Case(name, f"no rows {dtype}", head(0, dtype=dtype), shared)
        yield Case(name, f"{dtype} weight cast", {**given, "weight": normal(101, 16, seed=2, grad=True)}, shared)
        yield Case(
            name, f"{dtype} computed otherwise", given, {**shared, "compute_dtype": F64 if dtype == F32 else F32}
        )
        yield Case(name, f"autocast {dtype}", given, shared, torch.autocast("cpu", BF16))
        cast = head(200, H=320, V=8192, dtype=dtype)  # slices of the cast weight, blocks of rows
        yield Case(name, f"wide {dtype}", cast, {**shared, "entropy_grad": True})
    for options in ({}, {"max_memory": 1 << 20}):
        yield Case(name, "wide float16", head(400, H=320, V=8192, dtype=F16), options)
    spread = {**head(24), "hidden": normal(16, 24, seed=1, grad=True).T}
    for memory in MEMORY:
        yield Case(name, "not contiguous", spread, {"max_memory": memory})
        yield Case(name, "graph kept", head(24), {"max_memory": memory}, retain=True)
        yield Case(name, "graph kept, frozen", head(24, trained="hidden"), {"max_memory": memory}, retain=True)
    for options in ({}, {"max_memory": 0}, {"max_memory": 1 << 20, "entropy_grad": True}):  # several tiles and slices
        yield Case(name, "many rows", head(4400, H=8, V=8192), {**options, "outputs": ("logps", "entropy")})
    yield Case(name, "many rows, frozen", head(4400, H=8, V=8192, trained="hidden"), {"max_memory": 1 << 16})


def sequences() -> Cases:
    for layout, (rows, bounds) in LAYOUTS.items():
        ids, mask = token_ids(*rows, V=50, seed=1, ignored=0), flags(*rows, seed=2)
        for options in ({}, {"mask": mask}, {"mask": mask, "ignore_index": -1}):
            yield Case("shift_labels", layout, {"input_ids": ids, **bounds}, options)
        for dtype, average, masked in itertools.product((BF16, F32, F64), (False, True), (False, True)):
            given = {"logps": logps(*rows, seed=3, dtype=dtype, grad=True), **bounds}
            options = {"average": average} | ({"mask": mask} if masked else {"targets": token_ids(*rows, V=9, seed=4)})
            yield Case("sequence_logps", f"{layout} {dtype}", given, options)
            for ld_alpha in (None, 0.3):
                yield Case("pair_logps", f"{layout} {dtype}", given, {**options, "ld_alpha": ld_alpha})


# ------------------------------------------------------------------------------------------------ losses


def preference() -> Cases:
    trained = "chosen_logps rejected_logps chosen_nll chosen_avg_logps rejected_avg_logps logps"
    lengths = {"chosen_lengths": torch.tensor([3, 9, 4, 7, 5]), "rejected_lengths": torch.tensor([4, 2, 8, 1, 6])}
    desirable = {"is_desirable": torch.tensor([True, False, True, True, False])}
    for dtype in (BF16, F32, F64):
        pairs = rows_of(
            "chosen_logps rejected_logps ref_chosen_logps ref_rejected_logps", 5, trained=trained, dtype=dtype
        )
        for options in choices(
            loss_type=("sigmoid", "hinge", "ipo"), reduction=REDUCTIONS, weights=(None, logps(5, seed=9).neg())
        ):
            given = {**pairs, **lengths} if options["loss_type"] == "ipo" else pairs
            yield Case("dpo_loss", str(dtype), given, options)
        yield Case("dpo_loss", str(dtype), pairs, {"label_smoothing": 0.2, "beta": 0.3})
        two = rows_of("chosen_logps rejected_logps chosen_nll", 5, trained=trained, dtype=dtype)
        for options in choices(loss_type=("sigmoid", "hinge", "ipo", "simpo"), reduction=REDUCTIONS, alpha=(0.0, 0.3)):
            yield Case("cpo_loss", str(dtype), two, options)
        yield Case("cpo_loss", str(dtype), two, {"label_smoothing": 0.2, "cpo_alpha": 0.5})
        yield Case(
            "cpo_loss", f"no likelihood {dtype}", {**two, "chosen_nll": None}, {"loss_type": "simpo", "cpo_alpha": 0.0}
        )
        average = rows_of("chosen_avg_logps rejected_avg_logps chosen_nll", 5, trained=trained, dtype=dtype)
        average["chosen_nll"] = normal(seed=7, dtype=dtype).abs().requires_grad_()
        for options in choices(beta=(0.1, 0.4), reduction=REDUCTIONS):
            yield Case("orpo_loss", str(dtype), average, options)
        unpaired = rows_of("logps ref_logps", 5, trained=trained, dtype=dtype) | desirable
        for options in choices(loss_type=("kto", "apo_zero_unpaired"), reduction=REDUCTIONS, kl=(None, 0.4)):
            if options["loss_type"] == "kto" or options["kl"] is None:
                yield Case("kto_loss", str(dtype), unpaired, {**options, "desirable_weight": 1.3})
        yield Case("kto_kl", str(dtype), rows_of("kl_logps ref_kl_logps", 5, trained="", dtype=dtype))
    yield Case("DPOLoss", "", {**pairs, **lengths}, {"loss_type": "ipo", "beta": 0.3})
    yield Case("KTOLoss", "", {**unpaired, "kl": torch.tensor(0.2)}, {"undesirable_weight": 1.2})
    yield Case("ORPOLoss", "", average, {"reduction": "sum"})


PPO_OPTIONS = (
    {},
    {"cliprange": 0.1, "cliprange_high": 0.3, "delta": 1.5},
    {"kl_coef": 0.1, "kl_estimator": "k1"},
    {"kl_coef": 0.1, "kl_estimator": "k2"},
    {"kl_coef": 0.1, "kl_estimator": "k3"},
    {"reduction": "sequence"},
    {"reduction": "sequence_sum", "normalizer": 7},
    {"reduction": "none"},
    {"entropy_coef": 0.05, "normalizer": torch.tensor(11.0)},
)


def policy() -> Cases:
    for (layout, (rows, bounds)), dtype in itertools.product(LAYOUTS.items(), (BF16, F32, F64)):
        mask = flags(*rows, seed=2)
        per_token = {"advantages": normal(*rows, seed=3, dtype=dtype)}
        tokens = rows_of("logps old_logps ref_logps entropy", *rows, trained="logps entropy", dtype=dtype)
        values = rows_of("values old_values returns", *rows, trained="values", dtype=dtype)
        for options, masked in itertools.product(PPO_OPTIONS, (None, mask)):
            given = {**tokens, **per_token, **bounds, "mask": masked}
            yield Case("ppo_loss", f"{layout} {dtype} mask {masked is not None}", given, options)
        given = {**tokens, **values, **bounds, "advantages": normal(4, seed=3, dtype=dtype), "mask": mask}
        for name in ("ppo_loss", "PPOLoss"):
            yield Case(name, f"{layout} {dtype} with values", given, {"vf_coef": 0.3, "entropy_coef": 0.1})
        for options in ({}, {"cliprange_value": 0.5, "normalizer": 9}, {"mask": mask}):
            yield Case("value_loss", f"{layout} {dtype}", {**values, **bounds}, options)


def policy_table() -> Cases:
    needed = {"cispo": {"epsilon_high": 1.4}, "dro": {"dro_beta": 0.3}, "clip_cov": {"cov_ratio": 1.0}}
    for (layout, (rows, bounds)), dtype in itertools.product(LAYOUTS.items(), (BF16, F32, F64)):
        label = f"{layout} {dtype}"
        tokens = rows_of("logps old_logps ref_logps", *rows, trained="logps", dtype=dtype)
        tokens |= {"advantages": normal(4, seed=3, dtype=dtype), "mask": flags(*rows, seed=2), **bounds}
        weights = {"token_weights": normal(*rows, seed=4).abs(), "is_correct": flags(4, seed=5)}
        for name in POLICY_LOSSES:
            options = {"loss_type": name, "normalizer": 9.0, "max_completion_length": 6.0, **needed.get(name, {})}
            yield Case("grpo_loss", label, tokens, options)
            more = {"beta": 0.1, "positive_nll_coef": 0.2, "kl_gradient": "unbiased"}
            yield Case("grpo_loss", f"{label} weighted", {**tokens, **weights}, {**options, **more})
        for level in ("sequence", "product"):
            options = {"loss_type": "grpo", "importance_sampling_level": level, "beta": 0.1}
            yield Case("grpo_loss", label, tokens, options)
        del tokens["ref_logps"]
        yield Case("GRPOLoss", label, tokens, {"loss_type": "luspo", "delta": 1.5})
        for name in ("rloo_loss", "RLOOLoss"):
            yield Case(name, label, tokens, {"epsilon_high": 0.3})
        pair = {**rows_of("logps rollout_logps", *rows, trained="", dtype=dtype), "mask": tokens["mask"], **bounds}
        for options in choices(level=("token", "sequence", "geometric"), mode=("truncate", "mask"), gate=(None, "kl")):
            gate = {"gate_level": "sequence_max", "gate_high": 0.4} if options["gate"] else {}
            yield Case("importance_weights", label, pair, {**options, **gate})
        hidden = {**head(*rows), **{key: tokens[key] for key in ("old_logps", "advantages", "mask")}, **bounds}
        yield Case("linear_grpo_loss", label, hidden, {"loss_type": "grpo", "entropy_coef": 0.1})
        yield Case("linear_rloo_loss", label, hidden)


def linear_losses() -> Cases:
    for layout, (rows, bounds) in LAYOUTS.items():
        models = {"one product": (head(*rows), {}), "bfloat16": (head(*rows, dtype=BF16), {})}
        models["frozen"] = (head(*rows, trained="hidden"), {"max_memory": 0})
        options = head_options(*rows, trained=True)
        models |= {label: (head(*rows), options[label]) for label in ("bias", "softcap", "temperature per row", "lora")}
        none = {"ref_bias": torch.zeros(101), "ref_softcap": float("inf"), "ref_logit_scale": 1.0}
        unpaired = {"is_desirable": torch.tensor([True, False, True, False])}
        for label, (model, form) in models.items():
            given, label = {**model, **bounds}, f"{layout}, {label}"
            ref = {"ref_logps": logps(4, seed=11)}
            full = {**reference(*rows), **{key: none[key] for key in none if key[4:] in form}}
            likely = {"nll_targets": given["targets"].masked_fill(flags(*rows, seed=12, share=0.3), -100)}
            for loss_type in ("sigmoid", "hinge", "ipo"):
                yield Case("linear_dpo_loss", label, {**given, **ref}, {**form, "loss_type": loss_type})
            more = {**form, "ld_alpha": 0.4, "weights": torch.tensor([0.5, 2.0]), "reduction": "sum"}
            yield Case("linear_dpo_loss", f"{label}, ref_hidden", {**given, **full}, more)
            for loss_type in ("kto", "apo_zero_unpaired"):
                kto = {**form, "loss_type": loss_type}
                yield Case("linear_kto_loss", label, {**given, **unpaired, **ref}, kto)
            yield Case("linear_kto_loss", f"{label}, ref_hidden", {**given, **unpaired, **full}, {**form, "kl": 0.3})
            for loss_type in ("sigmoid", "hinge", "ipo", "simpo"):
                yield Case("linear_cpo_loss", label, given, {**form, "loss_type": loss_type})
            for name in ("linear_orpo_loss", "linear_cpo_loss"):
                yield Case(name, label, {**given, **likely}, {**form, "reduction": "none"})
            tokens = rows_of("old_logps ref_logps", *rows, trained="")
            tokens["advantages"] = normal(4, seed=13)
            for extra in PPO_OPTIONS:
                yield Case("linear_ppo_loss", label, {**given, **tokens}, {**form, **extra})
            del tokens["ref_logps"]
            values = rows_of("values old_values returns", *rows, trained="values")
            masked = {**given, **tokens, **values, **full, "mask": flags(*rows, seed=14)}
            yield Case("linear_ppo_loss", f"{label}, ref_hidden", masked, {**form, "kl_coef": 0.1})


def _squares(stats: prefkern.TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
    assert stats.entropy is not None
    return (stats.logps.square() - 0.1 * stats.entropy).sum(), {"logps": stats.logps.mean()}


def _squares_of_constants(stats: prefkern.TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
    assert stats.entropy is not None
    return _squares(stats._replace(entropy=stats.entropy.detach()))


def linear_sums() -> Cases:
    name = "linear_cross_entropy"
    weights = {"token_weights": normal(4, 6, seed=15).abs()}
    for trained, memory, dtype in itertools.product(
        ("hidden weight", "hidden", "weight", ""), MEMORY, (BF16, F32, F64)
    ):
        given = head(4, 6, dtype=dtype, trained=trained)
        for options in (
            {},
            {"reduction": "sum", **weights},
            {"normalizer": 30, "metrics": False},
            {"reduction": "none"},
        ):
            yield Case(name, f"{dtype} {trained}", given, {**options, "max_memory": memory})
    for trained in ("hidden weight", "hidden", ""):
        for (label, options), memory in itertools.product(
            head_options(4, 6, trained=trained != "hidden").items(), (None, 0)
        ):
            yield Case(name, f"{label}, {trained}", head(4, 6, trained=trained), {**options, "max_memory": memory})
            fn = _squares if trained else _squares_of_constants
            loss = {"fn": fn, "outputs": ("logps", "entropy"), "entropy_grad": trained != ""}
            given = {**head(4, 6, trained=trained), **loss}
            yield Case("linear_loss", f"{label}, {trained}", given, {**options, "max_memory": memory})
    yield Case(name, "graph kept", head(4, 6), retain=True)
    for trained, memory in itertools.product(("hidden weight", ""), (None, 1 << 16, 1 << 21)):  # panels, tiles, slices
        yield Case(
            name, f"wide, {trained}", head(200, H=320, V=8192, dtype=BF16, trained=trained), {"max_memory": memory}
        )
        yield Case(name, f"many rows, {trained}", head(2400, H=8, V=8192, trained=trained), {"max_memory": memory})


# ------------------------------------------------------------------------------------------------ divergences


def divergences() -> Cases:
    kinds = ({"direction": "forward"}, {"direction": "reverse"}, *({"jsd_beta": beta} for beta in (0.0, 0.3, 1.0)))
    for dtype, kind in itertools.product((F16, BF16, F32, F64), kinds):
        logits = {"logits": normal(4, 6, 101, seed=1, scale=3, dtype=dtype, grad=True)}
        logits["ref_logits"] = normal(4, 6, 101, seed=2, scale=3, dtype=dtype)
        yield Case("kl_divergence", str(dtype), logits, kind)
        more = {"targets": token_ids(4, 6, V=101, seed=3), "temperature": normal(4, 6, seed=7).abs() + 0.5}
        yield Case("kl_divergence", str(dtype), {**logits, **more}, {**kind, "ref_temperature": 0.8})
        for trained, memory in itertools.product(("hidden weight", "hidden", "weight", ""), MEMORY):
            given = {**head(4, 6, dtype=dtype, trained=trained), **reference(4, 6, dtype=dtype)}
            yield Case("linear_kl_divergence", f"{dtype} {trained}", given, {**kind, "max_memory": memory})
            if dtype in (BF16, F32):
                form = {"bias": normal(101, seed=4, dtype=dtype, grad="weight" in trained), "softcap": 5.0}
                form |= {
                    "logit_scale": 0.5,
                    "ref_bias": normal(101, seed=5),
                    "ref_softcap": 6.0,
                    "ref_logit_scale": 1.5,
                }
                form |= {"outputs": ("divergence", "entropy"), "max_memory": memory, "ref_temperature": 0.8}
                yield Case("linear_kl_divergence", f"{dtype} {trained}", given, {**kind, **form})
    yield Case("linear_kl_divergence", "no rows", {**head(0), **reference(0)})
    for memory in (None, 1 << 20, 0):
        wide = {**head(200, H=320, V=8192, dtype=BF16), **reference(200, V=8192, dtype=BF16)}
        yield Case("linear_kl_divergence", "wide", wide, {"max_memory": memory})
        many = {**head(4400, H=8, V=8192), **reference(4400, H=4, V=8192)}
        yield Case("linear_kl_divergence", "many rows", many, {"max_memory": memory})
    for tail, reduction, normalizer in itertools.product((True, False), REDUCTIONS, (None, 9)):
        student = {"logps_k": normal(4, 6, 9, seed=1).log_softmax(-1)[..., :5].clone().requires_grad_()}
        student["teacher_logps_k"] = normal(4, 6, 9, seed=2).log_softmax(-1)[..., :5]
        if normalizer is None or reduction == "mean":
            options = {"tail": tail, "reduction": reduction, "normalizer": normalizer}
            yield Case("topk_kl", "", student, options)
            yield Case("topk_kl", "masked", {**student, "mask": flags(4, 6, seed=3)}, options)


def plans() -> Cases:
    for options in choices(itemsize=(2, 4), max_memory=(None, 0, 1 << 24), accelerator=(True, False)):
        yield Case("plan.explain", "", {"tokens": 4096, "hidden": 512, "vocab": 32000}, options)


EVERY = (plans, waist, sequences, preference, policy, policy_table, linear_losses, linear_sums, divergences)

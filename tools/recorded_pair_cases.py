"""Calls of every pair loss and of the textbook forms, whose results `recorded_calls` records and compares."""

import torch

from prefkern.losses.preference import PAIR_LOSSES
from recorded_inputs import BF16, F32, F64, Case, Cases, choices, flags, head, logps, normal, reference, rows_of

NAMES = "chosen_logps rejected_logps ref_chosen_logps ref_rejected_logps"
TRAINED = "chosen_logps rejected_logps"
LENGTHS = {"chosen_lengths": torch.tensor([3, 9, 4, 7, 5]), "rejected_lengths": torch.tensor([4, 2, 8, 1, 6])}
REDUCTIONS = ("mean", "sum", "none")


def pairs() -> Cases:
    for dtype in (BF16, F32, F64):
        given = {**rows_of(NAMES, 5, trained=TRAINED, dtype=dtype), **LENGTHS}
        for (name, row), reduction in ((item, reduction) for item in PAIR_LOSSES.items() for reduction in REDUCTIONS):
            options = {"loss_type": name, "reduction": reduction, "label_smoothing": 0.2 if row.smoothing else 0.0}
            yield Case("dpo_loss", f"every loss {dtype}", given, options)
            if row.margin:
                yield Case("dpo_loss", f"margin {dtype}", {**given, "margin": normal(5, seed=30).abs()}, options)
            for link in ("forward_kl", "js_divergence", "alpha_divergence") if row.links else ():
                yield Case("dpo_loss", f"links {dtype}", given, {**options, "f_divergence_type": link})
        mixture = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
        yield Case("dpo_loss", f"mixture {dtype}", given, mixture)
        two = rows_of("chosen_logps rejected_logps chosen_nll", 5, trained=f"{TRAINED} chosen_nll", dtype=dtype)
        for options in choices(loss_type=("simpo", "cpo_simpo"), label_smoothing=(0.0, 0.2)):
            yield Case("CPOLoss", str(dtype), two, options)
        rewards = rows_of("chosen_rewards rejected_rewards", 5, trained="chosen_rewards rejected_rewards", dtype=dtype)
        for name in ("reward_loss", "RewardLoss"):
            yield Case(name, str(dtype), {**rewards, "margin": normal(5, seed=31)}, {"center_coefficient": 0.1})


def textbook() -> Cases:
    for dtype in (BF16, F32, F64):
        given = rows_of(NAMES, 5, trained=TRAINED, dtype=dtype) | {"kl": normal(5, seed=32, dtype=dtype, grad=True)}
        for name in ("kl_guided_dpo_loss", "KLGuidedDPOLoss"):
            yield Case(name, str(dtype), given, {"kl_coef": 0.3, "beta": 0.4})
        likelihood = {"nll": normal(5, seed=33, dtype=dtype, grad=True), "rewards": normal(5, seed=34, dtype=dtype)}
        weighted = {"logps": logps(5, seed=35, dtype=dtype, grad=True), "scores": normal(5, seed=36, dtype=dtype)}
        for reduction in REDUCTIONS:
            for name in ("reward_regularized_loss", "RewardRegularizedLoss"):
                yield Case(name, str(dtype), likelihood, {"reward_coef": 0.3, "reduction": reduction})
            for name in ("score_weighted_loss", "ScoreWeightedLoss"):
                yield Case(name, str(dtype), weighted, {"baseline": 0.3, "reduction": reduction})
        tokens = rows_of("logps log_sum_sq_probs", 4, 6, trained="logps", dtype=dtype)
        yield Case("wpo_weights", str(dtype), {**tokens, "mask": flags(4, 6, seed=2)})
        tokens = rows_of("logps ref_logps", 4, 6, trained="logps", dtype=dtype)
        yield Case("ref_kl_advantages", str(dtype), {**tokens, "mask": flags(4, 6, seed=2)})
        model = head(4, 6, dtype=dtype)
        for estimator in ("exact", "k1", "k2", "k3"):
            options = {"kl_estimator": estimator, "kl_coef": 0.3}
            yield Case("linear_kl_guided_dpo_loss", str(dtype), {**model, **reference(4, 6, dtype=dtype)}, options)
        scores = normal(4, seed=37)
        yield Case("linear_reward_regularized_loss", str(dtype), {**model, "rewards": scores})
        for average in (True, False):
            yield Case("linear_score_weighted_loss", str(dtype), {**model, "scores": scores}, {"average": average})
        ref = {"ref_logps": logps(4, seed=11)}
        for options in ({"use_weighting": True}, {"loss_type": ["exo_pair", "sft"], "label_smoothing": 0.1}):
            yield Case("linear_dpo_loss", f"more {dtype}", {**model, **ref}, {**options, "ld_alpha": 0.4})
        for reduction in REDUCTIONS:
            yield Case("linear_cross_entropy", f"dft {dtype}", model, {"dft": True, "reduction": reduction})
    student = {"logps_k": logps(4, 6, 5, seed=1, grad=True) - 2.0, "teacher_logps_k": logps(4, 6, 5, seed=2) - 2.0}
    for tail in (True, False):
        yield Case("topk_kl", "reverse", student, {"direction": "reverse", "tail": tail})


EVERY = (pairs, textbook)

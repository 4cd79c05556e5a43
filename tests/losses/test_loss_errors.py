"""Bad input: the function, the argument, what was expected, what was got."""

from functools import partial

import pytest
import torch

from prefkern import losses
from prefkern.losses.policy import POLICY_LOSSES
from prefkern.losses.preference import PAIR_LOSSES

NAN = float("nan")
X, Y, INT = -torch.rand(4), -torch.rand(3), torch.zeros(4, dtype=torch.long)
GRID, META = -torch.rand(4, 3), torch.zeros(4, device="meta")
IDS = torch.zeros(4, 3, dtype=torch.long)
ENTROPY = {"entropy": X, "entropy_coef": 0.1}

PAIR_NAMES = ", ".join(map(repr, PAIR_LOSSES))
SMOOTHED = " or ".join(repr(name) for name, row in PAIR_LOSSES.items() if row.smoothing)
DPO = partial(losses.dpo_loss, X, X, X)
KTO = partial(losses.kto_loss, X, X)
PPO = partial(losses.ppo_loss, GRID, GRID)
GRPO = partial(losses.grpo_loss, GRID, GRID, X)
WEIGHTS = partial(losses.importance_weights, GRID, GRID)
GRPO_NAMES = ", ".join(map(repr, POLICY_LOSSES))
CALLS = [
    (lambda: losses.dpo_loss(X, Y, X, X), ValueError, r"dpo_loss: .*must have the same shape, got \(4,\) and \(3,\)"),
    (
        lambda: losses.dpo_loss(X, None, X, X),
        TypeError,
        r"dpo_loss: rejected_logps must be a torch\.Tensor, got NoneType",
    ),
    (lambda: losses.kto_kl(None, X), TypeError, r"kto_kl: kl_logps must be a torch\.Tensor, got NoneType"),
    (lambda: losses.ppo_loss(X, X, None), TypeError, r"ppo_loss: advantages must be a torch\.Tensor, got NoneType"),
    (lambda: losses.value_loss(X, X, None), TypeError, r"value_loss: returns must be a torch\.Tensor, got NoneType"),
    (lambda: losses.shift_labels(None), TypeError, r"shift_labels: input_ids must be a torch\.Tensor, got NoneType"),
    (lambda: losses.pair_logps(None), TypeError, r"pair_logps: logps must be a torch\.Tensor, got NoneType"),
    (lambda: losses.orpo_loss(X, X, None), TypeError, r"orpo_loss: chosen_nll must be a torch\.Tensor, got NoneType"),
    (lambda: DPO(INT), TypeError, "dpo_loss: ref_rejected_logps must be float16, .* got int64"),
    (lambda: DPO([1.0]), TypeError, r"dpo_loss: ref_rejected_logps must be a torch\.Tensor, got list"),
    (lambda: DPO(META), ValueError, "dpo_loss: all tensors must be on one device.*ref_rejected_logps on meta"),
    (lambda: losses.dpo_loss(GRID, GRID, GRID, GRID), ValueError, r"dpo_loss: chosen_logps must be \[B\]"),
    (lambda: DPO(X, beta=0.0), ValueError, r"dpo_loss: beta must be a finite number in \(0\.0, inf\), got 0\.0"),
    (lambda: DPO(X, beta="0.1"), TypeError, "dpo_loss: beta must be a number, got str"),
    (lambda: DPO(X, loss_type="bogus"), ValueError, f"dpo_loss: loss_type must be one of {PAIR_NAMES}, got 'bogus'"),
    (lambda: DPO(X, loss_type=[["sigmoid"]]), ValueError, "dpo_loss: loss_type must be one of"),
    (
        lambda: DPO(X, label_smoothing=0.5),
        ValueError,
        r"dpo_loss: label_smoothing must be .* in \[0\.0, 0\.5\), got 0\.5",
    ),
    (lambda: DPO(X, label_smoothing=-0.1), ValueError, "dpo_loss: label_smoothing must be"),
    (
        lambda: DPO(X, loss_type="hinge", label_smoothing=0.1),
        ValueError,
        f"dpo_loss: label_smoothing is for loss_type={SMOOTHED}; 'hinge' has none, got 0.1",
    ),
    (
        lambda: DPO(X, loss_type=[]),
        ValueError,
        "dpo_loss: loss_type must name at least one loss of 'sigmoid' or 'hinge' or 'ipo' or",
    ),
    (lambda: DPO(X, loss_type=["sigmoid", "bogus"]), ValueError, "dpo_loss: loss_type must be one of .*, got 'bogus'"),
    (lambda: DPO(X, loss_type=None), ValueError, "dpo_loss: loss_type must be one of .*, got None"),
    (
        lambda: DPO(X, loss_type="exo_pair"),
        ValueError,
        r"dpo_loss: loss_type='exo_pair' needs a label_smoothing in \(0\.0, 0\.5\), for example 1e-3, got 0\.0",
    ),
    (
        lambda: DPO(X, loss_type=["hinge", "ipo"], label_smoothing=0.1),
        ValueError,
        "dpo_loss: label_smoothing is for loss_type=.*; 'hinge' and 'ipo' have none, got 0.1",
    ),
    (
        lambda: DPO(X, loss_weights=[1.0, 2.0]),
        ValueError,
        "dpo_loss: loss_weights must have one weight for each loss_type, 1 for 'sigmoid', got 2",
    ),
    (
        lambda: DPO(X, loss_type=["sigmoid", "hinge"], loss_weights=[1.0]),
        ValueError,
        "dpo_loss: loss_weights must have one weight for each loss_type, 2 for 'sigmoid' and 'hinge', got 1",
    ),
    (lambda: DPO(X, loss_weights=2.0), TypeError, "dpo_loss: loss_weights must be a list of numbers, got float 2.0"),
    (lambda: DPO(X, loss_weights=[NAN]), ValueError, "dpo_loss: loss_weights must be a finite number"),
    (
        lambda: DPO(X, loss_type="nca_pair", f_divergence_type="js"),
        ValueError,
        "dpo_loss: f_divergence_type='js' is for loss_type='sigmoid' or 'hinge' or .*; 'nca_pair' has no form under it",
    ),
    (lambda: DPO(X, f_divergence_type="kl"), ValueError, "dpo_loss: f_divergence_type must be one of 'reverse_kl', "),
    (lambda: DPO(X, discopop_tau=1.5), ValueError, r"dpo_loss: discopop_tau must be .* in \(0\.0, 1\.0\], got 1\.5"),
    (lambda: DPO(X, weights=X, loss_type="aot"), ValueError, "dpo_loss: weights are of pairs, which loss_type='aot'"),
    (
        lambda: DPO(X, margin=X, loss_type="bco_pair"),
        ValueError,
        "dpo_loss: margin is for loss_type='sigmoid' or .*; 'bco_pair' has none: leave it out",
    ),
    (lambda: DPO(X, margin=Y), ValueError, "dpo_loss: .*margin must have the same shape"),
    (
        lambda: DPO(X, loss_type="sft"),
        ValueError,
        r"dpo_loss: loss_type='sft' needs chosen_lengths \[B\], which pair_logps returns, or chosen_nll; got neither",
    ),
    (lambda: DPO(X, chosen_nll=Y), ValueError, r"dpo_loss: chosen_nll must be a scalar or \(4,\)"),
    (
        lambda: losses.dpo_loss(X, X, X, None),
        TypeError,
        r"dpo_loss: ref_rejected_logps must be a torch\.Tensor, got None",
    ),
    (
        lambda: losses.cpo_loss(X, X, X, loss_type="simpo", cpo_alpha=1.0),
        ValueError,
        r"cpo_loss: loss_type='simpo' has no likelihood to weigh, got cpo_alpha=1\.0: leave it out, or take "
        "loss_type='cpo_simpo'",
    ),
    (
        lambda: losses.orpo_loss(X, -X, X),
        ValueError,
        "orpo_loss: rejected_avg_logps must hold log-probabilities, which are at most 0, got one of .*: negative "
        "log-likelihoods have the other sign",
    ),
    (lambda: losses.orpo_loss(-X, X, X), ValueError, "orpo_loss: chosen_avg_logps must hold log-probabilities"),
    (
        lambda: losses.wpo_weights(GRID[:3], GRID[:3]),
        ValueError,
        "wpo_weights: pairs must come as 2B rows, .* got 3 rows",
    ),
    (lambda: losses.ref_kl_advantages(X, Y), ValueError, "ref_kl_advantages: logps and ref_logps must have the same"),
    (lambda: DPO(X, loss_type="ipo"), ValueError, "dpo_loss: loss_type='ipo' divides by chosen_lengths"),
    (lambda: DPO(X, chosen_lengths=Y), ValueError, r"dpo_loss: chosen_lengths must have shape \(4,\), got"),
    (lambda: DPO(X, weights=Y), ValueError, r"dpo_loss: .*weights must have the same shape"),
    (lambda: DPO(X, reduction="token"), ValueError, "dpo_loss: reduction must be one of 'mean', 'sum', 'none'"),
    (lambda: KTO(None), TypeError, r"kto_loss: is_desirable must be a torch\.Tensor"),
    (lambda: KTO(INT + 2), ValueError, "kto_loss: is_desirable must hold only 0 and 1"),
    (lambda: KTO(Y > 0), ValueError, r"kto_loss: is_desirable must have shape \(4,\)"),
    (lambda: KTO(INT, kl=Y), ValueError, r"kto_loss: kl must be one value or \(4,\), got float32 \(3,\)"),
    (lambda: KTO(INT, kl="a"), TypeError, "kto_loss: kl must be a number"),
    (lambda: KTO(INT, kl=INT), TypeError, "kto_loss: kl must be float16"),
    (lambda: KTO(INT, desirable_weight=-1.0), ValueError, "kto_loss: desirable_weight must be"),
    (lambda: KTO(INT, loss_type="bco"), ValueError, "kto_loss: loss_type must be one of 'kto', 'apo_zero_unpaired'"),
    (lambda: losses.kto_kl(X, Y), ValueError, "kto_kl: kl_logps and ref_kl_logps must have the same shape"),
    (
        lambda: losses.orpo_loss(X, X, Y),
        ValueError,
        r"orpo_loss: chosen_nll must be a scalar or \(4,\), got float32 \(3,\)",
    ),
    (lambda: losses.orpo_loss(X, X, 1.0), TypeError, r"orpo_loss: chosen_nll must be a torch\.Tensor"),
    (lambda: losses.orpo_loss(X, X, X, beta=-0.1), ValueError, "orpo_loss: beta must be"),
    (lambda: losses.cpo_loss(X, X), ValueError, r"cpo_loss: cpo_alpha=1\.0 weighs chosen_nll, got None: pass it, or"),
    (
        lambda: losses.cpo_loss(X, X, Y),
        ValueError,
        r"cpo_loss: chosen_nll must be a scalar or \(4,\), got",
    ),
    (
        lambda: losses.cpo_loss(X, Y, X),
        ValueError,
        "cpo_loss: .*rejected_logps must have the same shape",
    ),
    (lambda: losses.cpo_loss(X, X, 1.0), TypeError, r"cpo_loss: chosen_nll must be a torch\.Tensor"),
    (lambda: losses.cpo_loss(X, X, X, loss_type="robust"), ValueError, "cpo_loss: loss_type must be one of .* 'simpo'"),
    (lambda: losses.cpo_loss(X, X, X, cpo_alpha=-1), ValueError, "cpo_loss: cpo_alpha must be"),
    (lambda: losses.cpo_loss(X, X, X, simpo_gamma=-1), ValueError, "cpo_loss: simpo_gamma must be"),
    (lambda: losses.cpo_loss(X, X, X, alpha="a"), TypeError, "cpo_loss: alpha must be a number"),
    (
        lambda: losses.cpo_loss(X, X, X, loss_type="ipo", label_smoothing=0.1),
        ValueError,
        "cpo_loss: label_smoothing is for loss_type='sigmoid' or 'simpo' or 'cpo_simpo'; 'ipo' has none, got 0.1",
    ),
    (
        lambda: PPO(Y),
        ValueError,
        r"ppo_loss: advantages must be \(4, 3\), per token, or \(4,\), per sequence, got .*\(3,\)",
    ),
    (lambda: PPO(X, INT), ValueError, r"ppo_loss: mask must have shape \(4, 3\)"),
    (lambda: PPO(X, GRID), ValueError, "ppo_loss: mask must hold only 0 and 1"),
    (lambda: PPO(X, cliprange=1.5), ValueError, r"ppo_loss: cliprange must be a finite number in \[0\.0, 1\.0\]"),
    (lambda: PPO(X, cliprange_high=-0.1), ValueError, "ppo_loss: cliprange_high must be"),
    (lambda: PPO(X, delta=1.0), ValueError, r"ppo_loss: delta must be a finite number in \(1\.0, inf\)"),
    (lambda: PPO(X, kl_coef=0.1), ValueError, r"ppo_loss: kl_coef=0\.1 needs ref_logps, got None"),
    (lambda: PPO(X, kl_estimator="k4"), ValueError, "ppo_loss: kl_estimator must be one of 'k1', 'k2', 'k3'"),
    (lambda: PPO(X, entropy_coef=0.1), ValueError, r"ppo_loss: entropy_coef=0\.1 needs entropy"),
    (
        lambda: PPO(X, values=GRID),
        ValueError,
        "ppo_loss: values, old_values and returns come together, got only values",
    ),
    (
        lambda: PPO(X, values=GRID, old_values=GRID, returns=X),
        ValueError,
        r"ppo_loss: returns must|ppo_loss: .*same shape",
    ),
    (lambda: PPO(X, reduction="mean"), ValueError, "ppo_loss: reduction must be one of 'token', 'sequence'"),
    (lambda: PPO(X, reduction="none", normalizer=3), ValueError, "ppo_loss: reduction='none' divides by nothing"),
    (lambda: PPO(X, normalizer=-3), ValueError, "ppo_loss: normalizer must be a finite number"),
    (lambda: PPO(X, normalizer=torch.tensor(-3)), ValueError, "ppo_loss: normalizer must be finite and not negative"),
    (lambda: PPO(X, normalizer=X), ValueError, "ppo_loss: normalizer must be a number or a tensor of one element"),
    (lambda: losses.ppo_loss(X, X, X, reduction="sequence"), ValueError, "ppo_loss: logps is packed.*need cu_seqlens"),
    (
        lambda: losses.ppo_loss(X.requires_grad_(), X, X, **{**ENTROPY, "entropy": torch.zeros(4)}),
        ValueError,
        r"ppo_loss: entropy_coef=0\.1 needs an entropy with a gradient \(entropy_grad=True\)",
    ),
    (
        lambda: losses.ppo_loss(X, X, X, reduction="none", values=X, old_values=X, returns=X),
        ValueError,
        "ppo_loss: reduction='none' is per token, without entropy and value terms",
    ),
    (
        lambda: losses.ppo_loss(X, X, X, cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        r"ppo_loss: cu_seqlens must start at 0, never decrease and end at the number of tokens 4, got \[0, 5\]",
    ),
    (
        lambda: PPO(X, cu_seqlens=torch.tensor([0, 12])),
        ValueError,
        r"ppo_loss: logps must be packed \[N\], as cu_seqlens is given",
    ),
    (
        lambda: losses.value_loss(GRID, GRID, X),
        ValueError,
        "value_loss: values, old_values, returns must have the same shape",
    ),
    (lambda: losses.value_loss(X, X, X, cliprange_value=0), ValueError, "value_loss: cliprange_value must be"),
    (lambda: PPO(X, token_weights=Y), ValueError, r"ppo_loss: token_weights must be \(4, 3\), per token, or \(4,\)"),
    (
        lambda: PPO(X, positive_nll_coef=0.1),
        ValueError,
        r"ppo_loss: positive_nll_coef=0\.1 needs is_correct, which sequences are right, got None",
    ),
    (
        lambda: losses.ppo_loss(X, X, X, reduction="fixed"),
        ValueError,
        r"ppo_loss: logps is packed, .*: its sequences need cu_seqlens",
    ),
    (
        lambda: losses.ppo_loss(X, X, X, reduction="fixed", cu_seqlens=torch.tensor([0, 4])),
        ValueError,
        "ppo_loss: reduction='fixed' of packed tokens needs max_completion_length",
    ),
    (lambda: losses.ppo_loss(X, None, X), TypeError, r"ppo_loss: old_logps must be a torch\.Tensor, got NoneType"),
    (lambda: losses.grpo_loss(None, X, X), TypeError, r"grpo_loss: logps must be a torch\.Tensor, got NoneType"),
    (lambda: losses.grpo_loss(X, 3.0, X), TypeError, r"grpo_loss: old_logps must be a torch\.Tensor, got float"),
    (lambda: losses.grpo_loss(X, X, None), TypeError, r"grpo_loss: advantages must be a torch\.Tensor, got NoneType"),
    (lambda: GRPO(loss_type="gspo"), ValueError, f"grpo_loss: loss_type must be one of {GRPO_NAMES}, got 'gspo'"),
    (
        lambda: GRPO(),
        ValueError,
        r"grpo_loss: loss_type='dapo' divides by the scored tokens of the .*: pass normalizer=, .*mask\.sum\(\)",
    ),
    (
        lambda: GRPO(loss_type="vespo"),
        ValueError,
        "grpo_loss: loss_type='vespo' divides by the scored tokens of the whole",
    ),
    (
        lambda: GRPO(loss_type="cispo", normalizer=3),
        ValueError,
        "grpo_loss: loss_type='cispo' caps the ratio at epsilon_high .*, got None",
    ),
    (
        lambda: losses.grpo_loss(GRID, None, X, loss_type="dppo_kl"),
        ValueError,
        "grpo_loss: loss_type='dppo_kl' needs old_logps, of the policy that sampled, got None",
    ),
    (
        lambda: GRPO(loss_type="dro"),
        ValueError,
        "grpo_loss: loss_type='dro' weighs the square .* by dro_beta .*, got None",
    ),
    (
        lambda: GRPO(loss_type="gmpo", importance_sampling_level="sequence"),
        ValueError,
        "grpo_loss: loss_type='gmpo' has importance_sampling_level='token', got 'sequence'",
    ),
    (
        lambda: GRPO(importance_sampling_level="batch"),
        ValueError,
        "grpo_loss: importance_sampling_level must be one of 'token', 'sequence', 'product', got 'batch'",
    ),
    (
        lambda: losses.grpo_loss(GRID, GRID, Y, loss_type="grpo"),
        ValueError,
        r"grpo_loss: advantages must be \(4, 3\), per token, or \(4,\), per sequence, got .*\(3,\)",
    ),
    (
        lambda: losses.grpo_loss(GRID, X, X),
        ValueError,
        r"grpo_loss: .*old_logps must have the same shape|old_logps must be",
    ),
    (lambda: GRPO(beta=0.1, loss_type="grpo"), ValueError, r"grpo_loss: beta=0\.1 needs ref_logps, got None"),
    (lambda: GRPO(kl_gradient="k2"), ValueError, "grpo_loss: kl_gradient must be one of 'plain', 'unbiased', got 'k2'"),
    (
        lambda: GRPO(loss_type="grpo", entropy_coef=0.1),
        ValueError,
        r"grpo_loss: entropy_coef=0\.1 needs entropy, got None",
    ),
    (
        lambda: GRPO(loss_type="grpo", reduction="none", is_correct=X > 0, positive_nll_coef=0.1),
        ValueError,
        "grpo_loss: reduction='none' is per token, without entropy and likelihood terms",
    ),
    (
        lambda: GRPO(loss_type="grpo", is_correct=Y > 0, positive_nll_coef=0.1),
        ValueError,
        r"grpo_loss: is_correct must have shape \(4,\), got",
    ),
    (
        lambda: losses.grpo_loss(X, X, X, loss_type="gspo_token", reduction="token"),
        ValueError,
        r"grpo_loss: logps is packed, .*: its sequences need cu_seqlens \[S \+ 1\]",
    ),
    (
        lambda: GRPO(reduction="mean"),
        ValueError,
        "grpo_loss: reduction must be one of 'token', 'sequence', .*'fixed', 'none'",
    ),
    (lambda: GRPO(normalizer=-1), ValueError, "grpo_loss: normalizer must be a finite number"),
    (
        lambda: losses.GRPOLoss(loss_type="cispo"),
        ValueError,
        "GRPOLoss: loss_type='cispo' caps the ratio at epsilon_high",
    ),
    (
        lambda: losses.rloo_loss(GRID, Y, X),
        ValueError,
        r"rloo_loss: old_logps must be \(4, 3\), per token, or \(4,\), per sequence, got float32 \(3,\)",
    ),
    (lambda: losses.rloo_loss(X, X, X), ValueError, r"rloo_loss: logps is packed, .*: its sequences need cu_seqlens"),
    (
        lambda: WEIGHTS(mode="drop"),
        ValueError,
        "importance_weights: mode must be one of 'truncate', 'mask', 'icepop', 'none'",
    ),
    (lambda: WEIGHTS(low=3.0), ValueError, r"importance_weights: low must be less than high, got 3\.0 and 2\.0"),
    (
        lambda: WEIGHTS(mode="icepop", level="sequence"),
        ValueError,
        "importance_weights: mode='icepop' is per token, got level='sequence': mode='mask' takes any level",
    ),
    (lambda: WEIGHTS(gate="k3"), ValueError, "importance_weights: gate='k3' needs gate_high, the largest value"),
    (
        lambda: WEIGHTS(gate_high=1.0),
        ValueError,
        "importance_weights: gate_low and gate_high bound a gate, got gate=None",
    ),
    (
        lambda: losses.importance_weights(GRID, None),
        TypeError,
        r"importance_weights: rollout_logps must be a torch\.Tensor, got NoneType",
    ),
    (
        lambda: losses.importance_weights(X, X, level="geometric"),
        ValueError,
        r"importance_weights: logps is packed, .*: its sequences need cu_seqlens",
    ),
    (lambda: losses.sequence_logps(X), ValueError, r"sequence_logps: logps is packed.*cu_seqlens \[S \+ 1\]"),
    (lambda: losses.sequence_logps(IDS), TypeError, "sequence_logps: logps must be float16"),
    (lambda: losses.sequence_logps(GRID, targets=INT), ValueError, r"sequence_logps: targets must have shape \(4, 3\)"),
    (lambda: losses.sequence_logps(GRID, targets=GRID), TypeError, "sequence_logps: targets must be int64 or int32"),
    (lambda: losses.sequence_logps(torch.zeros(2, 3, 4)), ValueError, r"sequence_logps: logps must be padded \[B, T\]"),
    (lambda: losses.pair_logps(GRID[:3]), ValueError, "pair_logps: pairs must come as 2B rows, .* got 3 rows"),
    (lambda: losses.pair_logps(X, cu_seqlens=torch.tensor([0, 1, 2, 4])), ValueError, "pair_logps: .* got 3 rows"),
    (
        lambda: losses.pair_logps(GRID, ld_alpha=1.5),
        ValueError,
        r"pair_logps: ld_alpha must be a finite number in \[0\.0, 1",
    ),
    (lambda: losses.shift_labels(GRID), TypeError, "shift_labels: input_ids must be int64 or int32"),
    (lambda: losses.shift_labels(IDS, cu_seqlens=INT), ValueError, r"shift_labels: input_ids must be packed \[N\]"),
    (lambda: losses.shift_labels(IDS, mask=INT), ValueError, r"shift_labels: mask must have shape \(4, 3\)"),
    (lambda: losses.DPOLoss(loss_type="bogus"), ValueError, "DPOLoss: loss_type must be one of"),
    (lambda: losses.KTOLoss(beta=-1.0), ValueError, "KTOLoss: beta must be"),
    (lambda: losses.ORPOLoss(reduction="all"), ValueError, "ORPOLoss: reduction must be one of"),
    (lambda: losses.PPOLoss(delta=0.5), ValueError, "PPOLoss: delta must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_refused(call, error, message) -> None:
    with pytest.raises(error, match=rf"^prefkern\.{message}"):
        call()


def test_values_are_not_read_off_the_cpu() -> None:
    """On an accelerator reading a value would wait for the device: only shapes, dtypes and devices are checked."""
    x, bad = torch.zeros(4, device="meta"), torch.full((4,), 7, device="meta")
    assert losses.kto_loss(x, x, bad).loss.device.type == "meta"
    assert losses.grpo_loss(x, x, x, bad, normalizer=torch.zeros((), device="meta")).loss.shape == ()
    assert losses.importance_weights(x, x, bad, gate="kl", gate_high=1.0).mask.device.type == "meta"
    cu = torch.zeros(3, dtype=torch.long, device="meta")
    assert losses.ppo_loss(x, x, x, bad, cu_seqlens=cu, normalizer=torch.zeros((), device="meta")).loss.shape == ()

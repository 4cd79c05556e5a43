"""What a type checker says of a user's script: nothing of a good one, and of a bad one each mistake on its line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefkern as pk
from prefkern import losses

GOOD = """\
import torch

import prefkern as pk
from prefkern.types import LossOutput

x = torch.zeros(4, requires_grad=True)
hidden, weight, targets = torch.zeros(4, 3, 8), torch.zeros(16, 8), torch.zeros(4, 3, dtype=torch.long)
out: LossOutput = pk.dpo_loss(x, x, x, x, beta=0.2, loss_type="ipo", chosen_lengths=x, rejected_lengths=x)
total = out.loss + pk.linear_dpo_loss(hidden, weight, targets, x, beta=0.1, softcap=30.0, max_memory="2GB").loss
total = total + pk.DPOLoss(0.1, loss_type="hinge")(x, x, x, x).loss
stats = pk.linear_token_logprobs(hidden, weight, targets, outputs=("logps", "entropy"), temperature=0.7)
total = total + stats.logps.sum()
divergence = pk.linear_kl_divergence(hidden, weight, hidden, weight, targets, direction="reverse")
total = total + divergence.mean() + pk.ppo_loss(x, x, x, cliprange=0.1, values=x, old_values=x, returns=x).loss
margin: float = out.metrics["rewards/margins"].item()
pk.PPOLoss(0.1).cliprange = 0.3
"""

BAD = """\
import torch

import prefkern as pk

x = torch.zeros(4)
pk.dpo_loss(x, x, x, x, betta=0.1)
pk.dpo_loss(x, x, x, x, loss_type="sigmod")
pk.dpo_loss(x, x, x)
pk.dpo_loss(x, x, x, x, beta="0.1")
pk.DPOLoss(betta=0.1)
pk.DPOLoss("0.1")
pk.linear_dpo_loss(x, x, x, biass=None)
pk.linear_dpo_loss(x, x, x, softcap="30")
pk.linear_ppo_loss(x, x, x, x, x, temperature="a")
pk.linear_token_logprobs(x, x, x, outputs=("logp",))
pk.kto_loss(x, x, x, reduction="average")
pk.linear_kl_divergence(x, x, x, x, direction="backward")
pk.ppo_loss(x, x, x, kl_estimator="k4")
pk.linear_cross_entropy(x, x, x, max_memory=[1])
pk.dpo_loss(x, x, x, x).losses
pk.DPOLoss(0.1)(x, x, x, x).losses
pk.KTOLoss(desirable=0.1)
pk.orpo_loss(x, x, x, beta=None)
pk.linear_loss(x, x, x, lambda stats: stats.logp)
pk.dpo_los
"""


def problems(tmp_path: Path, script: str) -> dict[int, str]:
    """The errors of mypy --strict, by line."""
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    source = str(Path(__file__).parents[1] / "python")
    done = subprocess.run(
        [*command, str(path)], capture_output=True, text=True, env={**os.environ, "MYPYPATH": source}, check=False
    )
    found: dict[int, str] = {}
    for line in done.stdout.splitlines():
        name, number, kind, message = line.split(":", 3)
        assert name == str(path), line
        if kind.strip() == "error":
            found.setdefault(int(number), message)
    return found


def test_the_package_shows_its_public_names_and_loads_each() -> None:
    assert set(pk._NAMES["losses"]) == set(losses.__all__)
    assert set(dir(pk)) == {*pk.__all__, "__version__"}
    for name in pk.__all__:
        assert getattr(pk, name) is not None
    with pytest.raises(
        AttributeError, match=r"module 'prefkern' has no attribute 'dpo_los': did you mean 'dpo_loss'\?"
    ):
        _ = pk.dpo_los


@pytest.mark.slow
def test_a_good_script_has_no_mistake_and_a_bad_one_twenty(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD) == {}
    first = BAD.splitlines().index("pk.dpo_loss(x, x, x, x, betta=0.1)") + 1
    found = problems(tmp_path, BAD)
    assert sorted(found) == list(range(first, first + 20))
    assert "did you mean" in found[first]

"""What an installed prefkern must do with nothing but torch and numpy beside it: numbers, not only imports."""

import importlib.metadata
import math
import subprocess
import sys

import torch

import prefkern as pk

x = [torch.tensor([v], requires_grad=True) for v in (-10.0, -12.0, -11.0, -11.0)]
loss = pk.dpo_loss(*x, beta=0.5).loss
loss.backward()
assert abs(loss.item() - math.log1p(math.exp(-1.0))) < 1e-6, loss  # x = 0.5 (1 + 1)
hidden, weight = torch.eye(3, 4, requires_grad=True), torch.eye(5, 4, requires_grad=True)
logps = pk.linear_token_logprobs(hidden, weight, torch.arange(3)).logps
logps.sum().backward()
assert torch.allclose(logps, torch.full((3,), 1.0 - math.log(math.e + 4.0))), logps
advantages = pk.data.gae([[1.0, 1.0]], [[0.0, 0.0]], gamma=0.5, lam=1.0).advantages
assert advantages == [[1.5, 1.0]], advantages
for command in ("doctor", "plan --tokens 8 --hidden 8 --vocab 8"):
    subprocess.run([sys.executable, "-m", "prefkern", *command.split()], check=True, stdout=subprocess.DEVNULL)
print("smoke test passed: prefkern", importlib.metadata.version("prefkern"), "torch", torch.__version__)

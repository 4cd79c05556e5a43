"""Two uses of several log-probabilities per position, without the [tokens, vocabulary] logits of the student.

1. Distillation: a student learns from the 32 likeliest tokens of a teacher, as a server returns or a file stores them.
2. The policy of top-k and top-p sampling: a token drawn from a kept set has its probability renormalised over that set.

Small random Llama models, on the CPU, offline, in seconds:

    python examples/distill_topk.py
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import prefkern as pk

VOCABULARY, K = 512, 32


def llama(width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, **shape))


def teach(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities of its K likeliest tokens at each position, and the tokens: [B, T, K] both."""
    with torch.no_grad():
        return llama(48, seed=1)(ids).logits.log_softmax(-1).topk(K)


def distil(ids: Tensor, teacher_logps: Tensor, tokens: Tensor, steps: int = 30) -> tuple[LlamaForCausalLM, list[float]]:
    """Trains a student on the teacher's top K; the divergence at each step."""
    student, history = llama(32, seed=2), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        hidden = student.model(ids).last_hidden_state
        logps = pk.linear_token_logprobs(hidden, student.lm_head.weight, tokens).logps  # [B, T, K], one softmax
        loss, metrics = pk.topk_kl(logps, teacher_logps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(metrics["kl"].item())
    return student, history


def kept_tokens(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """The tokens that top-k and top-p sampling may draw, likeliest first: [..., top_k], filled with -100."""
    probabilities, tokens = logits.softmax(-1).topk(top_k)
    before = probabilities.cumsum(-1) - probabilities
    return tokens.masked_fill(before >= top_p * probabilities.sum(-1, keepdim=True), -100)


def sampled_logps(hidden: Tensor, weight: Tensor, taken: Tensor, kept: Tensor) -> Tensor:
    """``lp - logsumexp(lp over kept)``: of the tokens taken, under the policy that they were drawn from. The kept set
    is replayed from the rollout, so that old and new policy are compared over the same tokens."""
    targets = torch.cat([taken.unsqueeze(-1), kept], dim=-1)
    logps = pk.linear_token_logprobs(hidden, weight, targets).logps
    return logps[..., 0] - logps[..., 1:].masked_fill(kept == -100, -torch.inf).logsumexp(-1)


def main() -> None:
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    student, history = distil(ids, *teach(ids))
    print(f"KL to the teacher over its {K} likeliest tokens and the rest: {history[0]:.3f} -> {history[-1]:.3f}")

    with torch.no_grad():
        hidden = student.model(ids).last_hidden_state
        logits = student.lm_head(hidden)
        kept = kept_tokens(logits, top_k=20, top_p=0.9)
        shares = logits.gather(-1, kept.clamp(min=0)).masked_fill(kept == -100, -torch.inf).softmax(-1)
        drawn = kept.gather(-1, torch.multinomial(shares.flatten(0, 1), 1).view(*ids.shape, 1)).squeeze(-1)
        full = pk.linear_token_logprobs(hidden, student.lm_head.weight, drawn).logps.mean()
        renormalised = sampled_logps(hidden, student.lm_head.weight, drawn, kept).mean()
    print(f"mean log-prob of the drawn tokens: {full:.3f} among all tokens, {renormalised:.3f} among those kept")


if __name__ == "__main__":
    main()

"""`last_hidden`: padding on either side, packed rows, gradients, wrappers; the logits are never made."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_heads import GPT2, adapted, head_logps, own_logps, tiny, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prefkern as pk
from prefkern.integrations.transformers import head_of, last_hidden
from prefkern.integrations.transformers.positions import count_positions

LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "relative positions": ("llama", {}),
    "absolute positions": ("gpt2", GPT2),
    "positions that the model counts from the mask": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "positions with an offset that the model counts from the ids": ("roberta", {"is_decoder": True}),
    "no positions at all": ("bloom", {"n_layer": 2, "n_head": 2}),
    "a layer before the matrix": ("modernbert-decoder", {}),
}


def padded(ids: Tensor, left: int, right: int = 0) -> tuple[Tensor, Tensor]:
    ids = nn.functional.pad(ids, (left, right))
    mask = torch.ones_like(ids)
    mask[:, :left] = 0
    mask[:, ids.shape[1] - right :] = 0
    return ids, mask


@pytest.mark.parametrize("case", LEFT)
def test_padding_on_the_left_changes_nothing(case: str) -> None:
    kind, changes = LEFT[case]
    model, ids = tiny(kind, **changes), tokens()
    both, mask = padded(ids, 3, 2)
    torch.testing.assert_close(last_hidden(model, both, mask)[:, 3:-2], last_hidden(model, ids), rtol=0, atol=2e-5)
    torch.testing.assert_close(
        last_hidden(model, both, mask.bool())[:, 3:-2], last_hidden(model, ids), rtol=0, atol=2e-5
    )


def test_rows_padded_by_different_amounts_on_the_left() -> None:
    model, ids = tiny("gpt2", **GPT2), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    got = last_hidden(model, ids, mask)
    torch.testing.assert_close(got[0], last_hidden(model, ids[:1])[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1, 3:], last_hidden(model, ids[1:, 3:])[0], rtol=0, atol=2e-5)


def test_padding_on_the_left_is_refused_where_it_changes_something() -> None:
    model = tiny("bart", d_model=16, decoder_layers=1, decoder_ffn_dim=24, decoder_attention_heads=2, encoder_layers=1,
                 encoder_ffn_dim=24, encoder_attention_heads=2)  # fmt: skip
    ids, mask = padded(tokens(), 0, 2)
    last_hidden(model, ids, mask)
    with pytest.raises(ValueError, match="must have its padding on the right for BartForCausalLM"):
        last_hidden(model, *padded(tokens(), 2))


def test_positions_are_counted_from_the_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert count_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_packed_rows_are_those_of_each_sequence(kind: str) -> None:
    model, ids = (
        tiny(kind, **({"head_dim": 8} if kind == "gemma2" else GPT2 if kind == "gpt2" else {})),
        tokens(1, 12)[0],
    )
    bounds = [0, 5, 5, 7, 12]
    cu_seqlens = torch.tensor(bounds)
    alone = [last_hidden(model, ids[None, a:b])[0] for a, b in pairwise(bounds) if b > a]
    got = last_hidden(model, ids, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got, torch.cat(alone), rtol=0, atol=2e-5)
    torch.testing.assert_close(last_hidden(model, ids[None], cu_seqlens=cu_seqlens)[0], got)
    flat = pk.data.flatten(tokens(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]))
    torch.testing.assert_close(
        last_hidden(model, **flat.model_inputs())[0], last_hidden(model, flat.input_ids, cu_seqlens=flat.cu_seqlens)
    )


def test_packed_rows_are_refused_where_sequences_would_mix() -> None:
    model = tiny("opt", ffn_dim=24, word_embed_proj_dim=16)
    with pytest.raises(
        ValueError,
        match=r"OPTForCausalLM .attn_implementation='sdpa'. does not tell packed sequences apart: .* by [0-9.]+ of",
    ):
        last_hidden(model, tokens(1, 6)[0], cu_seqlens=torch.tensor([0, 2, 6]))


def test_packed_log_probabilities_go_into_a_loss() -> None:
    model, ids = tiny(), tokens(1, 12)[0]
    cu_seqlens = torch.tensor([0, 2, 5, 9, 12])
    targets = pk.shift_labels(ids, cu_seqlens=cu_seqlens)
    hidden = last_hidden(model, ids, cu_seqlens=cu_seqlens)
    got = pk.linear_dpo_loss(
        hidden, targets=targets, ref_logps=torch.zeros(4), cu_seqlens=cu_seqlens, **head_of(model)
    ).loss
    sums = [own_logps(model, row[None, :-1], row[None, 1:]).sum() for row in ids.split([2, 3, 4, 3])]
    pairs = torch.stack(sums)
    torch.testing.assert_close(
        got.double(), -nn.functional.logsigmoid(0.1 * (pairs[:2] - pairs[2:])).mean(), rtol=1e-5, atol=0
    )


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 3:
            self.widths.add(out.shape[-1])
        return out


@pytest.mark.parametrize("kind", ["llama", "modernbert-decoder"])
def test_logits_are_not_made(kind: str) -> None:
    model, ids = tiny(kind, vocab_size=1000), tokens()
    last_hidden(model, ids)
    with _Largest() as seen:
        model(input_ids=ids)
    assert 1000 in seen.widths
    with _Largest() as seen:
        last_hidden(model, ids)
    assert 1000 not in seen.widths
    assert "forward" not in vars(model.get_output_embeddings())


def test_position_ids_that_are_given_are_used() -> None:
    model, ids = tiny("gpt2", **GPT2), tokens()
    positions = torch.arange(7)[None] + 4
    got = last_hidden(model, ids, torch.ones_like(ids), position_ids=positions)
    torch.testing.assert_close(got, model.transformer(input_ids=ids, position_ids=positions).last_hidden_state)


def test_gradient_checkpointing_and_an_adapter() -> None:
    ids = tokens()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(tiny("llama", torch.float64)).double().train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = model.get_base_model()
                getattr(plain, "activation_checkpointing_enable", plain.gradient_checkpointing_enable)()
                model.enable_input_require_grads()
        head_logps(model, ids, ids).sum().backward()
        grads.append([each.grad for each in model.parameters() if each.requires_grad])
    torch.testing.assert_close(grads[0], grads[1])


def test_arguments_that_do_not_fit_are_refused() -> None:
    model, ids = tiny(), tokens()
    for call, message in (
        (lambda: last_hidden(model, ids, labels=ids), "labels must not be passed"),
        (lambda: last_hidden(model, ids, torch.ones(2, 6)), r"attention_mask must be shaped like input_ids \(2, 7\)"),
        (lambda: last_hidden(model, ids[None]), r"input_ids must be \[B, T\] or packed \[N\], got int64 \(1, 2, 7\)"),
        (lambda: last_hidden(model, ids, cu_seqlens=torch.tensor([0, 14])), r"must be packed, \[N\] or \[1, N\]"),
        (lambda: last_hidden(model, ids[0], cu_seqlens=torch.tensor([0, 6])), "cu_seqlens must start at 0"),
        (
            lambda: last_hidden(model, ids[0], torch.ones(7), cu_seqlens=torch.tensor([0, 7])),
            "attention_mask must not come with a packed batch",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="input_ids must be int64 or int32, got float32"):
        last_hidden(model, ids.float())

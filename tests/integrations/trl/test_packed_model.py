"""A model on padded, padding-free and rounded-up batches of the same pairs: the same losses and gradients."""

import pytest
import tiny_trl as tiny
import torch

import prefkern as pk

ROWS = [
    {
        "prompt_ids": [3 + i, 9, 12],
        "chosen_ids": [20 + j for j in range(2 + i)],
        "rejected_ids": [40, 41 + i, 5][: 3 - i],
    }
    for i in range(3)
]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_filling_changes_no_loss_of_a_model(loss_type: str) -> None:
    model, ref = tiny.model(seed=1), torch.linspace(-20.0, -9.0, 6)
    results = []
    for options in ({}, {"padding_free": True}, {"padding_free": True, "pad_to_multiple_of": 16}):
        batch = pk.data.collate_pairs(ROWS, pad_token_id=0, **options)
        ids, mask, cu = batch["input_ids"], batch["completion_mask"], batch.get("cu_seq_lens_q")
        where = {"attention_mask": batch["attention_mask"]} if cu is None else {"position_ids": batch["position_ids"]}
        hidden = model.model(ids, use_cache=False, **where).last_hidden_state
        if cu is not None:
            ids, mask, hidden = ids[0], mask[0], hidden[0]
        targets = pk.shift_labels(ids, mask=mask, cu_seqlens=cu)
        out = pk.linear_dpo_loss(hidden, model.lm_head.weight, targets, ref, loss_type=loss_type, cu_seqlens=cu)
        model.zero_grad()
        out.loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((ids.numel(), out.loss.detach(), gradients))
    sizes = [size for size, _, _ in results]
    assert sizes == [42, 33, 48]
    for _, loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, results[0][2], rtol=1e-3, atol=1e-4 * float(results[0][2].abs().max()))

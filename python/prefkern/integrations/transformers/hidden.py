"""The hidden states that enter the output matrix."""

from typing import Any

from torch import Tensor

from prefkern import check as checks
from prefkern.integrations.transformers.known import form_of
from prefkern.integrations.transformers.matrix import output_matrix
from prefkern.integrations.transformers.positions import count_positions, pack
from prefkern.integrations.transformers.trunk import Trunk
from prefkern.integrations.transformers.unwrap import causal_model

_WHERE = "last_hidden"


def last_hidden(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Returns the hidden states h that belong to `head_of`: ``softcap(logit_scale (h W^T + bias))`` are the model's own
    logits, which are not made. The gradient flows.

    They are the trunk's output after the final norm; for a model with a layer between trunk and output matrix
    (ModernBertDecoder, BERT as a decoder) that layer's output.

    Args:
        model: a causal language model of transformers, alone or in peft, DDP or torch.compile. Its trunk is called
            directly, so that a wrapper's own forward does not run: under FSDP call this inside the wrapped forward.
        input_ids: ``[B, T]``; or packed, ``[N]`` or ``[1, N]``, with ``cu_seqlens``.
        attention_mask: ``[B, T]``, 1 at tokens and 0 at padding. Positions are counted from it, so that padding on the
            left changes nothing, unless the model counts them itself.
        position_ids: ``[B, T]``, in place of those counted.
        cu_seqlens: ``[S + 1]`` offsets at which the packed sequences begin and end; each gets positions of its own.
        inputs: what else the trunk takes, as ``**flat.model_inputs()`` in place of ``input_ids`` and ``cu_seqlens``.

    Returns:
        ``[B, T, H]``; ``[N, H]`` for ``input_ids [N]``.

    Raises:
        TypeError: the model is not a causal language model (an encoder-decoder, a classifier, a bare trunk).
        ValueError: a row padded on the left, or a packed batch, for a model that gives it other hidden states than the
            row alone. Its first padded (packed) batch begins with a comparison on a few tokens.

    Example:
        >>> import torch, transformers, prefkern as pk
        >>> config = transformers.CohereConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.AutoModelForCausalLM.from_config(config)
        >>> input_ids = torch.arange(12).view(2, 6)
        >>> from prefkern.integrations.transformers import head_of, last_hidden
        >>> mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        >>> last_hidden(model, input_ids, mask).shape
        torch.Size([2, 6, 16])
    """
    model, layer = causal_model(_WHERE, model)
    trunk = Trunk(model, layer, form_of(_WHERE, model, layer, output_matrix(_WHERE, layer)))
    checks.integer(_WHERE, input_ids=input_ids)
    if input_ids.ndim not in (1, 2):
        checks.fail(_WHERE, f"input_ids must be [B, T] or packed [N], got {checks.describe(input_ids)}")
    if "labels" in inputs:
        checks.fail(
            _WHERE, "labels must not be passed: no loss is made here; give targets to the function that makes it"
        )
    rows = input_ids if input_ids.ndim == 2 else input_ids[None]
    if cu_seqlens is not None or "cu_seq_lens_q" in inputs:
        if attention_mask is not None:
            checks.fail(_WHERE, "attention_mask must not come with a packed batch, which holds no padding")
        if cu_seqlens is not None:
            inputs = pack(_WHERE, rows, cu_seqlens) | inputs
        position_ids = inputs.pop("position_ids", None) if position_ids is None else position_ids
        trunk.must_tell_sequences_apart(_WHERE)
    elif attention_mask is not None:
        if attention_mask.ndim == 2 and attention_mask.shape != rows.shape:
            checks.fail(
                _WHERE,
                f"attention_mask must be shaped like input_ids {tuple(rows.shape)}, "
                f"got {checks.describe(attention_mask)}",
            )
        inputs["attention_mask"] = attention_mask
        if position_ids is None and attention_mask.ndim == 2 and trunk.counts_from_mask(_WHERE, attention_mask, inputs):
            position_ids = count_positions(attention_mask)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    hidden = trunk(input_ids=rows, **inputs)
    return hidden if input_ids.ndim == 2 else hidden[0]

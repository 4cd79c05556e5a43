"""A small model of any causal architecture of transformers, from its own configuration, shrunk by rules.

Dropout, layerdrop and jitter are 0.1, and every scale and cap of the logits is away from its default.
"""

import dataclasses
import re
from typing import Any

import torch
import transformers

V, LIMIT = 96, 30_000_000

# the first pattern that matches a field's name; None leaves it
SMALL: list[tuple[str, Any]] = [
    (r"^(vocab_size|bos_vocab)$", V),
    (r"^unpadded_vocab_size$", V - 6),
    (r"^(final_logit_softcapping|logits_soft_cap|output_logit_soft_cap|final_logit_soft_cap)$", 3.0),
    (r"^(logits_scaling|logits_mup_width_multiplier)$", 3.0),
    (r"^(logit_scale|lm_head_multiplier)$", 0.25),
    (r"^router_jitter_noise$", None),
    (r"(drop|jitter)", 0.1),
    (r"^(pad_token_id)$", 0),
    (r"^(bos_token_id|eos_token_id|decoder_start_token_id|sep_token_id)$", 1),
    (r"_token_(id|index)$", None),
    (
        r"^(num_key_value_heads|num_kv_heads|num_attention_groups|n_kv_heads|multi_query_group_num|swa_num_key_value_heads)$",
        2,
    ),
    (
        r"(num|n)_(attention_|key_value_|query_|decoder_attention_|encoder_attention_)?heads$|^(n_head|decoder_attention_heads|encoder_attention_heads|attention_heads|num_heads)$",
        4,
    ),
    (
        r"^(head_dim|v_head_dim|attention_head_size|global_head_dim|d_kv|qk_nope_head_dim|swa_head_dim|swa_v_head_dim)$",
        8,
    ),
    (r"^(qk_rope_head_dim|index_head_dim)$", 8),
    (r"^(q_lora_rank|kv_lora_rank|o_lora_rank|index_topk)$", 8),
    (r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_decoder_layers)$", 3),
    (
        r"^(hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|embed_dim|lru_width|hidden_size_per_layer_input|emb_dim|attention_hidden_size|decoder_hidden_size|projection_dim|dim_model)$",
        32,
    ),
    (
        r"^(intermediate_size|ffn_dim|decoder_ffn_dim|encoder_ffn_dim|n_inner|d_ff|dim_ff|ffn_hidden_size|dff|intermediate_size_mlp|n_ff|moe_intermediate_size|expert_ffn_hidden_size|shared_expert_intermediate_size|shared_intermediate_size|feed_forward_size)$",
        48,
    ),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length)$", 64),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)$", 4),
    (r"^(num_experts_per_tok|moe_k|moe_topk|moe_top_k|num_experts_per_token)$", 2),
    (r"^(n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)$", 1),
    (r"^(sliding_window|attention_window_size|local_attention|window_size|attention_chunk_size)$", 16),
]
# what the rules do not reach, by model type; a dict goes to a part of the configuration
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
_GEMMA4 = {
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "vocab_size": 260,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260},
        "decoder_config": {"vocab_size": 260},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_jitter_eps": 0.1,
            "hidden_size": 32,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": {"layer_types": _GEMMA4["layer_types"], "num_hidden_layers": 4}},
    "gemma4_unified_text": {"layer_types": _GEMMA4["layer_types"], "num_hidden_layers": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}, "expansion_ratio": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
        "use_mamba_kernels": False,
    },
    "reformer": {
        "axial_pos_embds": False,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "xlstm": {"num_heads": 2, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def small(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that the rules change."""
    changes: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(config)}
    held = vars(config)
    for name in fields:
        value = held.get(name)
        rule = next((new for pattern, new in SMALL if re.search(pattern, name)), None)
        if rule is None or isinstance(value, bool | dict | str | list | transformers.PreTrainedConfig):
            continue
        if isinstance(rule, float) and "drop" in name and isinstance(value, int) and value > 1:
            continue
        if value is None and not re.search("cap|head_dim|inner|key_value|window|logit_scale", name):
            continue
        changes[name] = rule
    if "kv_lora_rank" in fields:
        changes["num_key_value_heads"] = 4
    if "is_decoder" in fields:
        changes["is_decoder"] = True
    layers = next((changes[name] for name in ("num_hidden_layers", "n_layers") if name in changes), 3)
    kinds = held.get("layer_types")
    if isinstance(kinds, list) and kinds:  # each kind of layer once
        changes["layer_types"] = (list(dict.fromkeys(kinds)) * layers)[:layers]
        if "attention" not in "".join(kinds[:layers]) + "".join(changes["layer_types"]):
            changes["layer_types"][-1] = next((kind for kind in kinds if "attention" in kind), kinds[-1])
    return changes | own


def build(kind: str) -> Any:
    """A small model of the type, in float32, with weights that make logits of some size."""
    cls = transformers.CONFIG_MAPPING[kind]
    config, own = cls(), OWN.get(kind, {})
    changes = small(config, own)
    for field in dataclasses.fields(config):
        part = vars(config).get(field.name)
        if (
            isinstance(part, transformers.PreTrainedConfig)
            and "Mpt" not in type(part).__name__
            and "Dbrx" not in type(part).__name__
        ):
            changes[field.name] = type(part)(**small(part, own.get(field.name, {})))
    config = cls(**changes)
    with torch.device("meta"):
        size = sum(each.numel() for each in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LIMIT:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model

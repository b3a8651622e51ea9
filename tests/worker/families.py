"""Tiny models with random weights, one for each way in which mlx-lm's models keep a state."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes

VOCABULARY = 96

_MAMBA2 = {"ssm_state_size": 8, "conv_kernel": 4, "n_groups": 2, "num_heads": 4, "head_dim": 8}
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_scaling": None,
}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # gated delta rule and plain attention
    "qwen3_next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 16,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 3,
    },
    # state-space duality, no attention
    "mamba2": {
        **_MAMBA2,
        "state_size": 8,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.0, 10.0),
        "time_step_rank": 4,
    },
    # selective scan, no attention
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "intermediate_size": 64,
    },
    # selective scan and attention without rope
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_dt_rank": 4,
    },
    # a list of a recurrent and a key-value cache in each layer
    "falcon_h1": {
        "mamba_d_conv": 4,
        "mamba_d_head": 8,
        "mamba_d_ssm": 32,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_n_heads": 4,
    },
    # two mixers that share one cache, and values of the first layer handed on
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    # short convolutions and attention
    "lfm2": {
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    # gated linear recurrence that treats a row's first token apart, and a sliding window
    "recurrent_gemma": {
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 16,
        "num_key_value_heads": 1,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    # latent attention with another formula for one token
    "deepseek_v3": {**_MLA, **_MOE, "topk_method": "noaux_tc", "norm_topk_prob": True},
    # the same with a sparse indexer's cache beside it
    "deepseek_v32": {**_MLA, **_MOE, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 24},
    # sliding windows with sinks
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    # Mamba 2 and attention as layers of their own
    "nemotron_h": {
        "hybrid_override_pattern": "M*-",
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "n_groups": 2,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.0, 10.0),
    },
    "granitemoehybrid": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.35,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention", "mamba"],
        "attention_bias": False,
        "position_embedding_type": "nope",
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 2,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
        "mlp_bias": False,
    },
    # attention that calls mlx's function itself
    "plamo2": {
        "hidden_size_per_head": 8,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_num_heads": 4,
        "mamba_step": 2,
        "mamba_chunk_size": 16,
        "mamba_enabled": True,
        "num_hidden_layers": 4,
    },
    # delta attention with a vector gate, and latent attention without rope
    "kimi_linear": {
        **_MOE,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "rope_scaling": None,
        "moe_router_activation_func": "sigmoid",
        "model_max_length": 512,
        "moe_renormalize": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
        },
    },
    # convolution states and keys in one list that a single module takes apart
    "baichuan_m1": {
        "sliding_window": 16,
        "sliding_window_layers": [1],
        "conv_window": 2,
        "num_swa_attention_heads": None,
        "num_swa_key_value_heads": None,
    },
    # lightning attention whose positions are handed down from the top
    "bailing_hybrid": {
        **_MLA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "layer_group_size": 3,
        "group_norm_size": 1,
        "partial_rotary_factor": 0.5,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "num_key_value_heads": 4,
        "routed_scaling_factor": 1.0,
    },
    # attention written out in the model's file, with scores of five axes
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8.0},
    "qwen2": {},
}


def make_model(kind: str, seed: int = 0) -> Any:
    """A random model of one of `CONFIGS`."""
    config = {"model_type": kind} | _COMMON | CONFIGS[kind]
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.random.seed(seed)
    # Larger than usual weights, so that the next token depends on all of the context.
    model.update(tree_map_with_path(_random, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _random(name: str, array: mx.array) -> mx.array:
    if name.endswith("A_log"):  # decays between 0.2 and 0.9 a step, which keep a state alive
        return mx.random.uniform(-2.0, 0.5, array.shape)
    scale = 0.5 if array.ndim == 1 or "embed" in name else 1.5 / array.shape[-1] ** 0.5
    return mx.random.normal(array.shape) * scale

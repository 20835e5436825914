"""Tiny random models of any decoder that transformers knows by name: one recipe, and what single families need besides.

A value of the recipe is given to a config that has such an attribute. Configs within configs (text, vision) are made tiny likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 160
POSITIONS = 1024
LAYERS = 4

_RECIPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": POSITIONS, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False, "sliding_window": 32, "layer_types": None,
    # by other names
    "n_layer": LAYERS, "n_head": 4, "n_embd": 64, "n_positions": POSITIONS, "n_ctx": POSITIONS, "n_inner": 96, "n_layers": LAYERS,
    "n_heads": 4, "d_model": 64, "num_layers": LAYERS, "num_heads": 4, "max_seq_len": POSITIONS, "ffn_dim": 96, "kv_n_heads": 2,
    "decoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": LAYERS, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "max_target_positions": POSITIONS, "decoder_start_token_id": 1, "dff": 96, "rotary_dim": 8,
    "attention_layers": LAYERS, "attention_heads": 4, "ffn_hidden_size": 96, "num_kv_heads": 2, "embedding_size": 64, "is_decoder": True,
    "use_cache": True, "model_max_length": POSITIONS, "word_embed_proj_dim": 64, "type_vocab_size": 2, "forced_eos_token_id": None,
    "attention_hidden_size": 64, "decoder_vocab_size": VOCABULARY, "kv_channels": 16, "attention_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "global_head_dim": 32,
    "num_global_key_value_heads": 1, "swa_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "sliding_window_size": 32, "v_head_dim": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "q_lora_rank": 24, "kv_lora_rank": 16,
    # mixtures of experts
    "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 32, "num_shared_experts": 1,
    "num_experts_per_token": 2, "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2,
    "num_expert_group": 1, "shared_intermediate_size": 32, "top_k_experts": 2, "expert_ffn_hidden_size": 32, "zero_expert_num": 2,
    "moe_num_shared_experts": 1, "intermediate_size_mlp": 96, "moe_shared_expert_intermediate_size": 32, "dense_intermediate_size": 96,
    "shared_experts_intermediate_size": 32, "moe_layer_end_index": LAYERS - 1,
    # linear attention, Mamba, convolutions
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 16,
    "linear_num_heads": 4, "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "mamba_n_groups": 1, "mamba_chunk_size": 16, "chunk_size": 16,
    "mamba_dt_rank": 8, "time_step_rank": 8, "state_size": 16, "lru_width": 64, "block_multiple_of": 16, "mamba_headdim": 16,
    "n_mamba_heads": 2, "adapter_rank": 8, "laurel_rank": 8, "router_hidden_size": 16,
    # vision and audio towers
    "image_size": 16, "patch_size": 8, "num_channels": 3, "depth": 1, "embed_dim": 64, "out_hidden_size": 64, "projection_dim": 64,
    "encoder_hidden_size": 64, "num_mel_bins": 16, "vision_output_dim": 64, "mm_tokens_per_image": 4, "audio_vocab_size": 32,
}  # fmt: skip

_FULL_AND_SLIDING = ["sliding_attention", "full_attention"] * 2
_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2

# What the recipe cannot know: patterns short enough for four layers, and sizes that must fit each other.
_OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": _FULL_AND_SLIDING},
    "bailing_hybrid": {"layer_types": ["full_attention", "linear_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bloom": {"hidden_size": 64},
    "cohere2": {"layer_types": _FULL_AND_SLIDING},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "codegen": {"rotary_dim": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "exaone4": {"layer_types": _FULL_AND_SLIDING},
    "exaone_moe": {"layer_types": _FULL_AND_SLIDING},
    "gemma2": {"layer_types": _FULL_AND_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {"layer_types": _FULL_AND_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3n_text": {"layer_types": [*_FULL_AND_SLIDING, "sliding_attention", "full_attention"], "num_hidden_layers": 6,
                     "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": {"global_head_dim": 32, "num_global_key_value_heads": 1, "layer_types": [*_FULL_AND_SLIDING, "sliding_attention", "full_attention"], "num_hidden_layers": 6,
                    "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 32, "num_global_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "gpt_oss": {"layer_types": _FULL_AND_SLIDING},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"initializer_range": 0.05},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8},
    "kimi_linear": {"layer_types": ["full_attention", "linear_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"attention_chunk_size": 32, "no_rope_layers": [1, 0, 1, 0], "layer_types": None, "floor_scale": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    # Where all layers attend to one, a window that is worth coding.
    "kolibri1": {"sliding_window": 512},
    "ministral": {"sliding_window": 512},
    "mistral": {"sliding_window": 512},
    "moshi": {"sliding_window": 512},
    "minimax": {"layer_types": _LINEAR_AND_FULL},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "attention"], "num_hidden_layers": 6},
    "olmo3": {"layer_types": _FULL_AND_SLIDING},
    "olmo_hybrid": {"layer_types": _LINEAR_AND_FULL},
    "phi3": {"sliding_window": None},
    "qwen3_5_text": {"layer_types": _LINEAR_AND_FULL},
    "qwen3_5_moe_text": {"layer_types": _LINEAR_AND_FULL},
    "qwen3_next": {"layer_types": _LINEAR_AND_FULL},
    "qwen4_exp_text": {"layer_types": _LINEAR_AND_FULL, "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 200,
                       "split_ngram_parts": 2, "hc_lowrank": 16},
    "reformer": {"axial_pos_embds": False},
    "smollm3": {"sliding_window": None},
    "xlm": {"emb_dim": 64, "n_words": VOCABULARY},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 8, "attention_hidden_size": 128,
              "attention_head_dim": 32, "n_mamba_heads": 2, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def causal_names() -> list[str]:
    """List the decoder names of the causal mapping."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_text_names() -> list[str]:
    """List the names that only the mapping of models of images and text has."""
    return [
        name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """Make the tiny config of a name; ``overrides`` go to the config of its text decoder."""
    return _tiny(CONFIG_MAPPING[name], overrides)


def tiny_family(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a tiny random model of a name, in eval mode; ``overrides`` as ``tiny_config`` takes them."""
    torch.manual_seed(seed)
    config = tiny_config(name, **overrides)
    kind = AutoModelForCausalLM if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    model = kind.from_config(config).eval()
    with torch.no_grad():
        _spread(model)
    return model


def _tiny(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    known = _attributes(kind)
    given = {name: value for name, value in _RECIPE.items() if name in known}
    if "kv_lora_rank" in known:
        given["num_key_value_heads"] = given["num_attention_heads"]
    if getattr(kind, "sliding_window", None) is None:
        given.pop("sliding_window", None)
    parts = getattr(kind, "sub_configs", {})
    for part, sub in parts.items():
        if isinstance(sub, type) and issubclass(sub, PreTrainedConfig) and hasattr(sub, "sub_configs"):
            given[part] = _tiny(sub, overrides if part == "text_config" else {}).to_dict()
    given |= _OWN.get(kind.model_type, {})
    if "text_config" not in parts:
        given |= overrides
    return kind(**given)


def _attributes(kind: type[PreTrainedConfig]) -> set[str]:
    """What a kind of config takes by name, aliases left out."""
    fields = set(getattr(kind, "__dataclass_fields__", {})) - {"layer_types"}
    own = {name for cls in kind.__mro__ for name in getattr(cls, "__annotations__", {})}
    return (fields | own) - set(getattr(kind, "attribute_map", {}))


def _spread(model: PreTrainedModel) -> None:
    """Give zero-initialised and constant parameters some spread, as training does, so that every part of the model counts."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and float(parameter.std()) == 0:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)

"""Tiny random models of many families, as transformers 5.23 has them, with settings that reach each family's own parts."""

import dataclasses
from typing import Any

import torch
import transformers

V, PAD, BOS, EOS, IMG = 264, 257, 258, 261, 262

COMMON = {
    "vocab_size": V, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "initializer_range": 0.2, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "sliding_window": 8, "window_size": 8,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0,
    "classifier_dropout": 0.0, "emb_pdrop": 0.0, "attn_dropout": 0.0, "layerdrop": 0.0, "resid_dropout": 0.0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24, "router_aux_loss_coef": 1.0,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 4, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_d_ssm": 64, "state_size": 8, "chunk_size": 4, "attention_chunk_size": 8,
}  # fmt: skip

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_heads": 2, "depth": 3, "embed_dim": 16,
    "image_size": 28, "patch_size": 14, "num_channels": 3, "in_channels": 3, "out_hidden_size": 32, "projection_dim": 16, "head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip

HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
SWA = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# name: (config class, model class or None for the automatic one, overrides)
FAMILIES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("LlamaConfig", None, {}),
    "llama_tied": ("LlamaConfig", None, {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", None, {}),
    "mixtral": ("MixtralConfig", None, {}),
    "mixtral_router_loss": ("MixtralConfig", None, {"output_router_logits": True}),
    "qwen2": ("Qwen2Config", None, {"use_sliding_window": False}),
    "qwen2_moe": ("Qwen2MoeConfig", None, {"decoder_sparse_step": 1}),
    "qwen3": ("Qwen3Config", None, {}),
    "qwen3_moe": ("Qwen3MoeConfig", None, {"decoder_sparse_step": 1}),
    "qwen3_next": ("Qwen3NextConfig", None, {"layer_types": HYBRID}),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {"layer_types": HYBRID}),
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", {"_mm": True, "text": {"layer_types": HYBRID}}),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {"layer_types": HYBRID}),
    "qwen4_exp_text": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM",
                       {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 256, "indexer_compress_ratio": 2,
                            "ngram_vocab_size_base": 512, "split_ngram_parts": 4, "heads_per_ngram": 2, "hc_lowrank": 8, "ple_embed_dim": 8,
                            "hc_count": 2, "make_ngram_vocab_size_divisible_by": 8, "ple_layer_ids": [1, 3],
                            "layer_types": HYBRID}),
    "gemma": ("GemmaConfig", None, {}),
    "gemma2": ("Gemma2Config", None, {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma3_text": ("Gemma3TextConfig", None, {"query_pre_attn_scalar": 8, "layer_types": SWA}),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration",
               {"_mm": True, "mm_tokens_per_image": 4, "text": {"query_pre_attn_scalar": 8, "layer_types": SWA},
                    "boi_token_index": 263, "eoi_token_index": 263, "image_token_index": IMG,
                    "text_cls": "Gemma3TextConfig", "vision_cls": "SiglipVisionConfig"}),
    "gemma3n_text": ("Gemma3nTextConfig", None,
                     {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 2,
                          "num_hidden_layers": 4, "layer_types": SWA, "intermediate_size": 48, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
                          "altup_num_inputs": 3}),
    "gemma4_text": ("Gemma4TextConfig", None,
                    {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "global_head_dim": 8,
                         "layer_types": SWA, "final_logit_softcapping": 3.0, "num_experts": None}),
    "gemma4_text_moe": ("Gemma4TextConfig", None,
                        {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 8,
                             "layer_types": SWA, "final_logit_softcapping": 3.0, "enable_moe_block": True, "top_k_experts": 2}),
    "gemma4": ("Gemma4Config", "Gemma4ForConditionalGeneration",
               {"_mm": True, "audio_config": None, "text": {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8,
                                                          "num_kv_shared_layers": 2, "global_head_dim": 8, "layer_types": SWA, "num_experts": None}}),
    "vaultgemma": ("VaultGemmaConfig", None, {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "recurrent_gemma": ("RecurrentGemmaConfig", None,
                        {"num_hidden_layers": 4, "attention_window_size": 8, "lru_width": 32, "block_types": ["recurrent", "attention"],
                             "logits_soft_cap": 3.0}),
    "phi": ("PhiConfig", None, {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", None, {}),
    # a row alone is short, the batch is not: does it matter what a row is read together with?
    "phi3_longrope": ("Phi3Config", None, {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": 32}}),
    "llama_dynamic_rope": ("LlamaConfig", None, {"max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}}),
    "llama_yarn": ("LlamaConfig", None, {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}}),
    "phimoe": ("PhimoeConfig", None, {}),
    "phimoe_quiet": ("PhimoeConfig", None, {"input_jitter_noise": 0.0, "router_jitter_noise": 0.0}),
    "olmo": ("OlmoConfig", None, {"clip_qkv": None}),
    "olmo2": ("Olmo2Config", None, {}),
    "olmo3": ("Olmo3Config", None, {"layer_types": SWA}),
    "olmoe": ("OlmoeConfig", None, {}),
    "olmo_hybrid": ("OlmoHybridConfig", None, {"layer_types": HYBRID}),
    "granite": ("GraniteConfig", None, {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "granitemoe": ("GraniteMoeConfig", None, {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", None,
                         {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
                              "layer_types": ["mamba", "attention", "mamba", "attention"]}),
    "cohere": ("CohereConfig", None, {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", None, {"logit_scale": 0.25, "layer_types": SWA}),
    "deepseek_v2": ("DeepseekV2Config", None, {"num_key_value_heads": 4}),
    "deepseek_v3": ("DeepseekV3Config", None, {"num_key_value_heads": 4, "num_mtp_layers": 0, "head_dim": 8}),
    "deepseek_v32": ("DeepseekV32Config", None, {"num_key_value_heads": 4, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 6}),
    "glm": ("GlmConfig", None, {}),
    "glm4": ("Glm4Config", None, {}),
    "glm4_moe": ("Glm4MoeConfig", None, {}),
    "gpt_oss": ("GptOssConfig", None, {"layer_types": SWA}),
    "gpt2": ("GPT2Config", None, {"num_hidden_layers": 4}),
    "gpt2_dropout": ("GPT2Config", None, {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    "gpt_bigcode": ("GPTBigCodeConfig", None, {}),
    "gpt_neo": ("GPTNeoConfig", None, {"attention_types": [[["global", "local"], 2]], "num_heads": 4}),
    "gpt_neox": ("GPTNeoXConfig", None, {}),
    "gptj": ("GPTJConfig", None, {"rotary_dim": 4}),
    "codegen": ("CodeGenConfig", None, {"rotary_dim": 4}),
    "opt": ("OPTConfig", None, {"init_std": 0.2}),
    "opt_350m": ("OPTConfig", None, {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.2}),
    "bloom": ("BloomConfig", None, {}),
    "falcon": ("FalconConfig", None, {"multi_query": True}),
    "falcon_alibi": ("FalconConfig", None, {"multi_query": False, "alibi": True, "new_decoder_architecture": False}),
    "falcon_h1": ("FalconH1Config", None, {"lm_head_multiplier": 0.5, "embedding_multiplier": 3.0, "key_multiplier": 0.5}),
    "mpt": ("MptConfig", None, {}),
    "stablelm": ("StableLmConfig", None, {}),
    "starcoder2": ("Starcoder2Config", None, {}),
    "smollm3": ("SmolLM3Config", None, {}),
    "nemotron": ("NemotronConfig", None, {}),
    "nemotron_h": ("NemotronHConfig", None,
                   {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 16,
                        "ssm_state_size": 8, "n_groups": 1}),
    "minimax": ("MiniMaxConfig", None, {"layer_types": HYBRID, "block_size": 4}),
    "minimax_m2": ("MiniMaxM2Config", None, {}),
    "ernie4_5": ("Ernie4_5Config", None, {}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", None, {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", None, {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", None, {"moe_topk": 2}),
    "exaone4": ("Exaone4Config", None, {"layer_types": SWA}),
    "lfm2": ("Lfm2Config", None, {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("Lfm2MoeConfig", None, {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1}),
    "mamba": ("MambaConfig", None, {}),
    "mamba2": ("Mamba2Config", None, {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "state_size": 8}),
    "falcon_mamba": ("FalconMambaConfig", None, {}),
    "bamba": ("BambaConfig", None, {"attn_layer_indices": [1, 3]}),
    "jamba": ("JambaConfig", None, {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                                        "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "zamba": ("ZambaConfig", None, {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2,
                                        "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "zamba2": ("Zamba2Config", None, {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 4, "mamba_headdim": 16,
                                          "num_mem_blocks": 1, "adapter_rank": 4, "use_mamba_kernels": False, "num_key_value_heads": 4}),
    "rwkv": ("RwkvConfig", None, {"context_length": 256, "attention_hidden_size": 32, "rescale_every": 0}),
    "llama4_text": ("Llama4TextConfig", None, {"intermediate_size_mlp": 48, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0],
                                                   "num_experts_per_tok": 1}),
    "mistral3": ("Mistral3Config", "Mistral3ForConditionalGeneration", {"_mm": True, "image_token_index": IMG, "text_cls": "MistralConfig", "vision_cls": "PixtralVisionConfig"}),
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", {"_mm": True, "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}}),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {"_mm": True, "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}}),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", {"_mm": True, "vision": {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}, "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}}),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", {"_mm": True, "image_token_index": IMG, "text_cls": "LlamaConfig", "vision_cls": "CLIPVisionConfig"}),
    "internvl": ("InternVLConfig", "InternVLForConditionalGeneration", {"_mm": True, "image_token_id": IMG, "text_cls": "Qwen2Config", "vision": {"image_size": [28, 28], "patch_size": [14, 14]}}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_kv": 8, "decoder_start_token_id": PAD, "num_layers": 3}),
    # further ones, fewer users each
    "seed_oss": ("SeedOssConfig", None, {}),
    "apertus": ("ApertusConfig", None, {}),
    "arcee": ("ArceeConfig", None, {}),
    "helium": ("HeliumConfig", None, {}),
    "nanochat": ("NanoChatConfig", None, {"final_logit_softcapping": 3.0}),
    "ministral": ("MinistralConfig", None, {"layer_types": SWA}),
    "ministral3": ("Ministral3Config", None, {}),
    "minicpm3": ("MiniCPM3Config", None, {"num_key_value_heads": 4, "dim_model_base": 8, "scale_emb": 3.0, "scale_depth": 1.4}),
    "bitnet": ("BitNetConfig", None, {}),
    "modernbert_decoder": ("ModernBertDecoderConfig", None, {"global_attn_every_n_layers": 2, "local_attention": 8}),
    "xlstm": ("xLSTMConfig", None, {"num_heads": 2, "num_blocks": 4, "chunk_size": 4, "output_logit_soft_cap": 3.0}),
    "dbrx": ("DbrxConfig", None, {"attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "attn_pdrop": 0.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}, "hidden_size": 32}}),
    "jetmoe": ("JetMoeConfig", None, {"kv_channels": 8}),
    "diffllama": ("DiffLlamaConfig", None, {}),
    "persimmon": ("PersimmonConfig", None, {}),
    "xglm": ("XGLMConfig", None, {"attention_heads": 4, "init_std": 0.2}),
    "biogpt": ("BioGptConfig", None, {}),
    "doge": ("DogeConfig", None, {}),
    "dots1": ("Dots1Config", None, {}),
    "flex_olmo": ("FlexOlmoConfig", None, {}),
    "kimi_linear": ("KimiLinearConfig", None, {"layer_types": HYBRID, "linear_head_dim": 8, "linear_num_heads": 4, "num_key_value_heads": 4}),
    "bailing_hybrid": ("BailingHybridConfig", None, {"layer_types": HYBRID, "num_key_value_heads": 4}),
    "exaone_moe": ("ExaoneMoeConfig", None, {}),
    "solar_open": ("SolarOpenConfig", None, {}),
    "cwm": ("CwmConfig", None, {"layer_types": SWA}),
    "jais2": ("Jais2Config", None, {}),
    "afmoe": ("AfmoeConfig", None, {}),
    "mimo_v2_flash": ("MiMoV2FlashConfig", None, {}),
    "openai_gpt": ("OpenAIGPTConfig", None, {}),
    "phi4_multimodal": ("Phi4MultimodalConfig", None, {
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "crop_size": 28},
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 2, "num_attention_heads": 2, "ext_pw_out_channel": 16,
                             "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16}}),
    "ctrl": ("CTRLConfig", None, {"dff": 48}),
    "zaya": ("ZayaConfig", None, {"num_experts_per_tok": 1}),
}  # fmt: skip


BY_NAME = {"t5", "gemma3n_text", "minimax", "recurrent_gemma", "rwkv"}
"""Refused before they are loaded, by `NOT_SUPPORTED` or as encoder-decoders."""
BY_PROBE = {
    "modernbert_decoder": (
        "the logits", "it has a dense layer and a norm in front of its LM head; only objectives on hidden states, with "
        "`health_tokens: 0`, can use it",
    ),
    "xlstm": ("reading or writing a few tokens fails", "transformers 5.23 fails to write two texts at once"),
}  # fmt: skip
"""Refused by the probe: what its message says, and why."""
WITHOUT_BF16 = ("dbrx", "xglm", "openai_gpt")
"""transformers 5.23 fails to read (DBRX) or to write in bfloat16."""
COARSE_IN_BF16 = {
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe_text",
    "qwen4_exp_text",
    "zamba2",
    "kimi_linear",
    "bailing_hybrid",
}
"""In transformers' own bfloat16 the gradient is more than a quarter of its length off that in float32."""
SUPPORTED = [name for name in FAMILIES if name not in {*BY_NAME, *BY_PROBE}]


def make_config(name: str) -> Any:
    """The family's config in the small sizes that it knows."""
    config_name, _, settings = FAMILIES[name]
    extra = dict(settings)
    cls = getattr(transformers, config_name)
    if not extra.pop("_mm", False):
        return cls(**(known(cls, COMMON) | extra))
    parts = {"image_token_id": IMG, "video_token_id": IMG, "boi_token_id": IMG, "eoi_token_id": IMG, "boa_token_id": IMG,
             "eoa_token_id": IMG, "eoa_token_index": IMG, "audio_token_id": IMG, "vision_start_token_id": IMG,
             "vision_end_token_id": IMG}  # fmt: skip
    parts = {key: value for key, value in parts.items() if key in field_names(cls)}
    for part, sizes in (("text", COMMON), ("vision", VISION)):
        own, part_cls = extra.pop(part, {}), extra.pop(f"{part}_cls", None)
        part_cls = getattr(transformers, part_cls) if part_cls else cls.sub_configs[f"{part}_config"]
        parts[f"{part}_config"] = part_cls(**(known(part_cls, sizes) | own))
    return cls(**(parts | extra))


def field_names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def known(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values that this config class has a field for."""
    names, mapped = field_names(cls) | set(cls.attribute_map), cls.attribute_map
    return {key: value for key, value in values.items() if key in names and mapped.get(key) not in values}


def make_model(name: str, seed: int = 0) -> Any:
    """A model whose every weight matters: norms are not one, biases not zero, attention is not flat."""
    config = make_config(name)
    model_name = FAMILIES[name][1]
    torch.manual_seed(seed)
    if model_name is None:
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = getattr(transformers, model_name)(config)
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point():
                continue
            if not bool(torch.isfinite(p).all()):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
            if p.dim() <= 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
            elif float(p.std()) < 1e-3:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
        for n, b in model.named_buffers():
            if "correction_bias" in n or n.endswith("e_score_bias"):
                b.add_(0.05 * torch.randn(b.shape, generator=generator))
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    return model

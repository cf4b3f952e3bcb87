"""Tiny members of many model families, with random weights: what the graph of a model is tried on.

The table holds sizes only. A family whose class this version of transformers does not have is skipped by the test
that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

Sample = dict[str, Any]
Kind = Literal["decoder", "encoder", "pair", "image", "speech"]

VOCABULARY = 96
FIRST_WORD = 3  # the ids below are padding, beginning and end
IMAGE, PATCH = 16, 8
MEL_BINS, FRAMES = 16, 32
NOISE = 0.1  # on every weight, so that biases, norms and small initial weights all do something


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Attributes:
        model: Class of the model in transformers.
        config: Class of its configuration.
        settings: Sizes.
        kind: Which inputs it takes.
        attention: Implementation of the attention.
    """

    model: str
    config: str
    settings: Mapping[str, Any]
    kind: Kind = "decoder"
    attention: str = "sdpa"

    @property
    def generates(self) -> bool:
        """Whether ``model.generate`` works."""
        return self.kind in ("decoder", "pair")


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, **IDS}
WIDE = {**PLAIN, "intermediate_size": 96, "max_position_embeddings": 64}
GATED = {**WIDE, "num_key_value_heads": 2}
HEADED = {**GATED, "head_dim": 16}
SCALED = {**HEADED, "query_pre_attn_scalar": 16, "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, **IDS}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
PAIR = {
    "d_model": 64,
    "vocab_size": VOCABULARY,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 2,
    **IDS,
}
START = {"decoder_start_token_id": 0}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BOTH = ["sliding_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
PICTURE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
SPEECH = {"num_mel_bins": MEL_BINS, "max_source_positions": FRAMES // 2, "max_target_positions": 64}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GATED),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", GATED),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", HEADED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**GATED, "sliding_window": 4}),
    "ministral": Family(
        "MinistralForCausalLM", "MinistralConfig", {**HEADED, "sliding_window": 4, "layer_types": BOTH}
    ),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", HEADED),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", SCALED, attention="eager"),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**SCALED, "layer_types": BOTH}),
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **HEADED,
            "intermediate_size": [96, 96],
            "sliding_window": 4,
            "layer_types": BOTH,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.5, 0.0],
        },
    ),
    "phi": Family("PhiForCausalLM", "PhiConfig", GATED),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", GATED),
    "opt": Family("OPTForCausalLM", "OPTConfig", {**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-projected": Family("OPTForCausalLM", "OPTConfig", {**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 32}),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", OLD),
    "gptj": Family("GPTJForCausalLM", "GPTJConfig", {**OLD, "rotary_dim": 4}, attention="eager"),
    "gptneo": Family(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **IDS,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
        attention="eager",
    ),
    "gptneox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", WIDE),
    "gptbigcode": Family("GPTBigCodeForCausalLM", "GPTBigCodeConfig", OLD),
    "codegen": Family("CodeGenForCausalLM", "CodeGenConfig", {**OLD, "rotary_dim": 4}, attention="eager"),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {**IDS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
        attention="eager",
    ),
    "falcon": Family("FalconForCausalLM", "FalconConfig", {**PLAIN, "multi_query": True}),
    "falcon-grouped": Family(
        "FalconForCausalLM", "FalconConfig", {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon-alibi": Family("FalconForCausalLM", "FalconConfig", {**PLAIN, "alibi": True, "multi_query": False}),
    "mpt": Family(
        "MptForCausalLM",
        "MptConfig",
        {**IDS, "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 64},
        attention="eager",
    ),
    "persimmon": Family("PersimmonForCausalLM", "PersimmonConfig", WIDE),
    "stablelm": Family("StableLmForCausalLM", "StableLmConfig", GATED),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", GATED),
    "olmo": Family("OlmoForCausalLM", "OlmoConfig", GATED),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", GATED),
    "olmo3": Family("Olmo3ForCausalLM", "Olmo3Config", {**GATED, "sliding_window": 4, "layer_types": BOTH}),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config", {**GATED, "no_rope_layers": [1, 0]}),
    "cohere": Family("CohereForCausalLM", "CohereConfig", GATED),
    "cohere2": Family("Cohere2ForCausalLM", "Cohere2Config", {**GATED, "sliding_window": 4, "layer_types": BOTH}),
    "glm": Family("GlmForCausalLM", "GlmConfig", HEADED),
    "glm4": Family("Glm4ForCausalLM", "Glm4Config", HEADED),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", {**GATED, "sliding_window": 4}),
    "nemotron": Family("NemotronForCausalLM", "NemotronConfig", GATED),
    "exaone4": Family("Exaone4ForCausalLM", "Exaone4Config", {**GATED, "sliding_window": 4, "layer_types": BOTH}),
    "ernie4_5": Family("Ernie4_5ForCausalLM", "Ernie4_5Config", {**HEADED, "use_bias": True}),
    "helium": Family("HeliumForCausalLM", "HeliumConfig", HEADED),
    "apertus": Family("ApertusForCausalLM", "ApertusConfig", GATED),
    "arcee": Family("ArceeForCausalLM", "ArceeConfig", GATED),
    "seed-oss": Family("SeedOssForCausalLM", "SeedOssConfig", HEADED),
    "hunyuan": Family("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", HEADED),
    "diffllama": Family("DiffLlamaForCausalLM", "DiffLlamaConfig", GATED),
    "bitnet": Family("BitNetForCausalLM", "BitNetConfig", GATED),
    "nanochat": Family("NanoChatForCausalLM", "NanoChatConfig", GATED),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {
            **GATED,
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 16,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "openai-gpt": Family("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", OLD, attention="eager"),
    "biogpt": Family("BioGptForCausalLM", "BioGptConfig", WIDE),
    "xglm": Family(
        "XGLMForCausalLM",
        "XGLMConfig",
        {**IDS, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "vocab_size": VOCABULARY},
        attention="eager",
    ),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**GATED, "num_local_experts": 4}),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**GATED, **EXPERTS, "shared_expert_intermediate_size": 16}
    ),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**HEADED, **EXPERTS}),
    "olmoe": Family("OlmoeForCausalLM", "OlmoeConfig", {**GATED, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": Family(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": BOTH},
        attention="eager",
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**HEADED, "intermediate_size_mlp": 96, "num_local_experts": 4, "moe_layers": [1], "attention_chunk_size": 16},
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**WIDE, **LATENT, **ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    "qwen3-next": Family(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **HEADED,
            **EXPERTS,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "mamba": Family("MambaForCausalLM", "MambaConfig", {**PLAIN, "state_size": 8}, attention="eager"),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**PLAIN, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4},
        attention="eager",
    ),
    "rwkv": Family(
        "RwkvForCausalLM", "RwkvConfig", {**PLAIN, "attention_hidden_size": 64, "rescale_every": 0}, attention="eager"
    ),
    "bamba": Family(
        "BambaForCausalLM", "BambaConfig", {**GATED, **MAMBA, "attn_layer_indices": [1], "mamba_expand": 2}
    ),
    "granite-hybrid": Family(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**GATED, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 16},
    ),
    "minimax": Family(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {**HEADED, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", WIDE, "encoder"),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", WIDE, "encoder"),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY},
        "encoder",
    ),
    "electra": Family("ElectraForMaskedLM", "ElectraConfig", {**WIDE, "embedding_size": 16}, "encoder"),
    "albert": Family("AlbertForMaskedLM", "AlbertConfig", {**WIDE, "embedding_size": 16}, "encoder"),
    "deberta-v2": Family(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "encoder",
        attention="eager",
    ),
    "modernbert": Family("ModernBertForMaskedLM", "ModernBertConfig", {**WIDE, "local_attention": 4}, "encoder"),
    "mpnet": Family("MPNetForMaskedLM", "MPNetConfig", WIDE, "encoder", attention="eager"),
    "xlnet": Family(
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": VOCABULARY},
        "encoder",
        attention="eager",
    ),
    "clip-text": Family("CLIPTextModel", "CLIPTextConfig", WIDE, "encoder"),
    "t5": Family("T5ForConditionalGeneration", "T5Config", {**T5, **START}, "pair"),
    "mt5": Family("MT5ForConditionalGeneration", "MT5Config", {**T5, **START}, "pair"),
    "t5gemma": Family(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {
            "encoder": {**SCALED, "layer_types": BOTH},
            "decoder": {**SCALED, "layer_types": BOTH},
            "vocab_size": VOCABULARY,
        }
        | START,
        "pair",
        attention="eager",
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", PAIR, "pair"),
    "pegasus": Family("PegasusForConditionalGeneration", "PegasusConfig", PAIR, "pair"),
    "whisper": Family("WhisperForConditionalGeneration", "WhisperConfig", {**PAIR, **SPEECH}, "speech"),
    "vit": Family("ViTForImageClassification", "ViTConfig", PICTURE, "image"),
    "clip-vision": Family("CLIPVisionModel", "CLIPVisionConfig", PICTURE, "image"),
    "dinov2": Family("Dinov2ForImageClassification", "Dinov2Config", {**PICTURE, "mlp_ratio": 2}, "image"),
    "convnext": Family(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "image",
        attention="eager",
    ),
}


def build(name: str, **overrides: Any) -> tuple[nn.Module, Callable[..., Sample]]:
    """Build one member of a family, the same with every call.

    Args:
        name: In the table.
        overrides: Settings in place of those of the table.

    Returns:
        The model in evaluation mode with random weights, and ``sample(batch, length, padded=True)``, which makes
        new random keyword arguments for it. Images and spectrograms have no length: their size is fixed.
    """
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    if not hasattr(transformers, family.model):
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**{**family.settings, **overrides})
    config._attn_implementation = family.attention
    model: nn.Module = getattr(transformers, family.model)(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * NOISE)
    return model, lambda batch, length, padded=True: _sample(family.kind, batch, length, padded)


def _sample(kind: Kind, batch: int, length: int, padded: bool) -> Sample:
    if kind == "image":
        return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE)}
    if kind == "speech":
        features = torch.randn(batch, MEL_BINS, FRAMES)
        return {"input_features": features, "decoder_input_ids": _words(batch, length)}
    sample: Sample = {"input_ids": _words(batch, length)}
    if padded:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, : length // 3] = 0
        sample["attention_mask"] = mask if kind == "decoder" else mask.flip(1)
    if kind == "pair":
        sample["decoder_input_ids"] = _words(batch, length - 2)
    return sample


def _words(batch: int, length: int) -> Tensor:
    return torch.randint(FIRST_WORD, VOCABULARY, (batch, length))

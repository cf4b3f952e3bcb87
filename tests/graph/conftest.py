"""Models that the graph tests trace: tiny members of well-known families with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpfx.graph import OUTPUT, bind_inputs, blocks, run_block

Sample = dict[str, Any]
Family = Callable[..., tuple[nn.Module, Callable[..., Sample]]]

HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GATED = {**HIDDEN, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GATED),
    "opt": ("OPTForCausalLM", "OPTConfig", {**HIDDEN, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GATED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GATED, "sliding_window": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GATED, **HEADS, "sliding_window": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**GATED, **IDS}),
    "gptneox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**HIDDEN, "intermediate_size": 48}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**HIDDEN, "multi_query": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GATED, "num_local_experts": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", {**HIDDEN, "intermediate_size": 48}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
}
EAGER_ONLY = {"gemma2"}


@pytest.fixture
def family() -> Family:
    """Build ``(model, sample)``: the model in evaluation mode, and ``sample(batch, length, padded=True)``."""
    transformers = pytest.importorskip("transformers")

    def build(name: str, **overrides: Any) -> tuple[nn.Module, Callable[..., Sample]]:
        model_name, config_name, settings = FAMILIES[name]
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**{**settings, **overrides})
        config._attn_implementation = "eager" if name in EAGER_ONLY else "sdpa"
        model: nn.Module = getattr(transformers, model_name)(config).eval()
        for parameter in model.parameters():  # biases and norms that do something
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model, lambda batch, length, padded=True: make_sample(name, batch, length, padded)

    return build


def make_sample(name: str, batch: int, length: int, padded: bool) -> Sample:
    sample: Sample = {"input_ids": torch.randint(3, 96, (batch, length))}
    if padded:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, : length // 3] = 0
        sample["attention_mask"] = mask.flip(1) if name in ("bert", "t5") else mask
    if name == "t5":
        sample["decoder_input_ids"] = torch.randint(3, 96, (batch, length - 2))
    return sample


@pytest.fixture
def run_in_blocks() -> Callable[..., Any]:
    """Run the blocks of a graph one after the other, each of them twice, as a solver does."""

    def run(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        parts = blocks(gm)
        env = bind_inputs(gm, args, kwargs)
        for block in parts:
            run_block(block, env, parts[block.index + 1 :])
            env = run_block(block, env, parts[block.index + 1 :])
        return env[OUTPUT]

    return run


@pytest.fixture
def chain() -> nn.Module:
    """Two MLPs, each of which reads its input twice, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(GatedMLP(8, 12), GatedMLP(8, 12), nn.Linear(8, 3)).eval()


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return x + out

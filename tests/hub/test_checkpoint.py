"""Checkpoints: bit for bit, as small as they say, and refused when damaged."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpfx
from mpfx.callbacks import ModelCompression
from mpfx.hub.checkpoint import CheckpointError, tensor_bytes
from mpfx.lm import CausalLM
from mpfx.nn import MixedPrecisionLinear
from mpfx.passes import CompressionConfig

Batches = list[dict[str, Tensor]]
CONFIG = CompressionConfig(code_bits=4, allocation="quantile")


@pytest.fixture
def packed(llama: Any, batches: Batches, validate: Any) -> Any:
    validate(CausalLM(llama), batches, ModelCompression(CONFIG, module="model", heads=["lm_head"]))
    return llama


@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
@pytest.mark.parametrize("allocation", ["fixed", "quantile"])
def test_logits_are_bit_identical(
    language_model: Any, batches: Batches, validate: Any, tmp_path: Path, sparsity: Any, allocation: Any
) -> None:
    config = CompressionConfig(code_bits=4, allocation=allocation, sparsity=sparsity)
    validate(CausalLM(language_model), batches, ModelCompression(config, module="model", heads=["lm_head"]))
    before = language_model(**batches[0]).logits
    stored = mpfx.save(language_model, tmp_path / "out")
    loaded: Any = mpfx.load(tmp_path / "out")
    assert torch.equal(loaded(**batches[0]).logits, before)
    assert stored == tensor_bytes(language_model) == tensor_bytes(loaded)
    assert set(loaded.state_dict()) == set(language_model.state_dict())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    tokens = batches[0]["input_ids"][:1, :5]
    generated = loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, language_model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_the_file_is_as_large_as_it_says(make_llama: Any, batches: Batches, validate: Any, tmp_path: Path) -> None:
    model = make_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    validate(CausalLM(model), batches[:1], ModelCompression(CONFIG, module="model", heads=["lm_head"]))
    stored = mpfx.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(stored, rel=0.01)


def test_tied_embeddings_stay_tied_and_are_stored_once(
    make_llama: Any, batches: Batches, validate: Any, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=True)
    validate(CausalLM(model), batches, ModelCompression(CONFIG, module="model", heads=["lm_head"]))
    mpfx.save(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded: Any = mpfx.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)


def test_siblings_share_one_permutation(packed: Any, tmp_path: Path) -> None:
    mpfx.save(packed, tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("permutation.")]
    assert len(names) == 3 * 4  # one per input group: q/k/v, o, gate/up, down
    entries = json.loads((tmp_path / "mpfx.json").read_text())["sites"]
    attention = [entries[f"model.layers.0.self_attn.{n}_proj"]["permutation"] for n in "qkv"]
    assert len(set(attention)) == 1


def test_half_precision_models(packed: Any, batches: Batches, tmp_path: Path) -> None:
    packed.to(torch.bfloat16)
    mpfx.save(packed, tmp_path)
    loaded: Any = mpfx.load(tmp_path)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(loaded(**batches[0]).logits, packed(**batches[0]).logits)


def test_a_module_of_the_users_own(tmp_path: Path) -> None:
    from mpfx.graph import bind_inputs, trace
    from mpfx.passes import Allocate, LocateSites, Pack, PruneAndQuantize, run_passes

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 3, bias=False)).eval()

    model, x = build(), torch.randn(16, 40)
    gm = run_passes(trace(model, (x,)), [LocateSites()])
    solve = PruneAndQuantize([bind_inputs(gm, (x,), {})])
    run_passes(gm, [Allocate(CompressionConfig(code_bits=5, allocation="fixed"), {}), solve, Pack()])
    mpfx.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"build it and call mpfx\.load"):
        mpfx.load(tmp_path)
    loaded = mpfx.load(tmp_path, build())
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="Sequential lacks"):
        mpfx.load(tmp_path, nn.Sequential(nn.Linear(40, 64)))


def test_a_dense_model_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compress it first"):
        mpfx.save(llama, tmp_path)


def test_saving_again_replaces_and_the_manifest_comes_last(
    packed: Any, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpfx.save(packed, tmp_path)
    mpfx.save(packed, tmp_path)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mpfx.save(packed, tmp_path)
    assert not (tmp_path / "mpfx.json").exists()
    with pytest.raises(FileNotFoundError, match="did not finish"):
        mpfx.load(tmp_path)


def test_files_can_be_read_by_whom_the_umask_lets(packed: Any, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    mpfx.save(packed, tmp_path)
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "model.safetensors", "mpfx.json")}
    assert len(modes) == 1


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "mpfx.json").read_text())
    manifest.update(changes)
    (folder / "mpfx.json").write_text(json.dumps(manifest))


def test_damage_is_named(packed: Any, tmp_path: Path) -> None:
    def damaged(message: str, kind: type[Exception] = CheckpointError) -> None:
        with pytest.raises(kind, match=message):
            mpfx.load(tmp_path)
        mpfx.save(packed, tmp_path)

    mpfx.save(packed, tmp_path)
    edit(tmp_path, version=99)
    damaged("version 1 but got mpfx version 99")
    edit(tmp_path, sites={"model.layers.0.mlp.up_proj": {"in_features": -1}})
    damaged("lacks or misstates")
    (tmp_path / "mpfx.json").write_text("{")
    damaged("not a manifest")
    (tmp_path / "model.safetensors").unlink()
    damaged("holds no model.safetensors", FileNotFoundError)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(os.path.getsize(tmp_path / "model.safetensors") - 1000)
    damaged("is damaged")
    cases: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
        (
            "model.layers.1.mlp.up_proj.codes",
            lambda t: t[:-1],
            r"site model\.layers\.1\.mlp\.up_proj: Expected `codes`",
        ),
        ("model.layers.1.mlp.up_proj.widths", lambda t: t * 0 + 77, r"up_proj: Expected widths in 1\.\.8"),
        ("model.layers.1.mlp.up_proj.scales", lambda t: t[:, :-1].contiguous(), "up_proj: Expected `scales`"),
        ("permutation.0", torch.zeros_like, r"Expected `permutation\.0` to be a permutation"),
        ("model.norm.weight", lambda t: t[:-1], r"other shapes than the model: .*model\.norm\.weight"),
    ]
    for name, change, message in cases:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[name] = change(tensors[name].clone())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        damaged(message)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    damaged(r"lacks \['model\.norm\.weight'\]")


def test_a_failed_load_leaves_the_given_model_as_it_was(packed: Any, make_llama: Any, tmp_path: Path) -> None:
    mpfx.save(packed, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.codes"] = torch.zeros(1, 1, dtype=torch.int32)  # the last site
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fresh = make_llama()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match="down_proj"):
        mpfx.load(tmp_path, fresh)
    assert not any(isinstance(m, MixedPrecisionLinear) for m in fresh.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())

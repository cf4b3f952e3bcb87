"""Checkpoints read: bit for bit what was saved, and refused when damaged."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mpfx
from mpfx.callbacks import ModelCompression
from mpfx.hub import loading
from mpfx.hub.checkpoint import CheckpointError, tensor_bytes
from mpfx.lm import CausalLM
from mpfx.nn import CodedScales, Layout, MixedPrecisionLinear, QuantizedWeight, pack, stored_bytes
from mpfx.passes import CompressionConfig, Scope
from tests.hub.models import (
    CONFIG,
    Batches,
    Change,
    added,
    changed,
    edit,
    edit_weights,
    full,
    own,
    pack_linears,
    packed_linear,
    refused,
    without,
)


@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
@pytest.mark.parametrize("allocation", ["fixed", "quantile"])
def test_logits_are_bit_identical(
    language_model: Any, batches: Batches, validate: Any, tmp_path: Path, sparsity: Any, allocation: Any
) -> None:
    config = CompressionConfig(code_bits=4, allocation=allocation, sparsity=sparsity)
    validate(CausalLM(language_model), batches, ModelCompression(config, module="model"))
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_weights_that_are_left_out_as_a_whole(tmp_path: Path, masked: bool, coded: bool) -> None:
    layout = Layout(64, (0, 0), 32)
    weight = QuantizedWeight(
        codes=torch.zeros(8, 64, dtype=torch.int32),
        scales=CodedScales.of(torch.zeros(8, 0), torch.ones(8), torch.ones(0)) if coded else torch.ones(8, 0).half(),
        zeros=torch.zeros(8, 0, dtype=torch.uint8),
        kept=torch.zeros(8, 64, dtype=torch.bool) if masked else None,
        layout=layout,
    )
    bias = nn.Parameter(torch.randn(8))
    model = nn.Sequential(MixedPrecisionLinear(pack(weight), bias=bias)).eval()
    size = stored_bytes(layout, 8, symmetric=False, scale_bits=4 if coded else 16, kept=(0,) if masked else None)
    assert mpfx.save(model, tmp_path) == size.total + bias.nbytes
    loaded = mpfx.load(tmp_path, nn.Sequential(nn.Linear(64, 8)))
    assert torch.equal(loaded(torch.randn(3, 64)), bias.detach().expand(3, 8))


def test_tied_embeddings_stay_tied_and_are_stored_once(
    make_llama: Any, batches: Batches, validate: Any, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=True)
    validate(CausalLM(model), batches, ModelCompression(CONFIG, module="model"))
    mpfx.save(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded: Any = mpfx.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)


def test_a_compressed_head(llama: Any, batches: Batches, validate: Any, tmp_path: Path) -> None:
    config = CompressionConfig(code_bits=4, scope=Scope(head=True))
    validate(CausalLM(llama), batches, ModelCompression(config, module="model"))
    mpfx.save(llama, tmp_path)
    loaded: Any = mpfx.load(tmp_path)
    assert isinstance(loaded.lm_head, MixedPrecisionLinear)
    assert torch.equal(loaded(**batches[0]).logits, llama(**batches[0]).logits)


def test_half_precision_models(packed: Any, batches: Batches, tmp_path: Path) -> None:
    packed.to(torch.bfloat16)
    mpfx.save(packed, tmp_path)
    loaded: Any = mpfx.load(tmp_path)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(loaded(**batches[0]).logits, packed(**batches[0]).logits)


def test_a_module_of_the_users_own(tmp_path: Path) -> None:
    from mpfx.graph import bind_inputs, trace
    from mpfx.passes import Allocate, Pack, PruneAndQuantize, analysis, run_passes

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 3, bias=False)).eval()

    model, x = build(), torch.randn(16, 40)
    gm = run_passes(trace(model, (x,)), analysis())
    solve = PruneAndQuantize([bind_inputs(gm, (x,), {})])
    run_passes(gm, [Allocate(CompressionConfig(code_bits=5, allocation="fixed")), solve, Pack()])
    mpfx.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"build it and call mpfx\.load"):
        mpfx.load(tmp_path)
    loaded = mpfx.load(tmp_path, build())
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="Sequential lacks"):
        mpfx.load(tmp_path, nn.Sequential(nn.Linear(40, 64)))


TENSORS: list[tuple[str, Change, str]] = [
    (
        "widths 2-D",
        changed("q.widths", lambda t: t[None]),
        r"q: Expected `widths` to be uint8 of shape \[2\] .*\[1, 2\]",
    ),
    ("widths 0-D", changed("q.widths", lambda t: t[0]), r"Expected `widths` .* got uint8 \[\]"),
    ("widths dtype", changed("q.widths", lambda t: t.int()), "Expected `widths` to be uint8 .* got int32"),
    ("widths 77", changed("q.widths", full(77)), r"q: Expected widths in 0\.\.8"),
    ("widths 3", changed("q.widths", full(3)), "Expected `codes`"),
    ("no widths", without("q.widths"), "site q: `widths` is missing"),
    ("scales 0-D", changed("q.scales", lambda t: t[0, 0]), r"Expected `scales` to be float16 of shape \[32, any\]"),
    ("scales no rows", changed("q.scales", lambda t: t[:0]), "Expected `scales`"),
    ("scales columns", changed("q.scales", lambda t: t[:, :-1]), "Expected `scales`"),
    ("scales dtype", changed("q.scales", lambda t: t.float()), "Expected `scales` to be float16"),
    ("scales nan", changed("q.scales", full(float("nan"))), "site q: Expected `scales` to be finite and not negative"),
    ("scales inf", changed("q.scales", full(float("inf"))), "`scales` to be finite"),
    ("scales negative", changed("q.scales", torch.neg), "64 of 64 are negative"),
    ("no scales", without("q.scales"), "`scales` is missing"),
    ("coded scales", changed("k.scale_codes", lambda t: t[:-1]), "site k: Expected `scale_codes`"),
    ("coded scales dtype", changed("k.scale_codes", lambda t: t.half()), "k: Expected `scale_codes` to be int32"),
    ("coded scales 2-D", changed("k.scale_codes", lambda t: t[None]), r"`scale_codes` to be int32 of shape \[any\]"),
    ("no coded scales", without("k.scale_codes"), "site k: `scale_codes` is missing"),
    (
        "row scales",
        changed("k.row_scales", lambda t: t[:-1]),
        r"Expected `row_scales` to be float16 of shape \[16\]",
    ),
    ("row scales dtype", changed("k.row_scales", lambda t: t.float()), "Expected `row_scales` to be float16"),
    ("row scales nan", changed("k.row_scales", full(float("nan"))), "`row_scales` to be finite and not negative"),
    ("row scales negative", changed("k.row_scales", torch.neg), "16 of 16 are negative"),
    ("no row scales", without("k.row_scales"), "site k: `row_scales` is missing"),
    ("group scales", changed("k.group_scales", lambda t: t.repeat(2)), "site k: Expected `group_scales`"),
    ("group scales dtype", changed("k.group_scales", lambda t: t.int()), "Expected `group_scales` to be float16"),
    ("group scales inf", changed("k.group_scales", full(float("inf"))), "`group_scales` to be finite"),
    ("no group scales", without("k.group_scales"), "site k: `group_scales` is missing"),
    ("both scales", added("k.scales", torch.ones(16, 1).half()), "one kind of scales but got `scales` and"),
    ("kept of left out", changed("k.mask", lambda t: t | 1), "site k: Expected `mask` to keep nothing"),
    ("left out", changed("q.widths", full(0)), "site q: Expected `scales`"),
    ("codes", changed("q.codes", lambda t: t[:-1]), "site q: Expected `codes`"),
    ("codes 0-D", changed("q.codes", lambda t: t[0]), "Expected `codes`"),
    ("codes dtype", changed("q.codes", lambda t: t.float()), "Expected `codes` to be int32"),
    ("no codes", without("q.codes"), "`codes` is missing"),
    ("zeros", changed("q.zeros", lambda t: t[:-1]), "Expected `zeros`"),
    ("zeros 2-D", changed("q.zeros", lambda t: t[None]), "Expected `zeros`"),
    ("mask", changed("q.mask", lambda t: t[:, :-1]), "Expected `mask`"),
    ("mask bits", changed("q.mask", full(0)), "Expected `codes`"),
    ("no mask", without("q.mask"), "Expected `codes`"),
    ("bias shape", changed("q.bias", lambda t: t[:-1]), "Expected `bias`"),
    ("bias dtype", changed("q.bias", lambda t: t.int()), "Expected `bias` to be float16 or bfloat16"),
    ("no bias", without("q.bias"), "site q: the model has a bias where the file has none"),
    ("more bias", added("k.bias", torch.zeros(16)), "site k: the file has a bias where the model has none"),
    ("junk", added("q.junk", torch.zeros(1)), r"q\.junk, but below a packed site it may hold only codes"),
    ("dense weight", added("q.weight", torch.zeros(32, 64)), r"holds q\.weight"),
    ("deep junk", added("q.codes.codes", torch.zeros(1)), "below a packed site"),
    ("order in place", added("q.permutation", torch.arange(64)), "below a packed site"),
    (
        "order of zeros",
        changed("mpfx:permutation:0", torch.zeros_like),
        "Expected `mpfx:permutation:0` to be a permutation",
    ),
    ("order too large", changed("mpfx:permutation:0", lambda t: (t.int() + 1).to(t.dtype)), "each of 0 .. 63 once"),
    ("float order", changed("mpfx:permutation:0", lambda t: t.float()), "Expected `mpfx:permutation:0` .* got float32"),
    ("short order", changed("mpfx:permutation:0", lambda t: t[:-1]), r"of shape \[64\]"),
    ("order 2-D", changed("mpfx:permutation:0", lambda t: t[None]), r"of shape \[64\]"),
    ("no order", without("mpfx:permutation:0"), "`mpfx:permutation:0` is missing"),
    ("odd order", added("mpfx:permutation:x", torch.arange(64)), "which no site"),
    ("reserved", added("mpfx:other", torch.arange(64)), "names that begin with mpfx: must go on as"),
    (
        "norm shape",
        changed("inner.norm.weight", lambda t: t[:-1]),
        r"other shapes .*inner\.norm\.weight: float32 \[63\]",
    ),
    (
        "norm dtype",
        changed("inner.norm.weight", lambda t: t.int()),
        r"other dtypes .*norm\.weight: int32 \[64\] instead of f",
    ),
    ("counter dtype", changed("inner.bn.num_batches_tracked", lambda t: t.float()), "other dtypes"),
    ("no norm", without("inner.norm.weight"), r"lacks \['inner\.norm\.weight'\] of the model"),
    ("unknown", added("inner.other", torch.zeros(1)), r"holds \['inner\.other'\], unknown to the model"),
    ("no buffer", without("mpfx:buffer:table"), r"lacks \['mpfx:buffer:table'\]"),
    ("unknown buffer", added("mpfx:buffer:a.b", torch.zeros(1)), r"holds \['mpfx:buffer:a\.b'\], unknown"),
    ("buffer of a site", added("mpfx:buffer:q.codes", torch.zeros(1)), "unknown to the model"),
    ("buffer shape", changed("mpfx:buffer:table", lambda t: t[:1]), "other shapes"),
    ("buffer dtype", changed("mpfx:buffer:table", lambda t: t.bool()), "other dtypes"),
    ("stored tied", lambda t: t.update({"head.weight": t["embed.weight"].clone()}), "but model.safetensors holds head"),
]


@pytest.mark.parametrize("packed_already", [False, True])
def test_everything_of_a_users_module_comes_back(tmp_path: Path, packed_already: bool) -> None:
    model, x = own(), torch.randn(5, 64)
    stored = mpfx.save(model, tmp_path)
    other = own(packed_already)
    for tensor in (*other.parameters(), other.table):
        tensor.data.zero_()
    loaded: Any = mpfx.load(tmp_path, other)
    assert torch.equal(loaded(x), model(x))
    assert loaded.head.weight is loaded.embed.weight
    assert stored == tensor_bytes(model) == tensor_bytes(loaded)
    assert not list(load_file(tmp_path / "model.safetensors").keys() & {"head.weight", "q.permutation"})


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in TENSORS], ids=[c[0] for c in TENSORS])
def test_damaged_tensors_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    mpfx.save(own(), tmp_path)
    edit_weights(tmp_path, change)
    refused(tmp_path, message, own(packed=False).train())


@pytest.mark.parametrize("size", [0, 5, 100, -1000, -1])
def test_a_cut_weights_file_is_refused(tmp_path: Path, size: int) -> None:
    mpfx.save(own(), tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(size if size >= 0 else os.path.getsize(tmp_path / "model.safetensors") + size)
    refused(tmp_path, "is damaged", own(packed=False))


def test_a_dtype_that_no_checkpoint_holds_is_refused(tmp_path: Path) -> None:
    mpfx.save(own(), tmp_path)
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\1")
    refused(tmp_path, "expected a to be one of .* but got F8_E8M0", own(packed=False))


@pytest.mark.parametrize("name", ["mpfx.json", "model.safetensors"])
def test_a_lacking_file_is_named(tmp_path: Path, name: str) -> None:
    mpfx.save(own(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        mpfx.load(tmp_path, own(packed=False))


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (lambda: nn.Linear(64, 16), r"site q: expected the layer's sizes \(out, in\), \(16, 64\), but got \(32, 64\)"),
        (lambda: nn.Linear(32, 64), r"\(64, 32\), but got \(32, 64\)"),
        (lambda: packed_linear(16, 64), r"\(16, 64\), but got \(32, 64\)"),
        (lambda: nn.Sequential(nn.Linear(64, 32)), "expected a linear layer but the model has a Sequential"),
        (lambda: nn.LayerNorm(64), "expected a linear layer but the model has a LayerNorm"),
        (lambda: nn.Linear(64, 32, bias=False), "the file has a bias where the model has none"),
    ],
)
def test_a_site_must_be_a_linear_layer_of_its_sizes(
    tmp_path: Path, replacement: Callable[[], nn.Module], message: str
) -> None:
    mpfx.save(own(), tmp_path)
    model = own(packed=False)
    model.q = replacement()
    refused(tmp_path, message, model)


@pytest.mark.parametrize("name", ["model.layers.0", "model.norm", "model.layers.0.self_attn.k_proj", "model"])
def test_a_site_cannot_replace_another_kind_of_module(packed: Any, tmp_path: Path, name: str) -> None:
    mpfx.save(packed, tmp_path)
    source = "model.layers.0.self_attn.q_proj"

    def move(data: dict[str, Any]) -> None:
        for key in [key for key in data if key.startswith(f"{name}.")]:
            del data[key]
        data.update({key.replace(source, name): data[key] for key in list(data) if key.startswith(source)})

    def move_entry(manifest: dict[str, Any]) -> None:
        entry = {**manifest["sites"][source], "permutation": None}
        kept = {k: v for k, v in manifest["sites"].items() if not k.startswith(f"{name}.")}
        manifest["sites"] = {**kept, name: entry}

    tensors = load_file(tmp_path / "model.safetensors")
    copies = {key.replace(source, name): t.clone() for key, t in tensors.items() if key.startswith(f"{source}.")}
    left = {key: t for key, t in tensors.items() if not key.startswith(f"{name}.")}
    edit(tmp_path, move_entry)
    sites = json.loads((tmp_path / "mpfx.json").read_text())["sites"]
    used = {f"mpfx:permutation:{entry['permutation']}" for entry in sites.values()}
    left = {key: t for key, t in left.items() if not key.startswith("mpfx:permutation:") or key in used}
    save_file({**left, **copies}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"site {name}: expected (a linear layer|the layer's sizes)"):
        mpfx.load(tmp_path)


def test_a_packed_module_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    mpfx.save(own(), tmp_path)
    model = own(packed=False)
    model.head = packed_linear(8, 64, bias=False)
    refused(tmp_path, r"lacks sites that are packed in the given model: \['head'\]", model)
    model = own(packed=False)
    model.q = nn.Identity()
    del model.k
    refused(tmp_path, r"names sites that Own lacks: \['k'\]", model)


class Picky(nn.Linear):
    """A module with a rule of its own about what it loads."""

    def _load_from_state_dict(self, *_: Any) -> None:
        raise RuntimeError("not today")


def test_a_load_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpfx.save(own(), tmp_path)
    model = own(packed=False)
    model.head = Picky(64, 8, bias=False)
    model.head.weight = model.embed.weight
    refused(tmp_path, "does not fit the model: not today", model)


def test_the_files_are_checked_before_a_model_is_built(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpfx.save(packed, tmp_path)
    monkeypatch.setattr(loading, "_outline", lambda *_: pytest.fail("built"))
    edit_weights(tmp_path, added("model.layers.0.mlp.up_proj.junk", torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"up_proj\.junk"):
        mpfx.load(tmp_path)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"model_type": "nope"}', '{"model_type": "llama", "num_attention_heads": 0}']
)
def test_a_damaged_config_is_refused(packed: Any, tmp_path: Path, text: str | None) -> None:
    mpfx.save(packed, tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        mpfx.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_config_of_other_sizes_is_refused(packed: Any, tmp_path: Path) -> None:
    mpfx.save(packed, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(
        CheckpointError, match=r"expected the layer's sizes \(out, in\), \(64, 96\), but got \(64, 160\)"
    ):
        mpfx.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        mpfx.load(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 2**31}, "Expected `num_hidden_layers` to be at most"),
        ({"model_type": "gpt2", "n_layer": 2**31}, "Expected `n_layer` to be at most"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 2**31}}, "Expected `num_hidden_layers` to be"),
        (
            {"model_type": "gemma3", "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 2**31}},
            "Expected `num_hidden_layers` to be",
        ),
        ({"num_hidden_layers": 60}, "Expected a model of at most .* parameters"),
        ({"head_dim": 2**33}, "expected the layer's sizes"),
    ],
)
def test_a_config_of_hostile_sizes_allocates_nothing(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], message: str
) -> None:
    mpfx.save(pack_linears(llama), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    monkeypatch.setattr(loading, "_skeleton", lambda *_: pytest.fail("built"))
    with pytest.raises(CheckpointError, match=message):
        mpfx.load(tmp_path)


@pytest.mark.parametrize("child", ["buffer", "permutation", "0", "mpfx", "codes"])
def test_children_may_have_any_name(tmp_path: Path, child: str) -> None:
    def build(value: float) -> nn.Module:
        norm = nn.LayerNorm(64)
        nn.init.constant_(norm.weight, value)
        return nn.ModuleDict({"linear": packed_linear(8, 64), child: norm})

    mpfx.save(build(7), tmp_path)
    assert mpfx.load(tmp_path, build(1)).get_parameter(f"{child}.weight").eq(7).all()


@pytest.mark.parametrize("shared", ["module", "parent"])
def test_a_packed_module_under_two_paths(tmp_path: Path, shared: str) -> None:
    def build(linear: nn.Module) -> nn.Module:
        if shared == "module":
            return nn.Sequential(nn.Sequential(linear, nn.LayerNorm(64)), nn.Sequential(linear)).eval()
        block = nn.Sequential(linear, nn.LayerNorm(64))
        return nn.Sequential(block, block).eval()

    model, x = build(packed_linear(64, 64)), torch.randn(3, 64)
    mpfx.save(model, tmp_path)
    loaded: Any = mpfx.load(tmp_path, build(nn.Linear(64, 64)))
    assert loaded[1][0] is loaded[0][0]
    assert torch.equal(loaded(x), model(x))
    mpfx.save(nn.Sequential(nn.Sequential(packed_linear(64, 64)), nn.Sequential(packed_linear(64, 64))), tmp_path)
    linear = nn.Linear(64, 64)
    twins = nn.Sequential(nn.Sequential(linear), nn.Sequential(linear))
    refused(tmp_path, r"sites \['0\.0'\] are the same modules", twins)


def test_biases_shared_by_packed_modules(tmp_path: Path) -> None:
    model = nn.Sequential(packed_linear(64, 64), packed_linear(64, 64, seed=1))
    model[1].bias = model[0].bias
    stored = mpfx.save(model, tmp_path)
    loaded = mpfx.load(tmp_path, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))
    assert stored == tensor_bytes(model) == tensor_bytes(loaded)


def test_siblings_share_the_loaded_permutation(packed: Any, tmp_path: Path) -> None:
    mpfx.save(packed, tmp_path)
    loaded: Any = mpfx.load(tmp_path)
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.permutation is attention.v_proj.permutation


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

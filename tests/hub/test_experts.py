"""Checkpoints of models with packed experts."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mpfx
from mpfx.hub.checkpoint import packed_sites, tensor_bytes
from mpfx.nn import Layout, PackedWeight, QuantizedWeight, pack
from mpfx.nn.experts import PackedExperts, PackedStack
from tests.hub.models import (
    Change,
    added,
    changed,
    coded_scales,
    contents,
    edit,
    edit_weights,
    full,
    packed_linear,
    refused,
    top,
    without,
)


def packed_weight(rows: int, channels: int, seed: int, masked: bool, coded: bool) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    segments = -(-channels // 32)
    layout = Layout(channels, (3 + seed % 4,) * segments, 32)  # another width for every expert
    if coded and seed == 1:
        layout = Layout(channels, (0,) * segments, 32)
    shape = (rows, len(layout.grids))
    kept = torch.rand(rows, channels, generator=generator) < 0.6
    return pack(
        QuantizedWeight(
            codes=torch.randint(0, 8, (rows, channels), generator=generator).int(),
            scales=coded_scales(*shape, generator) if coded else torch.rand(shape, generator=generator).half() / 20,
            zeros=torch.randint(0, 8, shape, generator=generator).to(torch.uint8),
            kept=kept & bool(layout.grids) if masked else None,
            layout=layout,
        )
    )


def packed_stack(
    shape: torch.Size, transposed: bool, dtype: torch.dtype, masked: bool, coded: bool = False
) -> PackedStack:
    experts, rows, channels = shape if not transposed else (shape[0], shape[2], shape[1])
    weights = [packed_weight(rows, channels, seed, masked, coded) for seed in range(experts)]
    orders = [torch.randperm(channels, generator=torch.Generator().manual_seed(seed)) for seed in range(experts)]
    return PackedStack(weights, permutation=orders, dtype=dtype, transposed=transposed)


def pack_experts(model: nn.Module, transposed: bool = False, masked: bool = False, coded: bool = False) -> None:
    """Put packed experts in the place of every module with parameters ``(experts, ., .)``."""
    for path, module in list(model.named_modules()):
        found = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if found:
            stacks = {n: packed_stack(p.shape, transposed, p.dtype, masked, coded) for n, p in found.items()}
            model.set_submodule(path, PackedExperts(module, stacks))


def language_model(name: str, **overrides: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
        **{"num_key_value_heads": 2, "vocab_size": 96, "num_experts_per_tok": 2, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    sizes |= {"num_experts": 4, "moe_intermediate_size": 24} if name == "Qwen3Moe" else {"num_local_experts": 4}
    sizes |= {"rope_parameters": {}} if name == "GptOss" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **overrides)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def token_ids() -> Tensor:
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_models_of_transformers(tmp_path: Path, name: str, masked: bool, coded: bool) -> None:
    model, ids = language_model(name), token_ids()
    pack_experts(model, transposed=name == "GptOss", masked=masked, coded=coded)
    model.model.layers[0].self_attn.q_proj = packed_linear(32, 32, bias=name == "GptOss", coded=coded)
    before = model(ids).logits
    stored = mpfx.save(model, tmp_path)
    loaded: Any = mpfx.load(tmp_path)
    assert torch.equal(loaded(ids).logits, before)
    assert stored == tensor_bytes(model) == tensor_bytes(loaded)
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    assert json.loads((tmp_path / "mpfx.json").read_text())["version"] == 4


def test_the_sites_are_as_large_as_the_file(tmp_path: Path) -> None:
    model = language_model("Mixtral")
    pack_experts(model)
    mpfx.save(model, tmp_path)
    sites, tensors = dict(packed_sites(model)), load_file(tmp_path / "model.safetensors")
    assert set(sites) == {f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")}
    below = [t.nbytes for name, t in tensors.items() if name.startswith(tuple(f"{site}." for site in sites))]
    assert sum(
        site.packed.nbytes if not isinstance(site, PackedStack) else site.nbytes for site in sites.values()
    ) == sum(below)
    assert not [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]


def test_half_precision(tmp_path: Path) -> None:
    model = language_model("Mixtral").to(torch.bfloat16)
    pack_experts(model)
    mpfx.save(model, tmp_path)
    loaded: Any = mpfx.load(tmp_path)
    assert loaded.model.layers[0].mlp.experts.down_proj.weight_dtype == torch.bfloat16
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_models_without_experts_keep_their_version(tmp_path: Path) -> None:
    mpfx.save(nn.Sequential(packed_linear(8, 64)), tmp_path)
    manifest = json.loads((tmp_path / "mpfx.json").read_text())
    assert manifest["version"] == 3
    assert "experts" not in manifest


class Experts(nn.Module):
    """A user's own, with a bias and a child."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.up, self.gate = nn.Parameter(torch.full((3, 40, 64), fill)), nn.Parameter(torch.full((3, 40, 64), fill))
        self.down = nn.Parameter(torch.full((3, 64, 40), fill))
        self.bias, self.norm = nn.Parameter(torch.full((3, 40), fill)), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            (x @ self.up[e].t() + self.bias[e]) * (x @ self.gate[e].t()).sigmoid() @ self.down[e].t() for e in range(3)
        ]
        out: Tensor = self.norm(torch.stack(parts).sum(0))
        return out


def own(fill: float = 0.5, packed: bool = False, twice: bool = False) -> Any:
    experts: nn.Module = Experts(fill)
    model = nn.ModuleDict({"a": nn.Sequential(experts), "b": nn.Sequential(experts if twice else Experts(fill))})
    if packed:
        for name in ("a", "b") if not twice else ("a",):
            holder: Any = model[name]
            stacks = {
                n: packed_stack(p.shape, False, p.dtype, True, coded=n == "gate")
                for n, p in holder[0].named_parameters()
                if p.dim() == 3
            }
            stacks["gate"].permutation = stacks["up"].permutation
            holder[0] = PackedExperts(holder[0], stacks)
        if twice:
            model["b"][0] = model["a"][0]  # type: ignore[index, operator]
    return model.eval()


def run(model: Any) -> Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    result: Tensor = model["b"](model["a"](x))
    return result


@pytest.mark.parametrize("packed_already", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_a_users_module_comes_back(tmp_path: Path, packed_already: bool, twice: bool) -> None:
    model = own(packed=True, twice=twice)
    stored = mpfx.save(model, tmp_path)
    target = own(0.1, packed=packed_already, twice=twice)
    if packed_already:
        target["a"][0].up.codes.zero_()
    loaded: Any = mpfx.load(tmp_path, target)
    assert torch.equal(run(loaded), run(model))
    assert stored == tensor_bytes(model) == tensor_bytes(loaded)
    assert (loaded["a"][0] is loaded["b"][0]) == twice


def test_a_permutation_is_stored_and_loaded_once(tmp_path: Path) -> None:
    mpfx.save(own(packed=True), tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("mpfx:permutation:")]
    assert len(names) == 2  # of 64 channels and of 40
    loaded: Any = mpfx.load(tmp_path, own())
    assert loaded["a"][0].up.permutation is loaded["b"][0].gate.permutation


def stack_field(name: str, value: Any) -> Change:
    return lambda manifest: manifest["experts"]["a.0.up"].update({name: value})


def renamed(name: str) -> Change:
    return lambda manifest: manifest["experts"].update({name: manifest["experts"].pop("a.0.up")})


def in_both(manifest: dict[str, Any]) -> None:
    entry = {"in_features": 64, "out_features": 40, "group_size": 32, "dtype": "float32", "permutation": None}
    manifest["sites"]["a.0.up"] = entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (top(version=3), r"\['experts'\] are unknown"),
        (top(version=5), "version 3 or 4 but got 'mpfx' version 5"),
        (without("experts"), r"\['experts'\] are lacking"),
        (top(experts={}), "expected `experts` to be an object with an entry per packed parameter"),
        (top(experts=[]), "expected `experts`"),
        (renamed("up"), "expected `experts` to be an object"),
        (renamed("nope.up"), r"experts nope\.up: `codes` is missing"),
        (
            lambda m: m["experts"].update({"a.0.up": 3}),
            r"experts a\.0\.up: expected the entry to be an object but got 3",
        ),
        (stack_field("experts", 0), "expected `experts` to be a positive integer but got 0"),
        (stack_field("experts", 10**30), r"experts a\.0\.up: Expected `mask` to be int32"),
        (stack_field("experts", 2), r"Expected `mask` to be int32 of shape \[2, 2, 40\]"),
        (stack_field("in_features", 10**30), "Expected `mask` to be int32"),
        (stack_field("out_features", 41), "Expected `mask` to be int32"),
        (stack_field("group_size", 48), "multiple of 32 but got 48"),
        (stack_field("group_size", 64), r"site a\.0\.up: Expected `scales` of shape"),
        (stack_field("dtype", "int8"), "expected `dtype` to be one of"),
        (stack_field("transposed", 1), "expected `transposed` to be true or false but got 1"),
        (stack_field("transposed", True), r"expected the parameter's shape, \(3, 40, 64\), but got \(3, 64, 40\)"),
        (stack_field("permutation", 1), r"Expected `mpfx:permutation:1` .* of shape \[3, 64\]"),
        (stack_field("permutation", 7), "`mpfx:permutation:7` is missing"),
        (stack_field("more", 7), r"\['more'\] are unknown"),
        (in_both, r"expected \['a\.0\.up'\] in one of `sites` and `experts`"),
        (lambda m: m["tied"].update({"a.0.up": "a.0.bias"}), "outside the packed sites"),
        (lambda m: m["tied"].update({"a.0.up.codes": "a.0.bias"}), "outside the packed sites"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    mpfx.save(own(packed=True), tmp_path)
    edit(tmp_path, change)
    refused(tmp_path, message, own().train())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("a.0.up.codes", lambda t: t[:-1]), r"site a\.0\.up: Expected `codes` of shape"),
        (changed("a.0.up.codes", lambda t: t[None]), r"Expected `codes` to be int32 of shape \[any\]"),
        (changed("a.0.up.codes", lambda t: t.float()), "Expected `codes` to be int32"),
        (without("a.0.up.codes"), r"experts a\.0\.up: `codes` is missing"),
        (changed("a.0.up.scales", lambda t: t[:-1]), "Expected `scales` of shape"),
        (changed("a.0.up.scales", full(float("nan"))), r"site a\.0\.up: expert 0: Expected `scales` to be finite"),
        (changed("a.0.gate.scale_codes", lambda t: t[:-1]), "Expected `scale_codes` of shape"),
        (without("a.0.gate.scale_codes"), r"experts a\.0\.gate: `scale_codes` is missing"),
        (changed("a.0.gate.row_scales", lambda t: t[:, 1:]), r"Expected `row_scales` to be float16 of shape \[3, 40\]"),
        (changed("a.0.gate.row_scales", torch.neg), r"site a\.0\.gate: expert 0: Expected `row_scales` to be finite"),
        (changed("a.0.gate.group_scales", lambda t: t[:-1]), "Expected `group_scales` of shape"),
        (changed("a.0.gate.group_scales", lambda t: t.float()), "Expected `group_scales` to be float16"),
        (changed("a.0.gate.mask", full(-1)), "expert 1: Expected `mask` to keep nothing"),
        (added("a.0.gate.scales", torch.ones(40).half()), "one kind of scales"),
        (changed("a.0.up.zeros", lambda t: t[:-1]), "Expected `zeros` of shape"),
        (changed("a.0.up.mask", lambda t: t[:2]), r"Expected `mask` to be int32 of shape \[3, 2, 40\]"),
        (changed("a.0.up.mask", full(0)), "Expected `codes` of shape"),
        (without("a.0.up.mask"), "Expected `codes` of shape"),
        (changed("a.0.up.widths", full(77)), "Expected widths in 0"),
        (changed("a.0.up.widths", lambda t: t[0]), r"Expected `widths` to be uint8 of shape \[3, 2\]"),
        (added("a.0.up.bias", torch.zeros(40)), r"a\.0\.up\.bias, but below a packed site"),
        (added("a.0.up.junk", torch.zeros(40)), r"a\.0\.up\.junk, but below a packed site"),
        (added("a.0.up", torch.zeros(3, 40, 64)), r"holds a\.0\.up, but mpfx\.json says that it is packed"),
        (changed("mpfx:permutation:0", lambda t: t[0]), r"Expected `mpfx:permutation:0` .* of shape \[3, 64\]"),
        (changed("mpfx:permutation:0", torch.zeros_like), "`mpfx:permutation:0` to be a permutation"),
        (changed("a.0.bias", lambda t: t[:-1]), r"other shapes .*a\.0\.bias"),
        (without("a.0.bias"), r"lacks \['a\.0\.bias'\]"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    mpfx.save(own(packed=True), tmp_path)
    edit_weights(tmp_path, change)
    refused(tmp_path, message, own().train())


def replaced(module: nn.Module) -> Callable[[Any], None]:
    return lambda model: model["a"].__setitem__(0, module)


def rename_parameter(model: Any) -> None:
    model["a"][0].other = model["a"][0].up
    del model["a"][0].up


def replace_forward(model: Any) -> None:
    model["a"][0].forward = model["a"][0].forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(nn.LayerNorm(64)), r"experts a\.0\.\w+: expected a parameter but LayerNorm has none"),
        (rename_parameter, r"a\.0\.up: expected a parameter but Experts has none of that name"),
        (replace_forward, r"experts a\.0: Expected Experts to run the forward of its class"),
        (lambda model: model.pop("a"), r"ModuleDict lacks: \['a\.0'\]"),
        (lambda model: model["b"].append(packed_linear(64, 64)), r"packed in the given model: \['b\.1'\]"),
        (lambda model: model["b"].__setitem__(0, model["a"][0]), r"are the same modules as other sites"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    mpfx.save(own(packed=True), tmp_path)
    model = own()
    change(model)
    refused(tmp_path, message, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["a"][0].up.scales.fill_(float("nan")),
            r"site a\.0\.up cannot be saved: expert 0: Expected `scales`",
        ),
        (lambda m: m["a"][0].up.permutation.zero_(), r"site a\.0\.up cannot be saved: Expected `permutation`"),
        (lambda m: m["a"][0].up.register_buffer("junk", torch.zeros(1)), r"a\.0\.up\.junk"),
        (
            lambda m: m["a"].append(copy.deepcopy(m["a"][0].up)),
            r"packed experts inside of PackedExperts but a\.1 is in Sequential",
        ),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    mpfx.save(own(packed=True), tmp_path)
    before, model = contents(tmp_path), own(packed=True)
    change(model)
    with pytest.raises(ValueError, match=message):
        mpfx.save(model, tmp_path)
    assert contents(tmp_path) == before


def test_experts_alone_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrap it in a model"):
        mpfx.save(own(packed=True)["a"][0], tmp_path)

"""Checkpoints: bit for bit, as small as they say, and refused when damaged."""

import json
import os
import stat
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpfx
from mpfx.callbacks import ModelCompression
from mpfx.hub import loading, saving
from mpfx.hub.checkpoint import CheckpointError, tensor_bytes
from mpfx.lm import CausalLM
from mpfx.nn import Layout, MixedPrecisionLinear, QuantizedWeight, pack, pack_permutation
from mpfx.passes import CompressionConfig

Batches = list[dict[str, Tensor]]
CONFIG = CompressionConfig(code_bits=4, allocation="quantile")


@pytest.fixture
def packed(llama: Any, batches: Batches, validate: Any) -> Any:
    validate(CausalLM(llama), batches, ModelCompression(CONFIG, module="model"))
    return llama


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


def test_the_file_is_as_large_as_it_says(make_llama: Any, batches: Batches, validate: Any, tmp_path: Path) -> None:
    model = make_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    validate(CausalLM(model), batches[:1], ModelCompression(CONFIG, module="model"))
    stored = mpfx.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(stored, rel=0.01)


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


def test_siblings_share_one_permutation(packed: Any, tmp_path: Path) -> None:
    mpfx.save(packed, tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("mpfx:permutation:")]
    assert len(names) == 3 * 4  # one per input group: q/k/v, o, gate/up, down
    entries = json.loads((tmp_path / "mpfx.json").read_text())["sites"]
    attention = [entries[f"model.layers.0.self_attn.{n}_proj"]["permutation"] for n in "qkv"]
    assert len(set(attention)) == 1


def test_a_compressed_head(llama: Any, batches: Batches, validate: Any, tmp_path: Path) -> None:
    config = CompressionConfig(code_bits=4, compress_head=True)
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


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_saving_again_replaces(packed: Any, tmp_path: Path) -> None:
    mpfx.save(packed, tmp_path, extra={"run": 1})
    packed.generation_config = None
    packed.model.norm.weight.data.fill_(7)
    mpfx.save(packed, tmp_path, extra={"run": 2})
    assert not list(tmp_path.glob(".*"))
    assert json.loads((tmp_path / "mpfx.json").read_text())["extra"] == {"run": 2}
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].eq(7).all()
    assert not (tmp_path / "generation_config.json").exists()
    again: Any = mpfx.load(tmp_path)
    mpfx.save(again, tmp_path)  # its tensors are parts of the file that is replaced
    assert torch.equal(mpfx.load(tmp_path).state_dict()["lm_head.weight"], packed.lm_head.weight)


@pytest.mark.parametrize("error", [disk_full, KeyboardInterrupt], ids=["disk", "interrupt"])
@pytest.mark.parametrize("fails", ["save_file", "_flush", "config", "tokenizer", "manifest"])
def test_a_failed_save_leaves_the_earlier_checkpoint_whole(
    packed: Any, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, error: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        disk_full()

    mpfx.save(packed, tmp_path)
    before, logits = contents(tmp_path), packed(**batches[0]).logits
    packed.model.norm.weight.data.fill_(7)
    packed.config.rms_norm_eps = 0.5
    tokenizer = SimpleNamespace(save_pretrained=fail if fails == "tokenizer" else lambda folder: None)
    if fails == "config":
        monkeypatch.setattr(type(packed.config), "save_pretrained", fail)
    elif fails == "manifest":
        monkeypatch.setattr(Path, "write_text", fail)
    elif fails != "tokenizer":
        monkeypatch.setattr(saving, fails, fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        mpfx.save(packed, tmp_path, tokenizer=tokenizer)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)
    loaded: Any = mpfx.load(tmp_path)
    assert torch.equal(loaded(**batches[0]).logits, logits)


@pytest.mark.parametrize("refused", ["model.safetensors", "config.json", "mpfx.json"])
def test_between_two_checkpoints_no_manifest_says_whole(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    mpfx.save(packed, tmp_path)
    before = contents(tmp_path)
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name == refused and self.parent != tmp_path:
            raise PermissionError(13, "in use", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError):
        mpfx.save(packed, tmp_path)
    assert not list(tmp_path.glob(".*"))
    if refused == "model.safetensors":  # the first to be replaced
        assert contents(tmp_path) == before
    else:
        with pytest.raises(FileNotFoundError, match="did not finish"):
            mpfx.load(tmp_path)


def test_what_is_written_is_on_the_disk(packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(saving, "_flush", lambda file: flushed.append(file.name))
    monkeypatch.setattr(saving, "_flush_folder", lambda folder: flushed.append("folder"))
    mpfx.save(packed, tmp_path)
    assert {"model.safetensors", "config.json", "mpfx.json"} <= set(flushed)
    assert flushed[0] == "model.safetensors"
    assert flushed[-1] == "folder"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_of_the_users_is_not_replaced(packed: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {name} without mpfx\.json"):
        mpfx.save(packed, tmp_path)
    assert contents(tmp_path) == {name: b"mine"}
    (tmp_path / name).rename(tmp_path / "README.md")
    mpfx.save(packed, tmp_path)  # other files do not matter


def test_files_can_be_read_by_whom_the_umask_lets(packed: Any, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    mpfx.save(packed, tmp_path)
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "model.safetensors", "mpfx.json")}
    assert len(modes) == 1


Change = Callable[[dict[str, Any]], Any]


def edit(folder: Path, change: Change) -> None:
    manifest = json.loads((folder / "mpfx.json").read_text())
    change(manifest)
    (folder / "mpfx.json").write_text(json.dumps(manifest))


def edit_weights(folder: Path, change: Change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def packed_linear(rows: int, channels: int, *, bias: bool = True, seed: int = 0) -> MixedPrecisionLinear:
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(channels, (4,) * -(-channels // 32), 32)
    groups = len(layout.groups)
    weight = QuantizedWeight(
        codes=torch.randint(0, 16, (rows, channels), generator=generator).int(),
        scales=torch.rand(rows, groups, generator=generator).half() + 0.5,
        zeros=torch.randint(0, 16, (rows, groups), generator=generator).to(torch.uint8),
        kept=torch.rand(rows, channels, generator=generator) < 0.5,
        layout=layout,
    )
    order = pack_permutation(torch.randperm(channels, generator=generator))
    parameter = nn.Parameter(torch.randn(rows, generator=generator)) if bias else None
    return MixedPrecisionLinear(pack(weight), permutation=order, bias=parameter)


class Own(nn.Module):
    """A user's module with something of every kind, packed or still dense."""

    table: Tensor

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.q = packed_linear(32, 64) if packed else nn.Linear(64, 32)
        self.k = packed_linear(16, 64, bias=False) if packed else nn.Linear(64, 16, bias=False)
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(64), "bn": nn.BatchNorm1d(64)})
        self.embed, self.head = nn.Embedding(8, 64), nn.Linear(64, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.full((3,), 5.0 if packed else 0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["bn"](self.inner["norm"](x))
        return torch.cat([self.q(x), self.k(x), self.head(x) * self.table.sum()], -1)


def own(packed: bool = True) -> Any:
    torch.manual_seed(packed)
    return Own(packed).eval()


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def added(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def field(name: str, value: Any) -> Change:
    return lambda manifest: manifest["sites"]["q"].update({name: value})


def top(**changes: Any) -> Change:
    return lambda manifest: manifest.update(changes)


def tie(name: str, original: Any) -> Change:
    return lambda manifest: manifest["tied"].update({name: original})


def site(name: str, like: str) -> Change:
    return lambda manifest: manifest["sites"].update({name: {**manifest["sites"][like], "permutation": None}})


def without(name: str) -> Change:
    return lambda data: data.pop(name)


def full(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)


MANIFESTS: list[tuple[str, Change, str]] = [
    ("other format", top(format="gguf"), "to be 'mpfx' version 1 but got 'gguf' version 1"),
    ("other version", top(version=99), "version 1 but got 'mpfx' version 99"),
    ("true version", top(version=True), "version 1 but got 'mpfx' version True"),
    ("list version", top(version=[1]), r"version \[1\]"),
    ("no format", without("format"), "not a manifest of mpfx: expected an object with `format`"),
    ("other segment", top(segment=64), "expected `segment` to be 32 but got 64"),
    ("float segment", top(segment=32.0), r"expected `segment` to be 32 but got 32\.0"),
    ("no sites", without("sites"), r"\['sites'\] are lacking"),
    ("list of sites", top(sites=[]), r"expected `sites` to be an object .* but got \[\]"),
    ("empty sites", top(sites={}), r"expected `sites` to be an object with an entry"),
    ("root site", lambda m: m["sites"].update({"": m["sites"]["q"]}), "expected `sites`"),
    ("list entry", lambda m: m["sites"].update(q=[]), r"entry of site q to be an object but got \[\]"),
    ("tied is null", top(tied=None), "expected `tied` to be an object"),
    ("tied to numbers", tie("head.weight", 3), "expected `tied` to be an object that maps"),
    ("tied to a list", tie("head.weight", ["embed.weight"]), "expected `tied`"),
    ("other library", top(library="numpy"), "expected `library` to be 'transformers' or absent"),
    ("library number", top(library={}), "expected `library`"),
    ("extra text", top(extra="x"), "expected `extra` to be an object"),
    ("unknown field", top(more=1), r"\['more'\] are unknown"),
    ("lacking field", lambda m: m["sites"]["q"].pop("dtype"), r"site q: expected the fields .*\['dtype'\] are lacking"),
    ("odd field", field("rotation", 1), r"site q: .*\['rotation'\] are unknown"),
    ("bool size", field("in_features", True), "site q: expected `in_features` to be a positive integer but got True"),
    ("zero size", field("out_features", 0), "expected `out_features` to be a positive integer but got 0"),
    ("float size", field("out_features", 32.0), "expected `out_features`"),
    ("huge size", field("in_features", 10**30), "Expected `mask` to be int32"),
    ("bool group", field("group_size", True), "expected `group_size` to be null or a positive multiple of 32"),
    ("odd group", field("group_size", 48), "multiple of 32 but got 48"),
    ("zero group", field("group_size", 0), "multiple of 32 but got 0"),
    ("other group", field("group_size", 64), "Expected `scales` to be .*float16 of shape"),
    (
        "int8",
        field("dtype", "int8"),
        "expected `dtype` to be one of float16, bfloat16, float32, float64 but got 'int8'",
    ),
    ("complex", field("dtype", "complex64"), "expected `dtype`"),
    ("dtype list", field("dtype", ["float32"]), "expected `dtype`"),
    ("dtype of torch", field("dtype", "nn"), "expected `dtype`"),
    ("bool order", field("permutation", False), "expected `permutation` to be null or an integer"),
    ("negative order", field("permutation", -1), "expected `permutation`"),
    ("lacking order", field("permutation", 7), r"site q: `mpfx:permutation:7` is missing"),
    ("unused order", field("permutation", None), r"holds \['mpfx:permutation:0'\], which no site"),
    ("unknown site", site("nope", "k"), r"site nope: `codes` is missing"),
    ("tied to nothing", tie("inner.norm.weight", "nope"), "inner.norm.weight -> nope: expected a tensor that is not"),
    ("tied to lacking", tie("head.weight", "nope"), "lacks nope"),
    ("tied to itself", tie("embed.weight", "embed.weight"), "expected a tensor that is not stored"),
    ("tied to tied", tie("table", "head.weight"), "lacks head.weight"),
    ("tied inside", tie("q.zeros", "embed.weight"), "outside the packed sites"),
    ("tied deep inside", tie("q.a.b.c", "embed.weight"), "outside the packed sites"),
    ("tied to inside", tie("head.weight", "q.bias"), "outside the packed sites"),
    ("tied to an order", tie("head.weight", "mpfx:permutation:0"), "outside the packed sites"),
    ("tied unknown", tie("nope.weight", "embed.weight"), r"holds \['nope\.weight'\], unknown to the model"),
    ("tied other shape", tie("head.weight", "inner.norm.weight"), r"other shapes than the model: \['head\.weight"),
]

TENSORS: list[tuple[str, Change, str]] = [
    (
        "widths 2-D",
        changed("q.widths", lambda t: t[None]),
        r"q: Expected `widths` to be uint8 of shape \[2\] .*\[1, 2\]",
    ),
    ("widths 0-D", changed("q.widths", lambda t: t[0]), r"Expected `widths` .* got uint8 \[\]"),
    ("widths dtype", changed("q.widths", lambda t: t.int()), "Expected `widths` to be uint8 .* got int32"),
    ("widths 77", changed("q.widths", full(77)), r"q: Expected widths in 1\.\.8"),
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


def refused(folder: Path, message: str, model: nn.Module) -> None:
    """Loading names the folder, and what is wrong; the model stays as it is."""
    before = {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    modules, training = dict(model.named_modules()), model.training
    with pytest.raises(CheckpointError, match=message) as caught:
        mpfx.load(folder, model)
    assert str(folder) in str(caught.value)
    after = {name: (id(t), t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert dict(model.named_modules()) == modules
    assert model.training == training
    assert all(after[name][0] == known and torch.equal(after[name][1], t) for name, (known, t) in before.items())


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


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in MANIFESTS], ids=[c[0] for c in MANIFESTS])
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    mpfx.save(own(), tmp_path)
    edit(tmp_path, change)
    refused(tmp_path, message, own(packed=False).train())


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in TENSORS], ids=[c[0] for c in TENSORS])
def test_damaged_tensors_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    mpfx.save(own(), tmp_path)
    edit_weights(tmp_path, change)
    refused(tmp_path, message, own(packed=False).train())


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "not a manifest"), (b"\xff\xfe", "not a manifest"), (b"[1]", "not a manifest"), (b"", "not a manifest")],
)
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    mpfx.save(own(), tmp_path)
    (tmp_path / "mpfx.json").write_bytes(text)
    refused(tmp_path, message, own(packed=False))


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
    monkeypatch.setattr(loading, "_skeleton", lambda *_: pytest.fail("built"))
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


@pytest.mark.parametrize("child", ["buffer", "permutation", "0", "mpfx", "codes"])
def test_children_may_have_any_name(tmp_path: Path, child: str) -> None:
    def build(value: float) -> nn.Module:
        norm = nn.LayerNorm(64)
        nn.init.constant_(norm.weight, value)
        return nn.ModuleDict({"linear": packed_linear(8, 64), child: norm})

    mpfx.save(build(7), tmp_path)
    assert mpfx.load(tmp_path, build(1)).get_parameter(f"{child}.weight").eq(7).all()


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(64), lambda: packed_linear(8, 64)])
def test_reserved_names_are_refused(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"linear": packed_linear(8, 64), "mpfx:buffer:x": make()})
    with pytest.raises(ValueError, match="no name that begins with mpfx: but got mpfx:buffer:x"):
        mpfx.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def views(base: Tensor) -> dict[str, Tensor]:
    """Tensors over one memory, of which only the last two are the same."""
    parts = {"square": base, "transposed": base.t(), "first": base[0], "second": base[1], "rows": base[:2]}
    return {**parts, "integers": base.view(torch.int32), "again": base, "third": base[:2]}


def test_only_what_is_the_same_is_tied(tmp_path: Path) -> None:
    def build(base: Tensor) -> nn.Module:
        model = nn.Module()
        model.linear = packed_linear(8, 64)
        for name, tensor in views(base).items():
            setattr(model, name, nn.Parameter(tensor, requires_grad=False))
        return model

    model = build(torch.arange(16.0).view(4, 4))
    mpfx.save(model, tmp_path)
    assert json.loads((tmp_path / "mpfx.json").read_text())["tied"] == {"again": "square", "third": "rows"}
    loaded: Any = mpfx.load(tmp_path, build(torch.zeros(4, 4)))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert loaded.again is loaded.square
    assert loaded.first.data_ptr() != loaded.square.data_ptr()


def test_shared_buffers_are_stored_once(tmp_path: Path) -> None:
    def build(value: float) -> nn.Module:
        table = torch.full((3,), value)
        model = nn.ModuleDict({"linear": packed_linear(8, 64), "a": nn.Module(), "b": nn.Module(), "c": nn.Module()})
        for name in "abc":
            model[name].register_buffer("table", table, persistent=name == "c")
        return model

    mpfx.save(build(7.0), tmp_path)
    assert len([n for n in load_file(tmp_path / "model.safetensors") if "table" in n]) == 1
    loaded = mpfx.load(tmp_path, build(1.0))
    assert all(loaded.get_buffer(f"{name}.table").eq(7).all() for name in "abc")


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


def broken(change: Callable[[Any], Any]) -> Any:
    model = own()
    change(model)
    return model


class WithState(nn.Module):
    def get_extra_state(self) -> Any:
        return {"a": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.q.scales.fill_(float("nan")), "site q cannot be saved: Expected `scales`"),
        (lambda m: m.q.permutation.zero_(), "site q cannot be saved: Expected `permutation`"),
        (lambda m: m.q.register_buffer("permutation", torch.arange(64.0)), "mpfx:permutation:0` to be uint8 or"),
        (lambda m: m.q.register_buffer("codes", m.q.codes[:1]), "site q cannot be saved: Expected `codes`"),
        (lambda m: m.q.to(torch.complex64), "dtype"),
        (lambda m: m.q.register_buffer("junk", torch.zeros(1)), r"q\.junk"),
        (lambda m: m.inner.to("meta"), r"inner\.norm\.weight is torch\.strided on meta"),
        (lambda m: m.register_buffer("s", torch.eye(3).to_sparse()), r"s is torch\.sparse_coo"),
        (lambda m: m.register_buffer("c", torch.zeros(3, dtype=torch.complex128)), "but got torch.complex128"),
        (lambda m: m.add_module("state", WithState()), r"state\._extra_state is dict"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    mpfx.save(own(), tmp_path)
    before = contents(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of complex modules
        model = broken(change)
    with pytest.raises(ValueError, match=message):
        mpfx.save(model, tmp_path)
    assert contents(tmp_path) == before


def test_arguments_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`extra` to be plain data"):
        mpfx.save(own(), tmp_path / "a", extra={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="a packed module itself"):
        mpfx.save(packed_linear(8, 64), tmp_path / "b")
    assert not list(tmp_path.iterdir())


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

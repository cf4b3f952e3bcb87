"""Checkpoints written: as small as they say, whole or not at all, and nothing that could not be loaded."""

import json
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mpfx
from mpfx.callbacks import ModelCompression
from mpfx.hub import saving
from mpfx.lm import CausalLM
from tests.hub.models import (
    CONFIG,
    Batches,
    contents,
    own,
    packed_linear,
)


def test_the_file_is_as_large_as_it_says(make_llama: Any, batches: Batches, validate: Any, tmp_path: Path) -> None:
    model = make_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    validate(CausalLM(model), batches[:1], ModelCompression(CONFIG, module="model"))
    stored = mpfx.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(stored, rel=0.01)


def test_siblings_share_one_permutation(packed: Any, tmp_path: Path) -> None:
    mpfx.save(packed, tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("mpfx:permutation:")]
    assert len(names) == 3 * 2  # one per input group that a norm feeds: q/k/v, gate/up
    entries = json.loads((tmp_path / "mpfx.json").read_text())["sites"]
    attention = [entries[f"model.layers.0.self_attn.{n}_proj"]["permutation"] for n in "qkv"]
    assert len(set(attention)) == 1


def test_a_dense_model_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compress it first"):
        mpfx.save(llama, tmp_path)


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


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
    elif refused == "mpfx.json":  # the last, after a config that says the same
        assert contents(tmp_path) == {name: content for name, content in before.items() if name != refused}
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
        (lambda m: m.k.row_scales.fill_(float("nan")), "site k cannot be saved: Expected `row_scales`"),
        (lambda m: m.k.group_scales.neg_(), "site k cannot be saved: Expected `group_scales`"),
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

"""What all formats have in common: where models come from, and where files go."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import mpfx
from mpfx.callbacks import ModelCompression
from mpfx.cli import main
from mpfx.hub import export as module
from mpfx.hub.export import export
from mpfx.lm import CausalLM
from mpfx.passes import CompressionConfig
from tests.conftest import build_llama
from tests.hub.exports import byte_level_tokenizer, logits, pack_all, relative_error, tiny
from tests.hub.models import Batches, own

UNIFORM: dict[str, Any] = {"order": "natural", "bits_per_weight": 5.0}


@pytest.fixture
def compressed(batches: Batches, validate: Any) -> Any:
    """A model whose channels are where they were, each site with a width of its own."""
    from mpfx.allocate import OptimalConfig

    model = build_llama(vocab_size=300)
    config = CompressionConfig(**UNIFORM, optimal=OptimalConfig(uniform=True, widths=(4,)))
    validate(CausalLM(model), batches, ModelCompression(config, module="model"))
    return model


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_the_command_line_exports_what_the_settings_make_exportable(
    compressed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors")
    mpfx.save(compressed, tmp_path / "packed", tokenizer=byte_level_tokenizer())
    targets = {"gguf": tmp_path / "deep" / "model.gguf", "compressed-tensors": tmp_path / "dense"}
    for name, target in targets.items():
        assert main(["export", str(tmp_path / "packed"), "--format", name, "--output", str(target)]) == 0
        assert "stored bits per weight" in capsys.readouterr().out
    by_gguf = AutoModelForCausalLM.from_pretrained(tmp_path / "deep", gguf_file="model.gguf")
    by_library = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert relative_error(logits(by_gguf), logits(compressed)) < 3e-3
    assert torch.equal(logits(by_library), logits(compressed))
    again = ["export", str(tmp_path / "packed"), "--format", "gguf", "--output", str(targets["gguf"])]
    assert main(again) == 2
    assert "exists" in capsys.readouterr().err


def test_the_command_line_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mpfx.save(pack_all(tiny()), tmp_path / "packed")
    arguments = ["--format", "compressed-tensors", "--output", str(tmp_path / "out"), "--json"]
    assert main(["export", str(tmp_path / "packed"), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(tmp_path / "out")
    assert found["bits_per_weight"] == pytest.approx(5.13, abs=0.1)  # float32 scales for groups of 32


def test_a_default_plan_is_refused_with_the_settings(
    packed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mpfx.save(packed, tmp_path / "packed", tokenizer=byte_level_tokenizer())
    arguments = ["--format", "compressed-tensors", "--output", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "packed"), *arguments]) == 2
    assert "--order natural --optimal.uniform true" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "target", "name", "message"),
    [
        ("nothing", "out", "compressed-tensors", "folder of an mpfx checkpoint but got"),
        ("nothing", "out", "gptq", "`format` to be one of"),
        ("nothing", "out", "gguf", "ends in .gguf"),
        (own, "out", "compressed-tensors", "model of transformers but got Own"),
        (tiny, "out", "compressed-tensors", "quantized layers but found none"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, source: Any, target: str, name: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(source() if callable(source) else tmp_path / source, tmp_path / target, name)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = pack_all(tiny())

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.config), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        export(model, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled_and_another_is_not_touched(tmp_path: Path) -> None:
    model = pack_all(tiny())
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out", "compressed-tensors")
    (tmp_path / "plain").touch()
    files = [tmp_path / "plain", *(tmp_path / "out").iterdir()]
    assert len({stat.S_IMODE(file.stat().st_mode) for file in files}) == 1
    for target, message in ((tmp_path / "out", "exists: name another path"), (files[0] / "out", "plain' is a file")):
        with pytest.raises(ValueError, match=message):
            export(model, target, "compressed-tensors")
    assert set(module.FORMATS) == {"compressed-tensors", "gguf"}

"""Packed modules and damaged checkpoints that the tests of this folder share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpfx
from mpfx.graph import is_linear, linear_weight
from mpfx.hub.checkpoint import CheckpointError
from mpfx.nn import (
    LEFT_OUT,
    CodedScales,
    Layout,
    MixedPrecisionLinear,
    QuantizedWeight,
    Scales,
    pack,
    pack_permutation,
)
from mpfx.passes import CompressionConfig

Batches = list[dict[str, Tensor]]
CONFIG = CompressionConfig(code_bits=4, allocation="quantile")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


Change = Callable[[dict[str, Any]], Any]


def edit(folder: Path, change: Change) -> None:
    """Change the manifest, and what the config says of it."""
    manifest = json.loads((folder / "mpfx.json").read_text())
    change(manifest)
    (folder / "mpfx.json").write_text(json.dumps(manifest))
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def coded_scales(rows: int, grids: int, generator: torch.Generator) -> CodedScales:
    codes = torch.randint(0, 16, (rows, grids), generator=generator)
    return CodedScales.of(codes, *(torch.rand(count, generator=generator) + 0.5 for count in (rows, grids)))


def packed_linear(
    rows: int, channels: int, *, bias: bool = True, seed: int = 0, coded: bool = False
) -> MixedPrecisionLinear:
    """A layer with a mask; one with coded scales leaves its last segment out."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(channels, (4,) * (-(-channels // 32) - coded) + (0,) * coded, 32)
    grids = len(layout.grids)
    codes = torch.randint(0, 16, (rows, channels), generator=generator).int()
    kept = torch.rand(rows, channels, generator=generator) < 0.5
    for run in layout.runs:
        if run.bits == LEFT_OUT:
            codes[:, run.start : run.stop], kept[:, run.start : run.stop] = 0, False
    scales: Scales = torch.rand(rows, grids, generator=generator).half() + 0.5
    weight = QuantizedWeight(
        codes=codes,
        scales=coded_scales(rows, grids, generator) if coded else scales,
        zeros=torch.randint(0, 16, (rows, grids), generator=generator).to(torch.uint8),
        kept=kept,
        layout=layout,
    )
    order = pack_permutation(torch.randperm(channels, generator=generator))
    parameter = nn.Parameter(torch.randn(rows, generator=generator)) if bias else None
    return MixedPrecisionLinear(pack(weight), permutation=order, bias=parameter)


def pack_linears(model: Any) -> Any:
    """Put random packed layers in the place of all but the head; those of equally many channels share their order."""
    orders: dict[int, Tensor | None] = {}
    for path, module in list(model.named_modules()):
        if is_linear(module) and "head" not in path:
            rows, channels = linear_weight(module).shape
            bias = getattr(module, "bias", None) is not None
            packed = packed_linear(rows, channels, bias=bias, seed=len(path), coded=len(path) % 2 == 0)
            packed.permutation = orders.setdefault(channels, packed.permutation)
            model.set_submodule(path, packed)
    return model


class Own(nn.Module):
    """A user's module with something of every kind, packed or still dense."""

    table: Tensor

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.q = packed_linear(32, 64) if packed else nn.Linear(64, 32)
        self.k = packed_linear(16, 64, bias=False, coded=True) if packed else nn.Linear(64, 16, bias=False)
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

"""Models that cannot be traced whole, or that hold experts, on the whole way."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import mpfx
from mpfx.callbacks import ModelCompression
from mpfx.graph import TraceError, opaque_parts
from mpfx.lm import CausalLM
from mpfx.nn import MixedPrecisionLinear, PackedExperts
from mpfx.passes import CompressionConfig, PassError
from tests.zoo import build


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, 96), nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.gate(x)) * self.up(x))
        return out


class Decides(Layer):
    """Branches on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().max() < 1e6 else -x


class Net(pl.LightningModule):
    """Layers of one kind; the root decides too if it is told to."""

    def __init__(self, kind: type[Layer], root: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(kind(64) for _ in range(3)), nn.Linear(64, 40)
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        if self.root and x.sum() > 1e9:
            x = -x
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out

    def validation_step(self, batch: Tensor, index: int) -> None:
        self(batch)


CONFIG = CompressionConfig(code_bits=4, allocation="fixed")


@pytest.mark.parametrize(("kind", "root"), [(Decides, False), (Layer, True), (Decides, True)])
@pytest.mark.parametrize("allocation", ["fixed", "budget"])
def test_parts_that_cannot_be_traced_are_compressed_all_the_same(
    validate: Any, kind: type[Layer], root: bool, allocation: Any
) -> None:
    module, batches = Net(kind, root).eval(), [torch.randn(4, 60, 64), torch.randn(4, 30, 64)]
    twin, dense = Net(Layer, False).eval(), copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    config = CompressionConfig(code_bits=4, allocation=allocation)
    callback = ModelCompression(config)
    validate(module, batches, callback)
    packed = {name for name, m in module.named_modules() if isinstance(m, MixedPrecisionLinear)}
    assert packed == {name for name, m in dense.named_modules() if isinstance(m, nn.Linear)}
    assert callback.graph_module is not None
    parts = opaque_parts(callback.graph_module)
    assert [part.path for part in parts] == ([""] if root else ["layers.0", "layers.1", "layers.2"])
    assert all("test_opaque.py:" in str(part) for part in parts)
    # What is traced whole comes out alike: both are solved layer by layer, on inputs that passed the layers before.
    validate(twin, batches, ModelCompression(config))
    x = torch.randn(3, 7, 64)
    ours, theirs, before = (float((m(x) - dense(x)).norm().detach()) for m in (module, twin, dense))
    assert before == 0
    assert ours == pytest.approx(theirs, rel=0.35)
    if root and kind is Layer:  # inside, gate and up are known to read the same value
        assert any(len(group.weights) == 2 for group in callback.solved)


def test_strict_refuses_what_cannot_be_traced(validate: Any) -> None:
    module = Net(Decides, False).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = ModelCompression(CompressionConfig(code_bits=4, allocation="fixed", strict=True))
    with pytest.raises(TraceError, match=r"`layers.0` \(Decides\) at .*test_opaque.py:\d+: .*What to change"):
        validate(module, [torch.randn(4, 9, 64)], callback)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize(
    "config", [CONFIG, CompressionConfig(bits_per_weight=5.5), CompressionConfig(code_bits=4, sparsity=0.5)]
)
def test_experts_are_compressed_saved_and_loaded(
    name: str, config: CompressionConfig, validate: Any, tmp_path: Path
) -> None:
    model, sample = build(name)
    dense, batches = copy.deepcopy(model), [sample(4, 24), sample(4, 24)]
    callback = ModelCompression(config, module="model")
    validate(CausalLM(model), batches, callback)
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert len(experts) == 2
    reports = [entry for group in callback.solved for entry in group.reports() if ".experts." in entry.path]
    assert len(reports) == 2 * 2 * 4  # layers, parameters, experts
    before, after = dense(**batches[0]).logits.detach(), model(**batches[0]).logits.detach()
    assert 0 < float((before - after).norm() / before.norm()) < 1
    stored = mpfx.save(model, tmp_path)
    assert stored < sum(p.nbytes for p in dense.parameters())
    loaded: Any = mpfx.load(tmp_path)
    assert torch.equal(loaded(**batches[0]).logits, after)
    both: list[Any] = [loaded, model]
    words = [m.generate(batches[0]["input_ids"][:1, :6], max_new_tokens=3, do_sample=False) for m in both]
    assert torch.equal(*words)


def test_experts_that_saw_few_tokens_say_so(validate: Any) -> None:
    model, sample = build("mixtral")
    batches = [{"input_ids": sample(2, 20, padded=False)["input_ids"]}]
    callback = ModelCompression(CONFIG, module="model")
    validate(CausalLM(model), batches, callback)
    notes = {e.path: e.fallback for group in callback.solved for e in group.reports() if ".experts." in e.path}
    assert any(note is not None and "of 64 tokens" in note and "pooled" in note for note in notes.values())
    strict = CompressionConfig(code_bits=4, allocation="fixed", strict=True)
    model, _ = build("mixtral")
    with pytest.raises(PassError, match="`strict` allows no fallback"):
        validate(CausalLM(model), batches, ModelCompression(strict, module="model"))
    assert not any(isinstance(m, PackedExperts | MixedPrecisionLinear) for m in model.modules())

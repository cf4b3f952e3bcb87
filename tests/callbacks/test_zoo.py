"""Every family of the zoo is compressed by the callback, and runs afterwards."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor, nn

from mpfx.allocate import code_bits_per_weight
from mpfx.callbacks import ModelCompression
from mpfx.graph import sites
from mpfx.nn import MixedPrecisionLinear, PackedExperts
from mpfx.passes import CompressionConfig, LocateSites
from tests.zoo import FAMILIES, Sample, build

# Steered by the loss; where autograd cannot follow a model, which writes over what it needs again, without it.
CONFIG = CompressionConfig(code_bits=3.9)
NOT_DIFFERENTIABLE = {"rwkv"}


class Runs(pl.LightningModule):
    """Calls a model of any kind on its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: Sample, index: int) -> Tensor:
        return outputs(self.model(**batch)).square().mean()


def outputs(result: Any) -> Tensor:
    """The first floating tensor of a result."""
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    found = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return found[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_compressed_and_runs(name: str, validate: Callable[..., None]) -> None:
    model, sample = build(name)
    dense, batches = copy.deepcopy(model), [sample(3, 16), sample(3, 16)]
    if name in NOT_DIFFERENTIABLE:
        with pytest.raises(ValueError, match=r"(?s)batch 0 could not be run once more .*`guidance: 0`"):
            validate(Runs(model), batches, ModelCompression(CONFIG, module="model"))
    config = replace(CONFIG, guidance=0.0) if name in NOT_DIFFERENTIABLE else CONFIG
    callback = ModelCompression(config, module="model")
    validate(Runs(model), batches, callback)
    gm = callback.graph_module
    assert gm is not None
    left = LocateSites(CONFIG.scope).reasons(gm)
    for site in sites(gm):
        packed = isinstance(model.get_submodule(site.module), MixedPrecisionLinear | PackedExperts)
        assert packed == (site.path not in left), (site.path, left.get(site.path))
    widths = {int(bits) for group in callback.solved for bits in group.plan.bits.unique()}
    assert len(widths) > 1
    assert code_bits_per_weight([group.plan for group in callback.solved]) <= 3.9
    before, after = outputs(dense(**batches[0])).detach(), outputs(model(**batches[0])).detach()
    assert 0 < float((after - before).norm() / before.norm()) < 1
    if FAMILIES[name].generates:
        inputs = {key: value[:1] for key, value in sample(2, 6).items() if key != "decoder_input_ids"}
        generate: Any = model.generate
        words = generate(**{k: v for k, v in inputs.items() if isinstance(v, Tensor)}, max_new_tokens=3)
        assert words.shape[0] == 1

"""Which sites are compressed."""

from typing import Any

import pytest
import torch
from torch import nn

from mpfx.graph import sites, trace
from mpfx.passes import FindProducers, GroupInputs, LocateSites, PassError, Scope, analysis, located, run_passes
from tests.zoo import build


def chosen(gm: Any, **scope: Any) -> set[str]:
    run_passes(gm, analysis(Scope(**scope)))
    return {site.path for group in located(gm) for site in group.sites}


def test_patterns_sizes_and_kinds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    gm = trace(model, (torch.randn(3, 40),))
    assert chosen(gm) == {"0", "2", "4"}
    assert chosen(gm, include=("[02]",)) == {"0", "2"}
    assert chosen(gm, exclude=("2",)) == {"0", "4"}
    assert chosen(gm, include=("[02]",), exclude=("0",)) == {"2"}
    assert chosen(gm, min_weights=513) == {"0", "2"}
    reasons = LocateSites(Scope(min_weights=513, exclude=("0",))).reasons(gm)
    assert reasons == {
        "0": "it was named to stay dense (`scope.exclude`)",
        "4": "it has fewer than 513 weights (`scope.min_weights`)",
    }
    with pytest.raises(PassError, match=r"`scope.include` to match sites but 'x' matches none of 0, 2, 4"):
        chosen(gm, include=("x",))
    with pytest.raises(
        ValueError, match=r"`scope.kinds` among \['linear', 'transposed', 'expert'\] but got \['conv'\]"
    ):
        Scope(kinds=("conv",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`scope.min_weights` of 0 or more but got -1"):
        Scope(min_weights=-1)


def test_experts_of_one_parameter_stay_together() -> None:
    model, sample = build("mixtral")
    gm = trace(model, (), sample(2, 8) | {"use_cache": False})
    kinds = {site.kind for site in sites(gm)}
    assert kinds == {"linear", "expert"}
    assert not any("experts" in path for path in chosen(gm, kinds=("linear",)))
    assert all("experts" in path for path in chosen(gm, kinds=("expert",)))
    one = "model.layers.0.mlp.experts.gate_up_proj.1"
    left = chosen(gm, exclude=(one,))
    assert not any("layers.0.mlp.experts.gate_up" in path for path in left)
    assert any("layers.0.mlp.experts.down" in path for path in left)
    reason = LocateSites(Scope(exclude=(one,))).reasons(gm)[one.replace(".1", ".0").replace("layers.1", "layers.0")]
    assert f"{one}, which is stored with it, stays dense" in reason


def test_gpt2_is_of_the_transposed_kind() -> None:
    model, sample = build("gpt2")
    gm = trace(model, (), sample(2, 8) | {"use_cache": False})
    assert {site.kind for site in sites(gm)} == {"transposed", "linear"}
    assert chosen(gm, kinds=("transposed",)) == {site.path for site in sites(gm) if site.path != "lm_head"}


def test_analysis_passes_need_each_other() -> None:
    model = nn.Sequential(nn.Linear(40, 64))
    gm = trace(model, (torch.randn(3, 40),))
    with pytest.raises(PassError, match="run LocateSites before"):
        run_passes(gm, [GroupInputs()])
    with pytest.raises(PassError, match="run LocateSites and GroupInputs before"):
        run_passes(gm, [FindProducers()])

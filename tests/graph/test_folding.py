from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpfx.graph import linear_weight, trace
from mpfx.graph.folding import channel_order, permute, rescale, row_order
from mpfx.graph.producers import PermutationFold, ScaleFold, permutation_folds, scale_folds

FAMILIES = [  # with the number of scale and permutation folds; two layers each
    ("llama", 9, 4),
    ("gpt2", 6, 4),
    ("opt", 8, 4),
    ("phi3", 9, 4),
    ("gptneox", 7, 4),
    ("bloom", 6, 4),
    ("falcon", 4, 4),
    ("gemma2", 8, 4),
    ("olmo2", 5, 4),
    ("mixtral", 7, 2),
    ("deepseek-v3", 13, 4),
    ("bert", 3, 4),
    ("t5", 20, 10),
    ("vit", 7, 4),
]
DOUBLE = {"t5"}  # its attention is not scaled, so float32 rounds too coarsely


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def change(model: nn.Module, inputs: dict[str, Tensor], before: Tensor) -> float:
    """Of the results, relative to the largest."""
    assert before.isfinite().all()
    return ((logits(model, inputs) - before).abs().max() / before.abs().max()).item()


def random_order(fold: PermutationFold) -> Tensor:
    order = torch.arange(len(fold.cell))
    for cell in fold.cell.unique():
        units = (fold.cell == cell).nonzero().flatten()
        order[units] = units[torch.randperm(len(units))]
    return order


def random_scales(fold: ScaleFold) -> Tensor:
    return torch.rand(len(fold.rows)) + 0.5


@pytest.fixture
def prepared(family: Any) -> Callable[[str], Any]:
    """Build ``(model, graph, inputs, logits)`` of a family."""

    def build(name: str) -> Any:
        model, sample = family(name)
        if name in DOUBLE:
            model.double()
        inputs = sample(2, 7, padded=False)
        return model, trace(model, (), sample(2, 5, padded=False)), inputs, logits(model, inputs)

    return build


@pytest.mark.parametrize(("name", "scales", "permutations"), FAMILIES)
def test_all_folds_at_once_change_nothing(
    prepared: Callable[[str], Any], name: str, scales: int, permutations: int
) -> None:
    model, gm, inputs, before = prepared(name)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    limit = 1e-10 if name in DOUBLE else 1e-5
    for fold in scale_folds(gm):
        rescale(model, fold, random_scales(fold))
    assert change(model, inputs, before) <= limit
    for free in permutation_folds(gm):
        permute(model, free, random_order(free))
    assert change(model, inputs, before) <= limit
    assert (len(scale_folds(gm)), len(permutation_folds(gm))) == (scales, permutations)
    moved = {path for fold in scale_folds(gm) for path in (fold.producer, *dict(fold.consumers))}
    moved |= {path for free in permutation_folds(gm) for path in (*free.sites, *dict(free.producers))}
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, weights[key])}
    assert {path for path in moved if not any(key.startswith(f"{path}.") for key in changed)} == set()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gptneox", "bloom", "bert", "vit"])
def test_leaving_a_cell_would_matter(prepared: Callable[[str], Any], name: str) -> None:
    model, gm, inputs, before = prepared(name)
    heads = next(fold for fold in permutation_folds(gm) if fold.cell.max() > 0)
    order = torch.arange(len(heads.cell)).roll(1)
    with pytest.raises(ValueError, match="Permute inside cells"):
        permute(model, heads, order)
    assert change(model, inputs, before) == 0
    without_cells = replace(heads, cell=torch.zeros_like(heads.cell), image=rank_of(heads.unit))
    permute(model, without_cells, order)
    assert change(model, inputs, before) > 1e-4


def rank_of(unit: Tensor) -> Tensor:
    """How many channels before each are the same unit."""
    return torch.stack([(unit[:j] == unit[j]).sum() for j in range(len(unit))])


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "deepseek-v3", "opt"])
def test_every_consumer_of_a_scale_counts(prepared: Callable[[str], Any], name: str) -> None:
    model, gm, inputs, before = prepared(name)
    [fold, *_] = [f for f in reversed(scale_folds(gm)) if len(f.consumers) > 1]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for index in range(len(fold.consumers)):
        rescale(
            model, replace(fold, consumers=fold.consumers[:index] + fold.consumers[index + 1 :]), random_scales(fold)
        )
        assert change(model, inputs, before) > 1e-4, fold.consumers[index][0]
        model.load_state_dict(state)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_every_producer_of_a_permutation_counts(prepared: Callable[[str], Any], name: str) -> None:
    model, gm, inputs, before = prepared(name)
    fold = permutation_folds(gm)[1]
    partial = replace(fold, producers=fold.producers[1:], out_features=fold.out_features[1:])
    permute(model, partial, torch.arange(len(fold.cell)).flip(0))
    assert change(model, inputs, before) > 1e-4


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.a(x))
        out: Tensor = self.b(y) * self.c(y)
        return out


def test_every_site_of_a_permutation_counts() -> None:
    torch.manual_seed(0)
    model, x = Siblings(), torch.randn(5, 4)
    [fold] = permutation_folds(trace(model, (x,)))
    before, order = model(x), torch.randperm(6)
    permute(model, fold, order)
    torch.testing.assert_close(model(x), before)
    permute(model, replace(fold, sites=fold.sites[:1]), order)
    assert (model(x) - before).abs().max() > 1e-3


def test_orders_name_what_permute_does(prepared: Callable[[str], Any]) -> None:
    model, gm, _, _ = prepared("llama")
    fold = permutation_folds(gm)[0]  # o from v, two heads of values for four
    order = random_order(fold)
    o, v = (model.get_submodule(path) for path in (fold.sites[0], fold.producers[0][0]))
    columns, rows = linear_weight(o).clone(), linear_weight(v).clone()
    permute(model, fold, order)
    assert torch.equal(linear_weight(o), columns[:, channel_order(fold, order)])
    assert torch.equal(linear_weight(v), rows[row_order(fold, order)[fold.producers[0][0]]])
    assert torch.equal(channel_order(fold, order).sort().values, torch.arange(64))
    heads = channel_order(fold, order).view(4, 16) // 16
    assert torch.equal(heads, torch.arange(4)[:, None].expand(4, 16))


def test_rows_outside_a_fold_stay(prepared: Callable[[str], Any]) -> None:
    _, gm, _, _ = prepared("gpt2")
    fold = permutation_folds(gm)[0]
    rows = row_order(fold, random_order(fold))
    assert list(rows) == ["transformer.h.0.attn.c_attn"]
    order = rows["transformer.h.0.attn.c_attn"]
    assert torch.equal(order[:64], torch.arange(64))
    assert not torch.equal(order[64:], torch.arange(64, 96))


def test_an_inverse_permutation_restores_the_weights(prepared: Callable[[str], Any]) -> None:
    model, gm, _, _ = prepared("phi3")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for fold in permutation_folds(gm):
        order = random_order(fold)
        permute(model, fold, order)
        permute(model, fold, order.argsort())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_norm_plus_one(prepared: Callable[[str], Any]) -> None:
    model, gm, _, _ = prepared("gemma2")
    fold = scale_folds(gm)[0]
    assert fold.kind == "norm_plus_one"
    norm: Any = model.get_submodule(fold.producer)
    scales, weight = random_scales(fold), norm.weight.detach().clone()
    rescale(model, fold, scales)
    torch.testing.assert_close(norm.weight.detach(), (1 + weight) / scales - 1)


@pytest.mark.parametrize("order", [torch.zeros(6, dtype=torch.int64), torch.arange(5), torch.arange(6.0)])
def test_what_is_no_permutation_is_refused(order: Tensor) -> None:
    model = Siblings()
    [fold] = permutation_folds(trace(model, (torch.randn(2, 4),)))
    with pytest.raises(ValueError, match="`b` to be a permutation of its 6 units"):
        permute(model, fold, order)


@pytest.mark.parametrize("scales", [torch.ones(5), torch.zeros(3), -torch.ones(3), torch.full((3,), torch.inf)])
def test_scales_must_be_positive_and_finite(scales: Tensor) -> None:
    first = nn.Linear(2, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(3, 2))
    [fold] = scale_folds(trace(model, (torch.randn(2, 2),)))
    weight = first.weight.detach().clone()
    with pytest.raises(ValueError, match="one positive, finite factor for each of the 3 units of `0`"):
        rescale(model, fold, scales)
    assert torch.equal(first.weight, weight)


def test_replaced_modules_are_refused_before_anything_changes() -> None:
    model = Siblings()
    gm = trace(model, (torch.randn(2, 4),))
    [fold] = permutation_folds(gm)
    weight = model.a.weight.detach().clone()
    model.set_submodule("c", nn.Identity())
    with pytest.raises(TypeError, match="Identity"):
        permute(model, fold, torch.arange(6).flip(0))
    assert torch.equal(model.a.weight, weight)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).softmax(-1)
        weights, chosen = scores.topk(2, dim=-1)
        return weights, chosen


class Experts(nn.Module):
    def __init__(self, inner: int, transposed: bool | None) -> None:
        super().__init__()
        shapes = [(3, 2 * inner, 4), (3, 4, inner)]
        self.transposed = bool(transposed)
        if transposed is not None:
            self.is_transposed = transposed
        first, second = (torch.randn(s).transpose(1, 2).contiguous() if transposed else torch.randn(s) for s in shapes)
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        first, second = (w.transpose(1, 2) if self.transposed else w for w in (self.first, self.second))
        gate, up = torch.einsum("ti,eoi->eto", x, first).chunk(2, -1)
        results = torch.einsum("eti,eoi->eto", F.silu(gate) * up, second)
        shares = torch.zeros(x.shape[0], 3).scatter(1, chosen, weights)
        return torch.einsum("eto,te->to", results, shares)


class Mixture(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.LayerNorm(4), Router(), experts

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = x + self.experts(y, *self.router(y))
        return out


@pytest.mark.parametrize("transposed", [None, False, True])
def test_routers_and_experts_are_rescaled(transposed: bool | None) -> None:
    torch.manual_seed(0)
    model, x = Mixture(Experts(3, transposed)), torch.randn(5, 4)
    [fold] = scale_folds(trace(model, (x,)))
    assert [path for path, _ in fold.consumers] == ["router", "experts"]
    before, scales = model(x), random_scales(fold)
    rescale(model, fold, scales)
    torch.testing.assert_close(model(x), before)
    rescale(model, replace(fold, consumers=fold.consumers[:1]), scales)
    assert (model(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("inner", "transposed"), [(4, True), (4, False), (2, None)])
def test_experts_whose_sizes_do_not_tell_are_left_alone(inner: int, transposed: bool | None) -> None:
    gm = trace(Mixture(Experts(inner, transposed)), (torch.randn(5, 4),))
    assert scale_folds(gm) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_type(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).to(dtype)
    gm = trace(model, (torch.randn(2, 4, dtype=dtype),))
    for fold in scale_folds(gm):
        rescale(model, fold, random_scales(fold))
    assert len(scale_folds(gm)) == 2
    assert {p.dtype for p in model.parameters()} == {dtype}

"""Who does which part; what a single process does. What two do: ``tests/callbacks/test_processes.py``."""

import itertools

import pytest
import torch

from mpfx.graph import InputGroup
from mpfx.passes import RankError, Ranks, was_told
from mpfx.passes.ranks import _Reader, _written, shared
from mpfx.stats import MomentAccumulator


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_work_is_shared_out_nearly_as_well_as_can_be(size: int) -> None:
    costs = [8.0, 7.0, 6.0, 5.0, 4.0, 1.0]
    ranks = shared(costs, size)
    most = max(sum(c for c, r in zip(costs, ranks, strict=True) if r == rank) for rank in range(size))
    every = itertools.product(range(size), repeat=len(costs))
    best = min(max(sum(c for c, r in zip(costs, way, strict=True) if r == k) for k in range(size)) for way in every)
    assert most <= 4 / 3 * best
    assert shared(costs, size) == ranks


def test_equal_pieces_go_round() -> None:
    assert shared([1.0] * 5, 2) == [0, 1, 0, 1, 0]
    assert shared([], 2) == []


def test_a_single_process_keeps_what_it_has() -> None:
    ranks = Ranks()
    assert ranks.first
    assert ranks.gathered(lambda: 3) == [3]
    assert ranks.joined(lambda: {"a": 1}) == {"a": 1}
    assert ranks.once(lambda: "x") == "x"
    sums: dict[str, MomentAccumulator] = {}
    groups: list[InputGroup] = []
    assert ranks.summed(sums, groups) == []
    with pytest.raises(ZeroDivisionError) as caught, ranks.together():
        1 / 0  # noqa: B018
    assert not was_told(caught.value)


def test_processes_that_were_not_started_are_refused() -> None:
    assert Ranks.of(1, torch.device("cpu")).size == 1
    with pytest.raises(RuntimeError, match="Expected 2 processes that know each other"):
        Ranks.of(2, torch.device("cpu"))


def test_tensors_leave_and_take_their_places() -> None:
    order = torch.tensor([2, 0, 1], dtype=torch.uint16)
    data, tensors = _written({"a": [order, order], "b": (torch.ones(2, 2).t()[:, :1], "text", None)}, order.device)
    assert len(tensors) == 2
    assert all(tensor.is_contiguous() for tensor in tensors)
    back = _Reader(data, tensors).load()
    assert back["a"][0] is back["a"][1]
    assert torch.equal(back["b"][0], torch.ones(2, 1))
    assert back["b"][1:] == ("text", None)
    _, elsewhere = _written([order], torch.device("meta"))
    assert elsewhere == []  # what lies elsewhere goes along


def test_what_was_told_is_known_by_its_causes() -> None:
    told = RankError("process 1 failed")
    told._mpfx_told = True  # type: ignore[attr-defined]
    wrapped = ValueError("a block")
    wrapped.__cause__ = told
    assert was_told(wrapped)
    assert not was_told(ValueError())


def test_sums_of_several_are_those_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=generator), torch.randn(30, 5, generator=generator)
    one, two, whole = (MomentAccumulator(5) for _ in range(3))
    one.update(x[:10])
    two.update(x[10:], None, y[10:])
    whole.update(x, None, torch.cat([x[:10], y[10:]]))
    assert two._drift is not None
    others = iter([*two._sums(), two._drift])
    one.add_up(lambda tensor: tensor.add_(next(others)), 30, drifting=True)
    mine, theirs = one.finalise(), whole.finalise()
    assert mine.tokens == 30
    assert mine.drift is not None
    assert theirs.drift is not None
    assert torch.allclose(mine.hessian, theirs.hessian, rtol=1e-5, atol=1e-6)
    assert torch.allclose(mine.drift, theirs.drift, rtol=1e-5, atol=1e-6)
    assert torch.allclose(mine.variance, theirs.variance, rtol=1e-5)

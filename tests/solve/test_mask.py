"""Masks against sorting by hand."""

import pytest
import torch

from mpfx.solve import Sparsity, prune_lowest, prune_n_of_m


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Sparsity()),
        (0, Sparsity()),
        (0.5, Sparsity(0.5)),
        ("0.5", Sparsity(0.5)),
        ("2:4", Sparsity(0.5, 2, 4)),
        ("1:4", Sparsity(0.75, 1, 4)),
        ("16:32", Sparsity(0.5, 16, 32)),
    ],
)
def test_parse(value: float | str | None, expected: Sparsity) -> None:
    assert Sparsity.parse(value) == expected
    assert Sparsity.parse(str(expected)) == expected


@pytest.mark.parametrize("value", [1, 1.0, -0.1, "4:4", "0:4", "5:4", "2:3", "2:64", "half", 124.0, "nan", ""])
def test_what_is_no_sparsity_is_refused(value: float | str) -> None:
    with pytest.raises(ValueError, match="Expected `sparsity` to be a fraction"):
        Sparsity.parse(value)


@pytest.mark.parametrize("count", [0, 1, 30, 59, 60])
def test_prunes_exactly_the_lowest(count: int) -> None:
    saliency = torch.randperm(60, generator=torch.Generator().manual_seed(0)).reshape(6, 10).float()
    assert torch.equal(prune_lowest(saliency, count), saliency < count)


def test_ties_go_in_order_and_the_count_is_exact() -> None:
    saliency = torch.tensor([[1.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    assert prune_lowest(saliency, 3).tolist() == [[True, True, False], [False, False, True]]
    assert int(prune_lowest(torch.zeros(7, 9), 31).sum()) == 31


def test_n_of_m_in_every_row() -> None:
    saliency = torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
    pruned = prune_n_of_m(saliency, Sparsity.parse("1:4"))
    for row in range(5):
        for start in range(0, 12, 4):
            part = saliency[start : start + 4, row]
            assert pruned[start : start + 4, row].tolist() == [bool(v < part.max()) for v in part]


def test_channels_left_over_stay() -> None:
    pruned = prune_n_of_m(torch.rand(10, 3), Sparsity.parse("2:4"))
    assert pruned[:8].sum(0).tolist() == [4, 4, 4]
    assert not bool(pruned[8:].any())
    assert Sparsity.parse("2:4").pruned(3, 10) == 12

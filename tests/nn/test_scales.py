"""Coded scales: exact values from the definition, exact round trips."""

import numpy as np
import pytest
import torch

from mpfx.nn import CodedScales, Layout, QuantizedWeight, pack, scale_values, unpack
from mpfx.nn.planes import unpack_codes
from mpfx.nn.scales import FACTORS

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def scales(rows: int, grids: int) -> tuple[torch.Tensor, CodedScales]:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, grids), generator=generator)
    row, group = torch.rand(rows, generator=generator) + 0.5, 10 ** torch.randn(grids, generator=generator)
    return codes, CodedScales.of(codes, row, group)


def test_factors_are_quarter_octaves() -> None:
    assert len(FACTORS) == 16
    np.testing.assert_allclose(FACTORS, 2.0 ** (-np.arange(16) / 4), rtol=1e-15)
    assert list(FACTORS[::4]) == [1, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
def test_values_are_those_of_the_definition(rows: int) -> None:
    codes, coded = scales(rows, len(WIDTHS))
    decoded = coded.decode(Layout(32 * len(WIDTHS), WIDTHS, 32))
    row, group = coded.row.double().numpy(), coded.group.double().numpy()
    expected = row[:, None] * group * 2 ** (-codes.numpy() / 4) / (2.0 ** np.array(WIDTHS) - 1)
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=3e-7)
    # In this very order, in numpy's float32.
    base = coded.row.float().numpy()[:, None] * coded.group.float().numpy()
    factors, steps = (np.array(t, dtype=np.float32) for t in (FACTORS, [1 / (2**b - 1) for b in WIDTHS]))
    assert np.array_equal(decoded.numpy(), base * factors[codes.numpy()] * steps)
    assert decoded.dtype == torch.float32


def test_columns_that_are_left_out_or_raw_have_no_scale() -> None:
    codes, coded = scales(5, 2)
    layout = Layout(128, (16, 3, 0, 8), 32)
    expected = scale_values(coded.row.float()[:, None] * coded.group.float(), codes, (3, 8))
    assert torch.equal(coded.decode(layout), expected)


@pytest.mark.parametrize("rows", [1, 32, 45])
@pytest.mark.parametrize("grids", [0, 1, 5])
def test_codes_come_back_and_are_stored_in_four_bits(rows: int, grids: int) -> None:
    codes, coded = scales(rows, grids)
    assert torch.equal(coded.unpacked(), codes.int())
    words = -(-rows // 32) * 4
    assert coded.codes.shape == (grids * words,)
    assert coded.nbytes == 4 * grids * words + 2 * rows + 2 * grids
    for grid in range(grids):  # where the format says
        assert torch.equal(unpack_codes(coded.codes[grid * words : (grid + 1) * words], 4, rows), codes[:, grid].int())
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    moved = coded.rows(order)
    assert torch.equal(moved.unpacked(), codes[order].int())
    assert torch.equal(moved.row, coded.row[order])
    assert torch.equal(moved.group, coded.group)


def test_dequantized_values_by_hand() -> None:
    weight = QuantizedWeight(
        codes=torch.tensor([[0, 3, 1]], dtype=torch.int32),
        scales=CodedScales.of(torch.tensor([[4]]), torch.tensor([3.0]), torch.tensor([2.0])),
        zeros=torch.tensor([[1]], dtype=torch.uint8),
        kept=None,
        layout=Layout(3, (2,), 64),
    )
    torch.testing.assert_close(weight.dequantize(), torch.tensor([[-1.0, 2.0, 0.0]]))  # the step is 3 * 2 / 2 / 3
    assert torch.equal(unpack(pack(weight)).dequantize(), weight.dequantize())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    _, coded = scales(1000, len(WIDTHS))
    layout = Layout(32 * len(WIDTHS), WIDTHS, 32)
    moved = CodedScales(coded.codes.cuda(), coded.row.cuda(), coded.group.cuda())
    assert torch.equal(moved.decode(layout).cpu(), coded.decode(layout))

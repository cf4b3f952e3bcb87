"""The published loop of SparseGPT and GPTQ in plain PyTorch, to compare with.

As the authors' code does it (Frantar & Alistarh 2023; Frantar et al. 2023): one float32 Hessian for every Linear, three
factorisations, and a Python loop over columns; scales from the least and largest weight of a group of columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpfx.graph import Block, linear_weight, run_block, traced_module

_PANEL = 128
_DAMPING = 0.01


class PlainHessian:
    """``2/n sum_t x_t x_t^T`` of what one Linear reads, ``(in, in)`` float32, sample by sample."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.hessian = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of ``x (..., in)``."""
        x = x.reshape(-1, x.shape[-1]).t()
        self.hessian *= self.tokens / (self.tokens + x.shape[1])
        self.tokens += x.shape[1]
        x = (2 / self.tokens) ** 0.5 * x.float()
        self.hessian += x.matmul(x.t())


def solve_plain(weight: Tensor, hessian: Tensor, bits: int, group: int, sparsity: float) -> Tensor:
    """Prune and quantize one weight, column by column.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)`` float32; changed.
        bits: of the codes.
        group: columns that share a scale and a zero point; divides 128.
        sparsity: share of every 128 columns that is pruned.

    Returns:
        The solved weight ``(out, in)`` float32.
    """
    work = weight.detach().float().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    work[:, dead] = 0
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    solved = torch.zeros_like(work)
    scale = zero = work[:, 0]
    for start in range(0, work.shape[1], _PANEL):
        stop = min(start + _PANEL, work.shape[1])
        panel, u = work[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(panel)
        pruned = _lowest(panel.square() / u.diagonal().square(), sparsity)
        for i in range(stop - start):
            if (start + i) % group == 0:
                scale, zero = _fit(panel[:, i : i + group], bits)
            w = panel[:, i]
            q = scale * ((w / scale + zero).round().clamp(0, 2**bits - 1) - zero)
            q = q.masked_fill(pruned[:, i], 0)
            solved[:, start + i] = q
            errors[:, i] = (w - q) / u[i, i]
            panel[:, i:] -= errors[:, i : i + 1] * u[i : i + 1, i:]
        work[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return solved


def _lowest(saliency: Tensor, share: float) -> Tensor:
    if not share:
        return torch.zeros_like(saliency, dtype=torch.bool)
    ranked = saliency.flatten().sort().values
    return saliency <= ranked[int(share * saliency.numel())]


def _fit(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every row, ``(rows,)``."""
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    return scale, (-low / scale).round()


@torch.no_grad()
def plain_block(
    gm: fx.GraphModule,
    block: Block,
    readers: Mapping[str, int],
    streams: Sequence[Mapping[str, Any]],
    solve: Callable[[Tensor, Tensor], Tensor],
) -> list[dict[str, Any]]:
    """Solve the Linears of one block as the published code does, each on its own Hessian.

    Args:
        gm: traced; the weights of the block are solved ones afterwards.
        block: of ``gm``.
        readers: :func:`mpfx.graph.last_readers` of all blocks.
        streams: what the block reads, a dict a batch.
        solve: from a weight and its Hessian to the solved weight.

    Returns:
        What later blocks read.
    """
    model = traced_module(gm)
    linears = {path: model.get_submodule(path) for path in block.sites}
    with _hessians(linears) as hessians:
        for values in streams:
            run_block(block, values, readers)
    for path, module in linears.items():
        weight = linear_weight(module)
        weight.copy_(solve(weight, hessians.pop(path).hessian))
    return [run_block(block, values, readers) for values in streams]


@contextmanager
def _hessians(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, PlainHessian]]:
    found = {p: PlainHessian(linear_weight(m).shape[1], linear_weight(m).device) for p, m in linears.items()}
    with ExitStack() as hooks:
        for path, module in linears.items():
            add = found[path].add
            hooks.callback(module.register_forward_hook(lambda m, args, out, add=add: add(args[0])).remove)
        yield found

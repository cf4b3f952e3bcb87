"""Solving one weight: grids, masks, the factor of the Hessian, and the sweep. Tensors in, tensors out."""

from mpfx.solve.factor import Factor, factorise
from mpfx.solve.grid import Grid, GridConfig, fit_grid
from mpfx.solve.mask import Sparsity, prune_lowest, prune_n_of_m
from mpfx.solve.sweep import layer_error, sweep

__all__ = [
    "Factor",
    "Grid",
    "GridConfig",
    "Sparsity",
    "factorise",
    "fit_grid",
    "layer_error",
    "prune_lowest",
    "prune_n_of_m",
    "sweep",
]

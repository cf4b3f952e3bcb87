"""Solving one weight: grids, masks, the factor of the Hessian, the sweep, refinement. Tensors in, tensors out."""

from mpfx.solve.coded import ScaleBases, fit_bases, fit_coded_grid
from mpfx.solve.device import prepare
from mpfx.solve.factor import Factor, factor_diagonal, factorise
from mpfx.solve.grid import Grid, GridConfig, fit_grid
from mpfx.solve.mask import Sparsity, prune_lowest, prune_n_of_m
from mpfx.solve.refine import measured_refine, refine
from mpfx.solve.rounding import round_nearest
from mpfx.solve.sweep import layer_error, measured_sweep, quadratic_form, sweep

__all__ = [
    "Factor",
    "Grid",
    "GridConfig",
    "ScaleBases",
    "Sparsity",
    "factor_diagonal",
    "factorise",
    "fit_bases",
    "fit_coded_grid",
    "fit_grid",
    "layer_error",
    "measured_refine",
    "measured_sweep",
    "prepare",
    "prune_lowest",
    "prune_n_of_m",
    "quadratic_form",
    "refine",
    "round_nearest",
    "sweep",
]

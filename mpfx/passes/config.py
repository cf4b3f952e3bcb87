"""What a compression is asked to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mpfx.allocate.choose import OptimalConfig
from mpfx.allocate.importance import ImportanceConfig
from mpfx.allocate.strategies import ThresholdConfig, TierConfig
from mpfx.nn.layout import RAW_BITS, WIDTHS
from mpfx.passes.base import Pass
from mpfx.passes.scope import Scope
from mpfx.solve.grid import GridConfig
from mpfx.solve.mask import Sparsity

AUTO = "auto"
SCORED = ("threshold", "quantile", "budget")
"""Allocations that go by importance scores."""

AUTO_FRACTIONS = (0.0, 0.25, 0.5)
"""Shares pruned that sparsity `auto` chooses from."""


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How to compress; a size has to be given, all else has defaults.

    Args:
        bits_per_weight: stored bits per compressed weight, everything counted (codes, scales, zeros, masks,
            permutations, padding). Never exceeded. Give this or `code_bits`.
        code_bits: average nominal width of the codes alone. Give this or `bits_per_weight`. With `fixed` a whole number
            from 1 to 8, or 16: keep float16 values and only prune. `threshold` and `quantile` set the average by
            their own tiers: they win over either size, and the report states both.
        allocation: who gets how many bits. optimal: whatever lowers the loss most per stored byte, over the whole
            model; fixed: one width; threshold, quantile, budget: tiers by importance, of which budget meets the size
            that is asked for.
        optimal: what `optimal` chooses from: widths, limits, ties.
        distortion: what `optimal` weighs widths by. measured: every group of channels rounded to every width; signals:
            what the five signals of the importance make of that, by a fit over the whole model.
        sparsity: fraction of the weights to prune (0.5), or n of every m adjacent channels kept ("2:4"); null: none;
            auto: whatever is best for its bytes, input group by input group (with `optimal` and `bits_per_weight`).
        allocation_tokens: tokens of the calibration data that bits are given by: so many at least, whole batches,
            evenly spread. Fewer take less time and cost quality (measured: perplexity 78 instead of 73 by a quarter
            of 32768 tokens, SmolLM2-135M at 3.34 bits); solving takes all. null: all.
        importance: weights of the five signals.
        tiers: widths and quantiles of `quantile`; `budget` uses the widths.
        threshold: thresholds and widths of `threshold`.
        block_bits: other budgets for some blocks, in the unit of the one above: from a pattern of block names
            (`model.layers.0`, `*.29`) to bits. For `optimal`, `fixed` and `budget`.
        guidance: power of the loss's sensitivity to every token's outputs with which the token counts in the Hessians;
            above 0 calibration runs a backward pass too, which `optimal` also takes the harm of rounding from. 0: none.
            null: 0.5 with `optimal`, else 0.
        correction: share of the error of earlier blocks that a later block's weights make up for; costs another pass
            of the dense model. null: 0.5 with `optimal`, else 0.
        refine: rounds of coordinate descent over the surviving codes after a sweep that prunes.
        grid: scales and zero points.
        damping: fraction of the mean diagonal added to every Hessian; raised by itself where it does not do, and
            reported.
        order: order of the sweep within a width. activation: largest inputs first; natural: as they come (no
            permutation to store, if all widths are equal); auto: natural for n:m sparsity, else activation.
        fold_permutations: give channels a new order by reordering the rows that make them, wherever the graph allows
            it; elsewhere the order is stored and the input gathered.
        fold_scales: before rounding, scale channels by a power of the size of their activations where the graph allows
            to divide it out again for free, if that lowers the error. null: where nothing is pruned and `guidance` is
            0.
        scope: what is compressed at all.
        offload: where the model is while it is compressed on an accelerator. always: on the host, its blocks move to
            the device one at a time, so that a model larger than the device's memory can be compressed; never: on the
            device; auto: on the device if it takes no more than half of what is free there. Values between blocks wait
            on the host with `always`, and with auto once half of the device's memory is taken. The Trainer of a
            validation loop of your own has put the model on the device, whatever this says.
        passes: passes of your own, by import path; run after the analysis and before anything is measured.
        strict: refuse whatever would be done otherwise than asked, instead of reporting it.
    """

    bits_per_weight: float | None = None
    code_bits: float | None = None
    allocation: Literal["optimal", "fixed", "threshold", "quantile", "budget"] = "optimal"
    optimal: OptimalConfig = field(default_factory=OptimalConfig)
    distortion: Literal["measured", "signals"] = "measured"
    sparsity: str | float | None = None
    allocation_tokens: int | None = None
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    tiers: TierConfig = field(default_factory=TierConfig)
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    block_bits: Mapping[str, float] = field(default_factory=dict)
    guidance: float | None = None
    correction: float | None = None
    refine: int = 1
    grid: GridConfig = field(default_factory=GridConfig)
    damping: float = 0.01
    order: Literal["auto", "activation", "natural"] = "auto"
    fold_permutations: bool = True
    fold_scales: bool | None = None
    scope: Scope = field(default_factory=Scope)
    offload: Literal["auto", "always", "never"] = "auto"
    passes: tuple[Pass, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.code_bits is None):
            given = "neither" if self.code_bits is None else f"both ({self.bits_per_weight} and {self.code_bits})"
            raise ValueError(
                "Expected exactly one of `bits_per_weight` (stored, everything counted) and `code_bits` (average width "
                f"of the codes alone) but got {given}."
            )
        if self.allocation not in ("optimal", "fixed", "threshold", "quantile", "budget"):
            raise ValueError(
                "Expected `allocation` to be optimal, fixed, threshold, quantile or budget but got "
                f"{self.allocation!r}."
            )
        if self.distortion not in ("measured", "signals"):
            raise ValueError(f"Expected `distortion` to be measured or signals but got {self.distortion!r}.")
        self._check_used()
        self._check_running()
        if self.order not in ("auto", "activation", "natural"):
            raise ValueError(f"Expected `order` to be auto, activation or natural but got {self.order!r}.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"Expected `damping` to be above 0 and at most 1 but got {self.damping}.")
        for name, share in (("guidance", self.guidance), ("correction", self.correction)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"Expected `{name}` to lie between 0 and 1 but got {share}.")
        if self.refine < 0:
            raise ValueError(f"Expected `refine` of 0 or more rounds but got {self.refine}.")
        if self.sparsity == AUTO and (self.allocation != "optimal" or self.bits_per_weight is None):
            raise ValueError("Expected allocation optimal and `bits_per_weight` with sparsity auto: bytes decide it.")
        if self.block_bits and self.allocation not in ("optimal", "fixed", "budget"):
            raise ValueError(f"Expected no `block_bits` with allocation {self.allocation}, whose tiers set the bits.")
        self.pattern  # noqa: B018  (parsing refuses what is not a sparsity)
        self._check_bits("bits_per_weight" if self.code_bits is None else "code_bits", self.target)
        for name, bits in self.block_bits.items():
            self._check_bits(f"block_bits.{name}", bits)

    def _check_running(self) -> None:
        if self.allocation_tokens is not None and self.allocation_tokens < 1:
            raise ValueError(f"Expected `allocation_tokens` of 1 or more but got {self.allocation_tokens}.")
        if self.offload not in ("auto", "always", "never"):
            raise ValueError(f"Expected `offload` to be auto, always or never but got {self.offload!r}.")

    def _check_used(self) -> None:
        """Refuse what would be silently ignored."""
        if self.allocation != "optimal":
            for name, default in (("optimal", OptimalConfig()), ("distortion", "measured")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"Expected no `{name}` with allocation {self.allocation}, which makes no use of it, but got "
                        f"{getattr(self, name)}: set `allocation: optimal`, or leave it out."
                    )
        if not self.scored and self.importance != ImportanceConfig():
            raise ValueError(
                f"Expected no `importance` with allocation {self.allocation}, which scores nothing, but got "
                f"{self.importance}: set `allocation` to threshold, quantile or budget, or leave it out."
            )

    def _check_bits(self, name: str, bits: float) -> None:
        if self.code_bits is None:
            if not self.least_bits_per_weight <= bits <= 32:
                raise ValueError(
                    f"Expected `{name}` to be stored bits from {self.least_bits_per_weight:.3f} (the narrowest "
                    f"width of allocation {self.allocation}, with scales, zero points and mask) to 32 but got {bits}."
                )
        elif self.allocation == "fixed" and bits not in (*WIDTHS, RAW_BITS):
            raise ValueError(
                f"Expected `{name}` to be a whole number from 1 to 8, or 16, with allocation fixed but got {bits}; "
                "for an average in between use allocation budget."
            )
        elif self.allocation == "budget" and not self.tiers.widths[0] <= bits <= self.tiers.widths[-1]:
            raise ValueError(
                f"Expected `{name}` to lie between the least and the largest of `tiers.widths` "
                f"{list(self.tiers.widths)} with allocation budget but got {bits}; one width for all, or 16 to prune "
                "only, is allocation fixed."
            )
        elif self.allocation == "optimal" and not self.widths[0] <= bits <= self.widths[-1]:
            raise ValueError(
                f"Expected `{name}` to lie between the least and the largest of `optimal.widths` {list(self.widths)}, "
                f"or to be 16 (prune only), but got {bits}."
            )
        elif not 0 < bits <= RAW_BITS:
            raise ValueError(f"Expected `{name}` to be above 0 and at most 16 but got {bits}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Code widths that the allocation chooses from, the narrowest first."""
        if self.allocation == "optimal":
            return (RAW_BITS,) if self.code_bits == RAW_BITS else self.optimal.widths
        return {"threshold": self.threshold.widths, "fixed": WIDTHS}.get(self.allocation, self.tiers.widths)

    @property
    def least_bits_per_weight(self) -> float:
        """Stored bits that no weight can do without under this config, whatever its shape."""
        return self.widths[0] * (1 - self.pattern.fraction) + self._overhead

    @property
    def _overhead(self) -> float:
        """Stored bits per weight for masks, and for scales and zero points of the narrowest width."""
        mask = 1.0 if self.pattern else 0.0
        if self.grid.group_size is None or self.widths[0] in (0, RAW_BITS):
            return mask
        return mask + (self.grid.scale_bits + (0 if self.grid.symmetric else self.widths[0])) / self.grid.group_size

    @property
    def target(self) -> float:
        """The size that was asked for, in whichever unit."""
        size = self.bits_per_weight if self.code_bits is None else self.code_bits
        assert size is not None
        return size

    @property
    def pattern(self) -> Sparsity:
        """The sparsity that all sites have; none with `auto`."""
        return Sparsity() if self.sparsity == AUTO else Sparsity.parse(self.sparsity)

    @property
    def patterns(self) -> tuple[Sparsity, ...]:
        """The patterns to choose from.

        A bitmask costs one bit a weight whatever it says, so n:m, which says less, stores no fewer bytes than
        unstructured sparsity of the same share and loses more: `auto` has no use for it.
        """
        return tuple(map(Sparsity, AUTO_FRACTIONS)) if self.sparsity == AUTO else (self.pattern,)

    @property
    def scored(self) -> bool:
        """Whether the allocation needs importance scores."""
        return self.allocation in SCORED

    @property
    def power(self) -> float:
        """Of the sensitivities in the Hessians."""
        return (0.5 if self.allocation == "optimal" else 0.0) if self.guidance is None else self.guidance

    @property
    def corrected(self) -> float:
        """The share of earlier errors that is made up for."""
        return (0.5 if self.allocation == "optimal" else 0.0) if self.correction is None else self.correction

    @property
    def measured(self) -> bool:
        """Whether statistics of the dense model are needed before bits are given."""
        return self.scored or self.scaled or self.allocation == "optimal"

    @property
    def looks_at_products(self) -> bool:
        """Whether Hessians of the dense model's inputs are needed before bits are given, not only their diagonals."""
        return self.scored or self.allocation == "optimal"

    @property
    def looks_at_channels(self) -> bool:
        """Whether the sizes of single channels are needed before bits are given, beside the Hessians."""
        return self.scored or self.scaled or self.distortion == "signals"

    @property
    def scaled(self) -> bool:
        """Whether channels are scaled before rounding.

        Measured: it helps rounding at every width; with a mask, whose choice it disturbs, it hurts, and with
        guided Hessians it gains nothing more.
        """
        return not self.pattern and not self.power if self.fold_scales is None else self.fold_scales

    @property
    def activation_order(self) -> bool:
        """Whether the largest inputs are swept first within a width.

        Measured: it helps rounding and unstructured masks; n:m masks, which choose among neighbours, it hurts.
        """
        if self.order == "auto":
            return not self.pattern.group_m
        return self.order == "activation"

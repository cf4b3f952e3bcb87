"""How one weight's channels are laid out: segments, groups, panels, and what they cost in bytes.

The layout knows sizes only, no values, so the bytes of a weight are known before it is solved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod

SEGMENT = 32
"""Adjacent channels of one bit width: the unit of storage and of kernels."""

PANEL = 128
"""Most channels that share one choice of mask and one lazy update."""

RAW_BITS = 16
"""The width of a channel that is kept as float16 instead of being quantized."""

LEFT_OUT = 0
"""The width of a channel that is left out: its weights are zero, and nothing is stored for it."""

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Code widths that can be mixed inside one weight."""

LAYOUT_WIDTHS = (LEFT_OUT, *WIDTHS, RAW_BITS)
"""All widths that a segment of a layout can have."""

SCALE_BITS = 4
"""Width of a coded scale (:class:`mpfx.nn.scales.CodedScales`); any other scale is a float16 value of 16 bits."""


@dataclass(frozen=True)
class Span:
    """Channels ``start .. stop-1`` (in sweep order), all ``bits`` wide."""

    start: int
    stop: int
    bits: int

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.stop - self.start

    @property
    def quantized(self) -> bool:
        """Whether the span has a grid: raw float16 channels and those left out have none."""
        return self.bits not in (LEFT_OUT, RAW_BITS)


@dataclass(frozen=True)
class Layout:
    """The channels of one weight in sweep order.

    Args:
        in_features: number of channels.
        widths: bit width of every segment, each one of 1..8, 16 (raw float16) or 0 (left out).
        group_size: channels that share a scale and a zero point per row, a multiple of ``segment``; None: all
            channels of one width do ("row scales").
        segment: channels per entry of ``widths``; the last segment may be shorter.

    Raises:
        ValueError: if the number of widths does not fit ``in_features``, or a width or the group size is impossible.
    """

    in_features: int
    widths: tuple[int, ...]
    group_size: int | None = 64
    segment: int = SEGMENT

    def __post_init__(self) -> None:
        expected = -(-self.in_features // self.segment)
        if self.in_features < 1 or len(self.widths) != expected:
            raise ValueError(
                f"Expected {expected} widths for {self.in_features} channels in segments of {self.segment}"
                f" but got {len(self.widths)}."
            )
        if odd := set(self.widths) - set(LAYOUT_WIDTHS):
            raise ValueError(f"Expected widths in 0..8 or {RAW_BITS} but got {sorted(odd)}.")
        if self.group_size is not None and (self.group_size < 1 or self.group_size % self.segment):
            raise ValueError(
                f"Expected `group_size` to be a positive multiple of {self.segment} but got {self.group_size}."
            )

    @cached_property
    def runs(self) -> tuple[Span, ...]:
        """Longest stretches of equal width."""
        spans, start = [], 0
        for bits, segments in groupby(self.widths):
            stop = min(start + self.segment * len(list(segments)), self.in_features)
            spans.append(Span(start, stop, bits))
            start = stop
        return tuple(spans)

    @cached_property
    def groups(self) -> tuple[Span, ...]:
        """Channels that share a scale and zero per row; a group never mixes widths, so it may end early."""
        return tuple(group for run in self.runs for group in _cut(run, self.group_size or run.channels))

    @cached_property
    def grids(self) -> tuple[Span, ...]:
        """The groups that have a grid."""
        return tuple(group for group in self.groups if group.quantized)

    @cached_property
    def panels(self) -> tuple[Span, ...]:
        """At most 128 channels of one width, whole groups wherever a group fits into a panel."""
        group = self.group_size or PANEL
        size = max(group, PANEL // group * group) if group <= PANEL else PANEL
        return tuple(panel for run in self.runs for panel in _cut(run, size))

    @property
    def code_bits(self) -> float:
        """Average nominal width of a code, over the channels."""
        return sum(run.bits * run.channels for run in self.runs) / self.in_features


def _cut(span: Span, size: int) -> Iterator[Span]:
    for start in range(span.start, span.stop, size):
        yield Span(start, min(start + size, span.stop), span.bits)


def words(count: int, bits: int) -> int:
    """32-bit words that hold ``count`` codes of ``bits`` bits: whole blocks of 32 codes."""
    return -(-count // 32) * bits


@dataclass(frozen=True)
class Bytes:
    """Stored bytes of one weight, part by part; the bases of coded scales count as scales."""

    codes: int
    scales: int
    zeros: int
    mask: int
    widths: int

    @property
    def total(self) -> int:
        """Everything that represents the weight, except the permutation that its input group shares."""
        return self.codes + self.scales + self.zeros + self.mask + self.widths


def scale_shapes(layout: Layout, rows: int, scale_bits: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that hold the scales of a weight ``(rows, in)``, by name.

    Args:
        layout: of its channels.
        rows: output channels.
        scale_bits: 16 for float16 ``scales``, 4 for ``scale_codes`` with the float16 bases ``row_scales`` and
            ``group_scales``.
    """
    grids = len(layout.grids)
    if scale_bits != SCALE_BITS:
        return {"scales": (rows, grids)}
    return {"scale_codes": (grids * words(rows, SCALE_BITS),), "row_scales": (rows,), "group_scales": (grids,)}


def stored_bytes(
    layout: Layout, rows: int, *, symmetric: bool, scale_bits: int = SCALE_BITS, kept: tuple[int, ...] | None = None
) -> Bytes:
    """Count the bytes of a weight ``(rows, in)`` before it exists.

    Args:
        layout: of its channels.
        rows: output channels.
        symmetric: whether the grids need no stored zero points.
        scale_bits: width of the stored scales, 4 (coded) or 16.
        kept: surviving weights of every run of ``layout.runs`` under a bitmask (none of a run that is left out); None:
            no mask.
    """
    if kept is None:
        codes = sum(rows * words(run.channels, run.bits) for run in layout.runs)
    else:
        widths = sorted({run.bits for run in layout.runs})
        counts = {b: sum(k for k, run in zip(kept, layout.runs, strict=True) if run.bits == b) for b in widths}
        codes = sum(words(count, bits) for bits, count in counts.items())
    scales = scale_shapes(layout, rows, scale_bits)
    return Bytes(
        codes=4 * codes,
        scales=sum(prod(shape) * (4 if name == "scale_codes" else 2) for name, shape in scales.items()),
        zeros=0 if symmetric else 4 * sum(words(rows, group.bits) for group in layout.grids),
        mask=0 if kept is None else 4 * rows * len(layout.widths),
        widths=len(layout.widths),
    )


def permutation_bytes(in_features: int) -> int:
    """Bytes of one stored permutation of the channels."""
    return in_features * (2 if in_features <= 1 << 16 else 4)

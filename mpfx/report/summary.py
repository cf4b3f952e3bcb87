"""What a run did, as a table and as JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One compressed Linear.

    Attributes:
        path: of the module.
        bits_per_weight: stored bits, its share of the group's permutation included.
        code_bits: average nominal width over its channels.
        sparsity: share of its weights that are pruned.
        relative_error: squared error of its output on the calibration data over the squared output.
        damping: fraction of the mean diagonal that its Hessian needed.
        fallback: what had to be done otherwise than asked; None where nothing had to.
    """

    path: str
    bits_per_weight: float
    code_bits: float
    sparsity: float
    relative_error: float
    damping: float
    fallback: str | None


@dataclass(frozen=True, kw_only=True)
class AllocationReport:
    """What allocation `optimal` found.

    Attributes:
        distortion: estimated increase of the loss, up to a factor that the whole model shares.
        bound: no plan within the budget has less.
        gap: how far the distortion may be from the best possible, relative to it.
        budget_bytes: that the plans had to keep; None where the code bits were given.
        stored_bytes: that the plans take; masked codes are counted at most.
        left_out: input channels that are left out, of all input groups.
        channels: input channels of all input groups.
        sparsity: pattern of every site, by path, with sparsity `auto`; else empty.
    """

    distortion: float
    bound: float
    gap: float
    budget_bytes: int | None
    stored_bytes: int
    left_out: int
    channels: int
    sparsity: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run.

    Attributes:
        model: what was compressed.
        perplexity: "dense" and "compressed", on the evaluation text.
        bits_per_weight: stored bits per compressed weight, everything counted.
        code_bits: average nominal width over the compressed weights.
        sparsity: share of the compressed weights that are pruned.
        bytes: "dense" and "compressed": of all weight tensors of the model.
        seconds: by stage, and "total".
        peak_memory_bytes: of the process, or of the accelerator if there is one.
        sites: one entry per compressed Linear.
        allocation: distortion and gap, with allocation `optimal`; else None.
        left_dense: Linears that stay as they are, with the reason.
        notes: what the user should know besides, such as a size that the tiers overruled.
        config: what was asked.
    """

    model: str
    perplexity: Mapping[str, float]
    bits_per_weight: float
    code_bits: float
    sparsity: float
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    sites: Sequence[SiteReport]
    allocation: AllocationReport | None = None
    left_dense: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_json()`` to a file, at once or not at all."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")
        temporary.replace(target)

    def print(self, console: Console) -> None:
        """Print the run in a table, its worst sites, and its notes."""
        console.print(f"mpfx: {self.model}", highlight=False)
        console.print(self._summary())
        console.print(f"largest relative output errors of {len(self.sites)} sites, with their bits", highlight=False)
        console.print(self._worst())
        if fallen := [site for site in self.sites if site.fallback]:
            first = f"{fallen[0].path}: {fallen[0].fallback}"
            console.print(f"[yellow]{len(fallen)} sites needed a fallback[/yellow], such as {first}")
        for note in self.notes:
            console.print(f"[yellow]note:[/yellow] {escape(note)}")

    def _summary(self) -> Table:
        dense, compressed = self.perplexity["dense"], self.perplexity["compressed"]
        table = Table()
        for name in ("", "dense", "compressed", "ratio"):
            table.add_column(name, justify="left" if not name else "right")
        table.add_row("perplexity", f"{dense:.3f}", f"{compressed:.3f}", f"{compressed / dense:.3f}")
        size = self.bytes["dense"], self.bytes["compressed"]
        table.add_row("bytes", f"{size[0]:,}", f"{size[1]:,}", f"{size[1] / size[0]:.3f}")
        table.add_row("stored bits per weight", "", f"{self.bits_per_weight:.3f}", "")
        table.add_row("code bits", "", f"{self.code_bits:.3f}", "")
        table.add_row("sparsity", "", f"{self.sparsity:.3f}", "")
        if self.allocation is not None:
            table.add_row("gap to the best allocation", "", f"{self.allocation.gap:.2%}", "")
            left_out = f"{self.allocation.left_out:,} of {self.allocation.channels:,}"
            table.add_row("input channels left out", "", left_out, "")
        table.add_row("seconds", "", f"{self.seconds['total']:.1f}", "")
        table.add_row("peak memory, bytes", "", f"{self.peak_memory_bytes:,}", "")
        return table

    def _worst(self, count: int = 5) -> Table:
        table = Table()
        for name in ("site", "stored", "code", "sparsity", "error"):
            table.add_column(name, justify="left" if name == "site" else "right", overflow="fold")
        for site in sorted(self.sites, key=lambda site: -site.relative_error)[:count]:
            numbers = (f"{site.bits_per_weight:.3f}", f"{site.code_bits:.2f}", f"{site.sparsity:.3f}")
            table.add_row(site.path, *numbers, f"{site.relative_error:.5f}")
        return table

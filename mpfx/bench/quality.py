"""The table that the defaults rest on: each of them against its alternatives, on one model and one calibration."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mpfx.report import markdown
from mpfx.search import (
    HEAD,
    Outcome,
    Search,
    result_cells,
    results_folder,
    run_all,
    save_search,
    short,
    variant,
)
from mpfx.search import plot as plot_search

BITS = (4.35, 3.34, 2.80)
"""Stored bits at which the rows with a size are run."""

_NEAR = 0.1  # stored bits by which a plain GPTQ may be smaller than the size that it is compared at


@dataclass(frozen=True)
class BenchRow:
    """Some fields that differ from the base config.

    Attributes:
        name: of the row.
        fields: by dotted name.
        sized: whether it is run at every size; else its fields give one.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True


def _gptq(bits: int) -> BenchRow:
    fields = {"allocation": "fixed", "code_bits": bits, "fold_scales": False, "grid.scale_bits": 16}
    return BenchRow(f"GPTQ {bits}", fields, sized=False)


def _sparse(name: str, code_bits: int, sparsity: str, **fields: Any) -> BenchRow:
    return BenchRow(name, {"code_bits": code_bits, "sparsity": sparsity, **fields}, sized=False)


QUALITY: tuple[BenchRow, ...] = (
    _gptq(4),
    _gptq(3),
    BenchRow("optimal"),
    BenchRow("guidance 0", {"guidance": 0.0}),
    BenchRow("guidance 1", {"guidance": 1.0}),
    BenchRow("correction 0", {"correction": 0.0}),
    BenchRow("scale_bits 16", {"grid.scale_bits": 16}),
    BenchRow("group_size 32", {"grid.group_size": 32}),
    BenchRow("group_size 128", {"grid.group_size": 128}),
    BenchRow("order natural", {"order": "natural"}),
    BenchRow("damping 0.1", {"damping": 0.1}),
    BenchRow("uniform", {"optimal.uniform": True}),
    BenchRow("five signals, fitted", {"distortion": "signals"}),
    BenchRow("five signals, fitted, guidance 0", {"distortion": "signals", "guidance": 0.0}),
    BenchRow("founding budget", {"allocation": "budget"}),
    BenchRow("founding threshold", {"allocation": "threshold", "code_bits": 4}, sized=False),
    BenchRow("founding quantile", {"allocation": "quantile", "code_bits": 4}, sized=False),
    BenchRow("sparsity auto", {"sparsity": "auto"}),
    *(
        row
        for bits in (16, 4)
        for row in (
            _sparse(f"half pruned, {bits} bits", bits, "0.5"),
            _sparse(f"half pruned, {bits} bits, refine 0", bits, "0.5", refine=0),
            _sparse(f"half pruned, {bits} bits, correction 0", bits, "0.5", correction=0.0),
            _sparse(f"half pruned, {bits} bits, guidance 1", bits, "0.5", guidance=1.0),
        )
    ),
    _sparse("2:4, 16 bits", 16, "2:4"),
    _sparse("2:4, 4 bits", 4, "2:4"),
)
"""What `mpfx bench quality` runs."""


def chosen_rows(patterns: Sequence[str], rows: Sequence[BenchRow] = QUALITY) -> list[BenchRow]:
    """The rows whose names match one of some patterns; all without any.

    Raises:
        ValueError: if a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise ValueError(f"Expected `rows` to match rows but {pattern!r} matches none of {[r.name for r in rows]}.")
    return [row for row in rows if not patterns or any(fnmatchcase(row.name, p) for p in patterns)]


def bench(
    base: Mapping[str, Any],
    rows: Sequence[BenchRow],
    output: Path,
    *,
    bits: Sequence[float] = BITS,
    also: Sequence[str] = (),
    on_row: Callable[[str], None] = lambda text: None,
) -> Search:
    """Run rows; write ``bench.json`` and ``bench.md`` after each one.

    Args:
        base: fields of the config, nested.
        rows: to run.
        output: folder.
        bits: sizes of the rows that have none of their own.
        also: further texts to measure on.
        on_row: called with one line about every row that is done.

    Raises:
        ValueError: for a model, text or folder that will not do, before anything runs.
    """
    results_folder(output, "bench.json")
    sizes: list[tuple[BenchRow, dict[str, Any]]] = []
    for row in rows:
        sizes += [(row, {"bits_per_weight": b}) for b in bits] if row.sized else [(row, {})]
    variants = [variant(base, row.name, {**size, **row.fields}) for row, size in sizes]

    def save(search: Search) -> None:
        save_search(to_json(search), output / "bench.json")
        (output / "bench.md").write_text(markdown(*cells(search)), encoding="utf-8")
        on_row(", ".join(filter(None, cells(search)[1][-1])))

    return run_all(variants, also, save)


def excess(search: Search, outcome: Outcome, text: str) -> float | None:
    """Harm next to what plain GPTQ does at the same size: 0 the dense model, 1 as bad as GPTQ.

    None where there is no GPTQ row that is as large as the row, or a little smaller.
    """
    if outcome.result is None:
        return None
    asked = outcome.variant.fields.get("bits_per_weight")
    size = outcome.result.bits_per_weight if asked is None else float(asked)
    near = [
        other.result
        for other in search.outcomes
        if other.variant.name.startswith("GPTQ")
        and other.result is not None
        and 0 <= size + 1e-9 - other.result.bits_per_weight <= _NEAR
    ]
    if not near:
        return None
    harm = max(near, key=lambda result: result.bits_per_weight).perplexity[text] - search.dense[text]
    found = outcome.result.perplexity[text] - search.dense[text]
    return found / harm if harm > 0 and math.isfinite(harm) else None


def to_json(search: Search) -> dict[str, Any]:
    """Plain data, with the excess of every row by text."""
    data = search.to_json()
    for row, outcome in zip(data["rows"], search.outcomes, strict=True):
        row["excess"] = {text: excess(search, outcome, text) for text in search.dense}
    return data


def cells(search: Search) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    texts = [part for text in search.dense for part in (f"perplexity {short(text)}", "ratio")]
    beyond = [f"excess {short(text)}" for text in search.dense]
    rows = []
    for outcome in search.outcomes:
        asked = str(outcome.variant.fields.get("bits_per_weight", ""))
        numbers = [excess(search, outcome, text) for text in search.dense]
        shown = ["" if number is None else f"{number:.3f}" for number in numbers]
        rows.append([outcome.variant.name, asked, *shown, *result_cells(search, outcome)])
    return ["row", "asked", *beyond, *HEAD, *texts, "gap", "seconds", "problem"], rows


def plot(search: Search, path: Path) -> str | None:
    """Draw perplexity against stored bits, one line per row, plain GPTQ of all widths as one.

    Returns:
        Why there is no picture; None if there is one.
    """
    return plot_search(search, path, lambda variant: re.sub(r"^GPTQ \d+$", "GPTQ", variant.name))

"""The report's table and JSON."""

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mpfx.report import (
    AllocationReport,
    Line,
    Report,
    SiteReport,
    markdown,
    peak_memory_bytes,
    plot_sizes,
    table,
)


def report(fallback: str | None = None) -> Report:
    sites = [
        SiteReport(
            path=f"layers.{i}",
            bits_per_weight=4.33,
            code_bits=4.0,
            sparsity=0.0,
            relative_error=0.01 * i,
            damping=0.01,
            fallback=fallback if i == 3 else None,
        )
        for i in range(8)
    ]
    return Report(
        model="m",
        perplexity={"dense": 10.0, "compressed": 11.0},
        bits_per_weight=4.33,
        code_bits=4.0,
        sparsity=0.0,
        bytes={"dense": 4000, "compressed": 1000},
        seconds={"total": 1.5},
        peak_memory_bytes=123456,
        sites=sites,
        notes=["the tiers set the size"],
    )


def printed(shown: Report) -> str:
    file = io.StringIO()
    shown.print(Console(file=file, width=100))
    return file.getvalue()


def test_the_table_shows_what_counts() -> None:
    text = printed(report())
    for part in ("10.000", "11.000", "1.100", "4,000", "0.250", "4.330", "123,456", "the tiers set the size"):
        assert part in text
    assert text.index("layers.7") < text.index("layers.6")  # the largest error first
    assert "layers.2" not in text
    assert "fallback" not in text


def test_fallbacks_are_never_silent() -> None:
    assert "layers.3: more damping" in printed(report("more damping"))


def test_json_round_trip(tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == json.loads(json.dumps(report().to_json()))
    assert set(data["sites"][0]) == {
        *("path", "bits_per_weight", "code_bits", "sparsity", "relative_error", "damping", "fallback")
    }


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**24)  # as many bytes again, and a little
    assert peak_memory_bytes(torch.device("cpu")) >= before + 2**25
    del held


def test_the_table_shows_gap_and_channels_left_out() -> None:
    found = AllocationReport(
        distortion=1.01, bound=1.0, gap=0.01, budget_bytes=1000, stored_bytes=999, left_out=64, channels=4096
    )
    text = printed(replace(report(), allocation=found))
    assert "1.00%" in text
    assert "64 of 4,096" in text
    assert replace(report(), allocation=found).to_json()["allocation"]["gap"] == 0.01
    assert "gap" not in printed(report())


def test_rows_as_tables() -> None:
    file = io.StringIO()
    Console(file=file, width=80).print(table(["row", "n"], [["a", "1"], ["[b]", "2"]]))
    assert "[b]" in file.getvalue()
    lines = markdown(["row", "n"], [["a|b", "1\n2"]]).splitlines()
    assert lines == ["| row | n |", "| --- | --- |", r"| a\|b | 1 2 |"]


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert plot_sizes([Line("a", [(3, 20.0), (2, 30.0)])], 10.0, tmp_path / "x.png") is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    note = plot_sizes([], 10.0, tmp_path / "y.png")
    assert note is not None
    assert "mpfx[plots]" in note
    assert not (tmp_path / "y.png").exists()

"""The report's table and JSON."""

import io
import json
from pathlib import Path

import torch
from rich.console import Console

from mpfx.report import Report, SiteReport, peak_memory_bytes


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

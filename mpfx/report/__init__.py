"""What a run tells."""

from mpfx.report.memory import peak_memory_bytes, reset_peak_memory
from mpfx.report.plots import Line, plot_sizes
from mpfx.report.summary import AllocationReport, Report, SiteReport
from mpfx.report.tables import markdown, table

__all__ = [
    "AllocationReport",
    "Line",
    "Report",
    "SiteReport",
    "markdown",
    "peak_memory_bytes",
    "plot_sizes",
    "reset_peak_memory",
    "table",
]

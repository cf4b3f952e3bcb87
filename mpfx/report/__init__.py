"""What a run tells."""

from mpfx.report.memory import peak_memory_bytes
from mpfx.report.summary import Report, SiteReport

__all__ = ["Report", "SiteReport", "peak_memory_bytes"]

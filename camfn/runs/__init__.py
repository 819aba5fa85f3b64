"""Maps of whole datasets: one format, resumed where it ended, on one machine or a cluster."""

from camfn.runs.converting import convert
from camfn.runs.reading import failures, read
from camfn.runs.rows import Row
from camfn.runs.run import Summary, run

__all__ = ["Row", "Summary", "convert", "failures", "read", "run"]

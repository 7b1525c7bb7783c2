"""What a run was, for people and for other programs: a page, a trace for Perfetto, JUnit and JSON.

All of it is made from the trace, the console and the ledger's verdict. Nothing here runs anything.
"""

from viommu.report.run import Run
from viommu.report.timeline import Timeline, build

__all__ = ["Run", "Timeline", "build"]

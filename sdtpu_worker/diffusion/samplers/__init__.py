"""Every sampler as rows of coefficients for one compiled program; see `table` for what a row does.

`NoiseSchedule.from_config` reads a scheduler config strictly, `make_table` makes the rows of a job. A new sampler is a
function from options and a number of steps to rows, a table of its options (`options.py`), a line in `METHODS`
(`schedule.py`) and its names (`contract/samplers.py`).
"""

from sdtpu_worker.diffusion.samplers.schedule import METHODS, NoiseSchedule, make_table
from sdtpu_worker.diffusion.samplers.table import COLUMNS, CoefficientTable, step_reference

__all__ = ["COLUMNS", "METHODS", "CoefficientTable", "NoiseSchedule", "make_table", "step_reference"]

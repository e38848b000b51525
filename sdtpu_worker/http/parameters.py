"""The fields of a job in the door's APIs: the parameters of `generate` and the options that a caller may choose."""

from __future__ import annotations

import dataclasses

from sdtpu_worker.contract.request import GenerationRequest

PARAMETERS = tuple(field.name for field in dataclasses.fields(GenerationRequest))
"""Of `sdtpu_worker.generate`."""
OPTIONS = ("priority", "expires")
"""Of `apply_async`; `expires` in seconds."""
JOB_FIELDS = (*PARAMETERS, "tenant", *OPTIONS)

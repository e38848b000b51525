"""Attention: the one seam that every model goes through, and what stands behind it on each platform."""

from sdtpu_worker.models.attention.layer import Attention
from sdtpu_worker.models.attention.plain import attention, merge_attentions, merge_heads, split_heads
from sdtpu_worker.models.attention.selection import Selection, selecting
from sdtpu_worker.models.attention.table import AUTO, Implementation, check_wanted

__all__ = [
    "AUTO",
    "Attention",
    "Implementation",
    "Selection",
    "attention",
    "check_wanted",
    "merge_attentions",
    "merge_heads",
    "selecting",
    "split_heads",
]

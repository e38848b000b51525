"""Attention: the one seam that every model goes through, and what stands behind it on each platform."""

from sdtpu_worker.models.attention.layer import Attention
from sdtpu_worker.models.attention.plain import attention, merge_attentions, merge_heads, split_heads

__all__ = ["Attention", "attention", "merge_attentions", "merge_heads", "split_heads"]

"""Exact reuse: the stored picture of a finished job answers an equal one, and equal jobs in flight are drawn once."""

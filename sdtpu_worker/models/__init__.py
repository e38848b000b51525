"""Flax modules of the models: arrays in, arrays out; no files, no devices, no jobs.

`Network` shows a module as a plain function over a flat dictionary of parameters, keyed by PyTorch's tensor names.
`networks.py` builds one for each part of a checkpoint from its config. Nothing outside this package knows NNX.
"""

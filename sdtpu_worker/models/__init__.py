"""The networks, as Flax NNX modules: arrays in, arrays out. Their parameters are named as PyTorch's."""

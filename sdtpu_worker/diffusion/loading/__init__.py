"""Read people's weights into parameters named as in PyTorch: folders, single files, LoRAs; never a pickle.

`tensors.py` is what all share, `safetensors_file.py` and `flax_layout.py` read files, `part_files.py` finds them in a
folder, `single_file.py` takes one original-layout file apart, `fit.py` accounts for every tensor, `load.py` casts,
`lora.py` merges LoRAs on the way, which `lora_files.py` finds and `lora_names.py` understands.
"""

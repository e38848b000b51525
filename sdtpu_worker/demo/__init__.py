"""The shipped tiny checkpoint, the scripts that made it, and `sdtpu demo`."""

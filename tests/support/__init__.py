"""What tests of more than one room use; what one room alone uses stands in that room.

Nothing here loads JAX before a fixture asks for it, so that `pytest tests/unit` works where JAX is not installed.
"""

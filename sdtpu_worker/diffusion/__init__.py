"""The device side in JAX: checkpoints, samplers, compiled and sharded programs, the engine. Never imports Celery."""

import os

# Both libraries warn at import and at every call that their Flax classes will go; pyproject.toml bounds the versions.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

"""The device side: checkpoints, samplers and compiled, sharded programs. Never imports Celery."""

import os

# Both libraries announce at import and at every call that their Flax classes will go; pyproject.toml bounds them.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

"""The device side: checkpoints, samplers and compiled, sharded programs. Never imports Celery."""

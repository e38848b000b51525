"""Values for the ready-made app (`celery -A sdtpu_worker.app worker`), and nothing else.

`CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND` and `SDTPU_*` in the environment go before what stands here.
"""

broker_url = "redis://localhost:6379/0"
result_backend = "redis://localhost:6379/0"
result_expires = 24 * 3600  # seconds; images in Redis expire with the results
accept_content = ["json"]

sdtpu_model = "embedded"
sdtpu_platform = "auto"
sdtpu_cpu_devices = 8
sdtpu_slots_per_device = 1
sdtpu_tick_s = 0.1
sdtpu_image_store = "redis"

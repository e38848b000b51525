"""The jobs API in a Django project: `"sdtpu_worker.contrib.django"` in `INSTALLED_APPS`, with the extra `django`."""

"""The jobs API inside web apps: `sdtpu_worker.contrib.flask` and `sdtpu_worker.contrib.django`."""

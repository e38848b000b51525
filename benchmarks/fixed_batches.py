"""Our own worker with the policy of `fixed_policy.py`, for comparison.

celery -A benchmarks.fixed_batches:bucketed worker -Q sdtpu
celery -A benchmarks.fixed_batches:mixed worker -Q sdtpu
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from celery import Celery

from benchmarks.fixed_policy import BATCHES_HELD, FixedBatches
from sdtpu_worker import install
from sdtpu_worker.config import Config
from sdtpu_worker.contract.queues import DEFAULT_QUEUE
from sdtpu_worker.device_loop.protocols import ServingEngine
from sdtpu_worker.worker.pool import DevicePool
from sdtpu_worker.worker.services import DeviceServices


class BucketedPool(DevicePool):
    bucketed = True

    @classmethod
    def make_policy(cls, engine: ServingEngine, config: Config) -> FixedBatches:
        return FixedBatches(engine.costs, engine.info.slots_per_device, engine.info.phases_per_tick, cls.bucketed)

    def serve(self, services: DeviceServices) -> None:
        super().serve(services)
        assert services.serving is not None
        self.limit = BATCHES_HELD * services.serving.engine.info.num_slots
        self.executor = ThreadPoolExecutor(self.limit, thread_name_prefix="sdtpu-job")


class MixedPool(BucketedPool):
    bucketed = False


def make_app(name: str, pool: type) -> Celery:
    app = Celery(name, set_as_current=False)
    app.conf.update(worker_pool=f"{__name__}:{pool.__name__}", task_default_queue=DEFAULT_QUEUE)
    return install(app)


bucketed = make_app("bucketed", BucketedPool)
mixed = make_app("mixed", MixedPool)

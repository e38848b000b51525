"""The histories find the faults that delivery once had: each is put back, and found within a thousand seeds.

    python -m pytest tests/histories/test_mutations.py -n 0 -rP    # prints the smallest history of each

So the harness cannot rot: a step that is drawn no more, or a check that holds no more, lets a fault pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from celery.worker.request import Request
from redis.exceptions import ConnectionError as RedisConnectionError

from sdtpu_worker.delivery import wake_up
from sdtpu_worker.delivery.claim_schedule import SAFETY_POLL_S, ClaimSchedule
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.delivery.qos import Intake
from sdtpu_worker.device_loop.submission import Submission
from sdtpu_worker.worker.celery_request import DeviceRequest
from sdtpu_worker.worker.services import DeviceServices
from tests.histories import jobs, worker
from tests.histories.history import draw
from tests.histories.servers import VirtualConnection
from tests.histories.test_device_loop import draw as draw_device
from tests.histories.test_device_loop import outcome as device_outcome
from tests.histories.test_device_loop import quiet  # noqa: F401  # a fixture
from tests.histories.test_device_loop import shrink as shrink_device
from tests.histories.test_histories import outcome, report
from tests.histories.world import World

pytestmark = pytest.mark.timeout(600)

_Patch = pytest.MonkeyPatch


def take_every_queue_for_a_task_queue(patch: _Patch) -> None:
    """As before 81e55d7: replies among workers were claimed, and dead-lettered as no jobs."""

    def of_all_queues(**options: Any) -> Intake:
        return dataclasses.replace(Intake(**options), is_task_queue=lambda queue: True)

    patch.setattr(worker, "Intake", of_all_queues)


def stay_with_the_first_server(patch: _Patch) -> None:
    """As before f4b3e25: leases and acknowledgements went to the first server of `broker_url`."""
    patch.setattr(DeviceServices, "_follow", lambda self, connection: None)


def expire_jobs_that_had_their_slot(patch: _Patch) -> None:
    """As before 9886313: Celery's own look at `expires`, on every worker anew."""
    patch.setattr(DeviceRequest, "maybe_expire", lambda self: bool(Request.maybe_expire(self)))


def forget_slots_without_a_snapshot(patch: _Patch) -> None:
    """A job that is handed over before it has a state to keep: nobody knew that it had its slot."""
    patch.setattr(jobs.Job, "remember_slot", lambda self: None)


def sweep_whatever_the_clocks_say(patch: _Patch) -> None:
    """As before 8a79766: workers that were paused together took each other's jobs."""

    def look(self: Any, now: float, redis_time: float) -> None:
        self._unbroken_until = redis_time + 1e9

    patch.setattr(Lease, "_look_at_clocks", look)


def lose_the_consumer_with_the_wake_up(patch: _Patch) -> None:
    """As before ef5b863: a wake-up connection that was lost took the whole consumer with it."""
    _raise_where_the_wake_up_is_lost(patch, lambda connection: True)


def _raise_where_the_wake_up_is_lost(patch: _Patch, matters: Callable[[VirtualConnection], bool]) -> None:
    read = wake_up.WakeUp.read

    def read_or_raise(self: Any) -> None:
        read(self)
        if self._connection._sock is None and matters(self._connection):
            raise RedisConnectionError("the connection on which Redis says that jobs arrive was closed")

    patch.setattr(wake_up.WakeUp, "read", read_or_raise)


def wake_up_without_subscribing(patch: _Patch) -> None:
    """As before ef5b863, with version 3 of the protocol: Redis takes the connection for an idle one."""
    ask = wake_up._ask

    def connect(self: Any) -> None:
        if self._connection is None:
            self._connection = self._channel.client.connection_pool.get_connection()
        self._connection.connect()
        self._connection_id = ask(self._connection, "CLIENT", "ID")
        self._connection._sock.setblocking(False)
        self._join_event_loop(self._connection)

    patch.setattr(wake_up.WakeUp, "_connect", connect)
    _raise_where_the_wake_up_is_lost(patch, lambda connection: not connection.is_broken)


def forget_notices_while_a_claim_is_in_flight(patch: _Patch) -> None:
    """As before the claims' schedule had a name: the empty reply of a claim set the next one a second ahead."""

    def on_empty(self: Any, now: float, is_told: bool) -> float:
        self._at = now + SAFETY_POLL_S
        return SAFETY_POLL_S

    patch.setattr(ClaimSchedule, "on_empty", on_empty)


FAULTS = [
    take_every_queue_for_a_task_queue,
    stay_with_the_first_server,
    expire_jobs_that_had_their_slot,
    forget_slots_without_a_snapshot,
    sweep_whatever_the_clocks_say,
    lose_the_consumer_with_the_wake_up,
    wake_up_without_subscribing,
    forget_notices_while_a_claim_is_in_flight,
]


def test_a_job_that_expires_in_its_second_try_is_found(monkeypatch: _Patch):
    """As before 9886313, in the device loop: it had its slot in time, and its device failed."""
    retry = Submission.retry

    def retry_and_expire(self: Submission) -> None:
        terms = self.terms
        retry(self)
        self.terms = terms

    monkeypatch.setattr(Submission, "retry", retry_and_expire)
    found = next((seed for seed in range(4_000) if "slot in time" in (device_outcome(draw_device(seed)) or "")), None)
    assert found is not None, "no history breaks"
    print(found, shrink_device(draw_device(found)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault: Callable[[_Patch], None], new_world: Callable[[], World], monkeypatch: _Patch):
    fault(monkeypatch)
    for seed in range(1_000):
        if (error := outcome(draw(seed), new_world)) is not None:
            print(report(seed, draw(seed), error, new_world))
            return
    pytest.fail("no history breaks")

"""How long a message lies in Redis before an idle worker has it: this package's transport beside stock kombu's.

    python benchmarks/pickup.py [--messages 1000] [--every-ms 20]

Needs `pip install -e '.[demo]'`; about a minute. Each message is alone: the next one is sent after a pause between
nothing and twice `--every-ms`. A process of its own sends with an ordinary Celery client; the consumer
runs kombu's event loop, as a worker does. Ours claims and records a message in one script; where Redis does not tell
of new messages (`--polled`) it looks every 10 ms. Prints in ms, from the call that sends to
the callback that receives: median, 99th percentile, the longest, and how many took over 100 ms more than the median.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from typing import Any

import redis
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub, set_event_loop

from sdtpu_worker.delivery import transport, wake_up
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.qos import Intake
from sdtpu_worker.testing.processes import private_redis

LATE_MS = 100
"""A message is late when it takes so much longer than the median."""
SEND = """
import random, sys, time
from celery import Celery
url, messages, every_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
app = Celery(broker=url)
app.send_task("t", queue="pickup", ignore_result=True)
for _ in range(messages):
    time.sleep(random.uniform(0, 2 * every_s))
    app.send_task("t", queue="pickup", ignore_result=True, headers={"sent_at": time.time()})
"""


def use_ours(url: str) -> contextlib.AbstractContextManager[None]:
    """Make kombu's Redis transport in this process ours meanwhile."""
    deliveries = Deliveries(lambda: redis.Redis.from_url(url), Keys(), 30, "benchmark")
    return transport.installed(
        Intake(deliveries, {"pickup"}.__contains__, {"t"}, 262_144, 30, print, lambda: True, lambda _: None)
    )


def measure(url: str, messages: int, every_s: float) -> list[float]:
    """Return every message's time on the way in ms."""
    hub, delays = Hub(), []
    set_event_loop(hub)

    def on_message(message: Any) -> None:
        if "sent_at" in message.headers:
            delays.append(1000 * (time.time() - message.headers["sent_at"]))
        message.ack()

    sender = subprocess.Popen([sys.executable, "-c", SEND, url, str(messages), str(every_s)])
    with Connection(url) as connection:
        connection.transport.register_with_event_loop(connection.connection, hub)
        consumer = Consumer(connection.default_channel, [Queue("pickup")], on_message=on_message, accept=["json"])
        with consumer:
            loop, deadline = hub.create_loop(), time.monotonic() + 60 + 2 * messages * every_s
            while len(delays) < messages and time.monotonic() < deadline:
                next(loop)
    sender.wait()
    return delays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--every-ms", type=float, default=20)
    parser.add_argument("--polled", action="store_true", help="as if Redis did not tell of new messages")
    args = parser.parse_args()
    if args.polled:
        wake_up.WakeUp.track = lambda self, claims, now: None  # type: ignore[method-assign]  # as if Redis refused
    for name in ("stock kombu", "ours"):
        with private_redis() as url:
            with use_ours(url) if name == "ours" else contextlib.nullcontext():
                delays = sorted(measure(url, args.messages, args.every_ms / 1000))
        median = statistics.median(delays)
        late = sum(delay > median + LATE_MS for delay in delays)
        print(
            f"{name:12} median {median:5.1f} ms, 99 % within {delays[-len(delays) // 100]:5.1f} ms,"
            f" the longest {delays[-1]:6.1f} ms, {late} of {len(delays)} late"
        )


if __name__ == "__main__":
    main()

"""A real Prometheus that scrapes a real door: what the autoscaler asks is answered while no worker is up."""

from __future__ import annotations

import pytest
import yaml

from sdtpu_worker import generate
from sdtpu_worker.contract.load_report import WorkerLoad, publish_load
from sdtpu_worker.contract.queues import plain_client
from tests.http.doors import keys, start_door
from tests.observe.prometheus import alerts, find_program, running_prometheus
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

SCALED_OBJECT = ROOT / "deploy" / "kubernetes" / "components" / "keda" / "scaled-object.yaml"

pytestmark = pytest.mark.timeout(240)


def test_the_autoscaler_and_the_alerts_have_what_they_ask_from_the_door_alone(redis_url, app, tmp_path):
    find_program("prometheus")
    (trigger,) = yaml.safe_load(SCALED_OBJECT.read_text())["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    (unserved,) = [alert["expr"] for alert in alerts() if alert["alert"] == "SdtpuNoWorkerConsumes"]
    settings = {"SDTPU_HTTP_KEYS": keys(ann=""), "SDTPU_HTTP_METRICS_KEYS": keys(prom="")}
    with start_door(redis_url, tmp_path, **settings) as door:
        target = door.url.removeprefix("http://")
        with running_prometheus(tmp_path / "prometheus", {"door": [target]}, key="sk-prom") as prometheus:

            def load() -> list[float]:
                return [float(each["value"][1]) for each in prometheus.query(query)]

            wait_until(lambda: load() == [0.0], "an empty queue to be a zero, and not nothing")
            for tenant in ("a", "b", None):
                generate.apply_async(("x",), {"tenant": tenant}, priority=9)
            with door.client("sk-ann") as client:
                assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 202
            wait_until(lambda: load() == [4.0], "the jobs of all tenants and priorities to be counted")
            wait_until(lambda: prometheus.query(unserved), "an alert")
            wait_until(lambda: prometheus.query("max by (queue) (sdtpu_oldest_request_seconds)"), "an age")
            with app.connection_for_write() as connection:
                redis, prefix = plain_client(connection.default_channel.client)
                publish_load(redis, "sdtpu", WorkerLoad("tpu-1", 8, {"8x8": 0.1}, 5.0, {}, 2.0), prefix, ttl_s=600)
            wait_until(lambda: prometheus.query("sdtpu_queue_wait_estimate_seconds"), "the ETA of a new job")
            wait_until(lambda: not prometheus.query(unserved), "no alert")

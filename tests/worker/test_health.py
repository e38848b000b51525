"""The verdicts on a worker in virtual time, and the endpoint that tells them, with clients of every kind."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from sdtpu_worker.cli import sdtpu
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.operations import health_http
from sdtpu_worker.operations.health import Check, WorkerHealth
from sdtpu_worker.operations.health_http import HealthServer, ask_health
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

FINE = [Check("device", True, "on time")]


class Worker:
    """Facts to turn, and a clock."""

    def __init__(self, lease_s: float = 30, stall_s: float = 60) -> None:
        self.now, self.alive, self.late_s = 1000.0, True, 0.0
        self.health = WorkerHealth(lease_s, stall_s, lambda: self.now, process_s=0.75)

    def start(self) -> Worker:
        self.lost: list[int] = []
        self.health.watch_device(lambda: self.alive, lambda: self.late_s, lambda: self.lost)
        self.health.watch_redis()
        self.health.on_consume()
        self.health.watch_event_loop()
        return self

    def run(self, seconds: int, beats: bool = True, contacts: bool = True) -> None:
        for _ in range(seconds):
            self.now += 1
            if beats:
                self.health.beat()
            if contacts:
                self.health.contact()

    @property
    def live(self) -> list[str]:
        return failing(self.health.live())

    @property
    def ready(self) -> list[str]:
        return failing(self.health.ready())


def failing(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def test_a_worker_that_compiles_lives_and_is_not_ready():
    worker = Worker()
    worker.run(600, beats=False, contacts=False)
    assert (worker.live, worker.ready) == ([], ["serving"])
    worker.start()
    assert (worker.live, worker.ready) == ([], [])


def test_a_worker_that_starts_says_what_it_is_at_and_for_how_long():
    worker = Worker()
    for phase in ("loading the checkpoint", "compiling"):
        worker.health.enter(phase)
        worker.run(73, beats=False, contacts=False)
        for checks in (worker.health.live(), worker.health.ready()):
            assert checks[0].detail == f"starting: {phase}, for 73 s"
    assert (worker.live, worker.ready) == ([], ["serving"])


def test_how_long_each_phase_of_the_start_took_is_known_by_short_names():
    worker = Worker()
    worker.now += 2
    for phase in ("importing JAX", "loading or compiling programs for 1 slots per device", "warming up a robot"):
        worker.health.enter(phase)
        worker.now += 5
    worker.health.enter("loading or compiling programs for 2 slots per device")
    worker.now += 1
    phases = {"process": 0.75, "settings": 2, "import": 5, "programs": 6, "other": 5}
    assert worker.health.start_s() == phases
    worker.start()
    worker.run(100)
    assert worker.health.start_s() == phases
    text = "started in 18.8 s (process 0.8, settings 2.0, import 5.0, programs 6.0, other 5.0)"
    assert worker.health.ready()[0] == Check("serving", True, text)


def test_a_process_knows_its_age():
    code = (
        "import time; time.sleep(0.5); from sdtpu_worker.operations.health import process_age_s; print(process_age_s())"
    )
    started = time.monotonic()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert 0.4 <= float(told) <= time.monotonic() - started + 0.1


def test_a_worker_at_work_is_live_and_ready():
    worker = Worker().start()
    worker.run(100)
    assert (worker.live, worker.ready) == ([], [])


def test_the_page_shows_what_a_ready_worker_says():
    page = (ROOT / "docs" / "how-to" / "observe.md").read_text()
    (shown,) = re.findall(r'^\{"status": "ok".*?^```$', page, flags=re.MULTILINE | re.DOTALL)
    checks = json.loads(shown.removesuffix("```"))["checks"]
    assert checks.pop("serving")["detail"].startswith("started in ")
    worker = Worker().start()
    worker.run(1)
    _, *others = worker.health.ready()
    assert checks == {check.name: {"ok": True, "detail": check.detail} for check in others}


def test_a_device_loop_that_ended_fails_both():
    worker = Worker().start()
    worker.alive = False
    assert (worker.live, worker.ready) == (["device"], ["device"])


def test_a_tick_may_be_late_for_as_long_as_the_setting_says():
    worker = Worker(stall_s=60).start()
    worker.late_s = 60
    assert (worker.live, worker.ready) == ([], [])
    worker.late_s = 61
    assert (worker.live, worker.ready) == (["device"], ["device"])
    assert "61 s late (sdtpu_stall_s)" in worker.health.live()[0].detail


def test_a_main_loop_that_stands_still_is_first_not_ready_then_dead():
    worker = Worker().start()
    worker.run(5, beats=False)
    assert (worker.live, worker.ready) == ([], [])
    worker.run(1, beats=False)
    assert (worker.live, worker.ready) == ([], ["event_loop"])
    worker.run(10, beats=False)
    assert (worker.live, worker.ready) == (["event_loop"], ["event_loop"])


def test_without_redis_a_worker_is_not_ready_and_dead_after_the_lease():
    worker = Worker(lease_s=30).start()
    worker.run(7, contacts=False)
    assert (worker.live, worker.ready) == ([], ["redis"])
    assert worker.health.ready()[-1].detail == "not consuming: no answer from Redis for 7 s"
    worker.run(23, contacts=False)
    assert worker.live == []
    worker.run(1, contacts=False)
    assert worker.live == ["redis"]


def test_a_worker_to_which_redis_refuses_jobs_lives_and_is_not_ready():
    worker = Worker().start()
    worker.health.on_claim("BUSY Redis is busy running a script")
    worker.run(100)
    assert (worker.live, worker.ready) == ([], ["redis"])
    assert worker.health.ready()[-1].detail.endswith("BUSY Redis is busy running a script")
    worker.health.on_claim(None)
    assert (worker.live, worker.ready) == ([], [])


def test_a_worker_with_another_broker_is_live_and_ready_without_redis():
    worker = Worker()
    worker.health.watch_device(lambda: worker.alive, lambda: worker.late_s)
    worker.health.on_consume()
    worker.run(1000, beats=False, contacts=False)
    assert (worker.live, worker.ready) == ([], []), "Celery has no event loop for some brokers"
    worker.health.watch_event_loop()
    worker.run(100, contacts=False)
    assert (worker.live, worker.ready) == ([], [])
    worker.run(6, beats=False, contacts=False)
    assert (worker.live, worker.ready) == ([], ["event_loop"])
    worker.health.on_disconnect()
    worker.run(61, beats=False, contacts=False)
    assert (worker.live, worker.ready) == (["event_loop"], ["event_loop"])


def test_while_celery_waits_for_redis_its_main_loop_need_not_turn():
    worker = Worker(lease_s=30).start()
    worker.run(3)
    worker.health.on_disconnect()
    worker.run(30, beats=False, contacts=False)
    assert (worker.live, worker.ready) == ([], ["event_loop", "redis"])
    worker.health.on_consume()
    assert (worker.live, worker.ready) == ([], ["redis"])  # connected is not yet answered
    worker.run(1)
    assert (worker.live, worker.ready) == ([], [])


def test_a_worker_whose_lease_reached_redis_before_its_consumer_is_not_ready():
    worker = Worker(lease_s=30).start()
    worker.run(3)
    worker.health.on_disconnect()
    worker.run(10, beats=False)
    assert (worker.live, worker.ready) == ([], ["event_loop"])
    assert worker.health.ready()[-2].detail == "connecting to the broker for 10 s"
    worker.run(50, beats=False)
    assert worker.live == []
    worker.run(1, beats=False)
    assert worker.live == ["event_loop"], "a consumer that never comes back needs a new process"
    worker.health.on_consume()
    assert (worker.live, worker.ready) == ([], [])


def test_a_consumer_that_starts_again_and_again_is_dead_after_the_lease():
    worker = Worker(lease_s=30).start()
    for _ in range(31):
        worker.health.on_disconnect()
        worker.run(1, beats=False, contacts=False)
        worker.health.on_consume()
    assert worker.live == ["redis"]


def test_a_worker_that_drains_lives_although_nothing_turns_any_more():
    worker = Worker().start()
    worker.health.drain()
    worker.alive = False
    worker.run(600, beats=False, contacts=False)
    assert (worker.live, worker.ready) == ([], ["serving"])


@contextlib.contextmanager
def serving(live=lambda: FINE, ready=lambda: FINE, host="127.0.0.1", pages=None):
    with contextlib.closing(HealthServer((host, 0), live, ready, pages)) as server:
        yield server.address


def get(address, path, method="GET"):
    host, port = address
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()


def handlers() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_the_endpoint_answers_with_verdict_and_checks():
    lost = [*FINE, Check("redis", False, "not consuming")]
    with serving(ready=lambda: lost) as address:
        status, body = get(address, "/livez")
        assert (status, json.loads(body)) == (
            200,
            {"status": "ok", "checks": {"device": {"ok": True, "detail": "on time"}}},
        )
        status, body = get(address, "/readyz?verbose")
        assert (status, json.loads(body)["status"]) == (503, "failing")
        assert json.loads(body)["checks"]["redis"] == {"ok": False, "detail": "not consuming"}
        assert get(address, "/readyz", "HEAD") == (503, b"")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/metrics"), ("POST", "/livez"), ("BREW", "/livez")]
)
def test_everything_else_is_not_found(method, path):
    with serving() as address:
        assert get(address, path, method)[0] == 404


def test_a_page_is_answered_with_its_type_and_an_error_of_it_is_told():
    pages = {"/metrics": lambda accept: (f"text/{accept}", b"x 1\n"), "/broken": lambda accept: 1 / 0}
    with serving(pages=pages) as address:
        with contextlib.closing(http.client.HTTPConnection(address[0], address[1], timeout=30)) as connection:
            connection.request("GET", "/metrics?x=1", headers={"Accept": "plain"})
            response = connection.getresponse()
            assert (response.status, response.headers["Content-Type"]) == (200, "text/plain")
            assert response.read() == b"x 1\n"
        status, body = get(address, "/broken")
        assert status == 500
        assert "ZeroDivisionError" in json.loads(body)["status"]
        assert json.loads(get(address, "/")[1])["status"].endswith("or GET /readyz or GET /metrics or GET /broken")


def test_a_check_that_raises_is_a_failing_check():
    with serving(live=lambda: 1 / 0) as address:
        status, body = get(address, "/livez")
        assert status == 503
        assert "ZeroDivisionError" in json.loads(body)["checks"]["health"]["detail"]
        assert get(address, "/readyz")[0] == 200


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
@pytest.mark.parametrize("host", ["::1", "", "localhost"])
def test_it_listens_on_ipv6_on_every_interface_and_on_names(host):
    with serving(host=host) as (_, port):
        ways = {"::1": ["::1"], "": ["::1", "127.0.0.1"], "localhost": ["localhost"]}[host]
        assert [ask_health((way, port), "/livez") for way in ways] == [(True, FINE)] * len(ways)
        assert ask_health((host, port), "/livez") == (True, FINE)


def test_an_address_in_use_or_not_ours_is_a_configuration_error():
    with serving() as address:
        with pytest.raises(
            ConfigurationError, match=rf"sdtpu_health_address: .*127.0.0.1:{address[1]}: another process"
        ):
            HealthServer(address, lambda: FINE, lambda: FINE)
    with pytest.raises(ConfigurationError, match=r"sdtpu_health_address: cannot listen on 192\.0\.2\.1:80"):
        HealthServer(("192.0.2.1", 80), lambda: FINE, lambda: FINE)


def test_silent_clients_block_nobody_and_are_hung_up_on_in_the_end(monkeypatch):
    monkeypatch.setattr(health_http, "_CLIENT_S", 60.0)
    with serving() as address, contextlib.ExitStack() as clients:
        silent = [clients.enter_context(socket.create_connection(address)) for _ in range(40)]
        assert get(address, "/livez")[0] == 200
        wait_until(lambda: handlers() <= health_http._MAX_CLIENTS, "all but the last clients to be hung up on", 30)
        monkeypatch.setattr(health_http, "_CLIENT_S", 0.1)
        for client in silent:
            client.settimeout(30)
            assert client.recv(1) == b""
        wait_until(lambda: handlers() == 0)


def test_a_client_that_trickles_has_no_more_time_than_others(monkeypatch):
    monkeypatch.setattr(health_http, "_CLIENT_S", 0.5)
    with serving() as address, socket.create_connection(address) as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):  # reset or broken pipe
            while time.monotonic() - began < 60:
                client.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - began < 30
        wait_until(lambda: handlers() == 0)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 100_000,
        b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 50_000,
        b"\x16\x03\x01\x00\xff",
        b"\r\n\r\n",
    ],
)
def test_requests_that_are_too_large_or_none_leave_it_answering(request_bytes):
    with serving() as address:
        with socket.create_connection(address, timeout=30) as client, contextlib.suppress(OSError):
            client.sendall(request_bytes)
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass
        assert get(address, "/livez")[0] == 200
        wait_until(lambda: handlers() == 0)


def test_close_frees_the_port_and_leaves_no_thread():
    server = HealthServer(("127.0.0.1", 0), lambda: FINE, lambda: FINE)
    with socket.create_connection(server.address) as client:
        wait_until(lambda: handlers() == 1)
        server.close()
        server.close()
        assert client.recv(1) == b""
    wait_until(lambda: handlers() == 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "sdtpu-health"]
    HealthServer(server.address, lambda: FINE, lambda: FINE).close()


def test_requests_are_not_logged(caplog):
    caplog.set_level("INFO")
    with serving() as address:
        caplog.clear()
        get(address, "/livez")
        get(address, "/nothing")
    assert caplog.records == []


def test_sdtpu_health_prints_the_checks_and_ends_with_the_verdict():
    lost = [*FINE, Check("redis", False, "not consuming")]
    with serving(ready=lambda: lost) as (host, port):
        live = CliRunner().invoke(sdtpu, ["health"], env={"SDTPU_HEALTH_ADDRESS": f"{host}:{port}"})
        assert (live.exit_code, live.output) == (0, "ok  device: on time\n")
        ready = CliRunner().invoke(sdtpu, ["health", "--ready", "--address", f"{host}:{port}"])
        assert (ready.exit_code, ready.output.splitlines()[-1]) == (1, "FAILING  redis: not consuming")


def test_sdtpu_health_says_what_is_wrong_when_nobody_answers():
    with serving() as (host, port):
        pass
    gone = CliRunner().invoke(sdtpu, ["health", "--address", f"{host}:{port}"])
    assert (gone.exit_code, f"no worker answers on http://{host}:{port}/livez" in gone.output) == (1, True)
    unset = CliRunner().invoke(sdtpu, ["health"], env={"SDTPU_HEALTH_ADDRESS": ""})
    assert (unset.exit_code, "give --address" in unset.output) == (1, True)
    wrong = CliRunner().invoke(sdtpu, ["health", "--address", "8080"])
    assert (wrong.exit_code, "host:port, like 127.0.0.1:8080" in wrong.output) == (1, True)


def test_a_device_that_is_lost_is_told_of_and_leaves_the_worker_ready():
    worker = Worker().start()
    worker.run(1)
    worker.lost.append(5)
    (device,) = [check for check in worker.health.ready() if check.name == "device"]
    assert device.ok
    assert "on time; lost, and without jobs until the worker is started anew: device 5" in device.detail
    assert (worker.live, worker.ready) == ([], [])

"""The images and the Compose services, run without a container engine: only Docker itself is left unproven."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from redis import Redis

from sdtpu_worker.testing.processes import find_redis_server, free_port, running, wait_for_line
from tests.docs.images import Image, copy_context, find_bubblewrap
from tests.observe.prometheus import find_program
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

COMPOSE = ROOT / "docker" / "compose.yaml"

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


def interpolate(value: Any, env: Mapping[str, str]) -> Any:
    """Return a value of the Compose file with its variables filled in, as Compose does."""
    if isinstance(value, dict):
        return {name: interpolate(each, env) for name, each in value.items()}
    if isinstance(value, list):
        return [interpolate(each, env) for each in value]
    if not isinstance(value, str):
        return value
    innermost = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^${}]*))?\}")

    def fill(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if env.get(name):
            return env[name]
        assert kind != ":?", f"{name} is required: {text}"
        return text or ""

    while innermost.search(value):
        value = innermost.sub(fill, value)
    return value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give what docker/make-env writes, and the door's key as `KEY`."""
    folder = tmp_path_factory.mktemp("docker")
    script = shutil.copy(ROOT / "docker" / "make-env", folder)
    printed = subprocess.run(["sh", script], capture_output=True, text=True, check=True, timeout=20).stdout
    again = subprocess.run(["sh", script], capture_output=True, text=True, check=False, timeout=20)
    assert (again.returncode, "is there already" in again.stderr) == (1, True)
    assert (folder / ".env").stat().st_mode & 0o777 == 0o600
    env = dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines())
    return {**env, "KEY": re.search(r"(sk-\w+)$", printed, flags=re.MULTILINE)[1]}


@pytest.fixture(scope="module")
def services(made: dict[str, str]) -> dict[str, Any]:
    """Give the services of the Compose file with what make-env wrote filled in."""
    return interpolate(yaml.safe_load(COMPOSE.read_text())["services"], made)


@pytest.fixture(scope="module")
def redis(services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run the command of the service `redis`; give its port."""
    program, *options = services["redis"]["command"]
    assert program == "redis-server"
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    with running([find_redis_server(), "--port", str(port), "--dir", str(folder), *options], folder / "redis.log"):
        with Redis(port=port, password=services["redis"]["environment"]["REDISCLI_AUTH"]) as client:
            wait_until(lambda: ping(client), "Redis to answer")
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert int(client.config_get("maxmemory")["maxmemory"]) == 2**30
            yield port


def ping(client: Redis) -> bool:
    try:
        return client.ping()
    except ConnectionError:
        return False
    except Exception as exc:
        if "Connection refused" in str(exc):
            return False
        raise


def env_of(service: Mapping[str, Any], port: int, **changes: str) -> dict[str, str]:
    """Return a service's environment, with Redis where it is in the test."""
    env = {
        name: str(value).replace("redis:6379", f"127.0.0.1:{port}") for name, value in service["environment"].items()
    }
    return {**env, **changes}


@pytest.fixture(scope="module")
def client_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    find_bubblewrap()
    folder = tmp_path_factory.mktemp("images")
    copy_context(folder / "context")
    return Image(folder / "client", folder / "context").build("client")


@pytest.fixture(scope="module")
def door_image(client_image: Image) -> Image:
    return client_image.copy(client_image.folder.with_name("door")).build("door", "client")


@pytest.fixture(scope="module")
def cpu_image(client_image: Image) -> Image:
    return client_image.copy(client_image.folder.with_name("cpu")).build("cpu", "client")


def test_a_container_runs_as_its_user_without_rights_and_writes_to_its_volume_alone(
    client_image: Image, door_image: Image, cpu_image: Image
) -> None:
    look = "id -u; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status | cut -f2; touch /tmp/a && echo tmp"
    for image in (client_image, door_image, cpu_image):
        done = image.run("sh", "-c", look)
        assert done.stdout.split() == ["10001", "0" * 16, "0" * 16, "1", "tmp"], done.stderr
        for place in ("/a", "/srv/a", "/venv/a", "/home/sdtpu/a", "/etc/a", "/var/cache/a"):
            assert "Read-only file system" in image.run("touch", place).stderr
        where = image.run("python", "-c", "import sdtpu_worker; print(sdtpu_worker.__file__)").stdout
        assert where.startswith("/venv/lib/")
    assert cpu_image.run("touch", f"{cpu_image.volume}/a").returncode == 0


def test_the_services_make_a_picture_and_stop_when_they_are_told(
    services: dict[str, Any], made: dict[str, str], redis: int, door_image: Image, cpu_image: Image, tmp_path: Path
) -> None:
    """Worker, door and queues run as Compose runs them; a caller with the key of make-env gets a picture."""
    health, place, page = (f"127.0.0.1:{free_port()}" for _ in range(3))
    worker_env = env_of(services["worker"], redis, SDTPU_HEALTH_ADDRESS=health, SDTPU_CPU_DEVICES="1")
    door_env = env_of(services["door"], redis, SDTPU_HTTP_ADDRESS=place)
    command = [page if word == "0.0.0.0:9090" else word for word in services["queues"]["command"]]
    logs = {name: tmp_path / f"{name}.log" for name in ("worker", "door", "queues")}
    with (
        cpu_image.running(logs["worker"], worker_env, services["worker"]["command"]) as worker,
        door_image.running(logs["door"], door_env) as door,
        door_image.running(logs["queues"], env_of(services["queues"], redis), command) as queues,
    ):
        wait_for_line(queues, logs["queues"], "metrics: ", 60)
        wait_for_line(door, logs["door"], "Application startup complete", 60)
        wait_for_line(worker, logs["worker"], " ready.", 200)
        assert cpu_image.run(*cpu_image.healthcheck, env=worker_env).returncode == 0
        assert door_image.run(*door_image.healthcheck, env=door_env).returncode == 0
        kind, *check = services["queues"]["healthcheck"]["test"]
        assert kind == "CMD"
        assert door_image.run(*(word.replace("127.0.0.1:9090", page) for word in check)).returncode == 0
        headers = {"Authorization": f"Bearer {made['KEY']}"}
        with httpx.Client(base_url=f"http://{place}", headers=headers, timeout=120, trust_env=False) as client:
            assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
            job = client.post("/v1/jobs", json={"prompt": "a red circle"}, headers={"Prefer": "wait=60"}).json()
            assert job["status"] == "succeeded", job
            assert client.get(f"/v1/jobs/{job['id']}/image").content.startswith(b"\x89PNG")
        for address in (health, page):
            assert b"sdtpu_requests_waiting" in urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read()
        assert cpu_image.stop_signal == door_image.stop_signal == "SIGTERM"
        began = time.monotonic()
        assert [cpu_image.stop(worker, 60), door_image.stop(queues, 30)] == [0, 0]
        assert door_image.stop(door, 30) in (0, 143)  # uvicorn ends by the signal itself, when all is closed
        assert "Application shutdown complete" in logs["door"].read_text()
        assert time.monotonic() - began < 60  # stop_grace_period of the worker
    assert any((cpu_image.folder / "var" / "cache" / "sdtpu" / "xla").iterdir())  # the next start compiles nothing
    text = "".join(log.read_text() for log in logs.values())
    assert not [name for name in ("REDIS_PASSWORD", "KEY") if made[name] in text]


def test_a_door_without_keys_does_not_start(door_image: Image) -> None:
    done = door_image.run(*door_image.command)
    assert (done.returncode, "the door has no keys" in done.stderr) == (1, True)


def test_the_health_check_of_redis_needs_its_password(services: dict[str, Any], redis: int) -> None:
    kind, _, *arguments = services["redis"]["healthcheck"]["test"]
    assert kind == "CMD"
    program = shutil.which("redis-cli") or str(Path(find_redis_server()).with_name("redis-cli"))
    assert arguments == ["-e", "ping"]
    for password, code in ((services["redis"]["environment"]["REDISCLI_AUTH"], 0), ("wrong", 1)):
        done = subprocess.run(
            [program, "-p", str(redis), "ping"],
            env={"REDISCLI_AUTH": password},
            capture_output=True,
            text=True,
            check=False,
        )  # -e, the exit code of an error, is of Redis 7
        assert ("PONG" in done.stdout) == (code == 0)


def test_prometheus_takes_the_flags_and_the_files_that_are_mounted(services: dict[str, Any], tmp_path: Path) -> None:
    program, port = find_program("prometheus"), free_port()
    folder = tmp_path / "etc"
    for volume in services["prometheus"]["volumes"]:
        source, target, *_ = volume.split(":")
        if target.startswith("/etc/prometheus/"):
            folder.mkdir(exist_ok=True)
            shutil.copy(COMPOSE.parent / source, folder / Path(target).name)
    flags = [
        flag.replace("/etc/prometheus", str(folder)).replace("=/prometheus", f"={tmp_path / 'data'}")
        for flag in services["prometheus"]["command"]
    ]
    log = tmp_path / "prometheus.log"
    with running([program, *flags, f"--web.listen-address=127.0.0.1:{port}"], log) as process:
        wait_for_line(process, log, "Server is ready to receive web requests", 60)

        def ask(path: str) -> Any:
            return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10))["data"]

        assert len(ask("rules")["groups"]) == 4
        (check,) = (word for word in services["prometheus"]["healthcheck"]["test"] if word.startswith("http"))
        assert urllib.request.urlopen(check.replace("127.0.0.1:9090", f"127.0.0.1:{port}"), timeout=10).status == 200
        targets = wait_until(lambda: ask("targets")["activeTargets"], "the targets to be known")
    assert {each["scrapeUrl"] for each in targets} == {"http://worker:8080/metrics", "http://queues:9090/metrics"}


def test_make_env_writes_the_hash_of_the_key_that_it_prints(made: dict[str, str]) -> None:
    assert made["SDTPU_HTTP_KEYS"] == f"me:{hashlib.sha256(made['KEY'].encode()).hexdigest()}"
    secrets = [made[name].rpartition(":")[2] for name in ("REDIS_PASSWORD", "FLOWER_BASIC_AUTH", "GRAFANA_PASSWORD")]
    assert len(set(secrets)) == 3
    assert all(re.fullmatch("[0-9a-f]{48}", secret) for secret in secrets)

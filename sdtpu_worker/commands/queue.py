"""`sdtpu queue`: what waits, for how long, and the hosts that work on it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sdtpu_worker.commands.options import app_option, clear_errors, find_client_app, json_option

if TYPE_CHECKING:
    from celery import Celery

    from sdtpu_worker.contract.load_report import WorkerLoad

_EVERY_S = 1.0


@click.command()
@app_option
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@json_option
def queue(app_path: str | None, watch: bool, as_json: bool) -> None:
    """Say how many jobs wait and for how long, and what each host has in its slots."""
    app = find_client_app(app_path)
    while True:
        facts = _read(app)
        if watch and not as_json:
            click.clear()
        click.echo(json.dumps(facts) if as_json else _text(facts))
        if not watch:
            return
        try:
            time.sleep(_EVERY_S)
        except KeyboardInterrupt:
            return


def _read(app: Celery) -> dict[str, Any]:
    from sdtpu_worker.client.queue_state import read_broker

    with clear_errors():
        broker = read_broker(app)
    states = broker.queues
    oldest_s = max((state.oldest_s for state in states if state.oldest_s is not None), default=None)
    return {
        "waiting": sum(sum(state.waiting.values()) for state in states),
        "held": sum(state.held for state in states),
        "deferred": sum(state.deferred for state in states),
        "oldest_s": None if oldest_s is None else round(oldest_s, 1),
        "slots": sum(host.num_slots for host in broker.workers),
        "hosts": [_host(host) for host in broker.workers],
        "queues": {state.queue: asdict(state) for state in states if state.load or state.deferred},
    }


def _host(host: WorkerLoad) -> dict[str, Any]:
    held = sum(host.held.values())
    return {
        "host": host.host,
        "slots": host.num_slots,
        "held": held,
        "in_slots": min(held, host.num_slots),
        "next_free_s": round(host.next_free_s, 1),
        "mean_job_s": round(host.mean_job_s, 2),
        "sizes": list(host.step_s),
    }


def _text(facts: dict[str, Any]) -> str:
    age = "" if facts["oldest_s"] is None else f", the oldest for {facts['oldest_s']:,.1f} s"
    lines = [f"{facts['waiting']:,} waiting{age}; {facts['held']:,} held, {facts['deferred']:,} deferred"]
    lines += [_bar(host) for host in facts["hosts"]]
    if not facts["hosts"]:
        lines.append("no host takes jobs: start a worker, or give it a moment after its start")
    return "\n".join(lines)


def _bar(host: dict[str, Any]) -> str:
    """Return a host's line: its slots, the filled ones first."""
    slots: Sequence[str] = "■" * host["in_slots"] + "□" * (host["slots"] - host["in_slots"])
    shown = slots if len(slots) <= 64 else f"{host['in_slots']}"
    return f"{host['host']}  {shown}  {host['in_slots']} of {host['slots']} slots, {host['held']} jobs held"

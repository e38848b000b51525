"""The OpenAPI description: it has every route, and no request that it allows ends in an error of the door."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from sdtpu_worker.http.app import make_routes
from sdtpu_worker.http.openapi import OPERATIONS, describe
from sdtpu_worker.web.parameters import JOB_FIELDS

schema = schemathesis.openapi.from_dict(describe("http://127.0.0.1"))


def test_every_route_is_described():
    routes = {(route.path.replace(":path", ""), method) for route in make_routes() for method in route.methods}
    described = {(operation.path, operation.method.upper()) for operation in OPERATIONS}
    assert {route for route in routes if route[1] != "HEAD"} == described


def test_every_parameter_of_a_job_is_described():
    shapes = describe("")["components"]["schemas"]
    assert set(shapes["JobRequest"]["properties"]) == {*JOB_FIELDS, "webhook"}


WITHOUT_END = ("/v1/jobs/events",)
"""Paths whose answer goes on until its reader leaves; tests/web/test_live.py reads it."""


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    "operation",
    [each for each in OPERATIONS if each.path not in WITHOUT_END],
    ids=lambda operation: f"{operation.method} {operation.path}",
)
def test_no_request_ends_in_an_error_of_the_door(operation, door):
    @given(schema[operation.path][operation.method].as_strategy())
    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case) -> None:
        for name in ("num_inference_steps", "steps"):
            if isinstance(case.body, dict) and case.body.get(name):
                case.body[name] = 1  # so that nobody waits for a thousand
        case.call_and_validate(
            base_url=door.url, checks=[not_a_server_error, response_schema_conformance], timeout=30, headers={}
        )

    ask()

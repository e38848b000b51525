"""Headless Chromium, and the page at a real door beside a real worker with the shipped checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from sdtpu_worker.testing.processes import free_port
from tests.http.doors import DoorProcess, start_door
from tests.page.browser import ARGUMENTS, Visitor, find_chromium
from tests.support.clients import app, redis_url
from tests.worker.workers import start_worker

__all__ = ["app", "redis_url"]

Visit = Callable[..., Visitor]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run Chromium with an empty profile, for one file: its driver has an event loop in this thread."""
    program = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def worker(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a worker with the shipped checkpoint, which shows previews and has a LoRA."""
    settings = {"SDTPU_CPU_DEVICES": "2", "SDTPU_SLOTS_PER_DEVICE": "2", "SDTPU_PREVIEW_EVERY": "1",
                "SDTPU_PROGRESS_S": "0.05", "SDTPU_LORAS": "outline=embedded-outline",
                "SDTPU_LORA_RANK": "4"}  # fmt: skip
    with start_worker(redis_url, tmp_path_factory.mktemp("worker"), **settings):
        yield


@pytest.fixture(scope="session")
def door(redis_url: str, worker: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    """Run a door without keys."""
    with start_door(redis_url, tmp_path_factory.mktemp("door")) as door:
        yield door


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Give a function that opens the page of a front for somebody new."""
    visitors = []

    def visit(url: str, **options: Any) -> Visitor:
        visitors.append(Visitor(browser, url, **options))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.close()


@pytest.fixture
def address() -> str:
    """Give an address that is free, for a door that is to come back there."""
    return f"127.0.0.1:{free_port()}"

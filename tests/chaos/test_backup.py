"""A backup of Redis, made while a worker works, is put back under it, as docs/how-to/runbook.md says.

pytest -s tests/chaos/test_backup.py -n 0
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.chaos.fleet import Fleet, Ledger
from tests.chaos.servers import RedisServer
from tests.chaos.test_access import WORKER
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(180)


def test_jobs_of_a_backup_are_all_done_after_it_is_put_back(tmp_path: Path) -> None:
    """Some of them were done already, some held, some waiting when the backup was made; a later job is not in it."""
    with RedisServer() as server, client_app(server.url), Fleet(server.url, tmp_path, **WORKER) as fleet:
        worker, ledger = fleet.start("a"), Ledger()
        ledger.add(1, 5)
        ledger.wait(60)
        for seed in range(2, 8):
            ledger.add(seed, 300)
        with server.client() as client:
            wait_until(lambda: client.hlen("sdtpu:unacked") >= 4, "the worker to hold jobs")
            client.save()
            shutil.copy(server.folder / "dump.rdb", tmp_path / "backup.rdb")
        later = ledger.add(99, 1)
        server.stop()
        for file in server.folder.glob("appendonly*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        shutil.copy(tmp_path / "backup.rdb", server.folder / "dump.rdb")
        config = (server.folder / "redis.conf").read_text()
        (server.folder / "redis.conf").write_text(config.replace("appendonly yes", "appendonly no"))
        server.start()
        with server.client() as client:
            assert client.exists("celery-task-meta-" + next(iter(ledger.jobs))) == 1  # results are in it too
            client.config_set("appendonly", "yes")
            client.config_rewrite()
            wait_until(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0, "the file to be written")
        del ledger.jobs[later]
        ledger.wait(90)
        assert worker.is_running
        assert not ledger.errors
        assert not ledger.wrong_pictures()
        with server.client() as client:
            wait_until(lambda: client.hlen("sdtpu:unacked") == 0, "the last message to be acknowledged")
        server.restart()  # from the append-only file, with all that was done since
        with server.client() as client:
            assert all(client.exists(f"celery-task-meta-{task_id}") for task_id in ledger.jobs)
            assert client.hlen("sdtpu:unacked") == 0

"""Prompts stay out of the log: a real worker with Celery's own loggers, and every way in which they print messages."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from celery import Celery, Task, chord
from celery.app.trace import build_tracer
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError, MaxRetriesExceededError, QueueNotFound, Reject
from kombu import Exchange
from kombu.exceptions import EncodeError, OperationalError
from redis import Redis, exceptions

from sdtpu_worker import GenerationFailed, InvalidRequest
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery import transport
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.operations.prompt_guard import NOT_LOGGED, PromptGuard, describe, install_prompt_guard
from sdtpu_worker.reuse.ledger import Ledger
from sdtpu_worker.reuse.notes import Lead
from sdtpu_worker.testing.processes import private_redis
from tests.support.logs import logging_kept
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)

SECRET = "a portrait of my secret neighbour"


class Log(logging.Handler):
    """Keeps all that a record says: its line, its traceback and every attribute that other formatters may print."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.entries: list[tuple[int, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = logging.Formatter("%(name)s %(levelname)s %(message)s").format(record)
        self.entries.append((record.levelno, line, f"{line}\n{record.__dict__!r}"))

    def lines(self, text: str) -> list[str]:
        return [line for _, line, _ in self.entries if text in line]

    def wait_for(self, text: str) -> str:
        def all_lines() -> str:
            return "\n".join([text, *(line for _, line, _ in self.entries)])

        return wait_until(lambda: self.lines(text), all_lines)[0]

    def leaks(self) -> list[str]:
        return [everything for level, _, everything in self.entries if level > logging.DEBUG and SECRET in everything]


def make_app(**conf) -> Celery:
    app = Celery("guarded", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(
        task_serializer="json", accept_content=["json"], worker_hijack_root_logger=False, task_default_queue="q", **conf
    )

    @app.task(name="paint", bind=True, shared=False)
    def paint(self, prompt, **kwargs):
        image = {"uri": f"redis:sdtpu:image:{self.request.id}", "format": "png"}
        return {"task_id": self.request.id, "image": image, "prompt": prompt, "seed": 1}

    @app.task(name="fail", bind=True, shared=False, max_retries=1)
    def fail(self: Task, prompt, how):
        if how == "invalid":
            GenerationRequest(prompt=[prompt])  # type: ignore[arg-type]  # the client's mistake
        if how == "foreign":
            raise ValueError(f"cannot do {prompt}")
        if how == "unicode":
            prompt.encode().decode("utf-16")
        if how == "chained":
            try:
                raise KeyError(prompt)
            except KeyError as exc:
                raise GenerationFailed("the device program failed: INTERNAL") from exc
        if how == "retry":
            raise self.retry(exc=ValueError(prompt), countdown=0)
        if how == "reject":
            raise Reject(prompt, requeue=False)
        if how == "exit":
            raise SystemExit(prompt)

    @app.task(name="expected", shared=False, throws=(ValueError,))
    def expected(prompt):
        raise ValueError(prompt)

    return app


@contextlib.contextmanager
def running_worker(level: str) -> Iterator[tuple[Celery, Log]]:
    """Run a guarded worker in a thread of this process."""
    factory, log, app = logging.getLogRecordFactory(), Log(), make_app()
    install_prompt_guard(app)
    with (
        logging_kept(),
        start_worker(app, pool="threads", concurrency=1, perform_ping_check=False, loglevel=level),
    ):
        logging.getLogger().addHandler(log)
        yield app, log
    logging.setLogRecordFactory(factory)


@pytest.fixture(scope="module")
def shared_worker() -> Iterator[tuple[Celery, Log]]:
    with running_worker("INFO") as worker:
        yield worker


@pytest.fixture
def worker(shared_worker) -> tuple[Celery, Log]:
    """Give the app of a guarded worker, and its log from here on."""
    shared_worker[1].entries.clear()
    return shared_worker


def publish(app: Celery, body, headers=None, **options) -> None:
    with app.producer_or_acquire() as producer:
        options = {"content_type": "application/json", "content_encoding": "utf-8", "serializer": None, **options}
        producer.publish(body, exchange=Exchange("q"), routing_key="q", headers=headers or {}, declare=[], **options)


def run_another_task(app: Celery, log: Log) -> None:
    """Wait until the worker, which does one thing at a time, has done what it was sent before."""
    job = app.tasks["paint"].apply_async(("x",))
    log.wait_for(f"[{job.id}] succeeded in")


def test_a_task_that_succeeds_is_logged_with_its_id_its_time_and_its_image(worker):
    app, log = worker
    job = app.tasks["paint"].apply_async((SECRET,), {"negative_prompt": SECRET}, shadow="renamed")
    line = log.wait_for("succeeded in")
    assert re.fullmatch(
        rf"celery.app.trace INFO Task renamed\[{job.id}\] succeeded in [\d.e-]+s: redis:sdtpu:image:{job.id}", line
    )
    assert log.lines(f"Task paint[{job.id}] received") or log.lines(f"Task renamed[{job.id}] received")
    assert log.leaks() == []


def test_a_prompt_cannot_write_the_image_that_is_logged(worker):
    app, log = worker
    prompt = "{'task_id': 'x', 'image': {'uri': 'file:///lie'"
    app.tasks["paint"].apply_async((prompt,), task_id="o'id")
    assert "lie" not in log.wait_for("succeeded in")


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("invalid", "InvalidRequest('prompt must be a string, got [not logged"),
        ("foreign", f"ValueError({NOT_LOGGED})"),
        ("unicode", f"UnicodeDecodeError({NOT_LOGGED})"),
        ("chained", "GenerationFailed('the device program failed: INTERNAL')"),
        ("retry", f"Retry in 0 s: ValueError({NOT_LOGGED})"),
        ("reject", f"Reject({NOT_LOGGED})"),
    ],
)
def test_a_task_that_fails_is_logged_with_its_traceback_without_what_it_was_given(worker, how, shown):
    app, log = worker
    app.tasks["fail"].apply_async((SECRET + "\ud7ff.", how))
    line = log.wait_for(shown)
    if how != "retry":
        assert "Traceback (most recent call last):" in line
        assert "in fail\n" in line
    if how == "retry":
        log.wait_for("raised unexpected")
    assert log.leaks() == []


def test_an_expected_failure(worker):
    app, log = worker
    app.tasks["expected"].apply_async((SECRET,))
    assert log.wait_for("raised expected").endswith(f"ValueError({NOT_LOGGED})")
    assert log.leaks() == []


def test_a_task_that_ends_its_thread(worker):
    app, log = worker
    app.tasks["fail"].apply_async((SECRET, "exit"))
    app.tasks["expected"].apply_async((SECRET,))
    log.wait_for("raised expected")
    assert log.leaks() == []


def test_a_chord_whose_member_fails(worker):
    app, log = worker
    member = app.tasks["expected"].s(SECRET)
    chord([member, member], app.tasks["paint"].s(), app=app).apply_async()
    log.wait_for("raised expected")
    run_another_task(app, log)
    assert log.leaks() == []


BODY = json.dumps([[SECRET], {"negative_prompt": SECRET}, {}])
HEADERS = {"task": "paint", "id": "1", "argsrepr": repr((SECRET,)), "lang": "py", "root_id": "1"}


@pytest.mark.parametrize(
    ("body", "headers", "options", "line"),
    [
        (BODY, {**HEADERS, "task": "nobody.knows"}, {}, "Received unregistered task of type 'nobody.knows'"),
        (json.dumps({"prompt": SECRET}), {}, {}, "Received and deleted unknown message"),
        (
            json.dumps({"task": "paint", "id": "1", "args": 7, "kwargs": SECRET}),
            {},
            {},
            "invalid task message",
        ),
        (BODY, {**HEADERS, "eta": SECRET}, {}, "Received invalid task message"),
        (json.dumps({"task": SECRET})[:-2], {}, {}, "Can't decode message body: DecodeError"),
        (BODY.encode() + b"\xff", {}, {"content_encoding": "utf-8"}, "Can't decode message body"),
        (BODY, {}, {"content_type": "application/x-python-serialize"}, "Can't decode message body: ContentDisallowed"),
    ],
)
def test_a_message_that_is_no_task_is_not_dumped(worker, body, headers, options, line):
    app, log = worker
    publish(app, body, headers, **options)
    assert NOT_LOGGED in log.wait_for(line)
    assert log.leaks() == []


def test_an_eta_that_is_no_time(worker):
    app, log = worker
    publish(app, BODY, {**HEADERS, "eta": "9999-12-31T23:59:59-14:00", "kwargsrepr": SECRET})
    run_another_task(app, log)
    assert log.leaks() == []


def test_with_the_setting_on_celery_logs_as_ever(worker):
    app, log = worker
    install_prompt_guard(make_app(sdtpu_log_prompts=True))
    try:
        app.tasks["paint"].apply_async((SECRET,))
        assert SECRET in log.wait_for("succeeded in")
        app.tasks["fail"].apply_async((SECRET, "foreign"))
        assert f"cannot do {SECRET}" in log.wait_for("raised unexpected")
        publish(app, BODY, {**HEADERS, "task": "nobody.knows"})
        assert SECRET in log.wait_for("unregistered task")
    finally:
        install_prompt_guard(app)


def test_a_worker_at_debug_logs_no_prompt_above_debug():
    with running_worker("DEBUG") as (app, log):
        app.tasks["paint"].apply_async((SECRET,))
        log.wait_for("succeeded in")
    assert log.leaks() == []


@pytest.fixture(scope="module")
def redis_with_users() -> Iterator[str]:
    """Give the URL of a Redis that has the users of SECURITY.md."""
    with private_redis() as url:
        for line in re.findall(r"^ +ACL SETUSER (.+)$", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE):
            assert Redis.from_url(url).execute_command("ACL SETUSER", *line.split()) is True
        yield url


def as_client(url: str) -> str:
    return url.replace("redis://", "redis://sdtpu-client:CLIENT_PASSWORD@")


@pytest.mark.parametrize(
    "command",
    [
        "RPOP sdtpu", "DEL sdtpu", "SET sdtpu:image:x y", "SET celery-task-meta-1 y", "GET sdtpu:dead", "LPUSH other x",
        "HGETALL sdtpu:unacked", "EVAL return(1) 0", "PUBLISH /0.celery.pidbox x", "PUBLISH celery-task-meta-1 x",
        "KEYS *", "CONFIG GET *", "FLUSHALL", "GET other", "MONITOR", "SUBSCRIBE other",
    ],
)  # fmt: skip
def test_a_client_with_the_least_rights_cannot_do_what_it_must_not(redis_with_users, command):
    with pytest.raises(exceptions.NoPermissionError):
        Redis.from_url(as_client(redis_with_users)).execute_command(*command.split())


def test_a_client_with_the_least_rights_can_do_what_it_must(redis_with_users):
    app = Celery(
        "client", broker=as_client(redis_with_users), backend=as_client(redis_with_users), set_as_current=False
    )
    for priority in (0, 6, 9):
        job = app.send_task("sdtpu.generate", (SECRET,), queue="sdtpu", priority=priority)
    worker = Redis.from_url(redis_with_users.replace("redis://", "redis://sdtpu-worker:WORKER_PASSWORD@"))
    assert sum(worker.llen(key) for key in ("sdtpu", "sdtpu\x06\x166", "sdtpu\x06\x169")) == 3
    meta = {"status": "SUCCESS", "result": 7, "task_id": job.id, "traceback": None, "children": []}
    timer = threading.Timer(0.3, lambda: [worker.setex(f"celery-task-meta-{job.id}", 60, json.dumps(meta)),
                                          worker.publish(f"celery-task-meta-{job.id}", json.dumps(meta))])  # fmt: skip
    timer.start()
    assert job.get(timeout=10) == 7
    app.close()


def test_a_worker_with_the_least_rights_can_reuse_images(redis_with_users):
    with Redis.from_url(redis_with_users.replace("redis://", "redis://sdtpu-worker:WORKER_PASSWORD@")) as worker:
        ledger, lead = Ledger(lambda: worker, Keys()), Lead("f" * 32, 6)
        assert ledger.enter("key", lead) == (b"", b"")
        ledger.renew({"key": lead})
        ledger.leave("key", lead.token, b"a pointer", 60)
        assert ledger.enter("key", lead) == (b"a pointer", b"")
        ledger.forget("key", b"a pointer")


@pytest.fixture
def guard(caplog) -> Iterator[pytest.LogCaptureFixture]:
    factory = logging.getLogRecordFactory()
    install_prompt_guard(make_app(), transport.logger)
    caplog.set_level(logging.INFO)
    yield caplog
    logging.setLogRecordFactory(factory)


def all_of(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.text + "".join(repr(record.__dict__) for record in caplog.records)


def test_a_message_that_cannot_be_restored_is_not_dumped_and_stays_as_it_is(guard):
    payload = {"body": SECRET, "headers": {"argsrepr": SECRET}, "properties": {"priority": 0}}
    logging.getLogger("kombu.transport.redis").critical("Could not restore message: %r", payload, exc_info=True)
    assert payload["body"] == SECRET
    assert SECRET not in all_of(guard)
    assert "Could not restore message: {'body': '[not logged" in guard.text


def test_requests_and_other_objects_are_only_named(guard):
    class Request:
        def humaninfo(self):
            return "paint[1]"

        def __repr__(self):
            return SECRET

    logger = logging.getLogger("celery.worker.consumer.consumer")
    logger.warning("Failed to cancel active request %r after connection loss", Request())
    logger.error("entry %r, %s, %d", SimpleNamespace(x=SECRET), [SECRET], 7)
    assert SECRET not in all_of(guard)
    assert "request paint[1] after" in guard.text
    assert "entry <SimpleNamespace>, <list>, 7" in guard.text


def test_the_traceback_shows_the_whole_chain(guard):
    text = "redis://me:hunter2@host is away"
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as exc:
            raise ConnectionError(text) from exc
    except ConnectionError as exc:
        logging.getLogger("celery.worker.request").error("Task handler raised error: %r", exc, exc_info=True)
    assert SECRET not in all_of(guard)
    assert "hunter2" not in all_of(guard)
    assert "raised error: ConnectionError('redis://me:**@host is away')\nTraceback" in guard.text
    assert f"ValueError({NOT_LOGGED})\n\nwhich led to:\n\nTraceback" in guard.text


def test_a_warning_about_an_error_outside_of_a_task(guard):
    logging.captureWarnings(False)  # a worker of another test may have turned it on
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            app = make_app()
            app.tasks["expected"].backend.mark_as_failure = None
            build_tracer("expected", app.tasks["expected"], app=app)("1", (SECRET,), {}, {})
    except TypeError:
        pass
    finally:
        logging.captureWarnings(False)
    assert f"Exception raised outside body: TypeError({NOT_LOGGED})" in guard.text
    assert SECRET not in all_of(guard)


def test_why_a_message_was_put_aside_is_logged_without_what_was_got(guard):
    reason = f"the body must be [args, kwargs, embed], got [{SECRET!r}]"
    template = "a message of %d bytes in the queue %s was dead-lettered (%s): %s"
    transport.logger.warning(template, 70, "sdtpu", "task 4c1e", reason)
    assert "dead-lettered (task 4c1e): the body must be [args, kwargs, embed], got [not logged" in guard.text
    assert SECRET not in all_of(guard)


def test_debug_and_other_loggers_are_left_alone(guard):
    guard.set_level(logging.DEBUG)
    logging.getLogger("celery.pool").debug("TaskPool: Apply %s (args:%s kwargs:%s)", "f", f"0 {SECRET}", {})
    assert f"0 {SECRET}" in guard.text
    logging.getLogger("shop.orders").error("order %r", {"args": SECRET})
    assert SECRET in guard.text


def test_a_record_that_cannot_be_cleaned_loses_its_text_and_harms_nobody(guard):
    class Hostile:
        @property
        def humaninfo(self):
            raise RuntimeError(SECRET)

    logging.getLogger("celery.worker").error("got %r", Hostile())
    assert "a log line that cannot be cleaned is left out (RuntimeError)" in guard.text
    assert SECRET not in all_of(guard)


def test_installed_twice_is_installed_once_and_the_setting_takes_it_out():
    before = logging.getLogRecordFactory()
    try:
        logging.setLogRecordFactory(logging.LogRecord)
        install_prompt_guard(make_app())
        install_prompt_guard(make_app())
        guard = logging.getLogRecordFactory()
        assert isinstance(guard, PromptGuard)
        assert guard.make_record is logging.LogRecord
        install_prompt_guard(make_app(sdtpu_log_prompts=True))
        assert logging.getLogRecordFactory() is logging.LogRecord
    finally:
        logging.setLogRecordFactory(before)


@pytest.mark.parametrize(
    ("kwargs", "shown"),
    [
        ({"prompt": [SECRET]}, "prompt must be a string, got [not logged"),
        ({"prompt": SECRET + "\x00"}, "prompt must not have control characters, got [not logged"),
        ({"prompt": "x", "sampler": SECRET}, "deis, lcm, tcd, got [not logged"),
        ({"prompt": "x", SECRET: 1}, "unknown parameter [not logged"),
        ({"prompt": "x", "height": 513}, "height must be a multiple of 8 up to 4096 pixels, got 513"),
        ({"prompt": "x" * 10_001}, "prompt must have at most 10,000 characters, got 10,001"),
        ({"prompt": "x", "seed": -1}, "seed must be an integer from 0 to 2**63 - 1, or a string of its decimal digits"),
        ({"prompt": "x", "seed": -1}, "digits, got -1"),
        ({"prompt": "x", "seed": SECRET}, "digits, got [not logged"),
    ],
)
def test_what_a_log_may_say_of_a_request_that_is_not_allowed(kwargs, shown):
    with pytest.raises(InvalidRequest) as caught:
        GenerationRequest.parse((), kwargs)
    assert shown in describe(caught.value)
    assert SECRET not in describe(caught.value)


def test_an_error_of_a_redis_pipeline_does_not_quote_what_was_sent():
    text = f'Command # 1 (SETEX celery-task-meta-x 86400 {{"prompt": "{SECRET} (a fox)"}}) of pipeline caused error: no'
    assert (
        describe(exceptions.NoPermissionError(text))
        == "NoPermissionError('Command # 1 (SETEX …) of pipeline caused error: no')"
    )


@pytest.mark.parametrize(
    ("exc", "shown"),
    [
        (ModuleNotFoundError("No module named 'jax'"), "ModuleNotFoundError(\"No module named 'jax'\")"),
        (ImportError("libtpu.so: cannot open shared object file"), "libtpu.so"),
        (NameError("name 'publsh' is not defined"), "publsh"),
        (OperationalError("[Errno 111] Connection refused"), "[Errno 111] Connection refused"),
        (QueueNotFound("Queue 'web' missing from task_queues"), "missing from task_queues"),
        (type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})(
            'Could not connect to the endpoint URL: "https://s3.example/bucket"'), "https://s3.example/bucket"),
    ],
)  # fmt: skip
def test_the_text_of_an_error_that_holds_no_prompt_is_logged(exc, shown):
    """`ModuleNotFoundError([not logged …])` told nobody what was missing."""
    assert shown in describe(exc)


@pytest.mark.parametrize(
    "exc",
    [
        ValueError(SECRET),
        KeyError(SECRET),
        MaxRetriesExceededError(f"Can't retry sdtpu.generate[1] args:['{SECRET}'] kwargs:{{}}"),
        ChordError(f"Dependency 1 raised ValueError('{SECRET}')"),
        EncodeError(SECRET),
        type("OperationalError", (Exception,), {"__module__": "sqlalchemy.exc"})(f"[parameters: ('{SECRET}',)]"),
        type("OperationalError", (Exception,), {"__module__": "django.db.utils"})(SECRET),
    ],
)
def test_the_text_of_an_error_that_may_quote_a_prompt_is_not(exc):
    assert SECRET not in describe(exc)

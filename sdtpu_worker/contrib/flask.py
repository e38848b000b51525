"""The jobs API in a Flask app: `app.register_blueprint(create_blueprint(celery_app))`. It needs the extra `flask`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flask import Blueprint, Response, current_app, request, session, url_for

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.exchange import EventAnswer
from sdtpu_worker.web.owners import owner_in_session
from sdtpu_worker.web.sync_front import METHODS, PATHS, SyncFront, SyncRequest

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Caller", "JobsBlueprint", "create_blueprint"]


class JobsBlueprint(Blueprint):
    """A blueprint with the jobs API; see `create_blueprint`.

    Args:
        app: the client's Celery app.
        name: of the blueprint.
        url_prefix: the address of the jobs API.
    """

    def __init__(self, app: Celery, name: str, url_prefix: str) -> None:
        super().__init__(name, __name__, url_prefix=url_prefix)
        self._front = SyncFront(app)

    def close(self) -> None:
        """Close the connections of this process; another request opens new ones."""
        self._front.close()

    def serve(self, path: str, find_owner: Callable[[], str | Caller | None]) -> Callable[..., Response]:
        """Return the view of a path of the jobs API."""

        def view(**names: str) -> Response:
            asked = SyncRequest(
                method=request.method,
                base=url_for(f"{self.name}.jobs", _external=True),
                headers={name.lower(): value for name, value in request.headers},
                query=request.args,
                owner=find_owner,
                read=request.stream.read,
                csrf_token=_csrf_token,
            )
            answer = self._front.answer(path, asked, **names)
            if isinstance(answer, EventAnswer):
                events = self._front.iterate(answer)
                return Response(events, headers=dict(answer.headers), mimetype=answer.media_type)
            media_type = answer.media_type or None
            return Response(answer.body, answer.status, dict(answer.headers), content_type=media_type)

        return view


def create_blueprint(
    app: Celery,
    *,
    owner: Callable[[], str | Caller | None] | None = None,
    name: str = "sdtpu",
    url_prefix: str = "/v1/jobs",
) -> JobsBlueprint:
    """Return a blueprint with the jobs API: enqueue, list, look, picture, events, cancel.

    Its connections open with the first request of each process.

    Args:
        app: the client's Celery app, with `install(app)`; its configuration and the environment have the settings.
        owner: returns whose request it is, inside the request: a text such as the user's id, None for nobody, who is
            refused, or a `Caller` with priorities and a number of jobs of its own. None: everybody who has a session,
            which needs Flask's `SECRET_KEY`. Callers see their own jobs only.
        name: of the blueprint; two of them in one app have two names.
        url_prefix: the address of the jobs API in the Flask app.
    """
    blueprint = JobsBlueprint(app, name, url_prefix)
    for path in PATHS:
        endpoint = _endpoint_name(path)
        rule = path.replace("{", "<").replace("}", ">")
        blueprint.add_url_rule(
            rule,
            endpoint,
            blueprint.serve(path, owner or _owner_in_session),
            methods=METHODS,
            provide_automatic_options=False,
        )
    return blueprint


def _endpoint_name(path: str) -> str:
    """Return the name of a path of the jobs API for `url_for`: `jobs`, `job_image`, `page`, …"""
    if path.startswith("/page"):
        return {"/page": "to_page", "/page/": "page"}.get(path, "page_file")
    return path.replace("/{job_id}", "job").replace("/", "_").removeprefix("_") or "jobs"


def _csrf_token() -> str:
    """Return the token of Flask-WTF's `CSRFProtect` where the app has it."""
    make_token = current_app.jinja_env.globals.get("csrf_token")
    return str(make_token()) if callable(make_token) else ""


def _owner_in_session() -> str:
    if not current_app.secret_key:
        raise ConfigurationError(
            "callers are told apart by Flask's session, which needs SECRET_KEY: set it, or give create_blueprint an"
            " `owner`"
        )
    return owner_in_session(session)

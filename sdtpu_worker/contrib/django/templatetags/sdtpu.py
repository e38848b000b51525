"""`{% sdtpu_card job %}`: a card that shows a job's progress, and then its image; `{% sdtpu_media %}`: its script."""

from __future__ import annotations

from typing import Any

from django import template
from django.template.context import Context
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

register = template.Library()


@register.simple_tag
def sdtpu_media() -> SafeString:
    """Return the style sheet and the script of the cards, once for a page."""
    return format_html(
        '<link rel="stylesheet" href="{}"><script type="module" src="{}"></script>',
        reverse("sdtpu:page_file", args=["card-on-a-page.css"]), reverse("sdtpu:page_file", args=["card-on-a-page.js"]),
    )  # fmt: skip


@register.inclusion_tag("sdtpu/card.html", takes_context=True)
def sdtpu_card(context: Context, job: Any, live: bool = False) -> dict[str, Any]:
    """Render the card of a job.

    Args:
        context: of the page.
        job: a `GeneratedImage`, or a job's id.
        live: whether previews are shown as they come, over an event stream: under ASGI it costs no thread. Else the
            card asks for the job's state.
    """
    task_id = getattr(job, "task_id", job)
    return {
        "task_id": task_id,
        "prompt": getattr(job, "prompt", ""),
        "image": getattr(job, "image", None),
        "live": live,
        "csrf_token": context.get("csrf_token", ""),
    }

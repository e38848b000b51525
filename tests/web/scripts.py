"""Scripts of a page in V8, without a browser: a few elements, `fetch`, and timers that a test fires."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from py_mini_racer import MiniRacer

_WORLD = """
var timers = [], asked = [], replies = [], listeners = {}
var element = () => ({style: {}, dataset: {}, hidden: true, textContent: "", value: 0,
                      addEventListener(name, does) { listeners[name] = does }})
var elements = {}
var named = name => elements[name] ??= element()
var document = {getElementById: named, querySelectorAll: () => []}
var setTimeout = does => { timers.push(does) }
var fetch = async (url, options) => {
  asked.push({url, method: options?.method ?? "GET", headers: options?.headers ?? {}})
  const reply = replies.shift()
  return {status: reply.status, ok: reply.status < 300, json: async () => JSON.parse(reply.body)}
}
"""


class Page:
    """A page with scripts.

    Args:
        answer: returns status and body for a method, a URL and headers.
    """

    def __init__(self, answer: Callable[[str, str, dict[str, str]], tuple[int, bytes]]) -> None:
        self._v8, self._answer = MiniRacer(), answer
        self._v8.eval(_WORLD)

    def load(self, script: Path) -> None:
        """Run a script, module or not."""
        text = re.sub(r"^import .*$", "", script.read_text(), flags=re.MULTILINE)  # its test loads that before
        self._v8.eval(text.replace("export function", "function").replace("export const", "const"))

    def do(self, code: str, url: str, method: str = "GET", headers: dict[str, str] | None = None) -> None:
        """Run code that asks for a URL once, with the answer at hand."""
        status, body = self._answer(method, url, headers or {})
        self._v8.eval(f"replies.push({json.dumps({'status': status, 'body': body.decode()})}); {code}; 0")
        asked = self.value("asked.splice(0)")
        assert [(each["method"], each["url"]) for each in asked] == [(method, url)]
        assert asked[0]["headers"] == (headers or {})

    def wait(self, url: str) -> None:
        """Let the time of the script's only timer come; it asks for the URL again."""
        self.do("timers.shift()()", url)

    def value(self, code: str) -> Any:
        """Return what an expression is worth."""
        return json.loads(str(self._v8.eval(f"JSON.stringify({code})")))

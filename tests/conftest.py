"""What every room shares; nothing here loads JAX or starts a Redis. `tests/support` has what several rooms use."""

from __future__ import annotations

import signal

import pytest

# A shell starts its background jobs deaf to Ctrl-C, and their children inherit that; tests send real interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signals_are_as_before():
    """Fail the test that leaves a handler of a signal behind, not a later one that sends this signal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the fault tests run in full; here, because only this file is read before the command line is."""
    parser.addoption(
        "--long",
        action="store_true",
        help="run tests/chaos, tests/histories and tests of loading in their long form: hours",
    )
    parser.addoption(
        "--seeds",
        metavar="FIRST:END",
        help="the histories that tests/histories draws: from the seed FIRST up to, without, END; 42:43 is one of them",
    )

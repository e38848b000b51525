"""What an error or a log line shows of a URL."""

from __future__ import annotations

import pytest

from sdtpu_worker.redaction import brief, sanitize_url, without_password


def test_a_semicolon_in_a_password_hides_no_part_of_it_from_the_mask():
    text = "cannot reach sentinel://me:p;s3cret@a:1/0;sentinel://:s3cret;@b:2"
    assert sanitize_url(text) == "cannot reach sentinel://me:**@a:1/0;sentinel://:**@b:2"
    assert without_password("redis://:p;s3cret@a/0") == "redis://:**@a/0"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["a://" * 100_000, "b" * 1_000_000, "x://" + ";b" * 500_000, "?key" * 200_000, "?" + "key" * 200_000]
)
def test_a_long_text_takes_no_long_time(text):
    assert sanitize_url(text) == text


def test_a_value_that_is_cut_short_shows_no_part_of_a_password():
    url = f"redis://me:{'s3cret' * 30}@host/0"
    for value in (url, [url], {"broker_url": url}):
        assert "s3cret" not in brief(value)
        assert "redis://me:**@host/0" in brief(value)

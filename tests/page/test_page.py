"""The page at the door, in headless Chromium, beside a real worker: from the first click to the picture."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.http.doors import start_door
from tests.page.browser import SCREENSHOTS, WAIT_MS
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

HEART, STAR = "a red heart on a white background", "a yellow star on a purple background"
RUNNING, DONE = re.compile(r"\d+ %"), re.compile("drawn in ")
CANCEL_ALL = "document.querySelectorAll('[data-does=cancel]:not([hidden])').forEach(each => each.click())"
LONG = "1000"
"""Steps of a job that ends after ten seconds or more, long after a page has shown its slot."""
FORMING = "500"
"""Steps of a job that ends, but not before a page has shown that it runs."""


def wait_for(card, text):
    expect(card.locator(".state")).to_have_text(text, timeout=WAIT_MS)


def test_a_picture_forms_from_the_click_to_the_download(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    visitor.check(state="first-visit")
    card = visitor.make(HEART, num_inference_steps=LONG, seed="7")
    expect(card).to_be_visible()
    wait_for(card, RUNNING)
    expect(card.locator("img.picture")).to_have_attribute("src", re.compile("^data:image/png"), timeout=WAIT_MS)
    before = card.locator("progress").evaluate("bar => bar.value")
    expect(visitor.page.locator(".slot[data-kind=own]")).to_have_count(1, timeout=WAIT_MS)
    expect(visitor.page.locator("#occupancy")).to_contain_text("1 of 4 slots busy")
    visitor.check(state="forming")
    assert card.locator("progress").evaluate("bar => bar.value") > before
    wait_for(card, DONE)
    expect(card.locator("img.picture.done")).to_be_visible()
    expect(card.locator(".settings")).to_have_text(f"64 × 64 · {LONG} steps · dpmsolver++ · guidance 7.5 · seed 7")
    expect(visitor.page.locator("#announcer")).to_have_text(f"Done: {HEART}")
    with visitor.page.expect_download() as download:
        card.get_by_text("Download").click()
    assert download.value.suggested_filename == "a-red-heart-on-a-white-background-7.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    card.locator(".frame").click()
    expect(visitor.page.locator("#viewer")).to_be_visible()
    visitor.check(state="large")
    visitor.page.keyboard.press("Escape")
    visitor.check(state="done")


def test_a_job_is_cancelled_tried_again_and_copied(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    card = visitor.make(STAR, num_inference_steps=LONG)
    wait_for(card, RUNNING)
    card.get_by_text("Cancel").click()
    wait_for(card, "Cancelled")
    expect(card.get_by_text("Try again")).to_be_visible()
    visitor.check(state="cancelled")
    card.get_by_role("button", name="Edit").click()
    expect(visitor.page.locator("#num_inference_steps")).to_have_value(LONG)
    expect(visitor.page.locator("#prompt")).to_be_focused()
    first = visitor.make(STAR, num_inference_steps="8", seed="11")
    wait_for(first, DONE)
    first.get_by_role("button", name="Copy").click()
    expect(first.get_by_text("Copied")).to_be_visible()
    copied = json.loads(visitor.page.evaluate("navigator.clipboard.readText()"))
    assert copied == {"prompt": STAR, "image_format": "png", "num_inference_steps": 8, "seed": 11}
    count = visitor.card(STAR).count()
    first.get_by_text("New seed").click()
    expect(visitor.card(STAR)).to_have_count(count + 1)
    again = visitor.card(STAR).first
    wait_for(again, DONE)
    expect(again.locator(".settings")).to_contain_text("8 steps")
    assert "seed 11" not in again.locator(".settings").text_content()


def test_the_gallery_and_what_was_typed_survive_a_reload(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    card = visitor.make("a blue ring on a black background", num_inference_steps=LONG)
    wait_for(card, RUNNING)
    visitor.page.fill("#prompt", "what comes next")
    visitor.page.reload()
    wait_for(card, RUNNING)
    expect(visitor.page.locator("#prompt")).to_have_value("what comes next")
    card.get_by_text("Cancel").click()
    wait_for(card, "Cancelled")
    visitor.page.reload()
    wait_for(card, "Cancelled")
    visitor.check(state="reloaded")


def test_the_servers_own_words_stand_beside_the_field_at_fault(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    before = visitor.page.locator(".card").count()
    refused = visitor.make(HEART, num_inference_steps="5000")
    expect(visitor.page.locator("#num_inference_steps-error")).to_have_text(
        "num_inference_steps must be an integer from 1 to 1000, got 5000"
    )
    expect(visitor.page.locator("#num_inference_steps")).to_be_focused()
    wait_for(refused, re.compile("Failed: num_inference_steps must be"))
    visitor.check(state="wrong-steps", allows_network_errors=True)
    visitor.make(HEART, num_inference_steps="8", guidance_scale="plenty")
    expect(visitor.page.locator("#guidance_scale-error")).to_contain_text("guidance_scale must be a finite number")
    expect(visitor.page.locator("#num_inference_steps-error")).to_be_empty()
    visitor.make(" ", guidance_scale="")
    expect(visitor.page.locator("#prompt-error")).to_contain_text("prompt must not be empty")
    expect(visitor.page.locator(".card")).to_have_count(before + 1)
    visitor.check(state="wrong-prompt", allows_network_errors=True)


def test_the_form_offers_what_the_worker_serves(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    page = visitor.page
    expect(page.locator("#model")).to_have_text("embedded")
    page.locator("#more summary").click()
    assert page.locator("#size option").all_text_contents() == ["the model’s own", "64 × 64"]
    assert "dpmsolver++ (the model’s own)" in page.locator("#sampler option").all_text_contents()
    expect(page.locator("#num_inference_steps")).to_have_attribute("placeholder", "50")
    expect(page.locator("#image-field")).to_be_visible()
    expect(page.locator("#controlnet-field")).to_be_hidden()
    page.get_by_label("outline").fill("0.8")
    page.select_option("#sampler", "euler")
    card = visitor.make("a green square on a black background", num_inference_steps="6")
    wait_for(card, DONE)
    expect(card.locator(".settings")).to_contain_text("euler")
    visitor.check(state="options")


def test_a_picture_may_start_from_another_one_and_be_tried_again(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    visitor.page.click("#more summary")
    drawing = io.BytesIO()
    Image.new("RGB", (64, 64), "purple").save(drawing, "png")
    visitor.page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": drawing.getvalue()})
    card = visitor.make(
        "a yellow star on a purple background, from a picture", num_inference_steps="10", strength="0.9"
    )
    wait_for(card, DONE)
    card.get_by_text("New seed").click()
    expect(visitor.card("from a picture")).to_have_count(2)
    wait_for(visitor.card("from a picture").first, DONE)
    visitor.page.reload()
    expect(visitor.card("from a picture")).to_have_count(2)
    again = visitor.card("from a picture").first.get_by_text("New seed")
    expect(again).to_be_hidden()  # the server keeps the picture to itself


def test_the_page_needs_no_mouse(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    keyboard, focused = visitor.page.keyboard, visitor.page.locator(":focus")
    keyboard.press("Tab")
    expect(focused).to_have_text("Skip to your pictures")
    keyboard.press("Tab")
    expect(focused).to_have_attribute("id", "prompt")
    keyboard.type("a white heart on a red background")
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.type(LONG)
    visitor.page.focus("#prompt")
    keyboard.press("Control+Enter")
    card = visitor.card("a white heart on a red background").first
    wait_for(card, RUNNING)
    expect(visitor.page.locator("#prompt")).to_be_focused()
    slot = visitor.page.locator(".slot[data-kind=own]").first
    slot.focus()
    keyboard.press("Enter")
    keyboard.press("Tab")
    expect(focused).to_have_text("Cancel")
    keyboard.press("Enter")
    wait_for(card, "Cancelled")
    expect(card).to_be_focused()


@pytest.mark.parametrize(("name", "options"), [
    ("narrow", {"viewport": {"width": 360, "height": 740}}),
    ("dark", {"color_scheme": "dark"}),
    ("narrow-dark", {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "reduced_motion": "reduce"}),
])  # fmt: skip
def test_the_page_fits_a_telephone_the_night_and_those_who_want_no_motion(door, visit, name, options):
    visitor = visit(door.url, **options)
    visitor.wait_until_live()
    card = visitor.make(STAR, num_inference_steps=FORMING)
    wait_for(card, RUNNING)
    light = visitor.page.evaluate("Number(getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0])")
    assert (light < 60) == (options.get("color_scheme") == "dark")
    if "reduced_motion" in options:
        assert visitor.page.evaluate("document.getAnimations().length") == 0
    visitor.check(state=f"{name}-forming")
    wait_for(card, DONE)
    visitor.check(state=f"{name}-done")


def test_many_jobs_share_one_stream_and_say_their_place_in_the_queue(door, visit):
    visitor = visit(door.url)
    visitor.wait_until_live()
    visitor.make(HEART, 16, num_inference_steps=LONG)
    cards = visitor.page.locator(".card:is([data-status=queued], [data-status=running])")
    expect(cards).to_have_count(16)
    ahead = visitor.page.locator(".state", has_text=re.compile(r"ahead in the queue · ready in|first in the queue"))
    expect(ahead).to_have_count(8, timeout=WAIT_MS)  # four have slots, four are next for one
    expect(visitor.page.locator(".state", has_text="next for a slot")).to_have_count(4)
    expect(visitor.page.locator("#occupancy")).to_have_text("4 of 4 slots busy · 8 waiting")

    def places() -> set[int]:
        return {int(text.split()[0]) for text in ahead.all_text_contents() if text[0].isdigit()}

    wait_until(lambda: places() == set(range(1, 8)), lambda: f"a place for each: {places()}")
    assert open_streams(visitor) == 1
    visitor.check(state="queue")
    visitor.page.evaluate(CANCEL_ALL)
    expect(cards).to_have_count(0)
    expect(visitor.page.locator("#occupancy")).to_have_text("0 of 4 slots busy", timeout=WAIT_MS)


def open_streams(visitor):
    streams = [each for each in visitor.requests if "/events?" in each.url]
    return sum(each.failure is None and each.timing["responseEnd"] == -1 for each in streams)


def test_a_page_without_a_stream_asks_instead(redis_url, worker, visit, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_HTTP_MAX_STREAMS="1") as door:
        first, second = visit(door.url), None
        first.wait_until_live()
        second = visit(door.url)
        second.wait_until_live()
        card = second.make(STAR, num_inference_steps="30")
        wait_for(card, DONE)
        second.check(state="asking", allows_network_errors=True)


def test_pictures_form_beside_those_that_are_done(door, visit):
    """Its screenshot is `docs/images/page.jpg`."""
    visitor = visit(door.url, viewport={"width": 1200, "height": 1000})
    visitor.wait_until_live()
    for prompt in (
        "a yellow star on a purple background",
        "an orange ring on a black background",
        "a red heart on a white background",
    ):
        wait_for(visitor.make(prompt, num_inference_steps="30"), DONE)
    prompts = (
        "a blue square on a yellow background",
        "a green triangle on a white background",
        "a white heart on a red background",
        "a purple circle on a yellow background",
        "a large black star on an orange background",
    )
    for prompt in prompts:
        visitor.make(prompt, num_inference_steps=FORMING)
    visitor.page.fill("#prompt", "a white ring at the bottom of a blue background")
    forming = visitor.page.locator(".card[data-status=running]", has=visitor.page.locator("img[src^=data]"))
    expect(forming).to_have_count(4, timeout=WAIT_MS)
    if SCREENSHOTS:
        wait_for(forming.last, re.compile("[7-9]. %"))
        visitor.page.screenshot(path=f"{SCREENSHOTS}/page.jpg", full_page=True, type="jpeg", quality=85)
    visitor.check(state="forming-beside-done")
    visitor.page.evaluate(CANCEL_ALL)
    expect(visitor.page.locator(".card:is([data-status=queued], [data-status=running])")).to_have_count(0)

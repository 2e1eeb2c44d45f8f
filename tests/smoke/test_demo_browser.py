"""The demo's page in a real browser: an example is picked, asked, answered; nothing leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from llava.serve import demo
from llava.serve.engine import Engine

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing(what: str) -> None:
    """Skip by name; with LLAVA_REQUIRE_BROWSER=1 (continuous integration) fail."""
    if os.environ.get("LLAVA_REQUIRE_BROWSER", "0") not in ("", "0"):
        pytest.fail(f"LLAVA_REQUIRE_BROWSER is set and there is no {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """LLAVA_BROWSER, else the first browser in the PATH."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    path = os.environ.get("LLAVA_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing("Chromium or Chrome (LLAVA_BROWSER names one)")
    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running demo of a tiny model with one example."""
    if importlib.util.find_spec("gradio") is None:
        missing("gradio (the extra serve)")
    root = tmp_path_factory.mktemp("demo")
    picture = root / "noise.png"
    Image.effect_noise((56, 56), 80).convert("RGB").save(picture)
    engine = Engine.load(save_tiny_checkpoint(root / "tiny"), device="cpu")
    blocks, looks = demo.build_page(demo.Demo(engine), [[str(picture), "Is there a red 3?"]])
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True,
        share=False, ssr_mode=False, allowed_paths=[str(root)], **looks,
    )  # fmt: skip
    yield address
    blocks.close()


def test_ask_in_a_browser(browser: Any, url: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.get_by_text("Is there a red 3?").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value.length > 0")
    page.wait_for_selector("#picture img")
    page.click("#ask")
    page.wait_for_selector("#answers table", timeout=60_000)
    words = page.inner_text("#answers")
    assert "no dropping" in words
    assert "pyramiddrop" in words
    assert "median of 7 runs" in words
    assert "--reduction" in page.inner_text("#plan")
    assert "layers=" in page.inner_text("#plan")
    # survivors of four stages or fewer, and a score map for each cut
    maps = page.locator("#tokens svg").count()
    figures = page.locator("#tokens figure").count()
    assert maps == 2 * figures - 1 >= 3
    box = page.locator("#tokens svg").first.bounding_box()
    assert box["width"] > 100
    assert errors == []
    outside = [each for each in asked if not each.startswith((url, "data:", "blob:"))]
    assert outside == []
    page.close()


def test_a_mistake_is_shown_and_the_page_lives_on(browser: Any, url: str) -> None:
    page = browser.new_page(viewport={"width": 420, "height": 900})
    page.goto(url)
    page.click("#ask")
    page.get_by_text("there is no picture").wait_for(timeout=30_000)
    page.get_by_text("Is there a red 3?").first.click()
    page.wait_for_selector("#picture img")
    page.get_by_text("more", exact=True).click()
    page.fill("#own textarea", "nosuch:k=1")
    page.click("#ask")
    page.get_by_text("nosuch").last.wait_for(timeout=30_000)
    page.fill("#own textarea", "uniform:layers=[1],ratios=[0.25]")
    page.click("#ask")
    page.wait_for_selector("#answers table", timeout=60_000)
    assert "uniform:layers=[1],ratios=[0.25]" in page.inner_text("#plan")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.close()


def test_gradio_is_told_to_stay_silent(url: str) -> None:
    import httpx

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    config = json.loads(httpx.get(f"{url}config").text)
    assert config["analytics_enabled"] is False

"""Reports written once for all tests, and a headless Chromium."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regard.report.build import Report, build_report

from .models import HOSTILE, Pieces, llama, text_ids, vit


@pytest.fixture(scope="session")
def text_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """700 tokens, some of them markup: block maps, a finer map, an exact window, keys outside it."""
    out = tmp_path_factory.mktemp("report") / "text.html"
    return build_report(
        llama(layers=3), Pieces(), inputs={"input_ids": text_ids()}, out=out, windows=[(572, 700)], title=HOSTILE[0]
    )


@pytest.fixture(scope="session")
def image_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("report")
    y, x = np.mgrid[0:60, 0:80]
    Image.fromarray(np.stack([x * 3, y * 4, (x + y) % 256], -1).astype(np.uint8)).save(folder / "stripes.png")
    return build_report(vit(), image=folder / "stripes.png", out=folder / "image.html")


@pytest.fixture(scope="session")
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright (pip install .[test])")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


class Opened:
    """A page in a fresh context, with all that it asked of the network and all that it complained about."""

    def __init__(self, browser, path: Path, width: int = 1600, theme: str = "light", hash_: str = "") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.complaints.append(f"error: {e}"))
        self.page.on("dialog", lambda d: (self.complaints.append(f"dialog: {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(f"file://{path}{hash_}")
        self.page.wait_for_function("document.documentElement.dataset.ready === 'true'")

    def keys(self, *names: str) -> None:
        for name in names:
            self.page.keyboard.press(name)

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.dataset.key ?? document.activeElement.id")

    def overflow(self, selector: str | None = None) -> int:
        box = f"document.querySelector({selector!r})" if selector else "document.documentElement"
        return self.page.evaluate(f"{box}.scrollWidth - {box}.clientWidth")


@pytest.fixture
def opened(chromium):
    pages: list[Opened] = []

    def open_(path: Path, **options) -> Opened:
        pages.append(Opened(chromium, path, **options))
        return pages[-1]

    yield open_
    for page in pages:
        page.context.close()

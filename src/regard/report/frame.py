"""What every page has: its style and script in one file, hashed for the page's own content policy."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from .taxonomy import LOOKS, slug

__all__ = ["digest", "page_file", "script", "style"]


def page_file(name: str) -> str:
    """A file of the folder ``page``."""
    return (resources.files("regard.report") / "page" / name).read_text(encoding="utf-8")


def style(*more: str) -> str:
    """The style sheet with the roles' colours, and other sheets after it.

    What is dark by choice is also dark before the script has run.
    """
    colours = {
        theme: "".join(f"--role-{slug(role)}:{getattr(look, theme)};" for role, look in LOOKS.items())
        for theme in ("light", "dark")
    }
    sheet = page_file("style.css")
    dark = sheet.partition(':root[data-theme="dark"] {')[2].partition("}")[0] + colours["dark"]
    return "\n".join(
        [
            f":root{{{colours['light']}}}\n{sheet}",
            f':root[data-theme="dark"]{{{colours["dark"]}}}',
            f"@media (prefers-color-scheme: dark){{:root:not([data-theme]){{{dark}}}}}",
            *map(page_file, more),
        ]
    )


def script(names: Sequence[str]) -> str:
    """The scripts of these names as one; an error is told on the page."""
    body = "\n".join(page_file(f"{name}.js") for name in names)
    failed = (
        'const box = document.getElementById("failure"); box.hidden = false; '
        "box.textContent = `This page could not be drawn: ${error.message}`; console.error(error);"
    )
    return f'(async () => {{\n"use strict";\n{body}\n}})().catch((error) => {{ {failed} }});'


def digest(text: str) -> str:
    """What the content policy knows a style or script by."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

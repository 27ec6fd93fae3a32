"""Sphinx settings; `make docs` builds the pages."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent

project = "scaletrain"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
myst_heading_anchors = 3


def unlink_files(app: Any, page: str, source: list[str]) -> None:
    """Turn links to files of the repository that are not pages into plain text."""
    folder = (DOCS / page).parent

    def text_only(link: re.Match[str]) -> str:
        outside = not (folder / link[2]).resolve().is_relative_to(DOCS)
        return link[1] if outside else link[0]

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]*)[^)]*\)", text_only, source[0])


def setup(app: Any) -> None:
    app.connect("source-read", unlink_files)

"""Hook of MkDocs: files outside docs/ that a page links to become part of the site.

Pages link to them as files of the repository (`../benchmarks/README.md`), so that the links also work there. In the
site they lie below its root, under their path in the repository.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def _in_repository(source: str, link: str) -> str:
    """Path in the repository of what a page links to; `source` is the page's path in the site."""
    folder = PurePosixPath("docs" if (ROOT / "docs" / source).exists() else ".", source).parent
    return os.path.normpath(folder / link)


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to, and those that these link to."""
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for link in LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, link)
            if path.startswith(("docs/", "..")) or not (ROOT / path).is_file() or files.get_file_from_path(path):
                continue  # MkDocs checks those, and names what is missing
            file = File.generated(config, path, abs_src_path=str(ROOT / path))
            files.append(file)
            pages += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let the links point to where the files lie in the site."""

    def moved(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[1]).removeprefix("docs/")
        if files.get_file_from_path(path) is None:
            return match[1]
        return os.path.relpath(path, PurePosixPath(page.file.src_uri).parent)

    return LINK.sub(moved, markdown)

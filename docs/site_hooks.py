"""Brings the files outside docs/ that the pages link to into the site, so that one link works here and on a forge.

README.md becomes the first page. SECURITY.md, CONTRIBUTING.md and the like become pages below repository/, and other
files, such as the protos, are copied there as they are.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
HOME = "index.md"
OUTSIDE = "repository"
ALWAYS = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")


def _in_repository(page: str) -> str:
    if page == HOME:
        return "README.md"
    return page.removeprefix(f"{OUTSIDE}/") if page.startswith(f"{OUTSIDE}/") else f"docs/{page}"


def _in_site(path: str) -> str:
    if path == "README.md":
        return HOME
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def _each_link(markdown: str, change: Callable[[str], str]) -> str:
    """Return the page with each relative link outside code changed, its anchor left alone."""
    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: change(found[1]), part) for part in parts[::2]]
    return "".join(parts)


def _target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that some page links to, and those that their pages link to."""
    pages = [_in_repository(file.src_uri) for file in files if file.is_documentation_page()]
    waiting, seen = [*pages, *ALWAYS], set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
        if PurePosixPath(path).suffix == ".md":
            _each_link((ROOT / path).read_text(), lambda link, path=path: waiting.append(_target(path, link)) or link)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links that leave docs/, or come from outside it, to where the files are in the site."""
    here = page.file.src_uri
    source = _in_repository(here)

    def moved(link: str) -> str:
        return posixpath.relpath(_in_site(_target(source, link)), posixpath.dirname(here) or ".")

    return _each_link(markdown, moved)

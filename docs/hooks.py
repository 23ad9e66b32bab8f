"""What mkdocs does not do by itself: linked files of the repository become files of the site; docstrings become text.

A line `::: supported` becomes the tables of docs/supported.py. A line `::: vlmfast.module.name` becomes the docstring
of the object, of its own public methods too, as it stands in the code: shapes and dtypes are laid out for reading so.
"""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?:\.\./)+((?:bench|examples|tests|kernels)/[^)#\s]+)\)")
OBJECT = re.compile(r"^::: (\S+)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds every file beside docs/ that a page links to as ../folder/name."""
    linked = {match for page in files.documentation_pages() for match in LINK.findall(page.content_string)}
    for name in sorted(linked):
        if not (ROOT / name).is_file():
            raise FileNotFoundError(f"a page links to {name}, which is not in the repository")
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Makes those links relative to docs/, where the site has the files, and writes out docstrings."""
    up = "../" * page.file.src_uri.count("/")
    markdown = LINK.sub(lambda match: f"]({up}{match[1]})", markdown)
    return OBJECT.sub(lambda match: described(match[1]), markdown)


def described(path: str) -> str:
    if path == "supported":
        tables: str = runpy.run_path(str(ROOT / "docs" / "supported.py"))["page"]()
        return tables
    found = resolve(path)
    if isinstance(found, ModuleType):
        return f"## {path}\n\n```text\n{inspect.getdoc(found)}\n```\n"
    parts = [f"### {path.removeprefix('vlmfast.')}\n\n{text(path.split('.')[-1], found)}"]
    if inspect.isclass(found):
        methods = {name: getattr(found, name) for name in vars(found) if not name.startswith("_")}
        parts += [text(name, method) for name, method in methods.items() if callable(method) and method.__doc__]
    return "\n".join(parts)


def resolve(path: str) -> Any:
    """The module or object of a dotted name."""
    names = path.split(".")
    for k in range(len(names), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:k]))
        except ModuleNotFoundError:
            continue
        for name in names[k:]:
            found = getattr(found, name)
        return found
    raise ImportError(f"{path}: there is no such module")


def text(name: str, found: Any) -> str:
    if not inspect.getdoc(found):
        raise ValueError(f"{name} has no docstring")
    return f"```python\n{name}{inspect.signature(found)}\n```\n\n```text\n{inspect.getdoc(found)}\n```\n"

"""MkDocs hooks: pages that are generated at build time, so that they are never out of date.

- ``reference/config/<stage>.md``: every key of every stage, from the JSON schema of its config
  class (what ``mmemo schema STAGE`` prints);
- ``reference/label-sets.md``: the tables of label sets, from the registry that ``mmemo labels``
  prints;
- ``changelog.md`` and ``contributing.md``: the files at the root of the repository;
- ``studies/<study>.md``: the README and the plots of each study in ``train_configs/studies``.

Links between these files are written for a reader of the repository; here they are rewritten for
the site. A link to a file that the site does not hold becomes its path, in code type.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmemo.answers.label_sets import emotion_set, label_table, set_names, set_table
from mmemo.stages import COMPOSITES, STAGES, config_class

if TYPE_CHECKING:  # so that tests can read the pages without mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "train_configs" / "studies"
COPIED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc|obj):(<code>[^<]*</code>|``?[^`]+``?)")


def stage_names() -> list[str]:
    """Everything that ``mmemo schema`` knows: the stages, pipelines and studies."""
    return [*STAGES, *COMPOSITES]


def study_pages() -> dict[str, str]:
    """The README of each study, by its path in the repository -> its page on the site."""
    pages: dict[str, str] = {}
    for readme in sorted(STUDIES.rglob("README.md")):
        name = readme.parent.relative_to(STUDIES).as_posix().replace("/", "-")
        pages[readme.relative_to(ROOT).as_posix()] = f"studies/{name}.md"
    return pages


# Events.


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    configs: list[Any] = ["reference/config/index.md"]
    configs += [{name: f"reference/config/{name}.md"} for name in stage_names()]
    studies: list[Any] = ["studies/index.md", "studies/methods.md"]
    studies += [{_title(ROOT / source): page} for source, page in study_pages().items()]
    filled = {"reference/config/index.md": configs, "studies/index.md": studies}
    config.nav = _fill(config.nav, filled)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages and the plots of the studies."""
    from mkdocs.structure.files import File

    for name in stage_names():
        path = f"reference/config/{name}.md"
        files.append(File.generated(config, path, content=config_page(name)))
    pages = {**COPIED, **study_pages()}
    for source, page in pages.items():
        files.append(File.generated(config, page, content=_for_site(source, page)))
    for plot in sorted(STUDIES.rglob("*.png")):
        path = f"studies/{_plot_name(plot)}"
        files.append(File.generated(config, path, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables of stages and of label sets."""
    if page.file.src_uri == "reference/config/index.md":
        return markdown.replace("<!-- stages -->", stage_table())
    if page.file.src_uri == "reference/label-sets.md":
        return markdown.replace("<!-- label sets -->", label_set_tables())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings use Sphinx roles; show what they name."""
    return _ROLE.sub(r"\1", html)


# Config pages.


def stage_table() -> str:
    """A table of the stages: name, what it does, config class."""
    lines = ["| Stage | What it does | Config class |", "| --- | --- | --- |"]
    for name in stage_names():
        cls = config_class(name)
        says = STAGES[name].help if name in STAGES else cls.__doc__ or ""
        cells = (
            f"[`{name}`]({name}.md)",
            _cell(_prose(says.strip().split("\n\n")[0])),
            f"`{cls.__module__}.{cls.__name__}`",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def label_set_tables() -> str:
    """The table of all label sets, and under it one table for each set."""
    parts = [_markdown_table(set_table())]
    for name in set_names():
        parts += [f"## `{name}`", emotion_set(name).title, _markdown_table(label_table(name))]
    return "\n\n".join(parts)


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def config_page(name: str) -> str:
    """One stage's config: a table of keys for the config itself and for each of its sections."""
    cls = config_class(name)
    schema = cls.model_json_schema()
    lines = [
        f"# Config of `{name}`",
        "",
        f"`{cls.__module__}.{cls.__name__}`. `mmemo schema {name}` prints the same as JSON schema. "
        "Any key can be set on the command line as `--section.key=value`.",
        "",
        *_stage_lines(name),
        _prose(str(schema.get("description", ""))),
        "",
    ]
    for title, section in _sections(schema):
        if title:
            lines += [f"## `{title}`", "", _prose(str(section.get("description", ""))), ""]
        lines += [*_table(section, schema), ""]
    return "\n".join(lines)


def _stage_lines(name: str) -> list[str]:
    """What the registry says of a stage: its help, what it needs and writes, and what is next."""
    if name not in STAGES:
        return []
    stage = STAGES[name]
    lines = [_prose(stage.help), ""]
    parts = {"Needs": stage.needs, "Writes": stage.writes, "Next": stage.then}
    lines += [f"- **{part}:** {_prose(text)}" for part, text in parts.items() if text]
    return [*lines, "", f"Example: `mmemo {name} {stage.example}`", ""]


def _sections(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and every section under it, by its place. A section that can stand in several
    places is shown at the first."""
    shown: set[str] = set()
    queue: list[tuple[str, Mapping[str, Any]]] = [("", schema)]
    while queue:
        place, section = queue.pop(0)
        yield place, section
        for key, value in section.get("properties", {}).items():
            for suffix, name in _references(value):
                if name not in shown:
                    shown.add(name)
                    where = f"{place}.{key}{suffix}" if place else f"{key}{suffix}"
                    found = schema["$defs"][name]
                    kind = found.get("properties", {}).get("kind", {}).get("const")
                    where += f" (kind: {kind})" if kind else ""
                    queue.append((where, found))


def _references(value: Mapping[str, Any], suffix: str = "") -> Iterator[tuple[str, str]]:
    if "$ref" in value:
        yield suffix, str(value["$ref"]).rpartition("/")[2]
    for one in [*value.get("anyOf", ()), *value.get("oneOf", ())]:
        yield from _references(one, suffix)
    if isinstance(value.get("items"), Mapping):
        yield from _references(value["items"], suffix + "[]")
    if isinstance(value.get("additionalProperties"), Mapping):
        yield from _references(value["additionalProperties"], suffix + ".*")


def _table(section: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    rows = section.get("properties", {})
    if not rows:
        return ["No keys."]
    required = set(section.get("required", ()))
    lines = ["| Key | Type | Default | Limits | Description |", "| --- | --- | --- | --- | --- |"]
    for key, value in rows.items():
        default = "required" if key in required else _default(value)
        text = _prose(str(value.get("description", "")))
        cells = (f"`{key}`", _type(value, schema), default, _limits(value), text)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return lines


def _type(value: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "$ref" in value:
        found = schema["$defs"][str(value["$ref"]).rpartition("/")[2]]
        return "section" if "properties" in found else _type(found, schema)
    options = [*value.get("anyOf", ()), *value.get("oneOf", ())]
    if options:
        return " or ".join(dict.fromkeys(_type(one, schema) for one in options))
    if "enum" in value:
        return " or ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    kind = str(value.get("type", "any"))
    if kind == "array":
        if "prefixItems" in value:
            return "list of " + ", ".join(_type(one, schema) for one in value["prefixItems"])
        inner = _type(value.get("items", {}), schema)
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"mapping to {_type(inner, schema)}" if isinstance(inner, Mapping) else "mapping"
    return {"null": "null", "any": "any value"}.get(kind, kind)


def _default(value: Mapping[str, Any]) -> str:
    if "default" not in value:  # made by a factory: an empty list or mapping
        return {"array": "`[]`", "object": "`{}`"}.get(str(value.get("type")), "see description")
    text = json.dumps(value["default"], ensure_ascii=False)
    if isinstance(value["default"], dict) and value["default"] and "$ref" in value:
        return "its defaults"
    return f"`{text}`" if len(text) <= 60 else f"`{text[:57]}...`"


def _limits(value: Mapping[str, Any]) -> str:
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    found: list[str] = []
    for one in (value, *value.get("anyOf", ())):
        found += [f"{sign} {one[key]:g}" for key, sign in signs.items() if key in one]
        if one.get("minItems"):
            found.append(f"at least {one['minItems']}")
        if one.get("minLength"):
            found.append("not empty")
    return ", ".join(dict.fromkeys(found))


# Text.


def _prose(text: str) -> str:
    """A docstring's reStructuredText marks as Markdown."""
    text = _ROLE.sub(lambda found: found.group(1).strip("`").join("``"), text)
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|").strip()


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()


def _plot_name(plot: Path) -> str:
    return plot.relative_to(STUDIES).as_posix().replace("/", "-")


def _for_site(source: str, page: str) -> str:
    """A Markdown file of the repository as a page: its links lead to other pages."""
    pages = {**COPIED, **study_pages()}
    text = (ROOT / source).read_text(encoding="utf-8")

    def rewrite(found: re.Match[str]) -> str:
        mark, label, target, anchor = found.groups()
        if not target or "://" in target:
            return found.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/"):
            there = path.removeprefix("docs/")
        elif path in pages:
            there = pages[path]
        elif mark:
            there = f"studies/{_plot_name(ROOT / path)}"
        else:
            return f"{label} (`{path}`)"
        link = os.path.relpath(there, posixpath.dirname(page) or ".")
        return f"{mark}[{label}]({link}{anchor or ''})"

    return _LINK.sub(rewrite, text)


def _fill(nav: Any, filled: Mapping[str, list[Any]]) -> Any:
    """The navigation with each page that ``filled`` names replaced by a section."""
    if isinstance(nav, list):
        return [_fill(one, filled) for one in nav]
    if isinstance(nav, dict):
        return {
            title: filled.get(value, value) if isinstance(value, str) else _fill(value, filled)
            for title, value in nav.items()
        }
    return nav

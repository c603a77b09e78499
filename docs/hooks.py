"""What mkdocs builds beyond the pages that lie in `pages/`: nothing is written twice.

`{{ README: A heading }}` in a page is that section of README.md, whose commands and code the test run executes. The guide is README's sections, the
reference comes from docstrings, the command line and OpenAPI, and what `infra/` says of itself is taken over as it stands.
"""

from __future__ import annotations

import ast
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastq", "pipelines", "feature_repo", "serving")
ELSEWHERE = "https://unpkg.com/iframe-worker/shim"
LEFT_OUT = ("What the demo does",)  # of the guide: the front page has it


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Directories in `nav` stand for the pages that are made in them."""
    made = pages()

    def filled(entry: Any) -> Any:
        match entry:
            case dict():
                return {title: filled(what) for title, what in entry.items()}
            case list():
                return [filled(one) for one in entry]
            case str() if entry.endswith("/"):
                return [path for path in made if path.startswith(entry)]
        return entry

    config.nav = filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"^\{\{ README: (.+?) \}\}$", lambda found: section(found[1]), markdown, flags=re.MULTILINE)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    return _at_home(output, page.url)


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    return _at_home(output, template_name)


def _at_home(output: str, url: str) -> str:
    """The theme would fetch a stand-in for workers from another machine; ours lies beside the pages."""
    return output.replace(ELSEWHERE, get_relative_url("assets/worker.js", url))


# ---- README and infra ------------------------------------------------------------------------------------------------------
def sections() -> dict[str, str]:
    """README's text under each heading of the second rank."""
    parts = re.split(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def section(title: str) -> str:
    found = sections()
    if title not in found:
        raise KeyError(f"README.md has no section {title!r}; it has {', '.join(found)}")
    return found[title].strip()


def pages() -> dict[str, str]:
    """Every page that is made, by its path."""
    made = {f"guide/{_slug(title)}.md": f"# {title}\n\n{text.strip()}\n" for title, text in sections().items() if title not in LEFT_OUT}
    for name in ("runbook", "scale", "log"):
        made[f"infra/{name}.md"] = (ROOT / "infra" / f"{name}.md").read_text(encoding="utf-8")
    made["infra/changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "infra" / "decisions").glob("*.md")):
        made[f"infra/decisions/{path.name}"] = path.read_text(encoding="utf-8")
    return made | {"reference/commands.md": commands(), "reference/http.md": http(), "reference/python.md": python(), **modules()}


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


# ---- Python ----------------------------------------------------------------------------------------------------------------
def python() -> str:
    """The public names, each from the module that it lives in."""
    import fastq

    names = [f"::: {fastq._HOMES[name]}.{name}" for name in fastq.__all__]  # noqa: SLF001 - where each public name lives
    return "\n\n".join(["# Python", "`import fastq` gives these names; each is loaded on first use.", *names]) + "\n"


def modules() -> dict[str, str]:
    """A page per module: what it is for, and what of it has no leading underscore."""
    made = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if path.name != "__init__.py" and said:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                made[f"reference/modules/{name}.md"] = f"# {name}\n\n::: {name}\n    options: {{show_root_heading: false}}\n"
    return made


# ---- the command line ------------------------------------------------------------------------------------------------------
def commands() -> str:
    """Each command as its own `--help` has it."""
    from typer.core import TyperGroup
    from typer.main import get_command

    from fastq.cli import app

    lines = ["# Commands", "Every command runs in the workspace: the current directory, or `--workspace DIR`.", ""]
    front = get_command(app)
    assert isinstance(front, TyperGroup), "an application of several commands is a group"
    context = front.make_context("fastq", [], resilient_parsing=True)

    def told(name: str, command: Any, parent: Any, rank: int) -> None:
        if command.hidden:
            return
        at = command.context_class(command, info_name=name.rpartition(" ")[2], parent=parent)
        lines.extend(["#" * rank + f" {name}", "", (command.help or "").strip(), ""])
        lines.extend(["```console", command.get_usage(at).removeprefix("Usage: ").strip(), "```", ""])
        rows = [record for each in command.get_params(at) if (record := each.get_help_record(at)) and "--help" not in record[0]]
        if rows:
            lines.extend(["| option | |", "| --- | --- |", *(f"| `{_cell(option.replace('|', ', '))}` | {_cell(says)} |" for option, says in rows), ""])
        if command.epilog:
            lines.extend([command.epilog, ""])
        for each, inner in getattr(command, "commands", {}).items():
            told(f"{name} {each}", inner, at, rank + 1)

    for name, command in front.commands.items():
        told(f"fastq {name}", command, context, 2)
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


# ---- HTTP ------------------------------------------------------------------------------------------------------------------
def http() -> str:
    """Each route with what it takes and gives, from the endpoint's own OpenAPI document, for the platform of the demo."""
    from fastq import worlds
    from fastq.platform import platform_from_tree
    from serving.endpoint import create_app

    with tempfile.TemporaryDirectory() as somewhere:
        schema = create_app(platform_from_tree(worlds.platform_tree(worlds.world("arena")), Path(somewhere), "the demo")).openapi()
    lines = [
        "# HTTP",
        schema["info"]["description"],
        "",
        "`Authorization: Bearer KEY` on every route but those that say otherwise. As a document: `/openapi.json`.",
        "",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            lines.extend([f"## {method.upper()} {path}", "", operation.get("description") or operation.get("summary", ""), ""])
            if not operation.get("security"):
                lines.extend(["Needs no key.", ""])
            asked = [(p["name"], p["in"], p.get("required", False), p.get("schema", {})) for p in operation.get("parameters", [])]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if asked:
                lines.extend(["| parameter | in | type | |", "| --- | --- | --- | --- |"])
                lines.extend(
                    f"| `{name}` | {where} | {kind(said)} | {'required' if needed else ''} {_cell(said.get('description', ''))} |"
                    for name, where, needed, said in asked
                )
                lines.append("")
            if body:
                lines.extend([f"Takes {kind(body)}.", ""])
            answers = [f"| {code} | {_cell(answer.get('description', ''))} | {_of(answer)} |" for code, answer in operation.get("responses", {}).items()]
            lines.extend(["| answer | | |", "| --- | --- | --- |", *answers, ""])
    lines.extend(["## What is sent", ""])
    for name, said in sorted(schema["components"]["schemas"].items()):
        lines.extend([f"### {name}", "", said.get("description", ""), ""])
        fields = said.get("properties", {})
        if fields:
            lines.extend(["| field | type | |", "| --- | --- | --- |"])
            needed = said.get("required", [])
            lines.extend(
                f"| `{field}` | {kind(what)} | {'required. ' if field in needed else ''}{_cell(what.get('description', ''))} |"
                for field, what in fields.items()
            )
            lines.append("")
    return "\n".join(lines) + "\n"


def _of(answer: dict[str, Any]) -> str:
    found = [kind(content["schema"]) for content in answer.get("content", {}).values() if content.get("schema")]
    return found[0] if found else ""


def kind(said: dict[str, Any]) -> str:
    """A JSON schema in a few words; others of the document as links."""
    if "$ref" in said:
        name = said["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf", "allOf"):
        if word in said:
            return " or ".join(dict.fromkeys(kind(each) for each in said[word]))
    if "enum" in said or "const" in said:
        return ", ".join(f"`{value}`" for value in said.get("enum", [said.get("const")]))
    match said.get("type"):
        case "array":
            return f"list of {kind(said['items'])}" if said.get("items") else "list"
        case "object" if isinstance(said.get("additionalProperties"), dict):
            return f"names to {kind(said['additionalProperties'])}"
    limits = [f"{word} {said[key]}" for key, word in (("minimum", "from"), ("maximum", "to"), ("maxLength", "at most"), ("pattern", "like")) if key in said]
    return " ".join([str(said.get("type", "anything")), *limits])

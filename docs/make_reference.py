"""Write `docs/reference/` and the list of how-to pages: `make docs`. A test holds the pages to what this writes.

Meanings come from where they are written once: docstrings under fields, comments beside them, help texts
of the command line.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
FOLDER = DOCS / "reference"
INDEX = DOCS / "README.md"
ELSEWHERE = ("README", "methods", "tutorial-")
"""Pages that the index names by hand."""
NOTE = "<!-- Written by docs/make_reference.py from the code; change it there, then run `make docs`. -->\n"


def pages() -> dict[str, str]:
    """Every page's text by its file name."""
    written = {
        "space-file.md": space_file(),
        "columns.md": columns(),
        "commands.md": commands(),
        "python.md": python_api(),
    }
    return {name: f"{NOTE}\n{text.rstrip()}\n" for name, text in written.items()}


def index() -> str:
    """The index, with every other page in the list of how-to pages."""
    text = INDEX.read_text(encoding="utf-8")
    before, start, rest = text.partition("<!-- how-to: written by docs/make_reference.py -->\n")
    after = rest[rest.index("<!-- /how-to -->") :]
    pages = sorted(p for p in DOCS.glob("*.md") if not p.name.startswith(ELSEWHERE))
    lines = [f"- [{_title(p)}]({p.name})\n" for p in pages]
    return f"{before}{start}\n{''.join(lines)}\n{after}"


def _title(page: Path) -> str:
    first = page.read_text(encoding="utf-8").lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() or page.stem


def fields_of(cls: type) -> Iterator[tuple[str, str, ast.expr | None, str]]:
    """(name, annotation, default, meaning) of the fields that a class itself declares."""
    module = sys.modules[cls.__module__]
    source = inspect.getsource(module)
    lines = source.splitlines()
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    for i, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        after = node.body[i + 1] if i + 1 < len(node.body) else None
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            meaning = inspect.cleandoc(str(after.value.value))
        else:
            beside = [
                lines[n].partition("  # ")[2] for n in range(item.lineno - 1, item.end_lineno or item.lineno)
            ]
            meaning = next(filter(None, beside), "")
        if not item.target.id.startswith("_"):
            yield item.target.id, ast.unparse(item.annotation), item.value, " ".join(meaning.split())


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary(item: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(item) or "").split("\n\n")[0].split())


# The space file


def space_file() -> str:
    from ucc_search import config
    from ucc_search.config.loading import models_in

    parts = [
        "# The space file",
        "Every key, with its default. Unknown keys are refused, with the nearest known one. `--set key.sub=value` "
        "overrides any of them on the command line.",
    ]
    places: dict[type, list[str]] = {config.RunConfig: [""]}
    queue = [config.RunConfig]
    while queue:
        cls = queue.pop(0)
        for name, field in cls.model_fields.items():
            for nested in models_in(field.annotation):
                prefix = places[cls][0]
                if nested not in places:
                    places[nested] = []
                    queue.append(nested)
                places[nested].append(f"{prefix}.{name}".lstrip("."))
    for cls, where in places.items():
        title = ", ".join(f"`{w}`" for w in where) if where != [""] else "Top level"
        parts += [f"## {title}", inspect.getdoc(cls) or "", _keys(cls)]
    return "\n\n".join(parts)


def _keys(cls: Any) -> str:
    from ucc_search.config.loading import models_in

    declared = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("ucc_search") and hasattr(base, "model_fields"):
            declared.update({name: (kind, value, text) for name, kind, value, text in fields_of(base)})
    rows = []
    for name, (kind, value, text) in declared.items():
        if name == "model_config":
            continue
        nested = models_in(cls.model_fields[name].annotation)
        meaning = text or (summary(nested[0]) if nested else "")
        rows.append((f"`{name}`", f"`{_kind(kind)}`", _default(value), _bounds(value, meaning)))
    return table(("key", "type", "default", "meaning"), rows)


def _kind(annotation: str) -> str:
    aliases = {
        "Choices": "name, {name: …} or list",
        "Targets": "amount or list",
        "Width": "number or {low, high}",
    }
    if annotation in aliases:
        return aliases[annotation]
    for long, short in (
        ("Mapping[str, Any]", "mapping"),
        ("tuple[", "list["),
        (", ...]", "]"),
        (" | None", ""),
    ):
        annotation = annotation.replace(long, short)
    return annotation


def _field_call(value: ast.expr | None) -> ast.Call | None:
    is_field = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Field"
    return value if is_field else None  # type: ignore[return-value]


def _default(value: ast.expr | None) -> str:
    call = _field_call(value)
    if call is not None:
        if any(k.arg == "default_factory" for k in call.keywords):
            return "empty"
        value = call.args[0] if call.args else None
    if value is None:
        return "required"
    text = ast.unparse(value)
    if text in ("None", "()"):
        return "not set" if text == "None" else "empty"
    if isinstance(value, ast.Call | ast.Tuple) and "ComponentRef(" in text:
        return "`" + text.split("'")[1] + "`"
    return "see its section" if isinstance(value, ast.Call) else f"`{text}`"


_SIGNS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _bounds(value: ast.expr | None, text: str) -> str:
    call = _field_call(value)
    bounds = (
        [f"{_SIGNS[k.arg]} {ast.unparse(k.value)}" for k in call.keywords if k.arg in _SIGNS] if call else []
    )
    return "; ".join(filter(None, (text.rstrip("."), ", ".join(bounds))))


# Columns

FRAMES = (
    ("store", "TrialRow", "`load_run(...).trials()`, `trials.csv`, `trials.parquet`, `trials.jsonl`"),
    ("analysis", "Point", "`load_run(...).pareto()`, `pareto.csv`"),
    ("spread", "Standing", "`load_run(...).standings()`"),
    ("influence", "Importance", "`load_run(...).importances()`"),
    ("influence", "BlockImportance", '`load_run(...).importances("blocks")`'),
    ("influence", "Sensitivity", "`load_run(...).sensitivity()`"),
    ("comparison", "MethodPair", "`load_run(...).compare(other)`"),
    ("analysis", "FailureClass", "`load_run(...).failures()`"),
)


def columns() -> str:
    parts = [
        "# Columns of the tables and frames",
        "Rates are from 0 to 1, KL in nats, times in seconds, MACs and parameters for one image. Lists and mappings are "
        "JSON text in the files. `load_run(...).hypervolume()` has two columns, `trial` and `hypervolume`.",
    ]
    for module, name, where in FRAMES:
        cls = getattr(importlib.import_module(f"ucc_search.{module}"), name)
        rows = [(f"`{n}`", f"`{kind}`", text) for n, kind, _, text in fields_of(cls)]
        parts += [f"## {name}", f"{where}. {summary(cls)}", table(("column", "type", "meaning"), rows)]
    return "\n\n".join(parts)


# Commands


def commands() -> str:
    from typer.main import get_command

    from ucc_search.cli import app

    parts = [
        "# Commands",
        "Exit codes: 0 done; 1 the run finished with no usable trial, or every trial of its search failed (one "
        "sentence says how); 2 the input is wrong (one sentence says what); 130 interrupted (Ctrl-C) and 143 "
        "terminated (SIGTERM), `--resume` goes on. `ucc-search COMMAND --help` says the same as this page.",
    ]
    for name, command in _walk(get_command(app), "ucc-search"):
        parts += [f"## {name}", inspect.cleandoc(command.help or "")]
        rows = []
        for parameter in command.params:
            if parameter.name == "help":
                continue
            shown = (
                ", ".join(parameter.opts)
                if parameter.param_type_name == "option"
                else (parameter.name or "").upper()
            )
            rows.append((f"`{shown}`", getattr(parameter, "help", None) or ""))
        if rows:
            parts.append(table(("argument", "meaning"), rows))
    return "\n\n".join(parts)


def _walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
    for key, nested in sorted(getattr(command, "commands", {}).items()):
        yield from _walk(nested, f"{name} {key}")


# Python


def python_api() -> str:
    import ucc_search

    parts = [
        "# The Python interface",
        "What `import ucc_search` offers; names are imported when they are first used, so the import itself is light.",
    ]
    for name in ucc_search.__all__:
        item = getattr(ucc_search, name)
        parts += [f"## {name}", f"`{_signature(name, item)}`" if callable(item) else "", _text(item)]
        if inspect.isclass(item) and item.__module__ == "ucc_search.runs":
            methods = [
                (f"`.{_signature(n, m)}`", summary(m))
                for n, m in inspect.getmembers(item, inspect.isfunction)
                if not n.startswith("_")
            ]
            parts.append(table(("method", "meaning"), methods))
    return "\n\n".join(filter(None, parts))


def _signature(name: str, item: Any) -> str:
    try:
        signature = inspect.signature(item)
    except (TypeError, ValueError):
        return name
    kept = [p for n, p in signature.parameters.items() if n != "self"]
    shown = ", ".join(
        p.name if p.default is p.empty else f"{p.name}=…" for p in kept if p.kind is not p.VAR_KEYWORD
    )
    return f"{name}({shown})"


def _text(item: Any) -> str:
    """The docstring, indented sections as they are."""
    text = inspect.getdoc(item) or ""
    first, _, rest = text.partition("\n\n")
    return first if not rest else f"{first}\n\n```text\n{rest}\n```"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    INDEX.write_text(index(), encoding="utf-8")


if __name__ == "__main__":
    main()

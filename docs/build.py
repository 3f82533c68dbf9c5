"""Builds the API reference: pdoc on the names of `fastelbo.__all__`, and README.md and the pages of docs/ beside it.

    python docs/build.py [DIR]        the pages go to DIR, build/docs if not given; index.html is README.md

Fails on a warning, on a public name without a docstring, and on a `fastelbo.name` that does not exist.
"""

import argparse
import ast
import inspect
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc.doc
import pdoc.render
from pdoc.docstrings import embed_images

import fastelbo
import fastelbo.data
import fastelbo.sklearn
from fastelbo import distributions, reference
from fastelbo.commands import cli

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROSE = (
    *("README", "installation", "functions", "models", "concepts", "kept_samples", "counts", "ppca", "data"),
    *("adapters", "practice", "limits", "performance"),
)
RECIPES = ROOT / "examples" / "recipes"
# called by torch, not by the user; and what scikit-learn adds to an estimator
HOOKS = {"extra_repr", "get_extra_state", "set_extra_state", "set_fit_request", "set_partial_fit_request"}


def markdown(docstring: str) -> str:
    """Plain text as Markdown that renders as the same characters: `[K, B, *event]` must not become emphasis."""
    docstring = re.sub(r"^Reference: (.+(?:\n.+)*)", r"Reference:\n    \1", docstring, flags=re.MULTILINE)
    parts = re.split(r"(`[^`]*`)", docstring)
    parts[::2] = [part.replace("\\", r"\\").replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def field_comments(cls: type) -> dict[str, str]:
    """What a NamedTuple says of its fields: the comment above or behind each."""
    found = re.findall(r"^((?: {4}# .*\n)*) {4}(\w+): [^#\n]*(#.*)?$", inspect.getsource(cls), flags=re.MULTILINE)
    return {name: re.sub(r"\s*# ", " ", above + behind).strip() for above, name, behind in found}


def public(space: pdoc.doc.Namespace) -> Iterator[pdoc.doc.Doc]:
    """The members that a user calls or reads, and theirs. The others get pdoc's mark of what is not shown.

    A plain attribute without a docstring is one of those: the docstring of its class describes it.
    """
    names = vars(space.obj)
    named_tuple = isinstance(space.obj, type) and issubclass(space.obj, tuple)
    comments = field_comments(space.obj) if named_tuple else {}
    for doc in space.members.values():
        of_property = isinstance(names.get(doc.name), property)
        if of_property and not doc.docstring:  # pdoc reads that of the getter alone
            doc.docstring = inspect.getdoc(names[doc.name]) or ""
        plain = isinstance(doc, pdoc.doc.Variable) and not of_property
        if doc.name == "__init__" and not named_tuple:
            doc.docstring = ""  # the class describes the arguments
        elif doc.name.startswith("_") or doc.name not in names or doc.name in HOOKS or (plain and not doc.docstring):
            doc.docstring = "@private"
        else:
            if named_tuple and plain:
                doc.docstring = comments[doc.name]
            yield doc
            if isinstance(doc, pdoc.doc.Class):
                yield from public(doc)


def page(module: types.ModuleType) -> pdoc.doc.Module:
    """A module with its docstrings as Markdown, functions first. Every name of `__all__` must have one."""
    doc = pdoc.doc.Module(module)
    doc.members = dict(sorted(doc.members.items(), key=lambda item: isinstance(item[1], pdoc.doc.Class)))
    members = list(public(doc))
    missing = [member.fullname for member in members if not member.docstring]
    if missing and hasattr(module, "__all__"):
        raise ValueError(f"these need a docstring: {', '.join(missing)}")
    for each in (doc, *members):
        each.docstring = markdown(each.docstring) or "@private"
    return doc


def written(name: str, text: str) -> pdoc.doc.Module:
    """A page of Markdown."""
    module = types.ModuleType(name, text)
    module.__docformat__ = "markdown"
    return pdoc.doc.Module(module)


def source(name: str) -> Path:
    return ROOT / "README.md" if name == "README" else HERE / f"{name}.md"


def prose(name: str) -> pdoc.doc.Module:
    """A page with its links to other pages; a link to any other file becomes text. Pictures are put in."""
    path = source(name)
    text = path.read_text()
    for public_name in re.findall(r"`fastelbo\.([\w.]+)", text):
        pkgutil.resolve_name(f"fastelbo.{public_name}")  # an error: the page speaks of a name that does not exist
    targets = {source(page): f"{page}.html" for page in PROSE}
    targets |= {recipe: f"recipes.html#{recipe.stem}" for recipe in RECIPES.glob("*.py")}

    def link(match: re.Match[str]) -> str:
        target = targets.get((path.parent / match[2]).resolve())
        return f"[{match[1]}]({target})" if target else match[1]

    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", link, text)
    return written(name, embed_images(text, path))


def command() -> pdoc.doc.Module:
    """What `fastelbo --help` and the help of its subcommands say."""
    parser = cli._parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = {"fastelbo": parser} | {f"fastelbo {name}": each for name, each in commands.items()}
    helps = (f"## {name}\n\n```text\n{each.format_help()}```\n" for name, each in parts.items())
    return written("command", "# The command\n\n" + "\n".join(helps))


def recipes() -> pdoc.doc.Module:
    """The programs of examples/recipes, each below its docstring."""
    text = "# Recipes\n\nEach program runs in under a minute on data that packages bundle.\n"
    for path in sorted(RECIPES.glob("*.py")):
        source = path.read_text()
        docstring = ast.get_docstring(ast.parse(source)) or ""
        code = source.split('"""', 2)[2].strip()
        text += f"\n## {path.stem}\n\n{markdown(docstring)}\n\n```python\n{code}\n```\n"
    return written("recipes", text)


def build(out: Path) -> None:
    pages = {name: prose(name) for name in PROSE} | {"command": command(), "recipes": recipes()}
    modules = (fastelbo, distributions, reference, fastelbo.data, fastelbo.sklearn)
    pages |= {module.__name__: page(module) for module in modules}
    pdoc.render.configure(
        docformat="google",
        show_source=False,
        search=False,
        footer_text=f"fastelbo {fastelbo.__version__}",
        template_directory=HERE / "templates",
    )
    for name, module in pages.items():
        path = out / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(module, pages))
    (out / "index.html").write_text((out / "README.html").read_text())


if __name__ == "__main__":
    warnings.simplefilter("error")
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))

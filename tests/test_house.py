"""Rules of this code base: its words, the direction of imports, where a LightningModule may go, and sizes.

The rules are checked on the source text, with `ast` and `tokenize`; nothing is imported. Each checker is tested on a
planted violation.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("callbacks", "configs", "lit_rlhf", "notebooks", "tests")


def find_files(suffix: str, *folders: str) -> list[str]:
    """Return the paths of all files with this suffix, relative to the root; links and caches are skipped."""
    found = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}")]
    return sorted(path.as_posix() for path in found if not re.search(r"(^|/)(\.|__pycache__)", path.as_posix()))


PACKAGE = find_files(".py", "lit_rlhf", "callbacks")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# Words

FORBIDDEN = [
    "told", "tells of", "stands", "stood", "behind", "go on", "goes on", "likewise", "dear", "mend", "mends", "cure",
    "as may be", "of its own", "let go", "under way", "is had", "be had", "be safe from", "what came", "what comes",
    "heed", "whereof", "beneath", "thereby", "nor could", "for that",
]  # fmt: skip
"""Words and phrases that are refused everywhere: comments, strings, identifiers and guides."""

FORBIDDEN_NAMES = {"said", "fine"}
"""Words that are refused as identifiers only."""

ALLOWED: dict[str, dict[str, str]] = {}
"""Exceptions: by file, the words it may use, and why."""

PATTERN = re.compile(r"\b(" + "|".join(re.sub(r" ", r"\\s+", phrase) for phrase in FORBIDDEN) + r")\b", re.IGNORECASE)

Text = tuple[int, str]
"""A line number and the text that starts there."""


def join_comments(comments: list[Text]) -> Iterator[Text]:
    """Join comments on consecutive lines, so that a phrase may continue on the next line."""
    for _, group in groupby(enumerate(comments), key=lambda item: item[1][0] - item[0]):
        lines = [comment for _, comment in group]
        yield lines[0][0], "\n".join(text.lstrip("# ") for _, text in lines)


def name_tokens(source: str) -> Iterator[Text]:
    """Yield all identifiers of a Python file."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return ((token.start[0], token.string) for token in tokens if token.type == tokenize.NAME)


def python_texts(source: str) -> Iterator[Text]:
    """Yield comments, identifiers and strings (docstrings and messages too) of a Python file."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from join_comments([(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT])
    yield from ((line, re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name)) for line, name in name_tokens(source))
    yield from strings(ast.parse(source))


def strings(node: ast.AST) -> Iterator[Text]:
    """Yield all strings of a syntax tree; an f-string is one text, with `{}` for its values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    if isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from strings(child)


def comment_texts(source: str) -> Iterator[Text]:
    """Yield the comments of a YAML or TOML file."""
    matches = [(i, re.search(r"(?:^|\s)#(.*)", line)) for i, line in enumerate(source.splitlines(), start=1)]
    yield from join_comments([(i, match[1]) for i, match in matches if match])


def notebook_texts(source: str) -> Iterator[Text]:
    """Yield the cells of a notebook, without outputs; the line is the number of the cell."""
    for i, cell in enumerate(json.loads(source)["cells"], start=1):
        yield i, "".join(cell["source"])


READERS = {
    ".py": python_texts,
    ".md": lambda source: [(1, source)],
    ".yaml": comment_texts,
    ".toml": comment_texts,
    ".ipynb": notebook_texts,
}
TEXT_FILES = [
    *(path.name for path in ROOT.glob("*.md")),
    "pyproject.toml",
    *(path for suffix in READERS for path in find_files(suffix, *FOLDERS)),
]


def forbidden_words(source: str, suffix: str, allowed: dict[str, str] | None = None) -> list[str]:
    """Return `line: word in context` for each forbidden word."""
    found = []
    for line, text in READERS[suffix](source):
        for match in PATTERN.finditer(text):
            word = re.sub(r"\s+", " ", match[0].lower())
            if word not in (allowed or {}):
                context = " ".join(text[max(0, match.start() - 40) : match.end() + 40].split())
                found.append(f"line {line + text[: match.start()].count(chr(10))}: {word!r} in {context!r}")
    if suffix == ".py":
        names = [(line, name) for line, name in name_tokens(source) if name in FORBIDDEN_NAMES - set(allowed or {})]
        found += [f"line {line}: {name!r} in the code" for line, name in names]
    return found


@pytest.mark.parametrize("path", [path for path in TEXT_FILES if path != "tests/test_house.py"])
def test_no_forbidden_words(path):
    found = forbidden_words(read(path), Path(path).suffix, ALLOWED.get(path))
    assert not found, "\n".join([f"{path} uses words that the project avoids:", *found])


@pytest.mark.parametrize(
    ("source", "suffix", "words"),
    [
        ('def f():\n    """It goes\n    on here."""', ".py", ["goes on"]),
        ("x = 1  # nobody Told it", ".py", ["told"]),
        ("# how to go\n# on\nx = 1", ".py", ["go on"]),
        ('raise ValueError(f"{x} stands " "be" f"hind {y}")', ".py", ["stands", "behind"]),
        ("def test_what_came(): pass", ".py", ["what came"]),
        ("class WhatCame: pass", ".py", ["what came"]),
        ("fine = cure = 1", ".py", ["fine", "cure"]),
        ("x = 'a fine-tuned model, as he said'  # a bookstand, a dearth", ".py", []),
        ("Text.\n\nIt is\nunder way.", ".md", ["under way"]),
        ("a: 1  # likewise\nb: 'dear'", ".yaml", ["likewise"]),
        ('{"cells": [{"source": ["be", "neath"]}]}', ".ipynb", ["beneath"]),
    ],
)
def test_forbidden_words_are_found(source, suffix, words):
    found = forbidden_words(source, suffix)
    assert sorted(re.search(r"'([^']*)' in", text)[1] for text in found) == sorted(words)
    assert not forbidden_words(source, suffix, dict.fromkeys(words, "planted"))


def test_exceptions_are_used():
    """An exception that no text needs any more is removed."""
    for path, words in ALLOWED.items():
        found = " ".join(forbidden_words(read(path), Path(path).suffix))
        assert all(repr(word) in found for word in words), path


# Imports

ORDER = [
    "cli", "comparison", "memory", "lit_rlhf", "testbed", "callbacks", "algorithms", "training", "engines",
    "evaluation", "rewards", "data", "models", "tokenization", "functional", "types", "local_warnings",
    "errors",
]  # fmt: skip
"""Packages from top to bottom: each imports only from itself and from those below.

`lit_rlhf` is the package itself: what its `__init__` exports.
"""

EXEMPT = ("lit_rlhf", "lit_rlhf.__main__")
"""Modules that may import from everywhere."""


def module_name(path: str) -> str:
    """Return the dotted name of a file; `callbacks/` is imported as `lit_rlhf.callbacks`."""
    parts = Path(path).with_suffix("").parts
    return ".".join(("lit_rlhf", *parts) if parts[0] == "callbacks" else parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE}


def imported_modules(source: str, name: str, modules: set[str], is_package: bool = False) -> set[str]:
    """Return the modules of the package that a file imports, also in functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {full if full in modules else base for full in names}
    return {module for module in found if module.split(".")[0] == "lit_rlhf"}


def package_imports(name: str) -> set[str]:
    path = MODULES[name]
    return imported_modules(read(path), name, set(MODULES), is_package=path.endswith("__init__.py"))


def find_circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import circle, an empty list if there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if circle := visit(target, [*trail, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(edges) if (circle := visit(module, []))), [])


def package_of(module: str) -> str:
    return ".".join(module.split(".")[1:2]) or module


def upward_imports(module: str, targets: set[str]) -> list[str]:
    """Return the imports from a package above this module's."""
    return sorted(target for target in targets if ORDER.index(package_of(target)) < ORDER.index(package_of(module)))


def test_no_import_circle():
    circle = find_circle({name: package_imports(name) for name in MODULES})
    assert not circle, "import circle: " + " -> ".join(circle)


@pytest.mark.parametrize("module", [name for name in MODULES if name not in EXEMPT])
def test_imports_point_down(module):
    assert package_of(module) in ORDER, f"add {module} to ORDER"
    upward = upward_imports(module, package_imports(module))
    assert not upward, f"{module} imports from above: {', '.join(upward)}"


def test_import_checkers_find_planted_violations():
    circle = {"a": {"b", "d"}, "b": {"c"}, "c": {"e", "b"}, "d": set(), "e": set()}
    assert find_circle(circle) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert upward_imports("lit_rlhf.data.module", {"lit_rlhf.rewards", "lit_rlhf.data", "lit_rlhf.types"}) == [
        "lit_rlhf.rewards"
    ]
    assert upward_imports("lit_rlhf.types", {"lit_rlhf"}) == ["lit_rlhf"]


def test_imports_are_resolved():
    modules = {"lit_rlhf", "lit_rlhf.data", "lit_rlhf.data.formats", "lit_rlhf.functional", "lit_rlhf.types"}
    source = """
import lit_rlhf.types, torch
from lit_rlhf import functional as F
if TYPE_CHECKING:
    from lit_rlhf.data import TextData
def f():
    from lit_rlhf import RLOO
    from . import formats
    from .formats import read
"""
    found = imported_modules(source, "lit_rlhf.data.module", modules)
    assert found == modules
    assert imported_modules("from .formats import x", "lit_rlhf.data", modules, True) == {"lit_rlhf.data.formats"}


# Functions take values, not modules

MODULE_TYPES = re.compile(r"\b(Algorithm|OnlineAlgorithm|LightningModule)\b")
MODULE_NAMES = {"module", "pl_module", "method"}
OTHER_TYPES = {"str", "nn.Module", "torch.nn.Module"}
"""Types of a parameter called `module` or `method` that is none: a name, or the argument of a hook of torch."""
HOOKS = re.compile(r"_.*|on_.*|setup|teardown|get_metrics")
"""Functions of a callback that may take a module: private ones, and those that Lightning calls with one."""


def module_parameters(source: str, callback: bool = False) -> list[str]:
    """Return `function(parameter)` for each parameter that takes a LightningModule where it should take values."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (callback and HOOKS.fullmatch(node.name)):
            continue
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        for argument in filter(None, every):
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            instance = re.sub(r"type\[[^\]]*\]", "", annotation)  # a class is no module
            named = argument.arg in MODULE_NAMES and annotation not in OTHER_TYPES and "type[" not in annotation
            if named or MODULE_TYPES.search(instance):
                found.append(f"{node.name}({argument.arg})")
    return found


@pytest.mark.parametrize("path", PACKAGE)
def test_no_function_takes_a_lightning_module(path):
    found = module_parameters(read(path), callback=path.startswith("callbacks/"))
    assert not found, f"{path}: pass values instead of a LightningModule to {', '.join(found)}"


@pytest.mark.parametrize(
    ("source", "callback", "found"),
    [
        ("def f(a: int, run: OnlineAlgorithm): ...", False, ["f(run)"]),
        ("class C:\n    async def _f(self, *, module): ...", False, ["_f(module)"]),
        ("def f(x: 'list[LightningModule] | None'): ...", False, ["f(x)"]),
        ("def f(method: Any): ...", False, ["f(method)"]),
        ("def measure(trainer, pl_module): ...", True, ["measure(pl_module)"]),
        ("def on_fit_end(trainer, pl_module): ...\ndef _helper(module: LightningModule): ...", True, []),
        ("def on_fit_end(trainer, pl_module): ...", False, ["on_fit_end(pl_module)"]),
        ("def f(module: nn.Module, method: str, kind: type[Algorithm], model: Model): ...", False, []),
    ],
)
def test_module_parameters_are_found(source, callback, found):
    assert module_parameters(source, callback) == found


# Sizes

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60
LONG_FILES = {"lit_rlhf/types.py", "lit_rlhf/functional.py"}


def long_functions(source: str) -> list[str]:
    """Return `name (lines)` for each function that is too long."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{name} ({size} lines)" for name, size in sizes.items() if size > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("path", PACKAGE)
def test_files_and_functions_are_short(path):
    source = read(path)
    if path not in LONG_FILES:
        assert len(source.splitlines()) <= MAX_FILE_LINES, f"{path} has more than {MAX_FILE_LINES} lines: split it"
    assert not (found := long_functions(source)), f"{path}: split {', '.join(found)}"


def test_long_functions_are_found():
    source = "class C:\n    def f(self):\n" + "        pass\n" * 60
    assert long_functions(source) == ["f (61 lines)"]
    assert not long_functions(source.replace("        pass\n", "", 1))


MAX_METHOD_LINES = 40
LONG_CLASSES = {
    "Algorithm": "base",
    "OfflineAlgorithm": "base",
    "OnlineAlgorithm": "base",
    "UnpairedAlgorithm": "base",
    "RewardModeling": "loads, saves and exports a scalar head",
    "VanillaPG": "has the critic, of PPO too",
}
"""Classes of algorithms with more lines of code, and why."""


def class_sizes(source: str) -> dict[str, int]:
    """Return the number of lines of each class, without docstrings, comments and blank lines."""
    sizes, lines = {}, source.splitlines()
    for node in (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)):
        documented = [
            n for n in ast.walk(node) if isinstance(n, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(n)
        ]
        docstrings = {i for n in documented for i in range(n.body[0].lineno, (n.body[0].end_lineno or 0) + 1)}
        own = set(range(node.lineno, (node.end_lineno or 0) + 1)) - docstrings
        sizes[node.name] = sum(bool(lines[i - 1].split("#")[0].strip()) for i in own)
    return sizes


def test_methods_are_short():
    sizes: dict[str, int] = {}
    for path in find_files(".py", "lit_rlhf/algorithms"):
        sizes |= class_sizes(read(path))
    assert {name for name, size in sizes.items() if size > MAX_METHOD_LINES} == set(LONG_CLASSES)


def test_class_sizes_are_counted():
    head = 'class C:\n    """Two\n    lines."""\n\n    # a comment\n    x = 1\n\n'
    assert class_sizes(head + '    def f(self):\n        """One."""\n        pass\n') == {"C": 4}


FLOAT64 = {
    "lit_rlhf/functional.py": "decides on which device",
    "lit_rlhf/evaluation/metrics.py": "states of metrics, which live on that device",
    "lit_rlhf/models/cpu.py": "a comparison",
    "callbacks/gradient_noise.py": "sums on that device",
}
"""Files that name float64, and why."""


@pytest.mark.parametrize("path", [path for path in PACKAGE if path not in FLOAT64])
def test_only_functional_converts_to_float64(path):
    """A conversion elsewhere fails on devices without float64 (mps); `functional.to_float64` uses the CPU for them."""
    assert ".double()" not in read(path) and "torch.float64" not in read(path)

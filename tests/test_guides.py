"""The guides match the code: links, flags, names, coverage, and the length of the README."""

import dataclasses
import functools
import importlib
import inspect
import json
import re
import tomllib
import typing
from pathlib import Path

import lightning
import pytest
import yaml

import lit_rlhf
from lit_rlhf import algorithms, callbacks, data, rewards, testbed
from lit_rlhf.cli.checkpoints import export
from lit_rlhf.cli.config_files import shipped_config
from lit_rlhf.cli.main import CALLBACKS
from lit_rlhf.comparison.compare import compare

ROOT = Path(__file__).parents[1]
SKIPPED = {"node_modules", "runs", "build", "dist"}
GUIDES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in SKIPPED for part in path.relative_to(ROOT).parts)
    and "callbacks" not in path.relative_to(ROOT).parts[1:]  # a symlink to the folder at the top
    and path.relative_to(ROOT).parts[:2] != ("lit_rlhf", "configs")
)
CURRENT = [path for path in GUIDES if path.name != "CHANGELOG.md"]  # the changelog names what is gone
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MARKDOWN = [*GUIDES, *NOTEBOOKS]
METHODS = {
    name: kind
    for name in algorithms.__all__
    if inspect.isclass(kind := getattr(algorithms, name)) and not inspect.isabstract(kind)
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    """A guide, the Markdown cells of a notebook, or the comments of a configuration."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return "\n".join(line.partition("#")[2] for line in text.splitlines())
    return text


def without_code(text: str) -> str:
    """The text without fenced blocks, indented blocks and inline code."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return re.sub(r"`[^`\n]*`", "`code`", text)


# Links


def anchors(path: Path) -> set[str]:
    """The anchors of a guide's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_every_relative_link_and_its_anchor_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(linked), f"{name_of(path)} links to {target}: there is no such heading"


@pytest.mark.parametrize("path", CURRENT, ids=name_of)
def test_every_path_in_code_exists(path):
    """Paths into the repository, such as `tests/tiny.py`, by their first folder."""
    tops = "lit_rlhf|callbacks|configs|tests|notebooks"
    for found in re.findall(rf"(?<![\w/.-])(?:{tops})/[\w./-]*\w/?", read(path)):
        assert (ROOT / found).exists(), f"{name_of(path)} names {found}, which does not exist"


@pytest.mark.parametrize("path", CURRENT, ids=name_of)
def test_every_test_in_code_exists(path):
    for file, name in re.findall(r"`(tests/[\w/.]+)::(\w+)`", read(path)):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{name_of(path)} names {file}::{name}"


# Flags


def parameters(kind: typing.Any) -> dict[str, typing.Any]:
    """Names and annotations of a class's or a function's arguments, those of its bases through `**kwargs` too."""
    if dataclasses.is_dataclass(kind):
        return {field.name: field.type for field in dataclasses.fields(kind)}
    found: dict[str, typing.Any] = {}
    bases = kind.__mro__ if inspect.isclass(kind) else ()
    for function in [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [kind]:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function) if function is not object.__init__ else {}
        for name, parameter in signature.parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name != "self":
                found.setdefault(name, hints.get(name, parameter.annotation))
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    return found


def groups_of(annotation: typing.Any) -> list[type]:
    """The dataclasses among the alternatives of an annotation."""
    options = typing.get_args(annotation) or (annotation,)
    return [option for option in options if dataclasses.is_dataclass(option)]


def options(kinds: typing.Iterable[typing.Any]) -> tuple[set[str], dict[str, set[str]]]:
    """All options of some classes, and by group the options of a group."""
    names: set[str] = set()
    groups: dict[str, set[str]] = {}
    for kind in kinds:
        for name, annotation in parameters(kind).items():
            names.add(name)
            for group in groups_of(annotation):
                groups.setdefault(name, set()).update(parameters(group))
    return names, groups


OPEN = {"optimizer", "lr_scheduler", "rewards", "load", "lora", "transform", "critic", "callbacks", "logger"}
"""Options that hold a class or a dict: theirs are not looked up."""

DATA_MODULES = [
    lit_rlhf.PromptData,
    lit_rlhf.DemonstrationData,
    lit_rlhf.PreferenceData,
    testbed.ReviewPrompts,
    testbed.ReviewPreferences,
    data.ReasoningGym,
]


@functools.cache
def known() -> dict[str, tuple[set[str], dict[str, set[str]]]]:
    """By the first part of a flag, the options after it."""
    kinds = {"model": METHODS.values(), "data": DATA_MODULES, "trainer": [lightning.Trainer]}
    return {
        name: options(found) for name, found in (kinds | {name: [kind] for name, kind in CALLBACKS.items()}).items()
    }


def unknown(flag: str) -> bool:
    """Whether a flag `section.option[.option]` is not an option."""
    section, *rest = flag.split(".")
    if section not in known():
        return True
    names, groups = known()[section]
    if rest[0] == "help":
        return False
    if rest[0] not in names:
        return True
    if len(rest) > 1 and rest[0] in groups:
        return rest[1] not in groups[rest[0]]
    return len(rest) > 1 and rest[0] not in OPEN


@pytest.mark.parametrize("path", [*CURRENT, *NOTEBOOKS, *CONFIGS], ids=name_of)
def test_every_flag_is_an_option_of_the_parser(path):
    text = read(path)
    if path.suffix == ".yaml":  # flags in the arms of a comparison too
        text += path.read_text(encoding="utf-8")
    flags = re.findall(r"--((?:model|data|trainer|checkpoint|kl_monitor|samples|curves|predictions)\.[\w.]+\w)", text)
    assert not (wrong := sorted({flag for flag in flags if unknown(flag)})), f"{name_of(path)}: no such flags: {wrong}"


@pytest.mark.parametrize("path", [*CURRENT, *NOTEBOOKS, *CONFIGS], ids=name_of)
def test_every_flag_of_a_command_without_sections_is_one_of_its_arguments(path):
    allowed = {"compare": {*parameters(compare), "config"}, "export": set(parameters(export))}
    for command, arguments in re.findall(r"lit-rlhf (compare|export)\b([^`\n]*)", read(path)):
        flags = {flag.partition(".")[0] for flag in re.findall(r"(?<!\S)--(\w[\w.]*)", arguments.partition("+=")[0])}
        assert flags <= allowed[command], f"{name_of(path)}: lit-rlhf {command} has no {flags - allowed[command]}"


def test_a_flag_that_does_not_exist_is_found():
    assert unknown("model.no_such_option") and unknown("trainer.no_such_flag") and unknown("data.no_such_option")
    assert not unknown("model.num_samples") and not unknown("model.optimizer.lr") and not unknown("trainer.devices")


@pytest.mark.parametrize("path", [*CURRENT, *NOTEBOOKS, *CONFIGS], ids=name_of)
def test_every_configuration_of_a_command_ships(path):
    for name in re.findall(r"--config[ =]([\w./-]+)", read(path)):
        if name not in ("NAME", "mine.yaml", "two.yaml") and not name.startswith("runs/"):
            shipped_config(name)  # exits where there is none


# Names


@pytest.mark.parametrize("path", [*CURRENT, *NOTEBOOKS], ids=name_of)
def test_every_dotted_name_of_the_package_exists(path):
    names = set(re.findall(r"(?<![\w/.-])lit_rlhf(?:\.[A-Za-z_]\w*)+(?![\w/.]*\.py)", read(path)))
    missing = [name for name in sorted(names) if not exists(name)]
    assert not missing, f"{name_of(path)}: no such names: {missing}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


# Coverage


def mentions(guide: str, names: typing.Iterable[str]) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    missing = [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]
    assert not missing, f"{guide} does not mention {', '.join(missing)}"


def test_every_configuration_is_in_its_guide():
    mentions("configs/README.md", [path.name for path in (ROOT / "configs").glob("*.yaml")])
    mentions("configs/paper/README.md", [path.name for path in (ROOT / "configs" / "paper").glob("*.yaml")])


def test_every_callback_is_in_its_guide():
    mentions("callbacks/README.md", callbacks.__all__)


def test_every_metric_that_a_callback_or_a_method_logs_by_name_is_in_the_guide():
    sources = [*(ROOT / "callbacks").glob("*.py"), *(ROOT / "lit_rlhf").rglob("*.py")]
    logged = {
        name for path in sources for name in re.findall(r'"((?:train|time|memory|throughput)/\w+)"', path.read_text())
    }
    mentions("callbacks/README.md", sorted(logged))


def test_every_metric_is_defined_once():
    rows = re.findall(r"^\| (`[a-z]+/.*?) \|", (ROOT / "callbacks/README.md").read_text(), flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([a-z]+/[\w/<>]+)`", row)]
    assert len(names) > 50 and len(names) == len(set(names))


def test_every_exported_reward_is_in_its_guide():
    mentions("lit_rlhf/rewards/README.md", rewards.__all__)


def test_every_method_is_in_its_guide_with_a_command():
    mentions("lit_rlhf/algorithms/README.md", METHODS)
    text = (ROOT / "lit_rlhf/algorithms/README.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE))
    assert all("lit-rlhf fit" in blocks.get(name, "") for name in METHODS)


def test_every_data_module_is_in_its_guide():
    mentions("lit_rlhf/data/README.md", [name for name in data.__all__ if name.endswith("Data") and name != "TextData"])


def test_every_notebook_is_in_its_guide():
    mentions("notebooks/README.md", [path.name for path in NOTEBOOKS])


# Form


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1000


@pytest.mark.parametrize("path", [ROOT / "README.md"], ids=name_of)
def test_prose_is_wrapped_at_100_columns(path):
    prose = re.sub(r"^ *```.*?^ *```", "", read(path), flags=re.DOTALL | re.MULTILINE).splitlines()
    long = [line for line in prose if len(line) > 100 and not line.startswith(("    ", "|", "!["))]
    assert not long, long


def test_the_set_up_commands_are_those_that_ci_runs():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("    python3 -m venv .venv && ") for line in lines) == 2


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(path), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_code_blocks_are_valid(path):
    for block in blocks(path, "python"):
        compile(block, name_of(path), "exec")
    for block in blocks(path, "yaml"):
        assert yaml.safe_load(block)


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_tables_have_equally_many_cells_in_every_row(path):
    text = re.sub(r"^ *```.*?^ *```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE):
        counts = {len(re.sub(r"`[^`]*`", "", row).strip().strip("|").split("|")) for row in table.splitlines()}
        assert len(counts) == 1, f"{name_of(path)}: {table.splitlines()[0]}"


def test_the_lines_of_rloo_are_those_of_its_file():
    (block,) = [block for block in blocks(ROOT / "README.md", "python") if block.startswith("class RLOO")]
    shown = [line.strip().removesuffix("(self, rollout):") for line in block.splitlines()]
    source = inspect.getsource(lit_rlhf.RLOO)
    assert [line for line in shown if line not in source] == []


def test_the_guides_that_ship_are_listed():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*/*.md" in packaged["lit_rlhf.configs"]  # a notebook shows them

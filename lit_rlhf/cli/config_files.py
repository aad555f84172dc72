"""Configurations: shipped ones by name, and a check of each file before the parser reads it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

PROGRAM = "lit-rlhf"
CONFIG_FLAGS = ("--config", "-c")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
STRATEGIES = {"ddp": "DDPStrategy", "fsdp2": "FSDP2Strategy"}
"""Classes of strategies by short name: only classes have options on the command line."""
CONFIGS = Path(__file__).parent.parent / "configs"


class UsageError(Exception):
    """Command line that can't be parsed.

    Attributes:
        sentence: What is wrong, with the nearest right spelling.
        tip: Command that shows the options.
    """

    def __init__(self, sentence: str, tip: str = "") -> None:
        super().__init__(sentence)
        self.sentence, self.tip = sentence, tip


class StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice, of which YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping.

        Raises:
            yaml.YAMLError: If a key is given twice.
        """
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def expand_configs(args: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations after `--config` by their paths, and check the files.

    The short name of a strategy with options becomes that of its class.

    Raises:
        UsageError: If one is neither a file nor a shipped configuration, or can't be read.
    """
    expanded = []
    for previous, arg in zip(["", *args], args, strict=False):
        flag, separator, value = arg.partition("=") if arg.startswith("-") else (previous, "", arg)
        if flag in CONFIG_FLAGS and (separator or flag == previous):
            value = checked_config(value, args[0])
        elif flag == "--trainer.strategy" and any(other.startswith("--trainer.strategy.") for other in args):
            value = STRATEGIES.get(value, value)
        elif holds_options(flag, value):
            check_nesting(read_yaml(given := f"{flag} {value!r}", value), given)
        expanded.append(f"{flag}={value}" if separator else value if flag == previous else arg)
    return expanded


def holds_options(flag: str, value: str) -> bool:
    """Return whether the value of an option is a file with its options, which jsonargparse reads for any group."""
    data = flag == "--data" and value.endswith(DATA_SUFFIXES)
    of_a_group = flag in ("--model", "--data", "--trainer") and not data
    return flag.startswith("--") and (of_a_group or value.endswith((".yaml", ".yml"))) and os.path.isfile(value)


def checked_config(name: str, command: str) -> str:
    """Return the path of a configuration, or inline YAML unchanged, after a check of its form."""
    path = name if name.lstrip().startswith(("{", "[")) else shipped_config(name)
    check_config(name, command, path)
    return path


def shipped_config(name: str) -> str:
    """Return the path of the shipped configuration with this name; a file is returned unchanged.

    Raises:
        UsageError: If it is neither.
    """
    if os.path.isfile(name):  # unlike Path.is_file also where the name is too long
        return name
    path = CONFIGS / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    if name and os.path.isfile(path) and path.is_relative_to(CONFIGS):
        return str(path)
    if os.path.isdir(name):
        raise UsageError(f"--config {name!r} is a folder: give a file in it")
    known = shipped_configs()
    close = difflib.get_close_matches(name.removesuffix(".yaml"), known, 1)
    listed = ", ".join([*(name for name in known if "/" not in name), "paper/..."])
    hint = f"did you mean {close[0]}?" if close else f"the shipped ones are {listed}"
    raise UsageError(f"--config {name!r} is neither a file nor a shipped configuration: {hint}")


def shipped_configs() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


def read_yaml(given: str, path: str) -> list[Any]:
    """Return the documents of a YAML file, or of YAML given in place of a path.

    Args:
        given: The option and its value, for messages.
        path: Path of the file, or the YAML.

    Raises:
        UsageError: If it can't be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8") if not path.lstrip().startswith(("{", "[")) else path
        return list(yaml.load_all(text, StrictLoader))
    except UnicodeDecodeError as error:
        raise UsageError(f"{given} is not a text file in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{given} can't be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UsageError(
            f"{given} is not valid YAML: {problem}{f' in line {mark.line + 1}' if mark else ''}"
        ) from error
    except (ValueError, RecursionError) as error:  # such as the date 2020-13-01
        raise UsageError(f"{given} is not valid YAML: {error}") from error


def check_config(name: str, command: str, path: str) -> None:
    """Check that a configuration is a YAML mapping of options, and for this command.

    Args:
        name: What the user gave.
        command: The command, such as `fit`.
        path: Path of the file, or inline YAML.

    Raises:
        UsageError: If it is not.
    """
    given = f"--config {name!r}" if len(name) < 80 else f"--config {name[:76]!r}..."
    documents = read_yaml(given, path)
    options = documents if len(documents) > 1 else documents[0] if documents else None
    if not isinstance(options, dict):
        kind = {list: "a list", str: "text", type(None): "empty"}.get(type(options), repr(options))
        kind = f"{len(documents)} YAML documents" if len(documents) > 1 else kind
        raise UsageError(f"{given} is {kind}, and not options by name, such as `trainer: {{max_steps: 10}}`")
    compares = command == "compare"
    if ("model" if compares else "arms") in options:
        commands = "fit, validate, test and predict" if compares else f"`{PROGRAM} compare`"
        raise UsageError(f"{given} is for {commands}")
    trainer = options.get("trainer") or {}
    if not isinstance(trainer, dict | str):
        raise UsageError(f"{given}: trainer is {trainer!r}, and not options by name, such as {{max_steps: 10}}")
    wrong = [key for group in (options, trainer) for key in group if not isinstance(key, str)]
    if wrong:
        raise UsageError(f"{given}: {wrong[0]!r} is not the name of an option")
    check_nesting(options, given)


def check_nesting(value: Any, given: str, path: str = "", above: tuple[int, ...] = ()) -> None:
    """Check that a YAML value doesn't contain itself, which anchors allow, and that options of a class are below it.

    Raises:
        UsageError: If one is wrong.
    """
    if id(value) in above:
        raise UsageError(f"{given}: {path} contains itself: remove the alias (*) inside its anchor (&)")
    if isinstance(value, dict) and "class_path" in value:
        beside = [key for key in value if key not in ("class_path", "init_args", "dict_kwargs")]
        if beside:
            raise UsageError(f"{given}: {path}.{beside[0]} is beside class_path: put it under init_args")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        check_nesting(item, given, f"{path}.{key}".strip("."), (*above, id(value)))

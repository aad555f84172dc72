"""jsonargparse's messages, read for the mistakes that they name."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNINFORMATIVE = re.compile(
    r"$|Does not validate|Subtypes:|Errors:|Given value type:|Expected a path but|Expected a? ?<class 'NoneType'>"
    r"|Unable to load config '|Subclass types expect|a class path \(|a dict with"
)
"""Lines of jsonargparse's messages that say nothing about the mistake."""
CALLABLE = re.compile(r"Type .* expects a function or a callable class: ")
"""What jsonargparse puts before the mistake in a function or class."""
GOT_VALUE = re.compile(r"\. Got value: ?")
REWORDED = {
    r"Import path does not correspond to a subclass of (\w+)": r"it is not of type \1",
    r"Expected '.*' to be a subclass of <class '(\w+)'>.*": r"it is not of type \1",
    r"Expected '.*' to be a function that returns <class '(\w+)'>.*": r"it is not a function that returns the type \1",
    r"Expected '.*' to be a class that instantiates into callable.*": "its objects are not functions",
    r"Unexpected import object .*": "it is neither a class nor a function",
    r"(Dict must include a class_path|Expected an import path or|Unexpected import path format).*": (
        "give an import path, such as module.Name, or {class_path: module.Name, init_args: {...}}"
    ),
    r"Not a valid subclass of (\w+)": (
        r"\1 expected: give an import path, such as module.Name, or {class_path: module.Name, init_args: {...}}"
    ),
    r'Unable to load config ".*': "it takes options by name, such as {OPTION: VALUE}, or a file with them",
    r"ignored explicit argument.*": "it takes no value",
    r'Invalid option "(.*)" for --print_config': (
        r"--print_config takes comments, skip_null or skip_default, not '\1'"
    ),
}
"""jsonargparse's words for a wrong value, and ours."""
OTHER_NAMES = {
    "beta": "model.kl_coef",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "learning_rate": "model.optimizer.lr",
    "max_completion_length": "model.sampling.max_new_tokens",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_prompt_length": "data.max_prompt_tokens",
    "model_name_or_path": "model.policy",
    "num_generations": "model.num_samples",
    "num_iterations": "model.updates.update_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "output_dir": "trainer.default_root_dir",
    "peft_config": "model.lora",
    "per_device_train_batch_size": "data.batch_size",
    "reward_funcs": "model.rewards",
}
"""Options of TRL and transformers, and ours."""


@dataclass(frozen=True)
class Rejection:
    """A mistake that the parser found.

    Attributes:
        option: Dotted name of the option, such as `model.rewards`; empty for the command line as a whole.
        owner: Import path of the class whose options the mistake is in, or empty.
        reason: The parser's words.
        value: The rejected value; None if unknown.
    """

    option: str
    owner: str
    reason: str
    value: str | None = None


def read_message(message: str) -> list[Rejection]:
    """Parse jsonargparse's indented message into the mistakes it names, at least one."""
    found: list[Rejection] = []
    path: list[tuple[int, str, str]] = []  # indentation, option, class
    for line in message.splitlines():
        text = CALLABLE.sub("", line.strip().removeprefix("- "))
        if UNINFORMATIVE.match(text):
            continue
        indent = len(line) - len(line.lstrip())
        while path and path[-1][0] >= indent and not text.startswith("Given value:"):
            path.pop()
        owner = path[-1][2] if path else ""
        names = [name for _, name, _ in path if name]
        if match := re.match(r'(?:Parser key "(.+?)"|--([\w.]+)\.help|argument -(?:\w/-)?-([\w.]+)): *(.*)', text):
            name = next(part for part in match.groups()[:3] if part)
            path.append((indent, name, owner))
            if match[4]:
                found.append(Rejection(".".join([*names, name]), owner, match[4]))
        elif match := re.match(r"Problem with given class_path '(.+?)':", text):
            path.append((indent, "", match[1]))
        elif text.startswith("Given value:"):
            given = text.removeprefix("Given value:").strip()
            given = re.split(r"\. Got value: ?", re.sub(r"^NestedArg\(key='.*?', val=(.*)\)$", r"\1", given))[0].strip(
                "'"
            )
            found = [Rejection(r.option, r.owner, r.reason, given if r.value is None else r.value) for r in found]
        else:
            reason, *values = GOT_VALUE.split(text)
            if match := re.match(r"Namespace\(class_path='(.+?)'", values[-1] if values else ""):
                owner = match[1]
                values = values[:-1] or ([owner] if "init_args" not in text else [])
            found.append(Rejection(".".join(names), owner, reason, values[0] if values else None))
    return found or [Rejection("", "", message)]

"""The reward interface: protocol, weights, and the specification (name, weight, arguments) of a reward.

A reward is called by keyword with `prompts`, `completions`, `completion_ids`, every other column of the data,
`finished`, `trainer_state`, `log_extra` and `log_metric`, and returns one number per completion. With `**kwargs` it
receives all of these, otherwise only the arguments that it names. It may be an `async def`; the async rewards of a call
run concurrently.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from lit_rlhf.errors import InputError, InputTypeError
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.rewards.guard import Guarded
from lit_rlhf.rewards.http_client import ServiceError
from lit_rlhf.rewards.outputs import read_numbers, read_token_rows
from lit_rlhf.types import Text

Numbers = Sequence[float | None] | Tensor

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "finished", "trainer_state", "log_extra", "log_metric")
"""Arguments that any reward can take. They take precedence over data columns of the same name."""


class Reward(Protocol):
    """Protocol of a reward; a plain function satisfies it.

    With an attribute `token_level = True` it returns, for each completion, one number per token of `completion_ids`
    (EOS token included). With `special_tokens = True` its completions contain special tokens, such as tags that were
    added to the tokenizer as special ones. A reward with a model may have `setup(device)`, called once before the first
    use. A reward that reads columns through `**kwargs` may list them in `required_columns`. One that looks at
    lengths may have `check_max_new_tokens(max_new_tokens)`, called before a model is loaded.
    """

    def __call__(
        self, *, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **kwargs: Any
    ) -> Numbers | Sequence[Numbers | None] | Awaitable[Any]:
        """Return one number per completion, or None where the reward has no opinion."""


@dataclass(frozen=True)
class Weighted:
    """A reward with a weight and a name. A bare callable has weight 1.

    Attributes:
        reward: Any reward.
        weight: Factor of the reward in the weighted sum. With 0 it is only logged.
        name: Name in logs and records. Defaults to the function's name, or the class's in snake case.
        final_weight: Weight after `updates` updates, reached linearly. None: the weight is constant.
        updates: Number of updates until `final_weight`.

    Raises:
        ValueError: If a weight is not a finite number, or only one of `final_weight` and `updates` is given.
    """

    reward: Callable[..., Any]
    weight: float | int = 1.0
    name: str | None = None
    final_weight: float | int | None = None
    updates: int | None = None

    def __post_init__(self) -> None:
        for weight in (self.weight, self.weight if self.final_weight is None else self.final_weight):
            if not math.isfinite(weight):
                raise InputError(f"the weight of a reward must be a finite number, not {weight!r}")
        if (self.final_weight is None) != (self.updates is None) or (self.updates is not None and self.updates < 1):
            raise InputError(
                f"final_weight={self.final_weight} and updates={self.updates}: give both (updates >= 1) or neither"
            )

    def weight_at(self, step: int) -> float:
        """Return the weight after `step` updates."""
        if self.final_weight is None or self.updates is None:
            return self.weight
        return self.weight + (self.final_weight - self.weight) * min(1.0, step / self.updates)

    def __call__(self, **kwargs: Any) -> Any:
        """Call the reward. The scorer applies the weight."""
        return self.reward(**kwargs)


class RewardInterrupted(RuntimeError):
    """A signal ended the run while it waited for a reward.

    Attributes:
        number: The signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class RewardSpec:
    """Specification of a reward or judge: name, weights and arguments.

    Attributes:
        name: Unique name in logs and records.
        title: Name in messages: "the reward 'x'".
        weights: The `Weighted` wrappers, whose weights are multiplied.
        guard: The outermost `Guarded` wrapper, or None.
        reward: The callable.
        token_level: Whether it returns one number per token.
        special_tokens: Whether its completions contain special tokens.
        accepts: Names of the arguments that it takes, or None for all.
        requires: Names of the arguments without a default, and its `required_columns`.
        ready_on: The device of the last `setup`, as a list of at most one.
    """

    name: str
    title: str
    weights: tuple[Weighted, ...]
    guard: Guarded | None
    reward: Callable[..., Any]
    token_level: bool
    special_tokens: bool
    accepts: frozenset[str] | None
    requires: frozenset[str]
    ready_on: list[torch.device] = field(default_factory=list)

    @classmethod
    def of(cls, reward: Any, taken: set[str], role: str = "reward") -> RewardSpec:
        """Unwrap a reward and inspect its signature; `taken` are the names of other rewards.

        Raises:
            TypeError: If it is not a reward, or is guarded although it guards itself.
        """
        weights: list[Weighted] = []
        guard: Guarded | None = None
        while isinstance(reward, Weighted | Guarded):
            if isinstance(reward, Weighted):
                weights.append(reward)
            else:
                guard = guard or reward
            reward = reward.reward
        name = next((weighted.name for weighted in weights if weighted.name), None)
        _check_is_reward(reward, role)
        bare = reward.func if isinstance(reward, functools.partial) else reward
        token_level, special_tokens = (
            bool(getattr(reward, flag, getattr(bare, flag, False))) for flag in ("token_level", "special_tokens")
        )
        name = _unique(name or _name(bare), taken)
        attribute = getattr(reward, "guard", None)
        own = attribute if isinstance(attribute, Guarded) else None
        if guard is not None and own is not None:
            raise InputTypeError(f"the {role} {name!r} has timeout, retries and so on itself: leave Guarded out")
        guard = guard or own
        options = (tuple(weights), guard, reward, token_level, special_tokens, *_signature(reward))
        return cls(name, f"the {role} {name!r}", *options)

    def weight(self, step: int) -> float:
        """Return the weight after `step` updates."""
        return math.prod(weighted.weight_at(step) for weighted in self.weights)

    def setup(self, device: torch.device | str, sharding: Sharding | None = None) -> None:
        """Call the reward's `setup(device)`, if it has one and the device has changed.

        Args:
            device: The device.
            sharding: How models are sharded over ranks, if they are; for a `setup` that takes it.
        """
        new = [torch.device(device)]
        if self.ready_on != new and callable(setup := getattr(self.reward, "setup", None)):
            takes_it = "sharding" in inspect.signature(setup).parameters
            # all ranks call a sharded model together, which a retry of one of them does not
            sharded = sharding is not None and takes_it and self.guard is None
            setup(device, **({"sharding": sharding} if sharded else {}))
        self.ready_on[:] = new

    def names(self, argument: str) -> bool:
        """Return whether the reward's signature names an argument."""
        try:
            return argument in inspect.signature(self.reward).parameters
        except (ValueError, TypeError):  # some builtins have no signature
            return False

    def check(self, names: set[str]) -> None:
        """Raise a ValueError if a required argument is not among `names`."""
        if missing := sorted(self.requires - names):
            columns = sorted(names.difference(REWARD_ARGUMENTS))
            known = [*REWARD_ARGUMENTS, *columns]
            near = next((close[0] for name in missing if (close := difflib.get_close_matches(name, known, 1))), None)
            remedy = "take `completions`, add the column to the data, or give the parameter a default"
            raise InputError(
                f"{self.title} asks for {missing}, but the columns of the data are {columns}: "
                f"{remedy if near is None else f'did you mean {near!r}?'}"
            )

    def call(self, arguments: dict[str, Any]) -> Any:
        """Call the reward with copies of the arguments that it accepts; its exceptions become a RuntimeError."""
        self.check(set(arguments))
        try:
            if self.guard is None:
                return self.invoke(arguments)
            return self.guard.run(self.invoke, self._read, arguments, self.title, self.name)
        except (Exception, SystemExit) as error:
            self.raise_error(error, arguments)

    def invoke(self, arguments: dict[str, Any]) -> Any:
        """Call the reward with copies of the arguments that it accepts."""
        names = arguments if self.accepts is None else self.accepts & arguments.keys()
        return self.reward(**{name: own_copy(arguments[name]) for name in arguments if name in names})

    def raise_error(self, error: BaseException, arguments: dict[str, Any]) -> NoReturn:
        """Raise an error that names the reward, from one of the reward's: a RuntimeError unless it is a sentence."""
        if isinstance(error, torch.OutOfMemoryError | RewardInterrupted):
            raise error  # unchanged, for callers that retry with a smaller batch, and for those that end the run
        if isinstance(error, ServiceError | InputError):
            raise InputError(f"{error}" if self.title in str(error) else f"{self.title}: {error}") from error
        hint = ""
        if has_messages(arguments) and not isinstance(error, OSError):
            hint = (
                " (the data are conversations, so a prompt or a completion is a list of messages: "
                "lit_rlhf.rewards.to_text(completion) returns its text)"
            )
        raise RuntimeError(f"{self.title} raised {type(error).__name__}: {error}{hint}") from error

    def _read(self, output: Any, arguments: dict[str, Any]) -> list[Any]:
        """Check what the reward returned, and return it as a list with one entry per completion."""
        if self.token_level:
            read_token_rows(output, [len(ids) for ids in arguments["completion_ids"]], self.title)
        else:
            read_numbers(output, len(arguments["completions"]), self.title)
        return list(output)


def has_messages(arguments: dict[str, Any]) -> bool:
    """Return whether prompts or completions are lists of messages."""
    return any(isinstance(text, list) for name in ("prompts", "completions") for text in arguments.get(name, ()))


def own_copy(value: Any) -> Any:
    """Return a copy of an argument of a reward, so that what it changes reaches nothing else."""
    if isinstance(value, list):
        return [item if isinstance(item, _IMMUTABLE) else _copy(item) for item in value]
    return value if callable(value) else _copy(value)


_IMMUTABLE = (str, int, float, type(None))


def _copy(item: Any) -> Any:
    if type(item) is list and all(type(entry) is int for entry in item):  # token ids, which deepcopy copies slowly
        return item.copy()
    try:
        return copy.deepcopy(item)
    except Exception:  # an object of the user's that can't be copied, such as one with a lock
        return item


def _check_is_reward(reward: Any, role: str) -> None:
    if isinstance(reward, str):
        remedy = f"import the function, or use RewardModel({reward!r}) for a model"
    elif isinstance(reward, type):
        remedy = f"create an instance: {reward.__name__}(...)"
    elif isinstance(reward, torch.nn.Module) and hasattr(reward, "config"):
        remedy, reward = "wrap it: RewardModel(model, tokenizer=tokenizer)", type(reward).__name__
    elif not callable(reward):
        remedy = "give a function or an object with __call__(prompts=, completions=, ...)"
    else:
        return
    raise InputTypeError(f"{reward!r} is not a {role}: {remedy}")


def _name(reward: Any) -> str:
    if name := getattr(reward, "__name__", None):
        return str(name).strip("<>")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(reward).__name__).lower()


def _unique(name: str, taken: set[str]) -> str:
    candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _signature(reward: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Return the names of accepted arguments (None: all) and of required ones."""
    required = set(getattr(reward, "required_columns", ()))
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (ValueError, TypeError):  # some builtins have no signature
        return None, frozenset(required)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required |= {p.name for p in named if p.default is p.empty}
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if accepts_all else frozenset(p.name for p in named), frozenset(required)

"""What a reward is, and what is known of one before it is called: its name, its weight, the arguments that it takes.

A reward is called by keyword with `prompts`, `completions`, `completion_ids`, every other column of the data,
`finished`, `trainer_state`, `log_extra` and `log_metric`, and returns one number a completion. One with `**kwargs` is
given all of these, any other one only what it names. It may be an `async def`; those of one call run side by side.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from lit_rlhf.types import Text

Numbers = Sequence[float | None] | Tensor

GIVEN = ("prompts", "completions", "completion_ids", "finished", "trainer_state", "log_extra", "log_metric")
"""What every reward can ask for; a column of the data that has one of these names is not handed on."""


class Reward(Protocol):
    """The shape of a reward; a plain function will do.

    With an attribute `token_level = True` it returns, for each completion, one number a token of its `completion_ids`
    (the EOS token included). One that holds a model may have `setup(device)`, called once before the first use, and
    one that reads columns through `**kwargs` may name them in `required_columns`.
    """

    def __call__(
        self, *, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **kwargs: Any
    ) -> Numbers | Sequence[Numbers | None] | Awaitable[Any]:
        """Return one number a completion, None where the reward has no opinion."""


@dataclass(frozen=True)
class Weighted:
    """A reward with a weight in the sum and a name in the logs. A bare callable weighs 1.

    Attributes:
        reward: Any reward.
        weight: What its numbers are multiplied by; 0 logs it and learns nothing from it.
        name: Of the part in logs and records; by default the name of the function, or of the class in snake case.
        final_weight: What the weight becomes, in a straight line over `updates`; None: it stays.
        updates: How many updates that takes.

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
                raise ValueError(f"the weight of a reward must be a finite number, not {weight!r}")
        if (self.final_weight is None) != (self.updates is None) or (self.updates is not None and self.updates < 1):
            raise ValueError(
                f"final_weight={self.final_weight} and updates={self.updates}: give both (updates from 1 on) or neither"
            )

    def weight_at(self, step: int) -> float:
        """The weight after `step` updates."""
        if self.final_weight is None or self.updates is None:
            return self.weight
        return self.weight + (self.final_weight - self.weight) * min(1.0, step / self.updates)

    def __call__(self, **kwargs: Any) -> Any:
        """Call the reward; its weight is applied by the scorer."""
        return self.reward(**kwargs)


@dataclass(frozen=True)
class Entry:
    """A reward of the list, or a judge, with all that is known about it before it is called."""

    name: str
    title: str  # what messages call it: the reward 'x'
    weights: tuple[Weighted, ...]
    reward: Callable[..., Any]
    token_level: bool
    accepts: frozenset[str] | None  # None: everything
    requires: frozenset[str]
    ready_on: list[torch.device] = field(default_factory=list)  # where it was set up last

    @classmethod
    def of(cls, reward: Any, taken: set[str], role: str = "reward") -> Entry:
        """Take a reward apart and find out what it needs; `taken` are names that other entries have.

        Raises:
            TypeError: If it is no reward.
        """
        weights: list[Weighted] = []
        while isinstance(reward, Weighted):
            weights.append(reward)
            reward = reward.reward
        name = next((weighted.name for weighted in weights if weighted.name), None)
        _check_is_reward(reward, role)
        bare = reward.func if isinstance(reward, functools.partial) else reward
        token_level = bool(getattr(reward, "token_level", getattr(bare, "token_level", False)))
        name = _unique(name or _name(bare), taken)
        return cls(name, f"the {role} {name!r}", tuple(weights), reward, token_level, *_signature(reward))

    def weight(self, step: int) -> float:
        """What the numbers are multiplied by after `step` updates."""
        return math.prod(weighted.weight_at(step) for weighted in self.weights)

    def setup(self, device: torch.device | str) -> None:
        """Let the reward load what it needs onto `device`, unless that is where it was set up last."""
        wanted = [torch.device(device)]
        if self.ready_on != wanted and callable(setup := getattr(self.reward, "setup", None)):
            setup(device)
        self.ready_on[:] = wanted

    def check(self, names: set[str]) -> None:
        """Raise a ValueError if the reward asks for a name that is not among `names`."""
        if missing := sorted(self.requires - names):
            columns = sorted(names.difference(GIVEN))
            raise ValueError(
                f"{self.title} asks for {missing}, but the columns of the data are {columns}: "
                "add the column to the data, or give the parameter a default"
            )

    def call(self, given: dict[str, Any]) -> Any:
        """Call the reward with those of the arguments that it takes; what it raises becomes a RuntimeError."""
        self.check(set(given))
        arguments = given if self.accepts is None else {k: v for k, v in given.items() if k in self.accepts}
        try:
            return self.reward(**arguments)
        except Exception as error:
            fail(self.title, error)


def fail(title: str, error: BaseException) -> NoReturn:
    """Raise a RuntimeError that names the reward, in place of what the reward raised."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error  # as it is, for those who try again with less
    raise RuntimeError(f"{title} raised {type(error).__name__}: {error}") from error


def _check_is_reward(reward: Any, role: str) -> None:
    if isinstance(reward, str):
        cure = f"import the function, or use RewardModel({reward!r}) for a model"
    elif isinstance(reward, type):
        cure = f"make an instance: {reward.__name__}(...)"
    elif isinstance(reward, torch.nn.Module) and hasattr(reward, "config"):
        cure, reward = "wrap it: RewardModel(model, tokenizer=tokenizer)", type(reward).__name__
    elif not callable(reward):
        cure = "give a function or an object with __call__(prompts=, completions=, ...)"
    else:
        return
    raise TypeError(f"{reward!r} is not a {role}: {cure}")


def _name(reward: Any) -> str:
    if name := getattr(reward, "__name__", None):
        return str(name).strip("<>")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(reward).__name__).lower()


def _unique(name: str, taken: set[str]) -> str:
    candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _signature(reward: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Names that a reward takes (None: all) and those it can't do without."""
    required = set(getattr(reward, "required_columns", ()))
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (ValueError, TypeError):  # some builtins have none
        return None, frozenset(required)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required |= {p.name for p in named if p.default is p.empty}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_all else frozenset(p.name for p in named), frozenset(required)

"""What a pipeline file may say of `compress`: the steps of a chain, each with its search space, and the budget."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from heliostat.core.identity import canonical_json, fingerprint
from heliostat.core.imports import digest_sources, own_sources
from heliostat.core.model import Count, Positive, Spec
from heliostat.core.paths import overlay, why_not_a_path
from heliostat.core.probes import probes
from heliostat.core.space import Choice, Constant, Dimension, Grid, Option, Space
from heliostat.core.stage import ConfigView, find_kind
from heliostat.errors import SpecError, nearest
from heliostat.stages.checks import UNTRAINABLE
from heliostat.stages.choosing import Demands
from heliostat.stages.distill import DistillConfig
from heliostat.stages.factorize import FactorizeConfig
from heliostat.stages.prune import PruneConfig
from heliostat.stages.quantize import QuantizeConfig

NOTHING = "nothing"
"""What stands in a trial's parameters for a step that is left out."""
MADE = "made.json"
"""The record of one link of a chain."""
CONFIGS: dict[str, type[Spec]] = {
    "prune": PruneConfig,
    "factorize": FactorizeConfig,
    "distill": DistillConfig,
    "quantize": QuantizeConfig,
}
"""The passes, each with what the stage of that name takes as its config."""
DEFAULT_PASSES: tuple[dict[str, dict[str, Any]], ...] = (
    {"prune": {"sparsity": {"choice": [0.3, 0.5, 0.7]}, "finetune_epochs": 3}},
    {"factorize": {"energy": {"choice": [0.8, 0.9]}, "finetune_epochs": 2}},
    {
        "quantize": {
            "method": {
                "choice": ["static", "dynamic", "weight_only", {"value": "qat", "space": {"finetune_epochs": 2}}]
            }
        }
    },
)


@dataclass(frozen=True)
class Step:
    """One pass of a chain, with its config."""

    uses: str
    config: Spec


@dataclass(frozen=True)
class Link(Step):
    """A step of a chain that begins at a certain model. `digest` says what comes of that model up to here."""

    digest: str


class CompressConfig(Demands):
    """A search over chains of passes, for the best model within the limits.

    It ends after so many `trials`, or after `wall_time_s` seconds, interruptions left out.
    """

    passes: tuple[dict[str, dict[str, Any]], ...] = Field(default=DEFAULT_PASSES, min_length=1)
    """The steps of a chain, in their order. Each is one of the passes that it names, or is left out. A pass maps the
    dotted paths of its config to values or dimensions, `{sparsity: {choice: [0.3, 0.5]}, distillation.alpha: 0.9}`."""
    trials: Count = 24
    wall_time_s: Positive | None = None

    @cached_property
    def space(self) -> Space:
        """Chains as points. Raises SpecError that names the place."""
        return Space({f"step_{number}": self._choice(number) for number in range(1, len(self.passes) + 1)})

    def _choice(self, number: int) -> Choice:
        place, step = f"config.passes[{number - 1}]", self.passes[number - 1]
        spaces = {uses: Space.parse(settings, f"{place}.{uses}") for uses, settings in step.items()}
        options = (Option(uses, _under(f"step_{number}", space)) for uses, space in spaces.items())
        return Choice((Option(NOTHING, Space({})), *options))

    @property
    def untouched(self) -> dict[str, Any]:
        """The point at which every step is left out."""
        return dict.fromkeys(self.space.dimensions, NOTHING)

    def steps(self, params: Mapping[str, Any]) -> list[Step]:
        """The chain at a point. Raises SpecError for a config that its pass does not take."""
        chain = []
        for index in range(len(self.passes)):
            name = f"step_{index + 1}"
            if (uses := params[name]) != NOTHING:
                chain.append(Step(uses, self._config(index, uses, settings_of(params, name))))
        return chain

    def written(self, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The chain at a point as one would write its stages."""
        names = [name for name in self.space.dimensions if params[name] != NOTHING]
        return [{"uses": params[name], "config": settings_of(params, name)} for name in names]

    def beginnings(self, params: Mapping[str, Any]) -> list[str]:
        """What has to be made on the way to the chain at a point, as it stands in other chains that begin alike."""
        stages = self.written(params)
        return [canonical_json(stages[:count]) for count in range(1, len(stages) + 1)]

    def label(self, params: Mapping[str, Any]) -> str:
        """A chain in words, without what is the same in all."""
        fixed = set(_constants(self.space))
        told = []
        for name in self.space.dimensions:
            settings = settings_of(params, name).items()
            varied = ", ".join(f"{path}={value}" for path, value in settings if f"{name}.{path}" not in fixed)
            if params[name] != NOTHING:
                told.append(f"{params[name]}({varied})" if varied else params[name])
        return " -> ".join(told) or "uncompressed"

    @property
    def method(self) -> tuple[str, int]:
        """How chains are chosen, and how many: all of them where the trials suffice."""
        size = self.space.size()
        return ("grid", size) if size is not None and size <= self.trials else ("optuna_tpe", self.trials)

    @property
    def code_references(self) -> tuple[str, ...]:
        found = (config.code_references for step in range(len(self.passes)) for _, config in self.probed(step))
        return tuple(dict.fromkeys(reference for references in found for reference in references))

    def probed(self, index: int) -> Iterator[tuple[str, Spec]]:
        """The passes of a step with configs at the ends of their spaces, and at some points between."""
        for uses, settings in self.passes[index].items():
            for point in probes(Space.parse(settings), random.Random(0)):
                yield uses, self._config(index, uses, point)

    def _config(self, index: int, uses: str, settings: Mapping[str, Any]) -> Spec:
        return overlay(CONFIGS[uses](), settings, place=f"config.passes[{index}].{uses}")


def settings_of(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the parameters say of one step: the paths of its pass's config."""
    return {path.removeprefix(f"{name}."): value for path, value in params.items() if path.startswith(f"{name}.")}


def links_of(steps: Sequence[Step], *, start: str, seed: int, root: Path) -> list[Link]:
    """The steps as links of a chain that begins at the model with the fingerprint `start`, which stands for the task.

    `root` is the folder of the user's modules: what a pass alone uses of them counts too.
    """
    links, digest = [], start
    for step in steps:
        identity = {
            "source": digest,
            "uses": step.uses,
            "version": find_kind(step.uses).version,
            "config": step.config.identity(),
            "sources": digest_sources(own_sources(getattr(step.config, "code_references", ()), root)),
            "seed": seed,
        }
        digest = fingerprint(identity)
        links.append(Link(step.uses, step.config, digest))
    return links


def _under(prefix: str, space: Space) -> Space:
    return Space({f"{prefix}.{path}": _dimension_under(prefix, d) for path, d in space.dimensions.items()})


def _dimension_under(prefix: str, dimension: Dimension) -> Dimension:
    if isinstance(dimension, Choice | Grid):
        options = tuple(Option(option.value, _under(prefix, option.space)) for option in dimension.options)
        return type(dimension)(options)
    return dimension


def _constants(space: Space) -> Iterator[str]:
    for path, dimension in space.dimensions.items():
        if isinstance(dimension, Constant):
            yield path
        elif isinstance(dimension, Choice | Grid):
            for option in dimension.options:
                yield from _constants(option.space)


def check_steps(config: CompressConfig, view: ConfigView) -> Iterator[str]:
    """Whether there are such passes, whether they take what they are given, and whether they can follow one another."""
    wrong = [problem for index in range(len(config.passes)) for problem in _check_names(config, index)]
    yield from wrong
    if wrong:
        return
    before: list[str] = []
    for index, step in enumerate(config.passes):
        for last in before:
            if last in UNTRAINABLE:
                yield f"config.passes[{index}]: what {last!r} makes cannot be compressed further; make it the last step"
        train = find_kind("train")
        said: dict[str, None] = {}
        for uses, settings in config.probed(index):
            slots = {"teacher": view.inputs["model"]} if uses == "distill" else {"model": [(train, train.config())]}
            problems = find_kind(uses).check(settings, replace(view, inputs=slots))
            said |= dict.fromkeys(p.replace("config", f"config.passes[{index}].{uses}", 1) for p in problems)
        yield from said
        before = list(step)


def _check_names(config: CompressConfig, index: int) -> Iterator[str]:
    place, step = f"config.passes[{index}]", config.passes[index]
    if not step:
        yield f"{place}: empty; name at least one of {', '.join(CONFIGS)}"
    for uses, settings in step.items():
        if uses not in CONFIGS:
            yield f"{place}.{uses}: unknown pass{nearest(uses, CONFIGS)}"
            continue
        try:
            paths = Space.parse(settings, f"{place}.{uses}").paths()
        except SpecError as error:
            yield str(error)
            continue
        problems = {path: why_not_a_path(CONFIGS[uses], path) for path in paths}
        yield from (f"{place}.{uses}.{path}: {problem}" for path, problem in problems.items() if problem)

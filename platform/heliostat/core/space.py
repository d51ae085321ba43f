"""The search-space grammar: one for every engine.

A space maps dotted paths of the train config to dimensions:

    optimizer.lr: {loguniform: [1.0e-4, 1.0e-1]}
    model_args.width: {choice: [8, 16, 32]}
    optimizer.name: {choice: [adam, {value: sgd, space: {optimizer.momentum: {uniform: [0.0, 0.99]}}}]}
    model_args.depth: {grid: [1, 2, 3]}
    model_args.dropout: {quniform: [0.0, 0.5, 0.1]}
    model_args.bias: true

The last is a constant. An option `{value: …, space: …}` opens further dimensions when it is taken. Parameters come
out as flat mappings from path to value, exactly as written.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from heliostat.errors import SpecError, nearest


@dataclass(frozen=True)
class Uniform:
    """A real number in [low, high]."""

    low: float
    high: float

    def sample(self, rng: random.Random) -> float:
        return rng.uniform(self.low, self.high)

    def within(self, value: float) -> float:
        return min(max(float(value), self.low), self.high)


@dataclass(frozen=True)
class LogUniform:
    """A real number in [low, high] whose logarithm is uniform; 0 < low."""

    low: float
    high: float

    def sample(self, rng: random.Random) -> float:
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))

    def within(self, value: float) -> float:
        return min(max(float(value), self.low), self.high)


@dataclass(frozen=True)
class RandInt:
    """A whole number in [low, high), as in Python's `range`."""

    low: int
    high: int

    def sample(self, rng: random.Random) -> int:
        return rng.randrange(self.low, self.high)

    def within(self, value: float) -> int:
        return min(max(math.floor(value), self.low), self.high - 1)

    @property
    def values(self) -> Sequence[int]:
        return range(self.low, self.high)


@dataclass(frozen=True)
class LogRandInt:
    """A whole number in [low, high) whose logarithm is uniform: the floor of a `LogUniform`; 1 <= low."""

    low: int
    high: int

    def sample(self, rng: random.Random) -> float:
        return LogUniform(self.low, self.high).sample(rng)

    def within(self, value: float) -> int:
        return RandInt(self.low, self.high).within(value)

    @property
    def values(self) -> Sequence[int]:
        return range(self.low, self.high)


@dataclass(frozen=True)
class QUniform:
    """One of low, low + step, low + 2 step and so on up to high, each as likely; drawn by its place in `values`.

    Where low and step are whole, so are the values: a width or a batch size takes no 16.0.
    """

    low: float
    high: float
    step: float

    def sample(self, rng: random.Random) -> int:
        return rng.randrange(len(self.values))

    def within(self, place: float) -> float:
        return self.values[RandInt(0, len(self.values)).within(place)]

    @property
    def values(self) -> Sequence[float]:
        return _Steps(*(Decimal(repr(number)) for number in (self.low, self.high, self.step)))


@dataclass(frozen=True)
class _Steps(Sequence[float]):
    """Numbers as one would write them, none before it is asked for: decimal arithmetic has 0.1 + 2 * 0.1 be 0.3."""

    low: Decimal
    high: Decimal
    step: Decimal

    def __len__(self) -> int:
        return int((self.high - self.low) / self.step) + 1

    def __getitem__(self, place: Any) -> Any:
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        value = self.low + place % len(self) * self.step
        return int(value) if self.low % 1 == 0 == self.step % 1 else float(value)


@dataclass(frozen=True)
class Normal:
    """A real number of the normal distribution; it has no bounds."""

    mean: float
    deviation: float

    def sample(self, rng: random.Random) -> float:
        return rng.gauss(self.mean, self.deviation)

    def within(self, value: float) -> float:
        return float(value)


@dataclass(frozen=True)
class Option:
    """One option of a choice: a JSON value, and the dimensions that exist only when it is taken."""

    value: Any
    space: "Space"


@dataclass(frozen=True)
class Choice:
    """One of the options, each as likely as the others."""

    options: tuple[Option, ...]

    def sample(self, rng: random.Random) -> int:
        return rng.randrange(len(self.options))


@dataclass(frozen=True)
class Grid:
    """Every value in turn under `grid`; as a choice under the methods that sample."""

    options: tuple[Option, ...]

    def sample(self, rng: random.Random) -> int:
        return rng.randrange(len(self.options))


@dataclass(frozen=True)
class Constant:
    value: Any


Countable = RandInt | LogRandInt | QUniform
Varied = Uniform | LogUniform | Normal | Countable | Choice | Grid
Dimension = Varied | Constant


@dataclass(frozen=True)
class Space:
    """Dimensions by dotted path."""

    dimensions: Mapping[str, Dimension]

    @staticmethod
    def parse(mapping: Any, place: str = "space") -> "Space":
        """The space that a mapping of the file describes. Raises SpecError with place, value and nearest right word."""
        if not isinstance(mapping, Mapping):
            raise SpecError(f"{place}: {mapping!r} is not a mapping from parameter to dimension")
        return Space({str(path): _parse_dimension(value, f"{place}.{path}") for path, value in mapping.items()})

    def paths(self) -> list[str]:
        """Every path that a sample may set, those of conditional dimensions included."""
        found = list(self.dimensions)
        for dimension in self.dimensions.values():
            if isinstance(dimension, Choice | Grid):
                found += [path for option in dimension.options for path in option.space.paths()]
        return list(dict.fromkeys(found))

    def sample(self, rng: random.Random) -> dict[str, Any]:
        """One point, drawn at random."""
        return self.point(lambda label, dimension: dimension.sample(rng))

    def point(self, draw: Callable[[str, Varied], Any], prefix: str = "") -> dict[str, Any]:
        """The point of which `draw(label, dimension)` says the numbers, and the index of the option for each choice.

        It is asked for every dimension that varies and exists at this point, in order. A label is the dimension's path
        after those of the options that opened it, such as `optimizer.name/1/optimizer.momentum`: no two are the same.
        """
        point: dict[str, Any] = {}
        for path, dimension in self.dimensions.items():
            label = f"{prefix}{path}"
            match dimension:
                case Constant(value):
                    point[path] = value
                case Choice(options) | Grid(options):
                    index = int(draw(label, dimension))
                    point |= {path: options[index].value, **options[index].space.point(draw, f"{label}/{index}/")}
                case _:
                    point[path] = dimension.within(draw(label, dimension))
        return point

    def size(self) -> int | None:
        """The number of points, or None when a dimension is continuous."""
        total = 1
        for dimension in self.dimensions.values():
            match dimension:
                case Uniform() | LogUniform() | Normal():
                    return None
                case RandInt() | LogRandInt() | QUniform():
                    total *= len(dimension.values)
                case Choice(options) | Grid(options):
                    sizes = [option.space.size() for option in options]
                    if None in sizes:
                        return None
                    total *= sum(s for s in sizes if s is not None)
        return total

    def grid(self) -> list[dict[str, Any]]:
        """Every point, the last dimension varying fastest. Raises SpecError when a dimension is continuous."""
        axes = [list(_points(path, dimension)) for path, dimension in self.dimensions.items()]
        return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]


def _points(path: str, dimension: Dimension) -> Iterator[dict[str, Any]]:
    match dimension:
        case RandInt() | LogRandInt() | QUniform():
            yield from ({path: value} for value in dimension.values)
        case Choice(options) | Grid(options):
            yield from ({path: option.value, **rest} for option in options for rest in option.space.grid())
        case Constant(value):
            yield {path: value}
        case _:
            name = type(dimension).__name__.lower()
            words = "`grid`, `choice`, `randint`, `lograndint` or `quniform`"
            raise SpecError(f"{path}: {name} has no end of values; a grid needs {words}")


def _parse_dimension(value: Any, place: str) -> Dimension:
    if not isinstance(value, Mapping):
        if isinstance(value, list | tuple):
            raise SpecError(
                f"{place}: {value!r} is a list; write {{choice: {list(value)!r}}} to choose among its values"
            )
        return Constant(value)
    if len(value) != 1:
        raise SpecError(
            f"{place}: one dimension has one word, not {len(value)}: {', '.join(map(str, value)) or 'nothing'}"
        )
    ((word, argument),) = value.items()
    if word not in _PARSERS:
        raise SpecError(f"{place}: unknown dimension {word!r}{nearest(str(word), _PARSERS)}")
    parsed: Dimension = _PARSERS[word](argument, f"{place}.{word}")
    return parsed


def _parse_numbers(argument: Any, place: str, *, what: str, names: Sequence[str], whole: bool = False) -> list[Any]:
    kinds = (int,) if whole else (int, float)
    if not isinstance(argument, list | tuple) or len(argument) != len(names):
        raise SpecError(f"{place}: {argument!r} is not {what}; write [{', '.join(names)}]")
    for number in argument:
        if isinstance(number, bool) or not isinstance(number, kinds) or not math.isfinite(number):
            raise SpecError(f"{place}: {number!r} is not a {'whole ' if whole else ''}number")
    return list(argument)


def _parse_range(argument: Any, place: str, *, whole: bool) -> tuple[Any, Any]:
    low, high = _parse_numbers(argument, place, what="a range", names=("low", "high"), whole=whole)
    _check_range(low, high, place)
    return low, high


def _check_range(low: float, high: float, place: str) -> None:
    if low >= high:
        raise SpecError(f"{place}: the range [{low}, {high}] is {'reversed' if low > high else 'empty'}")


def _parse_uniform(argument: Any, place: str) -> Uniform:
    low, high = _parse_range(argument, place, whole=False)
    return Uniform(float(low), float(high))


def _parse_loguniform(argument: Any, place: str) -> LogUniform:
    low, high = _parse_range(argument, place, whole=False)
    _check_logarithm(low, place)
    return LogUniform(float(low), float(high))


def _check_logarithm(low: float, place: str) -> None:
    if low <= 0:
        raise SpecError(f"{place}: the logarithm needs a low end above zero, not {low}")


def _parse_randint(argument: Any, place: str) -> RandInt:
    return RandInt(*_parse_range(argument, place, whole=True))


def _parse_lograndint(argument: Any, place: str) -> LogRandInt:
    low, high = _parse_range(argument, place, whole=True)
    _check_logarithm(low, place)
    return LogRandInt(low, high)


def _parse_quniform(argument: Any, place: str) -> QUniform:
    low, high, step = _parse_numbers(argument, place, what="a stepped range", names=("low", "high", "step"))
    _check_range(low, high, place)
    if not 0 < step <= high - low:
        raise SpecError(f"{place}: a step of {step} does not lead from {low} to {high}")
    return QUniform(float(low), float(high), float(step))


def _parse_normal(argument: Any, place: str) -> Normal:
    mean, deviation = _parse_numbers(argument, place, what="a normal distribution", names=("mean", "deviation"))
    if deviation <= 0:
        raise SpecError(f"{place}: the standard deviation is above zero, not {deviation}")
    return Normal(float(mean), float(deviation))


def _parse_options(argument: Any, place: str) -> tuple[Option, ...]:
    if not isinstance(argument, list | tuple) or not argument:
        raise SpecError(f"{place}: {argument!r} offers nothing to choose from; write a list of values")
    return tuple(_parse_option(value, f"{place}[{i}]") for i, value in enumerate(argument))


def _parse_option(value: Any, place: str) -> Option:
    if isinstance(value, Mapping) and set(value) == {"value", "space"}:
        return Option(value["value"], Space.parse(value["space"], f"{place}.space"))
    if isinstance(value, Mapping) and len(value) == 2 and "value" in value:
        (word,) = set(value) - {"value"}
        raise SpecError(f"{place}: unknown field {word!r} beside 'value'{nearest(str(word), ['space'])}")
    return Option(value, Space({}))


_PARSERS: dict[str, Any] = {
    "uniform": _parse_uniform,
    "loguniform": _parse_loguniform,
    "quniform": _parse_quniform,
    "normal": _parse_normal,
    "randint": _parse_randint,
    "lograndint": _parse_lograndint,
    "choice": lambda argument, place: Choice(_parse_options(argument, place)),
    "grid": lambda argument, place: Grid(_parse_options(argument, place)),
}

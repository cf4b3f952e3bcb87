"""Many runs on one calibration: variants of a config, measured side by side."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mpfx.config import RunConfig, parse_run
from mpfx.report import Line, plot_sizes
from mpfx.session import SHARED, Result, Session, check_output

SIZES = ("bits_per_weight", "code_bits")
"""Fields of which exactly one is given: setting one unsets the other."""

SIGNALS = ("activation", "hessian", "weight", "output", "stability")
"""Values of the shorthand `importance`: one signal alone. Besides: all, the default mix."""


@dataclass(frozen=True)
class Variant:
    """A config that differs from a base in some fields.

    Attributes:
        name: for tables.
        fields: what differs, by dotted name.
        config: with these fields; None where they do not go together.
        problem: why not.
    """

    name: str
    fields: Mapping[str, Any]
    config: RunConfig | None
    problem: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a variant: a result, or a problem."""

    variant: Variant
    result: Result | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = {} if self.result is None else asdict(self.result)
        return {"name": self.variant.name, "fields": dict(self.variant.fields), **found, "problem": self.problem}


@dataclass(frozen=True)
class Search:
    """All outcomes so far.

    Attributes:
        model: what was compressed.
        dense: perplexity of the dense model by name of the text; empty where no variant could be run.
        outcomes: in order.
        seconds: of what is done once, by stage.
    """

    model: str
    dense: Mapping[str, float]
    outcomes: tuple[Outcome, ...]
    seconds: Mapping[str, float]

    @property
    def text(self) -> str:
        """The evaluation text; others come after it."""
        return next(iter(self.dense))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [outcome.to_json() for outcome in self.outcomes]
        return {"model": self.model, "dense": dict(self.dense), "seconds": dict(self.seconds), "rows": rows}


def variant(base: Mapping[str, Any], name: str, fields: Mapping[str, Any]) -> Variant:
    """A variant of a base config.

    Args:
        base: fields as in a config file, nested.
        name: for tables.
        fields: what differs, by dotted name; values as in a config file, or texts as on the command line.
    """
    try:
        return Variant(name, fields, parse_run(_merged(base, fields)))
    except ValueError as error:
        return Variant(name, fields, None, str(error))


def _merged(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    if any(name in SIZES for name in fields):
        merged.update(dict.fromkeys(SIZES))
    for name, value in fields.items():
        *path, last = name.split(".")
        at = merged
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise ValueError(f"Expected a field of the config but got {name!r}: {part!r} has no fields.")
        at[last] = _mix(value) if name == "importance" else value
    return merged


def _mix(value: Any) -> Any:
    """The shorthand for weights of the importance."""
    if value == "all":
        return {}
    return {signal: float(signal == value) for signal in SIGNALS} if value in SIGNALS else value


def combinations(base: Mapping[str, Any], vary: Sequence[Sequence[str]]) -> list[Variant]:
    """The cross product of some fields' values.

    Args:
        base: fields as in a config file, nested.
        vary: per field its dotted name and the values, as texts.

    Raises:
        ValueError: for a field or value that there is not. A combination that does not go together is no error: its
            variant tells the problem.
    """
    names = [name for name, *_ in vary]
    for name, *values in vary:
        if not values or len({*values}) < len(values) or names.count(name) > 1:
            raise ValueError(
                f"Expected each field once, with one value or more, all different, but got {name} {values}."
            )
        if name.split(".")[0] in (*SHARED, "output", "progress"):
            raise ValueError(f"Expected a field to vary that one calibration can serve but got {name!r}.")
    if not names:
        raise ValueError("Expected a field to vary and its values, such as `--vary bits_per_weight 3 3.5 4`.")
    every = [dict(zip(names, values, strict=True)) for values in product(*(values for _, *values in vary))]
    variants = [variant(base, ", ".join(f"{k} {v}" for k, v in fields.items()), fields) for fields in every]
    for name, *values in vary:
        for value in values:
            having = [v for v in variants if v.fields[name] == value]
            if all(v.config is None for v in having):
                raise ValueError(f"Expected another value than {value!r} for {name}: {having[0].problem}")
    return variants


def run_all(
    variants: Sequence[Variant], also: Sequence[str] = (), on_outcome: Callable[[Search], None] = lambda search: None
) -> Search:
    """Run variants one after the other on one calibration; the failure of one does not stop the others.

    Args:
        variants: alike in model, texts, scope and device.
        also: further texts to measure on.
        on_outcome: called with all outcomes so far, after every run.

    Raises:
        ValueError: for a model or text that cannot be had, or if no variant is a valid config.
    """
    configs = [v.config for v in variants if v.config is not None]
    if not configs:
        raise ValueError(
            f"Expected a variant that is a valid config but got none: {[v.problem for v in variants][:3]}."
        )
    if configs[0].trainer.processes > 1:
        raise ValueError(
            f"Expected one device for many runs on one calibration but got {configs[0].trainer.processes}: set "
            "`trainer.devices: 1`; `mpfx compress` runs on several."
        )
    session = Session(configs[0], also=[replace(configs[0].evaluation, data=text) for text in also])
    problems = iter(session.problems(configs))
    known = [v.problem if v.config is None else next(problems) for v in variants]
    if feasible := [v.config for v, problem in zip(variants, known, strict=True) if v.config and not problem]:
        session.calibrate(feasible)
    search = Search(configs[0].model, session.dense, (), session.seconds)
    for chosen, problem in zip(variants, known, strict=True):
        outcome = Outcome(chosen, problem=problem) if problem else _outcome(session, chosen)
        search = replace(search, outcomes=(*search.outcomes, outcome), seconds=dict(session.seconds))
        on_outcome(search)
    return search


def _outcome(session: Session, chosen: Variant) -> Outcome:
    assert chosen.config is not None
    try:
        return Outcome(chosen, session.run(chosen.config))
    except Exception as error:  # whatever it is, it is told, and the others go on
        return Outcome(chosen, problem=f"{type(error).__name__}: {error}")


def save_search(data: Mapping[str, Any], path: Path) -> None:
    """Write plain data as JSON, at once or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    temporary.replace(path)


def results_folder(folder: Path, name: str) -> None:
    """Make a folder for results; refuse one that holds other things than an earlier search's.

    Args:
        folder: to make.
        name: of the file that tells an earlier search's folder.

    Raises:
        ValueError: naming the folder.
    """
    check_output(folder, lambda there: (there / name).is_file())
    folder.mkdir(parents=True, exist_ok=True)


def sweep(base: Mapping[str, Any], vary: Sequence[Sequence[str]], output: Path, also: Sequence[str] = ()) -> Search:
    """Run the cross product of some fields; write ``sweep.json`` after every run and ``sweep.png`` at the end.

    Raises:
        ValueError: for a field, value, model, text or folder that will not do, before anything runs.
    """
    variants = combinations(base, vary)
    results_folder(output, "sweep.json")
    return run_all(variants, also, lambda search: save_search(search.to_json(), output / "sweep.json"))


def plot(search: Search, path: Path, line: Callable[[Variant], str] | None = None) -> str | None:
    """Draw perplexity against stored bits.

    Args:
        search: with its outcomes.
        path: of the picture.
        line: name of the line that a variant is part of; None: one per combination of the fields that are no size.

    Returns:
        Why there is no picture; None if there is one.
    """
    if not any(outcome.result for outcome in search.outcomes):
        return "no picture was drawn: no run came to an end."
    lines: dict[str, list[tuple[float, float]]] = {}
    for outcome in search.outcomes:
        if outcome.result is not None:
            point = (outcome.result.bits_per_weight, outcome.result.perplexity[search.text])
            lines.setdefault((line or _line)(outcome.variant), []).append(point)
    return plot_sizes([Line(name, points) for name, points in lines.items()], search.dense[search.text], path)


def _line(chosen: Variant) -> str:
    return ", ".join(f"{k} {v}" for k, v in chosen.fields.items() if k not in SIZES) or "compressed"


HEAD = ("stored", "code", "sparsity")


def cells(search: Search) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: fields, sizes, perplexities with their ratio to the dense model, gap, seconds."""
    names = list(dict.fromkeys(name for outcome in search.outcomes for name in outcome.variant.fields))
    texts = [part for text in search.dense for part in (f"perplexity {short(text)}", "ratio")]
    rows = [
        [*(_shown(outcome.variant.fields.get(name)) for name in names), *result_cells(search, outcome)]
        for outcome in search.outcomes
    ]
    return [*names, *HEAD, *texts, "gap", "seconds", "problem"], rows


def result_cells(search: Search, outcome: Outcome) -> list[str]:
    """Sizes, perplexities, gap, seconds and problem of one row."""
    return [*_numbers(search, outcome.result), outcome.problem or ""]


def _numbers(search: Search, result: Result | None) -> Iterator[str]:
    if result is None:
        yield from [""] * (len(HEAD) + 2 * len(search.dense) + 2)
        return
    yield from (f"{result.bits_per_weight:.3f}", f"{result.code_bits:.3f}", f"{result.sparsity:.3f}")
    for text, dense in search.dense.items():
        yield from (f"{result.perplexity[text]:.3f}", f"{result.perplexity[text] / dense:.3f}")
    yield "" if result.allocation is None else f"{result.allocation.gap:.2%}"
    yield f"{sum(result.seconds.values()):.1f}"


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def short(text: str) -> str:
    """A text's name without its folder."""
    return re.split(r"[/\\]", text)[-1]

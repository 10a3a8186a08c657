"""A sweep as it is written down: which fields of an experiment take which values, and who chooses the experts when it is measured.

    title: Does the order of the neurons matter?
    profile: quick                      # a profile of configs/
    overrides: [train.steps=20]         # for every cell
    axes:                               # a grid: every value of each with every value of the others
      dynamoe.importance: [l2_down, random]
    cells:                              # single cells, beside the grid or instead of it
      - {dynamoe.importance: l2, dynamoe.theta: 0.8}
    modes: [router, label]              # router, label (not of ToMoE), full, random, or an expert's index

`overrides: [method=tomoe]` makes it a sweep of ToMoE, whose fields are tomoe.* and tomoe_train.*; `method` may also be an axis.

Everything that can be wrong in it is found before anything runs.
"""

import difflib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.disk import is_file
from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.workbench.cells import check_modes

if TYPE_CHECKING:
    from dynamoe_lab.config import Experiment

MOST_CELLS = 1_000  # a cell takes minutes: more is a slip of the pen
__all__ = ["Plan", "Sweep", "SweepFile", "load_sweep", "settings_text", "shipped_sweeps"]


@dataclass
class SweepFile:
    """The entries of a sweep file."""

    title: str = ""
    profile: str = "quick"
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    modes: list[Any] = field(default_factory=lambda: ["router"])


@dataclass
class Plan:
    """A cell before it runs."""

    number: int  # from 1
    settings: dict[str, Any]  # field -> value
    experiment: "Experiment"

    def __str__(self) -> str:
        return settings_text(self.settings)


@dataclass
class Sweep(SweepFile):
    """A sweep file, read; `name` is the file's name without suffix.

    Example:
        >>> sweep = lab.Sweep(name="two", axes={"dynamoe.theta": [0.8, 0.9]}, overrides=["train.steps=0"])
        >>> [plan.experiment.dynamoe.theta for plan in sweep.resolve("smoke")]
        [0.8, 0.9]
    """

    name: str = "sweep"

    @property
    def fields(self) -> list[str]:
        """The dotted names that the sweep varies, in the order in which they appear."""
        return list(dict.fromkeys([*self.axes, *(name for cell in self.cells for name in cell)]))

    def resolve(self, profile: str | None = None, overrides: Iterable[str] = ()) -> list[Plan]:
        """Every cell with its whole experiment: profile < the file's overrides < `overrides` < the cell.

        Raises:
            InputError: an unknown field, one that a cell's method does not read, an impossible value, a mode that a cell does not have, an
                axis that is no list or empty, a cell that is no mapping, no cell, more than `MOST_CELLS`, or two cells that are the same
                experiment.
        """
        from dynamoe_lab.config import METHODS, field_names, load_experiment, unread_section

        for cell in self.cells:
            if not isinstance(cell, Mapping):
                raise InputError(f"sweep {self.name}: the cell {cell!r} is no mapping; give field -> value, e.g. {{'dynamoe.theta': 0.8}}")
        known = [name for name in field_names() if name != "profile"]
        for name in map(str, self.fields):
            if name not in known:
                near = [other for other in known if other.rpartition(".")[2] == name] or difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else "the fields are in configs/defaults.yaml"
                raise InputError(f"sweep {self.name}: an experiment has no field {name!r}; {hint}")
        for name, values in self.axes.items():
            if not _is_list(values):
                raise InputError(f"sweep {self.name}: the axis {name} is {values!r}; give a list of values, e.g. [{values!r}]")
            if not len(values):
                raise InputError(f"sweep {self.name}: the axis {name} is empty; give it values or leave it out")
        count = math.prod(len(values) for values in self.axes.values()) if self.axes else 0
        if count + len(self.cells) > MOST_CELLS:
            raise InputError(f"sweep {self.name}: {count + len(self.cells):,} cells, of which {MOST_CELLS:,} are the most; shorten an axis")
        grid = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())] if self.axes else []
        chosen = [_plain(settings) for settings in [*grid, *self.cells]]
        if not chosen:
            raise InputError(f"sweep {self.name}: nothing to do; give axes, cells or both")
        plans, seen = [], {}
        base = [*self.overrides, *overrides]
        for number, settings in enumerate(chosen, start=1):
            try:
                own = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
            except (TypeError, ValueError, RecursionError) as error:  # bytes, paths and what else YAML can make
                raise InputError(f"sweep {self.name}, cell {number}: {first_line(error)}; give numbers, texts and lists") from error
            where = f"sweep {self.name}, cell {number} ({settings_text(settings)})"
            try:
                experiment = load_experiment(profile or self.profile, [*base, *own])
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            method = experiment.method
            if other := [name for name in settings if unread_section(name, method)]:
                raise InputError(
                    f"{where}: method {method} does not read {other[0]}; vary {' and '.join(f'{x}.*' for x in METHODS[method])}"
                )
            check_modes(self.modes, experiment.method_config.num_experts, where, method)
            same = json.dumps(asdict(experiment), sort_keys=True)
            if same in seen:
                raise InputError(f"{where} is the same experiment as cell {seen[same]}; leave one of them out")
            seen[same] = number
            plans.append(Plan(number, settings, experiment))
        return plans


def settings_text(settings: dict[str, Any]) -> str:
    """`dynamoe.theta=0.8, dynamoe.experts=[0.5, 1.0]`: settings as they are typed."""
    return ", ".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()) or "as it is"


def _is_list(values: Any) -> bool:
    """A list, a tuple, a range or an array of one dimension; a text is one value, not its letters."""
    return (isinstance(values, Sequence) and not isinstance(values, (str, bytes))) or getattr(values, "ndim", 0) == 1


def _plain(value: Any) -> Any:
    """Values of a notebook (tuples, numpy's numbers) as those of a file."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def shipped_sweeps() -> list[str]:
    """Names of the sweeps in `configs/sweeps/`, in order."""
    from dynamoe_lab.config import project_root

    return sorted(path.stem for path in (project_root() / "configs" / "sweeps").glob("*.yaml"))


def load_sweep(file: str | Path) -> Sweep:
    """Read a sweep file.

    Args:
        file: a path to a YAML file, or the name of one in `configs/sweeps/`.

    Raises:
        InputError: no such file (with the nearest name), no YAML, an unknown entry or one of the wrong kind. Fields and values are
            checked by `Sweep.resolve`.

    Example:
        >>> sweep = lab.load_sweep("importance")
        >>> sweep.profile, list(sweep.axes)
        ('quick', ['dynamoe.importance'])
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from dynamoe_lab.config import project_root, read_yaml

    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        path = project_root() / "configs" / "sweeps" / f"{file}.yaml"
    if not is_file(path):
        names = shipped_sweeps()
        near = difflib.get_close_matches(Path(file).stem[:100], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"give a path to a YAML file or one of {', '.join(names)}"
        raise InputError(f"no sweep {str(file)!r}; {hint}")
    if path.stem.startswith("."):  # `...yaml` would be the folder above
        raise InputError(f"sweep {file}: its name becomes that of a folder; give the file a name that does not begin with a dot")
    written = read_yaml(path, f"sweep {file}")
    known = [item.name for item in fields(SweepFile)]
    if unknown := [str(key) for key in written if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5) if len(unknown) == 1 else ()
        hint = f"did you mean {near[0]}?" if near else f"a sweep has {', '.join(known)}; fields of an experiment stand in axes or cells"
        what = f"no entry {unknown[0]!r}" if {"axes", "cells"} & set(written) or near else f"this is no sweep, it has {unknown[0]!r}"
        raise InputError(f"sweep {file}: {what}; {hint}")
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepFile), written))
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "the top")
        hint = f"entries are {', '.join(known)}; axes map a field to a list of values"
        raise InputError(f"sweep {file}, at {key}: {first_line(error)}; {hint}") from error
    return Sweep(**vars(merged), name=path.stem)

"""A notebook's parameters cell, and whether what a person typed fits it: names and types are checked before a kernel starts.

Papermill only warns about unknown names and finds parameters with a regular expression that drops lines with two `=`; the cell is Python,
so it is read as Python here. `key=value` is a parameter of the notebook if it has one of that name, else a field of the experiment.
A profile may have a section `notebooks` with values for the parameters of each: what is typed goes before them, and they before the cell's.
"""

import ast
import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dynamoe_lab.errors import InputError, first_line

__all__ = ["Parameter", "parse_value", "profile_values", "read_parameters", "split_given", "whole_number"]

STANDARD = ("profile", "overrides", "output")  # every notebook has them; the runner fills them in
_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}


@dataclass(frozen=True)
class Parameter:
    """One assignment of the parameters cell."""

    name: str
    annotation: str  # as written, or the default's type
    default: Any


def whole_number(text: str) -> int | None:
    """The number that a text of a few plain digits stands for; else None (`str.isdigit` takes `²`, too)."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def read_parameters(nb: Any, notebook: str) -> dict[str, Parameter]:
    """The parameters of a notebook, by name.

    Raises `InputError` if no code cell is tagged `parameters`, a value is no literal, or one of profile, overrides, output is missing.
    """
    cell = next((c for c in nb.cells if c.cell_type == "code" and "parameters" in _tags(c)), None)
    if cell is None:
        raise InputError(f"{notebook}: no code cell is tagged 'parameters'; tag the first one in JupyterLab (property inspector)")
    parameters = {}
    try:
        statements = ast.parse(cell.source).body
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = f"{error.msg}, line {error.lineno}" if isinstance(error, SyntaxError) else first_line(error)
        raise InputError(f"{notebook}: the parameters cell is no Python ({reason}); correct it in JupyterLab") from error
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, annotation = statement.targets[0], None
        elif isinstance(statement, ast.AnnAssign):
            target, annotation = statement.target, statement.annotation
        else:
            continue
        if not isinstance(target, ast.Name):
            continue
        try:
            default = ast.literal_eval(statement.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise InputError(f"{notebook}: parameter {target.id} has no literal value; write a number, a text or a list") from error
        written = ast.unparse(annotation) if annotation is not None else type(default).__name__
        parameters[target.id] = Parameter(target.id, written, default)
    if absent := [name for name in STANDARD if name not in parameters]:
        raise InputError(f"{notebook}: its parameters cell lacks {', '.join(absent)}; every notebook has profile, overrides and output")
    return parameters


def _tags(cell: Any) -> list:
    tags = cell.metadata.get("tags", []) if isinstance(cell.metadata, dict) else []
    return tags if isinstance(tags, list) else []


def split_given(
    given: Iterable[str], parameters: dict[str, Parameter], fields: Iterable[str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Sort `key=value` pairs: values of this notebook's parameters, overrides of the experiment, and pairs that are neither.

    Raises `InputError` for a pair without `=`, a value of the wrong type, and for profile and output, which have options of their own.
    """
    values, overrides, unknown = {}, [], []
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"-p {pair}: write key=value, e.g. -p dynamoe.theta=0.8")
        if not _is_text(pair):
            raise InputError(f"-p {pair}: not UTF-8 text; type it again, or rename the file that it names")
        if key in ("profile", "output"):
            raise InputError(f"-p {pair}: use the option --{key}")
        if key in parameters:
            values[key] = parse_value(parameters[key], text)
        elif key in fields:
            overrides.append(pair)
        else:
            unknown.append(pair)
    return values, overrides, unknown


def profile_values(section: Any, parameters: dict[str, Parameter], where: str) -> dict[str, Any]:
    """The values that a profile's section `notebooks` has for one notebook, in the types of its parameters.

    Raises `InputError` that begins with `where`: no map, a name that the notebook does not have, a value of another type.
    """
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise InputError(f"{where}: no map of parameters; write e.g. {{seeds: [0, 1]}}")
    values, names = {}, [name for name in parameters if name not in ("profile", "output")]
    for name, value in section.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
            raise InputError(f"{where}: no parameter {name!r}; " + (f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"))
        fits, values[name] = _first_fit(ast.parse(parameters[name].annotation, mode="eval").body, value)
        if not _keys_are_texts(value):
            raise InputError(f"{where}: {name} = {value!r}: a key of a map is no text; put keys in quotes, e.g. {{'1': a}}")
        if not fits:
            wanted = f"{name} is a {parameters[name].annotation} (default {parameters[name].default!r})"
            raise InputError(f"{where}: {name} = {value!r}, but {wanted}; correct it")
    return values


def _is_text(pair: str) -> bool:
    """Whether it is what every file can hold: an argument of a shell may be any bytes."""
    try:
        pair.encode()
    except UnicodeEncodeError:
        return False
    return True


def unknown_parameter(pair: str, parameters: Iterable[str], fields: Iterable[str], where: str) -> InputError:
    """The error for a pair that nothing reads, with the nearest name."""
    key = pair.partition("=")[0]
    names = [*(name for name in parameters if name not in STANDARD), *fields]
    near = [name for name in names if name.rpartition(".")[2] == key] or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    own = ", ".join(name for name in parameters if name not in STANDARD) or "none of its own"
    hint = f"did you mean {near[0]}?" if near else f"known are {own}, and the experiment's fields are in configs/defaults.yaml"
    return InputError(f"-p {pair}: no parameter {key!r} in {where}; {hint}")


def parse_value(parameter: Parameter, text: str) -> Any:
    """The value of `key=text`: the text itself for a `str`, else YAML in the parameter's type. Raises `InputError` if it does not fit."""
    import yaml

    if parameter.annotation == "str":  # a sentence is not YAML: "C # and F" keeps its end
        return text
    try:
        value = yaml.safe_load(text)
        json.dumps(value)  # a notebook takes numbers, texts, lists and maps of them: no dates, no bytes, no circles
    except Exception as error:  # a constructor of YAML raises whatever its value raises
        raise InputError(
            f"-p {parameter.name}={text}: the value cannot be read as YAML of numbers, texts, lists and maps ({first_line(error)}); "
            "put texts in quotes"
        ) from error
    if not _keys_are_texts(value):  # papermill would write another key
        raise InputError(f"-p {parameter.name}={text}: a key of a map is no text; put keys in quotes, e.g. {{'1': a}}")
    for wanted in _alternatives(ast.parse(parameter.annotation, mode="eval").body):
        fits, converted = _fit(wanted, value, text)
        if fits:
            return converted
    example = {"list": "[0.8, 0.9]", "bool": "true", "int": "4", "float": "0.8", "dict": "{a: 1}"}.get(
        parameter.annotation.partition("[")[0]
    )
    raise InputError(
        f"-p {parameter.name}={text}: {parameter.name} is a {parameter.annotation} (default {parameter.default!r})"
        + (f"; write e.g. -p '{parameter.name}={example}'" if example else "")
    )


def _keys_are_texts(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _keys_are_texts(item) for key, item in value.items())
    return all(_keys_are_texts(item) for item in value) if isinstance(value, list) else True


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """`int | None` and `Optional[int]` -> int, None."""
    if isinstance(node, ast.BinOp):
        return _alternatives(node.left) + _alternatives(node.right)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Optional"):
        return [*_alternatives(node.slice), ast.Constant(None)]
    return [node]


def _fit(wanted: ast.expr, value: Any, text: str | None) -> tuple[bool, Any]:
    """Whether a value read from YAML fits one annotation, and the value in that type; `text` is what was typed, None inside a list."""
    if isinstance(wanted, ast.Constant):
        if isinstance(wanted.value, str):  # an annotation in quotes
            return _fit(ast.parse(wanted.value, mode="eval").body, value, text)
        return value is None, None
    element = wanted.slice if isinstance(wanted, ast.Subscript) else None
    name = ast.unparse(wanted.value if element is not None else wanted)
    if name in ("None", "NoneType"):  # the type of a default None says nothing about others
        return (value is None or name == "NoneType"), value
    if name == "Literal":
        return value in ast.literal_eval(f"({ast.unparse(element)},)"), value
    if name == "float" and not isinstance(value, bool):
        try:
            return math.isfinite(float(value)), float(value)  # YAML reads 1e-5 as a text
        except (TypeError, ValueError, OverflowError):
            return False, None
    if name == "str":
        return (True, value if isinstance(value, str) else text) if text is not None else (isinstance(value, str), value)
    kind = _TYPES.get(name)
    if kind is None:
        return True, value  # an annotation that we do not know forbids nothing
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False, None
    if kind is list and element is not None:
        fitted = [_first_fit(element, item) for item in value]
        return all(fits for fits, _ in fitted), [item for _, item in fitted]
    return True, value


def _first_fit(annotation: ast.expr, value: Any) -> tuple[bool, Any]:
    return next((found for found in (_fit(option, value, None) for option in _alternatives(annotation)) if found[0]), (False, None))

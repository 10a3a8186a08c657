"""The examples in docstrings run as they stand, and every public function has one.

They are written for a reader who has typed `import dynamoe_lab as lab` and the usual numpy as np, pandas as pd and torch; each starts anew,
in an empty folder. White space in an output does not matter, `...` stands for anything.
"""

import ast
import doctest
import inspect
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dynamoe_lab"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
ASSETS = ("smollm2", '"smoke"', '"sciq"', '"piqa"')  # what an example needs the offline defaults for


def examples() -> list:
    """Every docstring with an example, found without importing its module."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if ">>>" in source else ():
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and ">>>" in (text := ast.get_docstring(node) or ""):
                name, line = getattr(node, "name", "module"), node.body[0].lineno
                marks = [pytest.mark.assets] if any(word in text for word in ASSETS) else []
                found.append(pytest.param(path, name, text, line, id=f"{path.relative_to(PACKAGE)}:{name}", marks=marks))
    return found


@pytest.mark.parametrize(("path", "name", "text", "line"), examples())
def test_example(path, name, text, line, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import torch

    import dynamoe_lab as lab

    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(text, {"lab": lab, "np": np, "pd": pd, "torch": torch}, name, str(path), line - 1)
    told: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=told.append)
    plt.close("all")
    if told:
        pytest.fail("".join(told), pytrace=False)


def test_every_public_function_has_an_example():
    import dynamoe_lab as lab

    functions = {name: getattr(lab, name) for name in lab.__all__ if inspect.isfunction(getattr(lab, name))}
    assert not [name for name, function in functions.items() if ">>>" not in function.__doc__]

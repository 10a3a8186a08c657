"""Every bad input is answered in one line that names the thing and the remedy; what it carries runs nothing and writes nowhere else."""

import pytest
from bad_checkpoints import CHECKPOINTS
from bad_inputs import INPUTS

from dynamoe_lab.errors import InputError

CASES = {**INPUTS, **CHECKPOINTS}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(project, name):
    call, says = CASES[name]
    outside = sorted(project.parent.iterdir())
    try:
        told = call(project)
    except InputError as error:
        told = str(error)
    assert isinstance(told, str), f"it was taken: {told!r}"
    assert told.isprintable(), "one line, and nothing that a terminal would obey"
    assert len(told) <= 1300
    for words in says:
        assert words in told
    assert not list(project.parent.rglob("ran")), "what it carried was run"
    assert sorted(project.parent.iterdir()) == outside


def test_there_are_as_many_as_promised():
    assert len(CASES) >= 150
    assert len({call for call, _ in CASES.values()}) == len(CASES)

"""Fingerprints: equal exactly when the values that matter are equal."""

import enum
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense
from test_steps import Settings, table

from dynamoe_lab.workbench.fingerprint import describe, fingerprint


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


def test_fingerprint_tells_plain_values_apart():
    values = [None, True, False, 0, 1, 1.0, -0.0, "1", b"1", [], [[]], [1, 2], [2, 1], {}, {"a": 1}, {"b": 1}, {1}, Mode.FAST, Mode.SLOW]
    marks = [fingerprint(value) for value in [*values, Settings(), Settings(steps=4), np.arange(3), np.arange(3.0), float("nan"), table]]
    assert len(set(marks)) == len(marks)
    assert all(len(mark) == 32 for mark in marks)


def test_fingerprint_sees_equal_values_as_equal():
    assert fingerprint((1, [2])) == fingerprint([1, (2,)])
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(np.float64(0.5)) == fingerprint(0.5)
    assert fingerprint(np.arange(6).reshape(2, 3).T) == fingerprint(np.arange(6).reshape(2, 3).T.copy())
    assert fingerprint(Settings()) == fingerprint(Settings())
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])


def test_fingerprint_of_paths_is_their_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.txt").write_text("hello")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    (tmp_path / "two" / "sub" / "a.txt").write_text("hullo")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        fingerprint(tmp_path / "three")


def test_fingerprint_of_frames():
    frame = table(4)
    assert fingerprint(frame) == fingerprint(frame.copy())
    changed = [
        frame.assign(share=frame.share + 1),
        frame.rename(columns={"share": "sh"}),
        frame[["share", *frame.columns.drop("share")]],
        frame.assign(layer=frame.layer.astype("int16")),
        frame.assign(domain=frame.domain.cat.remove_categories("math")),
        frame.iloc[::-1],
        frame.set_index("layer"),
    ]
    marks = {fingerprint(item) for item in changed}
    assert len(marks) == len(changed)
    assert fingerprint(frame) not in marks
    assert fingerprint(pd.DataFrame({"a": [[1], [2]]})) != fingerprint(pd.DataFrame({"a": [[1], [3]]}))


def test_fingerprint_of_tensors_knows_dtype_and_shape_but_no_layout_of_memory():
    x = torch.arange(6.0)
    assert len({fingerprint(t) for t in (x, x.bfloat16(), x.half(), x.reshape(2, 3), x + 1, torch.tensor(0.0), torch.empty(0))}) == 7
    assert fingerprint(x.reshape(2, 3).t()) == fingerprint(x.reshape(2, 3).t().contiguous())
    assert fingerprint(torch.tensor([True])) != fingerprint(torch.tensor([1], dtype=torch.uint8))


def test_fingerprint_of_models_is_weights_config_and_switches(tmp_path):
    model = make_converted()
    mark = fingerprint(model)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    import dynamoe_lab.models  # noqa: F401

    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == mark  # saving and loading changes nothing
    model(input_ids=make_blocks().ids)
    assert fingerprint(model) == mark  # nor does a forward
    for mode in ("full", "label", 1, 2):
        model.set_routing(mode)
        assert fingerprint(model) != mark
    shares = torch.full((3, 4), 0.25)
    model.set_routing("random", shares=shares, seed=1)
    first = fingerprint(model)
    model(input_ids=make_blocks().ids)
    assert fingerprint(model) != first  # the next draws are others, and so is what the model computes
    model.set_routing("random", shares=shares, seed=2)
    assert fingerprint(model) != first
    model.set_routing("router")
    assert fingerprint(model) == mark
    model.set_theta(0.5)
    assert fingerprint(model) != mark
    assert fingerprint(make_dense("llama")) == fingerprint(make_dense("llama")) != fingerprint(make_dense("llama").bfloat16())
    assert fingerprint(make_dense("llama", tie_word_embeddings=True)) != fingerprint(make_dense("llama"))


def test_fingerprint_of_blocks_and_tokenizers():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert fingerprint(make_blocks(seed=1)) == fingerprint(make_blocks(seed=1)) != fingerprint(make_blocks(seed=2))

    def tokenizer(vocabulary):
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a")

    one = tokenizer({"a": 0, "b": 1})
    mark = fingerprint(one)
    one(["a b", "a"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    assert fingerprint(one) == mark == fingerprint(tokenizer({"a": 0, "b": 1})) != fingerprint(tokenizer({"a": 0, "c": 1}))


def test_fingerprint_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"builtins\.object has no fingerprint"):
        fingerprint({"x": [object()]})
    with pytest.raises(TypeError, match="function has no fingerprint"):
        fingerprint(lambda: 1)


def test_describe_is_json_for_people():
    described = describe({"m": make_dense(), "t": torch.ones(2), "f": table(2), "s": Settings(), "n": float("nan"), "b": make_blocks()})
    assert "parameters" in described["m"]
    assert described["s"]["steps"] == 3
    assert described["n"] == "nan"
    assert "of 8" in described["b"]
    json.dumps(described, allow_nan=False)

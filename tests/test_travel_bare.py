"""Checkpoints of every form and family in an environment that has no dynamoe_lab."""

import json
from pathlib import Path

import pytest
import torch
from bare import pack, travel
from conftest import FAMILIES, make_blocks, make_converted
from deployed_models import CASES, make_deployed, make_masked
from test_tomoe import TOMOE, make_pruned

import dynamoe_lab.models

DYNAMOE = {f"dynamoe-{family}": (family, {}) for family in FAMILIES} | {
    "dynamoe-frozen": ("opt", {"label_target": "frozen"}),
    "dynamoe-residual": ("gemma3_text", {"label": "residual_error"}),
}
MASKED = {f"masked-{family}": family for family in TOMOE}
DEPLOYED = {f"deployed-{family}-{attention}": (family, attention) for family, attention in CASES}
CODE = {  # form -> its modeling file, what travels with it, what does not
    "dynamoe": ("modeling_dynamoe", {"nested_mlp.py", "layer_mlp.py", "labels.py", "families.py"}, {"hypernetwork.py", "expert_mlp.py"}),
    "masked": ("modeling_tomoe", {"masked_mlp.py", "hypernetwork.py", "families.py"}, {"expert_mlp.py", "nested_mlp.py"}),
    "deployed": (
        "modeling_tomoe_deployed",
        {"expert_mlp.py", "pruned_attention.py", "families.py", "routed.py"},
        {"hypernetwork.py", "masked_mlp.py", "modeling_tomoe.py", "nested_mlp.py"},
    ),
}


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """The folder of all checkpoints, and what one fresh process without this package found in each."""
    folder, ids = tmp_path_factory.mktemp("travel"), make_blocks().ids

    def expect(model, *names: str) -> dict:
        with torch.no_grad():
            output = model(ids, output_router_logits=True)
        return {"ids": ids, "logits": output.logits, **{name: torch.stack(output[name]) for name in names}}

    for name, (family, changes) in DYNAMOE.items():
        model = make_converted(family, **changes)
        pack(model, folder / "models" / name, expect(model, "similarities"))
    for name, family in MASKED.items():
        model = make_pruned(family)
        expected = expect(model, "experts")
        torch.manual_seed(0)
        with torch.no_grad():
            expected["loss"] = model.train()(ids, labels=ids).loss
        pack(model.eval(), folder / "models" / name, expected)
    for name, (family, attention) in DEPLOYED.items():  # what is expected is what the masked models say
        expected = expect(make_masked(family, attention=attention), "experts")
        pack(make_deployed(family, attention=attention), folder / "models" / name, expected)
    return folder, travel(folder)


@pytest.mark.parametrize("name", [*DYNAMOE, *MASKED, *DEPLOYED])
def test_works_where_this_package_is_not_installed(travelled, name):
    found = travelled[1][name]
    assert "error" not in found, found["error"]
    assert found["module"].startswith("transformers_modules.")
    assert found["logits"] < (1e-4 if name in DEPLOYED else 1e-5)
    assert found.get("experts", 0) == 0
    assert found.get("similarities", 0) < 1e-5
    assert ("similarities" in found) == (name in DYNAMOE)
    assert found["generates"], "generation with a cache is not the greedy continuation"
    assert found["pipeline"][0] == found["pipeline"][1]
    assert len(found["pipeline"][0]) == 8
    assert found["reloaded"] < 1e-5
    if name in MASKED:
        assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-4), "it trains there, too"


@pytest.mark.parametrize("form", CODE)
def test_the_code_beside_the_weights_is_this_code(travelled, form):
    source, (modeling, needed, foreign) = Path(dynamoe_lab.models.__file__).parent, CODE[form]
    folders = list((travelled[0] / "models").glob(f"{form}-*"))
    assert folders
    for folder in folders:
        for copy in (folder, folder / "again"):
            files = {path.name for path in copy.glob("*.py")}
            assert files >= {f"{modeling}.py", *needed}
            assert not files & foreign, "only what it needs"
            for name in files:
                assert (copy / name).read_text() == (source / name).read_text()
            assert json.loads((copy / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].startswith(f"{modeling}.")

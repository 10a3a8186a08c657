"""Profiles and overrides: what is merged, and what a mistake is answered with."""

import re

import pytest

from dynamoe_lab.config import Experiment, ToMoETrainConfig, TrainConfig, field_names, load_experiment, profiles, unread_section
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import ToMoEConfig


def test_overrides_beat_profile_beats_defaults():
    experiment = load_experiment("smoke", ["dynamoe.theta=0.8", "train.steps=3", "dynamoe.experts=[0.5,1.0]"])
    assert (experiment.model, experiment.dynamoe.theta, experiment.train.steps) == ("smollm2-pico", 0.8, 3)
    assert experiment.dynamoe.experts == (0.5, 1.0)
    assert experiment.profile == "smoke"
    assert isinstance(experiment, Experiment)


def test_a_profile_may_be_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dynamoe:\n  theta: 0.85\n")
    assert load_experiment(str(path)).dynamoe.theta == 0.85
    assert load_experiment(str(path)).profile == "mine"


def test_names():
    assert {"smoke", "quick"} <= set(profiles())
    assert {"dynamoe.theta", "train.steps", "model", "data.context"} <= set(field_names())


def test_the_method_says_which_sections_count():
    dense = load_experiment("smoke")
    assert dense.method == "dynamoe"
    assert (dense.method_config, dense.train_config) == (dense.dynamoe, dense.train)
    pruned = load_experiment("smoke", ["method=tomoe", "tomoe.p=0.4", "tomoe_train.lr=1e-2"])
    assert (pruned.method_config, pruned.train_config) == (pruned.tomoe, pruned.tomoe_train)
    assert (pruned.method_config.p, pruned.method_config.num_experts, pruned.train_config.lr) == (0.4, 4, 0.01)
    assert type(pruned.train_config) is ToMoETrainConfig
    assert type(dense.train_config) is TrainConfig
    for names, method, section in (
        (("dynamoe.theta", "train.seed"), "tomoe", ("dynamoe", "train")),
        (("tomoe.p", "tomoe_train.lr"), "dynamoe", ("tomoe", "tomoe_train")),
    ):
        assert tuple(unread_section(name, method) for name in names) == section
    for name in ("seed", "method", "data.train", "tomoe.p", "tomoe_train.lr"):
        assert unread_section(name, "tomoe") is None


def test_training_is_the_papers_unless_it_is_told():
    """arXiv 2501.15316: AdamW, 1e-3, weight decay 0.05, no schedule; the LM loss is not watched, for it rises while parts close."""
    config = ToMoETrainConfig()
    assert (config.lr, config.weight_decay, config.warmup_steps, config.schedule, config.divergence) == (1e-3, 0.05, 0, "constant", 0.0)
    assert TrainConfig().divergence == 1.0


@pytest.mark.parametrize(("profile", "expected"), [("quick", 7680), ("smoke", 3072)])
def test_profiles_train_both_methods_on_as_many_tokens(profile, expected):
    experiment = load_experiment(profile)
    configs = (experiment.train, experiment.tomoe_train)
    assert {config.steps * config.batch_size * config.accumulation * experiment.data.context for config in configs} == {expected}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dynamoe.tetha=0.8", "did you mean dynamoe.theta"),
        ("steps=3", "steps"),
        ("train.steps=many", "could not be converted to Integer.*train.steps"),
        ("dynamoe.theta=0,9", r"write 0\.9 with a point$"),
        ("dynamoe.experts=0.25,0.5", r"write a list in brackets, e\.g\. dynamoe\.experts=\[0\.25,0\.5,1\.0\]$"),
        ("train.report_to=wandb", r"e\.g\. train\.report_to=\[wandb\]$"),
        ("train.steps=-1", "train.steps = -1.*at least 0"),
        ("train.mlp_lr=-1", "train.mlp_lr"),
        ("dynamoe.theta=7", "theta = 7.0"),
        ("dynamoe.experts=[0.5,0.25,1.0]", "increasing"),
        ("dynamoe.experts=[0.5]", "end the list with 1.0"),
        ("dynamoe.importance=magic", "expected one of.*l2_down"),
        ("dtype=int8", "expected one of"),
        ("data.context=1", "data.context = 1"),
        ("evaluate.confidence=95", "between 0 and 1"),
        ("threads=0", "threads = 0"),
        ("method=flextron", "expected one of.*tomoe"),
        ("tomoe.p=0", r"tomoe.p = 0.0"),
        ("tomoe.lambda_union=.inf", "tomoe.lambda_union = inf: give a finite number"),
        ("tomoe.mask_offset=.nan", "tomoe.mask_offset = nan: give a finite number"),
        ("tomoe.attention=some", "expected one of.*hybrid"),
        ("tomoe.expert=4", "did you mean tomoe.num_experts"),
        ("tomoe_train.mlp_lr=1", "mlp_lr"),
        ("tomoe_train.lr=-1", "tomoe_train.lr = -1.*at least 0"),
        ("tomoe_train.eval_steps=-1", "tomoe_train.eval_steps = -1"),
        ("tomoe_train.schedule=cosin", "tomoe_train.schedule = 'cosin'"),
        ("train=3", "train"),
        ("nonsense", "key=value"),
        ("data.train=[unclosed", "YAML"),
    ],
)
def test_bad_overrides_are_told_in_one_line(override, says):
    with pytest.raises(InputError, match=says) as error:
        load_experiment("quick", [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("profile", ["qick", "defaults", "missing.yaml", "../configs/quick"])
def test_unknown_profiles(profile):
    with pytest.raises(InputError, match=r"profile.*(choose|one of)"):
        load_experiment(profile)


@pytest.mark.parametrize(
    "content", ["a: [1", "!!python/object/apply:os.getcwd []", "- just\n- a list\n", "train: {steps: {}}", b"\xff\xfe\x00"]
)
def test_broken_profile_files(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_experiment(str(path))


def test_every_field_is_read_somewhere():
    """A setting that nothing reads is a lie: each field's name occurs in the code or in a notebook, config.py aside."""
    from pathlib import Path

    root = Path(__file__).parents[1]
    schemas = {"config.py", "configuration_dynamoe.py", "configuration_tomoe.py"}
    code = [path.read_text() for path in (root / "dynamoe_lab").rglob("*.py") if path.name not in schemas]
    code += [path.read_text() for path in (root / "notebooks").glob("*.ipynb")]
    own = (root / "dynamoe_lab" / "models" / "configuration_dynamoe.py").read_text()
    for name in field_names():
        last = name.rsplit(".", 1)[-1]
        read = any(re.search(rf"\.{last}\b", text) for text in code)
        assert read or (f"self.{last}" in own and name.startswith("dynamoe.")), f"nothing reads {name}"


@pytest.mark.parametrize("changes", [{"num_experts": 4.0}, {"embedding_size": float("nan")}, {"seed": 1.5}, {"noise_size": True}])
def test_counts_of_tomoe_are_whole_numbers(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"tomoe\.{name} = .*: give a whole number"):
        ToMoEConfig(**changes)


@pytest.mark.parametrize("changes", [{"steps": 1.5}, {"batch_size": True}, {"seed": "0"}, {"save_steps": 2.0}])
def test_counts_of_training_are_whole_numbers(changes):
    (name,) = changes
    with pytest.raises(InputError, match=rf"train\.{name} = .*: give a whole number"):
        TrainConfig(**changes)


@pytest.mark.parametrize("name", ["p", "mask_temperature", "lambda_kl", "mask_offset"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_of_tomoe_are_finite(name, value):
    with pytest.raises(ValueError, match=rf"tomoe\.{name} = .*: give a finite number"):
        ToMoEConfig(**{name: value})

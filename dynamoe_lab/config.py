"""One experiment as typed dataclasses: load a profile, merge overrides, validate; every field says what it is.

An experiment is `configs/defaults.yaml` (which mirrors the defaults below) plus the differences in a profile (`configs/quick.yaml`) plus
`key=value` overrides. OmegaConf checks names and types; what it cannot know (ranges) is checked in `__post_init__`. Every mistake becomes
an `InputError` that names the field.
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import SchedulerType

from dynamoe_lab.disk import is_file
from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.models.configuration_dynamoe import DynaMoEConfig
from dynamoe_lab.models.configuration_tomoe import ToMoEConfig

__all__ = [
    "METHODS",
    "DataConfig",
    "EvaluateConfig",
    "Experiment",
    "ToMoETrainConfig",
    "TrainConfig",
    "TrainSettings",
    "load_experiment",
    "profiles",
    "project_root",
    "read_profile",
    "read_yaml",
    "unread_section",
]

_LONGEST_FILE = 1_000_000  # bytes of a profile or a sweep
# More than any machine has, holds or waits for.
_LARGEST = {"threads": 1_024, "bootstrap": 10**6, "router_hidden_size": 10**6, "num_experts": 4_096, "embedding_size": 65_536}
_LARGEST |= {"noise_size": 65_536}
# Method -> its two sections of an `Experiment`: its own settings and those of its training. See docs/extending.md, "A method".
METHODS = {"dynamoe": ("dynamoe", "train"), "tomoe": ("tomoe", "tomoe_train")}


def _at_least(section: str, values: Any, **minimum: float) -> None:
    for name, least in minimum.items():
        value = getattr(values, name)
        if value is not None and not value >= least:  # so that a nan is refused, too
            raise InputError(f"{section}.{name} = {value}: give a number of at least {least}")


def _check_numbers(values: dict[str, Any], prefix: str = "") -> None:
    """Refuse what a type lets through: numbers that are infinite or none, seeds that no generator takes, absurd counts."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{prefix}{name}.")
            continue
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{prefix}{name} = {value}: give a finite number")
            if isinstance(number, int) and name.endswith("seed") and not 0 <= number < 2**32:
                raise InputError(f"{prefix}{name} = {value}: a seed, give a whole number from 0 to {2**32 - 1}")
            if isinstance(number, int) and number > (most := _LARGEST.get(name, 2**53)):
                raise InputError(f"{prefix}{name} = {value}: give a number of at most {most}")


@dataclass
class DataConfig:
    """Text and how much of it. Names joined by '+' are domains, each giving an equal share of the tokens."""

    train: str = "c4+wiki"  # text of the training blocks
    calibration: str = "c4+wiki"  # text of the calibration pass that orders the neurons
    heldout: str = "c4+wiki"  # text on which perplexity and routing are measured
    domains: str = "c4+wiki+code+technical+tiny+math+science"  # text on which usage and difficulty by domain are measured
    context: int = 256  # tokens per block
    train_tokens: int = 102_400
    calibration_tokens: int = 16_384
    heldout_tokens: int = 16_384
    domain_tokens: int = 21_504

    def __post_init__(self) -> None:
        _at_least("data", self, context=2, train_tokens=1, calibration_tokens=1, heldout_tokens=1, domain_tokens=1)


@dataclass
class TrainSettings:
    """Training with `transformers.Trainer`, whatever the method; a subclass a method adds its rates and sets its own defaults."""

    section: ClassVar[str] = "train"  # its name in an experiment
    steps: int = 100  # optimizer steps; 0: the model stays as it was converted
    batch_size: int = 4  # blocks per forward pass and device
    accumulation: int = 1  # forward passes per optimizer step
    weight_decay: float = 0.0
    warmup_steps: int = 10
    schedule: str = "cosine"  # a transformers scheduler name
    max_grad_norm: float = 1.0
    save_steps: int = 25  # a killed run loses at most this many steps
    log_steps: int = 10  # a progress line every so many steps; the frame has a row for every step
    eval_steps: int = 0  # measure on held-out text every so many steps and after the last; 0: only after the last, if there is any text
    eval_blocks: int = 0  # the first so many held-out blocks, of which domains take turns; 0: all
    divergence: float = 0.0  # stop when the mean LM loss of 10 steps is this many nats above the lowest such mean; 0: never
    seed: int = 0
    gradient_checkpointing: bool = False
    report_to: list[str] = field(default_factory=list)  # Trainer's trackers by name: tensorboard, wandb, trackio, mlflow

    def __post_init__(self) -> None:
        for item in fields(self):  # OmegaConf checks types, code does not
            if item.type is int and (isinstance(value := getattr(self, item.name), bool) or not isinstance(value, Integral)):
                raise InputError(f"{self.section}.{item.name} = {value}: give a whole number")
        _at_least(self.section, self, steps=0, batch_size=1, accumulation=1, weight_decay=0, warmup_steps=0, max_grad_norm=0)
        _at_least(self.section, self, save_steps=1, log_steps=1, eval_steps=0, eval_blocks=0, divergence=0)
        schedules = [kind.value for kind in SchedulerType]
        if self.schedule not in schedules:
            raise InputError(f"{self.section}.schedule = {self.schedule!r}: choose one of {', '.join(schedules)}")
        if odd := [name for name in self.report_to if not isinstance(name, str)]:
            raise InputError(f"{self.section}.report_to: {odd[0]!r} is no name; give trackers by name, e.g. [tensorboard]")


@dataclass
class TrainConfig(TrainSettings):
    """Training of DynaMoE: MLPs and routers; attention, embeddings, norms and head stay frozen (arXiv 2502.12325).

    Example:
        >>> settings = lab.TrainConfig(steps=40, mlp_lr=1e-4)
        >>> settings.steps, settings.batch_size, settings.schedule
        (40, 4, 'cosine')
    """

    mlp_lr: float = 2e-4  # AdamW peak learning rate of the MLP weights
    router_lr: float = 3e-3  # AdamW peak learning rate of the routers [D]; see LOG.md for 1e-3
    divergence: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self.section, self, mlp_lr=0, router_lr=0)


@dataclass
class ToMoETrainConfig(TrainSettings):
    """Training of ToMoE: hypernetwork, routers and mask decoders; no weight of the dense model learns (arXiv 2501.15316).

    The LM loss rises while parts of the model are closed, so no `divergence` is set: only numbers that are none stop it.

    Example:
        >>> settings = lab.ToMoETrainConfig(steps=40)
        >>> settings.lr, settings.weight_decay, settings.schedule
        (0.001, 0.05, 'constant')
    """

    section: ClassVar[str] = "tomoe_train"
    lr: float = 1e-3  # AdamW learning rate of all that learns
    weight_decay: float = 0.05
    warmup_steps: int = 0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self.section, self, lr=0)


@dataclass
class EvaluateConfig:
    """How results are measured."""

    batch_size: int = 8  # blocks per forward pass
    bootstrap: int = 2_000  # resamples of documents for an interval
    confidence: float = 0.95
    documents: int | None = 25  # of each benchmark task in notebooks 06 and 08, the first ones; null: all 20,169 of the seven tasks, hours

    def __post_init__(self) -> None:
        _at_least("evaluate", self, batch_size=1, bootstrap=100, **({} if self.documents is None else {"documents": 1}))
        if not 0 < self.confidence < 1:
            raise InputError(f"evaluate.confidence = {self.confidence}: give a number between 0 and 1, e.g. 0.95")


@dataclass
class Experiment:
    """Everything that one run of the notebooks depends on.

    Example:
        >>> experiment = lab.Experiment(method="tomoe")
        >>> experiment.method_config.p, experiment.train_config.section
        (0.5, 'tomoe_train')
    """

    profile: str = "quick"  # the name it was loaded by
    model: str = "smollm2-135m"  # an offline asset, a local folder, or a Hub id
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: int | None = None  # torch threads; null: what torch chooses
    seed: int = 0  # of the order of documents and of the global generators; a method's and its training's are their own
    method: Literal[tuple(METHODS)] = "dynamoe"  # which of the methods below a sweep's cell, `convert` and `train` apply
    data: DataConfig = field(default_factory=DataConfig)
    dynamoe: DynaMoEConfig = field(default_factory=DynaMoEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tomoe: ToMoEConfig = field(default_factory=ToMoEConfig)
    tomoe_train: ToMoETrainConfig = field(default_factory=ToMoETrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _at_least("experiment", self, threads=1)
        _check_numbers(asdict(self))

    @property
    def method_config(self) -> Any:
        """The settings of the experiment's method."""
        return getattr(self, METHODS[self.method][0])

    @property
    def train_config(self) -> TrainSettings:
        """The training settings of the experiment's method."""
        return getattr(self, METHODS[self.method][1])


def unread_section(name: str, method: str) -> str | None:
    """The section of a dotted field that an experiment of this method does not read, as it belongs to another; else None."""
    section = name.partition(".")[0]
    others = {other for key, sections in METHODS.items() if key != method for other in sections}
    return section if section in others else None


def project_root() -> Path:
    """The folder that holds `configs/` and `notebooks/`: the working directory or one above it, else the checkout of this package."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "configs" / "defaults.yaml").is_file():
            return folder
    raise InputError("no configs/defaults.yaml in this folder or above it: run inside a checkout of dynamoe-lab")


def profiles() -> list[str]:
    """Names of the profiles in `configs/`, in order."""
    return sorted(path.stem for path in (project_root() / "configs").glob("*.yaml") if path.stem != "defaults")


def field_names(schema: type = Experiment, prefix: str = "") -> list[str]:
    """All dotted field names of an experiment, e.g. `train.steps`."""
    names = []
    for item in fields(schema):
        nested = item.type if is_dataclass(item.type) else None
        names += field_names(nested, f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return names


def _profile_path(profile: str) -> Path:
    path = Path(profile)
    if path.suffix in (".yaml", ".yml"):
        if not is_file(path):
            raise InputError(f"profile {profile}: no such file; give a path to a YAML file or one of {', '.join(profiles())}")
        if path.stem.startswith("."):  # `...yaml` would be the folder above
            raise InputError(f"profile {profile}: its name becomes that of a folder; give the file a name that does not begin with a dot")
        return path
    known = project_root() / "configs" / f"{profile}.yaml"
    if profile == "defaults" or path.name != profile or not is_file(known):
        raise InputError(f"unknown profile {profile!r}: choose one of {', '.join(profiles())}, or give a path to a YAML file")
    return known


def read_profile(profile: str) -> tuple[Any, dict[str, Any]]:
    """A profile's differences of the experiment, and its section `notebooks`: parameters by notebook, for the runner.

    Raises `InputError`: an unknown profile, a file that is no YAML, a section `notebooks` that is no map.
    """
    from omegaconf import OmegaConf

    path = _profile_path(profile)
    layer = read_yaml(path, str(path))
    notebooks = OmegaConf.to_container(OmegaConf.create({"": layer.pop("notebooks", None) or {}}))[""]
    if not isinstance(notebooks, dict):
        raise InputError(f"{path}: notebooks is no map; write e.g. notebooks: {{06_pareto: {{trained: [0.8, 0.9]}}}}")
    return layer, notebooks


def read_yaml(path: Path, what: str) -> Any:
    """A YAML file as an OmegaConf container: no python tags, no alias bombs, no resolvers (`${oc.env:...}` would read the environment).

    Raises `InputError` that begins with `what` if it cannot be read, is no YAML, or is longer than anybody writes one.
    """
    from omegaconf import OmegaConf

    try:
        if (size := path.stat().st_size) > _LONGEST_FILE:
            raise InputError(f"{what}: {size:,} bytes, which no profile or sweep has; give the right file")
        content = OmegaConf.load(path)
        text = str(OmegaConf.to_container(content, resolve=False))
    except InputError:
        raise
    except Exception as error:  # a constructor of YAML raises whatever its value raises
        raise InputError(f"{what}: not a readable YAML file ({first_line(error)}); correct it") from error
    if not OmegaConf.is_dict(content):
        raise InputError(f"{what}: a list, where fields with their values belong; write e.g. train: {{steps: 40}}")
    _refuse_resolvers(text, what)
    return content


def _refuse_resolvers(text: str, what: str) -> None:
    if re.search(r"\$\{.*:", text):
        raise InputError(f"{what}: ${{...:...}} would read what is outside of the experiment; write the value itself")


def _read_override(override: str) -> Any:
    """`key=value` as a container. Raises `InputError` naming the override."""
    from omegaconf import OmegaConf

    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {override!r}: write key=value, e.g. dynamoe.theta=0.8")
    if key == "profile":
        raise InputError(f"override {override!r}: a profile has an option of its own, --profile (in code: the argument profile)")
    try:
        override.encode()
        layer = OmegaConf.from_dotlist([override])
    except UnicodeEncodeError as error:
        raise InputError(f"override {override!r}: not UTF-8 text; type it again, or rename the file that it names") from error
    except Exception as error:  # as in `read_yaml`
        raise InputError(f"override {override!r}: the value cannot be read as YAML ({first_line(error)}); correct it") from error
    _refuse_resolvers(override, f"override {override!r}")
    return layer


def _remedy(key: str, value: Any, error: Exception) -> str:
    """What to do about a field that OmegaConf refused: its nearest name, a point in a number, brackets around a list."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+,\d+", value) and "Float" in str(error):
        return f"write {value.replace(',', '.')} with a point"
    if isinstance(value, (str, int, float)) and "ListConfig" in str(error):
        return f"write a list in brackets, e.g. {key}={'[0.25,0.5,1.0]' if key == 'dynamoe.experts' else f'[{value}]'}"
    near = difflib.get_close_matches(key, field_names(), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near and near[0] != key else "the fields are in configs/defaults.yaml"


def load_experiment(profile: str = "quick", overrides: Iterable[str] = ()) -> Experiment:
    """Resolve defaults < profile < overrides into a validated `Experiment`.

    Args:
        profile: name of a file in `configs/` or a path to a YAML file of differences.
        overrides: `key=value` strings with dotted keys, e.g. `"dynamoe.theta=0.8"`.

    Raises:
        InputError: unknown profile, file that is not YAML, unknown key (with the nearest one), wrong type, impossible value.

    Example:
        >>> lab.load_experiment("quick", ["dynamoe.theta=0.8"]).dynamoe.theta
        0.8
        >>> lab.load_experiment("quick", ["dynamoe.thet=0.8"])
        Traceback (most recent call last):
            ...
        dynamoe_lab.errors.InputError: override 'dynamoe.thet=0.8': ...; did you mean dynamoe.theta?
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Experiment)
    path, defaults = _profile_path(profile), project_root() / "configs" / "defaults.yaml"
    layers = [(str(defaults), read_yaml(defaults, str(defaults))), (str(path), read_profile(profile)[0])]
    layers += [(f"override {str(override)!r}", _read_override(str(override))) for override in overrides]
    for origin, layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
            key = str(getattr(error, "full_key", None) or "")
            hint = _remedy(key, OmegaConf.select(layer, key, default=None) if key in field_names() else None, error)
            raise InputError(f"{origin}: {first_line(error)} (field {key or '?'}); {hint}") from error
    try:
        experiment = OmegaConf.to_object(merged)
    except InputError:
        raise
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{first_line(error)}{'' if ':' in str(error) else '; correct the field in your profile or override'}") from error
    experiment.profile = Path(profile).stem
    return experiment

"""`train`: one training run in one folder, whatever the method: claimed, resumed, published.

It trains in place, writes the result to `output_dir/checkpoint`, and goes on where it was when called again with the same inputs. The
model's class decides what learns, see `TRAINERS`.
"""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from dynamoe_lab.config import TrainSettings
from dynamoe_lab.data import Blocks, require_blocks
from dynamoe_lab.disk import locked, remove_leftovers, write_atomic
from dynamoe_lab.errors import InputError, first_line
from dynamoe_lab.models import DynaMoEMixin, RoutedMixin, ToMoEMixin
from dynamoe_lab.training.dynamoe import DynaMoETrainer
from dynamoe_lab.training.resume import complete_checkpoint
from dynamoe_lab.training.tomoe import ToMoETrainer
from dynamoe_lab.training.trainer import MethodTrainer, steps_frame

__all__ = ["LOCK", "TRAINERS", "train"]

LOCK = "train.lock"  # in a folder that is being trained in

# A method's class of models -> who trains them. See docs/extending.md, "A method".
TRAINERS: dict[type[RoutedMixin], type[MethodTrainer]] = {DynaMoEMixin: DynaMoETrainer, ToMoEMixin: ToMoETrainer}


def train(
    model: PreTrainedModel,
    blocks: Blocks | Tensor,
    config: TrainSettings | None = None,
    *,
    output_dir: str | Path,
    heldout: Blocks | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: str = "train",
    progress: bool = True,
) -> pd.DataFrame:
    """Train a converted model in place.

    DynaMoE (arXiv 2502.12325) minimises lambda_lm * LM loss + lambda_router * cross-entropy of the routers with the difficulty labels;
    ToMoE (arXiv 2501.15316) lambda_kl * KL(dense || model) + lambda_ratio * R_P + lambda_union * R_U + lambda_balance * R_L.

    Args:
        model: a converted model, see `convert`; of ToMoE the masked one.
        blocks: training blocks [n, T]; shuffled by `config.seed`, repeated if `config.steps` asks for more than one epoch.
        config: a `TrainConfig` for DynaMoE, a `ToMoETrainConfig` for ToMoE; None: the method's defaults.
        output_dir: where the result (`checkpoint/`, `steps.parquet`) and, until it is finished, the resume files are. A call with the same
            inputs resumes from the last complete checkpoint to the same weights; a finished folder is read back.
        heldout: blocks on which a DynaMoE model's LM loss or a ToMoE model's KL to the dense model is measured, in eval mode, every
            `config.eval_steps` steps and after the last; of them the first `config.eval_blocks`.
        tokenizer: saved beside the weights, so that `load_model(output_dir / "checkpoint")` works.
        run: name in the frame's column `run`.
        progress: print a line every `config.log_steps` steps.

    Returns:
        Table `steps`, cumulative in tokens and seconds (of training alone). DynaMoE: run, step, tokens, loss, lm_loss, router_loss,
        router_accuracy, active_mlp_fraction, lr, seconds; with held-out text heldout_loss before lr. ToMoE: run, step, tokens, loss,
        lm_loss, kl_loss, ratio_loss, union_loss, balance_loss, active_ratio_max, active_ratio_mean, union_coverage, and without noise, of
        held-out text, heldout_kl, open_ratio (as active_ratio_mean), open_union (as union_coverage), then lr, seconds. Held-out columns
        are NaN where nothing was measured. No row if `config.steps` is 0, which leaves the weights as they are.

    Raises:
        InputError: not a model that can be trained, another method's config, no blocks, ids that the model does not have, `eval_steps`
            without held-out text, or `output_dir` holds another run.
        TrainingDiverged: the loss is no longer finite or ran away.

    Example:
        >>> _, model = lab.random_pair(64, 128)
        >>> settings = lab.TrainConfig(steps=2, batch_size=2)
        >>> steps = lab.train(model, torch.arange(128).view(8, 16), settings, output_dir="run", progress=False)
        >>> steps[["run", "step", "tokens"]]  # two blocks of 16 tokens a step
             run  step  tokens
        0  train     1      32
        1  train     2      64
    """
    kind, config = _trainer_of(model, config)
    blocks = require_blocks(blocks, "train", model=model, context=2)
    heldout = _heldout_of(heldout, config, model)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _claim(folder, model, blocks, heldout, config)
        if (folder / "steps.parquet").is_file():
            return _read_back(model, folder)
        return _train(model, kind, blocks, heldout, config, folder, tokenizer=tokenizer, run=run, progress=progress)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One call at a time trains in a folder; another waits and then reads back. The ranks of one training share it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    lock = folder / LOCK
    with locked(lock, waits_for=f"the training in {folder.name}/"):
        remove_leftovers(folder)
        try:
            yield
        finally:
            with suppress(OSError):  # it is no part of the result; some systems keep a file that is open
                lock.unlink()


def _train(
    model: PreTrainedModel,
    kind: type[MethodTrainer],
    blocks: Blocks,
    heldout: Blocks | None,
    config: TrainSettings,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    run: str,
    progress: bool,
) -> pd.DataFrame:
    """`train` in a folder that is ours and not finished."""
    columns = kind.step_columns(heldout=heldout is not None)
    if config.steps == 0:  # Trainer would take 0 for three epochs
        dtypes = {"run": "str"} | {name: "int64" if name in ("step", "tokens") else "float64" for name in columns}
        steps = pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in dtypes.items()})
        if int(os.environ.get("RANK", "0")) == 0:  # one process of several publishes
            _publish(model.eval(), tokenizer, steps, folder)
        return steps

    resume = complete_checkpoint(folder / "trainer")
    if resume is not None and progress:
        print(f"resuming from {resume.name}", flush=True)
    state = None if resume is None else TrainerState.load_from_json(str(resume / "trainer_state.json"))
    first = True
    if state is not None and state.global_step >= config.steps:  # killed after the last step: Trainer would take one more
        _load_weights(model, resume)
    else:
        with _prepared(model, kind, config):
            try:
                trainer = kind(model, blocks, config, folder / "trainer", heldout=heldout, progress=progress)
            except (ValueError, RuntimeError, ImportError) as error:  # a tracker that is unknown or not installed, say
                raise InputError(f"train: Trainer refuses these settings ({first_line(error)})") from error
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            except Exception as error:
                if type(error).__name__ == "UnpicklingError":  # torch refuses what is not tensors and numbers
                    told = f"{resume} is not what Trainer wrote ({first_line(error)}); remove this folder, and the run goes on without it"
                    raise InputError(f"train: {told}") from error
                raise
            state, first = trainer.state, trainer.is_world_process_zero()
    steps = steps_frame(state.log_history, run, columns)
    trained = int(steps["tokens"].iloc[-1])
    model.config.moe = {**model.config.moe, "trained_tokens": model.config.moe.get("trained_tokens", 0) + trained}
    if first:
        _publish(model, tokenizer, steps, folder)
    return steps


def _trainer_of(model: PreTrainedModel, config: TrainSettings | None) -> tuple[type[MethodTrainer], TrainSettings]:
    """Who trains this model, and with what settings."""
    kind = next((trainer for mixin, trainer in TRAINERS.items() if isinstance(model, mixin)), None)
    if kind is None and isinstance(model, RoutedMixin):
        raise InputError(
            f"train: {type(model).__name__} is deployed, its masks are fixed; train the masked model that it was exported from"
        )
    if kind is None:
        raise InputError(f"train: {type(model).__name__} has no routers; convert it first with lab.convert")
    config = kind.config_class() if config is None else config
    if not isinstance(config, kind.config_class):
        raise InputError(f"train: {type(model).__name__} needs a {kind.config_class.__name__}, not a {type(config).__name__}")
    return kind, config


def _heldout_of(heldout: Blocks | Tensor | None, config: TrainSettings, model: PreTrainedModel) -> Blocks | None:
    """The blocks that are measured, if any."""
    if heldout is not None:
        return require_blocks(heldout, "train: heldout", model=model)[: config.eval_blocks or None]
    if config.eval_steps:
        raise InputError(
            f"train: {config.section}.eval_steps = {config.eval_steps}, but there is no held-out text; give heldout=blocks, or set it to 0"
        )
    return None


@contextmanager
def _prepared(model: PreTrainedModel, kind: type[MethodTrainer], config: TrainSettings) -> Iterator[None]:
    """The model as training needs it: what does not learn is frozen, no cache. Afterwards it is as it was found."""
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    use_cache, model.config.use_cache = model.config.use_cache, False  # no one reads a cache in training
    kind.prepare(model)
    try:
        yield
    finally:
        kind.restore(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.config.use_cache = use_cache
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns[name])
            parameter.grad = None
        model.eval()


def _claim(folder: Path, model: PreTrainedModel, blocks: Blocks, heldout: Blocks | None, config: TrainSettings) -> None:
    """Write down what is trained here, or refuse a folder that holds something else."""
    inputs = {
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("log_steps", "report_to")},
        "moe": {name: value for name, value in model.config.moe.items() if name != "trained_tokens"},
        "blocks": blocks.fingerprint(),
        "heldout": None if heldout is None else heldout.fingerprint(),
        "weights": _weights_digest(model),
    }
    path = folder / "train.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise InputError(
            f"train: {folder.name}/train.json cannot be read ({first_line(error)}); choose another output_dir or remove it"
        ) from error
    if known is None:
        write_atomic(path, json.dumps(inputs, indent=1, sort_keys=True))
    elif known != (now := json.loads(json.dumps(inputs))):
        told = _difference(known, now, config.section, getattr(model, "method", "moe"))
        remedy = "choose another output_dir (the command's --output), or remove it"
        raise InputError(f"train: {folder.name}/ holds a run with other inputs: {told}; {remedy}")


def _difference(known: Any, now: dict[str, Any], training: str, own: str) -> str:
    """The first setting in which two runs differ ("train.steps 8 then, 9 now"), or what else does."""
    known = known if isinstance(known, dict) else {}
    for part, section in (("config", training), ("moe", own)):
        before = known.get(part) if isinstance(known.get(part), dict) else {}
        for name in [*now[part], *before]:
            then, value = (str(values.get(name, "unset")) for values in (before, now[part]))
            if then != value:
                return f"{section}.{name} {then} then, {value} now"
    parts = {"blocks": "another training text", "heldout": "another held-out text", "weights": "a model with other weights"}
    return " and ".join(text for part, text in parts.items() if known.get(part) != now[part])


def _weights_digest(model: PreTrainedModel) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, steps: pd.DataFrame, folder: Path) -> None:
    """Checkpoint first, the frame last: its presence says that the run is finished."""
    scratch = folder / "checkpoint.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    except Exception:  # a full disk: half a checkpoint is of no use to anybody, and the last one of Trainer's is kept
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    os.replace(scratch, folder / "checkpoint")
    buffer = io.BytesIO()
    steps.to_parquet(buffer)
    write_atomic(folder / "steps.parquet", buffer.getvalue())
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def _read_back(model: PreTrainedModel, folder: Path) -> pd.DataFrame:
    shutil.rmtree(folder / "trainer", ignore_errors=True)  # a kill may have come between the frame and this
    _load_weights(model, folder / "checkpoint")
    return pd.read_parquet(folder / "steps.parquet")


def _load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    trained = type(model).from_pretrained(checkpoint, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(trained.state_dict())
    model.config.moe = trained.config.moe
    model.eval()


train.step_ignores = ("progress", "config.log_steps", "config.report_to")  # how it is watched does not change what comes out

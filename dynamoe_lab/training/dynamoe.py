"""Training a DynaMoE model: MLPs and routers learn, the rest is frozen (arXiv 2502.12325, loss and training).

`train` trains in place, writes the result to `output_dir/checkpoint`, and goes on where it was when called again with the same inputs.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from dynamoe_lab.config import TrainConfig
from dynamoe_lab.data import Blocks, require_blocks
from dynamoe_lab.errors import InputError
from dynamoe_lab.models import DynaMoEMixin, token_mask
from dynamoe_lab.training.trainer import STEP_COLUMNS, MethodTrainer, complete_checkpoint, steps_frame

__all__ = ["DynaMoETrainer", "freeze", "routing_metrics", "train"]


def freeze(model: PreTrainedModel) -> None:
    """Leave gradients only to MLP projections and routers."""
    model.requires_grad_(False)
    for nested in model.nested_mlps():
        nested.requires_grad_(True)


def routing_metrics(model: PreTrainedModel, outputs, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Router accuracy (argmax against the labels) and active MLP fraction of the experts used, means over layers and tokens but pads."""
    counted = token_mask(attention_mask, len(outputs.labels[0]))
    keep = slice(None) if counted is None else counted
    sizes = torch.tensor(model.nested_mlps()[0].sizes, dtype=torch.float32, device=outputs.experts[0].device)
    right = [
        (logits.argmax(-1) == labels)[keep].float().mean() for logits, labels in zip(outputs.router_logits, outputs.labels, strict=True)
    ]
    active = [(sizes[experts[keep]] / sizes[-1]).mean() for experts in outputs.experts]
    return {"router_accuracy": torch.stack(right).mean(), "active_mlp_fraction": torch.stack(active).mean()}


class DynaMoETrainer(MethodTrainer):
    """Two parameter groups, and the routing metrics of every step."""

    def parameter_groups(self):
        groups = {"mlp": [], "router": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["router" if ".router." in name else "mlp"].append(parameter)
        return [
            {"params": groups["mlp"], "lr": self.lab_config.mlp_lr},
            {"params": groups["router"], "lr": self.lab_config.router_lr},
        ]

    def batch_metrics(self, inputs, outputs):
        model = self.accelerator.unwrap_model(self.model)
        return {
            "lm_loss": outputs.lm_loss,
            "router_loss": outputs.router_loss,
            **routing_metrics(model, outputs, inputs.get("attention_mask")),
        }


def train(
    model: PreTrainedModel,
    blocks: Blocks | Tensor,
    config: TrainConfig | None = None,
    *,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: str = "train",
    progress: bool = True,
) -> pd.DataFrame:
    """Train a converted model in place.

    Args:
        model: a converted model, see `convert`.
        blocks: training blocks [n, T]; shuffled by `config.seed`, repeated if `config.steps` asks for more than one epoch.
        config: see `TrainConfig`.
        output_dir: where the result (`checkpoint/`, `steps.parquet`) and, until it is finished, the resume files are. A call with the same
            inputs resumes from the last complete checkpoint to the same weights; a finished folder is read back.
        tokenizer: saved beside the weights, so that `load_model(output_dir / "checkpoint")` works.
        run: name in the frame's column `run`.
        progress: print a line every `config.log_steps` steps.

    Returns:
        Table `steps`: run, step, tokens, loss, lm_loss, router_loss, router_accuracy, active_mlp_fraction, lr, seconds; no row if
        `config.steps` is 0, which leaves the weights as they are.

    Raises:
        InputError: not a converted model, no blocks, or `output_dir` holds another run.
        TrainingDiverged: the loss is no longer finite or ran away.
    """
    config = TrainConfig() if config is None else config
    if not isinstance(model, DynaMoEMixin):
        raise InputError(f"train: {type(model).__name__} has no routers; convert it first with lab.convert")
    blocks = require_blocks(blocks, "train")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, model, blocks, config)
    if (folder / "steps.parquet").is_file():
        return _read_back(model, folder)

    if config.steps == 0:  # Trainer would take 0 for three epochs
        kinds = {name: "int64" if name in ("step", "tokens") else "float64" for name in STEP_COLUMNS}
        steps = pd.DataFrame({"run": pd.Series(dtype="str"), **{name: pd.Series(dtype=kind) for name, kind in kinds.items()}})
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
        with _prepared(model, config):
            try:
                trainer = DynaMoETrainer(model, blocks, config, folder / "trainer", progress=progress)
            except (ValueError, RuntimeError, ImportError) as error:  # a tracker that is unknown or not installed, say
                raise InputError(f"train: Trainer refuses these settings ({str(error).splitlines()[0]})") from error
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            state, first = trainer.state, trainer.is_world_process_zero()
    steps = steps_frame(state.log_history, run)
    trained = int(steps["tokens"].iloc[-1])
    model.config.moe = {**model.config.moe, "trained_tokens": model.config.moe.get("trained_tokens", 0) + trained}
    if first:
        _publish(model, tokenizer, steps, folder)
    return steps


@contextmanager
def _prepared(model: PreTrainedModel, config: TrainConfig) -> Iterator[None]:
    """The model as training needs it: all but MLPs and routers frozen, no cache, weights laid out as wrappers such as FSDP ask for.

    Afterwards it is as it was found, laid out for inference.
    """
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    use_cache, model.config.use_cache = model.config.use_cache, False  # no one reads a cache in training
    freeze(model)
    model.lay_out(columns=False)
    try:
        yield
    finally:
        model.lay_out()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.config.use_cache = use_cache
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns[name])
            parameter.grad = None
        model.eval()


def _claim(folder: Path, model: PreTrainedModel, blocks: Blocks, config: TrainConfig) -> None:
    """Write down what is trained here, or refuse a folder that holds something else."""
    inputs = {
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("log_steps", "report_to")},
        "moe": {name: value for name, value in model.config.moe.items() if name != "trained_tokens"},
        "blocks": blocks.fingerprint(),
        "weights": _weights_digest(model),
    }
    path = folder / "train.json"
    if path.is_file() and json.loads(path.read_text()) != json.loads(json.dumps(inputs)):
        raise InputError(f"train: {folder.name}/ holds a run with other inputs; choose another output_dir or remove it")
    path.with_suffix(".tmp").write_text(json.dumps(inputs, indent=1, sort_keys=True))
    os.replace(path.with_suffix(".tmp"), path)


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
    model.save_pretrained(scratch)
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    os.replace(scratch, folder / "checkpoint")
    steps.to_parquet(folder / "steps.tmp")
    os.replace(folder / "steps.tmp", folder / "steps.parquet")
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def _read_back(model: PreTrainedModel, folder: Path) -> pd.DataFrame:
    shutil.rmtree(folder / "trainer", ignore_errors=True)  # a kill may have come between the frame and this
    _load_weights(model, folder / "checkpoint")
    return pd.read_parquet(folder / "steps.parquet")


def _load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    trained = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(trained.state_dict())
    model.config.moe = trained.config.moe
    model.eval()


train.step_ignores = ("progress", "config.log_steps", "config.report_to")  # how it is watched does not change what comes out

"""Time within a forward pass, by hooks that are gone afterwards, and the forward passes that are timed."""

import time
from collections import defaultdict
from contextlib import ExitStack
from numbers import Integral

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dynamoe_lab.errors import InputError
from dynamoe_lab.models import decoder_layers, family_of

__all__ = ["PHASES", "Stopwatch", "Work", "step_ids"]

PHASES = ("prefill", "decode")


class Stopwatch:
    """Seconds in parts of a model, summed over layers and calls since `reset`; a context manager that takes its hooks away.

    On cuda and mps every reading waits for the device: times of parts are then right, but work that would overlap does not.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
        self._began: dict[str, float] = {}
        self._undo = ExitStack()

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def now(self) -> float:
        """Seconds on a clock, all work given to the device done."""
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def reset(self) -> None:
        """Forget the times so far."""
        self.seconds.clear()

    def watch(self, part: str, first: nn.Module, last: nn.Module | None = None) -> None:
        """Count the time from the call of `first` to the return of `last` (itself, if None) for `part`."""

        def enter(*_: object) -> None:
            self._began[part] = self.now()

        def leave(*_: object) -> None:
            self.seconds[part] += self.now() - self._began[part]

        self._undo.callback(first.register_forward_pre_hook(enter).remove)
        self._undo.callback((first if last is None else last).register_forward_hook(leave).remove)

    def watch_mlps(self, model: PreTrainedModel, part: str) -> None:
        """Count the MLP of every layer, from its input to its output; where the layer itself holds it (OPT), from fc1 to fc2."""
        family = family_of(model.config.model_type)
        for layer in decoder_layers(model):
            self.watch(part, getattr(layer, family.mlp or family.up), getattr(layer, family.mlp or family.down))

    def watch_method(self, part: str, module: nn.Module, name: str) -> None:
        """Count the calls of a method of this one module."""
        method, own = getattr(module, name), vars(module).get(name)

        def timed(*args, **kwargs):
            began = self.now()
            result = method(*args, **kwargs)
            self.seconds[part] += self.now() - began
            return result

        setattr(module, name, timed)  # on the instance, where it hides the class's method
        self._undo.callback(*((delattr, module, name) if own is None else (setattr, module, name, own)))


class Work:
    """The forward passes that are timed: one prefill, or `steps` steps of one token each after the same prefill; every time the same.

    Args:
        ids: [B, tokens] for prefill, [B, tokens + steps] for decode.
    """

    def __init__(self, model: PreTrainedModel, phase: str, ids: Tensor, tokens: int):
        self.model = model
        self.prompt, self.steps = ids[:, :tokens], ids[:, tokens:].split(1, dim=1)
        self.decode = phase == "decode"
        self.cache: DynamicCache | None = None

    @property
    def rows(self) -> int:
        """Tokens of one forward."""
        return len(self.prompt) if self.decode else self.prompt.numel()

    @property
    def calls(self) -> int:
        """Forwards of one `run`."""
        return len(self.steps) if self.decode else 1

    def _forward(self, ids: Tensor, **kwargs):
        # one row of logits, as `generate` asks for: the head is not what differs between the models
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **kwargs)

    def prefill(self):
        """Fill a fresh cache with the prompt; returns the output."""
        self.cache = DynamicCache(config=self.model.config)
        self.cache.activate_past_recording()  # sliding windows can be rewound, too
        return self._forward(self.prompt)

    def run(self, **kwargs) -> list:
        """What is timed; returns the outputs. Decode needs a `prefill` before, and a `rewind` after."""
        if self.decode:
            return [self._forward(ids, **kwargs) for ids in self.steps]
        self.cache = DynamicCache(config=self.model.config)
        return [self._forward(self.prompt, **kwargs)]

    def rewind(self) -> None:
        """The cache as it was before `run`."""
        if self.decode:
            self.cache.crop(-len(self.steps))
        else:
            self.cache = None


def step_ids(
    model: PreTrainedModel, function: str, *, phase: str, batch: int, tokens: int, steps: int, ids: Tensor | None, seed: int
) -> Tensor:
    """Token ids [batch, tokens (+ steps, if decoding)] on the model's device: the first of `ids`, or random ones.

    `ids` are rows [n, T], `Blocks`, or one text [N], which is cut into `batch` rows of `tokens`. Decoding goes on in them where they are
    longer than `tokens`, and at their beginning where they end.

    Raises:
        InputError, naming `function`: an unknown phase, counts below 1, more positions than the model has, or too few ids.
    """
    if phase not in PHASES:
        raise InputError(f"{function}: phase {phase!r}: choose {' or '.join(PHASES)}")
    for name, value in {"batch": batch, "tokens": tokens, "steps": steps}.items():
        if not isinstance(value, Integral) or value < 1:
            raise InputError(f"{function}: {name} = {value}: give a whole number of at least 1")
    length = tokens + (steps if phase == "decode" else 0)
    if length > model.config.max_position_embeddings:
        raise InputError(
            f"{function}: {length} positions are asked for, the model has {model.config.max_position_embeddings}; ask for fewer"
        )
    if ids is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    ids = getattr(ids, "ids", ids)
    if (
        not isinstance(ids, Tensor)
        or ids.is_floating_point()
        or not ids.numel()
        or not 0 <= ids.min() <= ids.max() < model.config.vocab_size
    ):
        raise InputError(f"{function}: ids: give a tensor or blocks of token ids below {model.config.vocab_size}")
    if ids.ndim == 1 and len(ids) >= batch * tokens:
        ids = ids[: batch * tokens].view(batch, tokens)
    if ids.ndim != 2 or ids.shape[0] < batch or ids.shape[1] < tokens:
        raise InputError(f"{function}: ids of shape {list(ids.shape)} are too few: give at least [{batch}, {tokens}]")
    columns = torch.arange(length, device=ids.device) % ids.shape[1]
    return ids[:batch, columns].to(model.device)

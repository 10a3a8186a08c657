"""lm-eval's `HFLM` on a loaded model, which knows which tokens are real.

HFLM pads on the right and hands no mask, so a model cannot tell pads from text: a pad would be routed and counted like a token. Here every
forward gets the real lengths as an attention mask, and the experts of real tokens alone are counted. Requests that differ in their last
token share a forward, as in HFLM. The head, a fifth of SmolLM2-135M's work, runs for the scored positions only; HFLM computes all.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.cost import count_active_params
from dynamoe_lab.evaluation.stopwatch import Stopwatch
from dynamoe_lab.models import RoutedMixin

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["BenchmarkLM"]


class BenchmarkLM(HFLM):
    """A model for lm-eval's evaluator, under the routing that `model.set_routing` chose.

    Args:
        batch_size: sequences of a forward; they are sorted by length.
        progress: is told, after every forward, of how many tokens it is done and how many there are, pads left out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
    ):
        # softmax in float32 whatever the model's dtype: in bfloat16 different answers would often score the same
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32")
        self.progress = progress
        self.model_seconds = 0.0  # within the model's forward
        self.in_model = False  # an error that comes while it is true is not the task's
        self.tokens = 0  # real tokens of all forwards
        self.asked = self.shortened = 0  # requests, and those that did not fit
        self._instances: list[Instance] = []  # of the requests that are being answered
        self._clock = Stopwatch(self.device)
        self._counts: Tensor | None = None  # [L, E] tokens by layer and expert
        forwards = [inspect.signature(vars(cls)["forward"]).parameters for cls in type(model).__mro__ if "forward" in vars(cls)]
        self._picks_columns = any("logits_to_keep" in parameters for parameters in forwards)

    # --- scoring ----------------------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in HFLM; messages name the documents that the requests are of."""
        self._instances = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._instances = []

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every request's continuation, and whether greedy decoding would write it.

        Too long sequences lose tokens on the left, as in HFLM.
        """
        sharing: dict[tuple[int, ...], list[int]] = {}  # input of a forward -> its requests
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                whose = self._instances[index] if self._instances else None
                where = f"task {whose.task_name}, document {whose.doc_id}: " if whose is not None else ""
                allowed = f"give 1 to {self.max_length}, the model's positions"
                raise InputError(f"{where}an answer of {len(continuation)} tokens cannot be scored: {allowed}")
            ids = (context + continuation)[-(self.max_length + 1) : -1]
            self.shortened += len(context) + len(continuation) > self.max_length + 1
            sharing.setdefault(tuple(ids), []).append(index)
        self.asked += len(requests)
        inputs = sorted(sharing, key=lambda ids: (-len(ids), ids))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done, whole = 0, sum(map(len, inputs))
        for start in range(0, len(inputs), self.batch_size):
            batch = inputs[start : start + self.batch_size]
            scored = [[(index, requests[index][2]) for index in sharing[ids]] for ids in batch]
            first = min(len(ids) - len(target) for ids, row in zip(batch, scored, strict=True) for _, target in row)
            logits = self._batch_logits(batch, first)
            for ids, row, row_logits in zip(batch, scored, logits, strict=True):
                for index, target in row:
                    end = len(ids) - first
                    answers[index] = self._score(row_logits[end - len(target) : end], target)
            done += sum(map(len, batch))
            if self.progress is not None:
                self.progress(done, whole)
        return answers

    def _score(self, logits: Tensor, target: list[int]) -> tuple[float, bool]:
        """Logits [n, V] of the positions that predict `target` [n]."""
        expected = torch.tensor(target, device=logits.device)
        logs = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        return float(logs.gather(1, expected[:, None]).sum()), bool((logits.argmax(-1) == expected).all())

    def _batch_logits(self, batch: list[tuple[int, ...]], first: int) -> Tensor:
        """Sequences of B lengths -> logits [B, T - first, V] from position `first` on; rows are padded on the right."""
        lengths = torch.tensor([len(ids) for ids in batch])
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for row, sequence in zip(ids, batch, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = self._model_call(ids.to(self.device), mask.to(self.device), first=first)
        return logits if self._picks_columns else logits[:, first:]

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None, first: int = 0) -> Tensor:
        """Logits of `inps` [B, T] from position `first` on (from 0 where the model cannot choose); `attn_mask` [B, T] is False for pads."""
        real = torch.ones_like(inps, dtype=torch.bool) if attn_mask is None else attn_mask
        options: dict[str, Any] = {"use_cache": False}
        if not bool(real.all()):  # without pads attention needs no mask, which would make it slower
            options["attention_mask"] = real.long()
        if self._picks_columns:
            options["logits_to_keep"] = torch.arange(first, inps.shape[1], device=inps.device)
        with self._timed():
            logits, experts = self._forward(inps, options)
        self.tokens += int(real.sum())
        if experts is not None:
            self._count(experts[:, real.flatten()])
        return logits

    def _model_generate(self, *args: Any, **options: Any) -> Tensor:
        """As in HFLM, timed."""
        with self._timed():
            return super()._model_generate(*args, **options)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count what runs inside as the model's time; an error inside is the model's."""
        began, self.in_model = self._clock.now(), True
        yield
        self.in_model = False
        self.model_seconds += self._clock.now() - began

    # --- who was active ---------------------------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Logits, and the expert of every layer and token [L, B * T]; None if all tokens take the same one, or there are none."""
        model = self.model
        if not isinstance(model, RoutedMixin) or model.routing.mode in ("full", "fixed"):
            return model(input_ids=ids, **options).logits, None
        if model.routing.mode != "router":  # the forward itself says whom it chose, at the price of the full MLP
            output = model(input_ids=ids, output_router_logits=True, **options)
            return output.logits, torch.stack(output.experts)
        chosen: list[Tensor] = []
        with ExitStack() as hooks:
            for mlp in model.routed_mlps():
                handle = mlp.router.register_forward_hook(lambda router, args, logits: chosen.append(logits.argmax(-1)))
                hooks.callback(handle.remove)
            logits = model(input_ids=ids, **options).logits
        return logits, torch.stack(chosen)

    def _count(self, experts: Tensor) -> None:
        """Add the choices [L, N] of real tokens to the counts."""
        layers, kinds = len(experts), self.model.moe.num_experts
        cells = experts + kinds * torch.arange(layers, device=experts.device)[:, None]
        counts = torch.bincount(cells.flatten(), minlength=layers * kinds).view(layers, kinds).cpu()
        self._counts = counts if self._counts is None else self._counts + counts

    def active(self) -> tuple[float, float]:
        """Parameters that an average token of all forwards so far activated, and the share of the MLPs' among the MLPs'.

        Of a mixture of experts that is none of ours (a stock Mixtral) the share is nan: the dense MLP that it came from is not known.
        """
        if not isinstance(self.model, RoutedMixin):
            return _stock_active(self.model)
        usage = None
        if self._counts is not None:
            layers, experts = self._counts.nonzero(as_tuple=True)
            shares = (self._counts / self._counts.sum(1, keepdim=True, dtype=torch.float64))[layers, experts]
            usage = pd.DataFrame({"layer": layers.numpy(), "expert": experts.numpy(), "share": shares.numpy()})
        row = count_active_params(self.model, usage).set_index("layer").loc["all"]
        return float(row["active_params"]), float(row["active_mlp_fraction"])


def _stock_active(model: PreTrainedModel) -> tuple[float, float]:
    """Active parameters of a token and the MLPs' share of a model of transformers; nan where they cannot be known."""
    total = float(sum(parameter.numel() for parameter in model.parameters()))
    config = model.config
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not chosen or not experts:
        return total, 1.0
    # each expert's own modules, or stacked: the first dimension is the experts'
    found = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    stacked = [parameter.dim() == 3 and len(parameter) == experts for parameter in found]
    known = found and (all(stacked) or not any(parameter.dim() == 3 for parameter in found))
    held = sum(parameter.numel() for parameter in found)
    return (total - held * (1 - chosen / experts) if known else math.nan), math.nan

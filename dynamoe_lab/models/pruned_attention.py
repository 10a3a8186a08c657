"""The attention of a deployed ToMoE model (arXiv 2501.15316): queries and keys cut to their rotary pairs, values masked token by token.

Cut pairs (`hybrid`) save the projections' work and weights, and a share of the cache's keys. Masks per token (V and O; with `dynamic` Q and
K, too) save parameters of a token but no time: every projection is computed in full, then multiplied by 0 or 1, since on this hardware a
product over dimensions that differ from token to token is slower than the whole one. The scale is that of the whole head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_tomoe import ToMoEConfig
from .expert_mlp import narrow
from .rotary_attention import RotaryAttention
from .routed import Routing

__all__ = ["PrunedAttention"]


class PrunedAttention(RotaryAttention):
    """A family's attention with queries and keys of the kept pairs only, and the router that opens dimensions of V and O.

    The router is one linear map to the embedding; its bias is the mean expert embedding, which the hypernetwork gave. Masks are hard
    and have no gradient, so nothing of this learns.
    """

    def __init__(self, dense: nn.Module, config: ToMoEConfig, pairs: list[int] | None, routing: Routing):
        super().__init__(dense)
        self.routing = routing
        self.dynamic_pairs = config.attention == "dynamic"
        self.mask_offset = config.mask_offset
        self.rotary_width = self.head_dim  # dimensions of a head's queries and keys
        self._kept: Tensor | None = None  # which of the head's dimensions they are; None: all
        if pairs is not None and len(pairs) < self.head_dim // 2:
            self.rotary_width = 2 * len(pairs)
            for linear in (self.q_proj, self.k_proj):
                narrow(linear, outputs=linear.out_features // self.head_dim * self.rotary_width)
            self._kept = torch.tensor([*pairs, *(pair + self.head_dim // 2 for pair in pairs)], device="cpu")
        width = self.head_dim * 3 // 2 if self.dynamic_pairs else self.head_dim
        self.router = nn.Linear(self.q_proj.in_features, config.embedding_size, dtype=torch.float32)
        self.norm = nn.LayerNorm(config.embedding_size, dtype=torch.float32)
        self.decoder = nn.Linear(config.embedding_size, width, bias=False, dtype=torch.float32)
        self.freeze_choices()
        self.trace: Tensor | None = None  # [N] float32: share of V's and O's dimensions that was open
        self._open: tuple[Tensor | None, Tensor | None] = (None, None)

    def freeze_choices(self) -> None:
        """Leave no gradient to what makes the masks."""
        for module in (self.router, self.norm, self.decoder):
            module.requires_grad_(False)

    def masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Open dimensions per token, of all heads: [B, T, D] -> (of V and O, of Q and K), each [B, T, 1, d_h] bool, None: all."""
        if self.routing.mode == "full":
            return None, None
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.masks(x)
        with torch.no_grad():
            queried = self.router(x.to(self.router.weight.dtype))
            opened = (self.decoder(F.gelu(self.norm(queried))) > -self.mask_offset).unsqueeze(2)
        values = opened[..., : self.head_dim]
        return values, opened[..., self.head_dim :].repeat(1, 1, 1, 2) if self.dynamic_pairs else None

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width = self.rotary_width
        queries, keys = self.q_proj(x).unflatten(-1, (-1, width)), self.k_proj(x).unflatten(-1, (-1, width))
        opened = self._open[1]
        return (queries, keys) if opened is None else (queries * opened, keys * opened)

    def values(self, x: Tensor) -> Tensor:
        values, opened = super().values(x), self._open[0]
        return values if opened is None else values * opened

    def rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            return cos, sin
        if self._kept.device != cos.device:  # no buffer, which loading through the meta device would empty
            self._kept = self._kept.to(cos.device)
        return cos.index_select(-1, self._kept), sin.index_select(-1, self._kept)

    def aligned(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys with zeros up to the values' width: fused kernels ask for equal widths, and without one a prefill takes three
        times as long. A single token needs none on the way that computes the product as it is."""
        missing, way = self.head_dim - self.rotary_width, self.config._attn_implementation
        if not missing or way == "eager" or (way == "sdpa" and queries.shape[2] == 1):
            return queries, keys
        return F.pad(queries, (0, missing)), F.pad(keys, (0, missing))

    def output(self, attended: Tensor) -> Tensor:
        opened = self._open[0]
        return super().output(attended if opened is None else attended * opened)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        self._open = self.masks(hidden_states)
        try:
            if self.routing.collect:
                opened = self._open[0]
                tokens = hidden_states.shape[0] * hidden_states.shape[1]
                whole = torch.ones(tokens, device=hidden_states.device)
                self.trace = whole if opened is None else opened.float().mean(dim=-1).flatten()
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._open = (None, None)

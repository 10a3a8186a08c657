"""Attention of a ToMoE model in training: which dimensions of its heads are open, per layer for queries and keys, per token for the rest.

arXiv 2501.15316, the attention module; the mode "dynamic" also decides queries and keys per token. A mask over rotary pairs is put on the
cosines and sines: dimensions i and i + d_h / 2 are kept or dropped together, so that is the same as masking queries and keys before they
are rotated, without a pass over either.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration_tomoe import ToMoEConfig
from .hypernetwork import embedding_features
from .masking import Masking
from .rotary_attention import RotaryAttention
from .routed import Routing
from .straight_through import open_sample

__all__ = ["AttentionTrace", "MaskedAttention"]


@dataclass
class AttentionTrace:
    """Open dimensions of a head in one layer and forward over N = batch * sequence tokens, with the straight-through gradient."""

    value_widths: Tensor  # [N]: of values and of the output projection's input
    pair_widths: Tensor  # [N], or [] if all tokens share them: of queries and keys, both dimensions of a pair counted


class MaskedAttention(RotaryAttention):
    """The frozen attention with masks over the dimensions that all its heads share."""

    def __init__(self, dense: nn.Module, config: ToMoEConfig, layer: int, row: int, routing: Routing, masking: Masking):
        """Take over a dense attention; `row` is where the hypernetwork's embeddings [M, E, S] have its own."""
        super().__init__(dense)
        self.moe, self.layer, self.row, self.routing, self.masking = config, layer, row, routing, masking
        self.router = nn.Linear(self.q_proj.in_features, config.embedding_size, bias=False)
        self.norm = nn.LayerNorm(config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, self.head_dim + self.head_dim // 2, bias=False)
        self._masks: tuple[Tensor, Tensor] | None = None  # of values [B, T, d_h] and of pairs [B or 1, T or 1, d_h], while it runs

    def pair_logits(self, embeddings: Tensor) -> Tensor:
        """Logits of the rotary pairs that all tokens share, offset included: expert embeddings [E, S] -> [d_h / 2]."""
        with torch.autocast(embeddings.device.type, enabled=False):
            features = embedding_features(embeddings.to(self.decoder.weight.device).mean(dim=0), self.norm)
            return self.decoder.weight[self.head_dim :] @ features + self.moe.mask_offset

    def token_logits(self, x: Tensor, embeddings: Tensor, *, pairs: bool = False) -> Tensor:
        """Logits of every token's value dimensions, offset included: [B, T, D], [E, S] -> [B, T, d_h]; with `pairs` also of its rotary
        pairs, [B, T, d_h + d_h / 2]."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.decoder.weight if pairs else self.decoder.weight[: self.head_dim]
            queried = self.router(x.to(self.router.weight.dtype)) + embeddings.to(x.device).mean(dim=0)
            return embedding_features(queried, self.norm) @ weight.t() + self.moe.mask_offset

    @torch.no_grad()
    def open_pairs(self, embeddings: Tensor | None = None) -> Tensor | None:
        """The rotary pairs that are kept, [d_h / 2] bool, or None if that is decided per token; `embeddings` [M, E, S] if known already."""
        if self.moe.attention == "dynamic":
            return None
        embeddings = self.masking.hypernetwork() if embeddings is None else embeddings
        return self.pair_logits(embeddings[self.row]) > 0

    def _sampled(self, x: Tensor, embeddings: Tensor, noise) -> tuple[Tensor, Tensor]:
        """Masks of values [B, T, d_h] and of pairs [B, T, d_h / 2], or [d_h / 2] if all tokens share them."""
        dynamic = self.moe.attention == "dynamic"
        logits = [self.token_logits(x, embeddings, pairs=dynamic)]
        if not dynamic:
            logits.append(self.pair_logits(embeddings))
        if noise is not None:
            logits = [each + noise.gumbel(each.shape, each.device) for each in logits]
        masks = [open_sample(each, self.moe.mask_temperature) for each in logits]
        return masks[0].split((self.head_dim, self.head_dim // 2), dim=-1) if dynamic else tuple(masks)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As the family's: hidden_states [B, T, D] -> ([B, T, D], attention weights where the implementation gives them)."""
        forward = self.masking.for_layer(self.routing, training=self.training)
        if forward.embeddings is None:
            return super().forward(hidden_states, *args, **kwargs)
        values, pairs = self._sampled(hidden_states, forward.embeddings[self.row].to(hidden_states.device), forward.noise)
        if forward.attentions is not None:
            forward.attentions[self.layer] = AttentionTrace(values.sum(-1).flatten(), 2 * pairs.sum(-1).flatten().squeeze())
        tiled = torch.cat((pairs, pairs), dim=-1)
        self._masks = (values.to(hidden_states.dtype), tiled.to(hidden_states.dtype))
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._masks = None

    def rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, d_h], 0 for pairs that are closed."""
        return (cos, sin) if self._masks is None else (cos * self._masks[1], sin * self._masks[1])

    def values(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, kv heads, d_h], 0 where the token's mask is closed."""
        values = super().values(x)
        return values if self._masks is None else values * self._masks[0].unsqueeze(2)

    def output(self, attended: Tensor) -> Tensor:
        """[B, T, heads, d_h] -> [B, T, D] from the dimensions that are open for the token."""
        return super().output(attended if self._masks is None else attended * self._masks[0].unsqueeze(2))

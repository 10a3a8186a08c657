"""Attention of the families that rotate whole heads (Llama, Mistral, Qwen2), with pieces that can be masked or sliced.

The projections are the family's own, under its names; so is the scale, that of the whole head, whatever is cut. Subclasses answer what the
queries, keys, values and the output projection's input become.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralAttention

__all__ = ["RotaryAttention", "attention_weights"]


class RotaryAttention(nn.Module):
    """A family's attention, taken over; widths of a head's queries and keys may differ from those of its values."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(dense, name))
        self.config, self.layer_idx, self.head_dim = dense.config, dense.layer_idx, dense.head_dim
        self.num_key_value_groups, self.scaling = dense.num_key_value_groups, dense.head_dim**-0.5
        self.attention_dropout, self.is_causal = dense.attention_dropout, dense.is_causal
        # Mistral's reads its config with every forward, Qwen2's has its own, None in layers that see everything; Llama's knows no window.
        own = dense.config if isinstance(dense, MistralAttention) else dense
        self.sliding_window = getattr(own, "sliding_window", None)

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> queries [B, T, heads, d] and keys [B, T, kv heads, d], before rotation; d is even, and dimensions i and
        i + d / 2 are a rotary pair."""
        width = self.head_dim
        return self.q_proj(x).unflatten(-1, (-1, width)), self.k_proj(x).unflatten(-1, (-1, width))

    def values(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, kv heads, d_h]."""
        return self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, d_h] for the dimensions that queries and keys have."""
        return cos, sin

    def aligned(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and all keys [B, heads, T, d] as the attention function is to get them."""
        return queries, keys

    def output(self, attended: Tensor) -> Tensor:
        """[B, T, heads, d_h] -> [B, T, D]."""
        return self.o_proj(attended.flatten(2))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As the family's: hidden_states [B, T, D] -> ([B, T, D], attention weights where the implementation gives them)."""
        queries, keys = (states.transpose(1, 2) for states in self.queries_keys(hidden_states))
        values = self.values(hidden_states).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, *self.rotation(*position_embeddings))
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        queries, keys = self.aligned(queries, keys)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.output(attended), weights


@contextmanager
def attention_weights(attentions: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The attention weights [B, heads, T, S] of forwards in this context, in the order in which layers run.

    Transformers looks for them at the family's own attention class, which is not there any more. None where the implementation gives none.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is not None:
            found.append(output[1])

    with ExitStack() as hooks:
        for attention in attentions:
            hooks.callback(attention.register_forward_hook(keep).remove)
        yield found

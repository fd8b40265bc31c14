"""A small readable decoder, of Llama's shape, with a pluggable attention layer and a pattern for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.layers.state import RecurrentState
from regard.patterns import Causal, Pattern

__all__ = ["Decoder"]

State = list[RecurrentState]
CAUSAL = Causal()


class SwiGlu(nn.Module):
    """``W_down (silu(W_gate x) * W_up x)``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """The MLP."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """``x = x + attention(norm(x)); x = x + mlp(norm(x))``, norms by root mean square."""

    def __init__(self, dim: int, hidden: int, attention: nn.Module, eps: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(dim, eps), attention
        self.norm2, self.mlp = nn.RMSNorm(dim, eps), SwiGlu(dim, hidden)

    def forward(self, x: Float[Tensor, "batch length dim"], **how: Any) -> Float[Tensor, "batch length dim"]:
        """The block; ``how`` goes to the attention layer."""
        x = x + self.attention(self.norm1(x), **how)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Token ids to logits: embedding, blocks, norm, a linear head.

    Weights are drawn with the global generator (seed it, or train under `torch.random.fork_rng`): linear layers as
    PyTorch draws them, embeddings with standard deviation ``dim^-1/2``.

    Args:
        vocab: token ids.
        dim, layers, heads, kv_heads, head_dim: of the network; see `MultiHead`.
        hidden: width of the MLP; None: ``8 dim / 3``, rounded up to a multiple of 8.
        pattern: which pairs may meet, one for all layers or one a layer; None: every pair. It may be replaced for one
            call, or for good by setting ``patterns``.
        theta: base of rotary positions; None: no positions.
        attention: makes the attention layer of a block, from its index; None: `MultiHead` with `Rope`. A layer takes
            ``(x, pattern=, state=)``, and ``positions=`` where those are given; its own pattern is met with the
            decoder's.
        outputs: width of the head; None: ``vocab``.
        eps: of the norms.

    Raises:
        ValueError: a number below 1, or as many patterns as there are not layers.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        layers: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden: int | None = None,
        pattern: Pattern | Sequence[Pattern | None] | None = CAUSAL,
        theta: float | int | None = 10_000.0,
        attention: Callable[[int], nn.Module] | None = None,
        outputs: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value in {"vocab": vocab, "dim": dim, "layers": layers, "heads": heads, "outputs": outputs}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        hidden = -(-8 * dim // 24) * 8 if hidden is None else hidden

        def standard(_: int) -> nn.Module:
            width = dim // heads if head_dim is None else head_dim
            rope = None if theta is None else Rope(width, theta)
            return MultiHead(dim, heads, kv_heads=kv_heads, head_dim=head_dim, position=rope)

        make = standard if attention is None else attention
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(DecoderBlock(dim, hidden, make(i), eps) for i in range(layers))
        self.norm = nn.RMSNorm(dim, eps)
        self.head = nn.Linear(dim, vocab if outputs is None else outputs, bias=False)
        self.patterns = pattern

    @property
    def patterns(self) -> tuple[Pattern | None, ...]:
        """The pattern of each layer; set to one for all, or to one a layer."""
        return self._patterns

    @patterns.setter
    def patterns(self, value: Pattern | Sequence[Pattern | None] | None) -> None:
        self._patterns = self._a_layer(value)

    def _a_layer(self, value: Pattern | Sequence[Pattern | None] | None) -> tuple[Pattern | None, ...]:
        layers = len(self.blocks)
        if value is None or isinstance(value, Pattern):
            return (value,) * layers
        if len(value) != layers:
            raise ValueError(f"pattern must be one Pattern or one for each of {layers} layers, got {len(value)}")
        return tuple(value)

    def hidden(
        self,
        ids: Int[Tensor, "batch length"],
        *,
        pattern: Pattern | Sequence[Pattern | None] | None = None,
        positions: Int[Tensor, "length"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What the head reads: the residual stream after the last norm.

        Args:
            ids: token ids; with a state, the newest ones.
            pattern: in place of the decoder's own for this call; None: its own.
            positions: of the tokens; None: they follow on from the state.
            state: what `new_state` gave; every layer adds to its own.
        """
        patterns = self._patterns if pattern is None else self._a_layer(pattern)
        how: dict[str, Any] = {} if positions is None else {"positions": positions}
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, pattern=patterns[i], state=None if state is None else state[i], **how)
        return self.norm(x)

    def forward(
        self,
        ids: Int[Tensor, "batch length"],
        *,
        pattern: Pattern | Sequence[Pattern | None] | None = None,
        positions: Int[Tensor, "length"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch length outputs"]:
        """Logits of every position; arguments as in `hidden`."""
        return self.head(self.hidden(ids, pattern=pattern, positions=positions, state=state))

    def new_state(self) -> State:
        """An empty state for every layer.

        Raises:
            ValueError: a layer keeps none.
        """
        layers: list[Any] = [block.attention for block in self.blocks]
        for i, layer in enumerate(layers):
            if not hasattr(layer, "new_state"):
                raise ValueError(f"state must be None: {type(layer).__name__} of block {i} keeps no state to step with")
        return [layer.new_state() for layer in layers]

    @classmethod
    def from_llama(cls, model: Any) -> Decoder:
        """A decoder with copies of the weights of a transformers ``LlamaForCausalLM``; it computes the same logits.

        Raises:
            ValueError: another architecture, scaled rotary positions, or projections with biases.
        """
        config = model.config
        rope = config.rope_parameters
        told = {
            "model_type": (config.model_type, "llama"),
            "rope_type": (rope["rope_type"], "default"),
            "attention_bias": (config.attention_bias, False),
            "mlp_bias": (config.mlp_bias, False),
            "hidden_act": (config.hidden_act, "silu"),
        }
        for name, (value, accepted) in told.items():
            if value != accepted:
                raise ValueError(f"model must have {name} = {accepted!r}, got {value!r}")
        decoder = cls(
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden=config.intermediate_size,
            theta=rope["rope_theta"],
            eps=config.rms_norm_eps,
        )
        names = {
            "embed_tokens.": "embed.",
            "layers.": "blocks.",
            "self_attn.": "attention.",
            "input_layernorm.": "norm1.",
            "post_attention_layernorm.": "norm2.",
            "model.": "",
            "lm_head.": "head.",
        }
        weights = {}
        for key, value in model.state_dict().items():
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
            weights[key] = value.detach().clone()
        decoder.load_state_dict(weights)
        return decoder.to(model.device, model.dtype).train(model.training)

"""An autoregressive image model of axial attention (Axial Transformer, arXiv 1912.12180)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from regard.layers.axial import AxialAttention, AxialState
from regard.layers.block import Block

Map = Float[Tensor, "batch height width dim"]


class AxialDecoder(nn.Module):
    """``p(image) = prod p(pixel | pixels before it in raster order)``, channel after channel.

    With h the embedded channel, c what earlier channels say (0 for the first) and p learned row and column positions:

        u = h + c + p;  (masked column block, unmasked row block) upper / 2 times;  u moves down a row, zeros on top
        z = u + shift_right(h) + c + p;  masked row block, inner times;  LayerNorm;  logits

    The upper stack sees whole rows, the current one included, which the move down takes away again; so it runs once a
    row when sampling, and only the inner stack runs once a pixel. c is the sum of the embeddings of earlier channels
    through ``outer`` unmasked (column, row) block pairs (our reading of how channels are conditioned).

    Args:
        shape: (height, width).
        values: levels of a pixel.
        dim, heads: width and heads.
        upper: blocks of the upper stack, an even number; 0 leaves only the pixel's own row.
        inner: blocks of the inner stack, at least 1.
        channels: of the image.
        outer: pairs of unmasked blocks over earlier channels; used where channels > 1.
        mlp_ratio: of the blocks.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        values: int,
        dim: int = 32,
        heads: int = 2,
        upper: int = 2,
        inner: int = 2,
        channels: int = 1,
        outer: int = 1,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if upper < 0 or upper % 2:
            raise ValueError(f"upper must be an even number of blocks >= 0, got {upper}")
        for name, number in (("inner", inner), ("channels", channels), ("values", values)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.shape, self.values, self.channels = tuple(shape), values, channels
        self.embed = nn.Embedding(channels * values, dim)
        self.start = nn.Parameter(0.02 * torch.randn(dim))
        self.rows = nn.Parameter(0.02 * torch.randn(shape[0], 1, dim))
        self.columns = nn.Parameter(0.02 * torch.randn(shape[1], dim))

        def column(causal: bool) -> Block:
            return Block(dim, AxialAttention(dim, heads, shape, 0, causal), mlp_ratio)

        def row(causal: bool) -> Block:  # of one row: rows are a batch, and one of them can be had alone
            return Block(dim, AxialAttention(dim, heads, shape[1:], 0, causal), mlp_ratio)

        self.upper = nn.ModuleList(row(False) if i % 2 else column(True) for i in range(upper))
        self.inner = nn.ModuleList(row(True) for _ in range(inner))
        pairs = 2 * outer if channels > 1 else 0
        self.outer = nn.ModuleList(row(False) if i % 2 else column(False) for i in range(pairs))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, values)

    def forward(self, x: Int[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width v"]:
        """Logits of every pixel given the pixels before it."""
        self._check(x)
        return torch.stack([self._channel(x, c) for c in range(self.channels)], 1)

    def _channel(self, x: Tensor, channel: int) -> Tensor:
        h = self._embedded(x[:, channel], channel)
        before = self.earlier(x, channel)
        place = before + self.rows + self.columns
        u = _through(self.upper, h + place) if len(self.upper) else torch.zeros_like(h)
        u = pad(u, (0, 0, 0, 0, 1, 0))[:, :-1]  # down a row
        right = torch.cat([self.start.expand(len(h), self.shape[0], 1, -1), h[:, :, :-1]], 2)
        return self.head(self.norm(_through(self.inner, u + right + place)))

    def _embedded(self, pixels: Tensor, channel: int) -> Tensor:
        return self.embed(pixels + channel * self.values)

    def earlier(self, x: Int[Tensor, "batch channels height width"], channel: int) -> Map:
        """What the channels before this one say, 0 for the first."""
        if channel == 0:
            return self.start.new_zeros(len(x), *self.shape, self.start.shape[0])
        h = sum(self._embedded(x[:, c], c) for c in range(channel))
        return _through(self.outer, h + self.rows + self.columns)

    def new_state(self, batch: int, before: Map | None = None) -> AxialSampling:
        """The state of sampling one channel; ``before`` is what `earlier` gives (None: the first channel)."""
        if before is None:
            before = self.start.new_zeros(batch, *self.shape, self.start.shape[0])
        return AxialSampling(
            before, [_attention(b).new_state() if i % 2 == 0 else None for i, b in enumerate(self.upper)]
        )

    def step(
        self, pixels: Int[Tensor, "batch"] | None, state: AxialSampling, channel: int = 0
    ) -> Float[Tensor, "batch v"]:
        """Logits of the next pixel in raster order, given the one before it (None at the start of a channel).

        At the start of a row the upper stack takes in the row before; the inner stack takes one step a pixel.

        Raises:
            ValueError: the image is full, or pixels are missing, or given at the very start.
        """
        height, width = self.shape
        i, j = divmod(state.pixel, width)
        if i >= height:
            raise ValueError(f"state is at the end of its {height} x {width} image; make a new one")
        if (pixels is None) != (state.pixel == 0):
            raise ValueError(
                f"pixels must be None at the first pixel and given after it, got {pixels} at {state.pixel}"
            )
        right = self.start.expand(len(state.before), -1)
        if pixels is not None:
            state.row.append(self._embedded(pixels, channel))
            right = state.row[-1] if j > 0 else right
        if j == 0:
            self.start_row(state, i)
        place = state.before[:, i, j] + self.rows[i, 0] + self.columns[j]
        z = (state.above[:, j] + right + place)[:, None]
        for block, inner in zip(self.inner, state.inner, strict=True):
            z = block(z, state=inner)
        state.pixel += 1
        return self.head(self.norm(z[:, 0]))

    def start_row(self, state: AxialSampling, i: int) -> None:
        """Opens row i: the upper stack over the row before, which ``state.row`` holds; `step` calls it itself."""
        state.above = torch.zeros_like(state.before[:, 0])
        state.inner = [_attention(b).new_state() for b in self.inner]
        if i > 0 and len(self.upper):
            place = state.before[:, i - 1] + self.rows[i - 1] + self.columns
            u = torch.stack(state.row, 1) + place
            for block, columns in zip(self.upper, state.upper, strict=True):
                u = block(u) if columns is None else block(u, state=columns)
            state.above = u
        state.upper_calls += 1
        state.row = []

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n channels height width"]:
        """n images, a pixel at a time: height calls of the upper stack and height * width of the inner, a channel."""
        device = self.start.device
        x = torch.zeros(n, self.channels, *self.shape, dtype=torch.long, device=device)
        for c in range(self.channels):
            state, last = self.new_state(n, self.earlier(x, c)), None
            for index in range(self.shape[0] * self.shape[1]):
                p = self.step(last, state, c).softmax(-1).to(generator.device)
                last = torch.multinomial(p, 1, generator=generator)[:, 0].to(device)
                x[:, c].view(n, -1)[:, index] = last
        return x

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != (self.channels, *self.shape):
            raise ValueError(
                f"x must be [batch, {self.channels}, {self.shape[0]}, {self.shape[1]}], got {tuple(x.shape)}"
            )
        if x.numel() and (int(x.min()) < 0 or int(x.max()) >= self.values):
            raise ValueError(f"x must hold levels 0..{self.values - 1}, got {int(x.min())}..{int(x.max())}")


@dataclass
class AxialSampling:
    """Where the sampling of one channel stands.

    Attributes:
        before: what earlier channels say.
        upper: keys and values of the rows above, for each masked column block.
        inner: keys and values of the current row, for each inner block.
        above: the upper stack's output that the current row takes, ``[batch, width, dim]``.
        row: embedded pixels of the current row.
        pixel: the next one, in raster order.
        upper_calls: rows that the upper stack was asked for.
    """

    before: Tensor
    upper: list[AxialState | None]
    inner: list[AxialState] = field(default_factory=list)
    above: Tensor = field(default_factory=lambda: torch.zeros(0))
    row: list[Tensor] = field(default_factory=list)
    pixel: int = 0
    upper_calls: int = 0


def _through(blocks: nn.ModuleList, x: Map) -> Map:
    for block in blocks:
        of_a_row = len(_attention(block).grid.shape) == 1
        x = block(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if of_a_row else _of_map(block, x)
    return x


def _attention(block: nn.Module) -> AxialAttention:
    mixer = block.mixer
    assert isinstance(mixer, AxialAttention)
    return mixer


def _of_map(block: nn.Module, x: Map) -> Map:
    return block(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

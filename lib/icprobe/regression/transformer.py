"""A transformer that reads pairs as a context and predicts the labels of queries.

A pair is two tokens, (x, 0) and (x, y), so that each label stands beside its covariates and is
predicted where it is still missing (Garg et al. 2022, What can transformers learn in-context?, have
x and y in tokens of their own, which takes ten times as many steps to get going). Blocks are
pre-norm, positions are learnt. Many queries can follow one context: each sees the context and
itself, so the context is read once for all of them.
"""

import hashlib
import math

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn
from torch.nn import functional

from icprobe.regression.learners import Learner

TOKENS_AT_ONCE = 2**12  # queries and context tokens that are read together: what a cache holds


@validated(frozen=True, kw_only=True)
class Shape:
    """The architecture of a network; ValueError names a field that is out of range."""

    pairs: int = Field(11, ge=1, strict=True)  # at most in a sequence, the last is the query
    width: int = Field(48, ge=1, strict=True)  # of the residual stream; hidden layers have 4 times
    layers: int = Field(4, ge=1, strict=True)
    heads: int = Field(4, ge=1, strict=True)  # of attention, in each layer

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of {self.heads} heads")


class Block(nn.Module):
    """Attention and a hidden layer, each added to the residual stream after a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, context: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return context [R, T, W], and queries [R, M, W] if there are any, one block further.

        A token of the context sees itself and what comes before; a query the context and itself.
        """
        q, k, v = self._heads(context)
        scores = q @ k.mT
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        seen = scores.masked_fill(ahead, -math.inf).softmax(-1) @ v
        context = self._finish(context, seen)
        if queries is None:
            return context, None
        q, own_k, own_v = self._heads(queries)
        own = (q * own_k).sum(-1, keepdim=True)
        weights = torch.cat([q @ k.mT, own], dim=-1).softmax(-1)
        seen = weights[..., :-1] @ v + weights[..., -1:] * own_v
        return context, self._finish(queries, seen)

    def _heads(self, tokens: Tensor) -> list[Tensor]:
        """Return queries (scaled), keys and values [R, heads, T, W / heads]."""
        of_heads = self.qkv(self.attention_norm(tokens)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(-2, -3) for part in of_heads.unbind(-3))
        return [q / math.sqrt(q.shape[-1]), k, v]

    def _finish(self, tokens: Tensor, seen: Tensor) -> Tensor:
        tokens = tokens + self.mix(seen.transpose(-2, -3).flatten(-2))
        return tokens + self.narrow(
            functional.relu(self.widen(self.hidden_norm(tokens)), inplace=True)
        )


class Regressor(nn.Module):
    """The network; see `learner` for its use in float64 and in parts."""

    def __init__(self, dimension: int, shape: Shape):
        super().__init__()
        self.shape = shape
        self.read_in = nn.Linear(dimension + 1, shape.width)
        self.positions = nn.Embedding(2 * shape.pairs, shape.width)
        blocks = (Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.read_out = nn.LayerNorm(shape.width), nn.Linear(shape.width, 1)

    def forward(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """Return predictions [R, M] for queries [R, M, D] after contexts x [R, K, D], y [R, K]."""
        K, most = y.shape[-1], self.shape.pairs - 1
        if most < K:
            raise ValueError(f"a context has {K} pairs, this network reads up to {most}")
        position = self.positions.weight
        queries = self.read_in(functional.pad(queries, (0, 1))) + position[2 * K]
        return self._through(self._tokens(x, y) + position[: 2 * K], queries)

    def along(self, x: Tensor, y: Tensor) -> Tensor:
        """Return predictions [R, K] of each label of a sequence from the pairs before it."""
        tokens = self._tokens(x, y) + self.positions.weight[: 2 * y.shape[-1]]
        return self._through(tokens)[:, ::2]

    def _tokens(self, x: Tensor, y: Tensor) -> Tensor:
        known = torch.stack([torch.zeros_like(y), y], dim=-1)[..., None]
        twice = x[..., None, :].expand(*x.shape[:-1], 2, -1)
        return self.read_in(torch.cat([twice, known], dim=-1).flatten(-3, -2))

    def _through(self, context: Tensor, queries: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            context, queries = block(context, queries)
        return self.read_out(self.norm(context if queries is None else queries))[..., 0]


def learner(network: Regressor) -> Learner:
    """Return the network as a learner for problems in float64, which are read in its own dtype."""
    weight = network.read_in.weight

    @torch.inference_mode()
    def predict(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        tokens = 2 * y.shape[1] + queries.shape[1]
        parts = (rows.split(max(1, TOKENS_AT_ONCE // tokens)) for rows in (x, y, queries))
        found = [network(*(t.to(weight) for t in part)) for part in zip(*parts, strict=True)]
        return torch.cat(found).to(x)

    return predict


def fingerprint(network: Regressor) -> str:
    """Return a hash of architecture and weights, which determine what the network predicts."""
    digest = hashlib.sha256(repr(network.shape).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

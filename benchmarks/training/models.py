"""Small models of the three usual kinds, with nothing that another optimizer would need changed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # bytes


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + y


class Transformer(nn.Module):
    """A GPT over bytes (``context``), or a ViT over patches of an image (``patch``)."""

    def __init__(
        self, width: int, layers: int, heads: int, length: int, outputs: int, patch: int = 0
    ) -> None:
        super().__init__()
        if patch:
            self.embed: nn.Module = nn.Conv2d(3, width, patch, stride=patch)
        else:
            self.embed = nn.Embedding(VOCABULARY, width)
        self.pos_embed = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, not patch) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs, bias=False)
        self.patch = patch
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # Layers that add to the residual stream begin smaller, as in GPT-2.
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.patch:
            x = x.flatten(2).transpose(1, 2)
        x = x + self.pos_embed[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x.mean(1) if self.patch else x)
        return logits


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = None
        if stride != 1 or inner != outer:
            conv = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """The ResNet of small images: three stages of ``depth`` blocks."""

    def __init__(self, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.ModuleList()
        inner = width
        for stage in range(3):
            for i in range(depth):
                outer = width * 2**stage
                self.layers.append(Residual(inner, outer, 2 if stage and not i else 1))
                inner = outer
        self.head = nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

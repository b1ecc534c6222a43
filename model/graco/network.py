"""SimpleClick's network, which GraCo steers: a plain ViT over patches of the image, clicks and the previous mask.

The modules carry the names of the published state dicts, with one difference: the fused `attn.qkv` is `attn.q_proj`,
`attn.k_proj` and `attn.v_proj`, so that LoRA sits on Q and V alone (`model.graco.weights` converts both ways). What
steers it, a granularity or a phrase, is an input like the image: a vector that is added to every token, and the LoRA
matrices of its branch. Nothing of it is ever written into the weights, so any thread may ask for any branch.

Blocks run in windows of 224 pixels but for every sixth (ViT-B and L; eighth of H, second of xTiny), which see all.

Sources: SimpleClick (arXiv 2210.11006), ViTDet's simple feature pyramid (arXiv 2203.16527), GraCo (arXiv 2405.00587).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.graco.inputs import WINDOW, Architecture, LowRank


class PatchEmbedding(nn.Module):
    """Cut B, 3, H, W into patches: B, N, width."""

    def __init__(self, width: int, patch: int) -> None:
        """Take the width of a token and the side of a patch in pixels."""
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return one token a patch, row by row."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Self-attention with separate Q, K and V, to which low-rank matrices may be added for one pass."""

    def __init__(self, width: int, heads: int) -> None:
        """Take the width of a token and the number of heads."""
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, down: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        """Return the attended tokens B, N, width; `down` (2, rank, width) and `up` (2, width, rank) are LoRA's."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if down is not None and up is not None:
            q = q + F.linear(F.linear(x, down[0]), up[0])
            v = v + F.linear(F.linear(x, down[1]), up[1])
        batch, tokens, width = x.shape
        split = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in (q, k, v))  # B, heads, N, C
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(attended)
        return out


class _Norm(nn.LayerNorm):
    """Layer normalisation with the ViT's epsilon; timm passes device and type along."""

    def __init__(self, width: int, **_: object) -> None:
        super().__init__(width, eps=1e-6)


class SteeredBlock(Block):
    """A ViT block whose attention may be steered."""

    def __init__(self, width: int, heads: int) -> None:
        """Take the width of a token and the number of heads."""
        super().__init__(width, heads, qkv_bias=True, norm_layer=_Norm)
        self.attn = Attention(width, heads)

    def forward(self, x: Tensor, down: Tensor | None = None, up: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the tokens after attention and MLP; arguments as `Attention.forward`."""
        x = x + self.attn(self.norm1(x), down, up)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Backbone(nn.Module):
    """The plain ViT."""

    def __init__(self, a: Architecture) -> None:
        """Build it for an architecture, values at random."""
        super().__init__()
        self.grid, self.window, self.global_every = a.size // a.patch, WINDOW // a.patch, a.global_every
        self.patch_embed = PatchEmbedding(a.width, a.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, a.width))
        self.blocks = nn.ModuleList(SteeredBlock(a.width, a.heads) for _ in range(a.depth))

    def forward(
        self, image: Tensor, prompt: Tensor, low_rank: LowRank | None = None, *, checkpointed: bool = False
    ) -> Tensor:
        """Return features B, width, H/patch, W/patch.

        Args:
            image: normalised pixels, B, 3, H, W.
            prompt: what clicks, previous mask and granularity add to each token, B, N, width.
            low_rank: the branch that is on; None: the base's own weights, or what a training has attached to them.
            checkpointed: keep no activations inside blocks for the backward pass, but make them anew.
        """
        rows, columns = (side // self.patch_embed.proj.stride[0] for side in image.shape[2:])
        x = self.patch_embed(image) + prompt + self.position(rows, columns)  # B, N, C
        windowed = False
        for number, block in enumerate(self.blocks, 1):
            everywhere = number % self.global_every == 0
            if windowed == everywhere:
                x = self._join(x, rows, columns) if everywhere else self._split(x, rows, columns)
                windowed = not everywhere
            steer = () if low_rank is None else (low_rank.down[number - 1], low_rank.up[number - 1])
            x = checkpoint(block, x, *steer, use_reentrant=False) if checkpointed else block(x, *steer)
        features: Tensor = x.transpose(1, 2).reshape(x.shape[0], -1, rows, columns)
        return features

    def position(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding of a grid, 1, N, width: the learned one, or made from it by interpolation."""
        learned = self.pos_embed[:, 1:]
        if (rows, columns) == (self.grid, self.grid):
            return learned
        square = learned.transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        return F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    def _split(self, x: Tensor, rows: int, columns: int) -> Tensor:
        w, width = self.window, x.shape[-1]
        x = x.reshape(-1, rows // w, w, columns // w, w, width).transpose(2, 3)
        return x.reshape(-1, w * w, width)

    def _join(self, x: Tensor, rows: int, columns: int) -> Tensor:
        w, width = self.window, x.shape[-1]
        x = x.reshape(-1, rows // w, columns // w, w, w, width).transpose(2, 3)
        return x.reshape(-1, rows * columns, width)


def _normed(channels: int, *, last: bool = False) -> list[nn.Module]:
    return [nn.GroupNorm(1, channels), *([nn.GELU()] if last else [])]


class Neck(nn.Module):
    """The simple feature pyramid: one feature map at 1/4, 1/8, 1/16 and 1/32 of the input, each from the last block."""

    def __init__(self, a: Architecture) -> None:
        """Build it for an architecture, values at random."""
        super().__init__()
        width, (c4, c8, c16, c32) = a.width, a.neck
        m4, m8, m32 = max(2 * c4, width // 2), max(c8, width // 2), max(c32, 2 * width)
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        self.down_4 = nn.Sequential(
            *(up(width, m4), *_normed(m4, last=True), up(m4, m4 // 2), *_normed(m4 // 2)),
            *(nn.Conv2d(m4 // 2, c4, 1), *_normed(c4, last=True)),
        )
        self.down_8 = nn.Sequential(up(width, m8), *_normed(m8), nn.Conv2d(m8, c8, 1), *_normed(c8, last=True))
        self.down_16 = nn.Sequential(nn.Conv2d(width, c16, 1), *_normed(c16, last=True))
        self.down_32 = nn.Sequential(
            *(nn.Conv2d(width, m32, 2, 2), *_normed(m32), nn.Conv2d(m32, c32, 1), *_normed(c32, last=True))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the four maps, finest first."""
        return [self.down_4(x), self.down_8(x), self.down_16(x), self.down_32(x)]


class _Conv(nn.Module):
    """A 1x1 convolution under the name that published files have for it."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved map."""
        convolved: Tensor = self.conv(x)
        return convolved


class Head(nn.Module):
    """The MLP head: four maps to one, then to logits.

    The published code brings the maps to one size, joins them and then convolves. A 1x1 convolution and an
    interpolation may change places, so each map is convolved at its own size: three quarters of the work less.
    """

    def __init__(self, a: Architecture) -> None:
        """Build it for an architecture, values at random."""
        super().__init__()
        self.doublings = a.doublings
        c1, c2, c4 = a.head, a.head // 2, a.head // 4
        self.convs = nn.ModuleList(_Conv(channels, a.head) for channels in a.neck)
        self.fusion_conv = _Conv(4 * a.head, a.head)
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        self.up_conv1 = nn.Sequential(up(c1, c2), *_normed(c2), nn.Conv2d(c2, c2, 1), *_normed(c2, last=True))
        self.up_conv2 = nn.Sequential(up(c2, c4), *_normed(c4), nn.Conv2d(c4, c4, 1), *_normed(c4, last=True))
        self.conv_seg = nn.Conv2d((c1, c2, c4)[a.doublings], 1, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits B, 1, H/4, W/4 (twice or four times that where the head doubles)."""
        fusion = self.fusion_conv.conv
        size, biases = maps[0].shape[2:], (fusion.bias, None, None, None)
        parts = [
            F.conv2d(F.relu(conv(x)), weight, bias)
            for x, conv, weight, bias in zip(maps, self.convs, fusion.weight.chunk(4, dim=1), biases, strict=True)
        ]
        x = parts[0]
        for coarser in parts[1:]:
            x = x + F.interpolate(coarser, size, mode="bilinear", align_corners=False)
        x = F.relu(x)
        for double in (self.up_conv1, self.up_conv2)[: self.doublings]:
            x = double(x)
        logits: Tensor = self.conv_seg(x)
        return logits


class SimpleClick(nn.Module):
    """Image, disks of clicks and previous mask to logits."""

    def __init__(self, a: Architecture) -> None:
        """Build it for an architecture, values at random."""
        super().__init__()
        self.patch_embed_coords = PatchEmbedding(a.width, a.patch)
        self.backbone = Backbone(a)
        self.neck = Neck(a)
        self.head = Head(a)

    def forward(
        self,
        image: Tensor,
        maps: Tensor,
        signal: Tensor | None = None,
        low_rank: LowRank | None = None,
        *,
        checkpointed: bool = False,
    ) -> Tensor:
        """Return logits B, 1, H, W.

        Args:
            image: pixels as `normalise` gives them, B, 3, H, W; H and W multiples of `WINDOW`.
            maps: previous mask (probability) and the disks of positive and negative clicks, B, 3, H, W.
            signal: the vector of a granularity or a phrase, B, width; None: neither.
            low_rank: as `Backbone.forward`.
            checkpointed: as `Backbone.forward`.
        """
        features = self.features(image, maps, signal, low_rank, checkpointed=checkpointed)
        return self.logits(features, (image.shape[2], image.shape[3]))

    def features(
        self,
        image: Tensor,
        maps: Tensor,
        signal: Tensor | None = None,
        low_rank: LowRank | None = None,
        *,
        checkpointed: bool = False,
    ) -> Tensor:
        """Return what the ViT makes of all inputs, B, width, H/patch, W/patch; arguments as `forward`."""
        prompt = self.patch_embed_coords(maps)
        if signal is not None:
            prompt = prompt + signal[:, None]
        features: Tensor = self.backbone(image, prompt, low_rank, checkpointed=checkpointed)
        return features

    def logits(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the logits B, 1, *size that neck and head make of features."""
        logits = self.head(self.neck(features))
        return F.interpolate(logits, size, mode="bilinear", align_corners=True)

"""Prompt encoder and mask decoder of the `light` family: what each click costs.

Tensors are B, C, H, W; a prompt's points are pixels of the resized image (long side 1024). The image encoder is in
`image_encoder.py`, apart, so that a process that encodes by OpenVINO need not hold timm in memory.

Source: Segment Anything (arXiv 2304.02643).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 1024
"""Pixels of the square the encoder reads."""
GRID = 64
"""Rows and columns of the embedding: one vector for 16 x 16 pixels."""
CHANNELS = 256
LOW_RES = 256
"""Rows and columns of the mask logits: one value for 4 x 4 pixels."""
MASK_TOKENS = 4
"""Token 0 answers with a single mask; tokens 1-3 with roughly subpart, part and whole."""

POINT_PADDING, POINT_NEGATIVE, POINT_POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3


class ChannelNorm(nn.Module):
    """Layer norm over the channels of B, C, H, W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised over C; same shape."""
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class PromptEncoder(nn.Module):
    """Points, box corners and a previous mask to the vectors that the decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2, CHANNELS // 2))
        self.kinds = nn.Embedding(4, CHANNELS)  # negative, positive, box top-left, box bottom-right
        self.padding = nn.Embedding(1, CHANNELS)
        self.no_mask = nn.Embedding(1, CHANNELS)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2),
            ChannelNorm(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2),
            ChannelNorm(16),
            nn.GELU(),
            nn.Conv2d(16, CHANNELS, 1),
        )

    def position(self, points: Tensor) -> Tensor:
        """Return random-Fourier positions of `points` (..., 2) in [0, 1]: (..., 256)."""
        angle = 2 * torch.pi * ((2 * points - 1) @ self.frequencies)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def grid_position(self) -> Tensor:
        """Return the positions of the embedding's cells: 1, 256, 64, 64."""
        centres = (torch.arange(GRID, device=self.frequencies.device, dtype=self.frequencies.dtype) + 0.5) / GRID
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.position(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]

    def points(self, xy: Tensor, kinds: Tensor) -> Tensor:
        """Return the vectors of points: `xy` B, N, 2 pixels of the resized image and `kinds` B, N to B, N, 256."""
        position = self.position((xy + 0.5) / SIDE)  # B, N, C
        padding = (kinds == POINT_PADDING)[..., None]
        return torch.where(padding, self.padding.weight[0], position + self.kinds(kinds.clamp(min=0)))

    def dense(self, previous: Tensor | None) -> Tensor:
        """Return what is added to the embedding: from B, 1, 256, 256 logits, or the vector for 'no mask yet'."""
        if previous is None:
            return self.no_mask.weight.reshape(1, CHANNELS, 1, 1)
        added: Tensor = self.mask_downscaling(previous)
        return added


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than that of its inputs."""

    def __init__(self, inner: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(CHANNELS, inner)
        self.k_proj = nn.Linear(CHANNELS, inner)
        self.v_proj = nn.Linear(CHANNELS, inner)
        self.out_proj = nn.Linear(inner, CHANNELS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from `q` B, N, C to `k` and `v` B, M, C; B, N, C."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B, heads, N, C / heads
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        # one side is a handful of tokens: written out, this is as quick on a CPU as torch's fused kernel, and a quarter
        # quicker on the way back, in training
        weights = (q * (q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)  # B, heads, N, M
        out: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Linear layers with ReLU between."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Return B, ..., last width."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


class TwoWayBlock(nn.Module):
    """Tokens look at themselves, then at the image; then the image looks at the tokens."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(CHANNELS)
        self.cross_attn_token_to_image = Attention(CHANNELS // 2)
        self.mlp = Mlp(CHANNELS, 2048, CHANNELS)
        self.cross_attn_image_to_token = Attention(CHANNELS // 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(CHANNELS) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens B, N, C and image B, H * W, C after one exchange."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        located = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, located, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(located, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two exchanges between tokens and image, and a last look of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(first=i == 0) for i in range(2))
        self.final_attn_token_to_image = Attention(CHANNELS // 2)
        self.norm_final_attn = nn.LayerNorm(CHANNELS)

    def forward(self, image: Tensor, image_pe: Tensor, token_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens B, N, C and image B, H * W, C; the tokens' own vectors serve as their positions."""
        tokens = token_pe
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image


class MaskDecoder(nn.Module):
    """Embedding and prompt vectors to mask logits and expected IoUs, one of each per mask token."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer()
        self.iou_token = nn.Embedding(1, CHANNELS)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, CHANNELS)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(CHANNELS, CHANNELS // 4, 2, stride=2),
            ChannelNorm(CHANNELS // 4),
            nn.GELU(),
            nn.ConvTranspose2d(CHANNELS // 4, CHANNELS // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            Mlp(CHANNELS, CHANNELS, CHANNELS, CHANNELS // 8) for _ in range(MASK_TOKENS)
        )
        self.iou_prediction_head = Mlp(CHANNELS, CHANNELS, CHANNELS, MASK_TOKENS)

    def forward(self, image: Tensor, image_pe: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits B, 4, 4 * rows, 4 * columns and expected IoUs B, 4.

        Args:
            image: embedding with the previous mask added, B, 256, rows, columns: 64 x 64, or the first of them.
            image_pe: positions of its cells, 1, 256, rows, columns.
            prompt: vectors of points and box corners, B, N, 256.
        """
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(prompt), -1, -1)
        tokens, seen = self.transformer(
            # laid out as read, B, H * W, C: every sum and product below is several times faster for it
            image.flatten(2).transpose(1, 2).contiguous(),
            image_pe.flatten(2).transpose(1, 2).contiguous(),
            torch.cat([outputs, prompt], dim=1),
        )
        cells_again = seen.transpose(1, 2).unflatten(2, image.shape[-2:])
        upscaled = self.output_upscaling(cells_again)  # B, 32, 4 * rows, 4 * columns
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return logits, self.iou_prediction_head(tokens[:, 0])

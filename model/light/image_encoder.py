"""The image encoder of the `light` family: TinyViT-5M with a neck, one run per image.

Batch norms of the published encoder are folded into its convolutions.

Source: TinyViT (arXiv 2207.10666; blocks from timm) as MobileSAM (arXiv 2306.14289) arranges them.
"""

from __future__ import annotations

from itertools import pairwise

from timm.models.tiny_vit import ConvNorm, MBConv, PatchEmbed, PatchMerging, TinyVitBlock
from torch import Tensor, nn

from model.light.network import CHANNELS, ChannelNorm

_WIDTHS = (64, 128, 160, 320)
_DEPTHS = (2, 2, 6, 2)
_HEADS = (2, 4, 5, 10)
_WINDOWS = (7, 7, 14, 7)


def fuse_norms(module: nn.Module) -> None:
    """Replace each convolution + batch norm of `module` by the one convolution that equals both (in eval mode)."""
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, child.fuse())  # type: ignore[no-untyped-call]
        else:
            fuse_norms(child)


class ImageEncoder(nn.Module):
    """TinyViT-5M with a neck: B, 3, 1024, 1024 normalised pixels to B, 256, 64, 64."""

    def __init__(self, *, folded: bool = True) -> None:
        """Build the encoder; `folded=False` keeps the batch norms, to read published weights into."""
        super().__init__()
        self.patch_embed = PatchEmbed(3, _WIDTHS[0], nn.GELU)
        self.stages = nn.ModuleList()
        for i, (width, depth, heads, window) in enumerate(zip(_WIDTHS, _DEPTHS, _HEADS, _WINDOWS, strict=True)):
            blocks = (
                [MBConv(width, width, 4.0, nn.GELU, 0.0) for _ in range(depth)]
                if i == 0
                else [TinyVitBlock(width, heads, window) for _ in range(depth)]
            )
            self.stages.append(nn.Sequential(*blocks))
        self.merges = nn.ModuleList(PatchMerging(a, b, nn.GELU) for a, b in pairwise(_WIDTHS))
        last = self.merges[-1].get_submodule("conv2.conv")
        assert isinstance(last, nn.Conv2d)
        last.stride = (1, 1)  # the last merge keeps the 64 x 64 map
        self.neck = nn.Sequential(
            nn.Conv2d(_WIDTHS[-1], CHANNELS, 1, bias=False),
            ChannelNorm(CHANNELS),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(CHANNELS),
        )
        if folded:
            fuse_norms(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding of normalised `pixels`: B, 3, 1024, 1024 to B, 256, 64, 64."""
        x = self.merges[0](self.stages[0](self.patch_embed(pixels)))  # B, 128, 128, 128
        x = self.stages[1](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.stages[2](self.merges[1](x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # B, 160, 64, 64
        x = self.stages[3](self.merges[2](x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # B, 320, 64, 64
        embedding: Tensor = self.neck(x)
        return embedding

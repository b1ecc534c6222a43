"""The image encoder of the `light` family: TinyViT-5M with a neck, one run per image; its tail once more per adapter.

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


class _Ending(nn.Module):
    """What the encoder ends with: its last merge, last stage and neck, under the encoder's own names."""

    def __init__(self) -> None:
        super().__init__()
        merge = PatchMerging(_WIDTHS[-2], _WIDTHS[-1], nn.GELU)
        last = merge.get_submodule("conv2.conv")
        assert isinstance(last, nn.Conv2d)
        last.stride = (1, 1)  # the last merge keeps the 64 x 64 map
        self.merges = nn.ModuleDict({"2": merge})
        self.stages = nn.ModuleDict({"3": _stage(3)})
        self.neck = nn.Sequential(
            nn.Conv2d(_WIDTHS[-1], CHANNELS, 1, bias=False),
            ChannelNorm(CHANNELS),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(CHANNELS),
        )

    def _finish(self, features: Tensor) -> Tensor:
        x = self.merges["2"](features).permute(0, 2, 3, 1)  # B, 64, 64, 320
        embedding: Tensor = self.neck(self.stages["3"](x).permute(0, 3, 1, 2))
        return embedding


class EncoderTail(_Ending):
    """The last of the encoder by itself, which an adapter may move: features to an embedding."""

    def __init__(self) -> None:
        """Build it with the batch norms folded."""
        super().__init__()
        fuse_norms(self)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embedding of features as `ImageEncoder` gives them: B, 160, 64, 64 to B, 256, 64, 64."""
        return self._finish(features)


class ImageEncoder(_Ending):
    """TinyViT-5M with a neck: B, 3, 1024, 1024 normalised pixels to features and an embedding."""

    def __init__(self, *, folded: bool = True) -> None:
        """Build the encoder; `folded=False` keeps the batch norms, to read published weights into."""
        super().__init__()
        self.patch_embed = PatchEmbed(3, _WIDTHS[0], nn.GELU)
        for i, (a, b) in enumerate(pairwise(_WIDTHS[:-1])):
            self.merges[str(i)] = PatchMerging(a, b, nn.GELU)
        for i in range(len(_WIDTHS) - 1):
            self.stages[str(i)] = _stage(i)
        if folded:
            fuse_norms(self)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the tail reads, B, 160, 64, 64, and the embedding, B, 256, 64, 64, of pixels B, 3, 1024, 1024."""
        x = self.merges["0"](self.stages["0"](self.patch_embed(pixels)))  # B, 128, 128, 128
        x = self.stages["1"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        features = self.stages["2"](self.merges["1"](x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return features, self._finish(features)


def _stage(i: int) -> nn.Sequential:
    width = _WIDTHS[i]
    if i == 0:
        return nn.Sequential(*(MBConv(width, width, 4.0, nn.GELU, 0.0) for _ in range(_DEPTHS[i])))
    return nn.Sequential(*(TinyVitBlock(width, _HEADS[i], _WINDOWS[i]) for _ in range(_DEPTHS[i])))

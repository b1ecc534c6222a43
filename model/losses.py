"""What training minimises: how far logits are from a mask.

Tensors are N, H, W: logits and targets in [0, 1] (a target pixel that a mask covers in part lies between). Values that
do not count have weight 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalised_focal(logits: Tensor, target: Tensor, weight: Tensor, *, alpha: float = 0.5, gamma: float = 2) -> Tensor:
    """Return the normalised focal loss of each mask, N.

    Focal terms are divided by the sum of their modulating factors, so that a mask that is nearly right still pulls as
    hard as one that is not. The divisor carries no gradient.

    Args:
        logits: N, H, W.
        target: N, H, W in [0, 1].
        weight: N, H, W or broadcastable, 0 where a pixel does not count (outside the photo).
        alpha: share of the positive pixels' term, 0..1.
        gamma: how strongly pixels that are right already are passed over.

    Source: RITM (arXiv 2102.06583), used by SimpleClick and GraCo with alpha 0.5, gamma 2.
    """
    probability = logits.sigmoid()
    right = 1 - (probability - target).abs()
    factor = (1 - right) ** gamma * weight
    with torch.no_grad():
        pixels = weight.expand_as(logits).sum(dim=(-1, -2))
        scale = pixels / factor.sum(dim=(-1, -2)).clamp(min=1e-6)
    share = alpha * target + (1 - alpha) * (1 - target)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return scale * (share * factor * entropy).sum(dim=(-1, -2)) / pixels.clamp(min=1)


def soft_iou(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return 1 - IoU of each mask with probabilities in place of yes and no, N, each in [0, 1].

    Args:
        logits: N, H, W.
        target: N, H, W in [0, 1].
        weight: as in `normalised_focal`.

    Source: Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks (ISVC 2016).
    """
    probability = logits.sigmoid() * weight
    target = target * weight
    both = (probability * target).sum(dim=(-1, -2))
    return 1 - both / (probability + target - probability * target).sum(dim=(-1, -2)).clamp(min=1e-6)


def shrinkage(logits: Tensor, weight: Tensor) -> Tensor:
    """Return how much of its mask each ladder loses from a level to the next one up, B, 0 for masks that only grow.

    Args:
        logits: B, L, H, W, finest level first.
        weight: as in `normalised_focal`, broadcastable to B, L, H, W.
    """
    probability = logits.sigmoid() * weight
    lost = F.relu(probability[:, :-1] - probability[:, 1:]).sum(dim=(-1, -2))  # B, L - 1
    return (lost / probability[:, :-1].sum(dim=(-1, -2)).clamp(min=1)).mean(dim=1)

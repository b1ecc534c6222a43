"""What training minimises, by hand."""

import math

import pytest
import torch

from model.losses import normalised_focal, shrinkage, soft_iou

ALL = torch.ones(1, 1, 1)
SURE = 100.0  # a logit that leaves no doubt


def logits_of(*probabilities: float) -> torch.Tensor:
    """Return one mask of one row, 1, 1, W."""
    return torch.tensor(probabilities).logit().reshape(1, 1, -1)


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)


def test_the_focal_loss_of_two_pixels_is_the_one_computed_by_hand():
    one = normalised_focal(logits_of(0.5), row(1), ALL)
    assert one.item() == pytest.approx(0.5 * math.log(2))
    weighty, light = 0.5**2, 0.25**2  # modulating factors of pixels that are wrong by 0.5 and by 0.25
    terms = weighty * 0.5 * math.log(2) + light * 0.5 * math.log(4 / 3)
    two = normalised_focal(logits_of(0.5, 0.75), row(1, 1), ALL)
    assert two.item() == pytest.approx(terms / (weighty + light))


def test_alpha_is_the_share_of_the_pixels_inside_the_mask():
    inside = normalised_focal(logits_of(0.5), row(1), ALL, alpha=0.8)
    outside = normalised_focal(logits_of(0.5), row(0), ALL, alpha=0.8)
    assert (inside / outside).item() == pytest.approx(4)


def test_a_mask_that_is_nearly_right_pulls_as_hard_as_one_that_is_not():
    near, far = (normalised_focal(logits_of(p, p), row(1, 1), ALL).item() for p in (0.9, 0.1))
    assert near / -math.log(0.9) == pytest.approx(far / -math.log(0.1))


@pytest.mark.parametrize("target", [0.0, 1.0], ids=["empty", "full"])
@pytest.mark.parametrize("answer", [-SURE, 0.0, SURE])
@pytest.mark.parametrize("loss", [normalised_focal, soft_iou])
def test_losses_and_their_gradients_are_finite_for_right_and_wrong_empty_and_full_masks(loss, answer, target):
    logits = torch.full((2, 3, 4), answer, requires_grad=True)
    value = loss(logits, torch.full((2, 3, 4), target), ALL)
    value.sum().backward()
    assert value.shape == (2,)
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


def test_a_perfect_mask_has_no_focal_loss_and_a_wrong_one_has():
    target = row(0, 1, 1, 0)
    assert normalised_focal((2 * target - 1) * SURE, target, ALL).item() == pytest.approx(0)
    assert normalised_focal((1 - 2 * target) * SURE, target, ALL).item() == pytest.approx(0.5 * SURE)


def test_soft_iou_is_nought_for_a_perfect_mask_and_one_for_a_disjoint_one():
    target = row(0, 1, 1, 0)
    assert soft_iou((2 * target - 1) * SURE, target, ALL).item() == pytest.approx(0)
    assert soft_iou((1 - 2 * target) * SURE, target, ALL).item() == pytest.approx(1)
    assert soft_iou(logits_of(0.5, 0.5), row(1, 0), ALL).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("loss", [normalised_focal, soft_iou])
def test_what_lies_outside_the_photo_changes_no_loss_and_gets_no_gradient(loss):
    logits, target, weight = logits_of(0.3, 0.8), row(0, 1), row(1, 1)
    padded = torch.cat([logits, row(5, -7)], dim=-1).requires_grad_()
    value = loss(padded, torch.cat([target, row(0, 1)], dim=-1), torch.cat([weight, row(0, 0)], dim=-1))
    value.sum().backward()
    assert value.item() == pytest.approx(loss(logits, target, weight).item())
    assert padded.grad[..., 2:].abs().max() == 0
    assert padded.grad[..., :2].abs().min() > 0


def test_a_ladder_that_only_grows_loses_nothing_and_one_that_shrinks_what_it_loses():
    growing = torch.stack([row(-9, -9, 1), row(-9, 2, 1), row(3, 3, 3)], dim=1)[0]  # L, 1, W
    assert shrinkage(growing[None], ALL).item() == 0
    assert shrinkage(growing.flip(0)[None], ALL).item() > 0.3
    two = torch.stack([logits_of(0.5, 0.5), logits_of(0.25, 0.75)], dim=1)  # 1, L, 1, W
    assert shrinkage(two, ALL).item() == pytest.approx(0.25)
    assert shrinkage(two, row(0, 1)).item() == 0

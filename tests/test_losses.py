"""The losses against hand-worked float64 cases of the paper's equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from dan_dist.model.dan import DAN
from dan_dist.model.losses import (
    VARIANCE_GUARD,
    Margin,
    Objective,
    affinity_loss,
    arcface_logits,
    center_loss,
    partition_loss,
    partition_release_loss,
)

FEATURES = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]], dtype=torch.float64)
CENTERS = torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1])


def test_center_loss() -> None:
    # |(1,2)−(0,0)|² = 5; |(0,−1)−(2,4)|² = 29; |(3,0)−(2,4)|² = 17
    assert center_loss(FEATURES, LABELS, CENTERS).tolist() == [5, 29, 17]


def test_its_gradient_is_the_same_bits_every_time_on_several_threads() -> None:
    """Where images share a centre, what they add to its gradient must have one order."""
    torch.manual_seed(0)
    features, labels = torch.randn(512, 512), torch.arange(512) % 8
    centers = torch.randn(8, 512, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = [
            torch.autograd.grad(center_loss(features, labels, centers).sum(), centers)[0]
            for _ in range(10)
        ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_affinity_loss_is_equation_2() -> None:
    # The centres' unbiased variances are 2 (of 0, 2) and 8 (of 0, 4): σ_c² = 10
    assert affinity_loss(FEATURES, LABELS, CENTERS).tolist() == [0.5, 2.9, 1.7]


def test_partition_loss_is_equation_6() -> None:
    heads = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[1.0, 0.0], [1.0, 6.0]]], dtype=torch.float64)
    # Unbiased variances over the k = 2 heads: image 0 → (2, 0), image 1 → (0, 18)
    e = VARIANCE_GUARD
    expected = [
        (math.log(1 + 2 / (2 + e)) + math.log(1 + 2 / e)) / 2,
        (math.log(1 + 2 / e) + math.log(1 + 2 / (18 + e))) / 2,
    ]
    assert partition_loss(heads).tolist() == pytest.approx(expected, rel=1e-14)


def test_the_releases_partition_loss_is_one_logarithm() -> None:
    """σ² averaged over images and channels: of (2, 0) and (0, 18), and of (3, 12) alone."""
    heads = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[1.0, 0.0], [1.0, 6.0]]], dtype=torch.float64)
    assert partition_release_loss(heads).item() == pytest.approx(math.log(1 + 2 / 5), rel=1e-14)
    three = torch.tensor([[[0.0, 0.0], [3.0, 6.0], [0.0, 6.0]]], dtype=torch.float64)
    # Unbiased over k = 3: of 0, 3, 0 it is 3, of 0, 6, 6 it is 12
    assert partition_release_loss(three).item() == pytest.approx(math.log(1 + 3 / 7.5), rel=1e-14)
    equal = torch.ones(2, 4, 3, dtype=torch.float64, requires_grad=True)
    loss = partition_release_loss(equal)
    assert loss.item() == pytest.approx(math.log(1 + 4 / 2**-52), rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, equal)
    assert gradient.isfinite().all()


def test_arcface_is_its_equation_3() -> None:
    """The margin is an angle on the own class alone; beyond π − m a line goes on from there."""
    margin = Margin(64.0, 0.5)
    angles = torch.tensor([0.0, 0.3, 1.2, math.pi - 0.51, math.pi], dtype=torch.float64)
    cosines = torch.stack([torch.full((5,), 0.4, dtype=torch.float64), angles.cos()], dim=1)
    cosines.requires_grad_()
    logits = arcface_logits(cosines, torch.ones(5, dtype=torch.int64), margin)
    assert logits[:, 0].tolist() == [64 * 0.4] * 5
    expected = [64 * math.cos(angle + 0.5) for angle in angles.tolist()[:4]]
    expected.append(64 * (-1 - 0.5 * math.sin(0.5)))
    assert logits[:, 1].tolist() == pytest.approx(expected, abs=0.02)  # at 0 the sine is guarded
    assert logits[1:, 1].tolist() == pytest.approx(expected[1:], rel=1e-12)
    (gradient,) = torch.autograd.grad(logits.sum(), cosines)
    assert gradient.isfinite().all() and (gradient[1:] > 0).all()
    plain = arcface_logits(cosines, torch.zeros(5, dtype=torch.int64), Margin(2.0, 0.0))
    assert torch.equal(plain, 2 * cosines)


def test_cosines_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    network, images = DAN(5, 0, cosine=True), torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images)
    unit, weights = F.normalize(output.features), F.normalize(network.classifier.weight)
    assert output.logits.dtype == torch.float32
    assert torch.allclose(output.logits, unit @ weights.T, rtol=0, atol=1e-6)


def test_attention_fusion_is_equation_5() -> None:
    """log-softmax across the heads, summed, linear, BatchNorm on the logits."""
    torch.manual_seed(0)
    network = DAN(classes=3, heads=2).double().eval()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        output = network(images)
        x = network.backbone(images)
        a, b = (head(x) for head in network.heads)
    normaliser = (a.exp() + b.exp()).log()
    fused = (a - normaliser) + (b - normaliser)
    logits = F.linear(fused, network.classifier.weight, network.classifier.bias)
    logits = logits / math.sqrt(1 + network.logit_norm.eps)  # fresh running statistics: 0 and 1
    assert torch.allclose(output.logits, logits, rtol=1e-10)
    assert output.heads is not None and output.heads.shape == (4, 2, 512)
    assert torch.allclose(output.heads.exp().sum(dim=1), torch.ones(4, 512).double())


def test_the_mean_of_heads_is_classified_and_their_log_softmax_partitioned() -> None:
    torch.manual_seed(0)
    plain = DAN(classes=3, heads=3).double().eval()
    network = DAN(classes=3, heads=3, fusion="mean").double().eval()
    network.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        output, other = network(images), plain(images)
        x = network.backbone(images)
        attended = torch.stack([head(x) for head in network.heads])
    weight, bias = network.classifier.weight, network.classifier.bias
    logits = F.linear(attended.mean(dim=0), weight, bias) / math.sqrt(1 + network.logit_norm.eps)
    assert torch.allclose(output.logits, logits, rtol=1e-10)
    assert not torch.allclose(output.logits, other.logits)
    assert torch.equal(output.heads, other.heads)
    one, mean = DAN(3, 1).eval(), DAN(3, 1, fusion="mean").eval()
    mean.load_state_dict(one.state_dict())
    assert torch.equal(one(images.float()).logits, mean(images.float()).logits)


@pytest.mark.parametrize("fcn", ["affinity", "center", "none"])
@pytest.mark.parametrize("afn", ["partition", "partition_release", "none"])
def test_objective_is_equation_7_and_its_parts_add_up(fcn: str, afn: str) -> None:
    torch.manual_seed(0)
    objective = Objective(DAN(5, 2), 5, fcn=fcn, afn=afn, lambda_fcn=0.5, lambda_afn=2.0).double()
    images, labels = torch.randn(6, 3, 32, 32).double(), torch.arange(6) % 5
    loss = objective(images, labels, 6)
    total, classification, fcn_loss, afn_loss = loss.parts.tolist()
    assert total == pytest.approx(classification + 0.5 * fcn_loss + 2 * afn_loss, rel=1e-12)
    assert classification == pytest.approx(F.cross_entropy(loss.logits, labels).item(), rel=1e-12)
    assert (fcn_loss > 0) == (fcn != "none") and (afn_loss > 0) == (afn != "none")
    loss.total.backward()
    assert all(p.grad is not None for p in objective.parameters())  # DDP waits for every one


def test_one_head_has_no_partition_loss() -> None:
    objective = Objective(DAN(5, 1), 5)
    loss = objective(torch.randn(4, 3, 32, 32), torch.arange(4), 4)
    assert loss.parts[3] == 0 and torch.isfinite(loss.total)


def test_part_of_a_global_batch_contributes_its_share() -> None:
    """Without BatchNorm in play (eval), the parts of a batch add up to the whole."""
    torch.manual_seed(0)
    objective = Objective(DAN(5, 2), 5).double().eval()
    images, labels = torch.randn(7, 3, 32, 32).double(), torch.arange(7) % 5
    whole = objective(images, labels, 7).parts
    parts = objective(images[:3], labels[:3], 7).parts + objective(images[3:], labels[3:], 7).parts
    assert torch.allclose(whole, parts, rtol=1e-12)

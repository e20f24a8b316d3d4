"""Each paper's mathematics, as shipped, against the formula written slowly in float64, and in its limiting cases."""
import ast
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as transforms
from PIL import Image, ImageOps
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import InterpolationMode

import common
import ewb_fdr
import hinge_ce
import lort
import lwr
import rbl
from conftest import ROOT, SCRIPTS


def rand(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))  # float64


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


# ---- RBL

@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 3.0])
def test_rotation(size):
    base, _ = torch.linalg.qr(rand(64, 64))
    x = rand(64, 64, seed=1) * size
    lower = x.tril(-1)
    slow = base @ torch.matrix_exp(lower - lower.T)
    assert (rbl.rotation(x, base) - slow).abs().max() < 1e-10
    single = rbl.rotation(x.float(), base.float())
    assert (single.double() - slow).abs().max() < 1e-5 and (single @ single.T - torch.eye(64)).abs().max() < 1e-5
    if size == 0:
        assert (single == base.float()).all()


def test_rotation_gradient_and_what_it_reads():
    base, _ = torch.linalg.qr(rand(5, 5))
    x = rand(5, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rbl.rotation(x, base), x)
    rbl.rotation(x, base).square()[:, 0].sum().backward()
    assert (x.grad.triu() == 0).all() and x.grad.tril(-1).abs().sum() > 0


def test_frame():
    frame = rbl.etf_frame(256, 100).double()
    gram = F.normalize(frame, dim=0).T @ F.normalize(frame, dim=0)
    off = gram[~torch.eye(100).bool()]
    assert frame.shape == (256, 100) and (off + 1 / 255).abs().max() < 1e-6
    assert (frame.norm(dim=0) - math.sqrt(1 - 1 / 256)).abs().max() < 1e-6
    with pytest.raises(SystemExit):
        rbl.etf_frame(9, 10)


def test_head_is_g_times_r_times_e():
    head = rbl.RotatedHead(6, 8, 5, torch.Generator().manual_seed(0)).double()
    assert torch.linalg.det(head.base).item() == pytest.approx(1) and rbl.angle_moved(head) == pytest.approx(0, abs=1e-3)
    h = rand(3, 6)
    with torch.no_grad():
        head.x.copy_(rand(8, 8, seed=2))
        a = head.x.tril(-1) - head.x.tril(-1).T
        slow = (h @ head.g.weight.T + head.g.bias) @ head.base @ torch.matrix_exp(a) @ (torch.eye(8) - 1 / 8)[:, :5].double()
        assert (head(h) - slow).abs().max() < 1e-6
    assert rbl.angle_moved(head) > 10
    fixed = rbl.RotatedHead(6, 8, 5, torch.Generator().manual_seed(0), learn=False)
    assert (fixed(h.float()) - (fixed.g(h.float()) @ fixed.base @ fixed.frame)).abs().max() < 1e-6 and not fixed.x.requires_grad


def test_cutout_equals_the_slow_version():
    images = torch.randint(1, 256, (300, 32, 32, 3), dtype=torch.uint8)
    fast = rbl.cutout(images, torch.Generator().manual_seed(5))
    centre = torch.randint(0, 32, (2, 300, 1), generator=torch.Generator().manual_seed(5))
    for k in range(300):
        y, x = centre[:, k, 0].tolist()
        slow = images[k].clone()
        slow[max(0, y - 8):max(0, y + 8), max(0, x - 8):max(0, x + 8)] = 0
        assert (slow == fast[k]).all()
    share = (rbl.cutout(torch.ones(20000, 32, 32, 3, dtype=torch.uint8), torch.Generator()) == 0).double().mean()
    assert abs(share - 0.1914) < 0.003  # the mean of a clipped 16 x 16 square


OPERATIONS = sorted({(name, level) for pair in transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies
                     for name, _, level in pair}, key=str)


def by_pillow(image, name, level, sign):
    """The operation on a Pillow image: shift and threshold as in the authors' code, the rest as torchvision's AutoAugment has it."""
    space = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (32, 32))
    magnitudes, signed = space[name]
    magnitude = float(magnitudes[level]) if level is not None else 0.0
    if name.startswith("Translate"):
        shift = -sign * 150 / 331 * 32 * level / 9
        matrix = (1, 0, shift, 0, 1, 0) if name == "TranslateX" else (1, 0, 0, 0, 1, shift)
        return np.asarray(image.transform(image.size, Image.AFFINE, matrix, fillcolor=(128,) * 3)).astype(int)
    if name == "Solarize":
        return np.asarray(ImageOps.solarize(image, 256 - 256 * level / 9)).astype(int)
    return np.asarray(_apply_op(image, name, sign * magnitude if signed else magnitude, InterpolationMode.NEAREST, [128.0] * 3)).astype(int)


def smooth_images(n):
    x = F.interpolate(rand(n, 3, 8, 8), 32, mode="bicubic")
    return (128 + 60 * x).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name, level", OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_operation_against_pillow(name, level, sign):
    images = smooth_images(8)
    fast = rbl.operation(images, name, level, sign).permute(0, 2, 3, 1).numpy().astype(int)
    slow = np.stack([by_pillow(Image.fromarray(image.permute(1, 2, 0).numpy()), name, level, sign) for image in images])
    difference = np.abs(fast - slow)
    assert np.mean(difference > 2) < 0.03, (difference.max(), np.mean(difference > 2))
    assert difference.max() == 0 or name not in ("TranslateX", "TranslateY", "Solarize", "Posterize", "Invert")
    assert rbl.operation(images, name, level, sign).dtype == torch.uint8


def test_rbl_augments_in_three_steps_and_hinge_ce_crops_by_its_margin(call, monkeypatch):
    steps, margins, real = [], [], common.crop_flip

    def crop_flip(images, generator, pad=None):
        margins.append(pad)
        return real(images, generator, pad)
    monkeypatch.setattr(common, "crop_flip", crop_flip)
    assert call("hinge_ce", "--epochs", "1", "--pad", "3") == 0 and set(margins) == {3}
    monkeypatch.setattr(common, "crop_flip", lambda images, generator: steps.append("crop_flip") or images)
    for name in ("autoaugment", "cutout"):
        monkeypatch.setattr(rbl, name, lambda images, generator, name=name: steps.append(name) or images)
    rbl.strong(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.Generator())
    assert steps == ["crop_flip", "autoaugment", "cutout"]


def test_autoaugment_draws_as_the_policy_says():
    images = smooth_images(400).permute(0, 2, 3, 1).contiguous()
    fast = rbl.autoaugment(images.clone(), torch.Generator().manual_seed(0)).numpy().astype(int)
    draws = torch.rand(5, 400, generator=torch.Generator().manual_seed(0))
    policies, wrong = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies, []
    for k in range(400):
        policy, image = policies[int(draws[0, k] * 25)], Image.fromarray(images[k].numpy())
        for step, (name, chance, level) in enumerate(policy):
            if draws[1 + step, k] < chance:
                image = Image.fromarray(by_pillow(image, name, level, -1 if draws[3 + step, k] < 0.5 else 1).astype(np.uint8))
        wrong.append(np.mean(np.abs(np.asarray(image).astype(int) - fast[k]) > 8))
    assert np.mean(wrong) < 0.03 and np.mean(np.array(wrong) > 0.2) < 0.05
    assert (fast == images.numpy()).all((1, 2, 3)).mean() < 0.3


# ---- EWB-FDR and WB

@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_class_balanced_weights(beta):
    counts = [500, 60, 7, 1]
    v = [(1 - beta) / (1 - beta**n) for n in counts]
    assert common.class_balanced_weights(counts, beta).tolist() == pytest.approx([4 * w / sum(v) for w in v])


def test_both_class_balanced_losses():
    logits, labels, weights = rand(6, 4), torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([0.2, 0.5, 1.0, 2.3]).double()
    bce = ce = 0.0
    for z, y in zip(logits.tolist(), labels.tolist()):
        p = softmax(z)
        ce += weights[y].item() * -math.log(p[y]) / 6
        for j in range(4):
            bce += weights[y].item() * -math.log(p[j] if j == y else 1 - p[j]) / 24
    assert ewb_fdr.class_balanced_loss(logits, labels, weights, "ce").item() == pytest.approx(ce)
    assert ewb_fdr.class_balanced_loss(logits.float(), labels, weights.float(), "bce").item() == pytest.approx(bce, rel=1e-5)
    assert ewb_fdr.class_balanced_loss(torch.full((1, 4), math.nan), torch.tensor([1]), weights.float(), "bce").isnan()  # and no error
    ours, torchs = (logits.float().mul(5).requires_grad_() for _ in range(2))
    ewb_fdr.class_balanced_loss(ours, labels, weights.float(), "bce").backward()
    (weights.float()[labels][:, None] * F.binary_cross_entropy(torchs.softmax(1), F.one_hot(labels).float(), reduction="none")).mean().backward()
    assert torch.allclose(ours.grad, torchs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_log_one_minus_softmax(size):
    """Against the sum over the other classes in float64, value and gradient; a sure wrong class keeps its gradient."""
    logits = (size * rand(50, 7)).requires_grad_()
    others = logits[:, None].expand(50, 7, 7).masked_fill(torch.eye(7).bool(), -torch.inf)
    slow = others.logsumexp(2) - logits.logsumexp(1, keepdim=True)
    fast = common.log_one_minus_softmax(logits)
    assert torch.allclose(fast, slow, rtol=1e-10)
    upstream = rand(50, 7, seed=1)
    a, b = (torch.autograd.grad(value, logits, upstream)[0] for value in (fast, slow))
    assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)
    assert torch.allclose(common.log_one_minus_softmax(logits.float()).double(), slow, rtol=1e-4, atol=1e-6)
    sure = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    ewb_fdr.class_balanced_loss(sure, torch.tensor([1]), torch.ones(3), "bce").backward()
    assert sure.grad[0, 0].item() == pytest.approx(2 / 3) and sure.grad[0, 1].item() == pytest.approx(-0.5)


def test_feature_regularization_and_max_norm():
    feat = rand(5, 3)
    assert ewb_fdr.feature_regularization(feat).item() == pytest.approx(sum(v * v for f in feat.tolist() for v in f) / 10)
    weight = rand(4, 3)
    norms = [math.sqrt(sum(v * v for v in w)) for w in weight.tolist()]
    delta = common.max_norm_threshold(weight)
    assert delta.item() == pytest.approx(min(norms) + 0.1 * (max(norms) - min(norms)))
    clipped = common.max_norm_(weight.clone(), delta)
    for before, after, norm in zip(weight, clipped, norms):
        assert torch.allclose(after, before * min(1, delta.item() / norm))
    assert (common.max_norm_(weight.clone(), 1e9) == weight).all()
    assert common.max_norm_(torch.zeros(2, 3), 0.5).isfinite().all()


def test_logit_adjustments():
    logits, counts = rand(5, 3), [90, 9, 1]
    for i in range(5):
        for k, n in enumerate(counts):
            assert ewb_fdr.additive_la(logits, counts, 1.3)[i, k].item() == pytest.approx(logits[i, k].item() - 1.3 * math.log(n / 100))
            assert ewb_fdr.multiplicative_la(logits, counts, 0.7)[i, k].item() == pytest.approx(logits[i, k].item() * (n / 100) ** -0.7)
    assert (ewb_fdr.additive_la(logits, counts, 0.0) == logits).all() and (ewb_fdr.multiplicative_la(logits, counts, 0.0) == logits).all()


def test_unit_rows_and_the_choice_of_strength():
    fc, feat = torch.nn.Linear(4, 3).double(), rand(5, 4)
    for i in range(5):
        for k in range(3):
            w = fc.weight[k].tolist()
            slow = sum(a * b for a, b in zip(w, feat[i].tolist())) / math.sqrt(sum(v * v for v in w)) + fc.bias[k].item()
            assert ewb_fdr.unit_rows(fc, feat)[i, k].item() == pytest.approx(slow)
    counts, labels = [90, 9, 1], torch.tensor([0, 1, 2])
    logits = torch.tensor([[9.0, 0, 0], [2.0, 0, -9], [4.0, 0, 0]])  # right while tau < 2.00, from 0.87 on, from 0.89 on
    assert ewb_fdr.choose(ewb_fdr.additive_la, logits, labels, counts) == 0.9


def test_fisher_ratio_against_loops():
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 4, 200)
    feat = rng.randn(200, 6) + rng.randn(4, 6)[labels]
    mean, within, between = feat.mean(0), np.zeros((6, 6)), np.zeros((6, 6))
    for k in range(4):
        own = feat[labels == k]
        between += len(own) * np.outer(own.mean(0) - mean, own.mean(0) - mean)
        for f in own:
            within += np.outer(f - own.mean(0), f - own.mean(0))
    slow = np.trace(np.linalg.inv(within) @ between)
    assert ewb_fdr.fisher_ratio(torch.tensor(feat), torch.tensor(labels)) == pytest.approx(slow, rel=1e-9)
    dead = np.concatenate([feat, np.full((200, 2), 3.0)], 1)  # dimensions that never vary are left out
    assert ewb_fdr.fisher_ratio(torch.tensor(dead), torch.tensor(labels)) == pytest.approx(slow, rel=1e-9)
    absent = torch.tensor(labels + (labels > 1))  # no sample has label 2
    assert ewb_fdr.fisher_ratio(torch.tensor(feat), absent) == pytest.approx(slow, rel=1e-9)
    for bad in (feat[:3], feat[:, [0, 0]], np.ones((200, 6))):  # no variance within; a doubled dimension; nothing varies
        assert math.isnan(ewb_fdr.fisher_ratio(torch.tensor(bad), torch.tensor(labels[:len(bad)] if len(bad) > 3 else [0, 1, 2])))


def test_cosines_and_norms_of_the_features():
    labels, counts = torch.tensor([0, 0, 0, 1, 1, 2]), [300, 50, 5]
    feat = rand(6, 4)
    means = [[sum(f[d] for f, y in zip(feat.tolist(), labels) if y == k) / n for d in range(4)] for k, n in ((0, 3), (1, 2), (2, 1))]
    assert np.allclose(ewb_fdr.class_means(feat, labels), means)
    cosines = []
    for a in range(3):
        for b in range(3):
            if a != b:
                pairs = [F.cosine_similarity(x, y, dim=0).item() for x in feat[labels == a] for y in feat[labels == b]]
                cosines.append(sum(pairs) / len(pairs))
    assert ewb_fdr.cosine_between_classes(feat, labels) == pytest.approx(sum(cosines) / 6)
    norms = [math.sqrt(sum(v * v for v in mean)) for mean in means]
    expected = {"all": sum(norms) / 3, "many": norms[0], "medium": norms[1], "few": norms[2]}
    assert ewb_fdr.norms_of_means(feat, labels, counts) == pytest.approx(expected)
    lengths = torch.tensor([1.0, 2, 3, 4, 5, 6]).double()[:, None]
    assert ewb_fdr.cosine_between_classes(lengths * torch.ones(6, 4), labels) == pytest.approx(1)  # the cone effect
    assert ewb_fdr.cosine_between_classes(lengths * torch.eye(4)[labels], labels) == pytest.approx(0, abs=1e-12)


# ---- LWR

def slow_lwr(weight, theta, project):
    w, total = weight.tolist(), 0.0
    norm = [math.sqrt(sum(v * v for v in row)) for row in w]
    for i in range(len(w)):
        for j in range(len(w)):
            dot = sum(a * b for a, b in zip(w[i], w[j]))
            if i != j and dot / norm[i] / norm[j] > theta:
                total += dot
    return total / len(w)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.2, 0.4, 1.0])
def test_lwr_value_and_gradient(theta):
    weight = (rand(7, 5) + 0.7).requires_grad_()
    gradients = {}
    for project in (True, False):
        value = lwr.lwr(weight, theta, project)
        assert value.item() == pytest.approx(slow_lwr(weight.detach(), theta, project))  # sg changes gradients, not values
        gradients[project], = torch.autograd.grad(value, weight)
    radial = (gradients[True] * weight).sum(1)
    assert radial.abs().max() < 1e-12
    pairs = lwr.gate(weight, theta).double()
    assert torch.allclose(gradients[False], 2 / 7 * pairs @ weight)
    direction = F.normalize(weight.detach())
    tangential = gradients[False] - (gradients[False] * direction).sum(1, keepdim=True) * direction
    assert torch.allclose(gradients[True], tangential)
    if theta == 1:
        assert (gradients[True] == 0).all() and (gradients[False] == 0).all()
    if 0 <= theta < 1:
        assert ((gradients[False] * weight).sum(1).abs() > 1e-3).any()


def test_lwr_gate_at_its_ends():
    for seed in range(20):
        weight = rand(9, 4, seed=seed).float()
        weight[1] = 3 * weight[0]  # parallel: the cosine may round to more than 1
        assert lwr.gate(weight, 1.0).sum() == 0 and lwr.gate(weight, -1.0).sum() == 72


def test_lwr_base_losses():
    logits, labels, counts = rand(5, 3), torch.tensor([0, 1, 2, 2, 0]), [50, 20, 2]
    log_counts, weights = torch.tensor(counts).double().log(), torch.tensor([0.5, 1.0, 2.0]).double()
    expected = {"bs": [], "la": [], "focal": []}
    for z, y in zip(logits.tolist(), labels.tolist()):
        p, balanced = softmax(z), [n * math.exp(v) for n, v in zip(counts, z)]
        expected["bs"].append(-math.log(balanced[y] / sum(balanced)))
        expected["la"].append(-math.log(p[y]))
        expected["focal"].append((1 - p[y]) ** 1.5 * -math.log(p[y]))
    for base, values in expected.items():
        assert lwr.base_loss(logits, labels, log_counts, weights, base, 1.5).item() == pytest.approx(sum(values) / 5)
    w = weights[labels]
    drw = lwr.base_loss(logits, labels, log_counts, weights, "ce-drw", 0)
    assert drw.item() == pytest.approx(sum(a * b for a, b in zip(w.tolist(), expected["la"])) / w.sum().item())
    assert lwr.base_loss(logits, labels, log_counts, weights, "focal", 0.0).item() == pytest.approx(sum(expected["la"]) / 5)
    sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)  # p_y = 1, where the slope of (1 - p)^0.5 is infinite
    lwr.base_loss(sure, torch.tensor([0]), log_counts, weights, "focal", 0.5).backward()
    assert sure.grad.isfinite().all()


# ---- LORT

@pytest.mark.parametrize("delta", [0.0, 0.2, 0.98])
def test_lort_loss(delta):
    logits, labels, slow = rand(6, 5), torch.tensor([0, 1, 2, 3, 4, 4]), 0.0
    for z, y in zip(logits.tolist(), labels.tolist()):
        p = softmax(z)
        slow -= sum((delta / 5 + (1 - delta) * (i == y)) * math.log(p[i]) for i in range(5)) / 6
    assert lort.lort_loss(logits, labels, delta).item() == pytest.approx(slow)


def test_lort_optimum_is_the_gap_of_the_targets():
    z = torch.zeros(1, 100, dtype=torch.float64)
    z[0, 3] = math.log(1 + 100 * 0.02 / 0.98)  # 1.112, where the softmax equals the targets
    z.requires_grad_()
    lort.lort_loss(z, torch.tensor([3]), 0.98).backward()
    assert z.grad.abs().max() < 1e-12


def test_lort_metrics():
    logits, labels = rand(9, 3), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1])
    for i in range(3):
        own = [logits[n, i].item() for n in range(9) if labels[n] == i]
        other = [logits[n, i].item() for n in range(9) if labels[n] != i]
        gap = sum(own) / len(own) - sum(other) / len(other)
        assert lort.logits_magnitude(logits, labels)[i].item() == pytest.approx(gap)
        assert lort.regularized_std(logits, labels)[i].item() == pytest.approx(np.std(own + other) / gap)
    half = torch.full((70000, 2), 2.0).half()  # as test_logits.pt of ImageNet-LT has them: the sums are no halves
    assert lort.logits_magnitude(half, torch.arange(70000) % 2).tolist() == [0, 0]


# ---- LORT's Table 1

COUNTS = [90.0, 30.0, 9.0, 2.0]


def head(method, s=None, lr=0.1, weight_decay=0.0, seed=0):
    """A lort.Classifier in float64: 4 classes, 3 dimensions."""
    fc = torch.nn.Linear(3, 4).double()
    with torch.no_grad():
        fc.weight.copy_(rand(4, 3, seed=seed))
        fc.bias.copy_(rand(4, seed=seed + 1))
        classifier = lort.Classifier(fc, method, s, lr, weight_decay)
        if method == "lws":
            classifier.c.copy_(0.5 + torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    return classifier


def slow_logits(fc, f, n):
    rows = []
    for x in f.tolist():
        row = []
        for w, b, c, n_i in zip(fc.w.tolist(), fc.b.tolist(), fc.c.tolist(), n):
            inner, norm = sum(p * q for p, q in zip(w, x)), math.sqrt(sum(p * p for p in w))
            row.append({"cosine": (fc.s or 0) * inner / norm, "lws": c * inner + b, "tau-norm": inner / norm ** (fc.s or 0) + b,
                        "la": inner + b - (fc.s or 0) * math.log(n_i)}.get(fc.method, inner + b))
        rows.append(row)
    return rows


@pytest.mark.parametrize("method, s", [("cosine", 16), ("cosine", 1), ("lws", None), ("tau-norm", 1.9), ("tau-norm", 0.0), ("la", 1.3),
                                       ("la", 0.0), ("bs", None), ("lort", 0.98)])
def test_table_1_classifiers(method, s):
    fc, f, n = head(method, s), rand(6, 3, seed=5), torch.tensor(COUNTS).double()
    z = fc(f, n)
    assert np.allclose(z.detach(), slow_logits(fc, f, COUNTS))
    if s == 0.0:  # no adjustment: the classifier as it was
        assert torch.allclose(z, F.linear(f, fc.w, fc.b))
    if method == "cosine":  # at test |f| is left out: the decisions are those of the cosine
        cosine = F.cosine_similarity(f[:, None], fc.w[None], dim=2)
        assert (z.argmax(1) == cosine.argmax(1)).all()
    fc.w.data.zero_()
    assert fc(f, n).isfinite().all()


def slow_loss(fc, f, labels, n):
    total = 0.0
    if fc.method == "cosine":
        f = torch.stack([x / math.sqrt(sum(v * v for v in x.tolist())) for x in f])
    for z, y in zip(slow_logits(fc, f, n), labels.tolist()):
        if fc.method == "ldam":  # C / n^(1/4), where C / min n^(1/4) is the margin
            z[y] -= fc.s * min(n) ** 0.25 / n[y] ** 0.25
        if fc.method == "bs":
            z = [v + math.log(n_i) for v, n_i in zip(z, n)]
        p = softmax(z)
        if fc.method == "cb":
            r = [(1 - fc.s) / (1 - fc.s**n_i) for n_i in n]
            total += r[y] / (sum(r) / 4) * sum(-math.log(p[j] if j == y else 1 - p[j]) for j in range(4)) / 4
        elif fc.method == "focal":
            total += (1 - p[y]) ** fc.s * -math.log(p[y])
        elif fc.method == "lort":
            total -= sum((fc.s / 4 + (1 - fc.s) * (i == y)) * math.log(p[i]) for i in range(4))
        else:
            total -= math.log(p[y])
    return total / len(labels)


@pytest.mark.parametrize("method, s", [("cosine", 16), ("cosine", 1), ("lws", None), ("ldam", 0.5), ("ldam", 8), ("bs", None),
                                       ("re-sampling", None), ("focal", 1), ("focal", 2.5), ("cb", 0.9999), ("cb", 0.5),
                                       ("max-norm", None), ("lort", 0.98)])
def test_table_1_loss(method, s):
    fc, f, labels, n = head(method, s), rand(7, 3, seed=5), torch.tensor([0, 1, 2, 3, 3, 0, 0]), torch.tensor(COUNTS).double()
    assert lort.table_1_loss(fc, f, labels, n).item() == pytest.approx(slow_loss(fc, f, labels, COUNTS))
    assert lort.table_1_loss(fc.float(), f.float(), labels, n.float()).item() == pytest.approx(slow_loss(fc, f, labels, COUNTS), rel=1e-5)


def test_table_1_losses_in_their_limits():
    f, labels, n, equal = rand(7, 3, seed=5), torch.tensor([0, 1, 2, 3, 3, 0, 0]), torch.tensor(COUNTS).double(), torch.full((4,), 9.0)

    def loss(method, s, n):
        return lort.table_1_loss(head(method, s), f, labels, n).item()
    z = head("max-norm")(f, n)
    ce = F.cross_entropy(z, labels).item()
    assert loss("focal", 0, n) == loss("ldam", 0, n) == loss("lort", 0.0, n) == pytest.approx(ce)
    assert loss("bs", None, equal) == pytest.approx(ce)
    assert loss("ldam", 0.7, equal) == pytest.approx(F.cross_entropy(z - 0.7 * F.one_hot(labels), labels).item())
    plain = F.binary_cross_entropy(z.softmax(1), F.one_hot(labels).double()).item()
    assert loss("cb", 0.0, n) == pytest.approx(plain) and loss("cb", 0.9999, equal) == pytest.approx(plain)


@pytest.mark.parametrize("method, s", [("bs", None), ("lws", None), ("cosine", 16), ("re-sampling", None), ("max-norm", None),
                                       ("lort", 0.98), ("cb", 0.9999)])
def test_heads_are_trained_each_with_its_own_rate_and_decay(method, s):
    """Against SGD with momentum, written out, for one head after the other."""
    pairs, n = [(0.3, 0.0), (0.05, 0.2)], torch.tensor([6.0, 3.0, 2.0, 1.0]).double()
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3]).repeat(2)
    feat, stages = rand(24, 3, seed=7), []
    heads = torch.nn.ModuleList(head(method, s, *pair) for pair in pairs)
    run = SimpleNamespace(device="cpu", log=lambda losses: stages.append(len(losses)),
                          epochs=lambda stage, total, net, optimizer: range(total))
    lort.retrain(run, SimpleNamespace(epochs2=3, seed=4, batch_size=5), method, heads, feat, labels, n)
    assert stages == [3, 3, 3]  # 12 of the 24 views an epoch, in batches of 5, 5, 2
    for fc, (rate, decay) in zip(heads, pairs):
        slow = head(method, s, rate, decay)
        norms = slow.w.detach().norm(dim=1)
        delta = norms.min() + 0.1 * (norms.max() - norms.min())
        momentum = {name: 0.0 for name, _ in slow.named_parameters()}
        for epoch in range(3):
            generator = torch.Generator().manual_seed(4000 + epoch)
            order = torch.randperm(24, generator=generator)
            if method == "re-sampling":
                order = torch.multinomial(1 / n[labels], 24, True, generator=generator)
            for index in order[:12].split(5):
                slow.zero_grad()
                lort.table_1_loss(slow, feat[index], labels[index], n).backward()
                with torch.no_grad():
                    for name, p in slow.named_parameters():
                        if p.grad is not None:
                            momentum[name] = 0.9 * momentum[name] + p.grad + decay * p
                            p -= rate * 0.5 * (1 + math.cos(math.pi * epoch / 3)) * momentum[name]
            if method == "max-norm":
                common.max_norm_(slow.w.data, delta)
        start = head(method, s)
        for name in ("w", "b", "c"):
            assert torch.allclose(getattr(fc, name), getattr(slow, name), atol=1e-6), name
            learned = name in {"lws": ("c",), "cosine": ("w",)}.get(method, ("w", "b"))
            assert torch.equal(getattr(fc, name), getattr(start, name)) != learned


def test_re_sampling_draws_every_class_equally_often():
    labels, seen = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3]).repeat(2), []
    real = lort.table_1_loss

    def loss(fc, f, y, n):
        seen.extend(y.tolist())
        return real(fc, f, y, n)
    run = SimpleNamespace(device="cpu", log=len, epochs=lambda stage, total, *_: range(total))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lort, "table_1_loss", loss)
        lort.retrain(run, SimpleNamespace(epochs2=50, seed=0, batch_size=20), "re-sampling", torch.nn.ModuleList([head("re-sampling")]),
                     rand(200, 3), labels, torch.tensor([60.0, 30.0, 9.0, 1.0]))
    assert len(seen) == 5000 and np.bincount(seen) / 5000 == pytest.approx([0.25] * 4, abs=0.03)


# ---- HingeCE

def slow_hinge(feat, labels, weight, tau_plus, tau_minus):
    out = []
    for u, y in zip(feat.tolist(), labels.tolist()):
        row, norm = [], math.sqrt(sum(v * v for v in u))
        for k, w in enumerate(weight.tolist()):
            inner, length = sum(a * b for a, b in zip(u, w)), math.sqrt(sum(v * v for v in w))
            row.append(min(inner, norm * length * math.cos(tau_plus[k])) if k == y else
                       max(inner, norm * length * math.cos(tau_minus[y])))
        out.append(row)
    return out


def test_hinge_logits():
    weight, labels = common.simplex_etf(5, 8, torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 3, 4, 0, 4])
    feat = 3 * weight[labels] + 0.7 * rand(7, 8)
    for tau_minus in ([math.pi] * 5, [1.2] * 5, [math.pi, 1.2, 1.3, 1.0, 1.1]):
        tau_plus, tau_minus = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.2]).double(), torch.tensor(tau_minus).double()
        slow = slow_hinge(feat, labels, weight, tau_plus.tolist(), tau_minus.tolist())
        assert np.allclose(hinge_ce.hinge_logits(feat, labels, weight, tau_plus, tau_minus), slow, atol=1e-12)
    along = 3 * weight.float()[labels]  # where rounding could mistake <w, u> for |u| |w| cos 0
    assert (hinge_ce.hinge_logits(along, labels, weight.float(), torch.zeros(5), torch.full((5,), math.pi)) == along @ weight.float().T).all()


def test_hinge_gradients():
    weight, labels = common.simplex_etf(4, 4, torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 3])
    inside = (5 * weight + 0.05 * rand(4, 4)).requires_grad_()
    tau, none = torch.full((4,), math.radians(30)).double(), torch.full((4,), math.pi).double()
    own = hinge_ce.hinge_logits(inside, labels, weight, tau, none).diagonal().sum()
    assert (torch.autograd.grad(own, inside)[0] == 0).all()  # in the cone the logit is constant: |u| is not differentiated
    theta = math.acos(-1 / 3)
    logits = hinge_ce.hinge_logits(inside, labels, weight, tau, theta - tau)
    assert (torch.autograd.grad(F.cross_entropy(logits, labels), inside)[0] == 0).all()  # Theorem 1
    logits = hinge_ce.hinge_logits(inside, labels, weight, tau, none)
    assert torch.autograd.grad(F.cross_entropy(logits, labels), inside)[0].abs().max() > 1e-5  # with tau- = pi it does not hold


def test_numerical_rank_and_nc1():
    """Fig. 4's two measures against loops, and for collinear, orthogonal and collapsed classes."""
    labels = torch.tensor([0] * 6 + [1] * 5 + [3] * 4)  # class 2 has no image
    feat = rand(15, 4) + 3 * rand(4, 4, seed=1)[labels]
    ranks, means, within = [], [], np.zeros((4, 4))
    for k in (0, 1, 3):
        own = feat[labels == k].numpy()
        ranks.append(np.linalg.norm(own, "nuc") ** 2 / (own**2).sum())
        means.append(own.mean(0))
        for f in own:
            within += np.outer(f - own.mean(0), f - own.mean(0)) / len(own) / 3
    between = sum(np.outer(m - np.mean(means, 0), m - np.mean(means, 0)) for m in means) / 3  # rank 2 of 4
    assert hinge_ce.numerical_rank(feat, labels) == pytest.approx(np.mean(ranks))
    nc1 = np.trace(within @ np.linalg.pinv(between)) / 3
    assert hinge_ce.nc1(feat, labels) == pytest.approx(nc1)
    assert hinge_ce.nc1(7 * feat + 2, labels) == pytest.approx(nc1)  # whatever scale and origin
    assert hinge_ce.nc1(feat.float(), labels) == pytest.approx(nc1, rel=1e-4)
    collapsed = rand(4, 4)[labels]
    assert hinge_ce.nc1(collapsed, labels) == pytest.approx(0, abs=1e-12)
    assert hinge_ce.numerical_rank(collapsed, labels) == pytest.approx(1)
    assert hinge_ce.numerical_rank(torch.eye(4).repeat(2, 1), torch.tensor([0] * 4 + [1] * 4)) == pytest.approx(4)


def test_the_recipe_of_menon():
    net = common.BACKBONES["resnet32_bn"](100)
    etf = common.simplex_etf(100, 128, torch.Generator().manual_seed(0))
    net.fc = hinge_ce.Head(64, 128, 100)
    assert net.fc.projector.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.fc.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05) and net.fc.classifier.bias is not None
    fixed = hinge_ce.Head(64, 128, 100, etf).classifier
    assert fixed.weight.equal(etf) and not fixed.weight.requires_grad and fixed.bias is None
    decayed, others = hinge_ce.decay_of_weights(net, 2e-4)
    assert (decayed["weight_decay"], others["weight_decay"]) == (2e-4, 0)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in (decayed, others)]
    assert sorted(groups[0] + groups[1]) == sorted(names.values())
    assert all(name.endswith("weight") and "bn" not in name for name in groups[0]) and len(groups[0]) == 33  # 31 convolutions


# ---- the schedules

def test_schedules_follow_the_papers_recipes():
    rbl_lrs = [rbl.warmup_cosine_lr(e, 600, 0.1) for e in range(600)]
    assert rbl_lrs[0] == pytest.approx(0.05625) and rbl_lrs[7] == pytest.approx(0.1) and rbl_lrs[-1] == pytest.approx(0, abs=1e-12)
    assert rbl_lrs[300] == pytest.approx(0.05 * (1 + math.cos(math.pi * 293 / 592)))
    steps = [lwr.warmup_step_lr(e, 200, 0.1) for e in range(200)]
    assert steps[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert steps[159] == 0.1 and steps[160] == pytest.approx(1e-3) and steps[179] == pytest.approx(1e-3) and steps[180] == pytest.approx(1e-5)
    assert [hinge_ce.cosine_lr_with_warmup(e, 4, 0.04, 0) for e in range(4)] == pytest.approx([4 * lort.cosine_lr(e, 4, 0.01) for e in range(4)])
    assert hinge_ce.cosine_lr_with_warmup(0, 256, 0.4, 5) == pytest.approx(0.4 / 6)
    assert [lort.cosine_lr(e, 4, 0.01) for e in range(4)] == pytest.approx([0.01, 0.005 * (1 + math.sqrt(0.5)), 0.005, 0.005 * (1 - math.sqrt(0.5))])


# ---- the copies

def functions(path):
    return {node.name: ast.dump(node) for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_a_function_that_stands_in_two_scripts_is_the_same():
    seen = {}
    for path in [ROOT / "common.py", *(ROOT / "methods" / f"{name}.py" for name in SCRIPTS)]:
        for name, body in functions(path).items():
            if name not in ("main", "parse_args"):
                assert seen.setdefault(name, body) == body, f"{name} in {path.name} differs from an earlier one"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    text = (ROOT / "methods" / f"{script}.py").read_text()
    both = text + (ROOT / "common.py").read_text()
    for node in ast.walk(ast.parse(both)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add":
            flag = node.args[0].value.removeprefix("--").replace("-", "_")
            assert re.search(rf"args\.{flag}\b", both), flag
            help_text = next(k.value for k in node.keywords if k.arg == "help")
            assert "default" not in ast.unparse(help_text)

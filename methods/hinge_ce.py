"""HingeCE: Do We Need Neural Collapse? Learning Diverse Features for Fine-Grained and Long-Tail
Classification. Anonymous ICLR 2023 submission 5gri-cs4RVq.

Idea: fix the classifier to a simplex ETF, and let an image of a rare class be anywhere in a cone of angle
tau+ around its class's vector: inside, its own logit is a constant, so that the few images need not collapse
onto one point.

    u = projector(resnet(x))                       the feature, (m,); not normalised, no temperature
    W = sqrt(K/(K-1)) (I - 11^T/K) U^T             its rows are the class vectors w_k, fixed       (eqs. 2, 3)
                                                   U (m, K): random orthonormal columns
    v_y = min(<w_y, u>, sg(|u|) |w_y| cos tau+)    sg: no gradient passes                              (eq. 8)
    v_k = max(<w_k, u>, sg(|u|) |w_k| cos tau-),  k != y
    L   = cross-entropy(v, y);   test: argmax_k <w_k, u>

tau+ = 0 for classes with more than 50 training images, whose v_y is then <w_y, u>; tau- = pi: v_k = <w_k, u>.

To reproduce: Table 2, CIFAR-100-LT, IF 100, ResNet-32: CE 39.5 (m = 128), CE + ETF 42.6, HingeCE 46.2.

Departures and choices where the paper is silent (no official code is known)
- tau- = pi, as Sec. 5 says. Table 4 prints 0; Theorem 1 needs theta_K - tau+, 0.8828 radians, with which the
  gradient inside the cone vanishes. Both fail: 14.3 and 12.0, where ce-etf has 32.2 (20 epochs, accuracy on
  100 validation images a class). Their v_k are constants, so nothing holds an image of a minor class back:
  its |u| is 2,900 and 1,900 in the mean, not 36.
- "<= 50 images" (App. B), not "less than 50" (body): only so are there 1 and 50 such classes in
  CIFAR-10/100-LT (Table 4).
- On CIFAR the paper follows Menon et al. and Yang & Xu "exactly"; we take the former. From their code come
  Nesterov's momentum of 0.9, crop of 2 pixels and flip, a BatchNorm without ReLU before the pooling
  (resnet32_bn; the paper speaks of a ReLU: --backbone resnet32), initial weights of standard deviation 0.01
  in the dense layers, and the decay: the L2 term of their code, 1e-4 |w|^2 (App. B: 0.0001), is a weight
  decay of 2e-4, of weights, not of BatchNorm. Unlike that code: basic blocks (the paper says ResNet-32) whose
  shortcuts have no weights; 32 x 32 pixels (there 36 x 36, by a wider margin of zeros); images normalised by
  mean and std, in a black margin (there x/255 - 0.5); dense biases that start as PyTorch's (there, by Keras's
  default, at 0) and do not decay; a short last batch is kept. Last epoch.
- ImageNet-LT: printed are 90 epochs, batches of 512, learning rate 0.4, its cosine, Nesterov and weight decay
  1e-4. The rest is "as He et al. 2016"; here the size of the momentum, the head's initialisation and what
  decays are as on CIFAR, and ColorJitter is added as usual.
- No warm-up on CIFAR, as the paper says; on ImageNet-LT one epoch (there 100 steps).
- CIFAR-100-LT, IF 100, seed 0 each: ce has 39.6, as in the paper (39.5). ce-etf (40.1) and hinge (39.5) stay
  below the paper's 42.6 and 46.2. No training image of a minor class ends in its cone: they lie 69 degrees
  from w_y in the median, and at least 61; the cone is 40. |u| is 51. With empty cones hinge is ce-etf: the
  older runs of both (see "Tried") are equal in every score, and the 0.6 between these two is probably
  rounding, as they were made on two kinds of processor. Why the paper's cones have an effect is unknown. On
  ImageNet they are of 65 degrees, and without them the mean cosine is 0.46, that of 63 degrees (Sec. 5,
  Fig. 3). Cones of 40 leave little room here: with its bias, a linear projector of 64 features reaches 65 of
  the 99 dimensions that the w_k span, so the mean over the classes of cos^2(u, w_y) is at most 65/99, that of
  36 degrees. Classes can only be closer to their vectors if others are farther away.
- The ETF helps early, not in the end: after 20 epochs, on the same validation images, ce has 28.4, ce-etf
  32.2 (31.8 with biases that start at 0). Cones that are entered do not help: of 74 degrees (--tau-plus 1.3),
  with 27 % of the minor classes' training images inside, 30.7.
- Tried (tests/tried_results.jsonl): the usual ResNet-32, crops of 4 pixels, PyTorch's initialisation and a
  weight decay of 1e-4 for all parameters; then hinge and ce-etf both have 37.28.

    python methods/hinge_ce.py --variant hinge
"""
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# ---- the method


def hinge_logits(feat, labels, weight, tau_plus, tau_minus):
    """Eq. 8: feat u (B, m), labels y (B,), weight W (K, m) -> v (B, K).

    tau_plus, tau_minus (K,): the angles for an image of each class, in radians. tau_plus 0 and tau_minus pi
    stand for no hinge: v_k = <w_k, u>.
    """
    inner = feat @ weight.T                                                     # <w_k, u>  (B, K)
    length = feat.detach().norm(dim=1, keepdim=True) * weight.norm(dim=1)       # sg(|u|) |w_k|  (B, K)
    plus, minus = tau_plus[labels][:, None], tau_minus[labels][:, None]         # (B, 1)
    # angles 0 and pi are no hinge: length * cos may round to the wrong side of <w_k, u> and stop the gradient
    own = torch.where(plus > 0, torch.minimum(inner, length * plus.cos()), inner)
    other = torch.where(minus < math.pi, torch.maximum(inner, length * minus.cos()), inner)
    return torch.where(F.one_hot(labels, len(weight)).bool(), own, other)


def numerical_rank(feat, labels):
    """Sec. 5: |H|_*^2 / |H|_F^2, nuclear and Frobenius norm of a class's features H (n, m), mean over the
    classes. 1 if they are collinear. feat (N, m), labels (N,)."""
    ranks = []
    for k in labels.unique():
        singular = torch.linalg.svdvals(feat[labels == k].double())
        ranks.append(singular.sum() ** 2 / singular.square().sum())
    return torch.stack(ranks).mean().item()


def nc1(feat, labels):
    """trace(S_W pinv(S_B)) / K (Papyan et al. 2020, Zhou et al. 2022), 0 if every class is a point.
    S_W: the mean of the classes' covariances; S_B: the covariance of their means. There all classes have one
    size; here each counts equally. feat (N, m), labels (N,)."""
    means, s_w = [], 0
    for k in labels.unique():
        own = feat[labels == k].double()                                        # (n, m)
        means.append(own.mean(0))
        s_w = s_w + torch.cov(own.T, correction=0)                              # (m, m)
    s_b = torch.cov(torch.stack(means).T, correction=0)
    ratio = s_w / len(means) @ torch.linalg.pinv(s_b, hermitian=True)
    return ratio.trace().item() / len(means)


class Head(nn.Module):
    """The backbone's features (B, D) -> u = projector(.) (B, m) -> <w_k, u> (B, K). The w_k are the rows of
    `etf` (K, m), fixed; without one they are learned, with biases."""

    def __init__(self, features, width, num_classes, etf=None):
        super().__init__()
        self.projector = nn.Linear(features, width)
        self.classifier = nn.Linear(width, num_classes, bias=etf is None)
        nn.init.normal_(self.projector.weight, std=0.01)                        # Menon
        nn.init.normal_(self.classifier.weight, std=0.01)
        if etf is not None:
            self.classifier.weight = nn.Parameter(etf, requires_grad=False)

    def forward(self, feat):
        return self.classifier(self.projector(feat))


# ---- the recipe

RECIPE = dict(epochs=256, batch_size=128, lr=0.4, weight_decay=2e-4, backbone="resnet32_bn",  # App. B, Menon
              warmup=0, pad=2, width=128,
              tau_plus=2 * math.pi / 9, tau_major=0.0, tau_minus=math.pi, minor=50)  # Table 4: 40 degrees
CHANGES = {"cifar10": dict(width=64, tau_plus=math.pi / 3),                     # Table 4: 60 degrees
           "imagenet-lt": dict(epochs=90, batch_size=512, backbone="resnet50", width=2048,      # App. B
                               weight_decay=1e-4, tau_plus=5 * math.pi / 18,
                               warmup=1),  # ours; there 100 steps, 0.44 epochs
           "synthetic": dict(epochs=20, batch_size=64, backbone="small", lr=0.2,  # our demo
                             width=64, tau_plus=math.pi / 3)}
SOURCE = "", "HingeCE, Table 2 (ce: quoted from Menon et al.; 39.5 is its own, with m = 128)"
ALL = "natural"  # images, of ImageNet-LT
PAPER = {"ce": (*SOURCE, {"cifar10": {100: 72.8}, "cifar100": {100: 39.5}, "imagenet-lt": {ALL: 46.9}}),
         "ce-etf": (*SOURCE, {"cifar10": {100: 77.3}, "cifar100": {100: 42.6}, "imagenet-lt": {ALL: 48.1}}),
         "hinge": (*SOURCE, {"cifar10": {100: 80.4}, "cifar100": {100: 46.2}, "imagenet-lt": {ALL: 50.8}})}


def decay_of_weights(net, weight_decay):
    """SGD's two groups of parameters: matrices and kernels, which decay; biases and BatchNorm, which do
    not."""
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    return [dict(params=weights, weight_decay=weight_decay), dict(params=others, weight_decay=0)]


def cosine_lr_with_warmup(epoch, epochs, lr, warmup):
    """Half a cosine from lr towards 0, one step an epoch; times 1/(w+1), 2/(w+1), ... in the w epochs of
    warm-up."""
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs)) * min(1, (epoch + 1) / (warmup + 1))


def parse_args(argv):
    parser = common.base_parser(__doc__)
    add = parser.add_argument_group("HingeCE (--weight-decay: not of biases and BatchNorm)").add_argument
    add("--variant", choices=["ce", "ce-etf", "hinge"], default="hinge",
        help="learned classifier; fixed ETF; ETF and cones")
    add("--width", type=common.ONE_OR_MORE, help="m, the projector's output dimensions")
    angle = common.number(float, 0, math.pi / 2)
    add("--tau-plus", type=angle, help="radians: the cone of the minor classes")
    add("--tau-major", type=angle, help="radians: the cone of all other classes; 0 is none")
    add("--tau-minus", type=common.number(float, 0, 3.15),
        help="radians: the bound of the other logits, for classes with a cone; pi is none")
    add("--minor", type=common.ZERO_OR_MORE, help="classes of at most so many training images get a cone")
    add("--pad", type=common.number(int, 0, 33), help="pixels of the margin in which images are cropped")
    add("--warmup", type=common.ZERO_OR_MORE, help="epochs in which the learning rate rises")
    args = common.parse(parser, argv, RECIPE, CHANGES)
    if args.variant != "hinge":
        of_cones = ("tau_plus", "tau_major", "tau_minus", "minor")
        common.refuse_without_effect(parser, args, f"--variant {args.variant}", *of_cones)
    if args.dataset in common.LISTS or args.image_size:
        common.refuse_without_effect(parser, args, "photographs, which are cropped as ImageNet's are", "pad")
    return args


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args, "hinge_ce", args.variant, PAPER)
    data = common.load_data(args, run.device)
    num_classes, class_sizes = len(data.counts), torch.tensor(data.counts, device=run.device)
    etf = None
    if args.variant != "ce":
        etf = common.simplex_etf(num_classes, args.width, torch.Generator().manual_seed(args.seed))
    net = common.BACKBONES[args.backbone](num_classes)
    net.fc = Head(net.fc.in_features, args.width, num_classes, etf)
    net.to(run.device, memory_format=torch.channels_last)

    tau_plus = torch.where(class_sizes <= args.minor, args.tau_plus, args.tau_major)           # (K,)
    if args.variant == "hinge" and not tau_plus.any():
        common.fail("no class has a cone, which makes this --variant ce-etf: the smallest has "
                    f"{min(data.counts)} training images, --minor is {args.minor}")
    tau_minus = torch.where(tau_plus > 0, args.tau_minus, math.pi)              # (K,)
    optimizer = torch.optim.SGD(decay_of_weights(net, args.weight_decay),
                                torch.tensor(args.lr, device=run.device), momentum=0.9, nesterov=True,
                                fused=True)
    crop_flip = partial(common.crop_flip, pad=args.pad)
    run.begin(data, net)

    def step(x, labels):
        with run.autocast():
            feat = net.features(x).float()
        u = net.fc.projector(feat)                                              # (B, m)
        if args.variant == "hinge":
            logits = hinge_logits(u, labels, net.fc.classifier.weight, tau_plus, tau_minus)
        else:
            logits = net.fc.classifier(u)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = run.captured(step, net, optimizer)
    net.train()
    for epoch in run.epochs("train", args.epochs, net, optimizer):
        common.set_lr(optimizer, cosine_lr_with_warmup(epoch, args.epochs, args.lr, args.warmup))
        losses = []
        for x, labels in common.batches(data.train, args.batch_size, run.generator, crop_flip):
            losses.append(step(x, labels))
        run.log(losses)
        if run.eval_due():
            run.keep_best(net.fc(common.features(net, data.test)))

    run.compute_test_features(net)
    run.score(args.variant, net.fc, run.best_test)
    labels = data.train.labels
    u = net.fc.projector(common.features(net, data.train)).detach()             # (N, m)
    u_test = net.fc.projector(run.feat).detach()
    metrics = {
        "numerical_rank": {"train": numerical_rank(u, labels),
                           "test": numerical_rank(u_test, data.test.labels)},
        "nc1": {"train": nc1(u, labels),
                "test": nc1(u_test, data.test.labels)}}
    if args.variant != "ce":
        cosine = F.cosine_similarity(u, net.fc.classifier.weight[labels])       # of u and w_y  (N,)
        cone = tau_plus[labels]                                                 # (N,)
        metrics["inside_the_cones"] = (cosine >= cone.cos())[cone > 0].float().mean().item()  # NaN: no cone
    run.finish(net, **metrics)


if __name__ == "__main__":
    common.guard(main)

"""RBL: Feature Directions Matter: Long-Tailed Learning via Rotated Balanced Representation.
Gao, Xu, Wen, Yang, Shao, Huang, ICML 2023.

Idea: the class vectors form a fixed, balanced frame. Only a rotation of the whole frame is learned, so that
the directions of the classes can follow the data while no class loses its share of the space.

    g(x) = W h(x) + b                           h: the network's feature (64,), g: (d,), d = 256
    R = B expm(A),  A = tril(X) - tril(X)^T     a rotation in SO(d): B random and fixed, X learned from X = 0
    E = the first C columns of I - 11^T/d       the balanced frame, (d, C)
    z = g(x)^T R E,   L = cross-entropy(z, y)
    test: argmax_c z_c - tau log(n_c / N),  tau = 1          post-hoc logit adjustment

--head fixed freezes X = 0, our reading of the paper's 'Fixed', whose code is not released. --head linear
learns a linear classifier on g instead.

To reproduce: Table 1 (best epoch on the test set), CIFAR-100-LT, IF 100, ResNet-32: RBL 53.1, Fixed 52.3;
CIFAR-10-LT: 84.7, 84.0. The authors' logs of RBL have 52.78 and 83.48 at the last epoch.

Ours, CIFAR-100-LT, seed 0: RBL 51.1, without the adjustment 46.1. In the authors' log many, medium and few
have 70.6, 51.8 and 32.6. On the same classes ours has 70.1, 50.4 and 29.0; these few-shot classes have 314
training images there, 286 here (see below). Whether that is the reason has not been tried. The loss ends
where theirs does, at 0.50, and R has turned the class vectors by 39 degrees in the mean. With --epochs 200
RBL has 49.7 (in bf16), Fixed 48.9 (in fp32). With 20 epochs and seeds 0, 1, 2 (tests/tried_results.jsonl) rbl
has 24.4, fixed 23.6: R gains 0.9, 1.2 and 0.4.

g has a linear layer of its own, which can absorb R: rbl and fixed can express the same functions, and what R
gains is a matter of optimisation. Weight decay acts on X too, and so pulls R back to B, as in the authors'
code.

Code read: qqgroup66666/rbl. Departures that may move the number:
- The frame is the released code's E, whose columns have cosine -1/(d-1), and not the paper's simplex of C
  vertices.
- CIFAR's mean and std where theirs takes ImageNet's; 10,847 images (int) where theirs takes 10,945 (ceil).
Others:
- The last batch of an epoch may be short; the authors' code drops it. Their training accuracy per epoch is of
  augmented images, ours of plain ones.
- AutoAugment's operations are torchvision's on uint8 tensors. Colour and contrast differ from Pillow's by one
  grey level on 14 to 48 % of CIFAR's values, AutoContrast on 2 to 3 %. The authors' copy rotates one way
  only and shears with bicubic interpolation.
- ImageNet-LT: no recipe is public. Ours is SADE's (ResNeXt-50, 180 epochs, batch 64) with RBL's warm-up and
  d = 1024, so the table does not show the poster's 53.3.

    python methods/rbl.py --head rbl
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as transforms
import torchvision.transforms.v2.functional as tv
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# ---- the method


def expm(a):
    """Matrix exponential of a (d, d), |a| < 100: the Taylor series of a / 256, squared eight times. Computed
    as e = exp - I, since adding I early rounds small entries off. (torch.matrix_exp waits for the GPU, so
    that it cannot be captured in a CUDA graph.)"""
    a = a / 256
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    series = identity
    for k in range(10, 1, -1):
        series = identity + a @ series / k
    e = a @ series
    for _ in range(8):
        e = 2 * e + e @ e
    return identity + e


def rotation(x, base):
    """R = base expm(tril(x, -1) - tril(x, -1)^T); x and base (d, d), base a rotation -> a rotation (d, d)."""
    lower = x.tril(-1)
    return base @ expm(lower - lower.T)


def etf_frame(dim, num_classes):
    """The first num_classes columns of I - 11^T / dim: (dim, num_classes), norms sqrt(1 - 1/dim), cosines -1
    / (dim - 1)."""
    if dim < num_classes:
        common.fail(f"--dim {dim}: a frame of {num_classes} classes needs as many dimensions")
    return (torch.eye(dim) - 1 / dim)[:, :num_classes]


class RotatedHead(nn.Module):
    """h (B, D) -> z = g(h) R E (B, C), g linear from `features` to `dim` dimensions. learn=False freezes R =
    B."""

    def __init__(self, features, dim, num_classes, generator, learn=True):
        super().__init__()
        self.g = nn.Linear(features, dim)
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        base = q * r.diagonal().sign()                         # uniform over the orthogonal matrices ...
        base[:, 0] *= torch.linalg.det(base).sign()            # ... of determinant 1
        self.register_buffer("base", base.float())
        self.register_buffer("frame", etf_frame(dim, num_classes))
        self.x = nn.Parameter(torch.zeros(dim, dim), requires_grad=learn)

    def class_vectors(self):
        """R E, (d, C)."""
        if self.x.requires_grad:
            return rotation(self.x, self.base) @ self.frame
        return self.base @ self.frame

    def forward(self, h):
        return self.g(h) @ self.class_vectors()


@torch.no_grad()
def angle_moved(head):
    """By how many degrees R has turned the class vectors from where they began, mean over the classes."""
    cosine = F.cosine_similarity(head.class_vectors(), head.base @ head.frame, dim=0)
    return cosine.clamp(-1, 1).acos().rad2deg().mean().item()


# ---- its augmentation, on whole batches on the device


def operation(x, name, level, sign):
    """One AutoAugment operation at level 0..9 on (N, 3, H, W) uint8; sign: -1 or 1, for those that have
    one."""
    amount = sign * (level or 0) / 9
    grey = [128.0] * 3
    if name in ("ShearX", "ShearY"):
        angle = math.degrees(math.atan(0.3 * amount))
        shear = [angle, 0.0] if name == "ShearX" else [0.0, angle]
        return tv.affine(x, 0.0, [0, 0], 1.0, shear, fill=grey, center=[0, 0])
    if name in ("TranslateX", "TranslateY"):
        pixels = round(150 / 331 * x.shape[3] * amount)         # as the authors' code; torchvision truncates
        shift = [pixels, 0] if name == "TranslateX" else [0, pixels]
        return tv.affine(x, 0.0, shift, 1.0, [0.0, 0.0], fill=grey)
    if name == "Rotate":
        return tv.rotate(x, 30 * amount, fill=grey)
    if name == "Posterize":
        return tv.posterize(x, 8 - round(4 * abs(amount)))
    if name == "Solarize":
        return tv.solarize(x, 256 * (1 - abs(amount)))          # as the authors' code; torchvision: 255
    if name in PLAIN:
        return PLAIN[name](x)
    return ENHANCED[name](x, 1 + 0.9 * amount)


PLAIN = {"AutoContrast": tv.autocontrast, "Equalize": tv.equalize, "Invert": tv.invert}
ENHANCED = {"Brightness": tv.adjust_brightness, "Color": tv.adjust_saturation, "Contrast": tv.adjust_contrast,
            "Sharpness": tv.adjust_sharpness}


def autoaugment(images, generator):
    """AutoAugment's CIFAR-10 policy (Cubuk et al. 2019; torchvision's table): of 25 pairs of operations each
    image draws one, and for each of the two a coin and a sign. Images with the same draws go through an
    operation together. (N, H, W, 3) uint8."""
    policies = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies
    draws = torch.rand(5, len(images), generator=generator, device=images.device).cpu()
    pair = (draws[0] * len(policies)).long()                                    # (N,)
    coins = draws[1:3]                                                          # (2, N)
    signs = torch.where(draws[3:5] < 0.5, -1, 1)                                # (2, N)
    x = images.permute(0, 3, 1, 2).contiguous()
    for step in (0, 1):
        for k, operations in enumerate(policies):
            name, probability, level = operations[step]
            for sign in (-1, 1):
                chosen = (pair == k) & (coins[step] < probability) & (signs[step] == sign)
                if chosen.any():
                    index = chosen.nonzero()[:, 0].to(x.device)
                    x[index] = operation(x[index], name, level, sign)
    return x.permute(0, 2, 3, 1)


def cutout(images, generator):
    """Cutout (DeVries & Taylor 2017): a black square of half the image's side, centred on any pixel, clipped
    at the edge, before normalisation. (N, H, W, 3) uint8."""
    n, side, device = len(images), images.shape[1], images.device
    y, x = torch.randint(0, side, (2, n, 1), generator=generator, device=device)  # the centres, (N, 1) each
    pixel = torch.arange(side, device=device)
    rows = (pixel >= y - side // 4) & (pixel < y + side // 4)                   # (N, H)
    columns = (pixel >= x - side // 4) & (pixel < x + side // 4)                # (N, W)
    square = rows[:, :, None] & columns[:, None, :]                             # (N, H, W)
    return images.masked_fill(square[..., None], 0)


def strong(images, generator):
    """RBL's augmentation, all of it."""
    return cutout(autoaugment(common.crop_flip(images, generator), generator), generator)


def accuracy_and_loss(logits, labels):
    """What the poster's Figures 3 and 4 plot over the epochs (here in log.jsonl, with --eval-every): accuracy
    in percent and cross-entropy. logits (N, C), labels (N,)."""
    hits = logits.argmax(1) == labels
    accuracy = 100 * hits.float().mean().item()
    return accuracy, F.cross_entropy(logits, labels).item()


# ---- the recipe

RECIPE = dict(epochs=600, batch_size=256, lr=0.1, weight_decay=5e-4, backbone="resnet32", dim=256,
              augment="strong", tau=1.0)
CHANGES = {"imagenet-lt": dict(epochs=180, batch_size=64, lr=0.025, backbone="resnext50_32x4d", dim=1024,
                               augment="crop"),                                 # ours: see above
           "synthetic": dict(epochs=20, batch_size=64, backbone="small", dim=64, augment="crop")}  # our demo
SOURCE = "best epoch", "RBL's poster, Table 1"  # how the paper measured its number, and where it stands
PAPER = {"rbl": (*SOURCE, {"cifar10": {50: 87.6, 100: 84.7, 200: 81.2},
                           "cifar100": {50: 57.2, 100: 53.1, 200: 48.9}}),
         "fixed": (*SOURCE, {"cifar10": {50: 87.1, 100: 84.0, 200: 80.2},
                             "cifar100": {50: 56.2, 100: 52.3, 200: 47.2}})}


def warmup_cosine_lr(epoch, epochs, lr, warmup=8):
    """lr/2 + lr/16, lr/2 + 2 lr/16, ... lr in 8 epochs, then half a cosine to 0 in the last epoch."""
    if epoch < warmup:
        return 0.5 * lr * (1 + (epoch + 1) / warmup)
    progress = (epoch - warmup + 1) / (epochs - warmup)
    return 0.5 * lr * (1 + math.cos(math.pi * progress))


def parse_args(argv):
    parser = common.base_parser(__doc__)
    add = parser.add_argument_group("RBL").add_argument
    add("--head", choices=["rbl", "fixed", "linear"], default="rbl",
        help="learned rotation; frozen rotation; linear classifier")
    add("--dim", type=common.ONE_OR_MORE, help="d, the dimensions of g and of the frame")
    add("--tau", type=common.NOT_NEGATIVE, help="strength of the post-hoc logit adjustment")
    add("--augment", choices=["strong", "crop"], help="crop, flip, AutoAugment and Cutout; or crop and flip")
    return common.parse(parser, argv, RECIPE, CHANGES)


def main(argv=None):
    args = parse_args(argv)
    if args.augment == "strong" and (args.image_size or args.dataset in common.LISTS):
        common.fail("--augment strong is for small images: photographs need --augment crop")
    run = common.Run(args, "rbl", args.head, PAPER)
    data = common.load_data(args, run.device)
    num_classes = len(data.counts)

    net = common.BACKBONES[args.backbone](num_classes)
    dim_h = net.fc.in_features
    if args.head == "linear":
        net.fc = nn.Sequential(nn.Linear(dim_h, args.dim), nn.Linear(args.dim, num_classes))
    else:
        generator = torch.Generator().manual_seed(args.seed)
        net.fc = RotatedHead(dim_h, args.dim, num_classes, generator, learn=args.head == "rbl")
    net.to(run.device, memory_format=torch.channels_last)
    prior = torch.tensor(data.counts, device=run.device) / sum(data.counts)
    log_prior = prior.log()                                                     # (C,)
    optimizer = torch.optim.SGD(net.parameters(), torch.tensor(args.lr, device=run.device), momentum=0.9,
                                weight_decay=args.weight_decay, nesterov=True, fused=True)
    augment = strong if args.augment == "strong" else common.crop_flip
    run.begin(data, net, "crop, flip, AutoAugment, Cutout" if augment is strong else "crop, flip")

    def adjusted(h):
        """z - tau log(n_c / N)."""
        return net.fc(h) - args.tau * log_prior

    def step(x, labels):
        with run.autocast():
            h = net.features(x).float()
        loss = F.cross_entropy(net.fc(h), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = run.captured(step, net, optimizer)
    net.train()
    for epoch in run.epochs("train", args.epochs, net, optimizer):
        common.set_lr(optimizer, warmup_cosine_lr(epoch, args.epochs, args.lr))
        losses = []
        for x, labels in common.batches(data.train, args.batch_size, run.generator, augment):
            losses.append(step(x, labels))
        run.log(losses)
        if run.eval_due():
            z_train = net.fc(common.features(net, data.train)).detach()
            z_test = adjusted(common.features(net, data.test)).detach()
            train = accuracy_and_loss(z_train, data.train.labels)
            test = accuracy_and_loss(z_test, data.test.labels)
            run.keep_best(z_test, train_acc_ce=train, test_acc_ce=test)

    run.compute_test_features(net)
    run.score(f"{args.head}, no adjustment", net.fc)
    run.score(args.head, adjusted, run.best_test, args.tau)
    metrics = {}
    if args.head != "linear":
        metrics = {"angle_moved_degrees": angle_moved(net.fc), "norm_of_x": net.fc.x.norm().item()}
    run.finish(net, **metrics)


if __name__ == "__main__":
    common.guard(main)

"""EWB-FDR: Exploring Weight Balancing on Long-Tailed Recognition Problem. Hasegawa, Sato, ICLR 2024.
It takes apart WB: Long-Tailed Recognition via Weight Balancing. Alshammari, Wang, Ramanan, Kong, CVPR 2022.

Idea: tuned weight decay makes features separable (a high Fisher ratio); WB's second stage only rescales the
classifier. So one stage does: weight decay, small features and a fixed simplex ETF, then multiplicative logit
adjustment.

    z_k = <w_k, f(x)> + b_k,  pi_k = n_k / N
    CE              mean_i -log p_{i, y_i},  p = softmax(z)
    CB              mean_i c_{y_i} (-log p_{i, y_i}),  c_k proportional to (1 - beta) / (1 - beta^n_k), mean 1
    WD              + lambda/2 |theta|^2, all parameters (the optimizer's weight decay)
    ETF             w_k fixed to a simplex ETF, b learned
    FR              + zeta/2 mean_i |f(x_i)|^2
    additive LA     z_k - tau log pi_k              after training
    multiplicative  z_k pi_k^-gamma                 after training, the rows w_k scaled to norm 1 first
    WB stage 2      b, w alone: CB loss, weight decay 0.1, and once an epoch MaxNorm:
                    w_k <- w_k min(1, Delta / |w_k|),  Delta = min |w| + 0.1 (max |w| - min |w|) of stage 1

--variant  ce: CE   cb: CB   wd: CE + WD   wb: wd, then WB's stage 2   etf: wd + ETF
           fr-etf: wd + ETF + FR, EWB's own method

To reproduce, CIFAR-100-LT, IF 100, ResNet-34: ce 38.4, wd 46.1, wb 53.4 (WB, Tables 1 and 2, 200 epochs; the
released log of its code, 320 epochs, last one, without flip: 39.1, 46.8, 51.8); fr-etf with multiplicative
adjustment 53.0 (as quoted by LORT). EWB trains all of them for 320 epochs on CIFAR (its code's files): add
--epochs 320 to ce, wd and wb. Its Fisher ratio rises wd < etf < fr-etf; its released gamma is 0.65 (CIFAR-10:
1.6); compare the one that --variant fr-etf chooses.

Measured only on ResNet-32 (--backbone resnet32, 200 epochs, seed 0). CIFAR-100-LT: wd 39.3, with additive
adjustment 43.2; wb 39.3, with --cb-loss ce 40.7. Validation images choose gamma = 0 for all three: their rows
"multiplicative LA" (42.7, 41.7, 42.7) show what rows w_k of norm 1 do alone. A user of WB's code reports at
most 39.5 for wd on that network (its issue 12). Stage 2 helps the medium classes (39.6 to 51.0) at the cost
of the many (71.0 to 59.6); the few gain nothing (2.0 to 2.1). That agrees with EWB's Theorem 2, by which
stage 2 makes |w_k| proportional to the norm of the class's mean training feature, but not with its Sec. 4.5,
by which that norm is largest for the few: here it is 12.9, 15.5 and 11.0 (many, medium, few).
CIFAR-10-LT, same network and epochs: fr-etf 73.8, with additive adjustment 78.9 (tau 1.2), with
multiplicative 78.6 (gamma 0.85). Its norms are as in Sec. 4.5: 6.1 and 9.7 (many, medium; no class is few).

Code read: ShadeAlsha/LTR-weight-balancing (WB),
HN410/Exploring-Weight-Balancing-on-Long-Tailed-Recognition-Problem (EWB). Departures
- 20 validation images a class choose tau and gamma, of 0, 0.05, ..., 3 (EWB's grid is not known); at IF 100
  the head class loses 20 training images for them. WB has none and selects on the test set. Last epoch, not
  the best.
- The standard shuffled subset. Both codes take the first images of each class, and EWB's profile is another,
  round(480 IF^(-c/99)), 10,457 images, and 20 more a class for validation.
- --cb-loss bce, WB's code and the default of wb: binary cross-entropies of the softmax, mean over the K
  classes. ce, EWB's code and the default of cb: weighted cross-entropy, its gradient about K times as large.
  Our bce is exact where p rounds to 1; there the gradient of WB's code is wrong, from 0 to far too large.
  beta 0.9999 is both codes' (EWB's text: 1).
- Where WB's text and code differ: ResNet-34 as in the code (text: 32), MaxNorm once an epoch as in the code
  (text: after every batch), 200 epochs for ce, wd and wb as in the text (code: 320, as EWB's).
- EWB's text has no bias b. As in its code, b is learned, with the ETF too, and scaled by gamma.
- zeta is 0.01, as in EWB's file for CIFAR-10. Its text sets a symbol, which is lost, to 0.02 there and to
  1e-4 on ImageNet-LT; we take the 1e-4 for zeta. On CIFAR-10 also: WB's normalisation, our shot groups.
- ImageNet-LT and iNaturalist 2018: WB does not print its weight decay, and EWB's numbers are lost in the text
  at hand. Ours are the 5e-4 and 1e-4 of other codes, with the epochs, batches and learning rates of WB's
  text, so the table does not show WB's 53.9 and 70.2.
- As in both codes, stage 2 leaves BatchNorm in training mode. Our cosine starts at lr; theirs ends at 0.
- S_B of the Fisher ratio is around the mean of all samples, as in EWB's code (text: of the class means), and
  the training images are not augmented (code: they are).

    python methods/ewb_fdr.py --variant fr-etf
    python methods/ewb_fdr.py --variant wb --stage1 runs/.../weights.pt
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# ---- the method


def class_balanced_loss(logits, labels, weights, form):
    """Both published forms; logits (B, K), labels (B,), weights (K,)."""
    if form == "bce":                                                           # WB
        return common.class_balanced_bce(logits, labels, weights)
    return (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()       # EWB


def feature_regularization(feat):
    """1/2 mean_i |f_i|^2; feat (B, D)."""
    return 0.5 * feat.square().sum(1).mean()


def additive_la(logits, counts, tau):
    """z_k - tau log pi_k (Menon et al. 2021). logits (N, K), counts: K training images."""
    prior = torch.as_tensor(counts, device=logits.device) / sum(counts)
    return logits - tau * prior.log()


def multiplicative_la(logits, counts, gamma):
    """z_k pi_k^-gamma (Kim & Kim 2020); the bias in z_k is scaled too, as in the authors' code. logits (N,
    K)."""
    prior = torch.as_tensor(counts, device=logits.device) / sum(counts)
    return logits * prior ** -gamma


def unit_rows(fc, feat):
    """The logits (N, K) of feat (N, D) with every w_k scaled to norm 1, b as it is: what multiplicative LA
    starts from."""
    return F.linear(feat, F.normalize(fc.weight), fc.bias)


def choose(adjust, logits, labels, counts):
    """The strength among 0, 0.05, ..., 3 with which adjust(logits, counts, strength) scores best; of equals
    the smallest. logits (N, K) and labels (N,) of the validation images."""
    strengths = [k / 20 for k in range(61)]
    scores = [common.report(adjust(logits, counts, s), labels, counts)["all"] for s in strengths]
    return strengths[scores.index(max(scores))]


def class_means(feat, labels):
    """(K, D) float64 of feat (N, D), labels (N,); 0 for a class without samples."""
    n = torch.bincount(labels)[:, None].double()                                # (K, 1)
    sums = torch.zeros(len(n), feat.shape[1], dtype=torch.float64, device=feat.device)
    return sums.index_add(0, labels, feat.double()) / n.clamp(min=1)


def fisher_ratio(feat, labels):
    """Fisher's discriminant ratio trace(S_W^-1 S_B) of feat (N, D), labels (N,), in float64:
    S_B = sum_k n_k (mu_k - mu)(mu_k - mu)^T,  S_W = sum_i (f_i - mu_{y_i})(f_i - mu_{y_i})^T,  mu the mean of
    all samples. As in EWB's code dimensions are left out that vary by no more than t, or whose entries of
    S_W are all at most t, with t = 1e-3 of the mean feature; NaN if S_W is singular even so."""
    means = class_means(feat, labels)                                           # (K, D)
    feat = feat.double()
    n = torch.bincount(labels)[:, None].double()                                # (K, 1)
    between = (means - feat.mean(0)) * n.sqrt()
    within = feat - means[labels]                                               # (N, D)
    s_b = between.T @ between                                                   # (D, D)
    s_w = within.T @ within
    threshold = 1e-3 * feat.mean().abs()
    varies = (feat - feat[0]).abs().amax(0) > threshold
    keep = varies & (s_w.abs().amax(0) > threshold)
    s_b = s_b[keep][:, keep]
    s_w = s_w[keep][:, keep]
    if not keep.any() or torch.linalg.matrix_rank(s_w, hermitian=True) < len(s_w):
        return math.nan
    return torch.linalg.solve(s_w, s_b).trace().item()


def cosine_between_classes(feat, labels):
    """Fig. 1: the mean cosine of features of two classes, mean over all pairs of classes."""
    means = class_means(F.normalize(feat), labels)
    cosine = means @ means.T  # the mean cosine of features of two classes  (K, K)
    pairs = len(cosine) ** 2 - len(cosine)
    return (cosine.sum() - cosine.trace()).item() / pairs


def norms_of_means(feat, labels, counts):
    """Fig. 2: the norm of a class's mean feature, mean over each shot group's classes. counts: K training
    images."""
    norms = class_means(feat, labels).norm(dim=1).cpu()                         # (K,)
    groups = common.shot_groups(counts)
    return {name: norms[group].mean().item() for name, group in groups.items()}


# ---- the recipe

RECIPE = dict(epochs=320, batch_size=64, lr=0.01, backbone="resnet34", val_per_class=20,
              epochs2=10, lr2=0.01, weight_decay2=0.1, beta=0.9999, zeta=1e-2)  # as far as known, both codes
CHANGES = {"ce": dict(epochs=200), "wd": dict(epochs=200), "wb": dict(epochs=200),              # WB's text
           "synthetic": dict(epochs=15, epochs2=5, backbone="small", lr=0.2),                    # our demo
           "imagenet-lt": dict(epochs=200, backbone="resnext50_32x4d", zeta=1e-4),
           "inat18": dict(epochs=200, batch_size=512, backbone="resnet50")}
DECAY = {"synthetic": 1e-3, "imagenet-lt": 5e-4, "inat18": 1e-4}  # weight decay; else 5e-3 (both codes)
WB = "best epoch, flip", "WB, Table 2 (200 epochs)"
PAPER = {"ce": (*WB, {"cifar100": {100: 38.38, 50: 43.99, 10: 57.31}}),
         "wd": (*WB, {"cifar100": {100: 46.08, 50: 52.71, 10: 66.03}}),
         "wb": (*WB, {"cifar100": {100: 53.35, 50: 57.71, 10: 68.67}}),
         "fr-etf + multiplicative LA": ("", "EWB-FDR as quoted by LORT", {"cifar100": {100: 53.0}})}


def cosine_lr(epoch, epochs, lr):
    """Half a cosine from lr towards 0, one step an epoch."""
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


def parse_args(argv):
    parser = common.base_parser(__doc__)
    group = parser.add_argument_group("EWB-FDR (--weight-decay: 0 for ce and cb; on CIFAR else 5e-3)")
    add = group.add_argument
    add("--variant", choices=["ce", "cb", "wd", "wb", "etf", "fr-etf"], default="fr-etf", help="see above")
    add("--zeta", type=common.NOT_NEGATIVE, help="feature regularisation of fr-etf")
    add("--beta", type=common.number(float, 0, 1), help="of the class-balanced weights; 0: all 1")
    add("--cb-loss", choices=["bce", "ce"], help="form of the class-balanced loss (ce for cb, bce for wb)")
    add("--stage1", help="wb: weights.pt of a wd run with the same recipe, instead of training it again")
    add("--epochs2", type=common.ONE_OR_MORE, help="epochs of wb's stage 2")
    add("--lr2", type=common.POSITIVE, help="its peak learning rate")
    add("--weight-decay2", type=common.NOT_NEGATIVE, help="its weight decay")
    args = common.parse(parser, argv, RECIPE, CHANGES)
    unused = () if args.variant == "wb" else ("stage1", "epochs2", "lr2", "weight_decay2")
    if args.variant not in ("cb", "wb"):
        unused += ("cb_loss", "beta")
    if args.variant != "fr-etf":
        unused += ("zeta",)
    common.refuse_without_effect(parser, args, f"--variant {args.variant}", *unused)
    if args.dataset == "inat18" and args.variant in ("etf", "fr-etf"):
        common.fail("a simplex ETF of 8,142 classes needs as many dimensions: --variant ce, cb, wd, wb")
    decay = 0.0 if args.variant in ("ce", "cb") else DECAY.get(args.dataset, 5e-3)
    if args.weight_decay is None:
        args.weight_decay = decay
    args.published &= args.weight_decay == decay
    if args.cb_loss is None:
        args.cb_loss = "bce" if args.variant == "wb" else "ce"
    return args


def main(argv=None):
    args = parse_args(argv)
    variant = args.variant
    if (variant, args.cb_loss) in (("wb", "ce"), ("cb", "bce")):  # not the form in its paper's code
        variant = f"{variant}-{args.cb_loss}"
    run = common.Run(args, "ewb_fdr", variant, PAPER)
    data = common.load_data(args, run.device)
    if data.val is None and args.variant == "fr-etf":
        common.fail("gamma is chosen on validation images: give --val-per-class, or a val set")
    net = common.BACKBONES[args.backbone](len(data.counts))
    if args.variant in ("etf", "fr-etf"):
        dim = net.fc.in_features
        etf = common.simplex_etf(len(data.counts), dim, torch.Generator().manual_seed(args.seed))
        net.fc.weight = torch.nn.Parameter(etf, requires_grad=False)
        torch.nn.init.uniform_(net.fc.bias, -1 / dim, 1 / dim)  # learned; starts as in the authors' code
    if args.stage1:
        recipe = ("val_per_class", "seed", "epochs", "batch_size", "lr", "weight_decay")
        wanted = {name: vars(args)[name] for name in recipe}
        net, data, stage1_flags = common.load_stage1(args, data, variant="wd", **wanted)
    net.to(run.device, memory_format=torch.channels_last)
    weights = common.class_balanced_weights(data.counts, args.beta).to(run.device)     # (K,)
    run.begin(data, net)

    # the one stage; of wb the first
    optimizer = torch.optim.SGD(net.parameters(), torch.tensor(args.lr, device=run.device), momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)

    def step(x, labels):
        with run.autocast():
            feat = net.features(x).float()
        logits = net.fc(feat)
        if args.variant == "cb":
            loss = class_balanced_loss(logits, labels, weights, args.cb_loss)
        else:
            loss = F.cross_entropy(logits, labels)
        if args.variant == "fr-etf":
            loss = loss + args.zeta * feature_regularization(feat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    net.train()
    if not args.stage1:
        step = run.captured(step, net, optimizer)
        for epoch in run.epochs("stage1", args.epochs, net, optimizer):
            common.set_lr(optimizer, cosine_lr(epoch, args.epochs, args.lr))
            losses = []
            for x, labels in common.batches(data.train, args.batch_size, run.generator):
                losses.append(step(x, labels))
            run.log(losses)
            if run.eval_due():
                run.keep_best(net.fc(common.features(net, data.test)))

    if args.variant == "wb":  # stage 2: the classifier alone, balanced
        net.requires_grad_(False)
        net.fc.requires_grad_(True)
        delta = common.max_norm_threshold(net.fc.weight)
        lr2 = torch.tensor(args.lr2, device=run.device)
        optimizer2 = torch.optim.SGD(net.fc.parameters(), lr2, momentum=0.9, weight_decay=args.weight_decay2,
                                     fused=True)

        def balance(x, labels):
            with torch.no_grad(), run.autocast():
                feat = net.features(x).float()
            loss = class_balanced_loss(net.fc(feat), labels, weights, args.cb_loss)
            optimizer2.zero_grad()
            loss.backward()
            optimizer2.step()
            return loss.detach()

        balance = run.captured(balance, net, optimizer2)
        for epoch in run.epochs("stage2", args.epochs2, net, optimizer2):
            common.set_lr(optimizer2, cosine_lr(epoch, args.epochs2, args.lr2))
            losses = []
            for x, labels in common.batches(data.train, args.batch_size, run.generator):
                losses.append(balance(x, labels))
            run.log(losses)
            common.max_norm_(net.fc.weight, delta)
            if run.eval_due():
                run.keep_best(net.fc(common.features(net, data.test)))

    # the network, adjusted additively, adjusted multiplicatively
    net.requires_grad_(False)
    run.compute_test_features(net)
    run.score(variant, net.fc, run.best_test)
    if data.val:  # iNaturalist 2018 has none
        val = common.features(net, data.val)                                    # (N, D)
        tau = choose(additive_la, net.fc(val), data.val.labels, data.counts)
        gamma = choose(multiplicative_la, unit_rows(net.fc, val), data.val.labels, data.counts)

        def additive(feat):
            return additive_la(net.fc(feat), data.counts, tau)

        def multiplicative(feat):
            return multiplicative_la(unit_rows(net.fc, feat), data.counts, gamma)

        run.score(f"{variant} + additive LA", additive, strength=tau)
        run.score(f"{variant} + multiplicative LA", multiplicative, strength=gamma)

    parts = {"train": (common.features(net, data.train), data.train.labels),
             "test": (run.feat, data.test.labels)}
    metrics = {"fisher_ratio": {}, "cosine_between_classes": {}, "norms_of_means": {}}
    if args.stage1:
        metrics["stage 1 was trained with"] = stage1_flags
    for part, (feat, labels) in parts.items():
        metrics["fisher_ratio"][part] = fisher_ratio(feat, labels)
        metrics["cosine_between_classes"][part] = cosine_between_classes(feat, labels)
        metrics["norms_of_means"][part] = norms_of_means(feat, labels, data.counts)
    scales = [m.weight.mean().item() for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    headline = f"{variant} + multiplicative LA" if args.variant == "fr-etf" else variant
    run.finish(net, headline, **metrics, batchnorm_scale=sum(scales) / len(scales))


if __name__ == "__main__":
    common.guard(main)

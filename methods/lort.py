"""LORT: Rethinking Classifier Re-Training in Long-Tailed Recognition: A Simple Logits Retargeting Approach.
Lu, Sun, Xie, Zhang, Yang, Yan, arXiv 2403.00250 (ICLR 2025 as 'Label Over-Smooth').

Idea: after ordinary training, retrain the classifier alone towards targets that are almost uniform. All logits then
become small and equally large over the classes, without knowing how many images a class has.

    stage 1   cross-entropy with tuned weight decay, the whole network
    stage 2   f frozen, z = W^T f(x) + b starts from stage 1:
              L = -sum_i t_i log softmax(z)_i,   t_y = 1 - delta + delta/K,  t_i = delta/K for i != y          (eq. 13)
              delta = 0.98: with K = 100 the targets are 0.0298 and 0.0098

    Logits Magnitude     L_i = mean of z_i over images of class i - mean of z_i over all others                (Def. 1)
    regularised std      r_i = std of z_i over all images / L_i                                                (Def. 2)

To reproduce: CIFAR-100-LT, IF 100, ResNet-34: LORT 54.9 (best of five runs, best test epoch, flip averaging); stage 1
48.4, which Table 1 gives for the features of WB, whose code trains 320 epochs.

Code read: bilibili/LOS.
Departures
- Last epoch, one view, mean over seeds; the paper's flip averaging stands in its own column. Stage 2 too starts from the
  last epoch; in the authors' code from the one that was best on the test set.
- The field's shuffled subset; the authors' code takes the first images of each class.
- As in the authors' code, the convolutions start from PyTorch's default; --init he is WB's and EWB's network.
- --bn train follows the authors' code: in stage 2 normalisation uses the batch and its running statistics move on,
  although f is 'frozen'. --bn eval freezes them too, as the text says.
- r_i: over all test images (the text does not say which) and with the population's deviation.

    python methods/lort.py                        python methods/lort.py --stage1 runs/.../stage1.pt
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# ---- the method


def lort_loss(logits, labels, delta):
    """Eq. 13: cross-entropy with the retargeted labels. logits (B, K), labels (B,), 0 <= delta < 1 (0: cross-entropy)."""
    return F.cross_entropy(logits, labels, label_smoothing=delta)


def logits_magnitude(logits, labels):
    """Def. 1: L_i, (K,). logits (N, K), labels (N,)."""
    own = F.one_hot(labels, logits.shape[1]).to(logits)                         # (N, K)
    return (logits * own).sum(0) / own.sum(0) - (logits * (1 - own)).sum(0) / (1 - own).sum(0)


def regularized_std(logits, labels):
    """Def. 2: r_i = sigma(z_i) / L_i, (K,). logits (N, K), labels (N,)."""
    return logits.std(0, correction=0) / logits_magnitude(logits, labels)


# ---- the recipe

RECIPE = dict(epochs=200, batch_size=64, lr=0.01, weight_decay=5e-3, backbone="resnet34",       # the authors' code
              epochs2=20, lr2=5e-4, weight_decay2=0.0, delta=0.98, bn="train", stage1=None, init="torch")
CHANGES = {"synthetic": dict(epochs=15, epochs2=5, backbone="small", lr=0.2, lr2=0.02, weight_decay=1e-3)}  # ours, for the demo
HABIT = "best of 5, flip, best test epoch"
PAPER = {"stage 1": (f"Table 1, on WB's features: {HABIT}", {("cifar100", 100): 48.4}),
         "lort": (f"Table 2: {HABIT}", {("cifar100", 100): 54.9, ("cifar100", 50): 58.8, ("cifar100", 10): 69.7})}


def cosine_lr(epoch, epochs, lr):
    """Half a cosine from lr towards 0, one step an epoch."""
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


def parse_args(argv):
    parser = common.base_parser(__doc__)
    add = parser.add_argument_group("LORT").add_argument
    add("--delta", type=common.number(float, lambda v: 0 <= v < 1, "in [0, 1)"), help="of the targets; 0 is cross-entropy")
    add("--stage1", type=common.FILE,
        help="weights to retrain instead of training stage 1: a run's weights.pt or stage1.pt, or a state_dict")
    add("--epochs2", type=common.ONE_OR_MORE, help="epochs of stage 2")
    add("--lr2", type=common.POSITIVE, help="peak learning rate of stage 2")
    add("--weight-decay2", type=common.NOT_NEGATIVE, help="of the classifier in stage 2")
    add("--init", choices=["torch", "he"], help="of the convolutions: nn.Conv2d's own; or He et al.'s, as the other scripts")
    add("--bn", choices=["train", "eval"], help="normalisation in stage 2: moving on, or frozen")
    stage1 = dict.fromkeys(("epochs", "lr", "weight_decay", "init"), ("stage1", None))
    return common.parse(parser, argv, RECIPE, CHANGES, only=stage1)


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args, "lort", "lort")
    data = common.load_data(args, run.device)
    net = common.BACKBONES[args.backbone](len(data.counts))
    for module in net.modules():
        if args.init == "torch" and isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    net.to(run.device, memory_format=torch.channels_last)
    lrs = [] if args.stage1 else [cosine_lr(e, args.epochs, args.lr) for e in range(args.epochs)]
    lrs2 = [cosine_lr(e, args.epochs2, args.lr2) for e in range(args.epochs2)]
    same = {key: vars(args)[key] for key in ("dataset", "imb_factor", "subset_seed")}
    stage1_flags = common.load_net(net, args.stage1, same, data) if args.stage1 else run.flags
    if stage1_flags.get("val_per_class", 0) < args.val_per_class:
        common.fail(f"{args.stage1} may have been trained on the images that --val-per-class {args.val_per_class} holds out")
    run.begin(data, net, lrs, lrs2)

    def score(name):
        """The test logits (N, K) and their row of the table."""
        logits, _ = common.predict(net, data.test)
        flipped, _ = common.predict(net, data.test, flip=True)
        acc, acc_flip = (common.report(z, data.test.labels, data.counts) for z in (logits, flipped))
        return logits, common.row(name, PAPER, args, acc, acc_flip, run.best_test)

    # stage 1: the whole network
    optimizer = torch.optim.SGD(net.parameters(), torch.tensor(args.lr, device=run.device), momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)

    def step(x, labels):
        with run.autocast():
            feat = net.features(x).float()
        loss = F.cross_entropy(net.fc(feat), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = common.captured(step, net, optimizer)
    net.train()
    if not args.stage1:
        for epoch in run.epochs("stage1", args.epochs, net, optimizer):
            common.set_lr(optimizer, lrs[epoch])
            losses = []
            for x, labels in common.batches(data.train, args.batch_size, run.generator):
                losses.append(step(x, labels))
            run.log(losses)
            if run.test_now():
                run.tested(common.predict(net, data.test)[0])
    common.save(run.folder / "stage1.pt", {"net": net.state_dict(), "flags": stage1_flags, "content": data.subset["content"]})
    logits1, row1 = score("stage 1")

    # stage 2: the classifier alone, towards nearly uniform targets
    net.requires_grad_(False)
    net.fc.requires_grad_(True)
    optimizer2 = torch.optim.SGD(net.fc.parameters(), torch.tensor(args.lr2, device=run.device), momentum=0.9,
                                 weight_decay=args.weight_decay2, fused=True)

    def retarget(x, labels):
        with torch.no_grad(), run.autocast():
            feat = net.features(x).float()
        loss = lort_loss(net.fc(feat), labels, args.delta)
        optimizer2.zero_grad()
        loss.backward()
        optimizer2.step()
        return loss.detach()

    retarget = common.captured(retarget, net, optimizer2)
    net.train(args.bn == "train")
    for epoch in run.epochs("stage2", args.epochs2, net, optimizer2):
        common.set_lr(optimizer2, lrs2[epoch])
        losses = []
        for x, labels in common.batches(data.train, args.batch_size, run.generator):
            losses.append(retarget(x, labels))
        run.log(losses)
        if run.test_now():
            run.tested(common.predict(net, data.test)[0])

    logits2, row2 = score("lort")
    metrics = {"stage 1 was trained with": stage1_flags or "unknown"} if args.stage1 else {}
    for stage, logits in (("stage 1", logits1), ("lort", logits2)):
        magnitude, deviation = logits_magnitude(logits, data.test.labels), regularized_std(logits, data.test.labels)
        for name, group in common.shot_groups(data.counts).items():
            metrics[f"{stage}, {name}"] = {"logits magnitude": magnitude[group].mean().item(),
                                           "regularised std": deviation[group].mean().item()}
    run.finish(net, {"stage1": logits1, "lort": logits2}, [row1, row2], **metrics, **common.val_scores(net, data))


if __name__ == "__main__":
    common.guard(main)

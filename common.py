"""What the scripts in methods/ must agree on for their numbers to be comparable: which images, how a batch is drawn,
which layers, what "few" means, how a run is kept and resumed. No method and no training loop is in here.

    python common.py runs/results.jsonl [more.jsonl ...]        prints results as one markdown table
"""
import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

# ---------------------------------------------------------------------------------------------------- 1 the run


def fail(message):
    """Bad input: one line on stderr, exit code 2, no traceback."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def guard(main):
    """Call a script's main(); what stops a run from outside becomes one line too."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped: the same command, without --overwrite, goes on from the last saved epoch", file=sys.stderr)
        raise SystemExit(130) from None
    except (RuntimeError, MemoryError) as error:  # torch has several kinds
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        fail("out of memory: run again with --overwrite and a smaller --batch-size (or --dim, --width, --image-size)")
    except OSError as error:
        fail(f"{error}: what was saved is intact; the same command, without --overwrite, goes on from there")


def number(kind, ok, wanted):
    """An argparse type: kind(text), refused unless ok(value); NaN fails every comparison and so is refused too."""
    def parse(text):
        if not ok(value := kind(text)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value
    parse.__name__ = "number"
    return parse


SAVE_EVERY = 30.0  # seconds
AT_ONCE = 2**25    # values that are augmented together, 128 MB as floats: all of CIFAR-100-LT at IF 100
ONE_OR_MORE = number(int, lambda n: 1 <= n <= 10**6, "from 1 to a million")
ZERO_OR_MORE = number(int, lambda n: 0 <= n < 2**32, "0 or more, and below 2^32")
POSITIVE = number(float, lambda v: 1e-30 < v < 1e30, "above 0 and below 1e30")
NOT_NEGATIVE = number(float, lambda v: 0 <= v < 1e30, "0 or more, and below 1e30")
FILE = number(str, bool, "a file")
FACTOR = number(lambda text: text if text == "natural" else float(text), lambda v: v == "natural" or 1 <= v < math.inf,
                "1 or more, or 'natural'")


def base_parser(doc):
    """The flags of every script; the defaults of the paper's recipe come with parse()."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument_group("common flags").add_argument
    add("--dataset", type=os.path.normpath, default="cifar100",
        help="cifar10, cifar100, synthetic, or a folder with your own images")
    add("--data-root", help="folder of the CIFAR files (data), or of the images that your own lists name (the lists')")
    add("--imb-factor", type=FACTOR, default=100.0, help="images of the largest class over the smallest; natural: use all")
    add("--subset-seed", type=ZERO_OR_MORE, default=0, help="which images are kept; 0 is the field's standard subset")
    add("--val-per-class", type=ZERO_OR_MORE, default=0, help="validation images per class, never trained on")
    add("--image-size", type=number(int, lambda n: 16 <= n < 2**12, "16 or more, and below 4096"),
        help="pixels a side: scales and crops your own images")
    add("--seed", type=ZERO_OR_MORE, default=0, help="of the initial weights, the order and the augmentation")
    add("--epochs", type=ONE_OR_MORE, help="of stage 1, if there are two")
    add("--batch-size", type=ONE_OR_MORE, help="images per step")
    add("--lr", type=POSITIVE, help="peak learning rate")
    add("--weight-decay", type=NOT_NEGATIVE, help="of every trained parameter, biases and normalisation too")
    add("--backbone", choices=list(BACKBONES), help="network below the classifier")
    add("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto",
        help="auto: on a GPU bf16 for resnet34, else tf32; on a CPU fp32. Weights are always fp32")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--deterministic", action="store_true", help="repeat bit for bit on a GPU too, more slowly")
    add("--eval-every", type=ZERO_OR_MORE, default=0, help="score the test set every N epochs and after the last")
    add("--out", default="runs", help="folder of results.jsonl and of the runs' own folders")
    add("--overwrite", action="store_true", help="delete what this run has left, and start again")
    return parser


def parse(parser, argv, recipe, changes, only={}):
    """Parse argv. Defaults: the recipe, as changed by changes[dataset], or changes["own"] for your own images.
    only: {flag: (another, its values with which the flag has an effect)}; a flag without effect is refused.
    args.published: every flag of the recipe has the paper's value; only then row() puts the paper's number beside ours."""
    recipe = {"subset_seed": 0, "val_per_class": 0} | recipe
    parser.set_defaults(**recipe)
    dataset = parser.parse_args(argv).dataset
    recipe = recipe | changes.get(dataset if dataset in DATASETS else "own", {})
    parser.set_defaults(**recipe, **({} if dataset in DATASETS else {"imb_factor": "natural"}))
    args = parser.parse_args(argv)
    for flag, (key, *values) in only.items():
        if getattr(args, flag) != parser.get_default(flag) and getattr(args, key) not in values:
            fail(f"--{flag.replace('_', '-')} has no effect with --{key} {getattr(args, key)}")
    for flag, without in (("image_size", DATASETS), ("data_root", ("synthetic",))):
        if getattr(args, flag) and dataset in without:
            fail(f"--{flag.replace('_', '-')} has no effect on {dataset}")
    args.published, args.argv = all(vars(args)[key] == recipe[key] for key in recipe), sys.argv[1:] if argv is None else argv
    return args


def save(path, content):
    """Write bytes, or a dict of tensors, under a temporary name and rename: the file is whole, or as it was before."""
    if isinstance(content, dict):
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getbuffer()
    path = path.resolve()  # a link stays one
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # if it did not get that far


def load(path):
    """The dict of tensors in a file; a damaged or foreign file is refused."""
    try:
        if zipfile.ZipFile(path).testzip() is None:
            return dict(torch.load(path, "cpu", weights_only=True))
    except Exception:  # zipfile and torch.load raise many kinds; to the user they are one
        pass
    fail(f"{path} is damaged, or no checkpoint: delete it, or name another")


def same_flags(path, flags, needed, remedy=""):
    """Refuse a file whose flags are not as needed."""
    for key in sorted(needed):
        if flags.get(key) != needed[key]:
            fail(f"{path} was made with --{key.replace('_', '-')} {flags.get(key)}, not {needed[key]}{remedy}")


def load_net(net, path, needed, data):
    """Load a run's weights.pt, or a bare state_dict, into net. Returns the flags it was trained with, {} if it does not
    tell them; those in `needed` must be as there, and the images must be those of `data`."""
    state = load(path)
    try:
        net.load_state_dict(state.get("net", state))
    except (RuntimeError, AttributeError, TypeError):
        fail(f"{path} does not hold the weights of this network ({type(net).__name__}, {net.fc.out_features} classes)")
    flags = state["flags"] if isinstance(state.get("flags"), dict) else {}
    same_flags(path, flags, needed if flags else {})
    if flags and state.get("content", data.subset["content"]) != data.subset["content"]:
        fail(f"{path} was trained on other images: the data have changed")
    return flags


def load_results(path):
    """The lines of a results.jsonl."""
    results, k = [], 0
    try:
        for k, line in enumerate(path.read_text().splitlines()):
            results += [json.loads(line)] if line.strip() else []
            table(results[-1:])  # raises if a field is missing
        return results
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        fail(f"line {k + 1} of {path} is no result: mend or delete it ({type(error).__name__}: {error})")


def lock(folder, wait=0):
    """Keep other processes out of a folder until the returned handle is closed; wait: fcntl.LOCK_NB to raise instead."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | wait)
    return handle


def schedule_text(lrs):
    """The learning rate of about every tenth epoch and of the last, in words."""
    shown = [*range(0, len(lrs) - 1, math.ceil(len(lrs) / 10)), len(lrs) - 1]
    return f"{len(lrs)} epochs, lr of epoch " + ", ".join(f"{e + 1}: {lrs[e]:.3g}" for e in shown)


class Run:
    """One run: its folder, device and random numbers, the protocol it prints, its checkpoints, its result."""

    def __init__(self, args, method, variant):
        if args.dataset not in DATASETS and not os.path.isdir(args.dataset):
            fail(f"--dataset {args.dataset}: not one of {', '.join(DATASETS)}, and no such folder")
        self.args, self.method, self.variant, self.history, self.best_test = args, method, variant, [], None
        self.device, self.precision = self._machine()
        self.flags = vars(args) | {"device": self.device.type, "precision": self.precision}  # what 'auto' came to
        for key in ["out", "overwrite", "argv", "published"] + ["data_root"] * (args.dataset in DATASETS):
            del self.flags[key]  # these do not change the result
        if stage1 := self.flags.get("stage1"):  # the same name may hold another network when the run goes on
            try:
                self.flags["stage1_sha256"] = hashlib.sha256(Path(stage1).read_bytes()).hexdigest()[:16]
            except (OSError, ValueError) as error:
                fail(f"--stage1 {stage1}: {error}")
        imb_factor = args.imb_factor if args.imb_factor == "natural" else f"if{args.imb_factor:g}"
        name = f"{method}-{variant}-{Path(args.dataset).resolve().name}-{imb_factor}-seed{args.seed}"
        self.folder, self.results = Path(args.out, name), Path(args.out, "results.jsonl")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            open(self.results, "a").close()
            self.lock = lock(self.folder, fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{self.folder} is in use by another process: wait for it, or choose another --out")
        except OSError as error:
            fail(f"--out {args.out}: cannot write there ({error.strerror})")
        finished = [result for result in load_results(self.results) if result.get("folder") == name]
        weights = self.folder / "weights.pt"
        if args.overwrite:
            if stage1 and Path(stage1).resolve().parent == self.folder.resolve():
                fail(f"--overwrite would delete {stage1}: move it, or choose another --out")
        elif finished:
            self._refuse_other(self.results, finished[-1].get("flags"))
            if weights.exists():
                print(f"{self.folder} is finished; --overwrite runs it again\n{table(finished[-1:])}")
                raise SystemExit(0)
        elif weights.exists():
            self._refuse_other(weights, load(weights).get("flags"))
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)  # draws order and augmentation

    def _machine(self):
        args, gpus = self.args, torch.cuda.device_count()
        cuda = re.fullmatch(r"cuda(:\d+)?", args.device)
        if args.device not in ("auto", "cpu") and not (cuda and int(args.device[5:] or 0) < gpus):
            fail(f"--device {args.device}: use auto, cpu, cuda or cuda:N; this machine has {gpus} CUDA devices")
        device = torch.device(("cuda" if gpus else "cpu") if args.device == "auto" else args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # streams and graphs are made on the current device
        auto = "fp32" if device.type == "cpu" else "bf16" if args.backbone == "resnet34" else "tf32"
        precision = args.precision.replace("auto", auto)
        if (device.type, precision) == ("cpu", "tf32"):
            fail("--precision tf32 needs a GPU; a CPU has fp32 and bf16")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"  # convolutions; matrix products stay in fp32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic products on a GPU need
        torch.use_deterministic_algorithms(args.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which costs time and which no result needs
        return device, precision

    def _refuse_other(self, path, flags):
        if not isinstance(flags, dict):
            fail(f"{path} is not of this run: delete it, or --overwrite")
        same_flags(path, flags, dict.fromkeys(flags) | self.flags, ": choose another --out, or --overwrite")

    def begin(self, data, net, *stages, augmentation="crop, flip"):
        """Print and keep the protocol; all is checked by now. stages: the learning rates of the epochs of each."""
        self.data, self.params = data, sum(p.numel() for p in net.parameters())
        if self.args.overwrite:
            self._record([])
            for path in [*self.folder.glob("*.ckpt"), *self.folder.glob("*.pt")]:
                path.unlink()
        gpu = self.device.type == "cuda"
        self.machine = torch.cuda.get_device_name(self.device) if gpu else f"CPU, {torch.get_num_threads()} threads"
        shots = ", ".join(f"{group.sum()} {name}" for name, group in shot_groups(data.counts).items())
        self.protocol = {
            "subset": "{rule}; {total:,} images, sha256 {sha256}".format(**data.subset),
            "training": f"{sum(data.counts):,} images, {max(data.counts)} to {min(data.counts)} per class; classes: {shots}",
            "held out": f"{len(data.val.labels if data.val else []):,} for validation, {len(data.test.labels):,} for the test",
            "network": f"{self.args.backbone}, {self.params:,} parameters, "
                       f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,} of them trained",
            "batches": f"{self.args.batch_size} images, {augmentation}",
            "schedule": "; then ".join(schedule_text(lrs) for lrs in stages if lrs),
            "arithmetic": f"{self.precision} on {self.machine}, seed {self.args.seed}",
            "reported": "last epoch, one view; 'flip' is the mean of the logits of an image and its mirror image"}
        print(f"{self.method}, {self.variant}, {self.args.dataset} -> {self.folder}")
        print(*(f"  {key + ':':12}{text}" for key, text in self.protocol.items()), sep="\n", flush=True)

    def autocast(self):
        """For the forward pass: bf16 where --precision says so. Losses are computed outside of it, in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def epochs(self, stage, total, net, optimizer):
        """Yield the epochs of `stage` still to do, from where an earlier process left it; each ends with log(). Saves when
        SAVE_EVERY seconds have passed (less often if saving would take over 1 % of the time), and after the last epoch."""
        path, start, self.best_test = self.folder / f"{stage}.ckpt", 0, None
        self.stage, self.total, self.optimizer = stage, total, optimizer
        if path.exists():
            state = load(path)
            self._refuse_other(path, state.get("flags"))
            if state.get("subset") != self.data.subset:
                fail(f"{path} was trained on other images: the data have changed; --overwrite starts the run again")
            try:
                net.load_state_dict(state["net"])
                optimizer.load_state_dict(state["optimizer"])
                self.generator.set_state(state["generator"])
                start, self.history, self.best_test = state["epoch"], state["history"], state["best_test"]
            except (RuntimeError, ValueError, KeyError, TypeError):
                fail(f"{path} does not fit this version of the script: --overwrite starts the run again")
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].to(self.device)
        saved, pause = time.monotonic(), SAVE_EVERY
        with tqdm(total=total, initial=start, desc=stage, unit="epoch", disable=not sys.stderr.isatty()) as self.bar:
            for self.epoch in range(start, total):
                self.began = time.monotonic()
                yield self.epoch
                self.bar.update()
                if self.epoch + 1 == total or time.monotonic() - saved > pause:
                    saved = time.monotonic()
                    save(path, {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "flags": self.flags,
                                "subset": self.data.subset, "generator": self.generator.get_state(), "epoch": self.epoch + 1,
                                "history": self.history, "best_test": self.best_test})
                    save(self.folder / "log.jsonl", "".join(json.dumps(h) + "\n" for h in self.history).encode())
                    saved, pause = time.monotonic(), max(SAVE_EVERY, 100 * (time.monotonic() - saved))

    def log(self, losses, **extra):
        """Close an epoch. losses: the 0-d losses of its steps; one that is no number ends the run."""
        loss, lr = torch.stack(losses).mean().item(), self.optimizer.param_groups[0]["lr"].item()
        seconds = time.monotonic() - self.began
        if not self.folder.exists() or not os.path.samestat(os.stat(self.folder), os.fstat(self.lock)):
            fail(f"{self.folder} was moved or deleted while this run was at work")
        if not math.isfinite(loss):
            fail(f"the loss is {loss} in epoch {self.epoch + 1} of {self.stage}: try a lower --lr, or --precision fp32, "
                 "with --overwrite")
        self.history.append({"stage": self.stage, "epoch": self.epoch + 1, "loss": loss, "lr": lr, "seconds": seconds, **extra})
        line = f"loss {loss:.4f}, lr {lr:.4g}, {len(self.data.train.labels) / seconds:.0f} images/s"
        self.bar.set_postfix_str(line)
        if self.bar.disable and (self.epoch + 1) * 10 // self.total > self.epoch * 10 // self.total:
            print(f"  {self.stage}, epoch {self.epoch + 1} of {self.total}: {line}, "
                  f"{(self.total - self.epoch - 1) * seconds:.0f} s left", flush=True)

    def test_now(self):
        """Whether --eval-every asks for the test set after this epoch; if at all, then after the last one too."""
        every = self.args.eval_every
        return every > 0 and ((self.epoch + 1) % every == 0 or self.epoch + 1 == self.total)

    def tested(self, logits, **extra):
        """Keep the best accuracy of this stage, which is nothing but the papers' habit. logits (N, C) of the test set; extra: for
        the epoch's line in log.jsonl."""
        self.history[-1] |= extra
        self.best_test = max(self.best_test or 0.0, report(logits, self.data.test.labels, self.data.counts)["all"])

    def finish(self, net, logits, rows, headline=-1, **metrics):
        """Keep the weights, the test logits {name: (N, C)} and one result line. rows: from row(), one of them the headline."""
        if not all(v.isfinite().all() for v in logits.values()):
            fail("the test logits are not finite: try a lower --lr, or --precision fp32, with --overwrite")
        args, test, seconds = self.args, self.data.test, sum(h["seconds"] for h in self.history)
        result = {
            "method": self.method, "variant": self.variant, "dataset": args.dataset, "imb_factor": args.imb_factor,
            "seed": args.seed, **rows[headline], "rows": rows, "metrics": metrics,
            "subset": self.data.subset, "backbone": args.backbone, "params": self.params, "flags": self.flags,
            "protocol": self.protocol, "seconds": round(seconds, 1), "device": self.machine, "precision": self.precision,
            "images_per_s": round(len(self.data.train.labels) * len(self.history) / max(seconds, 1e-9)),
            "peak_memory_mb": torch.cuda.max_memory_allocated() >> 20 if self.device.type == "cuda" else None,
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "folder": self.folder.name,
            "command": shlex.join([f"methods/{self.method}.py", *args.argv])}
        result = json.loads(json.dumps(result, default=str), parse_constant=lambda _: None)  # JSON has no NaN
        logits = {"labels": test.labels, "counts": torch.tensor(self.data.counts), **logits}
        save(self.folder / "weights.pt", {"net": net.cpu().state_dict(), "flags": self.flags, "mean": test.mean.cpu(),
                                          "std": test.std.cpu(), "content": self.data.subset["content"],
                                          "classes": self.data.classes})
        save(self.folder / "test_logits.pt", {k: v.cpu() for k, v in logits.items()})
        self._record([result])
        for path in self.folder.glob("*.ckpt"):
            path.unlink()
        print(*(f"  {key}: {value}" for key, value in result["metrics"].items()), table([result]), sep="\n")

    def _record(self, results):
        """Put these lines into results.jsonl in place of this run's, whoever else is writing."""
        handle = lock(self.results.resolve().parent)
        others = [result for result in load_results(self.results) if result.get("folder") != self.folder.name]
        save(self.results, "".join(json.dumps(result) + "\n" for result in others + results).encode())
        os.close(handle)


# ---------------------------------------------------------------------------------------------------- 2 data

DATASETS = ("cifar10", "cifar100", "synthetic")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10; the field uses them for both
FINGERPRINTS = {  # of the field's standard subsets: sha256 of the indices, first 16 digits
    "cifar10": {10: "a17d69f192b1cf6d", 50: "d7edcfaf02772bee", 100: "4bf45bff8878d278", 200: "a88004a1d1361093"},
    "cifar100": {10: "b4fbf1bf0a7f3338", 50: "561fa940cc7d3551", 100: "e0d58a4d2700c460", 200: "2f00ccd33da379d5"}}


class Split(NamedTuple):
    images: torch.Tensor  # (N, H, W, 3) uint8
    labels: torch.Tensor  # (N,) int64
    mean: torch.Tensor    # (3,) float32, in grey levels, as std
    std: torch.Tensor


class Data(NamedTuple):
    train: Split
    val: Split | None
    test: Split
    counts: list          # training images per class
    subset: dict          # rule, total and sha256 of the subset before validation images are held out; content: of all images
    classes: list | None  # the names of your own classes in the order of their numbers


def exp_counts(n_max, num_classes, imb_factor):
    """Training images per class, head first: int(n_max * imb_factor ** (-c / (C - 1))), as LDAM-DRW (Cao et al. 2019)."""
    return [int(n_max * imb_factor ** (-c / max(num_classes - 1, 1))) for c in range(num_classes)]


def long_tail_indices(labels, counts, seed=0):
    """The field's standard subset: per class in label order, shuffle its indices and keep the first counts[c].

    labels: (N,) ints. Returns (sum(counts),) int64; seed 0 gives LDAM-DRW's images in LDAM-DRW's order, from a
    generator of its own. Raises ValueError where a class has too few images.
    """
    rng, labels, kept = np.random.RandomState(seed), np.asarray(labels), []
    for c, n in enumerate(counts):
        rng.shuffle(index := np.where(labels == c)[0])
        if n > len(index):
            raise ValueError(f"class {c} has {len(index)} images, not {n}")
        kept.append(index[:n])
    return np.concatenate(kept).astype(np.int64)


def cifar(name, root):
    """[(images, labels) of the training set, the same of the test set], read and if need be fetched by torchvision."""
    import torchvision
    source = getattr(torchvision.datasets, name.upper())
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = lock(root)  # one download, however many runs start at once; files that are there and whole are left alone
        parts = [source(root, train=True, download=True), source(root, train=False)]
        os.close(handle)
    except Exception as error:  # torchvision raises many kinds
        folder, files = root / source.base_folder, dict(source.train_list + source.test_list)
        files[source.meta["filename"]] = source.meta["md5"]
        bad = [file for file in files if not torchvision.datasets.utils.check_integrity(folder / file, files[file])]
        fail(f"{folder}: missing or damaged: {', '.join(bad)}; the download failed ({error}): put torchvision's files there, "
             "or try --dataset synthetic, which needs none")
    return [(part.data, np.array(part.targets)) for part in parts]


def synthetic():
    """Like cifar(): 20 classes, 250 training and 50 test images each. A class is a smooth random 16 x 16 pattern; an
    image blends it with another class's and adds noise."""
    rng = np.random.RandomState(0)
    patterns = F.interpolate(torch.from_numpy(rng.randn(20, 3, 4, 4)), 16, mode="bicubic").permute(0, 2, 3, 1).numpy()

    def draw(n):
        labels = np.repeat(np.arange(20), n)
        blend = rng.uniform(0, 0.5, (len(labels), 1, 1, 1))
        images = (1 - blend) * patterns[labels] + blend * patterns[rng.permutation(labels)]
        return (128 + 40 * (images + 1.2 * rng.randn(*images.shape))).clip(0, 255).astype(np.uint8), labels
    return draw(250), draw(50)


def own_data(folder, root, size):
    """train, test and val of (images, labels), val None if there is none; and the class names, numbered by their training
    images, the largest first. The folder holds train/, test/ and maybe val/ with a folder per class, or *train.txt, *test.txt
    and maybe *val.txt of lines `path label`, the paths below root. size: pixels a side, or None for one size as it is."""
    from PIL import Image, ImageOps
    from torchvision.datasets import ImageFolder
    files, images = {}, {"val": None}
    for part in ("train", "test", "val"):
        lists = list(folder.glob(f"*{part}.txt"))
        try:
            if (folder / part).is_dir():
                if lists:
                    raise ValueError(f"there are {part}/ and {lists[0].name}")
                found = ImageFolder(folder / part)
                files[part] = [(path, found.classes[k]) for path, k in found.samples]
            elif part != "val" or lists:
                if len(lists) != 1:
                    raise ValueError(f"there are {len(lists)}")
                text = lists[0].read_text("utf-8-sig", "replace")
                lines = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
                if odd := [line for line in lines if len(line) != 2]:
                    raise ValueError(f"not '{odd[0][0]}'")
                files[part] = [(root / path, label) for path, label in lines]
        except (OSError, ValueError) as error:
            fail(f"{folder} needs {part}/ with a folder per class, or one list *{part}.txt of lines `path label`: {error}")
    if not (sizes := Counter(label for _, label in files["train"])):
        fail(f"{folder} has no training images")
    for part in files:
        if odd := sorted(sizes.keys() ^ {label for _, label in files[part]}):
            fail(f"{folder}: class {odd[0]} is missing in {part if odd[0] in sizes else 'train'}")
    classes = sorted(sizes, key=lambda name: (-sizes[name], name))
    number_of = dict(zip(classes, range(len(classes))))

    def read(path):
        try:
            image = Image.open(path)
            if image.mode[0] in "IF":
                raise ValueError("16-bit and float pixels: convert them to 8 bits")
            image = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"{path} cannot be read as an image ({error})") from None
        return np.asarray(ImageOps.fit(image, (size, size)) if size else image)

    for part in files:
        try:
            pixels = thread_map(read, [path for path, _ in files[part]], desc=f"reading {part}", disable=None)
        except ValueError as error:
            fail(error)
        side = len(images["train"][0][0] if "train" in images else pixels[0])
        for (path, _), image in zip(files[part], pixels):
            if image.shape != (side, side, 3) or side < 16:
                fail(f"{path}: images must be squares of one size, 16 pixels or more: give --image-size")
        images[part] = np.stack(pixels), np.array([number_of[label] for _, label in files[part]])
    paths = Counter(os.path.realpath(path) for part in files for path, _ in files[part])
    if twice := [path for path, n in paths.items() if n > 1]:
        fail(f"{folder}: {twice[0]} is there more than once, train, test and val taken together")
    return images["train"], images["test"], images["val"], classes


def load_data(args, device):
    """Data: the long-tailed training set, the validation set if there is one, the whole test set."""
    val, classes, held_out, folder = None, None, args.val_per_class, Path(args.dataset)
    if args.dataset == "synthetic":
        (images, labels), test = synthetic()
    elif args.dataset in DATASETS:
        (images, labels), test = cifar(args.dataset, Path(args.data_root or "data"))
    else:
        (images, labels), test, val, classes = own_data(folder, Path(args.data_root or folder), args.image_size)
    if val and held_out:
        fail(f"--val-per-class {held_out}: {folder} has validation images of its own")
    content = hashlib.sha256()
    for array in (images, labels, *(val or []), *test):
        content.update(np.ascontiguousarray(array))
    available = np.bincount(labels).tolist()
    if len(available) < 2:
        fail(f"--dataset {args.dataset} has a single class")
    counts, rule = available, "all images"
    if args.imb_factor != "natural":
        counts = exp_counts(max(available), len(available), args.imb_factor)
        rule = f"int({max(available)} * {args.imb_factor:g}^(-c/{len(available) - 1})) of class c, seed {args.subset_seed}"
    for c, (n, there) in enumerate(zip(counts, available)):
        if n > there:
            fail(f"class {c} has {there} images, --imb-factor {args.imb_factor:g} needs {n}: try --imb-factor natural")
    # each class shuffled: its first n are the standard subset, the next ones the validation images
    shuffled = np.split(long_tail_indices(labels, available, args.subset_seed), np.cumsum(available)[:-1])
    subset = np.concatenate([index[:n] for n, index in zip(counts, shuffled)])
    sha256 = hashlib.sha256(subset.astype("<i8").tobytes()).hexdigest()[:16]
    standard = FINGERPRINTS.get(args.dataset, {}).get(args.imb_factor, sha256)
    if args.subset_seed == 0 and sha256 != standard:
        fail(f"the subset's sha256 is {sha256}, the standard one's {standard}: these are not the field's images")
    if held_out:  # of each class the next images; where none are left (the head), the class gives up some
        counts = [min(n, len(index) - held_out) for n, index in zip(counts, shuffled)]
        rest = np.concatenate([index[max(n, 0):][:held_out] for n, index in zip(counts, shuffled)])
        val = images[rest], labels[rest]
        rule += f", of which {len(subset) - sum(counts)} serve as validation images"
    if min(counts) < 1:
        fail(f"class {np.argmin(counts)} would have no training image: lower --imb-factor or --val-per-class")
    train = np.concatenate([index[:n] for n, index in zip(counts, shuffled)])
    images, labels = images[train], labels[train]  # one copy: your own images may be many gigabytes
    mean, std = 255 * np.array([CIFAR_MEAN, CIFAR_STD])
    if args.dataset not in FINGERPRINTS:  # image by image, for the same reason
        moments = [(image.mean((0, 1)), np.square(image, dtype=float).mean((0, 1))) for image in images]
        mean, square = np.mean(moments, 0)
        std = np.sqrt(np.maximum(square - mean**2, 1))  # a channel may be constant

    def split(images, labels):
        return Split(*(torch.as_tensor(a, device=device) for a in (images, labels)),
                     *(torch.as_tensor(a, dtype=torch.float32, device=device) for a in (mean, std)))
    return Data(split(images, labels), val and split(*val), split(*test), counts,
                {"rule": rule, "total": len(subset), "sha256": sha256, "content": content.hexdigest()[:16]}, classes)


# ---------------------------------------------------------------------------------------------------- 3 batches


def crop_flip(images, generator):
    """A random window of the image in a black margin of an eighth (4 pixels of 32), and a random mirror image: what
    torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip draw, for each image. (N, H, W, 3) uint8."""
    n, size, pad = len(images), images.shape[1:3], images.shape[1] // 8
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=images.device)
    mirrored = torch.rand(n, 1, 1, 1, generator=generator, device=images.device) < 0.5
    windows = F.pad(images, (0, 0, pad, pad, pad, pad)).unfold(1, size[0], 1).unfold(2, size[1], 1)  # (N, 2p+1, 2p+1, 3, H, W)
    images = windows[torch.arange(n, device=images.device), top, left].permute(0, 2, 3, 1)
    return torch.where(mirrored, images.flip(2), images)


def normalise(images, split):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels last in memory."""
    return ((images - split.mean) / split.std).permute(0, 3, 1, 2)


def batches(split, batch_size, generator, augment=crop_flip):
    """Yield an epoch of (x, labels): every image once, in random order, augmented; the last batch may be short."""
    order = torch.randperm(len(split.labels), generator=generator, device=generator.device)
    at_once = max(1, AT_ONCE // (split.images[0].numel() * batch_size)) * batch_size
    for part in order.split(at_once):
        x = normalise(augment(split.images[part], generator), split)
        yield from zip(x.split(batch_size), split.labels[part].split(batch_size))


def set_lr(optimizer, lr):
    """In place: the rate is a tensor, which a captured step reads anew."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def captured(step, net, optimizer):
    """step(x, labels) -> loss as one CUDA graph per batch size; on a CPU, step itself.

    The step must read nothing back to the host, and what changes between steps (the rate, a ramp, class weights) must
    be a tensor that is changed in place; the optimizer is SGD. Capturing leaves weights, buffers and momentum as they were.
    """
    if not next(net.parameters()).is_cuda:
        return step
    graphs, stream = {}, torch.cuda.Stream()

    def capture(x, labels):
        weights = [v.clone() for v in net.state_dict().values()]
        momentum = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: libraries choose their kernels, momentum buffers appear
            for _ in range(3):
                step(x, labels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = step(x, labels)
        for value, before in zip(net.state_dict().values(), weights):
            value.copy_(before)
        for p, state in optimizer.state.items():  # a zero buffer is as good as none
            state["momentum_buffer"].copy_(momentum.get(p, torch.zeros_like(p)))
        return graph, x, labels, loss

    def replay(x, labels):
        if len(x) not in graphs:
            graphs[len(x)] = capture(x.clone(), labels.clone())
        graph, static_x, static_labels, loss = graphs[len(x)]
        static_x.copy_(x)
        static_labels.copy_(labels)
        graph.replay()
        return loss.clone()
    return replay


# ---------------------------------------------------------------------------------------------------- 4 backbones


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights (option A: every second pixel, zeros for the new channels)."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (0, 0, 0, 0, (channels - channels_in) // 2, (channels - channels_in) // 2)

    def forward(self, x):
        shortcut = x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], self.pad)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet32(nn.Module):
    """CIFAR's ResNet-32 (He et al. 2016): features (B, 64), 470,004 parameters for 100 classes. blocks=1: the demo's."""

    def __init__(self, num_classes, blocks=5):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(*(Block(a, b, 1 + (a < b)) for a, b in zip(widths, widths[1:])))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x):
        return self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3))


class ResNet34(nn.Module):
    """torchvision's ResNet-34 with a 3x3 stem and no max-pooling, as WB, EWB-FDR and LORT use it: features (B, 512)."""

    def __init__(self, num_classes):
        super().__init__()
        from torchvision.models import resnet34
        net, conv = resnet34(), nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.body = nn.Sequential(conv, net.bn1, net.relu, net.layer1, net.layer2, net.layer3, net.layer4)
        self.fc = nn.Linear(512, num_classes)

    def features(self, x):
        return self.body(x).mean((2, 3))


BACKBONES = {"resnet32": ResNet32, "resnet34": ResNet34, "small": lambda num_classes: ResNet32(num_classes, blocks=1)}


def simplex_etf(num_classes, dim, generator):
    """(num_classes, dim): rows of unit norm with pairwise cosine -1/(K-1), sqrt(K/(K-1)) (I - 11^T/K) U^T for a uniformly
    random U (dim, K) with orthonormal columns. Raises ValueError where dim < num_classes."""
    if not 2 <= num_classes <= dim:
        raise ValueError(f"a simplex ETF of {num_classes} classes needs two classes, and as many dimensions, not {dim}")
    q, r = torch.linalg.qr(torch.randn(dim, num_classes, generator=generator, device=generator.device, dtype=torch.float64))
    centred = torch.eye(num_classes).to(q) - 1 / num_classes
    return (math.sqrt(num_classes / (num_classes - 1)) * centred @ (q * r.diagonal().sign()).T).float()


# ---------------------------------------------------------------------------------------------------- 5 evaluation


@torch.no_grad()
def predict(net, split, flip=False):
    """Logits (N, C) = net.fc(feat) and feat (N, D) = net.features(x) of the plain images, in evaluation mode, float32;
    with flip, the means of those of an image and of its mirror image."""
    if flip:
        views = split, split._replace(images=split.images.flip(2))
        return tuple((a + b) / 2 for a, b in zip(*(predict(net, view) for view in views)))
    training = net.training
    net.eval()
    feat = torch.cat([net.features(normalise(images, split)) for images in split.images.split(1000)])
    logits = net.fc(feat)
    net.train(training)
    return logits, feat


def shot_groups(counts):
    """{"all", "many" (> 100 training images), "medium" (20..100), "few" (< 20)} -> (C,) bool, which classes."""
    n = torch.as_tensor(counts)
    return {"all": n >= 0, "many": n > 100, "medium": (n >= 20) & (n <= 100), "few": n < 20}


def report(logits, labels, counts):
    """Mean of the per-class recalls in percent, per shot group; None for a group without classes.
    logits (N, C), labels (N,), counts: training images of the C classes."""
    hits, labels = (logits.argmax(1) == labels).double().cpu(), labels.cpu()
    recall = 100 * torch.bincount(labels, hits, len(counts)) / torch.bincount(labels, minlength=len(counts))
    return {name: recall[group].mean().item() if group.any() else None for name, group in shot_groups(counts).items()}


def val_scores(net, data, adjustment=0.0):
    """{"val": report()} of the validation images, by which flags may be chosen; {} without any. adjustment: off the logits."""
    return {"val": report(predict(net, data.val)[0] - adjustment, data.val.labels, data.counts)} if data.val else {}


def fisher_ratio(feat, labels):
    """Fisher's discriminant ratio trace(S_W^-1 S_B) of feat (N, D), in float64, by the definition of EWB-FDR's code:
    S_B = sum_k n_k (mu_k - mu)(mu_k - mu)^T with the mean mu of all samples, S_W = sum_i (f_i - mu_{y_i})(f_i - mu_{y_i})^T.
    Dimensions that hardly vary (by 1e-3 of the mean feature) are left out; NaN if S_W is singular all the same."""
    feat, onehot = feat.double(), F.one_hot(labels).double()
    n, threshold = onehot.sum(0)[:, None], 1e-3 * feat.mean().abs()  # (C, 1)
    means = onehot.T @ feat / n.clamp(min=1)  # (C, D)
    between, within = (means - feat.mean(0)) * n.sqrt(), feat - means[labels]
    s_b, s_w = between.T @ between, within.T @ within
    keep = ((feat - feat[0]).abs().amax(0) > threshold) & (s_w.abs().amax(0) > threshold)
    s_b, s_w = s_b[keep][:, keep], s_w[keep][:, keep]
    if not keep.any() or torch.linalg.matrix_rank(s_w, hermitian=True) < len(s_w):
        return math.nan
    return torch.linalg.solve(s_w, s_b).trace().item()


# ---------------------------------------------------------------------------------------------------- 6 the table


def row(name, paper, args, acc, acc_flip=None, best_test=None):
    """A row of a result. paper: {row name: (source, {(dataset, imb_factor): percent})}, as the script states it."""
    source, numbers = paper.get(name, ("", {}))
    percent = numbers.get((args.dataset, args.imb_factor)) if args.published else None
    return {"row": name, "acc": acc, "acc_flip": acc_flip, "best_test": best_test,
            "paper": percent and {"all": percent, "source": source}}


def table(results):
    """Markdown of result lines: mean ± standard deviation (n - 1) over the seeds of runs that differ in nothing else; of two
    runs with the same seed the later counts. A line whose acc is null announces a run that is still to be made."""
    groups, done = {}, {(r["method"], e["row"], r["dataset"], r["imb_factor"]) for r in results for e in r["rows"] if e["acc"]}
    for result in results:
        flags = {k: v for k, v in result["flags"].items() if k not in ("seed", "device", "eval_every", "stage1_sha256")}
        flags["content"] = result.get("subset", {}).get("content")
        flags["stage1"] = re.sub(r"seed\d+", "seed", flags.get("stage1") or "")
        for entry in result["rows"]:
            key = result["method"], entry["row"], result["dataset"], result["imb_factor"]
            if entry["acc"] or key not in done:
                groups.setdefault((*key, json.dumps(flags, sort_keys=True)), {})[result["seed"]] = result, entry

    def cell(values):
        values = [v for v in values if v is not None]
        return (f"{np.mean(values):.1f}" if values else "") + (f" ± {np.std(values, ddof=1):.1f}" if values[1:] else "")
    lines = [["method", "row", "data, IF", "paper", "all", "many", "medium", "few", "flip", "best on test", "s / run", "device",
              "seeds", "command"]]
    for (method, name, dataset, factor, _), seeds in groups.items():
        runs, entries = zip(*seeds.values())
        command = re.sub(r" --(overwrite|(seed|out|device|data-root|eval-every)[ =]\S+)", "", runs[0]["command"])
        paper = entries[0]["paper"]
        acc, flip = ([e[k] or {} for e in entries] for k in ("acc", "acc_flip"))
        lines.append([method, name, f"{dataset}, {factor:g}" if factor != "natural" else dataset,
                      f"{paper['all']} ({paper['source']})" if paper else "", cell([a.get("all") for a in acc]) or "not run",
                      *(cell([a.get(k) for a in acc]) for k in ("many", "medium", "few")), cell([f.get("all") for f in flip]),
                      cell([e.get("best_test") for e in entries]), cell([r["seconds"] for r in runs]),
                      " / ".join(dict.fromkeys(r["device"] for r in runs if r.get("device"))),
                      " ".join(str(seed) for seed in seeds if seed is not None), f"`{command}`"])
    keep = [k for k in range(len(lines[0])) if any(line[k] for line in lines[1:])]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line[k] or "-" for k in keep) + " |" for line in lines)


if __name__ == "__main__":
    if not sys.argv[1:]:
        fail("usage: python common.py RESULTS.jsonl [MORE.jsonl ...]")
    guard(lambda: print(table([result for name in sys.argv[1:] for result in load_results(Path(name))]), flush=True))

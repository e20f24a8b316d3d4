"""How fast the training loop is, and against what. Not run by pytest.

    python tests/bench_speed.py                    on a GPU, under 10 minutes
    python tests/bench_speed.py --quick            on a CPU, under 3 minutes, with fewer images and arms

Images have CIFAR-100-LT's size and counts (IF 100) and random pixels. Every arm does whole epochs in turn, `--rounds`
times over, after a warm-up; medians and spread are printed and all is written to --json. Arms:

    authors    the style of the published codes: Pillow transforms, worker processes restarted every epoch, fp32 with
               cuDNN's TF32, a value read back every step, the test set scored every epoch
    dataloader the same transforms, tuned: persistent workers, pinned memory, nothing read back, channels last
    eager      common.batches and the plain step
    captured   common.batches and common.captured (on a CPU the same as eager)
    bare       forward, backward and optimizer on one batch that never changes: what no loop can beat
"""
import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import common
import rbl

ARMS = ["authors", "dataloader", "eager", "captured", "bare"]
WORK = {"resnet32": (0.413e9, 13.3e6), "resnet34": (6.957e9, 44.5e6)}  # per image, forward and backward: FLOP, bytes of bf16 tensors
MEAN, STD = common.CIFAR_MEAN, common.CIFAR_STD


def make_split(images, device):
    rng, counts = np.random.RandomState(0), np.array(common.exp_counts(500, 100, 100))
    labels = np.repeat(np.arange(100), counts)
    labels = labels[rng.permutation(len(labels))[:images]]
    pixels = rng.randint(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    scale = [torch.tensor(s, device=device) * 255 for s in (MEAN, STD)]
    return common.Split(torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device), *scale)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, split, transform):
        self.images, self.labels, self.transform = split.images.cpu().numpy(), split.labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        return self.transform(Image.fromarray(self.images[k])), self.labels[k]


def pillow(strong=False):
    extra = [T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=128)] if strong else []
    erase = [T.Lambda(hide_square)] if strong else []
    return T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *extra, T.ToTensor(), *erase, T.Normalize(MEAN, STD)])


def hide_square(x):
    y, z = torch.randint(0, 32, (2,)).tolist()
    x[:, max(0, y - 8):y + 8, max(0, z - 8):z + 8] = 0
    return x


class Arm:
    """A network, its optimizer and its step; epoch() trains one epoch and returns when the device is done."""

    def __init__(self, kind, backbone, batch, split):
        torch.manual_seed(0)
        self.kind, self.batch, self.split, self.device = kind, batch, split, split.images.device
        gpu = self.device.type == "cuda"
        self.net = common.BACKBONES[backbone](100).to(self.device)
        if kind != "authors":
            self.net.to(memory_format=torch.channels_last)
        lr = 0.01 if kind == "authors" else torch.tensor(0.01, device=self.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=kind != "authors" or None)
        self.generator = torch.Generator(self.device).manual_seed(0)
        bf16 = gpu and backbone == "resnet34" and kind != "authors"

        def step(x, labels):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                feat = self.net.features(x)
            loss = F.cross_entropy(self.net.fc(feat.float()), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.detach()
        self.plain = step
        self.step = common.captured(step, self.net, self.optimizer) if kind in ("captured", "bare") else step
        workers = 4 if kind == "authors" else 8 if gpu else 2
        if kind in ("authors", "dataloader"):
            tuned = dict(persistent_workers=True, pin_memory=gpu) if kind == "dataloader" else {}
            self.loader = torch.utils.data.DataLoader(Pictures(split, pillow()), batch, shuffle=True, num_workers=workers, **tuned)
        self.static = next(common.batches(split, batch, self.generator))

    def batches(self):
        if self.kind == "bare":
            return [self.static] * -(-len(self.split.labels) // self.batch)
        if self.kind in ("authors", "dataloader"):
            return ((x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)) for x, y in self.loader)
        return common.batches(self.split, self.batch, self.generator)

    def epoch(self):
        for x, labels in self.batches():
            if self.kind == "dataloader":
                x = x.to(memory_format=torch.channels_last)
            loss = self.step(x, labels)
            if self.kind == "authors":
                loss.item()
        if self.kind == "authors":  # the test set, in batches of the same size, through the same pipeline
            self.net.eval()
            with torch.no_grad():
                for x, _ in torch.utils.data.DataLoader(Pictures(self.test, T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])), self.batch, num_workers=4):
                    self.net.fc(self.net.features(x.to(self.device))).argmax(1).cpu()
            self.net.train()
        wait(self.device)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    wait(device)
    began = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - began


def loaders(split, rounds):
    """Images per second of the loaders alone: ours and Pillow's, plain and strong."""
    generator, results = torch.Generator(split.images.device).manual_seed(0), {}
    ours = {"ours, crop + flip": common.crop_flip, "ours, + AutoAugment + Cutout": rbl.strong}
    theirs = {"Pillow + DataLoader, crop + flip": pillow(), "Pillow + DataLoader, + AutoAugment + Cutout": pillow(strong=True)}
    jobs = {name: lambda a=a: [None for _ in common.batches(split, 128, generator, a)] for name, a in ours.items()}
    for name, transform in theirs.items():
        loader = torch.utils.data.DataLoader(Pictures(split, transform), 128, shuffle=True, num_workers=2, persistent_workers=True)
        jobs[name] = lambda loader=loader: [None for _ in loader]
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            results.setdefault(name, []).append(len(split.labels) / timed(job, split.images.device))
    return results


def kernels_per_step(arm):
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        arm.plain(*arm.static)
        torch.cuda.synchronize()
    return sum(e.count for e in prof.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation)


def ceilings(device):
    """This GPU's own: FLOP/s of a bf16 product, bytes/s of a copy (read and written)."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(copy)
    best = lambda f: min(timed(f, device) for _ in range(8))  # noqa: E731
    return 2 * 8192**3 / best(lambda: a @ b), 2 * 2**30 / best(lambda: target.copy_(copy))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, arms and rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--json", type=Path, default=Path("runs/bench_speed.json"), help="rewritten after every network and batch size")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    split = make_split(1024 if args.quick else 10847, device)
    test = split if args.quick else make_split(10000, device)
    results = {"device": name, "torch": torch.__version__, "images": len(split.labels), "rows": []}
    flops, bandwidth = ceilings(device) if gpu else (None, None)
    results["ceilings"] = {"bf16 FLOP/s": flops, "copied bytes/s": bandwidth}
    print(f"{name}\n\n| loader alone | images/s | spread |\n| --- | --- | --- |")
    results["loaders"] = loaders(split, args.rounds)
    for loader, speeds in results["loaders"].items():
        print(f"| {loader} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} |", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    print("\n| network, batch | arm | images/s | spread | s per 200 epochs | / arithmetic floor | / traffic floor | MB | kernels a step |\n" + "| --- " * 9 + "|")
    for backbone, batch in [("resnet32", 128)] if args.quick else [(b, n) for b in args.backbones for n in (64, 128)]:
        arms, speeds, memory = {}, {}, {}
        for kind in args.arms:
            before = torch.cuda.memory_allocated() if gpu else 0
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            try:
                arm = Arm(kind, backbone, batch, split)
                arm.test = test
                arm.epoch()  # warm-up: kernels are chosen, graphs captured
            except Exception as error:  # the other arms are still worth their time
                print(f"{backbone}, {batch}: {kind} failed: {error!r:.300}", flush=True)
                continue
            arms[kind] = arm
            memory[kind] = (torch.cuda.max_memory_allocated() - before) >> 20 if gpu else None
        for _ in range(args.rounds):
            for kind, arm in arms.items():
                speeds.setdefault(kind, []).append(len(split.labels) / timed(arm.epoch, device))
        kernels = kernels_per_step(arms["eager"]) if gpu and "eager" in arms else None
        for kind, values in speeds.items():
            speed = statistics.median(values)
            seconds = 200 * 10847 / speed
            floors = [seconds / (200 * 10847 * work / ceiling) if gpu else None for work, ceiling in zip(WORK[backbone], (flops, bandwidth))]
            results["rows"].append({"network": backbone, "batch": batch, "arm": kind, "images/s": values, "s per 200 epochs": seconds,
                                    "ratio to floors": floors, "MB": memory.get(kind), "kernels": kernels})
            print(f"| {backbone}, {batch} | {kind} | {speed:,.0f} | {min(values):,.0f} to {max(values):,.0f} | {seconds:,.0f} | "
                  + " | ".join(f"{f:.1f}" if f else "-" for f in floors) + f" | {memory.get(kind) or '-'} | {kernels or '-'} |", flush=True)
        args.json.write_text(json.dumps(results))
        arms.clear()
        gc.collect()  # the old arms' graphs and workers go now, not while the next ones are captured
        torch.cuda.empty_cache()
    print(f"all of it: {args.json}")


if __name__ == "__main__":
    main()

"""How fast the training loop is, and against what. Not run by pytest.

    python tests/bench_speed.py                    on a GPU, under 10 minutes
    python tests/bench_speed.py --quick            on a CPU, under 3 minutes, with fewer images and arms

Images have CIFAR-100-LT's size and counts (IF 100) and random pixels. First the gates: the same batches and the same
losses. Then every arm does whole epochs in turn, `--rounds` times over, after a warm-up; medians and spread are printed
and all is written to --json. Arms:

    authors    the style of the published codes: Pillow transforms, worker processes restarted every epoch, fp32 with
               cuDNN's TF32, a value read back every step, the test set scored every epoch
    dataloader the same transforms, tuned: persistent workers, pinned memory, nothing read back, channels last
    eager      common.batches and the plain step
    captured   common.batches and common.captured (on a CPU the same as eager)
    compiled   captured, with torch.compile on the features (GPU only)
    several    --seeds captured runs at once: as processes, and as streams of one process (GPU only)
    bare       forward, backward and optimizer on one batch that never changes: what no loop can beat
"""
import argparse
import gc
import json
import statistics
import subprocess
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

ARMS = ["authors", "dataloader", "eager", "captured", "bare", "several", "compiled"]
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

    def __init__(self, kind, backbone, batch, split, seed=0, precision=None):
        torch.manual_seed(seed)
        self.kind, self.batch, self.split, self.device = kind, batch, split, split.images.device
        gpu = self.device.type == "cuda"
        precision = precision or ("bf16" if gpu and backbone == "resnet34" else "tf32")
        self.net = common.BACKBONES[backbone](100).to(self.device)
        if kind != "authors":
            self.net.to(memory_format=torch.channels_last)
        lr = 0.01 if kind == "authors" else torch.tensor(0.01, device=self.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=kind != "authors" or None)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        features = torch.compile(self.net.features, dynamic=False) if kind == "compiled" else self.net.features
        bf16 = precision == "bf16" and kind != "authors"

        def step(x, labels):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                feat = features(x)
            loss = F.cross_entropy(self.net.fc(feat.float()), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.detach()
        self.plain = step
        graph = kind in ("captured", "compiled", "streams", "bare")
        self.step = common.captured(step, self.net, self.optimizer) if graph else step
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


def gates(split):
    """Same batches: crop and flip against a slow loop. Same losses: captured against plain, 20 steps."""
    images = split.images[:64]
    seed = split.images.device
    fast = common.crop_flip(images, torch.Generator(seed).manual_seed(1))
    draws = torch.Generator(seed).manual_seed(1)
    top, left = torch.randint(0, 9, (2, 64), generator=draws, device=seed)
    mirror = torch.rand(64, 1, 1, 1, generator=draws, device=seed).flatten() < 0.5
    for k in range(64):
        slow = F.pad(images[k], (0, 0, 4, 4, 4, 4))[top[k]:top[k] + 32, left[k]:left[k] + 32]
        assert torch.equal(slow.flip(1) if mirror[k] else slow, fast[k]), "crop and flip differ from the slow version"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    losses = []
    for kind in ("eager", "captured"):
        arm = Arm(kind, "resnet32", 100, split._replace(images=split.images[:1050], labels=split.labels[:1050]), precision="fp32")
        losses.append(torch.stack([arm.step(x, y) for _ in range(2) for x, y in common.batches(arm.split, 100, arm.generator)]).cpu())
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = False, True
    worst = (losses[0] - losses[1]).abs().max().item()
    assert worst < 1e-5 and (split.images.device.type == "cpu") <= (worst == 0), f"captured and plain losses differ by {worst}"
    return worst


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


def worker(args):
    """One of several processes: warm up, wait for the starting time, train, print when it began and ended."""
    device = torch.device("cuda")
    arm = Arm("captured", args.worker, args.batch, make_split(args.images, device), seed=args.seed)
    arm.epoch()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.time()
    for _ in range(args.epochs):
        arm.epoch()
    print(json.dumps([began, time.time()]), flush=True)


def several(backbone, batch, split, seeds, epochs):
    """Images per second of `seeds` runs at once: as processes, and as streams of this process."""
    command = [sys.executable, __file__, "--worker", backbone, "--batch", str(batch), "--images", str(len(split.labels)), "--epochs", str(epochs)]
    processes = [subprocess.Popen([*command, "--seed", str(s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for s in range(seeds)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    times = [json.loads(process.stdout.readline()) for process in processes]
    for process in processes:
        process.wait()
    as_processes = seeds * epochs * len(split.labels) / (max(end for _, end in times) - min(began for began, _ in times))
    arms = [Arm("streams", backbone, batch, split, seed) for seed in range(seeds)]
    streams = [torch.cuda.Stream() for _ in arms]

    def together():
        epoch_batches = [list(arm.batches()) for arm in arms]
        torch.cuda.synchronize()
        for batches in zip(*epoch_batches):
            for arm, stream, (x, labels) in zip(arms, streams, batches):
                with torch.cuda.stream(stream):
                    arm.step(x, labels)
        torch.cuda.synchronize()
    together()
    return {"processes": as_processes, "streams": seeds * epochs * len(split.labels) / timed(lambda: [together() for _ in range(epochs)], split.images.device)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, arms and rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4, help="of the arms processes and streams")
    parser.add_argument("--backbones", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="compiled takes minutes to compile")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_speed.json"), help="rewritten after every network and batch size")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for flag, value in (("--batch", 128), ("--images", 10847), ("--epochs", 2), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=value, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    split = make_split(1024 if args.quick else args.images, device)
    test = split if args.quick else make_split(10000, device)
    results = {"device": name, "torch": torch.__version__, "images": len(split.labels), "loss difference, captured": gates(split), "rows": []}
    flops, bandwidth = ceilings(device) if gpu else (None, None)
    results["ceilings"] = {"bf16 FLOP/s": flops, "copied bytes/s": bandwidth}
    print(f"gates passed on {name}; largest loss difference {results['loss difference, captured']}")
    print("\n| loader alone | images/s | spread |\n| --- | --- | --- |")
    results["loaders"] = loaders(split, args.rounds)
    for loader, speeds in results["loaders"].items():
        print(f"| {loader} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} |", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    alone = [kind for kind in args.arms if kind != "several" and (kind != "compiled" or gpu and not args.quick)]
    print("\n| network, batch | arm | images/s | spread | s per 200 epochs | / arithmetic floor | / traffic floor | MB | kernels a step |\n" + "| --- " * 9 + "|")
    for backbone, batch in [("resnet32", 128)] if args.quick else [(b, n) for b in args.backbones for n in (64, 128)]:
        arms, speeds, memory = {}, {}, {}
        for kind in alone:
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
        if gpu and not args.quick and "several" in args.arms:
            for kind, speed in several(backbone, batch, split, args.seeds, 4).items():
                speeds[f"{args.seeds} {kind}"] = [speed]
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

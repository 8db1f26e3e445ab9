"""One training step of ViT-S/16 on the CPU: ./train_curia against PyTorch, in one run, alternating.

usage: step.py [--steps N] [--rounds N] [--threads N]        from the top of the repository, after make

2 global crops of 224 px and 8 local crops of 96 px, batch 2, heads of 65536 prototypes, DINO + iBOT + KoLeo losses,
Sinkhorn targets, clipping, AdamW and EMA on both sides, fp32. The PyTorch side is written as a user of it would: its own
modules, scaled_dot_product_attention, one forward per crop size. Prints TSV: seconds per step (median over all timed steps)
and peak memory of each, then their ratio.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, LOCALS, GLOBAL, LOCAL, PATCH, DIM, DEPTH, HEADS, PROTOTYPES, BOTTLENECK = 2, 8, 224, 96, 16, 384, 12, 6, 65536, 256


def torch_worker(steps, threads):
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
            self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
            self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
            self.gamma1, self.gamma2 = nn.Parameter(torch.full((DIM,), 1e-5)), nn.Parameter(torch.full((DIM,), 1e-5))

        def forward(self, x):
            n, t, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
            attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, DIM)
            x = x + self.gamma1 * self.proj(attention)
            return x + self.gamma2 * self.mlp(self.norm2(x))

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(1, DIM, PATCH, PATCH)
            self.cls, self.mask = nn.Parameter(torch.zeros(1, 1, DIM)), nn.Parameter(torch.zeros(1, DIM))
            self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (GLOBAL // PATCH) ** 2, DIM))
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(DIM, eps=1e-6)

        def forward(self, x, mask=None):
            n, m = x.shape[0], x.shape[-1] // PATCH
            x = self.patch(x).flatten(2).transpose(1, 2)
            if mask is not None:
                x = torch.where(mask[..., None], self.mask, x)
            position = self.position
            if x.shape[1] + 1 != position.shape[1]:
                side = GLOBAL // PATCH
                grid = position[:, 1:].reshape(1, side, side, DIM).permute(0, 3, 1, 2)
                grid = F.interpolate(grid, scale_factor=(m + 0.1) / side, mode="bicubic")
                position = torch.cat([position[:, :1], grid.flatten(2).transpose(1, 2)], 1)
            x = torch.cat([self.cls.expand(n, -1, -1), x], 1) + position
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(DIM, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, BOTTLENECK))
            self.g = nn.Parameter(torch.ones(PROTOTYPES, 1))
            self.v = nn.Parameter((torch.rand(PROTOTYPES, BOTTLENECK) * 2 - 1) / BOTTLENECK ** 0.5)

        def forward(self, x):
            return F.linear(F.normalize(self.mlp(x), dim=-1), self.g * F.normalize(self.v, dim=-1))

    def sinkhorn(logits):
        q = torch.exp(logits / 0.07)
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(0, keepdim=True) * q.shape[1]
            q /= q.sum(1, keepdim=True) * q.shape[0]
        return q * q.shape[0]

    student, teacher = nn.ModuleList([Backbone(), Head()]), nn.ModuleList([Backbone(), Head()])
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, foreach=True)
    global_crops, local_crops = torch.randn(2 * BATCH, 1, GLOBAL, GLOBAL), torch.randn(LOCALS * BATCH, 1, LOCAL, LOCAL)
    patches = (GLOBAL // PATCH) ** 2
    mask = torch.zeros(2 * BATCH, patches, dtype=torch.bool)
    mask[0, : int(0.3 * patches)] = mask[2, : int(0.5 * patches)] = True
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.no_grad():
            out = teacher[0](global_crops)
            targets, patch_targets = teacher[1](torch.cat([out[:, 0], out[:, 1:][mask]])).split([2 * BATCH, int(mask.sum())])
            targets, patch_targets = sinkhorn(targets), sinkhorn(patch_targets)
        out, local_out = student[0](global_crops, mask), student[0](local_crops)
        logits = student[1](torch.cat([out[:, 0], local_out[:, 0], out[:, 1:][mask]]))
        cls, local, patch = (F.log_softmax(x / 0.1, -1) for x in logits.split([2 * BATCH, LOCALS * BATCH, int(mask.sum())]))
        pairs = 2 * LOCALS + 2
        swapped = targets.roll(BATCH, 0)
        loss = -(swapped * cls).sum() / (pairs * BATCH)
        both = (targets[:BATCH] + targets[BATCH:]).repeat(LOCALS, 1)
        loss = loss - (both * local).sum() / (pairs * BATCH)
        weight = (1 / mask.sum(1).clamp(min=1))[:, None].expand_as(mask)[mask]
        loss = loss - ((patch_targets * patch).sum(-1) * weight).sum() / (2 * BATCH)
        for crop in out[:, 0].split(BATCH):
            unit = F.normalize(crop, dim=-1)
            with torch.no_grad():
                nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
            loss = loss - 0.1 * torch.log(F.pairwise_distance(unit, unit[nearest], eps=1e-8) + 1e-8).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in student:
            nn.utils.clip_grad_norm_(part.parameters(), 3.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(list(teacher.parameters()), 0.99)
            torch._foreach_add_(list(teacher.parameters()), list(student.parameters()), alpha=0.01)
        seconds.append(time.perf_counter() - start)
    for s in seconds[1:]:
        print(s)


def run_ours(steps, threads, folder, data):
    sets = {"model.drop_path": 0, "koleo.weight": 0.1, "sigreg.weight": 0, "teacher.centering": "sinkhorn", "optim.batch_size": BATCH, "run.save_every": 0}
    command = ["./train_curia", "--recipe", "dinov2-s16", "--data", data, "--out", f"{folder}/run", "--steps", str(steps + 1)]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    measured = measure(command, threads)
    with open(f"{folder}/run/log.tsv") as log:
        rows = [line.split("\t") for line in log.read().splitlines()]
    return [float(row[rows[0].index("seconds")]) for row in rows[2:]], measured[1]


def measure(command, threads):
    """Runs a command; returns its stdout and its peak memory in MiB."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed with status {os.waitstatus_to_exitcode(status)}")
    return out, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--torch-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch_worker:
        torch_worker(options.steps, options.threads)
        return
    ours, theirs, ours_memory, theirs_memory = [], [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["./prep/prep", "-o", f"{folder}/data", "--phantom", "--patients", "4"], check=True, stderr=subprocess.DEVNULL)
        for i in range(options.rounds):
            os.makedirs(f"{folder}/{i}")
            seconds, memory = run_ours(options.steps, options.threads, f"{folder}/{i}", f"{folder}/data/train")
            ours += seconds
            ours_memory = max(ours_memory, memory)
            out, memory = measure([sys.executable, __file__, "--torch-worker", "--steps", str(options.steps), "--threads", str(options.threads)], options.threads)
            theirs += [float(x) for x in out.split()]
            theirs_memory = max(theirs_memory, memory)
    print("program\tseconds_per_step\tpeak_MiB")
    print(f"train_curia\t{statistics.median(ours):.3f}\t{ours_memory:.0f}")
    print(f"pytorch\t{statistics.median(theirs):.3f}\t{theirs_memory:.0f}")
    print(f"ratio\t{statistics.median(ours) / statistics.median(theirs):.3f}\t{ours_memory / theirs_memory:.3f}")


main()

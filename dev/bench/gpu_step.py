"""One training step in PyTorch, as a user of it would write it, of the configuration that ./train_curia --print-config prints.

usage: gpu_step.py CONFIG.json [--mode eager|compile] [--steps N] [--warmup N] [--least N] [--device cuda|cpu]

bf16 autocast over fp32 weights and residual stream, scaled_dot_product_attention, fused AdamW, drop path that leaves sequences
out as DINOv2 does, DINO, iBOT and SIGReg losses with Sinkhorn targets, EMA. One forward per crop size. --mode compile runs
torch.compile over each block and each loss. The crops are on the device already and no pixel work is timed, which the other side
of the comparison does inside its step. A batch that does not fit is halved, down to --least.

Prints TSV: median milliseconds of the timed steps by device events, images/s, peak memory, seconds until the timing began.
"""
import argparse
import json
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, hidden, self.swiglu = c["model.dim"], c["model.ffn_hidden"], c["model.ffn"] == "swiglu"
        self.heads, self.drop = c["model.heads"], c["model.drop_path"]
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.ffn_in, self.ffn_out = nn.Linear(D, hidden * (2 if self.swiglu else 1)), nn.Linear(hidden, D)
        self.gamma1 = nn.Parameter(torch.full((D,), float(c["model.layerscale"])))
        self.gamma2 = nn.Parameter(torch.full((D,), float(c["model.layerscale"])))

    def attention(self, x):
        n, t, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.gamma1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, D))

    def feed_forward(self, x):
        h = self.ffn_in(self.norm2(x))
        if self.swiglu:
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h)
        return self.gamma2 * self.ffn_out(h)

    def forward(self, x):                           # [n, T, D]
        for branch in (self.attention, self.feed_forward):
            if self.training and self.drop > 0:     # a fresh subset of the sequences; the others pass unchanged
                n = x.shape[0]
                kept = max(int(n * (1 - self.drop)), 1)
                rows = torch.randperm(n, device=x.device)[:kept]
                y = branch(x[rows]).to(x.dtype)
                x = torch.index_add(x.flatten(1), 0, rows, y.flatten(1), alpha=n / kept).view_as(x)
            else:
                x = x + branch(x)
        return x


class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, p, self.registers = c["model.dim"], c["model.patch"], c["model.registers"]
        self.side = c["crops.global_size"] // p
        self.patch = nn.Conv2d(c["model.channels"], D, p, p)
        self.cls, self.mask = nn.Parameter(1e-6 * torch.randn(1, 1, D)), nn.Parameter(torch.zeros(1, D))
        self.register = nn.Parameter(1e-6 * torch.randn(1, self.registers, D))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + self.side ** 2, D))
        self.blocks, self.norm = nn.ModuleList(Block(c) for _ in range(c["model.depth"])), nn.LayerNorm(D, eps=1e-6)

    def forward(self, x, mask=None):                # [n, C, S, S], [n, N]: class tokens [n, D], patches [n, N, D]
        n, D = x.shape[0], self.position.shape[2]
        x = self.patch(x)
        m = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask.to(x.dtype), x)
        position = self.position
        if m != self.side:
            grid = position[:, 1:].reshape(1, self.side, self.side, D).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, scale_factor=(m + 0.1) / self.side, mode="bicubic")
            position = torch.cat([position[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        x = torch.cat([self.cls.expand(n, -1, -1), x], 1) + position
        x = torch.cat([x[:, :1], self.register.expand(n, -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.registers:]


class Head(nn.Module):
    def __init__(self, c, name):
        super().__init__()
        layers, hidden, out = c[name + ".layers"], c[name + ".hidden"], c[name + ".bottleneck"]
        widths = [c["model.dim"]] + [hidden] * (layers - 1) + [out]
        parts = []
        for i in range(layers):
            parts += [nn.Linear(widths[i], widths[i + 1])] + ([nn.GELU()] if i + 1 < layers else [])
        self.mlp = nn.Sequential(*parts)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(out, c[name + ".prototypes"], bias=False))

    def forward(self, x):                           # [n, D]: prototype logits [n, K], bottleneck [n, b]
        z = self.mlp(x)
        return self.last(F.normalize(z, dim=-1)), z


def sinkhorn(logits, temperature):                  # [n, K]: targets, each row a distribution
    q = torch.exp(logits.float() / temperature)
    q = q / q.sum()
    for _ in range(3):
        q = q / (q.sum(0, keepdim=True) * q.shape[1])
        q = q / (q.sum(1, keepdim=True) * q.shape[0])
    return q * q.shape[0]


def dino_loss(logits, targets, temperature, batch):
    """logits [2B + VB, K] of student crops, targets [2B, K]: each local crop against both, each global against the other."""
    log_p = F.log_softmax(logits.float() / temperature, -1)
    local = log_p[2 * batch:].view(-1, batch, log_p.shape[1]).sum(0)
    total = (targets.roll(batch, 0) * log_p[:2 * batch]).sum() + ((targets[:batch] + targets[batch:]) * local).sum()
    return -total / (batch * 2 * (logits.shape[0] // batch - 1))         # 2 for each local crop and 2 among the globals


def ibot_loss(logits, targets, weight, temperature):                     # [n, K], [n, K], [n] with sum 1 at the most
    return -((targets * F.log_softmax(logits.float() / temperature, -1)).sum(-1) * weight).sum()


def sigreg_loss(z, directions, knots, low, high, by_n):
    """Epps-Pulley statistic of z [B, b] along directions [b, M], by the trapezoid rule; one-sided where low is 0."""
    t = torch.linspace(low, high, knots, device=z.device)
    phi = torch.exp(-0.5 * t * t)
    weight = torch.full_like(t, (high - low) / (knots - 1) * (2 if low == 0 else 1))
    weight[[0, -1]] *= 0.5
    x = (z.float() @ directions)[..., None] * t
    statistic = (x.cos().mean(0) - phi) ** 2 + x.sin().mean(0) ** 2
    return (statistic @ (weight * phi)).mean() * (z.shape[0] if by_n else 1)


def draw_masks(c, batch):
    """Masks [2B, N]: a share of the crops, ratios spread evenly, so that every batch has the same number of masked patches."""
    crops, N = 2 * batch, (c["crops.global_size"] // c["model.patch"]) ** 2
    masked = int(crops * c["mask.probability"])
    ratios = torch.linspace(c["mask.ratio_min"], c["mask.ratio_max"], masked + 1)[1:].tolist()
    mask = torch.zeros(crops, N, dtype=torch.bool)
    for crop, ratio in zip(torch.randperm(crops)[:masked].tolist(), ratios):
        mask[crop, torch.randperm(N)[:int(N * ratio)]] = True
    return mask


def build(c, batch, device, compiled):
    """Returns a function that does one step and returns the loss, still on the device."""
    names = ["dino", "ibot"] if c["ibot.separate_head"] else ["dino"]
    student, teacher = (nn.ModuleDict({"backbone": Backbone(c), **{n: Head(c, n) for n in names}}).to(device) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    ours, theirs = list(student.parameters()), list(teacher.parameters())
    groups = [{"params": [p for p in ours if p.ndim > 1]}, {"params": [p for p in ours if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.04, fused=True)
    make = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
    targets_of, dino, ibot, sigreg = make(sinkhorn), make(dino_loss), make(ibot_loss), make(sigreg_loss)
    if compiled:
        for model in (student, teacher):
            for block in model["backbone"].blocks:
                block.compile(dynamic=False)
    shared = names[-1]
    channels, large, small = c["model.channels"], c["crops.global_size"], c["crops.local_size"]
    global_crops = torch.randn(2 * batch, channels, large, large, device=device)
    local_crops = torch.randn(c["crops.local_count"] * batch, channels, small, small, device=device)
    masks = []
    for _ in range(4):
        mask = draw_masks(c, batch)
        rows = mask.flatten().nonzero().flatten()
        weight = (1 / mask.sum(1).clamp(min=1))[:, None].expand_as(mask)[mask] / (2 * batch)
        masks.append([x.to(device) for x in (mask, rows, weight)])
    temperature, student_temperature, momentum = c["teacher.temp"], c["student.temp"], c["teacher.momentum"]
    done = 0

    def step():
        nonlocal done
        mask, rows, weight = masks[done % len(masks)]
        done += 1
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                cls, patches = teacher["backbone"](global_crops)
                targets = targets_of(teacher["dino"](cls)[0], temperature)
                patch_targets = targets_of(teacher[shared](patches.flatten(0, 1)[rows])[0], temperature)
            cls, patches = student["backbone"](global_crops, mask)
            crops = torch.cat([cls, student["backbone"](local_crops)[0]]) if len(local_crops) else cls
            logits, bottleneck = student["dino"](crops)
            patch_logits, _ = student[shared](patches.flatten(0, 1)[rows])
        loss = c["dino.weight"] * dino(logits, targets, student_temperature, batch)
        loss = loss + c["ibot.weight"] * ibot(patch_logits, patch_targets, weight, student_temperature)
        if c["sigreg.weight"] > 0:
            seen = (cls if c["sigreg.on"] == "cls" else bottleneck)[:2 * batch].float()
            directions = F.normalize(torch.randn(seen.shape[1], c["sigreg.slices"], device=device), dim=0)
            for z in seen.split(batch):
                loss = loss + c["sigreg.weight"] * sigreg(z, directions, c["sigreg.knots"], c["sigreg.t_min"], c["sigreg.t_max"],
                                                          c["sigreg.scale_by_n"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in student.values():
            nn.utils.clip_grad_norm_(part.parameters(), c["optim.clip"], foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(theirs, ours, 1 - momentum)
        return loss.detach()
    return step


def measure(c, batch, device, compiled, warmup, steps):
    """Milliseconds of each timed step, and seconds until the first."""
    begin, cuda = time.perf_counter(), device == "cuda"
    step = build(c, batch, device, compiled)
    for _ in range(warmup):
        loss = step()
    loss.item()
    waited, milliseconds = time.perf_counter() - begin, []
    if cuda:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
    for i in range(steps):
        start = time.perf_counter()
        loss = step()
        if cuda:
            events[i + 1].record()
        milliseconds.append(1000 * (time.perf_counter() - start))
    if not torch.isfinite(loss):
        raise SystemExit(f"the loss is {loss.item()}")
    if cuda:
        torch.cuda.synchronize()
        milliseconds = [events[i].elapsed_time(events[i + 1]) for i in range(steps)]
    return milliseconds, waited, loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--least", type=int, default=2, help="smallest batch to try")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    with open(options.config) as f:
        c = json.load(f)
    if c["teacher.centering"] != "sinkhorn" or c["koleo.weight"] > 0 or c["model.interpolate"] != "offset":
        raise SystemExit("this step is written for teacher.centering=sinkhorn, koleo.weight=0 and model.interpolate=offset")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    batch, fits = c["optim.batch_size"], None
    while fits is None:
        try:
            fits = measure(c, batch, options.device, options.mode == "compile", options.warmup, options.steps)
        except torch.OutOfMemoryError:
            if batch // 2 < options.least:
                raise SystemExit(f"out of memory, at batch {batch} too")
        if fits is None:                            # outside of the handler, whose traceback holds the tensors
            torch.cuda.empty_cache()
            batch //= 2
    milliseconds, waited, loss = fits
    median = statistics.median(milliseconds)
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if options.device == "cuda" else 0
    print("mode\tbatch\tms_per_step\timages_per_s\tpeak_GiB\twarmup_s\tloss\ttorch")
    print(f"{options.mode}\t{batch}\t{median:.2f}\t{1000 * batch / median:.1f}\t{peak:.1f}\t{waited:.1f}\t{loss:.4f}\t"
          f"{torch.__version__}")


main()

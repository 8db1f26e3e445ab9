"""Features of a checkpoint by transformers and by ./evaluate --extract must agree.

usage: hf_oracle.py EVALUATE RUN SHARDS

Loads RUN's newest teacher/ with AutoModel.from_pretrained, reads the slices from the shards by the format in dataloader.h,
preprocesses them as Curia's published processor does (antialiased bicubic resize, clip at -1000, unbiased z-score) and
compares class tokens: relative L2 at most 1e-5.
"""
import glob
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModel

evaluate, run, shards = sys.argv[1:]
teacher = sorted(glob.glob(f"{run}/step-*"))[-1] + "/teacher"
model = AutoModel.from_pretrained(teacher).double().eval()
size = model.config.image_size

images = []
for path in sorted(glob.glob(f"{shards}/*.shard")):
    data = open(path, "rb").read()
    slices, index = struct.unpack_from("<QQ", data, 16)
    for i in range(slices):
        record = data[index + 136 * i : index + 136 * (i + 1)]
        (offset,) = struct.unpack_from("<Q", record, 0)
        rows, cols = struct.unpack_from("<ii", record, 40)
        scale, intercept = struct.unpack_from("<ff", record, 68)
        pixels = np.frombuffer(data, "<i2", rows * cols, offset).reshape(rows, cols)
        images.append(torch.from_numpy(pixels.astype(np.float64) * scale + intercept))

batch = []
for image in images:
    x = torch.nn.functional.interpolate(image[None, None].float(), (size, size), mode="bicubic", antialias=True).double()
    x = x.clamp_min(-1000)
    std = x.std()
    batch.append((x - x.mean()) / (std if std > 1e-6 else 1))
with torch.no_grad():
    expected = model(torch.cat(batch)).last_hidden_state[:, 0].numpy()

with tempfile.TemporaryDirectory() as folder:
    subprocess.run([evaluate, "--model", run, "--data", shards, "--extract", f"{folder}/x", "--protocol", "knn"],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    got = np.load(f"{folder}/x.npy")
error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
print(f"{len(images)} slices at {size} px: relative error {error:.2e}")
if not error <= 1e-5:
    sys.exit("features differ")
print("features agree")

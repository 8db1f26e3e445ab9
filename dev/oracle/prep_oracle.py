"""Compares what prep stores with what nibabel and numpy read: every pixel, the spacing, which slices are kept, the volume's statistics.

usage: python3 prep_oracle.py PREP FILE...     runs PREP on each NIfTI FILE, and on variants that it writes itself

The shard is read here from the format's description alone (dataloader.h's header comment), not through our code.
Prints a line for each failure, then `N passed, N failed`; exit status 1 if any failed.
"""
import os
import struct
import subprocess
import sys
import tempfile

import nibabel as nib
import numpy as np

RECORD = np.dtype([("pixel_offset", "<u8"), ("mask_offset", "<u8"), ("checksum", "<u8"), ("volume", "<u8"), ("patient", "<u8"), ("rows", "<i4"),
                   ("cols", "<i4"), ("number", "<i4"), ("slices", "<i4"), ("spacing", "<f4", 3), ("scale", "<f4"), ("intercept", "<f4"), ("modality", "u1"),
                   ("plane", "u1"), ("zero", "u1", 2), ("box", "<i4", 4), ("anatomy", "<f4", 4), ("label", "<i4"), ("target", "<f4"), ("stats", "<f4", 4)])
passed = failed = 0


def check(good, message):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("failed:", message)


def read_shards(folder):
    slices = []
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".shard")):
        data = open(os.path.join(folder, name), "rb").read()
        magic, version, record, count, index = struct.unpack("<8sIIQQ", data[:32])
        assert magic == b"CURIASHD" and version == 1 and record == RECORD.itemsize == 136
        for r in np.frombuffer(data, RECORD, count, index):
            pixels = np.frombuffer(data, "<i2", int(r["rows"]) * int(r["cols"]), int(r["pixel_offset"])).reshape(r["rows"], r["cols"])
            slices.append((r, pixels))
    return slices


def lps_volume(image, volume=0):
    """(L, P, S) array of values and its spacing, by nibabel's own canonical orientation."""
    canonical = nib.as_closest_canonical(image if image.ndim < 4 else image.slicer[..., volume])
    data = np.asarray(canonical.dataobj, dtype=np.float64)
    finite = data[np.isfinite(data)]
    data = np.where(np.isfinite(data), data, finite.min())
    return data[::-1, ::-1, :], np.sqrt((canonical.affine[:3, :3] ** 2).sum(0))


def planes(data, spacing):
    """Per plane, slices [slice, row, column] in Curia's orientation, and spacing (row, column, slice)."""
    left, posterior, superior = spacing
    return [(data.transpose(2, 1, 0), (posterior, left, superior)), (data.transpose(1, 2, 0)[:, ::-1], (superior, left, posterior)),
            (data.transpose(0, 2, 1)[:, ::-1], (superior, posterior, left))]


def compare(prep, path, name, exact, flags=(), volume=0):
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([prep, "-o", folder + "/out", "--planes", "all", *flags, path], capture_output=True, text=True)
        if run.returncode:
            return check(False, f"{name}: prep ends with {run.returncode}: {run.stderr.strip()}")
        stored = read_shards(folder + "/out")
    data, spacing = lps_volume(nib.load(path), volume)
    wrong = dict.fromkeys(("pixels", "size", "spacing", "statistics", "kept"), 0)
    for plane, (expected, mm) in enumerate(planes(data, spacing)):
        mine = [(r, p) for r, p in stored if r["plane"] == plane]
        if min(expected.shape[1:]) < 16:
            wrong["kept"] += len(mine)
            continue
        kept, scales = [], 1.0
        for r, pixels in mine:
            want, got = expected[r["number"]], np.float64(r["scale"]) * pixels + np.float64(r["intercept"])
            kept.append(int(r["number"]))
            if want.shape != got.shape or r["slices"] != len(expected):
                wrong["size"] += 1
                continue
            scales = np.abs(np.float64(r["scale"]))
            bound = 0 if exact and r["scale"] == 1 else 1e-6 * np.abs(data).max() if exact else 0.501 * scales + 1e-6 * np.abs(data).max()
            wrong["pixels"] += np.abs(want - got).max() > bound
            wrong["spacing"] += not np.allclose(r["spacing"], mm, rtol=1e-5)
        flat = [i for i in range(len(expected)) if i not in kept]
        if stored[0][0]["modality"] == 1:  # the rule for CT is exact: constant, or fewer than 1 % above -500 HU
            wrong["kept"] += sum((expected[i] > -500).mean() >= 0.01 and np.ptp(expected[i]) > 1 for i in flat)
            wrong["kept"] += sum((expected[i] > -500).mean() < 0.01 for i in kept)
        wrong["kept"] += kept != sorted(set(kept))
        values = expected[kept]
        want = [values.mean(), values.std(ddof=1), np.maximum(values, -1000).mean(), np.maximum(values, -1000).std(ddof=1)]
        wrong["statistics"] += not np.allclose(mine[0][0]["stats"], want, rtol=1e-4, atol=0.5 * scales + 1e-5)
    check(not any(wrong.values()), f"{name}: {wrong}")


def variants(prep, source):
    """One volume, written in the ways that readers get wrong."""
    image = nib.load(source)
    data, affine = np.asarray(image.dataobj).astype(np.float64), image.affine
    with tempfile.TemporaryDirectory() as folder:
        def write(name, array, kind=nib.Nifti1Image, order="<", slope=None, inter=None, matrix=affine):
            header = kind.header_class(endianness=order)
            header.set_data_dtype(array.dtype)
            made = kind(array, matrix, header)
            path = os.path.join(folder, name)
            nib.save(made, path)
            if slope is not None:  # nibabel would rescale the numbers to suit: the slope goes in afterwards
                raw = bytearray(open(path, "rb").read())
                raw[112:120] = struct.pack(order + "ff", slope, inter)
                open(path, "wb").write(raw)
            return path
        small = data[::2, ::2, ::2]
        whole = np.rint(small)
        compare(prep, write("big.nii", whole.astype(np.int16), order=">"), "big endian int16", True)
        compare(prep, write("two.nii.gz", whole.astype(np.int16), kind=nib.Nifti2Image), "NIfTI-2", True)
        compare(prep, write("twobig.nii", whole.astype(np.float32), kind=nib.Nifti2Image, order=">"), "big endian NIfTI-2 float32 of integers", True)
        compare(prep, write("double.nii", whole.astype(np.float64)), "float64 of integers", True)
        compare(prep, write("long.nii", whole.astype(np.int64)), "int64", True)
        compare(prep, write("u16.nii", (np.clip(whole, -1024, None) + 1024).astype(np.uint16), slope=1, inter=-1024), "uint16 with scl_inter -1024", True)
        compare(prep, write("high.nii", (np.clip(whole, -1024, None) + 61000).astype(np.uint16)), "uint16 above 32767", True)
        compare(prep, write("scaled.nii", whole.astype(np.int16), slope=0.25, inter=7), "int16 with scl_slope 0.25", True)
        compare(prep, write("negative.nii", whole.astype(np.int16), slope=-2, inter=1), "int16 with scl_slope -2", True)
        compare(prep, write("off.nii", whole.astype(np.int16), slope=0, inter=9), "scl_slope 0", True)
        compare(prep, write("float.nii.gz", (small * 0.3712 + 0.1).astype(np.float32)), "float32", False)
        holes = (small * 1.5 + 0.25).astype(np.float32)
        holes[3, 4, 5], holes[6, 6, 6], holes[7, 7, 7] = np.nan, np.inf, -np.inf
        compare(prep, write("nan.nii", holes), "NaN and infinities", False)
        four = np.stack([whole, whole[::-1], whole[:, ::-1]], -1).astype(np.int16)
        compare(prep, write("four.nii.gz", four), "4-D, first", True)
        compare(prep, write("four.nii", four), "4-D, mid", True, ("--4d", "mid"), 1)
        angle = np.deg2rad(25)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        oblique = np.eye(4)
        oblique[:3, :3] = turn @ np.diag([-1.5, 2, 2.5])
        for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            matrix = oblique.copy()
            matrix[:3, :3] = oblique[:3, axes]
            compare(prep, write("oblique.nii", whole.astype(np.int16), matrix=matrix), f"oblique, axes {axes}", True)


if __name__ == "__main__":
    for path in sys.argv[2:]:
        compare(sys.argv[1], path, os.path.basename(path), np.asarray(nib.load(path).dataobj).dtype.kind in "iu")
    variants(sys.argv[1], sys.argv[2])
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)

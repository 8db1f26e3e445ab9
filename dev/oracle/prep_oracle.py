"""Compares what prep stores with what nibabel, pydicom, SimpleITK and numpy read: every pixel, orientation, spacing, number and statistic.

usage: python3 prep_oracle.py PREP DATA [SCRATCH]     DATA is only read: real files; SCRATCH (default: TMPDIR) takes what is written

In turn: the NIfTI images of DATA, and variants of one; its DICOM series, and one slice in many transfer syntaxes; its NRRD files,
and the same volume in NRRD, MetaImage and pairs; the synthetic series of dicom_files.py, each alone and all together.
Shards are read here from the format's description alone (dataloader.h's header comment), and slices are put in order and turned
by our own numpy, which SimpleITK's DICOMOrient is asked to confirm. Prints a line for each failure, then `N passed, N failed`;
exit status 1 if any failed.
"""
import csv
import glob
import itertools
import os
import re
import struct
import subprocess
import sys
import tempfile
import warnings

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk

import dicom_files

RECORD = np.dtype([("pixel_offset", "<u8"), ("mask_offset", "<u8"), ("checksum", "<u8"), ("volume", "<u8"), ("patient", "<u8"), ("rows", "<i4"),
                   ("cols", "<i4"), ("number", "<i4"), ("slices", "<i4"), ("spacing", "<f4", 3), ("scale", "<f4"), ("intercept", "<f4"), ("modality", "u1"),
                   ("plane", "u1"), ("zero", "u1", 2), ("box", "<i4", 4), ("anatomy", "<f4", 4), ("label", "<i4"), ("target", "<f4"), ("stats", "<f4", 4)])
LOSSLESS = {"1.2.840.10008.1.2" + end for end in ("", ".1", ".2", ".1.99", ".5", ".4.57", ".4.70", ".4.80", ".4.90")}
passed = failed = 0


def check(good, message):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("failed:", message, flush=True)


def read_shards(folder):
    slices = []
    for path in sorted(glob.glob(folder + "/*.shard")):
        data = open(path, "rb").read()
        magic, version, record, count, index = struct.unpack("<8sIIQQ", data[:32])
        assert magic == b"CURIASHD" and version == 2 and record == RECORD.itemsize == 136
        for r in np.frombuffer(data, RECORD, count, index):
            pixels = np.frombuffer(data, "<i2", int(r["rows"]) * int(r["cols"]), int(r["pixel_offset"])).reshape(r["rows"], r["cols"])
            slices.append((r, pixels))
    return slices


def run(prep, inputs, flags=(), identifiers=()):
    """What prep makes of the inputs: its volumes as lists of (record, pixels), the reasons it gives in report.tsv or on stderr, and
    whether its exit status is one of those that say so. None of the identifiers may be in anything that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([prep, "-o", folder + "/out", *flags, *inputs], capture_output=True, text=True, errors="replace")
        volumes, reasons = {}, set()
        for r, pixels in read_shards(folder + "/out"):
            volumes.setdefault(int(r["volume"]), []).append((r, pixels))
        if os.path.exists(folder + "/out/report.tsv"):
            reasons = {row["reason"] for row in csv.DictReader(open(folder + "/out/report.tsv"), delimiter="\t")} - {""}
        for path in glob.glob(folder + "/out/*") if identifiers else []:
            data = open(path, "rb").read()
            check(not any(word.encode() in data for word in identifiers), f"{os.path.basename(path)} of {inputs} holds an identifier")
        usual = done.returncode == 0 if volumes else done.returncode in (0, 3)
        return list(volumes.values()), reasons, usual, f"exit status {done.returncode}: {' | '.join(done.stderr.strip().splitlines()[-2:])}"


def oriented(array, steps):
    """(L, P, S) array and its spacing, of an array whose index a goes steps[a] mm (LPS) at a time: each axis goes with the nearest of the body."""
    length = np.linalg.norm(steps, axis=1)
    cosine = np.asarray(steps) / length[:, None]
    order = max(itertools.permutations(range(3)), key=lambda o: sum(abs(cosine[a, o[a]]) for a in range(3)))
    axes = np.argsort(order)
    return np.flip(array.transpose(axes), [b for b in range(3) if cosine[axes[b], b] < 0]), length[axes], order


def nifti_volume(image, volume=0):
    """(L, P, S) array of values and its spacing, by nibabel's own canonical orientation."""
    canonical = nib.as_closest_canonical(image if image.ndim < 4 else image.slicer[..., volume])
    data = np.asarray(canonical.dataobj, dtype=np.float64)
    finite = data[np.isfinite(data)]
    data = np.where(np.isfinite(data), data, finite.min())
    return data[::-1, ::-1, :], np.sqrt((canonical.affine[:3, :3] ** 2).sum(0))


def itk_volume(image):
    """(L, P, S) array and spacing of SimpleITK's image by our own orientation, which its own must agree with."""
    array = sitk.GetArrayFromImage(image).astype(np.float64).transpose(2, 1, 0)
    data, spacing, _ = oriented(array, np.reshape(image.GetDirection(), (3, 3)).T * np.array(image.GetSpacing())[:, None])
    other = sitk.DICOMOrient(image, "LPS")
    check(np.array_equal(data, sitk.GetArrayFromImage(other).transpose(2, 1, 0)) and np.allclose(spacing, other.GetSpacing()), "our orientation is not ITK's")
    return data, spacing


def planes(data, spacing):
    """Per plane, slices [slice, row, column] in Curia's orientation, and spacing (row, column, slice)."""
    left, posterior, superior = spacing
    return [(data.transpose(2, 1, 0), (posterior, left, superior)), (data.transpose(1, 2, 0)[:, ::-1], (superior, left, posterior)),
            (data.transpose(0, 2, 1)[:, ::-1], (superior, posterior, left))]


def differences(stored, data, spacing, exact=True, wanted=(0, 1, 2), whole=False, tolerance=0):
    """What is wrong with a stored volume: counts, all 0 where it is right. Spacings that are NaN are unknown; whole: no slice may be dropped."""
    wrong, most = dict.fromkeys(("pixels", "size", "spacing", "statistics", "kept", "planes"), 0), np.abs(data).max()
    wrong["planes"] = len({int(r["plane"]) for r, _ in stored} - set(wanted))
    for plane, (expected, mm) in enumerate(planes(data, spacing)):
        mine = [(r, p) for r, p in stored if r["plane"] == plane]
        if plane not in wanted or min(expected.shape[1:]) < 16:
            wrong["kept"] += len(mine)
            continue
        kept, scales = [], 1.0
        for r, pixels in mine:
            kept.append(int(r["number"]))
            if pixels.shape != expected.shape[1:] or r["slices"] != len(expected):
                wrong["size"] += 1
                continue
            want, got = expected[r["number"]], np.float64(r["scale"]) * pixels + np.float64(r["intercept"])
            scales = np.abs(np.float64(r["scale"]))
            bound = 0 if exact and r["scale"] == 1 else 1e-6 * most if exact else 0.501 * scales + 1e-6 * most
            wrong["pixels"] += np.abs(want - got).max() > bound + tolerance
            known = np.isfinite(mm)
            wrong["spacing"] += not np.allclose(r["spacing"][known], np.array(mm)[known], rtol=1e-5)
        if wrong["size"] or not kept:
            wrong["kept"] += not kept
            continue
        left_out = [i for i in range(len(expected)) if i not in kept]
        if stored[0][0]["modality"] == 1 and not whole:  # the rule for CT is exact: constant, or fewer than 1 % above -500 HU
            wrong["kept"] += sum((expected[i] > -500).mean() >= 0.01 and np.ptp(expected[i]) > 1 for i in left_out)
            wrong["kept"] += sum((expected[i] > -500).mean() < 0.01 for i in kept)
        wrong["kept"] += kept != sorted(set(kept)) or (whole and bool(left_out))
        values = expected[kept]
        want = [values.mean(), values.std(ddof=1), np.maximum(values, -1000).mean(), np.maximum(values, -1000).std(ddof=1)]
        wrong["statistics"] += not np.allclose(mine[0][0]["stats"], want, rtol=1e-4, atol=0.5 * scales + 1e-5 + tolerance)
    return {what: int(n) for what, n in wrong.items() if n}


def compare(prep, path, name, exact, flags=(), volume=None):
    """One volume in one file, in all planes."""
    stored, _, usual, said = run(prep, [path], ("--planes", "all", *flags))
    if len(stored) != 1 or not usual:
        return check(False, f"{name}: {len(stored)} volumes instead of 1: {said}")
    wrong = differences(stored[0], *(volume or nifti_volume(nib.load(path))), exact)
    check(not wrong, f"{name}: {wrong}")


def match(stored, expected, name):
    """Stored volumes against expected ones (arguments of differences), in whatever order they come."""
    check(len(stored) == len(expected), f"{name}: {len(stored)} volumes instead of {len(expected)}")
    left = list(stored)
    for want in expected:
        tried = [differences(volume, **want) for volume in left]
        best = min(range(len(left)), key=lambda i: sum(tried[i].values()), default=None)
        check(best is not None and not tried[best], f"{name}: {'nothing stored' if best is None else tried[best]}")
        if best is not None:
            left.pop(best)


def nifti_images(prep, data):
    """Every NIfTI of DATA: images as nibabel reads them, label images left out."""
    for path in sorted(glob.glob(data + "/**/*.nii.gz", recursive=True)):
        image, name = nib.load(path), os.path.relpath(path, data)
        raw = np.asarray(image.dataobj.get_unscaled())
        if raw.dtype.kind not in "iuf" or sum(n >= 16 for n in raw.shape) < 2:
            check(not run(prep, [path])[0], f"{name}: taken, and it is no image of a body")
        elif raw.dtype.kind in "iu" and len(np.unique(raw)) <= 150:
            stored, reasons, _, said = run(prep, [path])
            check(not stored and reasons == {"label"}, f"{name}: a label image, and {len(stored)} volumes are taken: {said}")
        else:
            compare(prep, path, name, raw.dtype.kind in "iu", ("--keep", "few-slices"))


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
        compare(prep, write("four.nii", four), "4-D, mid", True, ("--4d", "mid"), nifti_volume(nib.load(folder + "/four.nii"), 1))
        angle = np.deg2rad(25)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        oblique = np.eye(4)
        oblique[:3, :3] = turn @ np.diag([-1.5, 2, 2.5])
        for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            matrix = oblique.copy()
            matrix[:3, :3] = oblique[:3, axes]
            compare(prep, write("oblique.nii", whole.astype(np.int16), matrix=matrix), f"oblique, axes {axes}", True)


def functional(ds, k, group, key):
    """What frame k says: in its own functional groups, else in the shared ones, else in the file itself."""
    own, shared = ds.get("PerFrameFunctionalGroupsSequence"), ds.get("SharedFunctionalGroupsSequence")
    for place in ([own[k]] if own else []) + list(shared or []):
        if place.get(group) and place[group][0].get(key) is not None:
            return place[group][0].get(key)
    return ds.get(key)


def stored_pixels(ds):
    """[frame, row, column]: the BitsStored bits below HighBit, whatever else is in a word."""
    raw, bits = ds.pixel_array.astype(np.int64).reshape(-1, ds.Rows, ds.Columns), ds.BitsStored
    raw = (raw >> (ds.HighBit + 1 - bits)) & ((1 << bits) - 1)
    low = 0
    if ds.PixelRepresentation:
        raw, low = raw - ((raw >> (bits - 1)) << bits), -1 << (bits - 1)
    return 2 * low + (1 << bits) - 1 - raw if ds.PhotometricInterpretation == "MONOCHROME1" and ds.Modality != "CT" else raw


def frames(path):
    """The frames of a file that pydicom can decode: values, geometry, and what tells volumes apart."""
    ds = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in ds.file_meta:
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" if ds.original_encoding[0] else "1.2.840.10008.1.2.1"
    pixels, tiles = stored_pixels(ds), None
    if "MOSAIC" in ds.get("ImageType", []):
        tiles, side = ds[0x0019, 0x100A].value, int(np.ceil(np.sqrt(ds[0x0019, 0x100A].value)))
        rows, cols = ds.Rows // side, ds.Columns // side
        pixels = pixels[0].reshape(side, rows, side, cols).transpose(0, 2, 1, 3).reshape(-1, rows, cols)[:tiles]
    for k, stored in enumerate(pixels):
        iop = np.array(functional(ds, k, "PlaneOrientationSequence", "ImageOrientationPatient"), float).reshape(2, 3)
        position = np.array(functional(ds, k, "PlanePositionSequence", "ImagePositionPatient"), float)
        spacing = np.array(functional(ds, k, "PixelMeasuresSequence", "PixelSpacing"), float)
        if tiles:  # the file's position is that of a single slice as large as the sheet
            position = position + (ds.Columns - cols) / 2 * spacing[1] * iop[0] + (ds.Rows - rows) / 2 * spacing[0] * iop[1]
            position = position + k * float(ds.SpacingBetweenSlices) * np.cross(*iop)
        slope, intercept = (functional(ds, k, "PixelValueTransformationSequence", key) for key in ("RescaleSlope", "RescaleIntercept"))
        key = (str(ds.get("SeriesInstanceUID")), stored.shape, tuple(spacing), str(ds.get("EchoTime", ds.get("EchoNumbers"))), str(ds.get("DiffusionBValue")),
               str(ds.get("ImageType", [])[2:3]), str(functional(ds, k, "FrameContentSequence", "StackID")), ds.Modality)
        order = [float(str(ds.get(word) or 0).replace(":", "")) for word in ("TemporalPositionIdentifier", "AcquisitionNumber", "AcquisitionTime",
                                                                             "InstanceNumber")]
        values = stored * float(1 if slope is None else slope) + float(intercept or 0)
        yield dict(key=key, iop=iop, along=position @ np.cross(*iop), order=order, values=values, spacing=spacing, path=path,
                   instance=(str(ds.get("SOPInstanceUID") or path), k))


def dicom_volumes(paths, fourd="first"):
    """The volumes that the files make, as lists of frames along the normal. Of several frames at a place --4d says which."""
    def gather(items, alike):
        groups = []
        for item in items:
            home = next((group for group in groups if alike(group[0], item)), None)
            groups.append([item]) if home is None else home.append(item)
        return groups
    once = {f["instance"]: f for path in paths for f in frames(path)}.values()
    for group in gather(once, lambda a, b: a["key"] == b["key"] and np.abs(a["iop"] - b["iop"]).max() < 1e-3):
        places = gather(sorted(group, key=lambda f: f["along"]), lambda a, b: b["along"] - a["along"] < 0.01)
        ranks = max(map(len, places))
        for rank in {"first": [0], "mid": [ranks // 2], "all": range(ranks)}[fourd]:
            yield [sorted(place, key=lambda f: f["order"])[rank] for place in places if len(place) > rank]


def expected_dicom(volume, **more):
    """Arguments of differences for a volume of frames: it is to be found cut in the plane it was taken in."""
    first, stack = volume[0], np.stack([f["values"] for f in volume])
    gap = np.median(np.diff([f["along"] for f in volume])) if len(volume) > 1 else np.nan
    steps = np.array([first["iop"][0] * first["spacing"][1], first["iop"][1] * first["spacing"][0], np.cross(*first["iop"]) * (1 if np.isnan(gap) else gap)])
    data, spacing, order = oriented(stack.transpose(2, 1, 0), steps)
    spacing[order[2]] = gap
    return dict(data=data, spacing=spacing, wanted=(2 - order[2],), **more)


def confirm_dicom(volume, name):
    """ITK's reader and its orientation give the same voxels, for slices at equal distances along their normal."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([f["path"] for f in volume])
    ours = expected_dicom(volume)
    data, spacing = itk_volume(reader.Execute())
    check(np.array_equal(data, ours["data"]) and np.allclose(spacing, ours["spacing"], rtol=1e-4), f"{name}: ITK reads other voxels")
    return ours


def dicom_series(prep, data):
    """The real series of DATA. d2n's NIfTI files are another program's conversion of the folder beside them."""
    folders = [data + "/ct_seg/ts_dicom/dicom", data + "/dicom/ge_head_ct_tilt", *sorted(glob.glob(data + "/dicom/d2n_bitexact/*/001"))]
    for folder in folders:
        name, paths = os.path.relpath(folder, data), [p for p in glob.glob(folder + "/*") if not p.endswith("LICENSE")]
        volumes = list(dicom_volumes(paths))
        stored, _, usual, said = run(prep, [folder], ("--keep", "few-slices", "--track", "3d"))  # d2n's noise is no body
        check(usual, f"{name}: {said}")
        match(stored, [expected_dicom(v, whole=True) for v in volumes], name)
        if "ts_dicom" in folder or "generic" in folder:
            ours = confirm_dicom(volumes[0], name)
            if min(ours["data"].shape) >= 16:
                match(run(prep, [folder], ("--planes", "all"))[0], [{**ours, "wanted": (0, 1, 2)}], f"{name} in all planes")
        if os.path.exists(folder + "_ground_truth.nii.gz"):
            truth = nifti_volume(nib.load(folder + "_ground_truth.nii.gz"))
            check(np.array_equal(truth[0], ours["data"]), f"{name}: pydicom's voxels are not those of the ground truth")
            match(stored, [dict(data=truth[0], spacing=truth[1], wanted=ours["wanted"])], f"{name} against its ground truth")
    for path in sorted(path for part in ("dicom/enhanced_mf/*", "bad/CT_small", "bad/MR_small_big*", "fmt4d/*") for path in glob.glob(f"{data}/{part}.dcm")):
        name, unplaced = os.path.relpath(path, data), "enhanced_mf" in path
        stored, reasons, _, said = run(prep, [path], ("--4d", "all", "--keep", "few-slices,projection" + ",no-geometry" * unplaced))
        if unplaced:  # these say nowhere where their frames lie: the frames are what can be compared
            check(run(prep, [path])[1] == {"no-geometry"}, f"{name}: without geometry, and not rejected for that")
            read = sorted(frame.tobytes() for frame in stored_pixels(pydicom.dcmread(path.replace("_too_short", ""))))  # that lacks its last 8 bytes only
            got = sorted(np.rint(r["scale"] * pixels + r["intercept"]).astype(np.int64).tobytes() for volume in stored for r, pixels in volume)
            check(got == read or "too_short" in path and reasons == {"damaged"}, f"{name}: {len(got)} frames are not pydicom's {len(read)}: {said}")
        else:
            match(stored, [expected_dicom(v) for v in dicom_volumes([path]) if np.ptp(v[0]["values"])], name)


def fnv1a64(words):
    """The hash that DATA's manifest gives of a slice: over u16 words and not bytes, and from a basis that is a digit short of FNV's."""
    h = 1469598103934665603
    for word in words.tolist():
        h = (h ^ word) * 0x100000001b3 & 0xffffffffffffffff
    return h


def syntaxes(prep, data):
    """One CT slice in many transfer syntaxes: the known hash of its pixels from every lossless one; lossy ones as pydicom has them, or rejected."""
    same = set()
    for path in sorted(glob.glob(data + "/dicom/ct_all_transfer_syntaxes/CTImage*")):
        stored, reasons, _, said = run(prep, [path], ("--keep", "few-slices"))
        name, meta = os.path.basename(path), pydicom.dcmread(path, specific_tags=["BitsStored"], force=True)
        if meta.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2") in LOSSLESS:
            check(len(stored) == 1, f"{name}: {len(stored)} volumes instead of 1: {said}")
            for r, pixels in sum(stored, []):
                same.add((np.rint(r["scale"] * pixels + r["intercept"]).astype(int) + 1024 & 0xffff).astype("<u2").tobytes())
        elif meta.BitsStored == 8:
            check(not stored and reasons == {"eight-bit"}, f"{name}: 8 bits, and it is taken: {said}")
        elif not stored:
            check(reasons == {"damaged"}, f"{name}: {said}")
        elif not name.endswith((".53.dcm", ".55.dcm")):  # pydicom decodes no progressive JPEG; roundings may differ by one stored number, twice
            match(stored, [expected_dicom(v, exact=False, tolerance=4.1) for v in dicom_volumes([path])], name)
    hashes = [f"{fnv1a64(np.frombuffer(pixels, '<u2')):x}" for pixels in same]
    check(hashes == ["6ec42b1615e0f48c"], f"lossless syntaxes give slices of hash {hashes}")


def volume_files(prep, data):
    """NRRD of DATA, then one real volume in every container, with directions that readers get wrong."""
    for path in sorted(glob.glob(data + "/**/*.nrrd", recursive=True)):
        name = os.path.relpath(path, data)
        if "label" in name:
            stored, reasons, _, said = run(prep, [path])
            check(not stored and reasons == {"label"}, f"{name}: a label image, and {len(stored)} volumes are taken: {said}")
            continue
        image = sitk.ReadImage(path)
        compare(prep, path, name, sitk.GetArrayViewFromImage(image).dtype.kind in "iu", ("--keep", "few-slices"), itk_volume(image))
    source = sitk.ReadImage(data + "/mr_seg/sct/t1_t1w.nii.gz")
    a, b = np.deg2rad((20, 12))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    directions = dict(straight=np.eye(3), negative=np.diag([-1, 1, -1.0]), swapped=np.eye(3)[[2, 0, 1]], oblique=turn, mixed=turn[:, [1, 2, 0]] * [1, -1, -1])
    with tempfile.TemporaryDirectory() as folder:
        for (word, direction), kind in itertools.product(directions.items(), (sitk.sitkInt16, sitk.sitkFloat32)):
            image = sitk.Cast(source, kind) if kind == sitk.sitkInt16 else sitk.Cast(source, kind) * 0.37 + 0.1
            image.SetDirection(direction.ravel())
            image.SetSpacing((0.9, 1.1, 1.3))
            volume, exact = itk_volume(image), kind == sitk.sitkInt16
            for end, packed in itertools.product((".nrrd", ".nhdr", ".mha", ".mhd", ".nii.gz", ".hdr"), (False, True)):
                if end in (".nii.gz", ".hdr") and not packed or end == ".hdr" and not exact:
                    continue
                path = f"{folder}/{word}{int(exact)}{int(packed)}{end}"
                if end == ".hdr":
                    nib.save(nib.Nifti1Pair.from_image(nib.load(path.replace(".hdr", ".nii.gz"))), path)
                else:
                    sitk.WriteImage(image, path, packed)
                compare(prep, path, f"{word} {'packed ' * packed}{'int16' if exact else 'float32'} {end}", exact, (), volume)
        for end, old, new in ((".mhd", "BinaryDataByteOrderMSB = False", "BinaryDataByteOrderMSB = True"), (".nhdr", "endian: little", "endian: big")):
            path = f"{folder}/oblique10{end}"
            text = open(path).read()
            raw = os.path.join(folder, re.search(r"(?:ElementDataFile =|data file:) *(.*)", text).group(1))
            check(old in text, f"ITK's {end} is not as it was: {text}")
            np.fromfile(raw, "<i2").astype(">i2").tofile(raw)
            open(path, "w").write(text.replace(old, new))
            compare(prep, path, f"big endian {end}", True, (), (volume := itk_volume(sitk.ReadImage(path))))


def synthetic(prep):
    """The series of dicom_files.py, each case alone; then all together, where copies go."""
    with tempfile.TemporaryDirectory() as folder:
        tree = dicom_files.write(folder)
        identifiers = open(folder + "/identifiers.txt").read().splitlines()
        for name, case in tree.cases.items():
            inputs = [os.path.join(folder, part) for part in case["folders"]]
            stored, reasons, usual, said = run(prep, inputs, case["flags"], identifiers)
            check(usual, f"{name}: {said}")
            if not case["volumes"]:
                check(not stored, f"{name}: {len(stored)} volumes are taken: {said}")
                check(any(w in reasons or w in said for w in case["reason"].split("|")), f"{name}: rejected as {reasons or said}, not as {case['reason']}")
                continue
            flags = dict(zip(case["flags"][::2], case["flags"][1::2]))
            paths = [p for part in inputs for p in sorted(glob.glob(part + "/*")) if p not in tree.cut]
            volumes = list(dicom_volumes(paths, flags.get("--4d", "first")))
            read = [np.stack([f["values"] for f in v]) for v in volumes]
            same = all(any(r.shape == t.shape and np.allclose(r, t) for r in read) for t in tree.truth[name])
            check(same or name == "ct_air_2d", f"{name}: pydicom does not read what was written")
            match(stored, [expected_dicom(v, whole="--track" in flags) for v in volumes], name)
            check(sum(map(len, stored)) == case["slices"], f"{name}: {sum(map(len, stored))} slices instead of {case['slices']}")
            if name.startswith("mr_") and any(word in name for word in ("axial", "coronal", "sagittal", "oblique")):
                confirm_dicom(volumes[0], name)
        kept = {c["content"]: c for c in tree.cases.values() if c["volumes"] and (not c["flags"] or c["flags"] == ["--4d", "first"])}
        stored, reasons, usual, said = run(prep, [folder], (), identifiers)
        check(usual, f"all series together: {said}")
        got, want = (len(stored), sum(map(len, stored))), tuple(sum(c[what] for c in kept.values()) for what in ("volumes", "slices"))
        check(got == want, f"all series together: (volumes, slices) are {got} instead of {want}: {said}")
        missing = {word for c in tree.cases.values() if c["reason"] for word in c["reason"].split("|")[-1:]} | {"duplicate"}
        check(missing <= reasons, f"all series together: report.tsv lacks the reasons {missing - reasons}")


def main():
    prep, data = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    if len(sys.argv) > 3:
        tempfile.tempdir = os.path.abspath(sys.argv[3])
    warnings.filterwarnings("ignore")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    nifti_images(prep, data)
    variants(prep, data + "/ct_seg/ts_example/example_ct.nii.gz")
    dicom_series(prep, data)
    syntaxes(prep, data)
    volume_files(prep, data)
    synthetic(prep)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

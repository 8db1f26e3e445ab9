"""Scans to slices on a disk: ./prep/prep against SimpleITK and numpy, in one run, alternating.

usage: prep.py PREP DATA [--rounds N] [--series N] [--jobs N]        DATA: the real files that the tests use

Three inputs: series of uncompressed DICOM (a GE head CT, copied under new UIDs), series of JPEG 2000 DICOM (a Siemens CT, likewise),
and .nii.gz volumes (clinical brain MR). prep decodes, checks, orients, finds bodies and writes shards with checksums. SimpleITK is
used as its users would: a pool of as many processes, ImageSeriesReader or ReadImage per volume, int16 pixels to a .npy, nothing else.
Prints TSV: slices per second of both (median over rounds), the median of the rounds' ratios; the same for processor time (user and
system, all processes, ms a slice), which other programs disturb less; how many slices a second prep's decoders alone give per
process (by prep's own count of their time), and peak memory in MiB of the largest process of each side.
Both read from the page cache and write to TMPDIR.
"""
import argparse
import glob
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

COLUMNS = ("input", "volumes", "slices", "prep_slices_per_s", "simpleitk_slices_per_s", "ratio", "prep_cpu_ms", "simpleitk_cpu_ms",
           "cpu_ratio", "prep_decoder_slices_per_s", "prep_MiB", "simpleitk_MiB")


def replicate(paths, folder, copies):
    """`copies` series of the files, each with UIDs and an intercept of its own, so that none is dropped as a copy of another."""
    import pydicom
    from pydicom.uid import generate_uid
    for copy in range(copies):
        os.makedirs(f"{folder}/{copy:03}")
        for path in paths:
            ds = pydicom.dcmread(path)
            ds.SeriesInstanceUID, ds.PatientID = generate_uid(entropy_srcs=[folder, str(copy)]), f"copy{copy}"
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path, str(copy)])
            ds.RescaleIntercept = str(float(ds.RescaleIntercept) - copy)
            ds.save_as(f"{folder}/{copy:03}/{os.path.basename(path)}")
    return [f"{folder}/{copy:03}" for copy in range(copies)]


def copies(paths, folder, n):
    os.makedirs(folder)
    return [shutil.copy(path, f"{folder}/{copy:03}-{i:03}.nii.gz") for copy in range(n) for i, path in enumerate(paths)]


def convert(job):
    """SimpleITK's side: one volume to a .npy of int16; returns its slices and this process's peak memory."""
    import numpy as np
    import SimpleITK as sitk
    source, target = job
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if os.path.isdir(source):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(source))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(source)
    array = sitk.GetArrayFromImage(image).astype(np.int16)
    np.save(target, array)
    return len(array), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def simpleitk_worker(jobs, folder, sources):
    with multiprocessing.Pool(jobs) as pool:
        done = pool.map(convert, [(source, f"{folder}/{i}.npy") for i, source in enumerate(sources)], chunksize=1)
    print(sum(n for n, _ in done), max(peak for _, peak in done))


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command):
    start, used = time.perf_counter(), processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, used = time.perf_counter() - start, processor_seconds() - used
    if done.returncode:
        sys.exit(f"{command[0]} ends with {done.returncode}: {done.stderr.strip()[-500:]}")
    return seconds, used, done


def figure(pattern, text):
    found = re.findall(pattern, text, re.IGNORECASE)
    return float(found[-1]) if found else float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prep")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--series", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--simpleitk-worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simpleitk_worker:
        return simpleitk_worker(options.jobs, options.simpleitk_worker[0], options.simpleitk_worker[1:])
    print(*COLUMNS, sep="\t", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        head, thorax = glob.glob(options.data + "/dicom/ge_head_ct_tilt/*.dcm"), glob.glob(options.data + "/ct_seg/ts_dicom/dicom/*")
        inputs = {"DICOM uncompressed": replicate(sorted(head), folder + "/head", options.series),
                  "DICOM JPEG 2000": replicate(sorted(thorax), folder + "/thorax", options.series),
                  "nii.gz": copies(sorted(glob.glob(options.data + "/mr_seq/open_ms/*/*.nii.gz")), folder + "/brain", max(1, options.series // 6))}
        for name, sources in inputs.items():
            ours, theirs, cpu, decoder, memory, slices = [], [], [], [], [0, 0], [0, 0]
            for turn in range(options.rounds + 1):  # the first round warms the page cache and does not count
                out = f"{folder}/out"
                os.makedirs(out)
                seconds, used, done = timed([options.prep, "-o", out + "/shards", "--jobs", str(options.jobs), "--track", "3d",
                                             "--keep", "duplicate", *sources])
                slices[0] = figure(r"(\d+) slices in \d+ shards", done.stderr)
                decoding = figure(r"([\d.]+) s decoding", done.stderr)
                memory[0] = max(memory[0], figure(r"worker ([\d.]+) MiB", done.stderr))
                shutil.rmtree(out)
                os.makedirs(out)
                their_seconds, their_use, done = timed([sys.executable, __file__, options.prep, options.data, "--jobs",
                                                        str(options.jobs), "--simpleitk-worker", out, *sources])
                slices[1], peak = map(float, done.stdout.split())
                memory[1] = max(memory[1], peak)
                shutil.rmtree(out)
                if turn:
                    ours.append(slices[0] / seconds)
                    theirs.append(slices[1] / their_seconds)
                    cpu.append((1000 * used / slices[0], 1000 * their_use / slices[1], their_use / used))
                    decoder.append(slices[0] / decoding if decoding else float("nan"))
            if slices[0] != slices[1]:
                sys.exit(f"{name}: prep takes {slices[0]:.0f} slices and SimpleITK {slices[1]:.0f}: nothing to compare")
            ratio = statistics.median(a / b for a, b in zip(ours, theirs))
            print(name, len(sources), int(slices[0]), *(f"{statistics.median(x):.0f}" for x in (ours, theirs)), f"{ratio:.2f}",
                  *(f"{statistics.median(x):.2f}" for x in zip(*cpu)),
                  f"{statistics.median(decoder):.0f}", *(f"{m:.0f}" for m in memory), sep="\t", flush=True)


if __name__ == "__main__":
    main()

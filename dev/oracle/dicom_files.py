"""Writes synthetic DICOM series that readers get wrong, each in a folder of its own, for the tests of prep.

usage: python3 dicom_files.py OUTDIR

OUTDIR/NAME/...          the files of each case; their names say nothing of the order of the slices
OUTDIR/expected.json     per case: its folders, how many volumes and slices prep takes from it with which flags, or why it
                         takes none; `content` is one for cases of equal pixels, of which a run over all of OUTDIR keeps one
OUTDIR/identifiers.txt   every string in the files that names a person, a place, a time or a UID, one a line: no output may hold one
The same OUTDIR bytes come out each time. An encoder that is not installed costs its case, and a line says so.
"""
import json
import os
import sys

import numpy as np
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless,
                         JPEGLSLossless, RLELossless, generate_uid)

config.settings.reading_validation_mode = config.settings.writing_validation_mode = config.IGNORE
IDENTITY = dict(PatientName="FamilyOfPatient^GivenOfPatient", PatientID="HOSP-7712345", PatientBirthDate="19470823", OtherPatientIDs="OLDID-998877",
                PatientAddress="AddressOfPatient", PatientComments="Wears a pacemaker", AccessionNumber="ACCN-5566778", StudyID="STUDY-4711",
                StudyDate="20190317", SeriesDate="20190318", AcquisitionDate="20190319", ContentDate="20190321", StudyTime="131517.250000",
                StudyDescription="Followup of FamilyOfPatient", SeriesDescription="GivenOfPatient special series", ProtocolName="Protocol of Drs FamilyOfReferrer",
                InstitutionName="InstitutionOfScan", InstitutionAddress="AddressOfInstitution", StationName="STATIONX42",
                ReferringPhysicianName="FamilyOfReferrer^GivenOfReferrer", OperatorsName="FamilyOfOperator^GivenOfOperator", DeviceSerialNumber="SERIAL-303030")
CT_CLASS, MR_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


def normal(iop):
    return np.cross(iop[:3], iop[3:])


def item(**keys):
    ds = Dataset()
    for key, value in keys.items():
        setattr(ds, key, value)
    return ds


def body(seed, ct=True, shape=(8, 48, 40)):
    """Smooth ellipsoids under noise, [slice, row, column]: HU or MR's numbers from 0 to 2000. No mirror image of it is like it."""
    draw = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    air, trunk, organ, bone = (-1000, 40, -780, 900) if ct else (3, 420, 150, 1300)
    values = np.where(((x - 0.1) / 0.8) ** 2 + ((y + 0.05) / 0.65) ** 2 + (z / 2.4) ** 2 < 1, trunk + 60 * z - 40 * y, air)
    values = np.where(((x + 0.25) / 0.3) ** 2 + ((y + 0.1) / 0.4) ** 2 + ((z - 0.4) / 1.1) ** 2 < 1, organ, values)
    values = np.where(((x - 0.5) / 0.15) ** 2 + ((y - 0.3) / 0.12) ** 2 < 1, bone, values)
    values = values + draw.normal(0, 12, shape)
    return np.clip(np.rint(values), -1024 if ct else 0, 3071 if ct else 2000)


class Tree:
    """The folder being written: its cases, what is expected of them, the truth (case: volumes along the normal), every identifier, and the files
    cut short."""

    def __init__(self, out):
        self.out, self.cases, self.truth, self.identifiers, self.cut, self.files = out, {}, {}, set(IDENTITY.values()), [], 0

    def uid(self, *words):
        made = generate_uid(entropy_srcs=[str(w) for w in words])
        self.identifiers.add(str(made))
        return made

    def expect(self, name, *truth, reason=None, flags=(), folders=None, content=None, note=""):
        """A case: the volumes that prep takes with these flags, or the reason for which it takes none."""
        self.cases[name] = dict(folders=folders or [name], volumes=len(truth), slices=sum(len(t) for t in truth), reason=reason, flags=list(flags),
                                content=content or name, note=note)
        self.truth[name] = [np.asarray(t, np.float64) for t in truth]

    def slice(self, folder, pixels, series=None, modality="CT", iop=AXIAL, position=(-30, -40, 50), spacing=(0.8, 0.7), syntax=ExplicitVRLittleEndian,
              bits=16, signed=True, keys=None, edit=None, whole=True, frames=0):
        """One file: pixels [row, column] (or [frame, row, column]) of stored integers; keys are DICOM keywords that replace the usual ones."""
        self.files += 1
        ds = Dataset()
        for key, value in IDENTITY.items():
            setattr(ds, key, value)
        ds.SOPClassUID, ds.SOPInstanceUID = CT_CLASS if modality == "CT" else MR_CLASS, self.uid("instance", self.files)
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = self.uid("study"), self.uid("series", series or folder), self.uid("frame")
        ds.Modality, ds.ImageType, ds.InstanceNumber, ds.AcquisitionNumber = modality, ["ORIGINAL", "PRIMARY", "AXIAL"], self.files * 7 % 101, 1
        if position is not None:
            ds.ImageOrientationPatient, ds.ImagePositionPatient = [f"{v:.9g}" for v in iop], [f"{v:.9g}" for v in position]
            ds.PixelSpacing, ds.SliceThickness = [str(s) for s in spacing], "5"
        if modality == "CT":
            ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", pixels.shape[-2], pixels.shape[-1]
        if frames:
            ds.NumberOfFrames = frames
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8 if bits <= 8 else 16, bits, bits - 1, int(signed)
        for key, value in (keys or {}).items():
            setattr(ds, key, value)
        big = syntax == ExplicitVRBigEndian
        kind = "u1" if bits <= 8 else ">u2" if big else "<u2"
        ds.PixelData = (pixels.astype(np.int64) & (255 if bits <= 8 else 65535)).astype(kind).tobytes()
        ds["PixelData"].VR = "OB" if bits <= 8 else "OW"
        if edit:
            edit(ds)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, self.uid("instance", self.files)
        ds.file_meta.TransferSyntaxUID = syntax if not syntax.is_compressed or syntax == DeflatedExplicitVRLittleEndian else ExplicitVRLittleEndian
        if ds.file_meta.TransferSyntaxUID != syntax:
            ds.compress(syntax, generate_instance_uid=False)
        path = os.path.join(self.out, folder, f"{self.files * 7919 % 10007:05}" + ("" if self.files % 3 else ".dcm"))  # shuffled, with and without suffix
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if whole:
            ds.save_as(path, enforce_file_format=True)
        else:  # neither preamble nor meta information
            meta, ds.file_meta = ds.file_meta, FileMetaDataset()
            ds.save_as(path, implicit_vr=meta.TransferSyntaxUID == ImplicitVRLittleEndian, little_endian=True, enforce_file_format=False)
        return path

    def stack(self, folder, stored, iop=AXIAL, gaps=None, gap=3.0, origin=(-30, -40, 50), each=None, along=None, **options):
        """A file per slice of `stored` [slice, row, column], set out along the normal; each(k) gives further options of slice k."""
        along = normal(iop) if along is None else np.asarray(along, float)
        places = np.concatenate([[0], np.cumsum(gaps)]) if gaps is not None else gap * np.arange(len(stored))
        paths = [None] * len(stored)
        for k in np.random.default_rng(len(folder)).permutation(len(stored)):
            paths[k] = self.slice(folder, stored[k], iop=iop, position=np.asarray(origin) + places[k] * along, **{**options, **(each(k) if each else {})})
        return paths


def encodings(tree):
    """One CT in every way to write a file."""
    values = body(1)
    for name, syntax, whole in (("ct_explicit", ExplicitVRLittleEndian, True), ("ct_implicit", ImplicitVRLittleEndian, True),
                                ("ct_big_endian", ExplicitVRBigEndian, True), ("ct_deflated", DeflatedExplicitVRLittleEndian, True),
                                ("ct_rle", RLELossless, True), ("ct_jpegls", JPEGLSLossless, True), ("ct_jpeg2000", JPEG2000Lossless, True),
                                ("ct_no_meta_implicit", ImplicitVRLittleEndian, False), ("ct_no_meta_explicit", ExplicitVRLittleEndian, False)):
        try:
            tree.stack(name, values + 1024, syntax=syntax, whole=whole)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"skipped: {name}: {str(error).splitlines()[0]}")
            continue
        tree.expect(name, values, content="ct")
    for path in tree.stack("ct_no_preamble", values + 1024):  # begins with group 2
        data = open(path, "rb").read()
        open(path, "wb").write(data[132:])
    tree.expect("ct_no_preamble", values, content="ct")

    def icon(ds):
        small = item(SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", Rows=64, Columns=64, BitsAllocated=8, BitsStored=8, HighBit=7,
                     PixelRepresentation=0, PixelData=encapsulate([bytes(range(256)) * 4]))
        small["PixelData"].VR, small["PixelData"].is_undefined_length = "OB", True
        ds.IconImageSequence = Sequence([small])
        ds["IconImageSequence"].is_undefined_length = small.is_undefined_length_sequence_item = True
    tree.stack("ct_icon", values + 1024, edit=icon, syntax=RLELossless)
    tree.expect("ct_icon", values, content="ct", note="a thumbnail with encapsulated pixels of its own, before those of the slice")
    paths = tree.stack("ct_duplicates", values + 1024)
    for path in paths[::2]:
        open(path + "_copy", "wb").write(open(path, "rb").read())
    tree.expect("ct_duplicates", values, flags=["--4d", "all"], content="ct", note="the same SOPInstanceUID under another name")


def overlay(ds):
    """Group 6000 of an overlay that lies in the pixels' own unused bits, as files before 2004 have it."""
    for number, vr, value in ((0x10, "US", ds.Rows), (0x11, "US", ds.Columns), (0x40, "CS", "G"), (0x50, "SS", [1, 1]), (0x100, "US", 16), (0x102, "US", 12)):
        ds.add_new(0x60000000 | number, vr, value)


def pixels(tree):
    """What a stored number means."""
    values = body(2)
    slopes, offsets = 1 + np.arange(8) % 3, -1024 - 10 * np.arange(8)
    stored = np.rint((values - offsets[:, None, None]) / slopes[:, None, None])
    rescale = lambda slopes, offsets: lambda k: dict(keys=dict(RescaleSlope=f"{slopes[k]:g}", RescaleIntercept=f"{offsets[k]:g}"))
    tree.stack("ct_rescale_per_slice", stored, each=rescale(slopes, offsets))
    tree.expect("ct_rescale_per_slice", stored * slopes[:, None, None] + offsets[:, None, None])
    slopes, offsets = 0.37 + 0.013 * np.arange(8), 0.5 * np.arange(8)
    stored = body(3, False)
    tree.stack("mr_rescale_per_slice", stored, modality="MR", signed=False, bits=12, each=rescale(slopes, offsets))
    tree.expect("mr_rescale_per_slice", stored * slopes[:, None, None] + offsets[:, None, None], note="fractional slopes, as PET and Philips have")
    values, draw = body(4), np.random.default_rng(4)
    stored = (values + 1024).astype(int)
    tree.stack("ct_overlay_bits", stored + (draw.integers(0, 16, stored.shape) << 12), bits=12, signed=False,
               edit=overlay)
    tree.expect("ct_overlay_bits", values, note="planes of an overlay in the four bits above BitsStored")
    values = np.clip(body(5), -1024, 2047)
    tree.stack("ct_signed_12bit", values.astype(int) & 0xFFF, bits=12, keys=dict(RescaleIntercept="0"))
    tree.expect("ct_signed_12bit", values, note="two's complement in 12 bits, zeros above")
    stored = body(6, False)
    tree.stack("mr_monochrome1", 4095 - stored, modality="MR", bits=12, signed=False, keys=dict(PhotometricInterpretation="MONOCHROME1"))
    tree.expect("mr_monochrome1", stored, note="white is 0: inverted about the range of BitsStored")
    values = body(7)
    tree.stack("ct_monochrome1", values + 1024, keys=dict(PhotometricInterpretation="MONOCHROME1"))
    tree.expect("ct_monochrome1", values, note="a matter of display: HU stay HU")
    values = body(8)
    values[:2] = np.clip(np.random.default_rng(8).normal(-1000, 8, (2, 48, 40)), -1024, -900).round()
    values[5] = -1024
    tree.stack("ct_air_2d", values + 1024)
    tree.expect("ct_air_2d", values[[2, 3, 4, 6, 7]], note="two slices of air and a constant one")
    tree.stack("ct_air_3d", values + 1024)
    tree.expect("ct_air_3d", values, flags=["--track", "3d"], content="ct_air_2d")


def geometry(tree):
    """Where slices lie."""
    (ca, sa), (cb, sb) = ((np.cos(angle), np.sin(angle)) for angle in np.deg2rad((25, 10)))
    turn = np.array([[cb, -sb, 0], [sb, cb, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    orientations = dict(mr_coronal=CORONAL, mr_sagittal=SAGITTAL, mr_oblique=(*turn[:, 0], *turn[:, 1]), mr_coronal_oblique=(*turn[:, 0], *-turn[:, 2]),
                        mr_sagittal_flipped=(0, -1, 0, 0, 0, 1), mr_axial_prone=(-1, 0, 0, 0, -1, 0), mr_axial_feet_first=(-1, 0, 0, 0, 1, 0),
                        mr_axial_turned=(0, 1, 0, 1, 0, 0))
    for seed, (name, iop) in enumerate(orientations.items(), 20):
        values = body(seed, False)
        tree.stack(name, values, modality="MR", bits=12, signed=False, iop=iop)
        tree.expect(name, values)
    values = body(40)
    tilt = np.deg2rad(18.5)
    tree.stack("ct_gantry_tilt", values + 1024, iop=(1, 0, 0, 0, np.cos(tilt), -np.sin(tilt)), along=(0, 0, 1), keys=dict(GantryDetectorTilt="18.5"))
    tree.expect("ct_gantry_tilt", values)
    values = body(41)
    tree.stack("ct_uneven_gaps", values + 1024, gaps=[3, 3, 1, 3, 7.5, 3, 1])
    tree.expect("ct_uneven_gaps", values)


def grouping(tree):
    """What belongs together."""
    def fill(name, seeds, each, modality="MR", **options):
        made = [body(seed, modality == "CT") for seed in seeds]
        for i, values in enumerate(made):
            tree.stack(name, values + (1024 if modality == "CT" else 0), modality=modality, **{**options, **each(i)})
        return made
    tree.expect("mr_two_echoes", *fill("mr_two_echoes", (50, 51), lambda i: dict(keys=dict(EchoTime=str(10 + 80 * i), EchoNumbers=str(1 + i)))))
    tree.expect("mr_two_bvalues", *fill("mr_two_bvalues", (52, 53), lambda i: dict(keys=dict(DiffusionBValue=1000.0 * i))))
    tree.expect("ct_two_image_types", *fill("ct_two_image_types", (70, 71), lambda i: dict(keys=dict(ImageType=["ORIGINAL", "PRIMARY", "WF"[i]])), "CT"))
    for word, chosen in (("first", [0]), ("mid", [1]), ("all", [0, 1, 2])):
        name = f"mr_4d_{word}"
        made = fill(name, (54, 55, 56), lambda i: dict(keys=dict(TemporalPositionIdentifier=i + 1, NumberOfTemporalPositions=3)))
        tree.expect(name, *[made[i] for i in chosen], flags=["--4d", word], content="mr_4d")
    tree.expect("ct_two_series_one_folder", *fill("ct_two_series_one_folder", (57, 58), lambda i: dict(series=f"two{i}"), "CT"))
    values = body(75)
    tree.stack("ct_anonymous", values + 1024, keys=dict.fromkeys(("PatientID", "PatientName", "SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID"), ""))
    tree.expect("ct_anonymous", values, note="empty UIDs: the folder holds it together")
    values, options = body(59) + 1024, dict(series="split")
    tree.stack("ct_one_series_two_folders/a", values[::2], gap=6, **options)
    tree.stack("ct_one_series_two_folders/b", values[1::2], gap=6, origin=(-30, -40, 53), **options)
    tree.expect("ct_one_series_two_folders", values - 1024, folders=["ct_one_series_two_folders/a", "ct_one_series_two_folders/b"])


def rejected(tree):
    """What is no scan to train on."""
    def case(name, reason, seed, keys=None, **options):
        modality = options.pop("modality", "CT")
        tree.stack(name, body(seed, modality == "CT") + 1024 * (modality == "CT"), modality=modality, keys=keys, **options)
        tree.expect(name, reason=reason)
    case("reject_localizer", "localizer", 60, dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    for iop, seed in ((AXIAL, 80), (CORONAL, 81), (SAGITTAL, 82)):
        tree.stack("reject_three_planes", body(seed, False)[:2], modality="MR", iop=iop)
    tree.expect("reject_three_planes", reason="localizer", note="no LOCALIZER in ImageType, but three planes in one series")
    case("reject_secondary_capture", "secondary-capture", 61, dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"))
    case("reject_burned_in", "burned-in", 62, dict(BurnedInAnnotation="YES"))
    case("reject_mip", "projection", 63, dict(ImageType=["DERIVED", "SECONDARY", "PROJECTION IMAGE"]))
    case("reject_pet", "modality", 64, dict(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128"))
    case("reject_ultrasound", "modality", 65, dict(Modality="US", SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1"))
    case("take_derived_secondary", None, 66, dict(ImageType=["DERIVED", "SECONDARY", "OTHER"]))
    tree.expect("take_derived_secondary", body(66), note="DERIVED\\SECONDARY alone is no reason: real volumes carry it")
    few = body(67)[:3]
    tree.stack("reject_few_slices", few + 1024)
    tree.expect("reject_few_slices", reason="few-slices")
    tree.stack("keep_few_slices", few + 1024)
    tree.expect("keep_few_slices", few, flags=["--keep", "few-slices"], content="reject_few_slices")
    tree.stack("reject_eight_bit", np.clip(body(68, False) / 8, 0, 255).round(), modality="MR", bits=8, signed=False)
    tree.expect("reject_eight_bit", reason="eight-bit")

    def colour(ds):
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = bytes(3 * ds.Rows * ds.Columns)
    tree.stack("reject_rgb", body(69), edit=colour)
    tree.expect("reject_rgb", reason="not-scalar|eight-bit")

    def report(ds):
        ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.88.11", "SR"
        for key in ("PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"):
            del ds[key]
    tree.slice("reject_report", body(69)[0], position=None, edit=report)
    tree.expect("reject_report", reason="not-image")
    tree.stack("reject_no_geometry", body(72) + 1024, edit=lambda ds: [ds.__delitem__(k) for k in ("ImagePositionPatient", "ImageOrientationPatient")])
    tree.expect("reject_no_geometry", reason="no-geometry")
    values = body(74)
    tree.cut = tree.stack("reject_truncated", body(73) + 1024) + tree.stack("take_one_truncated", values + 1024)[3:4]
    for path in tree.cut:
        data = open(path, "rb").read()
        open(path, "wb").write(data[:-1000])
    tree.expect("reject_truncated", reason="damaged")
    tree.expect("take_one_truncated", values[[0, 1, 2, 4, 5, 6, 7]], note="a file cut short costs its slice, not the series")
    for name, data in (("reject_not_dicom/notes.dcm", b"The report of GivenOfPatient FamilyOfPatient is attached.\n" * 40), ("reject_not_dicom/empty.dcm", b""),
                       ("reject_not_dicom/magic_only.dcm", bytes(128) + b"DICM" + bytes(range(256)) * 4), ("reject_not_dicom/short.dcm", bytes(128) + b"DIC")):
        os.makedirs(os.path.join(tree.out, "reject_not_dicom"), exist_ok=True)
        open(os.path.join(tree.out, name), "wb").write(data)
    tree.expect("reject_not_dicom", reason="")


def multiframe(tree):
    """Many slices in a file: enhanced CT and MR, and Siemens' mosaic."""
    def enhanced(name, modality, frames, shared_iop=None, **options):
        """frames: (stored pixels, stack, place in the stack, orientation, position, slope, intercept), written shuffled."""
        frames = [frames[i] for i in np.random.default_rng(3).permutation(len(frames))]

        def groups(ds):
            for key in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness", "RescaleSlope", "RescaleIntercept"):
                if key in ds:
                    del ds[key]
            shared = item(PixelMeasuresSequence=Sequence([item(PixelSpacing=["0.8", "0.7"], SliceThickness="5", SpacingBetweenSlices="3")]))
            if shared_iop:
                shared.PlaneOrientationSequence = Sequence([item(ImageOrientationPatient=[str(v) for v in shared_iop])])
            per_frame = []
            for _, stack, place, iop, position, slope, intercept in frames:
                one = item(FrameContentSequence=Sequence([item(StackID=str(stack), InStackPositionNumber=place + 1, DimensionIndexValues=[stack, place + 1])]),
                           PlanePositionSequence=Sequence([item(ImagePositionPatient=[f"{v:.9g}" for v in position])]),
                           PixelValueTransformationSequence=Sequence([item(RescaleSlope=f"{slope:g}", RescaleIntercept=f"{intercept:g}", RescaleType="US")]))
                if not shared_iop:
                    one.PlaneOrientationSequence = Sequence([item(ImageOrientationPatient=[str(v) for v in iop])])
                per_frame.append(one)
            ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(per_frame)
            ds.SOPClassUID = CT_CLASS + ".1" if modality == "CT" else MR_CLASS + ".1"
        tree.slice(name, np.stack([f[0] for f in frames]), modality=modality, frames=len(frames), edit=groups, **options)

    values = body(90)
    slopes, offsets = 1 + np.arange(8) % 2, -1024 - 5 * np.arange(8)
    stored = np.rint((values - offsets[:, None, None]) / slopes[:, None, None])
    truth = stored * slopes[:, None, None] + offsets[:, None, None]
    frames = [(stored[k], 1, k, AXIAL, (-30, -40, 50 + 3 * k), slopes[k], offsets[k]) for k in range(8)]
    enhanced("ct_enhanced", "CT", frames, AXIAL)
    tree.expect("ct_enhanced", truth)
    for name, syntax in (("ct_enhanced_rle", RLELossless), ("ct_enhanced_jpeg2000", JPEG2000Lossless)):
        enhanced(name, "CT", frames, AXIAL, syntax=syntax)
        tree.expect(name, truth, content="ct_enhanced")
    stacks = [body(91, False), body(92, False)]
    frames = [(stacks[s][k], s + 1, k, iop, np.array((-30.0, -40, 50)) + 3 * k * normal(iop), 1, 0)
              for s, iop in enumerate((AXIAL, SAGITTAL)) for k in range(8)]
    enhanced("mr_enhanced_two_stacks", "MR", frames, bits=12, signed=False)
    tree.expect("mr_enhanced_two_stacks", *stacks)
    times = [body(seed, False, (7, 24, 20)) for seed in (93, 94, 95)]
    for t, tiles in enumerate(times):
        sheet = np.concatenate([tiles, np.zeros((2, 24, 20))]).reshape(3, 3, 24, 20).transpose(0, 2, 1, 3).reshape(72, 60)

        def private(ds):
            block = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
            block.add_new(0x0A, "US", 7)
        tree.slice("mr_mosaic", sheet, modality="MR", bits=12, signed=False, spacing=(3, 2.5), edit=private,
                   keys=dict(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], AcquisitionNumber=t + 1, InstanceNumber=t + 1, SpacingBetweenSlices="4.5",
                             AcquisitionTime=f"1200{t:02}", Manufacturer="SIEMENS"))
    tree.expect("mr_mosaic", times[0], note="7 tiles of 24x20 in a sheet of 3x3, three times: the first of the 4-D series")


def write(out):
    """All cases; returns the Tree, whose truth holds the values of every volume that prep takes, slices along the normal."""
    tree = Tree(out)
    for part in (encodings, pixels, geometry, grouping, rejected, multiframe):
        part(tree)
    with open(os.path.join(out, "expected.json"), "w") as file:
        json.dump(tree.cases, file, indent=1)
    with open(os.path.join(out, "identifiers.txt"), "w") as file:
        file.write("".join(f"{word}\n" for word in sorted(w for word in tree.identifiers for w in {word, *word.split("^")} if len(w) >= 6)))
    return tree


if __name__ == "__main__":
    made = write(sys.argv[1])
    print(f"{len(made.cases)} cases, {made.files} files")

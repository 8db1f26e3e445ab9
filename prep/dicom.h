/*
DICOM files: what one says of itself and of its frames, and its stored values. dicom.cc does it, with GDCM's decoders.

  DICOM_BUILT      1 where this prep was built with GDCM, else 0
  DICOM_TEXT       bytes of a UID here
  DicomHeader      what a file says of itself as a whole
  DicomFrame       one frame: where it lies, what its values mean, what it is one of
  dicom_scan       both of them, without reading pixels
  dicom_decode     the stored values of all frames
*/
#ifndef CURIA_DICOM_H
#define CURIA_DICOM_H

#ifdef __cplusplus
enum { RAW_U8, RAW_I8, RAW_U16, RAW_I16, RAW_U32, RAW_I32, RAW_F32 = 8, RAW_F64 }; // volume.h is C alone
#else
#include "volume.h"
_Static_assert(RAW_U8 == 0 && RAW_I8 == 1 && RAW_U16 == 2 && RAW_I16 == 3 && RAW_U32 == 4 && RAW_I32 == 5 && RAW_F32 == 8 &&
               RAW_F64 == 9, "dicom.h repeats these for dicom.cc");
#endif
#include <stddef.h>
#include <stdio.h>

enum { DICOM_TEXT = 72 };

// Texts are cut to what fits and are "" where the file has none.
typedef struct {
    char patient[DICOM_TEXT * 2];  // PatientID, and "^" IssuerOfPatientID if there is one; without an ID PatientName^birth date
    char study[DICOM_TEXT], series[DICOM_TEXT], instance[DICOM_TEXT];  // UIDs
    char sop_class[DICOM_TEXT], syntax[DICOM_TEXT];                    // UIDs; the syntax is guessed where it is not given
    char modality[20], image_type[256], photometric[24], description[80]; // image_type: with backslashes; SeriesDescription
    int rows, cols, frames;        // as delivered: for a Siemens mosaic those of one tile, and how many tiles; 0 without pixels
    int samples, bits_allocated, bits_stored, high_bit, is_signed; // high_bit: bits_stored - 1 where absent or impossible
    int type;                      // RAW_* of the decoded stored values: the smallest that bits_allocated fit
    int mosaic, burned_in, lossy, enhanced, has_pixels; // enhanced: it has functional groups
    int has_padding, decoded;      // decoded: dicom_scan has done dicom_decode's work
    double padding;                // PixelPaddingValue, a stored value
    const char *syntax_name;       // for the report: "explicit LE", "JPEG 2000", "RLE" ...
} DicomHeader;

typedef struct {
    int has_position, has_orientation, has_spacing; // has_position: never of several frames without functional groups
    double position[3];            // mm, LPS: centre of the first pixel
    double row[3], column[3];      // unit vectors, LPS: along a row (increasing column index), along a column
    double spacing_row, spacing_col; // mm between rows, between columns: PixelSpacing, else Imager- or NominalScannedPixelSpacing
    double thickness;              // mm: SliceThickness, or 0. It is not the distance between slices
    double slope, intercept;       // value = slope * stored + intercept; 1, 0 where absent. Philips: RescaleSlope as it is
    double echo_time, b_value;     // ms, s/mm2; -1 where absent, as in the next line
    int echo, temporal, acquisition, instance, stack; // instance: InstanceNumber; in multi-frame InStackPosition or frame number
    double time;                   // s: TriggerTime, else AcquisitionTime, else ContentTime, else -1. Orders frames at one place
    char frame_type[64];           // enhanced: FrameType
} DicomFrame;

#ifdef CURIA_DICOM
enum { DICOM_BUILT = 1 };
#ifdef __cplusplus
extern "C" {
#endif
// Header of the file at path, and *frames: malloc'ed [header->frames], to be freed; NULL without pixels. Where out is not NULL
// and the file has one frame, of `bytes` bytes, also what dicom_decode does. 0 good; else -1 and *reason (size bytes): one
// phrase, without path and without anything of the patient.
int dicom_scan(const char *path, DicomHeader *header, DicomFrame **frames, void *out, size_t bytes, char *reason, size_t size);

// All stored values to out [frames][rows][cols] of header->type, header being dicom_scan's: the BitsStored bits up to HighBit,
// sign-extended, without rescale and without inverting MONOCHROME1. 0 good, else -1 and *reason. A decoder may abort on a
// damaged stream: call it where that costs one file.
int dicom_decode(const char *path, const DicomHeader *header, void *out, char *reason, size_t size);
#ifdef __cplusplus
}
#endif
#else
enum { DICOM_BUILT = 0 };
static inline int dicom_absent(char *reason, size_t size) {
    snprintf(reason, size, "this prep was built without GDCM; install libgdcm-dev and run make again");
    return -1;
}
static inline int dicom_scan(const char *path, DicomHeader *header, DicomFrame **frames, void *out, size_t bytes, char *reason,
                             size_t size) {
    (void)path, (void)header, (void)frames, (void)out, (void)bytes;
    return dicom_absent(reason, size);
}
static inline int dicom_decode(const char *path, const DicomHeader *header, void *out, char *reason, size_t size) {
    (void)path, (void)header, (void)out;
    return dicom_absent(reason, size);
}
#endif

#endif

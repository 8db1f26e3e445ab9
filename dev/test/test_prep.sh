#!/bin/bash
# Tests of ./prep/prep on real and broken files. Prints a line for each failure, then `N passed, N failed, N skipped`;
# exit status 1 if any failed.
#
#   dev/test/test_prep.sh SHARED_DIR      run from the top of the repository, after make; SHARED_DIR/data is only read
#
# PREP names another binary, PYTHON a python3 with nibabel and numpy (the comparison with them is skipped without).
set -u
shared=${1:?usage: dev/test/test_prep.sh SHARED_DIR}
prep=$(realpath "${PREP:-./prep/prep}")
python=${PYTHON:-python3}
data=$shared/data
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "failed: $*"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $*"; }
errors() { grep -c '^error: ' "$work/err"; }

# expect STATUS TEXT NAME COMMAND...: the command ends with STATUS, and TEXT (an extended expression) is in its stderr, on a
# single error line where STATUS is not 0.
expect() {
    local status=$1 text=$2 name=$3 got
    shift 3
    "$@" >"$work/out" 2>"$work/err"
    got=$?
    if [ "$got" != "$status" ]; then bad "$name: exit status $got, expected $status: $(tail -1 "$work/err")"
    elif [ -n "$text" ] && ! grep -Eq "$text" "$work/err"; then bad "$name: no '$text' in: $(tail -3 "$work/err")"
    elif [ "$status" != 0 ] && [ "$(errors)" != 1 ]; then bad "$name: $(errors) error lines"
    else good; fi
}

# patch FILE OFFSET BYTES...: overwrites bytes, given in hexadecimal
patch() {
    local file=$1 at=$2 bytes=
    shift 2
    for byte in "$@"; do bytes+="\\x$byte"; done
    printf "$bytes" | dd of="$file" bs=1 seek="$at" conv=notrunc status=none
}

pixels() { # the bytes of a shard's slices, without header and index
    local end
    end=$(od -An -tu8 -j24 -N8 "$1" | tr -d ' ')
    head -c "$end" "$1" | tail -c +129
}

# --- the command line
expect 0 '' 'help' "$prep" --help
grep -q -- --patient-from "$work/out" && good || bad 'help does not name --patient-from'
expect 2 'no INPUT' 'no arguments' "$prep"
expect 2 'no such option' 'unknown option' "$prep" --nonsense -o "$work/x" "$data"
expect 2 'no -o DIR' 'no folder' "$prep" "$data"
expect 2 'give one of' 'bad word' "$prep" -o "$work/x" --planes oblique "$data"
expect 2 'whole number' 'bad number' "$prep" -o "$work/x" --shard-size -3 "$data"
expect 3 'cannot be opened' 'absent input' "$prep" -o "$work/absent" "$data/nothing.nii"

# --- every file there is
expect 0 'taken     .*example_ct.nii.gz: CT 122x101x112, 3x3x3 mm, RAS, -1207 to 3382' 'all of shared/data' "$prep" -o "$work/all" --shard-size 64 "$data"
cp "$work/err" "$work/all.err"
expect 0 '' 'verify' "$prep" --verify "$work/all"
[ "$(grep -c good "$work/out")" -ge 3 ] && good || bad "--shard-size 64 gave $(grep -c good "$work/out") shards"
expect 0 '' 'info' "$prep" --info "$work/all"
for name in mr_seq/open_ms/patient12/study1_T2W mr_seg/mni/mni_icbm152_t1_tal_nlin_sym_09a_converted mr_seg/mni/mni_icbm152_gm_tal_nlin_sym_09a_converted \
            mr_seg/sct/t2_t2 mr_seg/sct/mt_t1w orient/SLP ct_seg/brain_atlas/ct_brain_atlas_1mm dicom/d2n_bitexact/generic_compressed/001_ground_truth; do
    grep -q "^taken     $data/$name.nii.gz" "$work/all.err" && good || bad "$name is not taken"
done
for name in ct_seg/ts_aorta/T710_renal ct_seg/ts_aorta/annulus_proper ct_seg/ts_dicom/example_seg_dicom ct_seg/ts_example/example_seg ct_seg/ts_example/vertebrae_seg_totalseg \
            mr_seg/sct/t2_labels mr_seg/sct/t1_t1w_seg-manual mr_lesion/open_ms_mni/patient07/GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI; do
    grep -q "^left out  $data/$name.nii.gz: label image" "$work/all.err" && good || bad "$name is taken for an image"
done
grep -q 'left out .*brain1_image.nrrd: NRRD, which this prep cannot read yet' "$work/all.err" && good || bad 'NRRD is not named'
grep -q 'left out .*MR_truncated.dcm: DICOM, which' "$work/all.err" && good || bad 'DICOM is not named'
grep -Erq 'patient12|open_ms|study1|example_ct' "$work/all" && bad 'a name from a path is in the output' || good
[ "$(head -1 "$work/all/report.tsv" | tr '\t' '\n' | wc -l)" = 16 ] && awk -F'\t' 'NF != 16 { exit 1 }' "$work/all/report.tsv" && good || bad 'report.tsv is not a table of 16 columns'

# --- orientation: the same head in several axis orders gives the same slices
first=
for file in "$data"/orient/*.nii.gz; do
    code=$(basename "$file" .nii.gz)
    "$prep" -o "$work/orient_$code" --planes all "$file" 2>/dev/null
    "$prep" --info "$work/orient_$code" | tail -n +2 | cut -f3- >"$work/orient_$code.info"
    pixels "$work/orient_$code/shard-00000.shard" >"$work/orient_$code.pixels"
    if [ -z "$first" ]; then first=$code; [ -s "$work/orient_$code.pixels" ] && good || bad "$code gives no pixels"; continue; fi
    cmp -s "$work/orient_$first.pixels" "$work/orient_$code.pixels" && good || bad "$code and $first differ in pixels"
    cmp -s "$work/orient_$first.info" "$work/orient_$code.info" && good || bad "$code and $first differ in geometry"
done

# --- files that are no scans
expect 3 'complex_image.*complex numbers' 'complex' "$prep" -o "$work/b1" "$data/bad/complex_image.nii.gz"
expect 3 'ct_perfusion.*colour' 'colour' "$prep" -o "$work/b2" "$data/bad/ct_perfusion.nii.gz"
expect 3 'pval.LH.*fewer than 16 rows' 'surface' "$prep" -o "$work/b3" "$data/bad/pval.LH.nii.gz"
expect 3 'label image' 'a named label image' "$prep" -o "$work/b4" "$data/ct_seg/ts_example/example_seg.nii.gz"
expect 0 'taken' '--keep-labels' "$prep" -o "$work/b5" --keep-labels "$data/ct_seg/ts_example/example_seg.nii.gz"
expect 3 'DICOM, which' 'a named DICOM' "$prep" -o "$work/b6" "$data/bad/MR_truncated.dcm" "$data/orient/RAS.nii.gz"
[ -s "$work/b6/shard-00000.shard" ] && good || bad 'a bad file beside a good one loses the good one'

# --- headers that lie
ct=$work/ct.nii
gunzip -c "$data/ct_seg/ts_example/example_ct_sm.nii.gz" >"$ct"
size=$(stat -c %s "$ct")
number=0
broken() { # broken TEXT NAME OFFSET BYTES...
    local text=$1 name=$2
    shift 2
    number=$((number + 1))
    cp "$ct" "$work/broken.nii"
    patch "$work/broken.nii" "$@"
    expect 3 "$text" "$name" "$prep" -o "$work/h$number" "$work/broken.nii"
    gzip -cf "$work/broken.nii" >"$work/broken.nii.gz"
    expect 3 "$text" "$name, gzip" "$prep" -o "$work/hz$number" "$work/broken.nii.gz"
}
broken 'dim\[1\] is -1' 'dim -1' 42 ff ff
broken 'dim\[3\] is 0' 'dim 0' 46 00 00
broken 'asks for .* bytes' 'dims of 30000' 42 30 75 30 75 30 75
broken 'dim\[0\] is 0' 'dim[0] 0' 40 00 00
broken 'dim\[0\] is 257' 'dim[0] 257' 40 01 01
broken 'dim\[5\] is 0|5-D' '5-D' 40 05 00 7a 00 65 00 0f 00 01 00 02 00
broken 'vox_offset is -1' 'vox_offset -1' 108 00 00 80 bf
broken 'vox_offset is 100' 'vox_offset 100' 108 00 00 c8 42
broken 'vox_offset is nan|vox_offset is -nan' 'vox_offset NaN' 108 00 00 c0 7f
broken 'vox_offset is 1e\+30|asks for' 'vox_offset 1e30' 108 ca f2 49 71
broken 'bits a voxel' 'bitpix 8' 72 08 00
broken 'datatype 3' 'datatype 3' 70 03 00
broken 'pair' 'magic ni1' 344 6e 69 31 00
broken 'pair' 'no magic' 344 00 00 00 00
broken 'spacing of' 'sform of 1e9 mm' 280 28 6b 6e 4e
head -c $((size - 1000)) "$ct" >"$work/short.nii"
expect 3 'asks for' 'cut short' "$prep" -o "$work/s1" "$work/short.nii"
head -c 200 "$ct" >"$work/tiny.nii"
expect 3 'cut short' 'a header cut short' "$prep" -o "$work/s2" "$work/tiny.nii"
: >"$work/empty.nii"
expect 3 'cut short' 'an empty file' "$prep" -o "$work/s3" "$work/empty.nii"
gzip -c "$ct" >"$work/ct.nii.gz"
zsize=$(stat -c %s "$work/ct.nii.gz")
for cut in 4 8 1000 $((zsize / 2)); do
    head -c $((zsize - cut)) "$work/ct.nii.gz" >"$work/short.nii.gz"
    expect 3 'cut short' "gzip without its last $cut bytes" "$prep" -o "$work/z$cut" "$work/short.nii.gz"
done
cp "$work/ct.nii.gz" "$work/crc.nii.gz"
patch "$work/crc.nii.gz" $((zsize - 8)) 00 11 22 33
expect 3 'damaged' 'gzip with another CRC' "$prep" -o "$work/crc" "$work/crc.nii.gz"
{ head -c 100000 "$ct" | gzip -c; tail -c +100001 "$ct" | gzip -c; } >"$work/members.nii.gz"
expect 0 'taken' 'gzip of two members' "$prep" -o "$work/members" "$work/members.nii.gz"
"$prep" -o "$work/plain" "$ct" 2>/dev/null
cmp -s <(pixels "$work/members/shard-00000.shard") <(pixels "$work/plain/shard-00000.shard") && good || bad 'two gzip members and the plain file differ'

# --- headers that are odd, and taken with a note
cp "$ct" "$work/odd.nii"
patch "$work/odd.nii" 254 00 00
expect 0 'no orientation in the header: taken as RAS' 'no sform' "$prep" -o "$work/o1" "$work/odd.nii"
cp "$ct" "$work/odd.nii"
patch "$work/odd.nii" 252 01 00
patch "$work/odd.nii" 76 00 00 80 bf
expect 0 'sform and qform differ' 'sform against qform' "$prep" -o "$work/o2" "$work/odd.nii"
cp "$ct" "$work/odd.nii"
patch "$work/odd.nii" 112 00 00 c0 7f 00 00 80 44
expect 0 'CT .*-1100 to 1207' 'scl_slope NaN' "$prep" -o "$work/o3" "$work/odd.nii"
cp "$ct" "$work/odd.nii"
patch "$work/odd.nii" 112 00 00 80 3f 00 00 80 44
expect 0 'MR .*-76 to 2231' 'an intercept' "$prep" -o "$work/o4" "$work/odd.nii"
expect 0 'no value at or below -500' 'a CT without its offset' "$prep" -o "$work/o5" --modality ct "$work/odd.nii"
expect 0 'volume 1 of 10' '4-D first' "$prep" -o "$work/o6" "$data/fmt4d/pcasl.nii.gz"
expect 0 'volume 6 of 10' '4-D mid' "$prep" -o "$work/o7" --4d mid "$data/fmt4d/pcasl.nii.gz"
expect 0 'and 10 MR volumes of 1 patients: 200 slices' '4-D all' "$prep" -o "$work/o8" --4d all "$data/fmt4d/pcasl.nii.gz"
head -c 352 "$ct" >"$work/constant.nii"
head -c $((size - 352)) /dev/zero >>"$work/constant.nii"
expect 3 'constant' 'a constant volume' "$prep" -o "$work/o9" "$work/constant.nii"

# --- the same input gives the same bytes
mkdir -p "$work/i1/sub-1" "$work/i1/sub-2" "$work/i2/sub-2" "$work/i2/sub-1"
for n in 1 2; do cp "$data/orient/RAS.nii.gz" "$work/i1/sub-$n/a.nii.gz"; cp "$ct" "$work/i1/sub-$n/b.nii"; done
for n in 2 1; do cp "$ct" "$work/i2/sub-$n/b.nii"; cp "$data/orient/RAS.nii.gz" "$work/i2/sub-$n/a.nii.gz"; done
"$prep" -o "$work/d1" "$work/i1" 2>"$work/err"
"$prep" -o "$work/d2" "$work/i2/" 2>/dev/null
cmp -s "$work/d1/shard-00000.shard" "$work/d2/shard-00000.shard" && cmp -s "$work/d1/report.tsv" "$work/d2/report.tsv" && good || bad 'the order of a folder changes the output'
grep -q 'of 2 patients' "$work/err" && good || bad "two sub- folders are not two patients: $(tail -1 "$work/err")"
(cd "$work" && "$prep" -o d3 i1/sub-1/a.nii.gz i1/sub-2/b.nii 2>/dev/null; "$prep" -o d4 i1/sub-2/b.nii i1/sub-1/a.nii.gz 2>/dev/null)
cmp -s "$work/d3/shard-00000.shard" "$work/d4/shard-00000.shard" && good || bad 'the order of the arguments changes the output'
expect 2 'holds shards already' 'a folder in use' "$prep" -o "$work/d1" "$work/i1"
head -c 32 /dev/urandom >"$work/salt"
"$prep" -o "$work/d5" --salt-file "$work/salt" "$work/i1" 2>/dev/null
cmp -s <(pixels "$work/d1/shard-00000.shard") <(pixels "$work/d5/shard-00000.shard") && good || bad 'a salt changes the pixels'
[ "$("$prep" --info "$work/d1" | cut -f1,2 | grep -Ff <("$prep" --info "$work/d5" | grep -v '#' | cut -f2 | grep -v patient) | wc -l)" = 0 ] && good || bad 'a salt does not change the ids'
expect 2 '16 to 4096 bytes' 'a short salt' "$prep" -o "$work/d6" --salt-file <(printf abc) "$work/i1"
expect 0 'of 1 patients' '--patient-from regex' "$prep" -o "$work/d7" --patient-from 'regex:(sub)-' "$work/i1"
expect 0 'of 4 patients' '--patient-from file' "$prep" -o "$work/d8" --patient-from file "$work/i1"

# --- labels
printf 'file,slice,label,target\nsub-1/a.nii.gz,,"head, left",0.5\nb.nii,,thorax,\nsub-2/b.nii,4,abdomen,2\nghost.nii,,neck,1\n' >"$work/labels.csv"
expect 0 '1 of 4 rows of .* match no stored slice' 'labels' "$prep" -o "$work/l1" --labels "$work/labels.csv" "$work/i1"
"$prep" --info "$work/l1" >"$work/out"
grep -q '^# class 1: head, left' "$work/out" && good || bad 'class names are not in the shard'
[ "$(grep -v '#' "$work/out" | tail -n +2 | cut -f15 | tr '\n' ' ')" = '1 3 -1 3 ' ] && good || bad "labels are $(grep -v '#' "$work/out" | tail -n +2 | cut -f15 | tr '\n' ' ')"
printf 'FILE\tlabel\npatient\t7\na.nii.gz\t3\n' >"$work/labels.tsv"
"$prep" -o "$work/l2" --labels "$work/labels.tsv" "$work/i1" 2>/dev/null
[ "$("$prep" --info "$work/l2" | grep -v '#' | tail -n +2 | cut -f15 | tr '\n' ' ')" = '3 -1 3 -1 ' ] && good || bad 'integer labels from TSV'
printf 'file,label\nx.nii,1\nx.nii,2\n' >"$work/labels.csv"
expect 3 'two rows for x.nii' 'labels that contradict' "$prep" -o "$work/l3" --labels "$work/labels.csv" "$work/i1"
printf 'name,label\nx.nii,1\n' >"$work/labels.csv"
expect 3 'header needs file' 'labels without file' "$prep" -o "$work/l4" --labels "$work/labels.csv" "$work/i1"

# --- a full disk
(ulimit -f 200; expect 1 'File too large' 'a limit on file size' "$prep" -o "$work/f1" "$ct"; echo "$passed $failed" >"$work/counts")
read -r passed failed <"$work/counts"
[ -z "$(ls -A "$work/f1")" ] && good || bad "a full disk leaves $(ls "$work/f1")"
mkdir "$work/disk"
if mount -t tmpfs -o size=256k tmpfs "$work/disk" 2>/dev/null; then
    expect 1 'No space left' 'a full disk' "$prep" -o "$work/disk/f2" "$ct"
    [ -z "$(ls -A "$work/disk/f2")" ] && good || bad "a full disk leaves $(ls "$work/disk/f2")"
    umount "$work/disk"
else skip 'a full disk: no right to mount a tmpfs'; fi

# --- the phantom, and shards that are damaged
expect 0 '2 phantom patients' 'phantom' "$prep" --phantom -o "$work/p" --patients 2 --seed 9
"$prep" --info "$work/p/eval" >"$work/out"
grep -q '^# class 5: limb' "$work/out" && good || bad 'the phantom names no limb'
[ "$(grep -v '#' "$work/out" | tail -n +2 | cut -f3 | sort -u | tr '\n' ' ')" = 'CT MR ' ] && good || bad 'the phantom has no CT and MR'
patch "$work/p/train/phantom.shard" 5000 5a a5 5a
expect 3 'phantom.shard is damaged: the checksum of slice 0 differs' 'verify of a flipped byte' "$prep" --verify "$work/p/train"
head -c 100000 "$work/p/eval/phantom.shard" >"$work/cut.shard"
expect 3 'cut.shard is cut short' 'info of a shard cut short' "$prep" --info "$work/cut.shard"

# --- without niftilib
if ${CC:-gcc} -std=gnu11 -O1 -I. prep/prep.c -o "$work/plain_prep" -lpthread -lm 2>/dev/null; then
    expect 1 'built without niftilib; install it' 'NIfTI without niftilib' "$work/plain_prep" -o "$work/n1" "$work/ct.nii.gz"
    expect 0 '' 'verify without niftilib' "$work/plain_prep" --verify "$work/p/eval"
else skip 'a build without niftilib: no compiler'; fi

# --- against nibabel
if "$python" -c 'import nibabel, numpy' 2>/dev/null; then
    if "$python" dev/oracle/prep_oracle.py "$prep" "$data"/ct_seg/ts_example/example_ct.nii.gz "$data"/ct_seg/ts_aorta/ct_cropped.nii.gz "$data"/orient/*.nii.gz \
        "$data"/mr_seg/sct/{mt_t1w,t1_t1w,t2_t2}.nii.gz "$data"/mr_seg/mni/*_t1_*.nii.gz "$data"/mr_seq/open_ms/patient01/*FLAIR.nii.gz "$data"/fmt4d/*.nii.gz \
        "$data"/mr_lesion/open_ms_mni/patient07/FLAIR*.nii.gz "$data"/ct_seg/brain_atlas/*.nii.gz >"$work/out" 2>&1; then good; else bad 'nibabel reads other values'; fi
    sed 's/^/  nibabel: /' "$work/out"
else skip 'the comparison with nibabel: no python3 with nibabel and numpy'; fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]

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
    elif [ -n "$text" ] && ! grep -Eqe "$text" "$work/err"; then bad "$name: no '$text' in: $(tail -3 "$work/err")"
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
expect 0 'taken     .*example_ct.nii.gz: CT 122x101x112, 3x3x3 mm, RAS, -1207 to 3382' 'all of shared/data' "$prep" -o "$work/all" --shard-size 64 --private-map "$data"
cp "$work/err" "$work/all.err"
expect 0 '' 'verify' "$prep" --verify "$work/all"
[ "$(grep -c good "$work/out")" -ge 3 ] && good || bad "--shard-size 64 gave $(grep -c good "$work/out") shards"
expect 0 '' 'info' "$prep" --info "$work/all"
for name in mr_seq/open_ms/patient12/study1_T2W.nii.gz mr_seg/mni/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz mr_seg/pyradiomics/brain1_image.nrrd \
            mr_seg/mni/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz mr_seg/pyradiomics/breast1_image.nrrd mr_seg/sct/t2_t2.nii.gz mr_seg/sct/mt_t1w.nii.gz \
            ct_seg/brain_atlas/ct_brain_atlas_1mm.nii.gz; do
    grep -q "^taken     $data/$name" "$work/all.err" && good || bad "$name is not taken"
done
for name in ct_seg/ts_aorta/T710_renal ct_seg/ts_aorta/annulus_proper ct_seg/ts_dicom/example_seg_dicom ct_seg/ts_example/example_seg ct_seg/ts_example/vertebrae_seg_totalseg \
            mr_seg/sct/t2_labels mr_seg/sct/t1_t1w_seg-manual mr_lesion/open_ms_mni/patient07/GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI; do
    grep -q "^left out  $data/$name.nii.gz: label: a label image" "$work/all.err" && good || bad "$name is taken for an image"
done
[ "$(grep -c "^left out  $data/orient/.*: duplicate" "$work/all.err")" = 5 ] && good || bad 'six orientations of one head are not one volume and five copies'
grep -q "^taken     $data/dicom/ge_head_ct_tilt/.* and 27 more: series of CT 512x512x28, .*LPS.*tilted gantry: 18.5 degrees" "$work/all.err" && good || bad 'the tilted head CT'
grep -q "ge_head_ct_tilt.*uneven gaps of 1.081 to 6.999 mm" "$work/all.err" && good || bad 'the uneven gaps of the head CT'
grep -q "^taken     $data/ct_seg/ts_dicom/dicom/.* and 19 more: series of CT 512x512x20, 0.977x0.977x2 mm, LPS" "$work/all.err" && good || bad 'the JPEG 2000 series'
[ "$(wc -l <"$work/all/report.tsv")" -gt 60 ] && awk -F'\t' 'NF != 25 { exit 1 }' "$work/all/report.tsv" && good || bad 'report.tsv is not a table of 25 columns'
[ "$(stat -c %a "$work/all/private_map.tsv")" = 600 ] && grep -q 'patient12/study1_T2W.nii.gz' "$work/all/private_map.tsv" && good || bad 'private_map.tsv'
grep -q '"slices": [1-9]' "$work/all/summary.json" && good || bad 'summary.json'
[ -e "$work/all/resume.tsv" ] && bad 'resume.tsv is left' || good
rm "$work/all/private_map.tsv"

# --- privacy: no name, number, date, UID or path of the inputs is in any byte of the output
find "$data" -type f | sed 's,.*/,,' | grep -vE '^.{0,5}$' >"$work/secrets"
find "$data" -mindepth 2 -type d | sed 's,.*/,,' | grep -E '.{6}' >>"$work/secrets"
for file in "$data"/dicom/*/*.dcm "$data"/bad/*.dcm "$data"/dicom/*/*/*/*.dcm "$data"/ct_seg/ts_dicom/dicom/*; do
    head -c 6000 "$file" | grep -aoE '[0-9]+(\.[0-9]+){6,}|[A-Za-z]{3,}\^[A-Za-z0-9^ ]+|(19|20)[0-9]{6}\b|[0-9]{6}\.[0-9]{4,6}' | grep -av '^1\.2\.840\.10008\.'
done | sort -u >>"$work/secrets"
[ "$(wc -l <"$work/secrets")" -gt 200 ] && good || bad "only $(wc -l <"$work/secrets") strings to look for"
printf '%s\n' "$(head -1 "$work/secrets")" >"$work/leak" # the search itself can fail
grep -raqFf "$work/secrets" "$work/leak" && good || bad 'the search for identifying strings finds none where there is one'
found=$(grep -raoFf "$work/secrets" "$work/all" | head -3)
[ -z "$found" ] && good || bad "identifying strings are in the output: $found"

# --- orientation: the same head in several axis orders gives the same slices
first=
for file in "$data"/orient/*.nii.gz; do
    code=$(basename "$file" .nii.gz)
    "$prep" -o "$work/orient_$code" --planes all "$file" 2>/dev/null
    "$prep" --info "$work/orient_$code" | tail -n +2 | cut -f3- >"$work/orient_$code.info"
    pixels "$work/orient_$code/shard-000000.shard" >"$work/orient_$code.pixels"
    if [ -z "$first" ]; then first=$code; [ -s "$work/orient_$code.pixels" ] && good || bad "$code gives no pixels"; continue; fi
    cmp -s "$work/orient_$first.pixels" "$work/orient_$code.pixels" && good || bad "$code and $first differ in pixels"
    cmp -s "$work/orient_$first.info" "$work/orient_$code.info" && good || bad "$code and $first differ in geometry"
done

# --- files that are no scans, each with its reason
reject() { # reject FILE CODE [MORE]: named alone it ends with 3 and that reason, no crash, and nothing in the folder
    number=$((number + 1))
    expect 3 "left out  .*$1.*: $2: ${3:-}" "$1" "$prep" -o "$work/bad$number" "$data/$1"
    [ -z "$(ls "$work/bad$number" | grep -vE '^(report.tsv|summary.json)$')" ] && good || bad "$1 leaves $(ls "$work/bad$number")"
}
number=0
reject bad/complex_image.nii.gz not-scalar 'datatype 32: complex numbers'
reject bad/ct_perfusion.nii.gz not-scalar 'datatype 128: colour'
reject bad/pval.LH.nii.gz too-small
reject ct_seg/ts_example/example_seg.nii.gz label
reject bad/CT_small.dcm few-slices
reject bad/MR_small_bigendian.dcm few-slices
reject bad/no_meta.dcm damaged
reject bad/MR_truncated.dcm damaged '(truncated|cut short): 8130 of 8192 bytes'
reject bad/JPEG-lossy.dcm secondary-capture
reject bad/badVR.dcm '(not-image|damaged)'
reject bad/image_dfl.dcm secondary-capture
reject bad/liver_1frame.dcm '(not-image|damaged)'
reject bad/nested_priv_SQ.dcm '(not-image|damaged)'
reject bad/reportsi.dcm not-image
reject bad/rtdose_1frame.dcm not-image
reject fmt4d/slicethickness_empty_string.dcm projection
reject dicom/d2n_bitexact/failing_notavolume/001 few-slices
reject dicom/d2n_bitexact/failing_gantrytilting/001 no-body
reject dicom/enhanced_mf/emri_small.dcm no-geometry
expect 3 'too_short.dcm.*: damaged: ' 'a JPEG 2000 stream cut short' "$prep" -o "$work/b2" --keep no-geometry "$data/dicom/enhanced_mf/emri_small_jpeg_2k_lossless_too_short.dcm"
expect 3 'no usable volume' 'all of bad/' "$prep" -o "$work/b3" "$data/bad"
[ -z "$(ls "$work/b3"/*.shard* 2>/dev/null)" ] && good || bad 'bad/ leaves a shard'
expect 0 'taken' '--keep label' "$prep" -o "$work/b5" --keep label "$data/ct_seg/ts_example/example_seg.nii.gz"
expect 0 'taken     .*CT_small.dcm: series of CT 128x128x1' '--keep few-slices' "$prep" -o "$work/b4" --keep few-slices "$data/bad/CT_small.dcm"
expect 0 'taken     .*image_dfl.dcm' '--keep all' "$prep" -o "$work/b7" --keep all "$data/bad/image_dfl.dcm"
expect 2 '--keep nonsense: give all, or some of' '--keep nonsense' "$prep" -o "$work/b8" --keep nonsense "$data"
expect 3 'few-slices' 'a named DICOM beside a good file' "$prep" -o "$work/b6" "$data/bad/CT_small.dcm" "$data/orient/RAS.nii.gz"
[ -s "$work/b6/shard-000000.shard" ] && good || bad 'a bad file beside a good one loses the good one'

# --- DICOM: the same slice in every lossless syntax, the same frames in every enhanced file, ground truths
first=
for file in "$data"/dicom/ct_all_transfer_syntaxes/CTImage*; do
    case $file in *Process1T* | *Process2_4* | *Process6_8* | *Process10* | *Lossy*) continue ;; esac
    name=$(basename "$file")
    "$prep" -o "$work/syntax_$name" --keep few-slices "$file" 2>/dev/null
    pixels "$work/syntax_$name/shard-000000.shard" >"$work/syntax_$name.pixels"
    first=${first:-$work/syntax_$name.pixels}
    [ "$(stat -c %s "$work/syntax_$name.pixels")" = 524288 ] && cmp -s "$first" "$work/syntax_$name.pixels" && good || bad "$name has other pixels"
done
first=
for name in emri_small emri_small_RLE emri_small_big_endian emri_small_jpeg_2k_lossless; do
    expect 0 'MR 64x64x10' "$name" "$prep" -o "$work/$name" --keep no-geometry "$data/dicom/enhanced_mf/$name.dcm"
    pixels "$work/$name/shard-000000.shard" >"$work/$name.pixels"
    first=${first:-$work/$name.pixels}
    [ -s "$first" ] && cmp -s "$first" "$work/$name.pixels" && good || bad "$name has other pixels"
done
for name in generic_compressed generic_compressed_j2k generic_compressed_jpegls; do
    "$prep" -o "$work/$name" "$data/dicom/d2n_bitexact/$name/001" 2>/dev/null
    "$prep" -o "$work/${name}_truth" "$data/dicom/d2n_bitexact/$name/001_ground_truth.nii.gz" 2>/dev/null
    [ -s "$work/$name/shard-000000.shard" ] && cmp -s <(pixels "$work/$name/shard-000000.shard") <(pixels "$work/${name}_truth/shard-000000.shard") && good || bad "$name differs from its ground truth"
done

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
cmp -s <(pixels "$work/members/shard-000000.shard") <(pixels "$work/plain/shard-000000.shard") && good || bad 'two gzip members and the plain file differ'

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

# --- the same input gives the same bytes, whatever the order of a folder, of the arguments, and the number of workers
mkdir -p "$work/i1/sub-1" "$work/i1/sub-2" "$work/i2/sub-2" "$work/i2/sub-1"
for n in 1 2; do cp "$data/orient/RAS.nii.gz" "$work/i1/sub-$n/a.nii.gz"; cp "$ct" "$work/i1/sub-$n/b.nii"; done
for n in 2 1; do cp "$ct" "$work/i2/sub-$n/b.nii"; cp "$data/orient/RAS.nii.gz" "$work/i2/sub-$n/a.nii.gz"; done
"$prep" -o "$work/d1" --keep duplicate --jobs 1 "$work/i1" 2>"$work/err"
"$prep" -o "$work/d2" --keep duplicate --jobs 5 "$work/i2/" 2>/dev/null
diff -rq "$work/d1" "$work/d2" >/dev/null && good || bad 'the order of a folder or the number of workers changes the output'
grep -q 'of 2 patients' "$work/err" && good || bad "two sub- folders are not two patients: $(tail -1 "$work/err")"
(cd "$work" && "$prep" -o d3 i1/sub-1/a.nii.gz i1/sub-2/b.nii 2>/dev/null; "$prep" -o d4 i1/sub-2/b.nii i1/sub-1/a.nii.gz 2>/dev/null)
diff -rq "$work/d3" "$work/d4" >/dev/null && good || bad 'the order of the arguments changes the output'
expect 0 'is complete' 'a folder that is complete' "$prep" -o "$work/d1" --keep duplicate "$work/i1"
expect 2 'holds shards already' 'a folder of other inputs' "$prep" -o "$work/d1" "$work/i1/sub-1"
expect 2 'holds shards already' 'a folder of other options' "$prep" -o "$work/d1" --planes all "$work/i1"
expect 0 '2 volumes taken, 2 left out .2 duplicate' 'copies are dropped' "$prep" -o "$work/d9" "$work/i1"
head -c 32 /dev/urandom >"$work/salt"
"$prep" -o "$work/d5" --keep duplicate --salt-file "$work/salt" "$work/i1" 2>/dev/null
[ "$("$prep" --info "$work/d1" | cut -f1,2 | grep -Ff <("$prep" --info "$work/d5" | grep -v '#' | cut -f2 | grep -v patient) | wc -l)" = 0 ] && good || bad 'a salt does not change the ids'
expect 2 '16 to 4096 bytes' 'a short salt' "$prep" -o "$work/d6" --salt-file <(printf abc) "$work/i1"
expect 0 'of 1 patients' '--patient-from regex' "$prep" -o "$work/d7" --keep duplicate --patient-from 'regex:(sub)-' "$work/i1"
expect 0 'of 4 patients' '--patient-from file' "$prep" -o "$work/d8" --keep duplicate --patient-from file "$work/i1"
printf '%s\n' "$work/i1/sub-2" "./nothing.nii" "$work/i1/sub-1/b.nii" >"$work/list"
expect 0 'warning: ./nothing.nii: No such file' '--list' "$prep" -o "$work/d10" --keep duplicate --list "$work/list"
grep -q '3 volumes taken' "$work/err" && good || bad '--list of a folder and a file'
mkdir -p "$work/loop/a"
ln -s .. "$work/loop/a/up"
ln -s . "$work/loop/here"
ln -s "$work/i1/sub-1" "$work/loop/a/sub-1"
expect 0 '3 files' 'links that go round' "$prep" -o "$work/d11" --keep duplicate "$work/loop" "$data/orient/RAS.nii.gz"
expect 0 '' '--dry-run' "$prep" --dry-run "$work/i1"
[ "$(tail -n +2 "$work/out" | cut -f4,25 | grep -c "taken.*$work/i1")" = 2 ] && [ "$(wc -l <"$work/out")" = 5 ] && good || bad "--dry-run prints $(wc -l <"$work/out") lines"

# --- killed at any moment and called again, it ends with the same bytes, and finished shards are not written again
dev/test/kill_prep.sh "$prep" "$data" 1 "$work" >"$work/out" 2>&1 && good || bad "killed and called again: $(head -2 "$work/out")"
[ -s "$work/whole/train/shard-000000.shard" ] && [ -s "$work/whole/val/shard-000000.shard" ] && good || bad '--split gives no two parts'
[ -z "$(comm -12 <("$prep" --info "$work/whole/train" | grep -v '#' | cut -f2 | sort -u) <("$prep" --info "$work/whole/val" | grep -v '#' | cut -f2 | sort -u) | grep -v patient)" ] && good || bad 'a patient is in both parts'

# --- shares of many nodes, merged, are the whole
taken() { cut -f5,20,24 "$1/report.tsv" | grep taken | sort; }
slices() { "$prep" --info "$1" | grep -v -e '#' -e '^volume' | sort; }
for share in 0 1 2; do "$prep" -o "$work/share$share" --shard-of $share/3 --shard-size 8 "$data/mr_seq" "$data/dicom" "$data/orient" 2>/dev/null; done
"$prep" -o "$work/shares" --shard-size 8 "$data/mr_seq" "$data/dicom" "$data/orient" 2>/dev/null
[ "$(taken "$work/share1" | wc -l)" -gt 0 ] && [ "$(taken "$work/share1" | wc -l)" -lt "$(taken "$work/shares" | wc -l)" ] && good || bad 'a share is none or all'
expect 0 'shards of 3 sets' '--merge' "$prep" --merge -o "$work/merged" "$work/share0" "$work/share1" "$work/share2"
grep -q "\"slices\": $(slices "$work/merged" | awk '{ n += $5 } END { print n }')," "$work/merged/summary.json" && good || bad 'summary.json of the merged'
expect 0 '' 'verify of the merged' "$prep" --verify "$work/merged"
cmp -s <(taken "$work/merged") <(taken "$work/shares") && good || bad 'the merged shares are not the whole'
expect 0 'copies of volumes left out' '--merge of a set with itself' "$prep" --merge -o "$work/merged2" "$work/share0" "$work/share0"
cmp -s <(slices "$work/merged2") <(slices "$work/share0") && good || bad 'a set merged with itself is not the set'
expect 2 'holds other shards' '--merge into another set' "$prep" --merge -o "$work/share1" "$work/share0" "$work/share2"
expect 2 'give I/N' '--shard-of' "$prep" -o "$work/x" --shard-of 3/3 "$data"
expect 2 'sum to 1' '--split' "$prep" -o "$work/x" --split patient:0.5/0.1 "$data"

# --- a worker that dies, hangs or wants too much memory costs one file
mkdir "$work/many"
for n in 1 2 3 4 5 6 7 8; do cp -r "$data/ct_seg/ts_dicom/dicom" "$work/many/$n"; done
for signal in ABRT STOP; do
    "$prep" -o "$work/die$signal" --jobs 2 --time-limit 2 --keep duplicate --max-failed 100 "$work/many" 2>"$work/err" &
    sleep 0.7
    pkill -$signal -P $! -n
    wait $!
    status=$?
    if [ $signal = ABRT ]; then text='its decoder crashed .Aborted'; else text='took longer than 2 s'; fi
    [ $status = 0 ] && [ "$(grep -c "warning: .*$text" "$work/err")" = 1 ] && grep -q 'taken ' "$work/err" && good || bad "a worker ended by $signal: status $status, $(tail -1 "$work/err")"
done
head -c 352 "$ct" >"$work/large.nii"
patch "$work/large.nii" 42 00 02 00 02 00 02
head -c $((2 * 512 * 512 * 512)) /dev/zero | tr '\0' 'a' | cat "$work/large.nii" - | head -c $((352 + 2 * 512 * 512 * 512)) | gzip -1 >"$work/large.nii.gz"
if [ "${PREP:-}" = "" ]; then # a sanitizer needs memory of its own
    expect 3 'large.nii.gz: (needs more memory than|memory-limit: )' 'a volume beyond --memory-limit' "$prep" -o "$work/m1" --memory-limit 128 "$work/large.nii.gz"
fi
rm -f "$work"/large.nii*

# --- labels, targets, masks
column() { "$prep" --info "$1" | grep -v '#' | tail -n +2 | cut -f"$2" | sort | tr '\n' ' '; }
printf 'file,slice,label,target\nsub-1/a.nii.gz,,"head, left",0.5\nb.nii,,thorax,\nsub-2/b.nii,4,abdomen,2\nghost.nii,,neck,1\n' >"$work/labels.csv"
expect 0 '1 of 4 rows of .* match no stored slice' 'labels' "$prep" -o "$work/l1" --keep duplicate --labels "$work/labels.csv" "$work/i1"
"$prep" --info "$work/l1" >"$work/out"
grep -q '^# class 1: head, left' "$work/out" && good || bad 'class names are not in the shard'
[ "$(column "$work/l1" 15)" = '-1 1 3 3 ' ] && good || bad "labels are $(column "$work/l1" 15)"
printf 'FILE\tlabel\npatient\t7\na.nii.gz\t3\n' >"$work/labels.tsv"
"$prep" -o "$work/l2" --keep duplicate --labels "$work/labels.tsv" "$work/i1" 2>/dev/null
[ "$(column "$work/l2" 15)" = '-1 -1 3 3 ' ] && good || bad 'integer labels from TSV'
printf 'file,label\nx.nii,1\nx.nii,2\n' >"$work/labels.csv"
expect 3 'two rows for x.nii' 'labels that contradict' "$prep" -o "$work/l3" --labels "$work/labels.csv" "$work/i1"
printf 'name,label\nx.nii,1\n' >"$work/labels.csv"
expect 3 'header needs file' 'labels without file' "$prep" -o "$work/l4" --labels "$work/labels.csv" "$work/i1"
uid=$(head -c 3000 "$data/dicom/ge_head_ct_tilt/01.dcm" | grep -aoE '1\.2\.[0-9.]{20,}' | sed -n 3p)
printf 'series\tslice\tlabel\tpatient\n%s\t3\t5\tsomebody\nge_head_ct_tilt\t\t6\t\n' "$uid" >"$work/labels.tsv"
expect 0 '' 'labels by folder of a series' "$prep" -o "$work/l5" --labels "$work/labels.tsv" "$data/dicom"
[[ "$(column "$work/l5" 16)" = *6* ]] && good || bad "a series labelled by its folder: $(column "$work/l5" 16)"
mkdir -p "$work/task/imagesTr" "$work/task/labelsTr"
cp "$data/ct_seg/ts_example/example_ct_sm.nii.gz" "$work/task/imagesTr/case_0000.nii.gz"
cp "$data/ct_seg/ts_example/example_seg.nii.gz" "$work/task/labelsTr/case.nii.gz"
expect 0 'taken .*case_0000' 'an nnU-Net layout' "$prep" -o "$work/k1" "$work/task"
[ "$(cut -f5,23 "$work/k1/report.tsv" | grep taken | cut -f2)" = 30 ] && good || bad "slices with a mask: $(cut -f5,23 "$work/k1/report.tsv" | grep taken)"
printf 'file,mask\ndicom,%s\n' "$(realpath "$data/ct_seg/ts_dicom/example_seg_dicom.nii.gz")" >"$work/labels.csv"
expect 0 'taken' 'a NIfTI mask of a DICOM series' "$prep" -o "$work/k2" --labels "$work/labels.csv" "$data/ct_seg/ts_dicom"
[ "$(cut -f5,23 "$work/k2/report.tsv" | grep taken | cut -f2)" = 20 ] && good || bad "slices with a mask: $(cut -f5,23 "$work/k2/report.tsv" | grep taken)"
cat >"$work/dump.c" <<'END'
#include "dataloader.h"
int main(int argc, char **argv) { // the mask (argv[2]) or the pixels of every slice, one number a line
    Shard shard = {.path = argv[1]};
    char reason[256];
    if (shard_map(&shard, reason, sizeof reason)) return 1;
    const ShardSlice *s = shard_index(&shard);
    for (uint64_t i = 0; i < shard.slices; i++, s++)
        for (int j = 0; j < s->rows * s->cols; j++)
            printf("%d\n", argc > 2 ? shard.mapping[s->mask_offset + j] : ((const int16_t *)(shard.mapping + s->pixel_offset))[j]);
}
END
${CC:-gcc} -std=gnu11 -O1 -I. "$work/dump.c" -o "$work/dump" -lpthread -lm && good || bad 'the program that shows masks is not built'
for pair in k1:ts_example/example_seg k2:ts_dicom/example_seg_dicom; do
    "$prep" -o "$work/${pair%%:*}_label" --keep label --track 3d "$data/ct_seg/${pair#*:}.nii.gz" 2>/dev/null
    "$work/dump" "$work/${pair%%:*}/shard-000000.shard" mask >"$work/masks"
    "$work/dump" "$work/${pair%%:*}_label/shard-000000.shard" >"$work/labels"
    [ -s "$work/masks" ] && cmp -s "$work/masks" "$work/labels" && good || bad "the masks of ${pair%%:*} are not the label image"
done
cp "$data/ct_seg/ts_example/example_seg_fast_force_split.nii.gz" "$work/task/labelsTr/case.nii.gz"
expect 0 'its mask is not used: its grid is another one' 'a mask of another grid' "$prep" -o "$work/k3" "$work/task"
expect 0 'axial: 182 slices, dropped 0' '--track 3d' "$prep" -o "$work/k4" --track 3d "$data"/mr_lesion/open_ms_mni/patient07/FLAIR*.nii.gz
printf '{"Modality": "MR"}' >"$work/task/imagesTr/case.json"
expect 0 'taken .*case_0000.nii.gz: MR' 'a sidecar that says MR' "$prep" -o "$work/k5" "$work/task"

# --- a full disk
gunzip -c "$data/ct_seg/ts_example/example_ct.nii.gz" >"$work/whole_ct.nii"
(ulimit -Sf 1500; expect 1 'File too large' 'a limit on file size' "$prep" -o "$work/f1" "$work/whole_ct.nii"; echo "$passed $failed" >"$work/counts")
read -r passed failed <"$work/counts"
[ "$(ls "$work/f1")" = resume.tsv ] && good || bad "a limit on file size leaves $(ls "$work/f1")"
expect 0 'taken' 'going on after it' "$prep" -o "$work/f1" "$work/whole_ct.nii"
mkdir "$work/disk"
if mount -t tmpfs -o size=256k tmpfs "$work/disk" 2>/dev/null; then
    expect 1 'No space left' 'a full disk' "$prep" -o "$work/disk/f2" "$ct"
    [ "$(ls -A "$work/disk/f2")" = resume.tsv ] && good || bad "a full disk leaves $(ls "$work/disk/f2")"
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

# --- without the libraries
if ${CC:-gcc} -std=gnu11 -O1 -I. prep/prep.c -o "$work/plain_prep" -lpthread -lm 2>/dev/null; then
    expect 3 'built without .*: install libnifti2-dev' 'NIfTI without its libraries' "$work/plain_prep" -o "$work/n1" "$work/ct.nii.gz"
    expect 3 'built without GDCM; install libgdcm-dev' 'DICOM without GDCM' "$work/plain_prep" -o "$work/n2" "$data/bad/CT_small.dcm"
    expect 0 '' 'verify without libraries' "$work/plain_prep" --verify "$work/p/eval"
else bad 'a build without libraries'; fi

# --- against independent readers
if "$python" -c 'import nibabel, numpy, pydicom, SimpleITK' 2>/dev/null; then
    mkdir "$work/oracle"
    if "$python" dev/oracle/prep_oracle.py "$prep" "$data" "$work/oracle" >"$work/out" 2>&1; then good; else bad 'pydicom, nibabel or SimpleITK read other values'; fi
    tail -5 "$work/out" | sed 's/^/  oracle: /'
else skip 'the comparison with pydicom, nibabel and SimpleITK: no python3 that has them'; fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]

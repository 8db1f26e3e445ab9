#!/bin/bash
# Every test, one after the other; `make test` calls it after building. Each suite ends with "N passed, N failed"; the last
# line here is their sum, and the exit status is 1 where anything failed.
#
# SHARED names the folder with golden files and scans (default ../shared); without it the tests that need it are skipped.
set -u
cd "$(dirname "$0")/../.."
shared=${SHARED:-../shared}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

# suite NAME COMMAND...: a line with its counts; its output where something failed.
suite() {
    local name=$1 begin=$SECONDS status counts p f s
    shift
    "$@" > "$work/out" 2> "$work/err" < /dev/null
    status=$?
    counts=$(grep -Eo '[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' "$work/out" | tail -1)
    read -r p f s <<< "$(echo "$counts" | grep -Eo '[0-9]+' | tr '\n' ' ')"
    p=${p:-0} f=${f:-0} s=${s:-0}
    if [ -z "$counts" ] || { [ $status != 0 ] && [ "$f" = 0 ]; }; then f=$((f + 1)); fi
    printf '%-58s %5d passed, %d failed, %d skipped  (%d s)\n' "$name" "$p" "$f" "$s" $((SECONDS - begin))
    if [ "$f" != 0 ]; then
        echo "    exit status $status"
        grep -iE '^ *failed' "$work/out" | head -20 | sed 's/^/    /'
        tail -5 "$work/err" | sed 's/^/    /'
    fi
    grep -E '^skipped:' "$work/out" | sed 's/^/    /'
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

golden() { # PROGRAM [OPTION...]: every golden file and folder there is
    local arguments=() file
    for file in "$shared"/golden/*.safetensors "$shared"/golden/hf_*; do
        [ -e "$file" ] && arguments+=(--golden "$file")
    done
    "$@" "${arguments[@]}"
}

# The CUDA backend on random shapes, under two schedules of its lanes, warps, blocks and streams: the same bits.
emulated() {
    ./test_curia --device emu --quick > "$work/forward" || { cat "$work/forward"; return 1; }
    CURIA_EMU_ORDER=7 ./test_curia --device emu --quick > "$work/seeded"
    cmp -s "$work/forward" "$work/seeded" || echo 'FAILED another schedule gives other bits'
    cmp -s "$work/forward" "$work/seeded" && tail -1 "$work/forward"
}

have_shared=1
[ -d "$shared/golden" ] && [ -d "$shared/data" ] || have_shared=

suite 'house rules' dev/test/test_style.sh
suite 'formats: JSON, safetensors, hashes, random numbers' build/test_formats
suite 'shards: format, sampler, prefetch' build/test_data
suite 'gradients by finite differences, invariances' ./test_curia
[ $have_shared ] && suite 'golden files' golden ./test_curia
suite 'the emulator itself' build/emu/test_emu
for build in bf16 fp32; do
    suite "CUDA layers, $build, emulated" build/emu/test_layers_$build
    suite "CUDA attention, $build, emulated" build/emu/test_attention_$build
done
suite 'CUDA step against the CPU, emulated, two schedules' emulated
[ $have_shared ] && suite 'CUDA step against golden files, emulated' golden ./test_curia --device emu
suite 'CUDA runs, emulated' dev/test/test_emu.sh
suite 'evaluate: probes, metrics, command line' build/test_evaluate ./evaluate
suite 'prep on DICOM files made for it' build/test_dicom ./prep/prep
suite 'command lines, checkpoints, bad input' dev/test/test_cli.sh "$shared"
[ $have_shared ] && suite 'prep on real and broken scans' dev/test/test_prep.sh "$shared"
[ $have_shared ] && suite 'prep on damaged scans' build/fuzz_prep ./prep/prep "$shared/data" 20
suite "the README's commands, make run among them" dev/test/test_readme.sh "$shared"

# The same code with the address and undefined-behaviour sanitizers, on small cases.
asan=build/asan
if make --no-print-directory -s BUILD=$asan PREFIX=$asan/ CFLAGS='-O1 -g' SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=all' \
        NVCC= WERROR=-Werror tests > "$work/build" 2>&1; then
    export ASAN_OPTIONS=detect_leaks=0
    suite 'sanitizers: formats' $asan/test_formats
    suite 'sanitizers: shards' $asan/test_data
    suite 'sanitizers: invariances' $asan/test_curia --quick
    [ $have_shared ] && suite 'sanitizers: golden files' golden $asan/test_curia
    suite 'sanitizers: the emulator itself' $asan/emu/test_emu
    for build in bf16 fp32; do
        suite "sanitizers: CUDA layers, $build, emulated" $asan/emu/test_layers_$build
        suite "sanitizers: CUDA attention, $build, emulated" $asan/emu/test_attention_$build
    done
    [ $have_shared ] && suite 'sanitizers: CUDA step against golden files, emulated' golden $asan/test_curia --device emu
    suite 'sanitizers: evaluate' $asan/test_evaluate $asan/evaluate
    suite 'sanitizers: prep on DICOM files made for it' $asan/test_dicom $asan/prep/prep
    BIN=$asan suite 'sanitizers: command lines' dev/test/test_cli.sh "$shared" --quick
    [ $have_shared ] && PREP=$asan/prep/prep suite 'sanitizers: prep' dev/test/test_prep.sh "$shared"
    [ $have_shared ] && suite 'sanitizers: prep on damaged scans' build/fuzz_prep $asan/prep/prep "$shared/data" 40
else
    cat "$work/build"
    failed=$((failed + 1))
fi

[ $have_shared ] || echo "skipped: $shared is not there: golden files and real scans were not tested"
echo "$passed passed, $failed failed"
[ $failed = 0 ]

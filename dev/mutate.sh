#!/bin/bash
# Is every barrier, wait and bound check of the CUDA backend held by a test? Each is deleted in turn, the emulated build is made
# again with the address sanitizer, and the tests of that file run under two schedules; golden files are needed (SHARED).
#   dev/mutate.sh [FIRST [LAST]]      the mutations by number; without numbers, all of them (most of an hour on two cores)
# TSV on stdout: number, file:line, noticed or survived, the deleted text; then a line with the share noticed.
set -u
cd "$(dirname "$0")/.."
first=${1:-1} last=${2:-1000000}
shared=$(realpath "${SHARED:-../shared}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r Makefile curia dev prep ./*.c ./*.cu ./*.h "$work"
export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
pattern='__sync(threads|warp)\(|cp_async_wait<|cudaStreamWaitEvent|if \([a-z]+ >= [A-Za-z0-9_. ]+\) (return|continue);'
delete='s/(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^>]*>\(\)|CUDA_CHECK\(cudaStreamWaitEvent\(.*\)\)|if \([a-z]+ >= [A-Za-z0-9_. ]+\) (return|continue));/;/'
arguments=()
for file in "$shared"/golden/step_*; do arguments+=(--golden "$file"); done
build() { (cd "$work" && make -s SANITIZE=-fsanitize=address BUILD=b PREFIX=b/ CFLAGS='-O1 -g' CUDA= CUDA_OBJECTS= CUDA_LIBS= "$@"); }
build b/test_curia > /dev/null 2>&1

# tests_of FILE: the programs, under build/emu, that hold it
tests_of() {
    case $1 in
        *attention.cuh | *ptx.cuh) echo test_attention_bf16 test_attention_fp32 ;;
        *losses.cuh | *pixels.cuh) echo test_layers_bf16 test_layers_fp32 ;;
        *) echo backend.so ;;
    esac
}
# passes TEST: it builds and passes under both schedules
passes() {
    build "b/emu/$1" > "$work/log" 2>&1 || return 1
    for order in forward 7; do
        if [ "$1" = backend.so ]; then set -- "$1" "$work/b/test_curia" --device emu "${arguments[@]}"; else set -- "$1" "$work/b/emu/$1"; fi
        CURIA_EMU_ORDER=$order timeout 300 "${@:2}" > "$work/log" 2>&1 || return 1
    done
}
for test in backend.so test_attention_bf16 test_attention_fp32 test_layers_bf16 test_layers_fp32; do
    passes $test || { echo "error: $test fails before anything is deleted" >&2; tail -3 "$work/log" >&2; exit 1; }
done

noticed=0 number=0 tried=0
while IFS=: read -r file line text; do
    number=$((number + 1))
    [ $number -ge "$first" ] && [ $number -le "$last" ] || continue
    tried=$((tried + 1))
    sed -E "${line}$delete" "$file" > "$work/$file"
    result=survived
    for test in $(tests_of "$file"); do passes "$test" || { result=noticed; break; }; done
    [ $result = noticed ] && noticed=$((noticed + 1))
    printf '%d\t%s:%d\t%s\t%s\n' "$number" "$file" "$line" $result "$(echo "$text" | sed 's/^ *//')"
    cp "$file" "$work/$file"
done < <(grep -nE "$pattern" curia/cuda/*.cuh train_curia.cu)
echo "$noticed of $tried deletions noticed"

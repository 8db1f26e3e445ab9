#!/bin/bash
# Is every barrier, wait and bound check of the CUDA backend held by a test? Each is deleted in turn, the emulated backend is built
# with the address sanitizer, and the checker runs under two schedules; a deletion that nothing notices is a line of the result.
#   dev/mutate.sh [FIRST [LAST]]      the mutations by number; without numbers, all of them (an hour or two on two cores)
# TSV on stdout: number, file:line, noticed or survived, the deleted text; then a line with the share noticed.
set -u
cd "$(dirname "$0")/.."
first=${1:-1} last=${2:-1000000}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r Makefile curia dev prep ./*.c ./*.cu ./*.h "$work"
grep -nE '__sync(threads|warp)\(|cp_async_wait|cudaStreamWaitEvent|if \([a-z]+ >= [A-Za-z0-9_. ]+\) (return|continue);' \
    curia/cuda/*.cuh train_curia.cu > "$work/list"
noticed=0 number=0 tried=0
while IFS=: read -r file line text; do
    number=$((number + 1))
    [ $number -ge "$first" ] && [ $number -le "$last" ] || continue
    tried=$((tried + 1))
    sed -E "${line}s/(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^>]*>\(\)|CUDA_CHECK\(cudaStreamWaitEvent.*\)|if \([a-z]+ >= [A-Za-z0-9_. ]+\) (return|continue));//" \
        "$file" > "$work/$file"
    result=noticed
    if (cd "$work" && make -s SANITIZE=-fsanitize=address BUILD=build PREFIX=build/ CFLAGS='-O1 -g' CUDA= CUDA_OBJECT= CUDA_OBJECTS= CUDA_LIBS= \
            emu build/test_curia) > "$work/build.log" 2>&1; then
        survived=0
        for order in forward 7; do
            (cd "$work/build" && mkdir -p build && ln -sfn ../emu build/emu && ASAN_OPTIONS=detect_leaks=0 CURIA_EMU_ORDER=$order \
                timeout 600 ./test_curia --device emu --quick) > "$work/run.log" 2>&1 && survived=$((survived + 1))
        done
        [ $survived = 2 ] && result=survived
    fi
    [ $result = noticed ] && noticed=$((noticed + 1))
    printf '%d\t%s:%d\t%s\t%s\n' "$number" "$file" "$line" $result "$(echo "$text" | sed 's/^ *//')"
    cp "$file" "$work/$file"
done < "$work/list"
echo "$noticed of $tried deletions noticed"

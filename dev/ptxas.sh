#!/bin/bash
# nvcc's own report of every kernel, for each GPU generation and both builds: TSV on stdout. Status 1 where a kernel spills.
#   dev/ptxas.sh [NVCC] [ARCH ...] > dev/results/ptxas.tsv
# warps_per_sm: the occupancy that registers and static shared memory allow, at most 64 (65,536 registers in units of 256 a warp).
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=${1:-nvcc}
shift || true
archs=${*:-80 90 100}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for arch in $archs; do
    for build in bf16 fp32; do
        "$nvcc" -std=c++17 -O3 -arch="sm_$arch" -cubin -Xptxas -v $([ $build = fp32 ] && echo -DCURIA_FP32) train_curia.cu \
            -o "$work/cubin" 2>&1 | c++filt | awk -v arch="sm_$arch" -v build=$build -v OFS='\t' '
            /Compiling entry function/ { name = $0; sub(/^[^\047]*\047/, "", name); sub(/^void /, "", name); sub(/[(].*/, "", name) }
            /bytes stack frame/ { stack = $1; stores = $5; loads = $9 }
            /Used [0-9]+ registers/ {
                for (i = 1; i < NF; i++) if ($i == "Used") registers = $(i + 1)
                shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART) + 0 : 0
                warps = int(65536 / (int((registers * 32 + 255) / 256) * 256))
                print arch, build, name, registers, stack + 0, stores + 0, loads + 0, shared, (warps > 64 ? 64 : warps)
            }'
    done
done > "$work/rows"
printf 'arch\tbuild\tkernel\tregisters\tstack_bytes\tspill_store_bytes\tspill_load_bytes\tstatic_shared_bytes\twarps_per_sm\n'
sort "$work/rows"
awk -F'\t' '$6 + $7 > 0 { bad = 1 } END { exit bad }' "$work/rows"

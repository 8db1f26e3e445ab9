#!/bin/bash
# All there is to do on a GPU machine, in one command of less than ten minutes: build, check, sanitize, train, and measure speed.
# A failing part does not stop the others; the last lines are a summary.
#
#   dev/gpu_check.sh [--quick]      --quick: fewer random cases, two models, no 500 steps, no torch.compile, no kernel table
#
# nvcc and a C compiler are enough. With PyTorch (PYTHON, default python3) its step is timed beside ours; compute-sanitizer, ncu
# and nsys are used where they are. GOLDEN names the folder of golden files (default ../shared/golden), RESULTS the folder
# for the results (default dev/results; they go into <device>-<date> in it). Clocks and other settings of the GPU are left alone.
set -u
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS MFLAGS MAKELEVEL
quick=${1:-}
case $quick in '' | --quick) ;; *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
golden=${GOLDEN:-../shared/golden} python=${PYTHON:-python3} cores=$(nproc) date=$(date +%F)
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
PATH=$PATH:$(dirname "$nvcc")
ask() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2> /dev/null | head -1; }
device=$(ask name) driver=$(ask driver_version) arch=$(ask compute_cap | tr -d .)
folder=${RESULTS:-dev/results}/$(echo "${device:-unknown-gpu}" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')-$date
commit=${COMMIT:-$(git describe --always --dirty --exclude '*' 2> /dev/null || echo unknown)}
cuda=$("$nvcc" --version 2> /dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
header="# device: ${device:-none answers}; driver: ${driver:-none}; CUDA: ${cuda:-none}; commit: $commit; date: $date; \
command: dev/gpu_check.sh $quick"
mkdir -p "$folder" || exit 1
memory_disk=$(df -m --output=avail /dev/shm 2> /dev/null | tail -1)     # a checkpoint of L is 6 GB
[ "${memory_disk:-0}" -gt 16000 ] && export TMPDIR=/dev/shm
work=$(mktemp -d)
trap 'kill -KILL $(jobs -pr) 2> /dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
log=$folder/log.txt
for file in log.txt training.tsv speed.tsv pytorch.tsv kernels.tsv summary.tsv; do echo "$header" > "$folder/$file"; done
export OMP_NUM_THREADS=$(((cores + 1) / 2)) TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
tiny='--recipe tiny --set run.save_every=0'
passed=0 failed=0 cpu_run=

# part NAME END FUNCTION: END is the second of the whole run by which it is over; what a part does not need is left to the next.
# The function returns 0, 1 (failed) or 2 (skipped), and says in `note` what it found.
part() {
    local begin=$SECONDS status word
    end=$2 note=
    printf '%s: ' "$1" >&2
    echo "=== $1" >> "$log"
    if [ $((end - SECONDS)) -lt 3 ]; then status=1 note='no time left'
    else "$3" >> "$log" 2>&1 < /dev/null; status=$?; fi
    case $status in
        0) word=ok passed=$((passed + 1)) ;;
        2) word=skipped ;;
        *) word=FAILED failed=$((failed + 1)) ;;
    esac
    printf '%s\t%s\t%d s\t%s\n' "$1" "$word" $((SECONDS - begin)) "$note" >> "$folder/summary.tsv"
    echo "$word, $((SECONDS - begin)) s${note:+ ($note)}" >&2
}
# COMMAND..., killed at the end of this part's time. Status 124 or 137 then.
within() { timeout -k 3 $((end > SECONDS ? end - SECONDS : 1)) "$@"; }
rows() { cat "$1" 2> /dev/null | wc -l; }
ended() { [ "$1" = 124 ] || [ "$1" = 137 ] && echo 'ran out of time' || echo "status $1"; }
add() { note="${note:+$note; }$*"; }
median() { sort -g | awk '{ v[NR] = $1 } END { if (NR) print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }
# A program that ends with "N passed, N failed". Adds to `good` and `bad`; a program that dies is one failure.
counted() {
    local status p=0 f=0
    within "$@" > "$work/out" 2>&1
    status=$?
    echo "\$ $*"
    cat "$work/out"
    read -r p f <<< "$(grep -Eo '[0-9]+ passed, [0-9]+ failed' "$work/out" | tail -1 | tr -cd '0-9 ')"
    [ "$status" != 0 ] && [ "${f:-0}" = 0 ] && { f=1; add "$(basename "$1"): $(ended $status)"; }
    good=$((good + ${p:-0})) bad=$((bad + ${f:-1}))
}
counts() { add "$good passed, $bad failed"; [ $bad = 0 ] && [ $good -gt 0 ]; }

# Everything that nvcc compiles at once, and then the CPU's run of part 5, which makes the phantom, beside parts 2 to 4.
build() {
    local begin=$SECONDS name kind jobs=() status
    for name in attention layers; do
        for kind in 16bit fp32; do
            [ -f dev/test/test_$name.cu ] || continue
            within "$nvcc" -std=c++17 -O2 -arch="sm_${arch:-80}" -I. $([ $kind = fp32 ] && echo -DCURIA_FP32) \
                dev/test/test_$name.cu -o "$work/test_${name}_$kind" -lcublasLt &
            jobs+=($!)
        done
    done
    within make -j"$cores" NVCC="$nvcc" ${arch:+CUDA_ARCHS=$arch}
    status=$?
    [ $status = 0 ] && add "make $((SECONDS - begin)) s on $cores cores"
    [ ${#jobs[@]} = 0 ] || wait "${jobs[@]}"
    [ $status = 0 ] || { add "make: $(ended $status)"; return 1; }
    nice ./train_curia --device cpu $tiny --steps $([ $quick ] && echo 1 || echo 500) --out "$work/cpu" > "$work/cpu.txt" 2>&1 &
    cpu_run=$!
}
cpu_running() { [ "$cpu_run" ] && kill -0 "$cpu_run" 2> /dev/null; }

checker() {
    local file files=()
    good=0 bad=0
    counted ./test_curia --device cuda $quick
    for file in "$golden"/*.safetensors "$golden"/hf_*; do [ -e "$file" ] && files+=(--golden "$file"); done
    if [ ${#files[@]} = 0 ]; then add "no golden files in $golden: skipped"
    else counted ./test_curia --device cuda "${files[@]}"; fi
    counts
}

layers() {
    local name kind
    good=0 bad=0
    for name in attention layers; do
        [ -f dev/test/test_$name.cu ] || { add "no dev/test/test_$name.cu"; continue; }
        for kind in 16bit fp32; do counted "$work/test_${name}_$kind"; done
    done
    counts
}

# The CPU's run has made the phantom.
phantom_ready() {
    while [ ! -d data/phantom ] && [ $SECONDS -lt $end ] && cpu_running; do sleep 0.2; done
    [ -d data/phantom ]
}

# The four tools side by side. racecheck and synccheck leave out cuBLASLt's kernels: the large products that measure the
# peak at the start would take them minutes. The other two follow every write and read.
sanitizers() {
    local tool only filter=--kernel-regex jobs=() i=0 status bad=0 refused=
    command -v compute-sanitizer > /dev/null || { note='no compute-sanitizer'; return 2; }
    phantom_ready || { note='no phantom'; return 1; }
    compute-sanitizer --help | grep -- --kernel-name > /dev/null && filter=--kernel-name
    for tool in memcheck racecheck synccheck initcheck; do
        case $tool in racecheck | synccheck) only="$filter kns=_kernel" ;; *) only= ;; esac
        within compute-sanitizer --tool $tool --error-exitcode 9 $only \
            ./train_curia --device cuda $tiny --batch-size 2 --steps 2 --out "$work/$tool" > "$work/$tool.txt" 2>&1 &
        jobs+=($!)
    done
    for tool in memcheck racecheck synccheck initcheck; do
        wait "${jobs[i++]}"
        status=$?
        echo "--- $tool: status $status"
        cat "$work/$tool.txt"
        grep -qi 'device not supported' "$work/$tool.txt" && refused=1
        [ $status = 0 ] && continue
        add "$tool: $(ended $status) $(grep SUMMARY "$work/$tool.txt" | tail -1 | sed 's/^=* *//')"
        bad=1
    done
    [ $refused ] && { note='this driver refuses compute-sanitizer'; return 2; }
    [ $bad = 0 ] && add 'memcheck, racecheck, synccheck, initcheck: no errors'
}

# Recipe tiny for 500 steps on the same data: the two mean losses of steps 400 to 500 may differ by the losses' own spread there.
training() {
    local status
    [ $quick ] && { note=--quick; return 2; }
    within ./train_curia --device cuda $tiny --steps 500 --out "$work/cuda" || { add "the GPU's run: $(ended $?)"; return 1; }
    while cpu_running && [ $SECONDS -lt $end ]; do sleep 0.2; done
    cpu_running && kill -KILL "$cpu_run"
    cat "$work/cpu.txt"
    awk '
        FNR == 1 { file++ }
        FNR > 1 && $1 >= 400 && $1 <= 500 { n[file]++; s[file] += $2; q[file] += $2 * $2; x[file, $1] = $2 }
        END {
            if (n[1] != 101 || n[2] != 101) { print "rows of steps 400 to 500: cpu " n[1] + 0 ", cuda " n[2] + 0; exit 1 }
            for (i = 1; i <= 2; i++) { mean[i] = s[i] / 101; spread[i] = sqrt(q[i] / 101 - mean[i] ^ 2) }
            for (k = 400; k <= 500; k++) apart += (x[1, k] - x[2, k]) ^ 2 / 101
            print "mean_loss_cpu\tmean_loss_cuda\tspread_cpu\tspread_cuda\trms_of_step_differences"
            printf "%.5f\t%.5f\t%.5f\t%.5f\t%.5f\n", mean[1], mean[2], spread[1], spread[2], sqrt(apart)
            d = mean[1] - mean[2]
            exit !((d < 0 ? -d : d) <= spread[1])
        }' "$work/cpu/log.tsv" "$work/cuda/log.tsv" >> "$folder/training.tsv"
    status=$?
    add "$(tail -1 "$folder/training.tsv" |
        awk -F'\t' '{ print NF < 5 ? $0 : "mean loss " $1 " cpu, " $2 " cuda, spread " $3 " and " $4 }')"
    return $status
}

# Slices of about 512 x 512, as scanners make them: the phantom's, each pixel 4 x 4 times.
large_slices() {
    cat > "$work/large.c" << 'END'
#include "dataloader.h"
int main(int argc, char **argv) {
    const char *paths[] = {argv[argc - 2]};
    Dataset *d = dataset_open(paths, 1);
    ShardWriter w;
    shard_writer_open(&w, argv[argc - 1]);
    for (uint64_t i = 0; i < 1024 && i < dataset_count(d); i++) {
        const int16_t *pixels;
        const uint8_t *mask;
        ShardSlice s = *dataset_slice(d, i, &pixels, &mask);
        int cols = s.cols;
        int32_t *sides[] = {&s.rows, &s.cols, &s.box_top, &s.box_left, &s.box_bottom, &s.box_right};
        float *lengths[] = {&s.centre_row, &s.centre_col, &s.spread_row, &s.spread_col};
        for (int k = 0; k < 6; k++) *sides[k] *= 4;
        for (int k = 0; k < 4; k++) *lengths[k] *= 4;
        s.mask_offset = 0;
        int16_t *large = malloc((size_t)s.rows * s.cols * sizeof *large);
        for (int y = 0; y < s.rows; y++)
            for (int x = 0; x < s.cols; x++) large[y * s.cols + x] = pixels[y / 4 * cols + x / 4];
        shard_writer_add(&w, &s, large, NULL);
        free(large);
    }
    shard_writer_close(&w, NULL);
    return 0;
}
END
    "${CC:-gcc}" -std=gnu11 -O2 -I. "$work/large.c" -o "$work/large" -lm -lpthread && mkdir -p "$work/slices" &&
        within "$work/large" data/phantom/train "$work/slices/large.shard"
}

models=${quick:+S L}
models=${models:-tiny S B L g}
# METHOD G.3's configurations. S is curia2-b with the width of ViT-S: the recipes have none.
shape() {
    case $1 in
        tiny) echo '--recipe tiny' ;;
        S) echo '--recipe curia2-b --set model.dim=384 --set model.heads=6' ;;
        *) echo "--recipe curia2-$(echo "$1" | tr BLg blg)" ;;
    esac
}
batch_of() { case $1 in tiny) echo 32 ;; S | B) echo 128 ;; L) echo 64 ;; g) echo 24 ;; esac; }

# MODEL BATCH: 16 steps, tiny 100. The run ends by itself, with the checkpoint that every run ends with, but for g: its checkpoint
# would be 20 GB, so it is killed once the rows are there.
timed_run() {
    local out=$work/run-$1 pid stop
    steps=16
    [ "$1" = tiny ] && steps=100
    [ "$1" = g ] && stop= || stop="--steps $steps"
    rm -rf "$out"
    ./train_curia --device cuda $(shape "$1") --data "$data" --set run.save_every=0 --batch-size "$2" --out "$out" $stop \
        > "$work/run.txt" 2>&1 &
    pid=$!
    while kill -0 $pid 2> /dev/null; do
        [ $SECONDS -ge $end ] && { kill -KILL $pid; echo 'ran out of time' >> "$work/run.txt"; }
        [ -z "$stop" ] && [ "$(rows "$out/log.tsv")" -gt $steps ] && kill -KILL $pid
        sleep 0.1
    done
    wait $pid
    echo "$1, batch $2: status $?"
    cat "$work/run.txt"
    [ "$(rows "$out/log.tsv")" -gt $steps ]
}

speed() {
    local model batch least seconds bad=0
    data=$work/slices
    phantom_ready && large_slices || { note='no slices'; return 1; }
    {
        echo '# slices of 352 to 576 pixels a side: the phantom, each pixel 4 x 4 times; medians of 10 steps after 6 (tiny: 90)'
        printf 'model\tbatch\tms_per_step\timages_per_s\tMFU_percent\tfloor_percent\tGFLOP_per_image\tfloor_images_per_s\t'
        printf 'peak_TFLOP_per_s\tcopy_TB_per_s\tGPU_MiB\twaited_for_data_percent\n'
    } >> "$folder/speed.tsv"
    for model in $models; do
        batch=$(batch_of $model) least=$(($(batch_of $model) / 8))
        until timed_run $model $batch; do
            batch=$((batch / 2))
            if [ $batch -lt $least ] || [ $SECONDS -ge $end ]; then
                add "$model: $(tail -1 "$work/run.txt" | cut -c1-200)"
                bad=1
                continue 2
            fi
        done
        seconds=$(tail -10 "$work/run-$model/log.tsv" | awk '{ print $NF }' | median)
        # "this device: P TFLOP/s in a large product, C TB/s in a copy; a step takes O GFLOP an image, so at most M img/s"
        tr '\r' '\n' < "$work/run.txt" | awk -v model=$model -v batch=$batch -v s="$seconds" '
            function before(word,  i) { for (i = 2; i <= NF; i++) if (index($i, word) == 1) return $(i - 1); return "" }
            function after(word,  i) { for (i = 1; i < NF; i++) if ($i == word) return $(i + 1) + 0; return "" }
            /^this device:/ { peak = before("TFLOP/s"); copy = before("TB/s"); work = before("GFLOP"); most = before("img/s") }
            /^GPU memory, MiB:/ {
                mib = after("gradients") + after("optimiser") + after("activations") + after("logits") + after("workspace")
            }
            /waited for data/ { waited = after("data") }
            END {
                rate = batch / s
                printf "%s\t%d\t%.2f\t%.1f\t%.1f\t%.1f\t%s\t%s\t%s\t%s\t%s\t%s\n", model, batch, 1000 * s, rate,
                    peak ? 100 * rate * work / (1000 * peak) : 0, most ? 100 * rate / most : 0,
                    work, most, peak, copy, mib, waited
            }' >> "$folder/speed.tsv"
        add "$model $(tail -1 "$folder/speed.tsv" | awk -F'\t' '{ print $4 " img/s, MFU " $5 " %, floor " $6 " %" }')"
        [ $model = tiny ] || ./train_curia $(shape $model) --batch-size $batch --print-config > "$work/$model.json"
        rm -rf "$work/run-$model"
    done
    [ $bad = 0 ]
}

# The same configurations and batches in PyTorch: eager for each, then compiled, L first, while there is time.
pytorch() {
    local model mode bad=0 status
    within "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { note='no PyTorch with CUDA'; return 2; }
    printf 'model\tmode\tbatch\tms_per_step\timages_per_s\tpeak_GiB\twarmup_s\tloss\ttorch\tours_over_it\n' \
        >> "$folder/pytorch.tsv"
    for mode in eager $([ $quick ] || echo compile); do
        for model in L S B g; do
            [ -f "$work/$model.json" ] || continue
            [ $mode = compile ] && [ $((end - SECONDS)) -lt 20 ] && { add "$model compiled: no time left"; continue; }
            within "$python" dev/bench/gpu_step.py "$work/$model.json" --mode $mode > "$work/out"
            status=$?
            if [ $status = 0 ]; then
                awk -F'\t' -v OFS='\t' -v model=$model '
                    NR == FNR { if ($1 == model) ours = $4; next }
                    FNR == 2 { print model, $0, sprintf("%.2f", ours / $4) }' \
                    "$folder/speed.tsv" "$work/out" >> "$folder/pytorch.tsv"
                add "$model $mode $(tail -1 "$folder/pytorch.tsv" | awk -F'\t' '{ print $5 " img/s, ours " $10 " times that" }')"
            else
                add "$model $mode: $(ended $status)"
                [ $mode = compile ] || bad=1
            fi
        done
    done
    [ "$(rows "$folder/pytorch.tsv")" -gt 2 ] || { add 'no configuration was timed'; return 1; }
    [ $bad = 0 ]
}

# One step of L, kernel by kernel: ncu measures a window of launches after the first steps; update_matrices_kernel ends a step.
kernels() {
    local metrics=gpu__time_duration.sum,dram__bytes.sum operations=sm__ops_path_tensor_src_bf16_dst_fp32 batch peak copy run
    [ $quick ] && { note=--quick; return 2; }
    [ -d "$work/slices" ] || { note='no slices'; return 1; }
    read -r batch peak copy <<< "$(awk -F'\t' '$1 == "L" { print $2, $9, $10 }' "$folder/speed.tsv")"
    [ "$copy" ] || { note='L did not run'; return 1; }
    run="./train_curia --device cuda $(shape L) --data $work/slices --set run.save_every=0 --out $work/profile"
    run="$run --batch-size $batch"
    if command -v ncu > /dev/null; then
        within ncu --query-metrics 2> /dev/null | grep "^$operations" > /dev/null && metrics=$metrics,$operations.sum
        within ncu --csv --page raw --print-units base --kernel-name-base function --clock-control none --cache-control none \
            --metrics $metrics --launch-skip 4000 --launch-count 3200 --kill yes --log-file "$work/ncu.csv" $run --steps 9
        echo "ncu: $(ended $?)"
        grep -v '^"' "$work/ncu.csv" | tail -20
        if awk -v peak="$peak" -v copy="$copy" -v operations=$operations.sum '
            function number(metric,  x) { if (!(metric in column)) return 0; x = $column[metric]; gsub(/,/, "", x); return x + 0 }
            function row(name, n, ms, GB, TFLOP) {
                printf "%s\t%d\t%.3f\t%.1f\t%.3f\t%.0f\t%.1f\t%.3f\t%.1f\t%.1f\n", name, n, ms, 100 * ms / time["all"], GB,
                    1000 * GB / ms, 100 * GB / ms / copy, TFLOP, 1000 * TFLOP / ms, 1e5 * TFLOP / ms / peak
            }
            function count(name) { launches[name]++; time[name] += ms; bytes[name] += GB; work[name] += TFLOP }
            BEGIN { FS = "\",\"" }
            { gsub(/^"|"$/, "") }
            $1 == "ID" { for (i = 1; i <= NF; i++) column[$i] = i; next }
            $1 !~ /^[0-9]+$/ || whole { next }
            {
                name = $column["Kernel Name"]; GB = number("dram__bytes.sum") / 1e9
                ms = number("gpu__time_duration.sum") / 1e6; TFLOP = number(operations) / 1e12
                if (inside) { count(name); count("all") }
                if (name ~ /update_matrices_kernel/) { whole = inside; inside = 1 }
            }
            END { for (name in time) row(name, launches[name], time[name], bytes[name], work[name]); exit !whole }' \
            "$work/ncu.csv" > "$work/table"; then
            {
                printf 'kernel\tlaunches\ttotal_ms\tshare_percent\tGB\tGB_per_s\tpercent_of_copy\t'
                printf 'tensor_TFLOP\tTFLOP_per_s\tpercent_of_product\n'
                sort -t "$(printf '\t')" -k3,3gr "$work/table"
            } >> "$folder/kernels.tsv"
            add "ncu: one step of L, $(awk -F'\t' '$1 == "all" { print $2 " launches, " $3 " ms" }' "$work/table")"
            return 0
        fi
        add 'ncu gave no whole step'
    fi
    command -v nsys > /dev/null || { add 'no nsys'; command -v ncu > /dev/null && return 1; add 'no ncu'; return 2; }
    rm -rf "$work/profile"
    if within nsys profile --trace=cuda -o "$work/nsys" $run --steps 6 &&
        within nsys stats --report cuda_gpu_kern_sum --format tsv "$work/nsys.nsys-rep" > "$work/table"; then
        echo '# nsys: sums over 6 steps of L and the measuring of the peaks' | cat - "$work/table" >> "$folder/kernels.tsv"
        add 'nsys: sums over 6 steps of L'
    else
        add 'nsys failed'
        return 1
    fi
}

part build 130 build
part checker 210 checker
part 'layer tests' 235 layers
part sanitizers 300 sanitizers
part training 340 training
part speed 440 speed
part PyTorch 500 pytorch
part kernels 588 kernels
echo "$passed passed, $failed failed" >> "$folder/summary.tsv"
echo
echo "results in $folder"
sed 1d "$folder/summary.tsv"
[ $failed = 0 ]

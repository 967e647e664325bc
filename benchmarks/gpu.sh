#!/usr/bin/env bash
# Makes the most of a GPU for 13 minutes, without network; what it finds is in OUT, at most 8 files.
#
#   bash benchmarks/gpu.sh OUT DATA           # DATA: CIFAR-100 as folders of images; "" leaves rows out
#   bash benchmarks/gpu.sh OUT DATA rows      # some of its parts: tests, steps, rows
#   bash benchmarks/gpu.sh OUT DATA --smoke   # everything in small, also on a CPU
#
# A part that is done is left out the next time, and rows go on from their last epoch. MINUTES bounds all of it; what does
# not fit is said in OUT/log.txt. EPOCHS is the length of the rows, of which 164 is the paper's.
set -uo pipefail
out=$(realpath -m "$1") data=${2:+$(realpath "$2")}
shift 2
cd "$(dirname "$0")/.." || exit
[[ ${*: -1} == --smoke ]] && smoke=yes && set -- "${@:1:$#-1}" || smoke=
parts=" ${*:-tests steps rows} "
mkdir -p "$out"
log=$out/log.txt
end=$((SECONDS + 60 * ${MINUTES:-13}))
export PYTHONPATH=.:${PYTHONPATH:-}

# part NAME SECONDS COMMAND...: run it within these seconds, and what is left of all.
part() {
    local name=$1 most=$(($2 < end - SECONDS ? $2 : end - SECONDS)) began=$SECONDS
    shift 2
    [[ $parts == *" ${name%% *} "* ]] && ! grep -qx "$name: done.*" "$log" 2> /dev/null || return 0
    ((most > 5)) || { echo "$name: no time left" >> "$log"; return; }
    timeout --signal=INT --kill-after=30 "$most" "$@" 2>&1 | tail -n 25 >> "$log"
    local code=${PIPESTATUS[0]}
    case $code in
        0) echo "$name: done in $((SECONDS - began)) s" ;;
        124) echo "$name: stopped after $most s" ;;
        *) echo "$name: failed with exit code $code" ;;
    esac >> "$log"
}

if [[ $smoke ]]; then
    part tests 120 python -m pytest -q -n 2 tests/test_gpu.py -k 'loss or step'
    part 'steps eager' 60 python benchmarks/speed.py step --results "$out" --rounds 1 \
        --models test_resnet test_vit --batch-size 2 --dtype bf16 --channels-last
    rows=(--rows mini --epochs 1 --methods baseline dks)
else
    part tests 90 python -m pytest -q -m gpu -n 4 tests
    for mode in '' --compile; do
        part "steps ${mode:-eager}" 120 python benchmarks/speed.py step --results "$out" --dtype bf16 --channels-last $mode
    done
    rows=(--rows resnet32 --epochs "${EPOCHS:-20}" --methods baseline ds dks to_backbone_t3)
fi
[[ $data ]] && part rows 780 python benchmarks/paper.py "${rows[@]}" --seeds 0 --jobs 4 --data-dir "$data" \
    --minutes $(((end - SECONDS) / 60)) --results "$out/cifar100" --output "${SCRATCH:-/tmp}/dks-rows"
grep -E '^[a-z -]+: (done|stopped|failed|no time)' "$log"
! grep -q ': failed' "$log"

#!/usr/bin/env bash
# Every method with its baselines, then one table.
#
#   bash run_all.sh                  the generated data set: minutes on a CPU, nothing to download
#   bash run_all.sh cifar100         the papers' recipes on CIFAR-100-LT (or cifar10): wants a GPU
#   bash run_all.sh one-protocol     CIFAR-100-LT with one network, augmentation, batch size, number of epochs and set of
#                                    training images for all; what a method is (losses, rates, second stage) stays its own.
#                                    ResNet-34, as a simplex of 100 class vectors does not fit ResNet-32's 64 features
#
#   SEEDS="0 1 2"  IMB="100 50 10"  METHODS="lort rbl"  JOBS=4 (runs at a time)  OUT=runs
#   FLAGS="--epochs 2" OUT=runs/quick     flags for every run; runs with other flags need another folder
#
# A recorded run is not run again, an interrupted one goes on where it was, and a failing one does not stop the others.
set -u
cd "$(dirname "$0")" || exit 2
usage() { echo "error: $1" >&2; exit 2; }
(($# <= 1)) || set -- "$*"  # refused below
dataset=${1:-synthetic} seeds="0 1 2" jobs=1 protocol=() rbl=() lort=()
largest=500  # images of the largest class
case "$dataset" in
    synthetic) seeds=0 jobs=$(($(nproc) < 4 ? $(nproc) : 4)) largest=250 ;;
    cifar10) protocol=(--eval-every 5) largest=5000 ;;
    cifar100) protocol=(--eval-every 5) ;;
    one-protocol)
        dataset=cifar100 rbl=(--augment crop) lort=(--init he)
        protocol=(--backbone resnet34 --epochs 200 --batch-size 128 --val-per-class 20) ;;
    *) usage "usage: bash run_all.sh [synthetic | cifar10 | cifar100 | one-protocol]" ;;
esac
read -d '' -ra seeds <<< "${SEEDS:-$seeds}"
read -d '' -ra factors <<< "${IMB:-100}"
read -d '' -ra flags <<< "${FLAGS:-}"
read -d '' -ra methods <<< "${METHODS-$(cd methods && echo *.py)}"
jobs=${JOBS:-$jobs}
out=${OUT:-runs}/${1:-synthetic}
trap 'trap - INT TERM; kill 0' INT TERM  # and none of the runs goes on alone
[[ $jobs =~ ^[1-9][0-9]{0,2}$ ]] || usage "JOBS=$jobs: a number of runs, from 1 to 999"
[[ "${seeds[*]}" =~ ^(0|[1-9][0-9]*)(\ (0|[1-9][0-9]*))*$ ]] || usage "SEEDS=${seeds[*]}: whole numbers"
[[ "${factors[*]}" =~ ^[1-9][0-9]*(\ [1-9][0-9]*)*$ ]] || usage "IMB=${factors[*]}: whole numbers"
[[ " ${flags[*]}" =~ \ --(seed|imb-factor|dataset|out|help)(=|\ |$) ]] && usage "FLAGS=${flags[*]}: SEEDS, IMB and OUT set these"
((${#methods[@]})) || usage "METHODS names no script"
for name in "${methods[@]%.py}"; do
    [[ $name != */* && -f methods/$name.py ]] || usage "METHODS=${methods[*]}: there is no methods/$name.py"
done
mkdir -p "$out/logs" 2> /dev/null || usage "OUT=${OUT:-runs}: cannot write there"
: > "$out/logs/failed"
if ((jobs > 1)); then export OMP_NUM_THREADS=$((($(nproc) + jobs - 1) / jobs)); fi

run() {  # one script with its flags, unless results.jsonl holds a run by the same command
    [[ " ${methods[*]%.py} " == *" ${1%.py} "* ]] || return
    local command=(methods/"$@" "${protocol[@]}" --dataset "$dataset" --imb-factor "$factor" --seed "$seed" --out "$out" "${flags[@]}")
    local log="$out/logs/$(tr -c 'a-z0-9.\n' '-' <<< "${*//$out\//} if$factor seed$seed").txt"
    if grep -qsF "\"command\": \"${command[*]}\"" "$out/results.jsonl"; then
        echo "recorded: ${command[*]}"
    else
        echo "started:  ${command[*]}"
        local began=$SECONDS
        if python "${command[@]}" > "$log" 2>&1; then
            echo "finished: ${command[*]} ($((SECONDS - began)) s)"
        else
            echo "FAILED:   ${command[*]}: $(tail -n 1 "$log")" | tee -a "$out/logs/failed"
        fi
    fi
}

weight_balancing() {  # wb's stage 1 is the wd run: the same recipe, so the same weights
    run ewb_fdr.py --variant wd
    local stage1="$out/ewb_fdr-wd-$dataset-if$factor-seed$seed/weights.pt"
    run ewb_fdr.py --variant wb --stage1 "$stage1"
    run ewb_fdr.py --variant wb --stage1 "$stage1" --cb-loss ce
}

queue() {  # run the given function and arguments in the background, `jobs` at a time
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
    "$@" &
}

for seed in "${seeds[@]}"; do
    for factor in "${factors[@]}"; do
        queue weight_balancing
        for variant in ce cb etf fr-etf; do queue run ewb_fdr.py --variant $variant; done
        queue run lort.py "${lort[@]}"
        for head in linear fixed rbl; do queue run rbl.py --head $head "${rbl[@]}"; done
        for base in bs ce-drw focal la; do
            queue run lwr.py --base $base --strength 0
            queue run lwr.py --base $base
        done
        for variant in ce ce-etf; do queue run hinge_ce.py --variant $variant; done
        ((largest / factor > 50)) || queue run hinge_ce.py --variant hinge  # else no class is small enough for a cone
    done
done
wait
[ -s "$out/results.jsonl" ] && python common.py "$out/results.jsonl"
if [ -s "$out/logs/failed" ]; then
    echo "error: these runs failed, their logs are in $out/logs:" >&2
    cat "$out/logs/failed" >&2
    exit 1
fi

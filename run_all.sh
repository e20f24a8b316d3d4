#!/usr/bin/env bash
# Every method with its baselines, then one table.
#
#   bash run_all.sh                  the generated data set: minutes on a CPU, nothing to download
#   bash run_all.sh cifar100         the papers' recipes on CIFAR-100-LT (or cifar10): wants a GPU
#   bash run_all.sh one-protocol     CIFAR-100-LT with one network, augmentation, batch size, number of epochs and set
#                                    of training images for all; what a method is (losses, rates, second stage) stays
#                                    its own. ResNet-34, as a simplex of 100 vectors does not fit ResNet-32's features
#
#   SEEDS="0 1 2"  IMB="100 50 10"  METHODS="lort rbl"  JOBS=4 (runs at a time)  OUT=runs (below this folder)
#   FLAGS="--epochs 2" OUT=runs/quick     flags for every run; runs with other flags need another folder
#
# A finished run is not made again, an interrupted one goes on where it was, and a failing one does not stop the others.
set -uf  # f: words are split, but never taken for file patterns
cd "$(dirname "$0")" || exit 2
refuse() { echo "error: $1" >&2; exit 2; }

usage="usage: bash run_all.sh [synthetic | cifar10 | cifar100 | one-protocol]"
(($# <= 1)) || refuse "$usage"
protocol=${1:-synthetic} dataset=$protocol shared="--eval-every 5" rbl="" lort="" hinge="" default_seeds="0 1 2" largest=500
case $protocol in
    synthetic) shared="" default_seeds=0 largest=250 ;;
    cifar10) largest=5000 ;;
    cifar100) ;;
    one-protocol)
        dataset=cifar100 rbl="--augment crop" lort="--init he" hinge="--pad 4"
        shared="$shared --backbone resnet34 --epochs 200 --batch-size 128 --val-per-class 20" ;;
    *) refuse "$usage" ;;
esac
SEEDS=${SEEDS-$default_seeds} IMB=${IMB-100} FLAGS=${FLAGS-} OUT=${OUT-runs}/$protocol
METHODS=${METHODS-rbl ewb_fdr lwr lort hinge_ce}
JOBS=${JOBS-$([[ $protocol == synthetic ]] && nproc || echo 1)}

python=$(command -v python || command -v python3) || refuse "there is no python: activate the environment first"
[[ $JOBS =~ ^[1-9][0-9]?$ ]] || refuse "JOBS=$JOBS: a number of runs, from 1 to 99"
[[ $SEEDS =~ [^[:space:]] && $IMB =~ [^[:space:]] && $METHODS =~ [^[:space:]] ]] || refuse "SEEDS, IMB or METHODS is empty"
[[ ! $OUT =~ [[:space:]] ]] || refuse "OUT: a path without spaces is needed, not $OUT"
for seed in $SEEDS; do
    [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] || refuse "SEEDS are whole numbers, not $seed"
done
for factor in $IMB; do
    [[ $factor =~ ^[1-9][0-9]*$ ]] || refuse "IMB: factors are whole numbers from 1 on, not $factor"
done
for name in $METHODS; do
    [[ -f methods/$name.py && $name != */* ]] || refuse "METHODS: there is no methods/$name.py"
done
for flag in $FLAGS; do
    [[ $flag =~ ^--(seed|imb-factor|dataset|out|help)(=|$) ]] && refuse "FLAGS cannot have ${flag%%=*}: the data set is the argument; SEEDS, IMB and OUT are the rest"
done
mkdir -p "$OUT/logs" 2> /dev/null || refuse "OUT: cannot write to $OUT"
exec 9> "$OUT/logs/lock" && flock -n 9 || refuse "run_all.sh is at work in $OUT already"
: > "$OUT/logs/failed"
((JOBS == 1)) || export OMP_NUM_THREADS=$((($(nproc) + JOBS - 1) / JOBS))
trap 'trap - INT TERM; kill 0' INT TERM  # stops the runs too

run() {  # run SCRIPT FLAGS...: one run of this seed and imbalance factor
    local words="methods/$1.py ${*:2} $shared --dataset $dataset --imb-factor $factor --seed $seed"
    local log="$OUT/logs/$(tr -cs 'a-z0-9.\n' '-' <<< "$1 ${*:2} if$factor seed$seed").txt" began=$SECONDS
    [[ " $METHODS " == *[[:space:]]"$1"[[:space:]]* ]] || return
    echo "started:  $words"
    if "$python" $words --out "$OUT" $FLAGS > "$log" 2>&1; then
        echo "finished: $words ($((SECONDS - began)) s)"
    else
        echo "FAILED:   $words: $(tail -n 1 "$log")" | tee -a "$OUT/logs/failed"
    fi
}

weight_balancing() {  # the first stage of wb is the wd run: the same recipe, so the same weights; LORT's Table 1 starts from it too
    run ewb_fdr --variant wd
    local stage1="$OUT/ewb_fdr-wd-$dataset-if$factor-seed$seed/weights.pt"
    run ewb_fdr --variant wb --stage1 "$stage1"
    run ewb_fdr --variant wb --stage1 "$stage1" --cb-loss ce
    [[ ! -f $stage1 ]] || run lort --retrain all --stage1 "$stage1"
}

begin() {  # begin COMMAND...: in the background, when fewer than JOBS are at work
    while (($(jobs -rp | wc -l) >= JOBS)); do wait -n; done
    "$@" &
}

for seed in $SEEDS; do
    for factor in $IMB; do
        begin weight_balancing
        for variant in ce cb etf fr-etf; do begin run ewb_fdr --variant $variant; done
        begin run lort $lort
        for head in linear fixed rbl; do begin run rbl --head $head $rbl; done
        for base in bs ce-drw focal la; do
            begin run lwr --base $base --strength 0
            begin run lwr --base $base
        done
        for variant in ce ce-etf; do begin run hinge_ce --variant $variant $hinge; done
        ((largest / factor > 50)) || begin run hinge_ce --variant hinge $hinge  # else no class is small enough for a cone
    done
done
wait
"$python" common.py "$OUT"
if [[ -s $OUT/logs/failed ]]; then
    echo "error: these runs failed, their logs are in $OUT/logs:" >&2
    cat "$OUT/logs/failed" >&2
    exit 1
fi

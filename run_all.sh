#!/usr/bin/env bash
# Every method with its baselines, then one table.
#
#   bash run_all.sh                  the generated data set: minutes on a CPU, nothing to download
#   bash run_all.sh cifar100         the papers' recipes on CIFAR-100-LT (or cifar10); wants a GPU
#
#   SEEDS="0 1 2"   IMB="100 50 10"   JOBS=4 (runs at a time)   OUT=runs   FLAGS="--epochs 2" (for every run)
#
# A finished run is not run again, an interrupted one goes on; a failing run does not stop the others.
set -u
cd "$(dirname "$0")"
dataset=${1:-synthetic}
case "$dataset" in
    synthetic) seeds="0" ;;
    cifar10 | cifar100) seeds="0 1 2" ;;
    *) echo "error: usage: bash run_all.sh [synthetic | cifar10 | cifar100]" >&2; exit 2 ;;
esac
read -ra seeds <<< "${SEEDS:-$seeds}"
read -ra factors <<< "${IMB:-100}"
read -ra flags <<< "${FLAGS:-}"
jobs=${JOBS:-1} out=${OUT:-runs}/$dataset
mkdir -p "$out" || exit 2

runs=(
    "hinge_ce.py --variant ce" "hinge_ce.py --variant ce-etf" "hinge_ce.py --variant hinge"
    "lwr.py --base bs --strength 0" "lwr.py --base bs" "lwr.py --base ce-drw --strength 0" "lwr.py --base ce-drw"
    "lwr.py --base focal --strength 0" "lwr.py --base focal" "lwr.py --base la --strength 0" "lwr.py --base la"
    "rbl.py --head linear" "rbl.py --head fixed" "rbl.py --head rbl"
    "ewb_fdr.py --variant ce" "ewb_fdr.py --variant cb" "ewb_fdr.py --variant wd"
    "ewb_fdr.py --variant wb" "ewb_fdr.py --variant wb --cb-loss ce" "ewb_fdr.py --variant etf" "ewb_fdr.py --variant fr-etf"
    "lort.py"
)

#!/usr/bin/env bash
# Trains Senri on DATASET in the background: what every colab_train_<dataset>.sh runs.
#
#   colab_train.sh DATASET [--dry-run] [--repo URL] [--ref NAME] [--folder DIR] [--log FILE] [--python EXE]
#                  [any option of: newllm train senri]
#
# The code is fetched into DIR unless this script lies in a checkout. The training goes on when the cell or the
# shell ends; stopping it saves a checkpoint, and the same line started again goes on from there.
set -euo pipefail

repo=https://github.com/newllm/newllm
ref=main
folder=newllm
python=python3
log=
dry_run=

if [[ $# -eq 0 || $1 == -* ]]; then
    echo "colab_train.sh: the first word must be a dataset, such as wikitext-2" >&2
    exit 2
fi
dataset=$1
shift

options=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry_run=yes ;;
        --repo | --ref | --folder | --log | --python)
            if [[ $# -lt 2 ]]; then
                echo "colab_train.sh: $1 needs a value" >&2
                exit 2
            fi
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        *) options+=("$1") ;;
    esac
    shift
done
log=${log:-train-$dataset.log}

run() {
    if [[ -n $dry_run ]]; then
        printf 'would run:'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

own=${BASH_SOURCE[0]:-}
if [[ -f $own && -f $(dirname "$own")/../pyproject.toml ]]; then
    folder=$(cd "$(dirname "$own")/.." && pwd)
elif [[ -d $folder/.git ]]; then
    run git -C "$folder" fetch --quiet --depth 1 origin "$ref"
    run git -C "$folder" reset --quiet --hard FETCH_HEAD
else
    run git clone --quiet --depth 1 --branch "$ref" "$repo" "$folder"
fi
run "$python" -m pip install --quiet "$folder"

command=("$python" -m newllm train senri --preset colab --data "$dataset" --out "runs/$dataset" --resume
    ${options[@]+"${options[@]}"})
if [[ -n $dry_run ]]; then
    run nohup "${command[@]}"
    exit 0
fi
# An option that is wrong is told here, in one sentence, and not in a log.
"${command[@]}" --print_config >/dev/null

nohup "${command[@]}" >"$log" 2>&1 </dev/null &
pid=$!
echo $pid >"${log%.log}.pid"
sleep 10
tail -n 30 "$log"
echo
echo "monitor: tail -f $log"
echo "stop:    kill $pid        (saves a checkpoint; the same line again goes on from it)"
echo "results: runs/$dataset"

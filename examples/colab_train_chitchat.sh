#!/usr/bin/env bash
# curl -fsSL https://raw.githubusercontent.com/newllm/newllm/main/examples/colab_train_chitchat.sh | bash -s -- --train.steps 1000
set -euo pipefail
if [[ -f ${BASH_SOURCE[0]:-} ]]; then
    exec bash "$(dirname "${BASH_SOURCE[0]}")/colab_train.sh" chitchat "$@"
fi
curl -fsSL https://raw.githubusercontent.com/newllm/newllm/main/examples/colab_train.sh | bash -s -- chitchat "$@"

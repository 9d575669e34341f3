#!/usr/bin/env bash
# PDD+IDC on CIFAR-100, 10 images per class in 5 stages; distillation, evaluation. See --help.
set -eu
exec python "$(dirname "$0")/reproduce.py" cifar100-idc-ipc10 "$@"

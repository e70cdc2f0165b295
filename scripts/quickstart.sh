#!/usr/bin/env bash
# Creates .venv if it is missing. Then, on handwritten digits:
#
# 1. makes the ViTs of two learngenes of this repository, and measures them: less than half a minute;
# 2. trains a learngene of each method from nothing, and compares their ViTs with the same ViTs from scratch
#    (configs/study_quickstart.yaml): two and a half minutes on two cores.
#
# The results are in output/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=output/quickstart

scripts/setup.sh
.venv/bin/python scripts/make_family.py --load-gene digits-elastic digits-lets-plus --depths 1-4 --heads 1,2 \
    --data-set DIGITS --output-dir $out/family
sed '/^$/q' $out/family/family.md
echo "Look at $out/family/family.html in a browser, or at family.png beside it. Now from nothing:"

.venv/bin/python scripts/study.py configs/study_quickstart.yaml --seeds 0 --output $out --results $out/results
.venv/bin/python scripts/study_report.py $out/results/quickstart
cat $out/results/quickstart/summary.md
echo "More tables and plots are in $out/results/quickstart, the runs in $out/quickstart."

#!/usr/bin/env bash
# Distill a teacher into one step, judge it, and write what came of it: a few minutes on two cores.
set -euo pipefail
OUT=${1:-runs/example}

# `digits` is the embedded teacher; yours is a diffusers folder or a hub id. Without --preset, settings come from the teacher.
diffdistill train --method dmd2 --teacher digits --preset digits --out "$OUT"

diffdistill eval "$OUT"                          # the student beside its teacher at 1 to 32 steps: table and picture
diffdistill report "$OUT"                        # all of the run as one HTML file: $OUT/report.html
diffdistill sample "$OUT" --out "$OUT/samples.png"
diffdistill export "$OUT" --out "$OUT/to-keep"   # the student's folder, from the last checkpoint, to copy or to publish

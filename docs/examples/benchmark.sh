#!/usr/bin/env bash
# Is the student faster, is it as good, and how do other methods do on the same budget? A few minutes on two cores.
set -euo pipefail
RUN=${1:-runs/example}

diffdistill speed "$RUN" --out runs/example-speed
diffdistill compare digits "$RUN" --steps 16 --out runs/example-compare
# Two methods (three students), one seed, a small budget; without these options it is the whole board, which takes hours.
diffdistill bench --suite digits --methods dmd2,consistency --seed 0 --budget 200 --out runs/example-bench

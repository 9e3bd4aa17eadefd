#!/usr/bin/env bash
# Train on one machine: bash jobs/local.sh [mpitrain's arguments]

# ---- site: what differs from machine to machine ----
ranks=${RANKS:-4}          # processes; more than cores works, but is not faster
python=${PYTHON:-python3}  # of the environment that mpitrain is installed in
mpirun=${MPIRUN:-mpirun}   # of the same MPI that this environment uses
run=${RUN:-runs/local}     # everything the run writes, and what it is resumed from

# ---- the same in every job script ----
set -euo pipefail

# exec: the launcher takes the place of this script, so that the script's exit code is mpitrain's (75: stopped
# cleanly, start me again) and `kill -USR1` of the script's process asks the run to save a checkpoint and stop.
# A fixed --out: the same command, started again, goes on from the newest checkpoint in it.
exec "$mpirun" -np "$ranks" "$python" -m mpitrain --out "$run" "$@"

#!/usr/bin/env bash
# Train under Slurm, start after start until done: sbatch jobs/slurm.sh [mpitrain's arguments]
# `python -m mpitrain job --scheduler slurm ...` writes this script with the lines of the site part filled in.

# ---- site: what differs from cluster to cluster; ## in front of SBATCH is a line that is not in use ----
#SBATCH --job-name=mpitrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
##SBATCH --gpus-per-node=4
##SBATCH --account=PROJECT
##SBATCH --partition=QUEUE
#SBATCH --time=02:00:00
# So many seconds before the end (Slurm may be a minute early) USR1 comes to this script (B:), which passes it on.
#SBATCH --signal=B:USR1@180
# Allow `scontrol requeue` below, and have all starts of the job write to one file.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
# module load ...      # what was loaded when mpitrain was installed, unless sbatch passes the environment on (it does)
python=python3        # of the environment that mpitrain is installed in
mpi=mpich             # the family of its MPI library: mpich, intel, openmpi or cray
data=sample           # what to train on, as --data has it
run=runs/job          # everything the run writes, and what the next start goes on from
local_disk=           # a directory on each node's own disk, to copy the shards to; empty: they stay where they are
arguments=()          # mpitrain's other arguments

# By the process management interface of the MPI library; if it is not the right one, mpitrain says so and refuses.
case $mpi in
    openmpi) interface=(--mpi=pmix) ;;
    mpich | intel) interface=(--mpi=pmi2) ;;
    *) interface=() ;; # the site's own choice
esac
cores=${SLURM_CPUS_PER_TASK:-1}
# --kill-on-bad-exit: a rank that was killed takes the others along. --cpus-per-task: srun is told again, since 22.05.
launch=(srun --kill-on-bad-exit=1 --cpu-bind=cores --cpus-per-task="$cores" "${interface[@]}")
once_per_node=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none)
again=(scontrol requeue "$SLURM_JOB_ID")

# ---- the same in every scheduler's script ----
case $python in */*) PATH=${python%/*}:$PATH ;; esac # an MPI from a wheel has its launcher beside Python
export OMP_NUM_THREADS=$cores

# One copy on each node, whole or not there, and of its own name for other data: thousands of ranks that read the same
# files ask much of a shared file system. Signals end the job here, and no other start follows: one whose time is over
# before the first step would come back for ever.
if [ -n "$local_disk" ]; then
    [ -f "$data/dataset.json" ] || { echo "error: local_disk is for prepared shards; $data holds none" >&2; exit 64; }
    name=$(sha256sum <"$data/dataset.json")
    # shellcheck disable=SC2016 # the nodes' shells expand this
    "${once_per_node[@]}" bash -c '[ -f "$2/dataset.json" ] ||
        { mkdir -p "${2%/*}" && cp -r "$1" "$2.$$" && mv -T "$2.$$" "$2" 2>/dev/null; } ||
        { rm -rf "$2.$$" && [ -f "$2/dataset.json" ]; }' \
        copy "$(realpath "$data")" "$local_disk/mpitrain-${name%% *}" ||
        { echo "error: local_disk: $local_disk takes no copy on some node; another, or none, would work" >&2; exit 64; }
    data=$local_disk/mpitrain-${name%% *}
fi

# Which exit.json there is: that of the start before stays until this one has begun.
left() { [ ! -f "$run/exit.json" ] || stat -c '%i %z' "$run/exit.json"; }
before=$(left)

# In the background, because a shell minds signals only between commands and in `wait`.
"${launch[@]}" "$python" -m mpitrain --data "$data" --out "$run" "${arguments[@]}" "$@" &
launcher=$!
trap 'kill -USR1 "$launcher" 2>/dev/null || true' USR1
# A signal ends `wait` early, with a code of its own; the launcher's is what the last `wait` tells.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done
wait "$launcher" && code=0 || code=$?

# Who is slow to leave may be killed by the launcher, whose code then is of that; what the run has left counts.
case $code in
    0 | 64 | 65 | 66 | 70 | 75 | 93) ;;
    *)
        after=$(left)
        [ -z "$after" ] || [ "$after" = "$before" ] ||
            code=$(sed -n 's/^ "code": \([0-9]*\),$/\1/p' "$run/exit.json" | grep . || echo "$code")
        ;;
esac

# 75 is a checkpoint and time for another start. All other codes end it: done (0), to be looked into (64, 65, 66, 70),
# no progress in three starts (93), or the launcher's own.
echo "job script: mpitrain has left with code $code" >&2
[ "$code" -eq 75 ] || exit "$code"
"${again[@]}" || echo "error: cannot be started again from here (${again[*]}); submit it once more by hand" >&2
exit 75

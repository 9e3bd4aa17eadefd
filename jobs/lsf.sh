#!/usr/bin/env bash
# Train under LSF, start after start until done: bsub < jobs/lsf.sh
# `python -m mpitrain job --scheduler lsf ...` writes this script with the lines of the site part filled in. A script
# that comes by standard input has no arguments: they are written below.

# ---- site: what differs from cluster to cluster; ## in front of BSUB is a line that is not in use ----
#BSUB -J mpitrain
#BSUB -n 8
#BSUB -R "span[ptile=4] affinity[core(1)]"
# Where jsrun starts ranks, whole nodes are asked for instead of -n and -R.
##BSUB -nnodes 2
##BSUB -gpu "num=4"
##BSUB -P PROJECT
##BSUB -q QUEUE
#BSUB -W 02:00
# So many minutes before the end USR1 comes to the job. It may reach the launcher twice, from LSF and from this script;
# one is as good as two.
#BSUB -wa USR1
#BSUB -wt 3
# LSF itself starts a job again that leaves with 75. It keeps the output of the last start only (-o), so all goes to a
# file of ours.
#BSUB -Q 75
#BSUB -o mpitrain-%J.lsf

set -euo pipefail
exec >>"mpitrain-$LSB_JOBID.out" 2>&1
# module load ...      # what was loaded when mpitrain was installed, unless bsub passes the environment on (it does)
python=python3        # of the environment that mpitrain is installed in
mpi=mpich             # the family of its MPI library: mpich, intel, openmpi, or spectrum (jsrun)
data=sample           # what to train on, as --data has it
run=runs/job          # everything the run writes, and what the next start goes on from
local_disk=           # a directory on each node's own disk, to copy the shards to; empty: they stay where they are
arguments=()          # mpitrain's other arguments
nodes=2               # as above: LSF does not tell all of it
per_node=4
cores=1

ranks=$((nodes * per_node))
case $mpi in
    openmpi)
        launch=(mpirun -np "$ranks" --map-by "ppr:$per_node:node:PE=$cores")
        once_per_node=(mpirun -np "$nodes" --map-by ppr:1:node)
        ;;
    spectrum)
        node=(jsrun --nrs "$nodes" --rs_per_host 1 --cpu_per_rs ALL_CPUS --gpu_per_rs ALL_GPUS)
        launch=("${node[@]}" --tasks_per_rs "$per_node" --bind "packed:$cores")
        once_per_node=("${node[@]}" --tasks_per_rs 1)
        ;;
    *)
        [ "$mpi" = mpich ] && bind=(-bind-to "core:$cores") || bind=() # Intel's binds by itself
        launch=(mpiexec -n "$ranks" -ppn "$per_node" "${bind[@]}")
        once_per_node=(mpiexec -n "$nodes" -ppn 1)
        ;;
esac
again=(true) # see -Q

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

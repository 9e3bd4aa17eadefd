#!/usr/bin/env bash
# Train under PBS, job after job until done: qsub jobs/pbs.sh
# `python -m mpitrain job --scheduler pbs ...` writes this script with the lines of the site part filled in. qsub takes
# no arguments for scripts: they are written below.

# ---- site: what differs from cluster to cluster; ## in front of PBS is a line that is not in use ----
#PBS -N mpitrain
# Of each node: cores, ranks, cores of a rank; behind them :ngpus=4, say.
#PBS -l select=2:ncpus=4:mpiprocs=4:ompthreads=1
#PBS -l place=scatter
##PBS -A PROJECT
##PBS -q QUEUE
#PBS -l walltime=02:00:00
#PBS -j oe
# The environment of qsub, and with it the modules that are loaded.
#PBS -V

set -euo pipefail
# module load ...      # what was loaded when mpitrain was installed, where -V is not wanted
python=python3        # of the environment that mpitrain is installed in
mpi=mpich             # the family of its MPI library: mpich, intel, openmpi or cray
data=sample           # what to train on, as --data has it
run=runs/job          # everything the run writes, and what the next job goes on from
local_disk=           # a directory on each node's own disk, to copy the shards to; empty: they stay where they are
arguments=()          # mpitrain's other arguments

cd "$PBS_O_WORKDIR"
ranks=$(wc -l <"$PBS_NODEFILE") # a line a rank
nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
per_node=$((ranks / nodes))
cores=${OMP_NUM_THREADS:-1} # PBS sets it to ompthreads
case $mpi in
    openmpi)
        launch=(mpirun -np "$ranks" --map-by "ppr:$per_node:node:PE=$cores")
        once_per_node=(mpirun -np "$nodes" --map-by ppr:1:node)
        ;;
    cray)
        launch=(mpiexec -n "$ranks" --ppn "$per_node" --depth "$cores" --cpu-bind depth)
        once_per_node=(mpiexec -n "$nodes" --ppn 1)
        ;;
    *)
        [ "$mpi" = mpich ] && bind=(-bind-to "core:$cores") || bind=() # Intel's binds by itself
        launch=(mpiexec -n "$ranks" -ppn "$per_node" "${bind[@]}")
        once_per_node=(mpiexec -n "$nodes" -ppn 1)
        ;;
esac
# A new job of the same script, of which PBS runs a copy, $0: qrerun is for operators. PBS warns nobody before the end
# of the time; mpitrain asks qstat for it. `qsig -s SIGUSR1 JOB` asks for a checkpoint and another job at any time.
again=(qsub "$0")

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

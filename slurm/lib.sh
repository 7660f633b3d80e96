# What the batch scripts share; sourced by them.
#
# A run is asked to stop through its stop file: a signal to `accelerate launch` would kill the launcher
# and orphan the ranks. Two minutes before the time limit SLURM sends USR1 to the batch script
# (#SBATCH --signal=B:USR1@120), at preemption TERM. How it ended stands in the run's summary.json.

say() { echo "$(date '+%F %T') job ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}: $*"; }
fail() { echo "error: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "submit this with sbatch; without SLURM run accelerate launch yourself"
cd "$SLURM_SUBMIT_DIR" || exit 2
[ -f sami/pretrain.py ] || fail "$PWD is not the project's folder; submit from there"
SITE=${SAMI_SITE:-slurm/site.env}
[ -f "$SITE" ] || fail "$SITE does not exist; cp slurm/site.env.example slurm/site.env and edit it"
# shellcheck disable=SC1090
source "$SITE"
sami_setup || fail "sami_setup in $SITE failed"

# The job's output goes under a folder, one file per job and task, restarts behind each other.
log_to() {
  mkdir -p "$1" || fail "$1 cannot be made"
  local log="$1/slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}.log"
  echo "the output goes to $log"
  exec >>"$log" 2>&1
  say "on ${SLURM_JOB_NODELIST}, restart ${SLURM_RESTART_COUNT:-0}"
}

# The value of run.dir of an entry's command line.
run_folder() {
  python "$@" --print_config | python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run"]["dir"])'
}

# What summary.json says: status and exit code.
told() {
  python - "$1/summary.json" <<'P'
import json, sys
try:
    told = json.load(open(sys.argv[1]))
except (OSError, ValueError):
    told = {}
print(told.get("status", "nothing"), told.get("exit_code"))
P
}

# Wait for a process whatever signals come; its exit code.
await() {
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1"
}

# Ask the run in a folder to stop, every two seconds until a process has ended: one that is still
# starting has no folder yet, or takes the stop file away as an old one.
ask() {
  asked=$3
  say "$asked: asked to stop"
  while kill -0 "$2" 2>/dev/null; do
    [ ! -d "$1" ] || touch "$1/stop"
    sleep 2
  done &
}

# Have `ask FOLDER PID` called when SLURM wants the node back.
ask_when_told() {
  asked=
  # shellcheck disable=SC2064
  trap "ask '$1' $2 'the time limit comes near'" USR1
  # shellcheck disable=SC2064
  trap "ask '$1' $2 'taken away, by a requeue or a cancellation'" TERM
}

# Queue this job again; it goes on where it is. A job that is no longer running was taken away: SLURM
# starts it again itself, unless it was cancelled.
requeue() {
  local id job
  id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
  job=$(scontrol -o show job "$id")
  [[ $job != *PreemptTime=[0-9]* ]] || asked=preempted
  if [[ $job == *JobState=RUNNING* ]]; then
    scontrol requeue "$id" || { say "it could not be requeued; the same sbatch goes on"; exit 75; }
    say "${asked:-asked to stop by hand}: requeued, it will go on where it is"
  else
    say "${asked:-taken away}: SLURM starts it again, unless it was cancelled; it will go on where it is"
  fi
  exit 0
}

# What the other nodes reach a node by: its name, or the address that SLURM has for it.
address_of() {
  if getent hosts "$1" >/dev/null; then echo "$1"; else scontrol -o show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; fi
}

# Start an entry on all nodes of the job, one launcher on each.
launch() {
  local nodes=${SLURM_JOB_NUM_NODES:-1} each=${SAMI_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  local head port=${SAMI_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  head=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
  local words=(--num_machines "$nodes" --num_processes $((nodes * each)) --mixed_precision no --dynamo_backend no)
  [ $((nodes * each)) -eq 1 ] || words+=(--multi_gpu)
  [ "$nodes" -eq 1 ] || words+=(--main_process_ip "$head" --rdzv_backend static)
  words+=(--main_process_port "$port")
  export SAMI_LAUNCH="accelerate launch ${words[*]}"
  srun --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c '$SAMI_LAUNCH --machine_rank "$SLURM_NODEID" "$@"' launch "$@"
}

# Train: start, pass requests to stop on, and decide how the job ends.
train() {
  local run pid code status exit_code i
  run=$(run_folder "$@") || fail "the command line above is not right: $*"
  log_to "$run/slurm"
  [ "$(told "$run")" != "running None" ] ||
    say "the start before was cut off: killed, requeued from outside, or its node was lost"
  touch "$run/slurm/started"
  launch "$@" &
  pid=$!
  ask_when_told "$run" $pid
  await $pid
  code=$?
  status=nothing
  # After TERM the ranks, which had it too, may still be writing their checkpoint.
  for ((i = 0; i < 60; i++)); do
    [ ! "$run/summary.json" -nt "$run/slurm/started" ] || read -r status exit_code <<<"$(told "$run")"
    [ "$status" = running ] && [ -n "$asked" ] || break
    sleep 1
  done
  say "left with $code; summary.json: $status, exit code ${exit_code:-None}"
  case "$status ${exit_code:-}" in
    "finished 0") say finished; exit 0 ;;
    "interrupted 75") requeue ;;
    "failed 2") say "failed for good: mend what stands above, and submit it again"; exit 2 ;;
    "failed "*) say "crashed: the traceback stands above; the same sbatch goes on from the last checkpoint"; exit 1 ;;
    *) say "ended without a word, as by a kill; the same sbatch goes on from the last checkpoint"; exit 1 ;;
  esac
}

# What the batch scripts share; sourced by them.
#
# A run is asked to stop through its stop file: a signal to `accelerate launch` would kill the launcher
# and orphan the ranks. Two minutes before the time limit SLURM sends USR1 to the batch script
# (#SBATCH --signal=B:USR1@120), when it takes the node back TERM. How a run ended stands in its
# summary.json.

LATE="the time limit comes near" TAKEN="taken away, by a requeue or a cancellation"
asked= # why the job is to end
# Noted until there is something to ask: reading the options takes seconds, and a signal that nobody
# waits for ends the job.
trap 'asked=$LATE' USR1
trap 'asked=$TAKEN' TERM
shared= # of a sweep: the folder beside whose runs the stages are that they share
id=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

say() { echo "$(date '+%F %T') job $id: $*"; }
fail() { echo "error: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "submit this with sbatch; without SLURM run accelerate launch yourself"
cd "$SLURM_SUBMIT_DIR" || exit 2
SITE=${SAMI_SITE:-slurm/site.env}
[ -f "$SITE" ] || fail "$SITE does not exist; cp slurm/site.env.example slurm/site.env and edit it"
# shellcheck disable=SC1090
source "$SITE"
sami_setup || fail "sami_setup in $SITE failed"
[ -f sami/pretrain.py ] || python -c 'import sami.core.shipped' 2>/dev/null ||
  fail "$PWD is not the project's folder, and sami is not installed; submit from there or install it"

# A file of the project by its name, in this folder or in the installed package.
shipped() {
  if [ -e "$1" ]; then echo "$1"; else
    python -c 'import sys; from sami.core.shipped import shipped; print(shipped(sys.argv[1]))' "$1"
  fi
}

# The job's output goes to slurm/ in a folder, one file per job and task, restarts behind each other.
log_to() {
  folder=$1
  mkdir -p "$folder/slurm" || fail "$folder/slurm cannot be made"
  log=$folder/slurm/slurm-$id.log
  started=$folder/slurm/.started-$id
  touch "$log" "$started"
  began=$(wc -c <"$log")
  echo "the output goes to $log"
  exec >>"$log" 2>&1
  say "on ${SLURM_JOB_NODELIST}, restart ${SLURM_RESTART_COUNT:-0}"
}

# What a program of ours said last that its user can mend, since this start.
sentence() { tail -c +$((began + 1)) "$log" | sed -nE 's/^(rank [0-9]+: )?error: //p' | tail -n 1; }

# Whether this start has finished something: a checkpoint, a stage, a shard; a sweep's run also one that
# it shares with others ($shared/STAGE/checkpoints/step-N), whoever made it.
progressed() {
  [ -n "$(find "$folder" ${shared:+"$shared"/*/checkpoints "$shared"/*/done.json} -newer "$started" \
    \( -name 'step-*' -o -name done.json -o -name '*.tar' \) -print -quit 2>/dev/null)" ]
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

# Ask the run in the folder to stop, every two seconds until process $1 has ended: one that is still
# starting has no folder yet, or takes the stop file away as an old one. A run that is in something long,
# such as an evaluation, is requeued as it is before the time is over.
ask() {
  local end
  say "$asked: asked to stop"
  end=$(squeue -h -j "$SLURM_JOB_ID" -o %e)
  end=$(date -d "${end:-none}" +%s 2>/dev/null) || end=$(($(date +%s) + 120))
  while kill -0 "$1" 2>/dev/null; do
    touch "$folder/stop"
    if [ "$asked" = "$LATE" ] && [ "$(date +%s)" -gt $((end - 20)) ]; then
      say "it has not stopped in time"
      requeue
    fi
    sleep 2
  done &
}

ask_when_told() {
  pid=$1
  trap 'asked=$LATE; ask "$pid"' USR1
  trap 'asked=$TAKEN; ask "$pid"' TERM
  [ -z "$asked" ] || ask "$pid"
}

# Queue this job again; it goes on where it is. A job that is no longer running was taken away: SLURM
# starts it again itself, unless it was cancelled.
requeue() {
  local job=
  if [ "$asked" = "$LATE" ] && ! progressed; then
    say "nothing was finished since this start, no checkpoint, stage or shard: not requeued; give it more time"
    exit 1
  fi
  for _ in 1 2 3 4 5; do
    job=$(scontrol -o show job "$id") && break
    sleep 5
  done
  [[ $job != *PreemptTime=[0-9]* ]] || asked=preempted
  if [ -n "$job" ] && [[ $job != *JobState=RUNNING* ]]; then
    say "${asked:-taken away}: SLURM starts it again, unless it was cancelled; it will go on where it is"
    exit 0
  fi
  scontrol requeue "$id" || { say "it could not be requeued; the same sbatch goes on"; exit 75; }
  say "${asked:-asked to stop}: requeued, it will go on where it is"
  exit 0
}

# What the other nodes reach a node by: its name, or the address that SLURM has for it.
address_of() {
  if getent hosts "$1" >/dev/null; then echo "$1"; else scontrol -o show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; fi
}

# The launcher's words for some nodes, with what the site asks for on each. With a configuration of ours,
# so that nobody's own default is taken.
launcher() {
  local each=${SAMI_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} config=gpu
  [ $(($1 * each)) -eq 1 ] || config=gpu_8
  echo "accelerate launch --config_file $(shipped configs/accelerate/$config.yaml) --num_machines $1" \
    "--num_processes $(($1 * each)) --main_process_port ${SAMI_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
}

# Start an entry on all nodes of the job, one launcher on each.
launch() {
  local nodes=${SLURM_JOB_NUM_NODES:-1}
  SAMI_LAUNCH=$(launcher "$nodes")
  [ "$nodes" -eq 1 ] ||
    SAMI_LAUNCH+=" --rdzv_backend static --main_process_ip $(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")"
  export SAMI_LAUNCH
  # srun does not take the cores over from sbatch, since SLURM 22.05.
  srun --export=ALL --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    bash -c '$SAMI_LAUNCH --machine_rank "$SLURM_NODEID" "$@"' launch "$@"
}

# Train: start, pass requests to stop on, and decide how the job ends.
train() {
  local run code status exit_code words
  set -- "$(shipped "$1")" "${@:2}"
  run=$(run_folder "$@") || fail "the command line above is not right: $*"
  log_to "$run"
  [ "$(told "$run")" != "running None" ] ||
    say "the start before was cut off: killed, requeued from outside, or its node was lost"
  launch "$@" &
  ask_when_told $!
  await $pid
  code=$?
  # After TERM the ranks, which had it too, may still be writing their checkpoint.
  for _ in {1..60}; do
    status=nothing exit_code=
    [ $code -ne 0 ] && [ ! "$run/summary.json" -nt "$started" ] || read -r status exit_code <<<"$(told "$run")"
    [ "$status" = running ] || break
    [ -n "$asked" ] || squeue -h -s -j "$SLURM_JOB_ID" -o %i | grep -qE '\.[0-9]+$' || break
    sleep 1
  done
  say "left with $code; summary.json: $status, exit code ${exit_code:-None}"
  words=$(sentence)
  case "$status ${exit_code:-}" in
    "finished 0") say finished; exit 0 ;;
    "interrupted 75") requeue ;;
    "failed 2") say "failed for good: ${words:-see above}"; exit 2 ;;
    "failed "*) say "crashed: the traceback stands above; the same sbatch goes on from the last checkpoint"; exit 1 ;;
  esac
  [ -z "$words" ] || { say "failed for good: $words"; exit 2; }
  [ -z "$asked" ] || requeue
  say "ended without a word, as by a kill; the same sbatch goes on from the last checkpoint"
  exit 1
}

#!/usr/bin/env bash
# Trains on a slice of a TPU pod: creates it, copies this code to all its hosts,
# starts the run, follows it, and deletes the slice. Every command is printed
# before it runs; --dry-run prints them alone, and when each would run.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: reference/launch_tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION ...]
           [-- FLAG ...]

Commands:
  run      create, copy, start, follow. After a preemption: the same command.
  create   ask for the slice, and wait until it is there.
  copy     copy the code to every host, into a new folder conadv_optax.XXXXXX,
           and install what it needs. Nothing is removed.
  start    start a process on every host, with the flags after --.
  follow   show the log of the first host until the run ends.
  stop     save a checkpoint and end the run.
  delete   give the slice back. What is on its disks is lost.

Options:
  --type=TYPE        for run and create: v3-1024, v4-512, v5litepod-256, ...
  --runtime=VERSION  of the hosts' software; by default the one for JAX on TYPE.
  --project=PROJECT  by default that of the gcloud configuration.
  --spot             a slice that costs less and may be taken away.
  --setup=COMMAND    for run and copy: what every host does first, such as to
                     mount the storage that holds the data and --workdir. It is
                     repeated on a slice that is still there.
  --packages-before=DATE
                     for run and copy: install what was the newest when that day
                     began, so that the next slice gets the same versions.
  --dry-run          print the commands, run none.

Flags are those of reference.main. --workdir, on storage that all hosts share,
is among them; --distributed is added.

The status of run and follow is that of the training, and 255 where the slice or
the connection to it is lost. After 143, a stop, and after 255 the same command
goes on; after any other the log says what to mend first.
USAGE
}

# As ssh leaves where the connection is lost: the same command may yet succeed.
lost=255

fail() {
  printf 'launch_tpu_pod.sh: %s\n' "$1" >&2
  exit "${2:-2}"
}

# Prints a command as it could be typed, and runs it unless the run is dry.
show_and_do() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  if [[ -z $dry_run ]]; then
    "$@"
  fi
}

# True in a dry run, which goes every way and says when a real one would.
dry_if() {
  [[ -n $dry_run ]] && printf '# if %s:\n' "$1" >&2
}

queued() {
  local action=$1
  shift
  show_and_do gcloud compute tpus queued-resources "$action" "$name" "${place[@]}" "$@"
}

on_hosts() {
  show_and_do gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" \
    "--command=$2"
}

# JAX's software version for each generation, as Cloud TPU documents them.
runtime_of() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "no software version is known for --type=$1: add --runtime=VERSION" ;;
  esac
}

# Nothing where there is no such slice.
state() {
  local found
  found=$(queued describe '--format=value(state.state)') || true
  # It fails without a slice, and without an answer. To list all tells which.
  if dry_if 'that fails' || [[ -z $found ]]; then
    show_and_do gcloud compute tpus queued-resources list "${place[@]}" >&2 ||
      fail 'gcloud does not say whether the slice is there' "$lost"
  fi
  echo "$found"
}

# The state once it is none that passes by itself.
settled() {
  local found
  while found=$(state) || exit; do
    case $found in
      '' | ACTIVE | SUSPENDED | FAILED) break ;;
    esac
    echo "Waiting for the slice: $found" >&2
    sleep 30
  done
  echo "$found"
}

# Ends with the status of a failure, unless that came of losing the slice, which
# gcloud knows after a while.
end() {
  sleep 60
  [[ $(state) == ACTIVE ]] || fail 'the slice was taken away' "$lost"
  exit "$1"
}

create() {
  [[ -n $type ]] || fail "$command needs the size of the slice: --type=v3-1024"
  runtime=${runtime:-$(runtime_of "$type")}
  local found
  found=$(settled)
  if dry_if 'it was taken away' || [[ $found == SUSPENDED || $found == FAILED ]]; then
    queued delete --force --quiet
    [[ -n $dry_run ]] || found=$(settled)
  fi
  if dry_if 'there is none' || [[ -z $found ]]; then
    queued create "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$runtime" ${spot:+"$spot"}
    [[ -n $dry_run ]] || found=$(settled)
  fi
  case $dry_run$found in
    yes | ACTIVE) ;;
    SUSPENDED) fail 'the slice was taken away again' "$lost" ;;
    *) fail "the slice was not granted: ${found:-it is gone}" ;;
  esac
}

idle=3
is_running='kill -0 "$(cat train.pid)" 2>/dev/null'

# A step that fails ends it, also where its status is looked at.
copy() {
  local archive
  if [[ -z $dry_run ]]; then
    scratch=$(mktemp -d) || return
    trap 'rm -rf "$scratch"' EXIT
  fi
  archive=${scratch:-/tmp}/conadv_optax.tar.gz
  show_and_do tar -C "$root" -czf "$archive" --exclude=__pycache__ \
    conadv_optax reference pyproject.toml README.md LICENSE || return
  show_and_do gcloud compute tpus tpu-vm scp "$archive" "$name:conadv_optax.tar.gz" \
    "${place[@]}" --worker=all || return 2
  on_hosts all "set -e
if $is_running; then echo 'A run is under way: stop it first.'; exit 1; fi
${setup:-true}
code=\$(mktemp -d \"\$PWD/conadv_optax.XXXXXX\")
tar -C \"\$code\" -xzf conadv_optax.tar.gz
python3 -m pip install --user --quiet uv
test -d .venv || python3 -m uv venv --quiet --python=3.11 .venv
python3 -m uv pip install --quiet --python=.venv/bin/python \\
  ${before:+--exclude-newer=${before}T00:00:00Z} -e \"\$code[reference,tpu]\"
echo \"\$code\" > train.code"
}

start() {
  local program
  printf -v program ' %q' "${flags[@]}"
  on_hosts all "if $is_running; then echo 'A run is under way.'; exit 1; fi
rm -f train.pid train.status
nohup bash -c 'home=\$PWD; cd \"\$(cat train.code)\"
\"\$home\"/.venv/bin/python -m reference.main --distributed \"\$@\" &
echo \$! > \"\$home\"/train.pid; wait \$!
echo \$? > \"\$home\"/train.status' main$program \
> train.log 2>&1 < /dev/null &"
}

follow() {
  # A process without a status was cut off with its host, as a connection is.
  on_hosts 0 'until test -s train.pid; do sleep 1; done
tail -n +1 -f --pid="$(cat train.pid)" train.log
sleep 1; exit "$(cat train.status || echo '"$lost"')"'
}

stop() {
  on_hosts all 'kill -TERM "$(cat train.pid)"'
}

days=(0 31 28 31 30 31 30 31 31 30 31 30 31)

# By hand, as `date` differs between systems.
is_day() {
  [[ $1 =~ ^([0-9]{4})-([0-9]{2})-([0-9]{2})$ ]] || return
  local year=$((10#${BASH_REMATCH[1]})) month=$((10#${BASH_REMATCH[2]}))
  local last=${days[month]:-0}
  if ((month == 2 && (year % 4 == 0 && year % 100 != 0 || year % 400 == 0))); then
    last=29
  fi
  ((10#${BASH_REMATCH[3]} >= 1 && 10#${BASH_REMATCH[3]} <= last))
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run='' name='' zone='' project='' type='' runtime='' spot='' setup='' before=''
scratch=''
command=${1:-}
case $command in
  run | create | copy | start | follow | stop | delete) shift ;;
  -h | --help | help | '') usage && exit ;;
  *) fail "no command $command: run, create, copy, start, follow, stop, delete" ;;
esac
while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --setup=?*) setup=${1#*=} ;;
    --packages-before*)
      before=${1#*=}
      is_day "$before" || fail "no day: $1. As in --packages-before=2026-01-31"
      ;;
    --spot) spot=--spot ;;
    --dry-run) dry_run=yes ;;
    --) shift && break ;;
    *) fail "no option $1. Flags of reference.main come after --" ;;
  esac
  shift
done
flags=("$@")
[[ -n $name ]] || fail "$command needs the name of the slice: --name=conadv"
[[ -n $zone ]] || fail "$command needs a zone: --zone=europe-west4-a"
case " ${flags[*]-} " in
  *' --dry-run '*) fail '--dry-run comes before --' ;;
  *' --workdir=/'*) ;;
  *' --workdir='*)
    fail "the work folder begins with /, as hosts share no other: \
-- --workdir=/mnt/runs/1"
    ;;
  *)
    if [[ $command == run || $command == start ]]; then
      fail "$command needs where to keep the checkpoints, on storage that all \
hosts share: -- --workdir=/mnt/runs/1"
    fi
    ;;
esac
place=("--zone=$zone" ${project:+"--project=$project"})

case $command in
  run)
    create
    # Any other status says nothing of a run: the host was not reached.
    answer=0
    on_hosts 0 "$is_running || exit $idle" || answer=$?
    if dry_if "that exits with $idle, as no run is under way, copy and start" ||
      ((answer == idle)); then
      copy || end "$?"
      start || end "$?"
    elif ((answer)); then
      fail 'the first host does not answer' "$lost"
    fi
    follow || end "$?"
    ;;
  delete) queued delete --force --quiet ;;
  *) "$command" ;;
esac

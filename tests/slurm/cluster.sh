#!/usr/bin/env bash
# A SLURM of one's own: munged, slurmctld and two slurmd on 127.0.0.1, everything in one folder, as root or as any user.
#
#   cluster.sh start FOLDER    then: export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh stop FOLDER
#
# TRACKING=linuxproc|cgroup: how slurmd finds a step's processes, hence whom a signal reaches (cgroup: root and cgroup v1).
# PORT: first of some 400 ports. Debian's build lets several slurmd run on one host (slurmd -N NAME).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

action=${1:?start or stop} folder=$(realpath -m "${2:?folder}")
export SLURM_CONF=$folder/slurm.conf
nodes=(n1 n2)

configuration() {
  local port=${PORT:-17000} user
  user=$(id -un)
  cat <<EOF
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A job that comes back waits cred_expire + 1 s: 5 s is the least that is taken, two minutes the default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SrunPortRange=$((port + 100))-$((port + 399))
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/${TRACKING:-linuxproc}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
ReturnToService=2
KillWait=6
MessageTimeout=20
SlurmdTimeout=60
MinJobAge=600
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$(for i in 0 1; do
    echo "NodeName=${nodes[i]} NodeAddr=127.0.0.1 Port=$((port + 11 + i)) CPUs=16 CoresPerSocket=16 RealMemory=4000"
  done)
PartitionName=usual Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF MaxTime=INFINITE
PartitionName=patient Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=hasty Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cancelling Nodes=ALL PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
EOF
}

start() {
  mkdir -p "$folder"/{state,n1,n2}
  chmod 755 "$folder" # munged refuses a folder that others may write to
  [[ -s $folder/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  configuration >"$SLURM_CONF"
  printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n' >"$folder/cgroup.conf"
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
  slurmctld -i
  for node in "${nodes[@]}"; do slurmd -N "$node"; done
  for _ in $(seq 100); do
    if [[ $(sinfo --noheader --Node --responding --states=idle --partition=usual --format=%N 2>/dev/null | wc -l) == "${#nodes[@]}" ]]; then
      return 0
    fi
    sleep 0.2
  done
  echo "no two nodes answer; see the logs in $folder" >&2
  tail -n 3 "$folder"/*.log >&2
  return 1
}

# Ends the process of a pid file, if it is still one of this folder's daemons, and waits for it.
end() {
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  if [[ -r /proc/$pid/environ ]] && tr '\0' '\n' <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; then
    kill "$pid"
    for _ in $(seq 50); do
      [[ $(ps -o stat= -p "$pid") == [!Z]* ]] || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
  fi
  rm -f "$1"
}

stop() {
  if [[ -e $folder/slurmctld.pid ]]; then
    timeout 10 scancel --user="$(id -un)" --full --signal=KILL 2>/dev/null || true
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 40); do
      [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] || break
      sleep 0.2
    done
  fi
  for node in "${nodes[@]}"; do end "$folder/$node.pid"; done
  end "$folder/slurmctld.pid"
  end "$folder/munged.pid"
  # Step daemons outlive slurmd, and so do the tasks below them.
  local pid
  for pid in $(pgrep --uid "$(id -u)" slurmstepd || true); do
    if tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; then
      pkill -KILL --parent "$pid" || true
      kill -KILL "$pid" 2>/dev/null || true
    fi
  done
}

case $action in
start) start || { stop; exit 1; } ;;
stop) stop ;;
*) echo "cluster.sh: start or stop, not $action" >&2; exit 2 ;;
esac

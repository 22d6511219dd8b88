#!/bin/sh
# sbatch, squeue, scontrol and scancel over a folder of files, with the words of SLURM 22.05: slurm_programs.sh FOLDER NAME ARGUMENTS...
# FOLDER/jobs/JOB/FIELD: a job as `scontrol show job` tells of it, and what became of it. FOLDER/answers: "CODE WORDS" lines, exit codes and
# errors with which the next commands end instead (0: as usual). FOLDER/asked: a line for each command. FOLDER/seconds: how long each takes.
folder=$1 name=$2
shift 2
echo "$name $*" >> "$folder/asked"
[ ! -e "$folder/seconds" ] || exec sleep "$(cat "$folder/seconds")"
if [ -s "$folder/answers" ]; then
  read -r code words < "$folder/answers"
  sed -i 1d "$folder/answers"
  [ "$code" = 0 ] || { echo "$words" >&2; exit "$code"; }
fi
for last; do :; done
job=$folder/jobs/$last

of() { read -r value < "$job/$1"; echo "$value"; }
unknown() { echo "$1" >&2; exit 1; }

case "$name $*" in
  sbatch*)
    number=42
    while [ -d "$folder/jobs/$number" ]; do number=$((number + 1)); done
    cp -R "$folder/fields" "$folder/jobs/$number"
    cp "$last" "$folder/jobs/$number/script"
    dirname "$last" > "$folder/jobs/$number/folder"
    env -0 > "$folder/jobs/$number/environment"
    case $* in --parsable*) echo "$number;cluster" ;; *) echo "Submitted batch job $number" ;; esac ;;
  "squeue --noheader --jobs "*)
    job=$folder/jobs/$3
    [ -d "$job" ] || unknown "slurm_load_jobs error: Invalid job id specified"
    case $(of JobState) in CANCELLED | COMPLETED | FAILED) exit ;; esac
    line=$5
    for pair in %i=JobId %T=JobState %r=Reason %M=RunTime %L=TimeLeft %N=NodeList %S=StartTime; do
      letter=${pair%=*}
      [ "$pair" != %i=JobId ] || { line=$3${line#%i}; continue; }
      case $line in *"$letter"*) line="${line%%"$letter"*}$(of "${pair#*=}")${line#*"$letter"}" ;; esac
    done
    echo "$line" ;;
  "scontrol requeue "*)
    [ -d "$job" ] || unknown "Invalid job id specified for job $last"
    echo PENDING > "$job/JobState"
    echo yes > "$job/requeued" ;;
  "scontrol --oneliner show job "*)
    [ -d "$job" ] || unknown "slurm_load_jobs error: Invalid job id specified"
    echo "JobId=$last JobName=r UserId=u(1) Nice=0 Account=(null) JobState=$(of JobState) Reason=$(of Reason) Dependency=(null) Requeue=1" \
      "Restarts=$(of Restarts) BatchFlag=1 ExitCode=0:0 TimeLimit=00:05:00 StartTime=$(of StartTime) PreemptEligibleTime=$(of StartTime)" \
      "PreemptTime=$(of PreemptTime) Partition=debug NodeList=$(of NodeList) Command=/a=b/job.sbatch Power= " ;;
  scancel*)
    [ -d "$job" ] || unknown "scancel: error: Kill job error on job id $last: Invalid job id specified"
    if [ $# = 1 ]; then
      echo CANCELLED > "$job/JobState"
    elif [ "$(of JobState)" != PENDING ]; then  # whose tasks are not there to hear it
      echo "$* $([ ! -e "$(of folder)/stop" ] || echo "after the stop file")" > "$job/heard"
    fi ;;
  *) unknown "$name: unrecognized option" ;;
esac

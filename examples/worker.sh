#!/usr/bin/env bash
# A worker in bash and curl: gives each job's payload to a command, and hands in what the command prints.
#
#   examples/worker.sh sha256sum                         # the payload on standard input
#   examples/worker.sh -t application/gzip gzip -c       # what is printed may be binary
#   examples/worker.sh -q archive -d ./files gzip -c     # the payload names a file in ./files, which is read instead
#
#   -q QUEUE[,QUEUE]  take jobs of these queues, in this order (default)
#   -t TYPE           the Content-Type of the results
#   -d FOLDER         payloads are names of files in FOLDER
#   -l SECONDS        ask for leases of so many seconds (60); a running job's is extended at a third of it
#   JOBQUEUE_URL      where the server is (http://127.0.0.1:3000); JOBQUEUE_TOKEN: an access token, where it wants one
#
# A command that ends with another code than 0 fails its job, with the end of what it wrote to standard error as the
# error; the server tries it again while attempts are left. SIGTERM and SIGINT let the running job finish. A server that
# is away is asked again; one that refuses this worker (a wrong token, queue or lease) ends it, with exit code 1.

set -uo pipefail
export LC_ALL=C # bytes, not characters

server=${JOBQUEUE_URL:-http://127.0.0.1:3000}/api/worker
queue=default type=application/octet-stream folder='' lease=60
while getopts q:t:d:l: option; do
    case $option in
        q) queue=$OPTARG ;;
        t) type=$OPTARG ;;
        d) folder=$OPTARG ;;
        l) lease=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if (($# == 0)); then
    echo "usage: $0 [-q QUEUE] [-t TYPE] [-d FOLDER] [-l SECONDS] COMMAND [ARGUMENT...]" >&2
    exit 2
fi

token=() # in a file of curl's own kind, since everybody can read the arguments of a process
scratch=$(mktemp -d)
if [[ ${JOBQUEUE_TOKEN:-} ]]; then
    (umask 077 && printf 'header = "Authorization: Bearer %s"\n' "$JOBQUEUE_TOKEN" >"$scratch/token")
    token=(-K "$scratch/token")
fi

# extend: keeps the lease of the job that $scratch/leased tells of, for as long as this worker lives. One process for
# all jobs, begun before any trap is set: one begun and killed for each job may be killed before it has let go of this
# shell's traps, and runs them.
extend() {
    local third path
    printf -v third '%d.%03d' $((lease / 3)) $((lease * 1000 / 3 % 1000))
    trap 'kill $!' EXIT
    while sleep "$third" & wait $! && kill -0 $$; do
        path=$(<"$scratch/leased") || continue
        curl -sS "${token[@]}" -o /dev/null -X POST "$server/extend/$path&lease=$lease"
    done 2>/dev/null
}
extend &
extending=$!
trap '[[ $BASHPID != $$ ]] || { kill "$extending"; rm -rf "$scratch"; }' EXIT

# A poll is cut short by a signal: a worker that hangs up leaves the line, and no job is lost. A hand-in is not.
stopping='' polling=''
trap 'stopping=yes; [[ -z $polling ]] || kill "$polling"' TERM INT

poll() { # the answer goes to $scratch/answer; empty where no job came within 20 s
    : >"$scratch/answer"
    curl -sS "${token[@]}" -G -o "$scratch/answer" -w '%{http_code}' -d "wait=20&worker=$HOSTNAME-$$" \
        --data-urlencode "queue=$queue" --data-urlencode "lease=$lease" "$server/poll" >"$scratch/status" &
    polling=$!
    [[ -z $stopping ]] || kill "$polling" # the signal came just before
    wait "$polling"
    local code=$? status
    polling=''
    ((code == 0)) || return "$code"
    status=$(<"$scratch/status")
    [[ $status != 20[04] ]] || return 0
    if [[ $status == 4?? ]]; then # what it asks for, or its token, is wrong, and will be so next time
        echo "the server refuses this worker: $status $(detail)" >&2
        exit 1
    fi
    echo "poll: $status $(detail)" >&2
    return 1
}

detail() { # of the problem in $scratch/answer; all of it, where somebody else than a jobqueue server answered
    local answer
    answer=$(<"$scratch/answer")
    [[ $answer != *'"detail":"'* ]] || answer=${answer#*\"detail\":\"} answer=${answer%%\",\"*}
    printf '%s' "$answer"
}

# say VERB QUERY FILE: tell the server about the job. Repeated until it has heard it, through a restart of the server
# too: the lease token makes that safe. The answer goes to $scratch/answer.
say() {
    local status
    status=$(curl -sS "${token[@]}" --retry 9 --retry-all-errors -o "$scratch/answer" -w '%{http_code}' \
        --data-binary @- -H "Content-Type: $type" "$server/$1/$id?lease_token=$lease_token$2" <"$3") || return
    [[ $status == 200 ]] && return
    echo "$1 of job $id: $status $(<"$scratch/answer")" >&2 # 404, 409: the job is no longer ours
    return 1
}

# read_job JSON: sets id and lease_token, and writes the payload to $scratch/payload. The members of a job stand in a
# fixed order, and nothing that users wrote stands before the payload or behind the headers, whose values are strings:
# so the first "job_id", the first "payload", the last "headers" and the last "lease_token" are the server's own.
read_job() {
    local job=$1 payload head
    id=${job#*\"job_id\":\"} id=${id%%\"*}
    head=${job%,\"lease_token\":\"*}
    lease_token=${job:${#head}} lease_token=${lease_token#*:\"} lease_token=${lease_token%%\"*}
    payload=${job#*,\"payload\":} payload=${payload%,\"headers\":\{*}
    if [[ $payload == *',"payload_encoding":"base64"' ]]; then # bytes
        payload=${payload%,*}
        base64 -d <<<"${payload//\"/}"
    elif [[ ${job:${#head}} == *',"payload_kind":"text"'* ]]; then # text
        payload=${payload#\"}
        printf '%b' "$(sed 's:\\\(["/]\):\1:g' <<<"${payload%\"}")"
    elif [[ $payload != '""' ]]; then # JSON, as it was submitted
        printf '%s' "$payload"
    fi >"$scratch/payload"
}

run() { # the command, with what it is to read on standard input
    local name input=$scratch/payload
    if [[ $folder ]]; then
        name=$(tr -d '\0' <"$scratch/payload")
        if [[ /$name/ == *//* || /$name/ == */../* ]]; then
            echo "$name is not the name of a file in the folder" >&2
            return 2
        fi
        input=$folder/$name
    fi
    (trap '' INT && exec "$@") <"$input" # Ctrl-C is for the worker
}

job=''
while [[ -z $stopping ]]; do
    if [[ -z $job ]]; then
        if ! poll; then
            [[ $stopping ]] || sleep 1 # the server is away: it comes back
            continue
        fi
        job=$(<"$scratch/answer")
        [[ $job ]] || continue
    fi
    read_job "$job"
    job=''
    printf '%s' "$id?lease_token=$lease_token" >"$scratch/leased"
    run "$@" >"$scratch/result" 2>"$scratch/error"
    code=$?
    rm "$scratch/leased"
    if ((code == 0)); then
        # The answer brings the next job, if one is in line: one round trip a job.
        if say complete "&next=true&queue=$queue&lease=$lease&worker=$HOSTNAME-$$" "$scratch/result"; then
            job=$(<"$scratch/answer")
            job=${job#*,\"next\":}
            job=${job%\}}
            [[ $job != null ]] || job=''
        fi
    else
        tail -c 2000 "$scratch/error" >"$scratch/end"
        say fail '' "$scratch/end"
    fi
done
if [[ $job ]]; then # it came with the last answer, and we are leaving
    read_job "$job"
    say release '' /dev/null
fi

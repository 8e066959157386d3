#!/usr/bin/env bash
# Locks in a bash script. FOLDER is a domain of the mount: backup.sh /mnt/locks/jobs SOURCE TARGET
set -euo pipefail
locks=$1 source=$2 target=$3

# The whole of a command under a lock: alone in the cluster, and ended if the lock is lost.
dlmfs lock "$locks/backup" -- cp -r "$source" "$target.new"

# Several commands: a descriptor. Opening it waits for the lock, closing it lets go. Shared is "<",
# exclusive "<>"; the file must be there, `touch` makes it without taking the lock. (A mount with
# holder=node has one holder for all programs of a node; flock(1) then keeps those apart.)
touch "$locks/catalogue"
exec {lock}<>"$locks/catalogue"
flock "$lock"
rm -rf "$target"
mv "$target.new" "$target"
token=$(getfattr --absolute-names --only-values -n user.dlmfs.token "/dev/fd/$lock")
echo "$token" >"$target/.token"
exec {lock}>&-

# Only if nobody else is at it, on any node; exit code 1 says that somebody is.
dlmfs lock -n "$locks/cleanup" -- find "$target" -name '*.tmp' -delete || [ $? = 1 ]
echo "backup done with token $token"

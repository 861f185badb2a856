#!/bin/sh
# Runs the cluster tests, or a command, where Slurm is newer than this machine's: in a Debian 13 below a folder.
#
#   tests/slurm/newer.sh PYTHON [COMMAND...]
#
# PYTHON is the one with the project's packages. It, the packages and this checkout are lent to Debian 13 by mounts that
# only the command sees. They, and every process of it, end with it, whatever ends it: nothing is to be cleaned up.
# TRIXIE names the folder (.trixie); made when it is not there, by debootstrap: some minutes, about 1 GB.
set -eu

cd "$(dirname "$0")/../.."
checkout=$PWD
python=$1
shift
[ $# -gt 0 ] || set -- "$python" -m pytest --numprocesses 5 --dist load --maxschedchunk 1 --timeout 900 -m "slurm and not soak" tests/slurm

# The environment that the packages are in, and the Python that it was made with.
lent=$("$python" -c 'import sys; print(sys.prefix, sys.base_prefix, sep="\n")')
case "$lent" in
*"
/usr")
    echo "newer.sh: the system's own Python cannot be lent; make the environment with one in a folder of its own" >&2
    exit 2
    ;;
esac
[ "$(id -u)" = 0 ] || { echo "newer.sh: root is needed, to mount" >&2; exit 2; }

mkdir -p "${TRIXIE:=.trixie}"
root=$(cd "$TRIXIE" && pwd)/root
if [ ! -d "$root" ]; then
    packages=$("$python" -m slurm.devcluster packages | tr ' ' ,)
    rm -rf "$root.part"
    debootstrap --variant=minbase --include="$packages,git,procps" trixie "$root.part"
    mv "$root.part" "$root" # a folder of this name is complete
fi

export root checkout lent
exec unshare --mount --pid --fork --kill-child --mount-proc="$root/proc" sh -euc '
    mount --rbind /dev "$root/dev"
    mount --rbind /sys "$root/sys"
    mount -t tmpfs tmpfs "$root/run"
    # A copy that ends with the command: clusters write their nodes into it.
    touch "$root/etc/hosts"
    grep -v slurm.devcluster /etc/hosts >"$root/run/hosts"
    mount --bind "$root/run/hosts" "$root/etc/hosts"
    printf "%s\n" "$checkout" "$lent" | while read -r folder; do
        mkdir -p "$root$folder"
        mount --bind "$folder" "$root$folder"
    done
    exec chroot "$root" sh -euc "cd \"\$checkout\"; \"\$@\"; exit" sh "$@" # not exec: process 1 must reap
' sh "$@"

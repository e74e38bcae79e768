#!/bin/sh
# Fetches gVisor's runsc, statically linked, from Debian 13 (trixie) into a directory of Prism's own:
# Debian 12's runsc is of 2022, and breaks coreutils inside sandboxes (it has no statx).
# prism-agent looks there by itself. Asks the mirror that apt uses already, and takes only what
# Debian's own keys have signed. Neither apt's sources nor its lists nor any package of the machine
# changes. `make up` does not need it.
set -eu

usage() {
  cat <<'USAGE'
Usage: deploy/fetch_gvisor.sh [DIRECTORY]

Puts runsc into DIRECTORY: /usr/local/lib/prism as root, ~/.local/lib/prism otherwise. prism-agent
finds it there; elsewhere, set PRISM_RUNSC to it, or put it on PATH.
Does nothing where a runsc that is new enough is there already.

Examples:
  deploy/fetch_gvisor.sh
  deploy/fetch_gvisor.sh "$HOME/bin"
USAGE
}

fail() {
  echo "fetch_gvisor: $*" >&2
  exit 1
}

case ${1:-} in
-h | --help)
  usage
  exit 0
  ;;
-*) fail "there is no option $1; see --help" ;;
esac
[ $# -le 1 ] || fail "one DIRECTORY at most; see --help"

# The oldest release that was seen to work, as runsc itself says it: release-YYYYMMDD.N.
oldest=20240729
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

release_of() { # the date of a runsc's release; nothing where it does not say one
  timeout 10 "$1" --version 2>/dev/null |
    sed -n 's/^runsc version .*\([0-9]\{8\}\)\..*/\1/p' | head -n 1
}

is_new_enough() {
  release=$(release_of "$1")
  [ -n "$release" ] && [ "$release" -ge "$oldest" ]
}

if [ $# -eq 1 ]; then
  target=$1
elif [ "$(id -u)" -eq 0 ]; then
  target=/usr/local/lib/prism
else
  target=$HOME/.local/lib/prism
fi
if [ -x "$target/runsc" ] && is_new_enough "$target/runsc"; then
  echo "fetch_gvisor: $target/runsc of $(release_of "$target/runsc") is there"
  exit 0
fi

for program in apt-get dpkg-deb timeout; do
  command -v "$program" >/dev/null 2>&1 || fail "$program is missing: this needs Debian or Ubuntu's apt"
done
[ -r "$keyring" ] || fail "$keyring is missing: apt-get install debian-archive-keyring"

# The mirror of Debian's main archive. Security and third parties' archives are told by their labels.
mirror=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)' \
  'Created-By: Packages' 2>/dev/null | sed -n 's/^Debian|Debian|main|//p' | head -n 1)
[ -n "$mirror" ] || fail "apt knows no mirror of Debian; run apt-get update, or install runsc by hand"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/parts"
echo "deb [signed-by=$keyring] $mirror trixie main" >"$scratch/sources.list"

own_apt() {
  timeout 300 apt-get -q \
    -o Dir::Etc::SourceList="$scratch/sources.list" -o Dir::Etc::SourceParts="$scratch/parts" \
    -o Dir::State::Lists="$scratch/lists" -o Dir::Cache="$scratch/cache" \
    -o Acquire::Languages=none -o APT::Get::AllowUnauthenticated=false \
    -o APT::Update::Post-Invoke= -o APT::Update::Post-Invoke-Success= \
    -o APT::Sandbox::User="$(id -un)" "$@" >"$scratch/log" 2>&1 || {
    sed 's/^/  /' "$scratch/log" >&2
    fail "apt-get $1 failed, as said above"
  }
}

own_apt update
cd "$scratch"
own_apt download runsc
set -- "$scratch"/runsc_*.deb
[ -e "$1" ] || fail "apt downloaded no runsc"
dpkg-deb -x "$1" "$scratch/root"
is_new_enough "$scratch/root/usr/bin/runsc" ||
  fail "the runsc of trixie is older than $oldest, or does not start here"

mkdir -p "$target"
# Takes its place at once: a sandbox that starts meanwhile finds the old one or the new one.
cp "$scratch/root/usr/bin/runsc" "$target/.runsc.$$"
chmod 0755 "$target/.runsc.$$"
mv "$target/.runsc.$$" "$target/runsc"
echo "fetch_gvisor: $target/runsc of $(release_of "$target/runsc")"

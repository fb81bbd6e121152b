#!/usr/bin/env bash
# Builds a program and tells how far it is, as the first build takes minutes:
# build.sh OUT LDFLAGS PACKAGE
set -euo pipefail

out=$1 ldflags=$2 package=$3
terminal=
if [[ -t 1 ]]; then terminal=1; fi
# -v names each package when it is compiled, and nothing that the cache has.
go build -v -ldflags "$ldflags" -o "$out" "$package" 2>&1 | awk -v out="$out" -v terminal="$terminal" '
  function tell() {
    if (terminal) printf "\r\033[K... building %s: %d modules fetched, %d packages compiled", out, fetched, compiled
    else if (compiled % 250 == 1) printf "... building %s: %d packages compiled\n", out, compiled
    fflush()
  }
  BEGIN { if (terminal) tell() }
  /^go: downloading / { fetched++; tell(); next }
  /^[A-Za-z0-9._~\/-]+$/ { compiled++; tell(); next }
  { if (terminal) printf "\r\033[K"; print }
  END { if (terminal) printf "\r\033[K" }
'
echo "[ok] built $out, $(du -h "$out" | cut -f1)  ($SECONDS s)"

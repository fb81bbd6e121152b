#!/usr/bin/env bash
# Installs what tests and the demo need from Debian's packages: only what is
# missing, so that it ends at once when nothing is.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin

# What has to be there, and the package that brings it.
needs=(
  containerd                containerd
  runc                      runc
  /usr/lib/cni/bridge       containernetworking-plugins
  iptables                  iptables
  ip                        iproute2
  ps                        procps
  docker-registry           docker-registry
  mosquitto                 mosquitto
  mosquitto_pub             mosquitto-clients
)

missing=()
for ((i = 0; i < ${#needs[@]}; i += 2)); do
  if ! command -v "${needs[i]}" >/dev/null; then
    missing+=("${needs[i + 1]}")
  fi
done
if ((${#missing[@]} == 0)); then
  exit 0
fi

if ! command -v apt-get >/dev/null; then
  echo "deps: missing: ${missing[*]}; there is no apt-get here, so install them by this system's own means" >&2
  exit 1
fi
if ((EUID != 0)); then
  echo "deps: missing: ${missing[*]}; run as root: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "deps: installing ${missing[*]}"
began=$SECONDS
export DEBIAN_FRONTEND=noninteractive
quiet=(-q)
if [[ -t 1 ]]; then
  quiet=(-o Dpkg::Progress-Fancy=1)
fi
apt-get "${quiet[@]}" update
apt-get "${quiet[@]}" install -y --no-install-recommends "${missing[@]}"
# Debian starts it at once, and a node in mode auto would take it for the broker
# of this host. Tests start their own.
if [[ " ${missing[*]} " == *" mosquitto "* ]] && [[ -d /run/systemd/system ]]; then
  systemctl disable --now --quiet mosquitto
fi
echo "deps: installed in $((SECONDS - began)) s"

#!/usr/bin/env bash
# Builds the release archives: release.sh VERSION EPOCH LDFLAGS PLATFORM...
# The same commit and Go version give the same bytes.
set -euo pipefail

version=$1 epoch=$2 ldflags=$3
shift 3
cd "$(dirname "$0")/.."
rm -rf dist
mkdir -p dist
work=$(mktemp -d dist/.work-XXXXXX)
trap 'rm -rf "$work"' EXIT

for platform in "$@"; do
  began=$SECONDS
  name=skerry-$version-linux-$platform
  dir=$work/$name
  mkdir -p "$dir"
  arch=$platform
  arm=
  if [[ $platform == armv7 ]]; then
    arch=arm arm=7
  fi
  for program in cloudhub edgecore; do
    echo "release: building $program for linux/$platform"
    GOOS=linux GOARCH=$arch GOARM=$arm go build -trimpath -ldflags "$ldflags" -o "$dir/$program" "./$program"
  done
  cp LICENSE "$dir/"
  for text in README.md CHANGELOG.md; do
    if [[ -f $text ]]; then cp "$text" "$dir/"; fi
  done
  mkdir "$dir/systemd" "$dir/config"
  cp deploy/systemd/*.service "$dir/systemd/"
  cp deploy/config/*.yaml "$dir/config/"
  tar --create --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --mode=u+rwX,go+rX,go-w \
    --directory "$work" "$name" | gzip -n -9 >"dist/$name.tar.gz"
  rm -rf "$dir"
  echo "release: dist/$name.tar.gz, $(du -h "dist/$name.tar.gz" | cut -f1), took $((SECONDS - began)) s"
done
(cd dist && sha256sum -- *.tar.gz >SHA256SUMS)
cat dist/SHA256SUMS

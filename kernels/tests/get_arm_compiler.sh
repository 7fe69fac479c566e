#!/bin/sh
# Unpacks Debian's compiler for 64-bit Arm and qemu into a folder, unless they are there or installed. Needs apt, no root.
set -eu
folder=$1
present() { command -v aarch64-linux-gnu-g++ && { command -v qemu-aarch64 || command -v qemu-aarch64-static; }; }
if present >/dev/null || [ -d "$folder" ]; then exit 0; fi

echo "setting up: $folder (120 MB to fetch)"
partial="$folder.partial"
rm -rf "$partial"
mkdir -p "$partial/lists/partial" "$partial/debs/partial"
cd "$partial/debs"
apt() { apt-get -qq -o Dir::State::lists="$partial/lists" -o Dir::Cache="$partial" -o APT::Sandbox::User= "$@"; }
apt update
packages=$(apt -s --no-install-recommends install g++-aarch64-linux-gnu qemu-user-static | sed -n 's/^Inst \([^ ]*\).*/\1/p')
apt download $packages
for package in *.deb; do dpkg-deb -x "$package" "$partial"; done
# The linker finds these by itself, wherever they are.
sed -i 's|/usr/aarch64-linux-gnu/lib/||g' "$partial/usr/aarch64-linux-gnu/lib/libc.so"
find "$partial/usr/bin" -name 'qemu-*' ! -name 'qemu-aarch64*' -delete
rm -rf "$partial/debs" "$partial/lists" "$partial/usr/share" "$partial"/*.bin
mv "$partial" "$folder"

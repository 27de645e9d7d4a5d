#!/bin/bash
# Builds the programs of an older commit (the one before the newest, unless $1 names one) and tests them beside those of
# this checkout: crates/haven/tests/mixed.rs. Needs root and about 5 min more than the test.
set -euo pipefail
cd "$(dirname "$0")/.."
commit=$(git rev-parse "${1:-HEAD~1}")
older=$(mktemp -d /tmp/haven-older.XXXXXX)
trap 'git worktree remove --force "$older/source" > /dev/null 2>&1; rm -rf "$older"' EXIT
git worktree add --quiet --detach "$older/source" "$commit"
echo "building $(git log -1 --format='%h %s' "$commit")"
CARGO_TARGET_DIR="$older/target" cargo build --quiet --manifest-path "$older/source/Cargo.toml" -p haven
HAVEN_OLDER="$older/target/debug" HAVEN_LAB_DIR="$older/lab" cargo test --quiet -p haven --test mixed

# The usual chores; `just` lists them. Plain commands are in CONTRIBUTING.md.

default:
    @just --list

# Build, start, apply an example, ask it, watch it go back to zero.
quickstart:
    scripts/quickstart.sh

# Install what the tests need and run them all.
test:
    scripts/test.sh

# What CI runs.
ci:
    .ci/run

lint:
    cargo fmt --all --check
    cargo lint

bench *ARGS:
    cargo bench -p pilotlight-benches {{ARGS}}

#!/usr/bin/env bash
# Sets up .venv if need be, then checks style and runs the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ruff format --check .
ruff check .
exec python -m pytest "$@"

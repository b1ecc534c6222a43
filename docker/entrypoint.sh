#!/bin/sh
# web, worker or trainer (one process, as `run` would start it), or any other command of python -m ml_backend.
set -eu
case "${1:-web}" in
  web | worker | trainer)
    if [ $# -le 1 ]; then
      exec python -m ml_backend start "${1:-web}"
    fi
    ;;
esac
exec python -m ml_backend "$@"

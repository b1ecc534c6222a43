#!/bin/sh
# Make the secrets that compose.yml mounts, those that are missing: docs/docker.md, Secrets.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
for name in label_studio_api_key label_studio_password graco_password graco_webhook_secret graco_admin_password; do
  if [ ! -s "secrets/$name" ]; then
    # 40 hexadecimal digits, as Label Studio's legacy tokens are
    od -An -N20 -tx1 /dev/urandom | tr -d ' \n' >"secrets/$name"
    echo "made secrets/$name"
  fi
  # The folder is closed to others; in the container another user reads the file, and you may write another token into it
  chmod 0644 "secrets/$name"
done

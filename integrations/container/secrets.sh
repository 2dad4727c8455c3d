#!/bin/sh
# Makes the secrets of compose.yaml in secrets/ beside this file. Those that are there already stay as they are.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets

word() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

# The folder is closed to others. The files are not: containers read them as users of their own.
keep() { test -s "$1" || { cat > "$1.partial" && chmod 0444 "$1.partial" && mv -f "$1.partial" "$1"; }; }

word | keep secrets/postgres_password
word | keep secrets/grafana_password
printf '[wanforge]\nhost=database\ndbname=wanforge\nuser=wanforge\npassword=%s\n' "$(cat secrets/postgres_password)" \
    | keep secrets/pg_service.conf
# `wanforge serve keys add` makes the key of Prometheus; until then, there is an empty file to mount.
test -e secrets/monitor_key || : > secrets/monitor_key
chmod 0444 secrets/monitor_key

# The key of the profile s3. Compose reads .env, which may have other variables, and the storage reads the other file.
grep -qs '^AWS_ACCESS_KEY_ID=.' .env || {
    { test ! -e .env || { cat .env; echo; }
      printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$(word)" "$(word)"; } > .env.partial
    mv -f .env.partial .env
}
value() { sed -n "s/^$1=//p" .env | tail -n 1 | tr -d "\"'"; }
id=$(value AWS_ACCESS_KEY_ID)
secret=$(value AWS_SECRET_ACCESS_KEY)
test -n "$secret" || {
    echo ".env has an AWS_ACCESS_KEY_ID without an AWS_SECRET_ACCESS_KEY; give both, or neither to have them made" >&2
    exit 1
}
printf '{"identities": [{"name": "wanforge", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Read:wanforge", "Write:wanforge", "List:wanforge"]}]}\n' \
    "$id" "$secret" | keep secrets/s3_identities.json

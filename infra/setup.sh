#!/bin/sh
# Installs what the Makefile's targets need, and only what is missing:
#   setup.sh venv PYTHON    the package and its tools into .venv
#   setup.sh test-tools     the programs that the tests and the checks run
#   setup.sh packages NAME… Debian packages
set -eu

die() {
    echo "$*" >&2
    exit 1
}

packages() {
    remedy="Missing: $*. Install it with your system's package manager, then try again."
    command -v apt-get >/dev/null || die "$remedy"
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        die "Missing: $*. Run: sudo apt-get install $*"
    fi
    echo "Installing $* with apt" >&2
    said=$($as_root sh -eu -s -- "$@" 2>&1 <<'EOF'
# A package that brings a service must not start it: policy-rc.d is how Debian is told so.
policy=/usr/sbin/policy-rc.d
if ! [ -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update </dev/null || true # one source out of reach is no reason not to ask the others
apt-get -qq -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends "$@" </dev/null
EOF
    ) || die "$said
$remedy"
}

venv() {
    python=$1
    [ -n "$python" ] || die "Missing: Python 3.11 or newer. Install python3.11, then try again."
    # Debian ships venv without ensurepip, in a package of its own.
    "$python" -c 'import ensurepip' 2>/dev/null ||
        packages "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    echo "Installing brokertask and its tools into .venv (a minute, once)" >&2
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --editable '.[dev,otlp]'
}

test_tools() {
    missing=
    command -v node >/dev/null || missing="$missing nodejs"
    command -v npm >/dev/null || missing="$missing npm"
    command -v amqp-publish >/dev/null || missing="$missing amqp-tools"
    # Its programs may be outside the user's PATH.
    ls -d /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin >/dev/null 2>&1 || missing="$missing rabbitmq-server"
    command -v chromium >/dev/null || missing="$missing chromium"
    ls -d /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgresql"
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || packages $missing
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
venv) venv "${1:-}" ;;
packages) packages "$@" ;;
test-tools) test_tools ;;
*) die "usage: $0 venv PYTHON | test-tools | packages NAME…" ;;
esac

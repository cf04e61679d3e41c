#!/bin/sh
# Installs an agent from the folder that this script lies in, without any network. Running it again is safe: what is there is
# replaced as a whole, or left alone where it is the same. With --consume the folder is removed at the end, and the Wi-Fi key beside it.
# FEDHLM_ROOT stands before every path, for tests and for images.
set -eu
umask 022

here=$(cd "$(dirname "$0")" && pwd)
root=${FEDHLM_ROOT:-}
consume=${1:-}
cd "$here"

# Cards and downloads go bad; say so before anything is changed.
sha256sum --check --quiet SHA256SUMS || { echo "install.sh: the bundle is damaged, copy it again" >&2; exit 1; }
digest=$(cat bundle.id)

# A device without a battery-backed clock believes in the date of its image, when its certificate was not valid yet.
if [ -z "$root" ] && [ "$(date +%s)" -lt "$(cat made)" ]; then
    date -u -s "@$(cat made)" >/dev/null && { [ ! -d /var/lib/systemd/timesync ] || touch /var/lib/systemd/timesync/clock; } || true
fi

target=$root/opt/fedhlm-$digest
current=$root/opt/fedhlm
if [ ! -e "$target/$digest.complete" ]; then
    echo "install.sh: installing into $target"
    rm -rf "$target"
    mkdir -p "$target"
    python=python3
    if [ -e python.tar.gz ]; then
        tar -xzf python.tar.gz -C "$target"
        python=$target/python/bin/python3
    fi
    # Without --without-pip, Debian wants the package python3-venv, which is not on every image.
    "$python" -m venv --without-pip "$target"
    pip=$(ls wheels/pip-*.whl)
    PIP_CONFIG_FILE=/dev/null "$target/bin/python" "$pip/pip" install --quiet --no-index --no-cache-dir \
        --disable-pip-version-check --no-warn-script-location --find-links wheels 'fedhlm[agent]'
    # NVIDIA's build has the same modules under another project's name, so that no requirement asks for it.
    for gpu in wheels/onnxruntime_gpu-*.whl; do
        [ -e "$gpu" ] || continue
        "$target/bin/python" "$pip/pip" uninstall --quiet --yes onnxruntime
        PIP_CONFIG_FILE=/dev/null "$target/bin/python" "$pip/pip" install --quiet --no-index --no-deps --no-cache-dir "$gpu"
    done
    if [ -d model ]; then
        cp -r model "$target/model"
    fi
    # The service's user is made up at its start and may be anybody.
    chmod -R a+rX "$target"
    "$target/bin/fedhlm" --version >/dev/null
    sync
    : >"$target/$digest.complete"
fi

# Secrets first: the service must never start with the program new and the certificate old.
install -d -m 0755 "$root/etc/fedhlm"
install -m 0600 agent.toml "$root/etc/fedhlm/agent.toml"
if [ -d tls ]; then
    install -d -m 0700 "$root/etc/fedhlm/tls"
    for name in ca.crt client.crt client.key; do
        install -m 0600 "tls/$name" "$root/etc/fedhlm/tls/$name"
    done
fi
units=$root/etc/systemd/system
install -D -m 0644 fedhlm-agent.service "$units/fedhlm-agent.service"
for name in plain.conf cuda.conf; do
    if [ -e "$name" ]; then
        install -D -m 0644 "$name" "$units/fedhlm-agent.service.d/$name"
    else
        rm -f "$units/fedhlm-agent.service.d/$name"
    fi
done

# The switch is one rename: /opt/fedhlm is the old program or the new one.
if [ -d "$current" ] && [ ! -L "$current" ]; then
    rm -rf "$current.before"
    mv "$current" "$current.before"
fi
ln -sfn "fedhlm-$digest" "$current.new"
mv -Tf "$current.new" "$current"
for old in "$root"/opt/fedhlm-????????????????; do
    [ "$old" = "$target" ] || rm -rf "$old"
done

if [ -z "$root" ] && command -v systemctl >/dev/null; then
    systemctl enable --quiet fedhlm-agent.service
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        # At first boot the network may come late; the service waits for it by itself.
        systemctl restart --no-block fedhlm-agent.service
    fi
fi

if [ "$consume" = --consume ]; then
    sync
    # Every user can read the boot partition. Flash memory may keep old blocks all the same.
    for secret in tls/client.key agent.toml; do
        [ ! -e "$secret" ] || { dd if=/dev/zero of="$secret" bs="$(wc -c <"$secret")" count=1 conv=notrunc,fsync 2>/dev/null; }
    done
    if [ -e ../network-config ] && grep -q password ../network-config; then
        # cloud-init has copied it to where only root reads; this text makes it leave that as it is.
        printf 'network:\n  config: disabled\n' >../network-config
    fi
    cd /
    rm -rf "$here"
    sync
fi
echo "install.sh: fedhlm $digest is installed"

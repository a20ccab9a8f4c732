"""The key by which a SuperLink knows a member's node: EC P-384 in OpenSSH format, as `ssh-keygen` writes it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpact.errors import ConfigError


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key: EC P-384, OpenSSH format, without a passphrase. Raises ConfigError."""
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}; expected a node's private key") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path}: others may use this private key (mode {stat.S_IMODE(mode):04o}); chmod 600 it")
    try:
        key = serialization.load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        made = "`ssh-keygen -t ecdsa -b 384 -N ''` makes one"
        raise ConfigError(f"{path}: found no OpenSSH private key on the curve P-384 without a passphrase; {made}")
    return key


def new_key(path: Path) -> None:
    """Writes a new node key to `path` (mode 0600), its public half to `path`.pub. Raises ConfigError."""
    key, public = ec.generate_private_key(ec.SECP384R1()), path.with_name(path.name + ".pub")
    private_bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public_bytes = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    for file, data, mode in ((path, private_bytes, 0o600), (public, public_bytes + b"\n", 0o644)):
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as stream:
                stream.write(data)
        except FileExistsError as error:
            raise ConfigError(f"{file}: exists already; a node's key is not replaced, name another") from error
        except OSError as error:
            raise ConfigError(f"{file}: {os.strerror(error.errno or 0)}; expected a folder to write to") from error

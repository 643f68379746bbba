"""What hosts of a cluster show each other: its token, 32 random bytes in a file that only its owner reads, and perhaps
certificates. Who has the token, and a certificate where there are such, may start stages anywhere.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from labinfer.compiler.cluster import Cluster
from labinfer.errors import LabinferError, Place
from labinfer.home import cache_dir
from labinfer.runtime.pipeline.transport import Credentials, Tls
from labinfer.runtime.pipeline.transport.tls import context_of

TOKEN_BYTES = 32


def token_path() -> Path:
    """Where it is kept unless a file is named."""
    return cache_dir() / "cluster" / "token"


def credentials_of(cluster: Cluster, token_file: Path | None = None) -> Credentials:
    """The kept token, or that of a file, and the certificates that the ``cluster`` file names, which can be used."""
    token, tls = kept_token(token_file), None
    if cluster.tls is not None:
        folder = cluster.file.absolute().parent
        tls = Tls(*(str(folder / each) for each in (cluster.tls.certificate, cluster.tls.key, cluster.tls.ca)))
        context_of(tls)
    return Credentials(token, tls)


def kept_token(path: Path | None = None) -> bytes:
    """The token in ``path``; made now where there is no such file."""
    path = path or token_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(TOKEN_BYTES) + "\n")
        except FileExistsError:  # somebody was quicker
            pass
    return read_token(path)


def read_token(path: Path) -> bytes:
    """The token in ``path``; one that others can read is refused."""
    place = Place(str(path))
    try:
        mode, text = path.stat().st_mode, path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as problem:
        remedy = "copy it from the host that made it, or start the agents there: labinfer cluster up"
        message = f"the cluster's token cannot be read: {problem}"
        raise LabinferError("cluster.token", message, place=place, remedy=remedy) from None
    if mode & 0o077:
        raise LabinferError("cluster.token", "others can read the token", place=place, remedy=f"chmod 600 {path}")
    try:
        token = bytes.fromhex(text.strip())
    except ValueError:
        token = b""
    if len(token) != TOKEN_BYTES:
        raise LabinferError("cluster.token", f"a token is {2 * TOKEN_BYTES} hexadecimal digits", place=place)
    return token

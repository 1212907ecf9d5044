"""Certificates for the TLS tests, made anew for each run: a CA, a server, a client and a stranger."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme


@dataclass(frozen=True)
class Certs:
    """Paths of PEM files. The stranger's certificate is of another CA: a server that asks must refuse it."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path
    stranger_cert: Path
    stranger_key: Path

    def context(self, client: str | None = None) -> ssl.SSLContext:
        """A caller's TLS context that trusts the CA; `client` is None, "client" or "stranger"."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if client:
            context.load_cert_chain(*self._pair(client))
        return context

    def grpc_credentials(self, client: str | None = None) -> Any:
        """The same for a gRPC channel."""
        import grpc

        cert, key = self._pair(client) if client else (None, None)
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(), key and key.read_bytes(), cert and cert.read_bytes()
        )

    def _pair(self, client: str) -> tuple[Path, Path]:
        return getattr(self, f"{client}_cert"), getattr(self, f"{client}_key")


def make_certs(folder: Path) -> Certs:
    """Write them into this folder, keys readable by their owner alone."""
    authority = trustme.CA()
    leaves = {
        "server": authority.issue_cert("localhost", "127.0.0.1", "::1"),
        "client": authority.issue_cert("client.test"),
        "stranger": trustme.CA().issue_cert("client.test"),
    }
    paths = {"ca": folder / "ca.pem"}
    authority.cert_pem.write_to_path(str(paths["ca"]))
    for name, leaf in leaves.items():
        paths[f"{name}_cert"] = folder / f"{name}.pem"
        paths[f"{name}_key"] = folder / f"{name}.key"
        paths[f"{name}_key"].touch(mode=0o600)
        leaf.private_key_pem.write_to_path(str(paths[f"{name}_key"]))
        for index, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(str(paths[f"{name}_cert"]), append=index > 0)
    return Certs(**paths)

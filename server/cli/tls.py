"""TLS by a certificate and its key, checked before anything starts."""

from __future__ import annotations

import ssl

from server.errors import SettingsError
from server.settings import Settings


def check_certificate(settings: Settings) -> None:
    """Raises ``SettingsError`` if certificate and key cannot be used; they may be in one file."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None:
        if key is not None:
            raise SettingsError(f"--ssl-keyfile {key} needs --ssl-certfile, the certificate of this key")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:  # of which ssl's errors are
        names = f"{certificate}" if key is None else f"{certificate} and {key}"
        raise SettingsError(f"--ssl-certfile and --ssl-keyfile: {names} cannot be used: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    if not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not that of the certificate"
    return "a certificate and its private key in PEM are needed, in one file or two"


def _no_password() -> str:
    raise SettingsError("--ssl-keyfile is encrypted: decrypt it (`openssl pkey -in KEY -out NEW`) and protect the file")

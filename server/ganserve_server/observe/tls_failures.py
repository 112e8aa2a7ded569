"""The reason of a failed TLS handshake, in a word for metrics and log."""

import ssl

CLOSED = "closed"
_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "CERTIFICATE_VERIFY_FAILED": "untrusted_certificate",
    "HTTP_REQUEST": "no_tls",
    "WRONG_VERSION_NUMBER": "no_tls",
    "UNSUPPORTED_PROTOCOL": "old_tls",
    "NO_SHARED_CIPHER": "old_tls",
}
_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


def tls_failure(error: OSError) -> str:
    """Name the reason; `closed`: the peer closed the connection, as port scanners do."""
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _EXPIRED:
        return "expired_certificate"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        reason = error.reason or ""
        return _REASONS.get(reason, "refused_by_peer" if "ALERT" in reason else "other")
    return "timeout" if isinstance(error, ConnectionAbortedError) else CLOSED

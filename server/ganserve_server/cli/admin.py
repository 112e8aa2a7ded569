"""`ganserve-server admin`: loads, unloads and reloads models of a running server, at its --admin-address."""

import ipaddress
import os
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ganserve_server.settings import ServerSettings
from ganserve_server.start_errors import StartError
from ganserve_server.transport.addresses import reachable, split

if TYPE_CHECKING:
    import grpc

    from ganserve.v1 import administration_pb2 as pb

_Model = Annotated[str, typer.Argument(help="The model's name, which is the name of its folder.")]


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the server."""

    settings: ServerSettings
    ca_file: Path | None
    certificate_file: Path | None
    key_file: Path | None
    server_name: str | None
    timeout_s: float


def admin(
    context: typer.Context,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            help="Certificate (PEM) of the authority that signed the server's certificate. Turns TLS on.",
            envvar="GANSERVE_CA_FILE",
            show_default="the certificate of --tls-certificate-file",
        ),
    ] = None,
    certificate_file: Annotated[
        Path | None,
        typer.Option(help="Client certificate (PEM), for mutual TLS.", envvar="GANSERVE_CERTIFICATE_FILE"),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="Key of the client certificate (PEM, not encrypted).", envvar="GANSERVE_KEY_FILE"),
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(help="Host name that the server's certificate is for.", show_default="the address's host"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the answer; a model may take minutes to load.")
    ] = 600.0,
) -> None:
    """Load and unload models of a running server, at its --admin-address.

    The address and the server's certificate come from the settings, as for `health`. If the server has tokens, set
    GANSERVE_TOKEN to a token with the role `admin`. The exit status is 1 if the server refuses or does not answer.
    """
    context.obj = Access(context.obj, ca_file, certificate_file, key_file, server_name, timeout)


def reload_models(context: typer.Context) -> None:
    """Load new versions and unload removed ones, as on SIGHUP; print all versions, and why one is not served."""
    _print(_ask(context.obj, "ReloadModels").versions)


def load_model(context: typer.Context, model: _Model) -> None:
    """Load a model from its folder, again if it is already served; print its versions."""
    _print(_ask(context.obj, "LoadModel", model=model).versions)


def unload_model(context: typer.Context, model: _Model) -> None:
    """Stop serving a model, until `admin load` or the server's next start."""
    _ask(context.obj, "UnloadModel", model=model)
    print(f"{model} unloaded")


COMMANDS: dict[str, Callable[..., None]] = {"reload": reload_models, "load": load_model, "unload": unload_model}


def _print(versions: "list[pb.VersionState]") -> None:
    for state in versions:
        reason = f": {state.reason}" if state.reason else ""
        print(f"{state.model} {state.version} {'served' if state.served else 'not served'}{reason}")


def _ask(access: Access, method: str, **fields: str) -> Any:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read by the import; errors are printed in one line, below
    import grpc

    from ganserve.v1 import administration_pb2 as pb
    from ganserve.v1 import administration_pb2_grpc as pb_grpc

    try:
        address, credentials, metadata = _address(access), _credentials(access), _metadata()
        if metadata and credentials is None and not _is_loopback(address):
            raise ValueError(f"the token would go to {address} in plain text; give --ca-file, which turns TLS on")
    except (StartError, OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"ganserve-server: {reason}", file=sys.stderr)
        raise typer.Exit(2) from error
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", -1)]
    if access.server_name:
        options.append(("grpc.ssl_target_name_override", access.server_name))
    with (
        grpc.insecure_channel(address, options)
        if credentials is None
        else grpc.secure_channel(address, credentials, options)
    ) as channel:
        call = getattr(pb_grpc.AdministrationServiceStub(channel), method)
        try:
            return call(getattr(pb, f"{method}Request")(**fields), metadata=metadata, timeout=access.timeout_s)
        except grpc.RpcError as error:
            print(f"ganserve-server: {address}: {_explain(error, credentials is not None)}", file=sys.stderr)
            raise typer.Exit(1) from error


def _explain(error: Any, by_tls: bool) -> str:
    text, code = " ".join(error.details().split()), error.code().name
    if code == "UNIMPLEMENTED":
        return f"{text}; is it the --admin-address?"
    if code == "UNAVAILABLE" and not by_tls and "refused" not in text:
        return f"{text}; does the server require TLS (--ca-file)?"
    return text


def _address(access: Access) -> str:
    address = access.settings.admin_address
    if address == "off":
        raise ValueError("--admin-address is off; set it in the settings, or as a flag before the word `admin`")
    host, port = split(address, "--admin-address")
    return f"{reachable(host)}:{port}"


def _metadata() -> list[tuple[str, str]]:
    token = os.environ.get("GANSERVE_TOKEN", "")
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ValueError(
            "GANSERVE_TOKEN has characters that a header cannot contain: leading or trailing blanks, or not ASCII"
        )
    return [("authorization", f"Bearer {token}")] if token else []


def _credentials(access: Access) -> "grpc.ChannelCredentials | None":
    """Return the TLS credentials; None for plain text.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not valid.
    """
    import grpc

    authority = access.ca_file or access.settings.tls_certificate_file
    certificate, key = access.certificate_file, access.key_file
    if (certificate is None) != (key is None):
        raise ValueError("a client certificate needs both --certificate-file and --key-file")
    pem = {str(file): Path(file).read_bytes() for file in (authority, certificate, key) if file}
    if not pem:
        return None
    checker = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # gRPC would not say which file is wrong
    try:
        if authority:
            checker.load_verify_locations(authority)
        if certificate:
            checker.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"{', '.join(pem)} must contain certificates and a key in PEM, not encrypted ({reason})"
        ) from error
    return grpc.ssl_channel_credentials(*(pem.get(str(file)) for file in (authority, key, certificate)))


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

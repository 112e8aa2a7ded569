"""The server's side of gRPC over HTTP/2: ganserve's own, or grpcio's. Services see both through `interface`.

Other packages may import `interface`, `addresses`, `credentials`, `limits` and `new_server`. Knows neither services nor
models nor tokens. May import `errors`, `start_errors`, `machine` and `shared`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

# Not imported here: settings import this package, and grpc is slow to import and reads its environment then.
if TYPE_CHECKING:
    from ganserve_server.transport.credentials import Credentials
    from ganserve_server.transport.interface import Server


def new_server(
    transport: Literal["own", "grpcio"],
    credentials: "Credentials",
    *,
    on_tls_failure: Callable[[OSError, str], None],
    on_aged: Callable[[], None] = lambda: None,
    on_ended: Callable[[str, str, str], None] = lambda *_: None,
    on_turned_away: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> "Server":
    """Return a server of the given transport, without importing the other one.

    Both servers get `options`. Only `own` gets the callbacks above, because grpcio's core does not report connections.
    """
    if transport == "grpcio":  # its core does not report connections
        from ganserve_server.transport.grpcio_server import GrpcioServer

        return GrpcioServer(tls=credentials.pem, **options)
    from ganserve_server.transport.grpc_server import GrpcServer

    return GrpcServer(
        tls=credentials.context,
        on_tls_failure=on_tls_failure,
        on_aged=on_aged,
        on_ended=on_ended,
        on_turned_away=on_turned_away,
        **options,
    )

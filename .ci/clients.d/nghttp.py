"""nghttp, nghttp2's client: tables for header compression of any size, many calls at once on one connection."""

import struct
import subprocess
import tempfile

import scenarios as given
from scenarios import Target, check

CALLS = 10


def nghttp(target: Target, *flags: str) -> bytes:
    """Make calls; return what nghttp prints."""
    message = given.SOME.SerializeToString()
    with tempfile.NamedTemporaryFile() as body:
        body.write(struct.pack(">BI", 0, len(message)) + message)
        body.flush()
        headers = [
            f"--header={header}" for header in (":method: POST", "content-type: application/grpc", "te: trailers")
        ]
        url = f"{'https' if target.ca_file else 'http'}://{target.address}{given.PATH}GenerateImages"
        command = ["nghttp", f"--data={body.name}", "--timeout=30", *headers, *flags, url]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False).stdout


def check_ok(target: Target, *flags: str) -> None:
    """Check that each of a few calls at once is answered with OK."""
    output = nghttp(target, "--verbose", "--null-out", f"--multiply={CALLS}", *flags).decode()
    found = output.count(" grpc-status: 0\n")
    check(found == CALLS, f"{found} of {CALLS} calls are OK: {output[-1000:]}")


def pixels(target: Target) -> None:
    check(target.pixels in (output := nghttp(target)), f"the pixels are not those that the SDK gets: {output[:1000]!r}")


def table_0(target: Target) -> None:
    check_ok(target, "--header-table-size=0")


def table_100(target: Target) -> None:
    check_ok(target, "--header-table-size=100")


def table_1024(target: Target) -> None:
    check_ok(target, "--header-table-size=1024")


def metadata(target: Target) -> None:
    check_ok(target, f"--header=x-large: {given.ACCEPTED_METADATA}")


given.run(pixels, table_0, table_100, table_1024, metadata)

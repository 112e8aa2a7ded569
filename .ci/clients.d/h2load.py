"""h2load, nghttp2's load generator: thousands of calls, and as many at once as a connection may have."""

import re
import struct
import subprocess
import tempfile

import scenarios as given
from scenarios import Target, check


def h2load(target: Target, requests: int, *flags: str) -> None:
    """Check that each of the calls is answered with an image."""
    message = given.ONE.SerializeToString()
    with tempfile.NamedTemporaryFile() as body:
        body.write(struct.pack(">BI", 0, len(message)) + message)
        body.flush()
        url = f"{'https' if target.ca_file else 'http'}://{target.address}{given.PATH}GenerateImages"
        command = ["h2load", f"--requests={requests}", f"--data={body.name}", "--header=te: trailers", *flags]
        command += ["--header=content-type: application/grpc", url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    check(f"{requests} succeeded, 0 failed, 0 errored, 0 timeout" in output, output[-1500:])
    data = re.search(r"\((\d+)\) data", output)
    # gRPC's errors are HTTP's 200, without a body.
    check(data is not None and int(data[1]) >= requests * given.IMAGE_BYTES, f"images are missing: {output[-1500:]}")


def requests(target: Target) -> None:
    h2load(target, 5000, "--clients=4", "--max-concurrent-streams=50")


def streams(target: Target) -> None:
    h2load(target, given.OPEN_STREAMS, "--clients=1", f"--max-concurrent-streams={given.OPEN_STREAMS}")


def table_0(target: Target) -> None:
    h2load(target, 100, "--clients=1", "--max-concurrent-streams=10", "--header-table-size=0")


given.run(requests, streams, table_0)

"""curl: gRPC by hand, a request a message."""

import base64
import gzip as gzip_format
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import scenarios as given
from google.protobuf.message import Message
from scenarios import Target, check

from ganserve.v1 import generation_pb2 as pb

# A stream that was reset, as curl's exit status.
RESET = 92


@dataclass(frozen=True)
class Answer:
    exit_status: int
    http: int
    fields: dict[str, str]  # headers and trailers
    messages: list[bytes]
    new_connections: int

    def check_ok(self) -> None:
        check(self.exit_status == 0 and self.fields.get("grpc-status") == "0", f"{self}"[:500])


def framed(message: Message, *, compress: bool = False) -> bytes:
    content = message.SerializeToString()
    content = gzip_format.compress(content) if compress else content
    return struct.pack(">BI", compress, len(content)) + content


def curl(target: Target, *calls: tuple[str, bytes, list[str]]) -> list[Answer]:
    """Make calls one after the other, each a method, its request's body and more headers."""
    command = ["curl"]
    with tempfile.TemporaryDirectory() as folder:
        for number, (method, body, headers) in enumerate(calls):
            (request := Path(folder, f"request-{number}")).write_bytes(body)
            (more := Path(folder, f"more-{number}")).write_text("".join(f"{header}\n" for header in headers))
            command += ["--next"] if number else []
            command += ["--silent", "--show-error", "--max-time", str(given.LIMIT_S)]
            command += ["--http2", "--cacert", target.ca_file] if target.ca_file else ["--http2-prior-knowledge"]
            command += [
                "--header",
                "content-type: application/grpc",
                "--header",
                "te: trailers",
                "--header",
                f"@{more}",
            ]
            command += ["--data-binary", f"@{request}", "--write-out", "%{exitcode} %{http_code} %{num_connects}\n"]
            command += ["--dump-header", f"{folder}/fields-{number}", "--output", f"{folder}/body-{number}"]
            command.append(f"{'https' if target.ca_file else 'http'}://{target.address}{given.PATH}{method}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        return [_answer(Path(folder), number, line) for number, line in enumerate(done.stdout.splitlines())]


def _answer(folder: Path, number: int, line: str) -> Answer:
    exit_status, http, connects = map(int, line.split())
    lines = (folder / f"fields-{number}").read_text().splitlines()
    fields = dict(line.split(": ", 1) for line in lines if ": " in line)
    file = folder / f"body-{number}"
    body, messages = file.read_bytes() if file.exists() else b"", []
    while http == 200 and body:
        size = struct.unpack(">I", body[1:5])[0]
        messages.append(body[5 : 5 + size])
        body = body[5 + size :]
    return Answer(exit_status, http, fields, messages, connects)


def unary(target: Target) -> None:
    (answer,) = curl(target, ("GenerateImages", framed(given.ONE), []))
    answer.check_ok()
    given.check_one(pb.GenerateImagesResponse.FromString(answer.messages[0]))


def pixels(target: Target) -> None:
    (answer,) = curl(target, ("GenerateImages", framed(given.SOME), []))
    answer.check_ok()
    given.check_pixels(pb.GenerateImagesResponse.FromString(answer.messages[0]).pixels, target)


def each(target: Target) -> None:
    body = b"".join(map(framed, (given.EACH, given.EACH_WRONG, given.EACH)))
    (answer,) = curl(target, ("GenerateEach", body, []))
    answer.check_ok()
    outcomes = [pb.GenerateEachResponse.FromString(message).WhichOneof("outcome") for message in answer.messages]
    check(outcomes == ["response", "error", "response"], f"the answers are {outcomes}")


def stream(target: Target) -> None:
    (answer,) = curl(target, ("StreamImages", framed(given.STREAM), []))
    answer.check_ok()
    count = sum(pb.StreamImagesResponse.FromString(message).chunk.count for message in answer.messages)
    check(count == given.STREAM_COUNT, f"{count} images")


def gzip(target: Target) -> None:
    body = framed(given.COMPRESSIBLE, compress=True)
    (answer,) = curl(target, ("GenerateImages", body, ["grpc-encoding: gzip"]))
    answer.check_ok()
    check(list(pb.GenerateImagesResponse.FromString(answer.messages[0]).labels) == [7] * 256, "the labels are others")


def metadata(target: Target) -> None:
    (answer,) = curl(target, ("GenerateImages", framed(given.ONE), [f"x-large: {given.ACCEPTED_METADATA}"]))
    answer.check_ok()


def oversized(target: Target) -> None:
    large = ("GenerateImages", framed(given.ONE), [f"x-large: {given.REFUSED_METADATA}"])
    usual = ("GenerateImages", framed(given.ONE), [])
    calls = (usual, large, usual, large, usual)
    # Without TLS, curl 7.88 cannot use a connection twice (curl/curl#10643).
    answers = curl(target, *calls) if target.ca_file else [answer for call in calls for answer in curl(target, call)]
    for number, answer in enumerate(answers):
        if number % 2:
            status = answer.fields.get("grpc-status")
            check(answer.exit_status == RESET or answer.http in (400, 431) or status in ("8", "2"), f"{answer}"[:500])
        else:
            answer.check_ok()
            check(not target.ca_file or answer.new_connections == (number == 0), "the connection was lost")


def details(target: Target) -> None:
    (answer,) = curl(target, ("GenerateImages", framed(given.WRONG), []))
    encoded = answer.fields.get("grpc-status-details-bin", "")
    check(answer.fields.get("grpc-status") == "3", f"HTTP {answer.http}, {answer.fields}")
    given.check_details("INVALID_ARGUMENT", base64.b64decode(encoded + "=" * (-len(encoded) % 4)))


given.run(unary, pixels, each, stream, gzip, metadata, oversized, details)

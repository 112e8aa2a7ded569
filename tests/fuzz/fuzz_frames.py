"""Fuzzes what reads frames, headers and messages, guided by coverage. Needs atheris: `pip install atheris`.

    python tests/fuzz/fuzz_frames.py -max_total_time=300    from the seeds and the corpus
    python tests/fuzz/fuzz_frames.py crash-0123             one input again
    python tests/fuzz/fuzz_frames.py -max_total_time=3600 FOUND tests/fuzz/corpus
    python tests/fuzz/fuzz_frames.py -set_cover_merge=1 tests/fuzz/corpus FOUND    takes over what FOUND's inputs add

What it reports, and leaves in the working folder as crash-...: an exception that escapes, an error in the log, a turn
of the loop that takes a second, a counter, task or timer that is left when the connection is over, and answers that no
client could read.
"""

import random
import shlex
import struct
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
CORPUS = ROOT / "tests" / "fuzz" / "corpus"

with atheris.instrument_imports(include=["ganserve_server.transport", "ganserve_server.services.generation", "hpack"]):
    from ganserve_server.services import generation  # noqa: F401
    from ganserve_server.transport import grpc_server, http2  # noqa: F401

with atheris.instrument_imports(include=["ganserve_server.services.messages"]):
    from ganserve_server.services import messages  # noqa: F401

from tests.fuzz.frames import MAX_BYTES, Target, split  # noqa: E402
from tests.fuzz.seeds import BODIES, HEADER_BLOCKS, seeds  # noqa: E402

OPTION_BYTES = 2
_KINDS = 11
_STREAMS = (0, 1, 1, 3, 5, 7, 2, 2**31 - 1)
_FLAGS = (0, 1, 4, 5, 5, 8, 0x20, 0x25)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Write a frame."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def new_frame(draw: random.Random) -> bytes:
    """Make a frame that may be right."""
    kind, stream, flags = draw.randrange(_KINDS), draw.choice(_STREAMS), draw.choice(_FLAGS)
    payload = draw.randbytes(draw.choice((0, 1, 4, 5, 8, 30)))
    if kind == 0:
        payload = draw.choice(BODIES)
    elif kind in (1, 9):
        payload = draw.choice(HEADER_BLOCKS)
    elif kind == 4:
        stream, value = 0, draw.choice((0, 1, 100, 65535, 1 << 20, 2**31 - 1, 2**32 - 1))
        payload = struct.pack(">HI", draw.choice((1, 2, 3, 4, 4, 5, 6)), value)
    elif kind in (3, 8):
        payload = draw.choice((0, 1, 8, 100, 65535, 2**31 - 1)).to_bytes(4, "big")
    return frame(kind, flags, stream, payload)


def changed(one: bytes, draw: random.Random) -> bytes:
    """Change a frame; its length stays right."""
    if len(one) < 9:
        return one
    kind, flags, stream = struct.unpack_from(">BBI", one, 3)
    payload = one[9:]
    what = draw.randrange(6)
    if what == 0:
        flags ^= 1 << draw.randrange(6)
    elif what == 1:
        stream = draw.choice(_STREAMS) if draw.random() < 0.5 else (stream + 2) & 0x7FFFFFFF
    elif what == 2:
        kind = draw.randrange(_KINDS)
    elif what == 3:
        payload = atheris.Mutate(payload, len(payload) + 16) if payload else draw.randbytes(5)
    elif what == 4:
        return b"".join(cut_up(kind, flags, stream, payload, draw))
    else:
        return new_frame(draw)
    return frame(kind, flags, stream, payload)


def cut_up(kind: int, flags: int, stream: int, payload: bytes, draw: random.Random) -> list[bytes]:
    """Divide a frame into two; a header block by CONTINUATION."""
    at = draw.randrange(len(payload) + 1)
    last = 9 if kind == 1 else kind
    held = flags & (0x4 if kind == 1 else 0x1)
    return [frame(kind, flags & ~held, stream, payload[:at]), frame(last, held, stream, payload[at:])]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change an input: mostly its frames as such, at times its bytes or its options."""
    draw = random.Random(seed)
    if len(data) < OPTION_BYTES or draw.random() < 0.15:
        return atheris.Mutate(data, max_size)
    options, frames = data[:OPTION_BYTES], split(data[OPTION_BYTES:])
    if draw.random() < 0.1:
        options = draw.randbytes(OPTION_BYTES)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        what, place = draw.randrange(6), draw.randrange(len(frames) + 1)
        if what == 0 or place == len(frames):
            frames.insert(place, new_frame(draw))
        elif what == 1:
            del frames[place]
        elif what == 2:
            frames[place:place] = [frames[place]] * draw.choice((1, 1, 3, 70))
        elif what == 3:
            other = draw.randrange(len(frames))
            frames[place], frames[other] = frames[other], frames[place]
        else:
            frames[place] = changed(frames[place], draw)
    return (options + b"".join(frames))[: min(max_size, MAX_BYTES)]


def main() -> None:
    """Fuzz."""
    arguments = sys.argv[1:]
    target = Target()
    with tempfile.TemporaryDirectory() as found:
        if all(argument.startswith("-") for argument in arguments):
            for number, one in enumerate(seeds()):
                (Path(found) / f"seed-{number}").write_bytes(one)
            arguments += [found, str(CORPUS)]
        if not any(argument.startswith("-max_len=") for argument in arguments):
            arguments.insert(0, "-max_len=8192")
        # Where it runs itself again, to merge or in several processes, libFuzzer hands this to the shell.
        program = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).resolve()))}"
        atheris.Setup([program, *arguments], target.run, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The fuzzer's inputs, without a fuzzer."""

import hashlib
from pathlib import Path

from tests.fuzz.frames import Target
from tests.fuzz.seeds import seeds

CORPUS = Path(__file__).parent / "corpus"


def test_no_input_leaves_anything_behind() -> None:
    inputs = {f"seed {number}": data for number, data in enumerate(seeds())}
    inputs |= {path.name: path.read_bytes() for path in sorted(CORPUS.iterdir())}
    target = Target()
    try:
        for name, data in inputs.items():
            try:
                target.run(data)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    finally:
        target.close()


def test_the_corpus_is_small_and_named_by_content() -> None:
    files = sorted(CORPUS.iterdir())
    assert 50 <= len(files) <= 200
    assert sum(path.stat().st_size for path in files) <= 200 << 10
    for path in files:
        assert path.name == hashlib.sha1(path.read_bytes()).hexdigest()

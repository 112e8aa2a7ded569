"""The provenance of an image, as its file has it: model, version, digest, seed, label, truncation, and further inputs.

Files of the server and of the SDK contain it as one JSON object: PNG in the text chunk "ganserve"; JPEG, WebP and TIFF
in EXIF's ImageDescription; GIF in its comment. A picture of several images (a sheet or an animation) also has:

- `count`: the number of images; `seed` and `label` are those of the first image.
- `seeds`: the seed of each image. Omitted if the seeds are consecutive, modulo 2^32, as in all contact sheets of a
  server.
- `labels`: the label of each image. A server's contact sheet of more than 4,096 images has only the first label.

In a server's contact sheet with more than 4,096 values of attributes, or too many characters, `seed` and `attributes`
are null.

Images between those of two seeds have `interpolation`, with `kind`, `seed_a`, `seed_b` and `steps`. If the picture does
not show all steps, `shown` lists the shown ones, from 0 on. The `seed` of such images is null, as for images of the
caller's own latents.

Images of a model with further inputs have `attributes`, an object with a number for each name, or with a list of one
for each image; and `input_seeds`, an object with the seed of each latent that does not follow from the image's seed.

The items of the other lists are numbers, or runs [first, length, step]: [7, 16, 0] is sixteen times 7, and [5, 3, 1] is
5, 6, 7. If the lists are so irregular that the JSON would exceed the size of a JPEG's EXIF, `seed`, `seeds`, `label`,
`labels`, `interpolation` and `attributes` are null.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ganserve._attributes import Values
from ganserve._latents import WAYS
from ganserve.errors import NoProvenanceError

_MAX_TEXT = 60_000  # characters; a JPEG holds 65,533 bytes of EXIF
_MAX_IMAGES = 1_000_000  # a file of a few bytes must not expand to more seeds
_MOST_SHOWN = 16  # numbers of a list
_LONGEST_SHOWN = 64  # characters of a name
_UINT32_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True, repr=False)
class Interpolation:
    """The source of images between those of two seeds: step i is i / (steps - 1) of the way from seed_a to seed_b.

    >>> client.interpolate("cdcgan-mnist", 1, 2, 3, label=7).provenance.interpolation
    Interpolation(kind='slerp', seed_a=1, seed_b=2, steps=3, shown=(0, 1, 2))

    `shown` has the step of each image, from 0 on.
    """

    kind: Literal["slerp", "linear"]
    seed_a: int
    seed_b: int
    steps: int
    shown: tuple[int, ...]

    def __repr__(self) -> str:
        return _shown(self, self.__slots__)


@dataclass(frozen=True, slots=True, repr=False)
class Provenance:
    """The source of an image, or of a picture of several images.

    >>> client.generate("cdcgan-mnist", seed=1, label=7)[0].provenance.seed
    1

    `seed` is None for images of an `interpolation`, and for images of the caller's own latents, which can't be made
    again from their provenance. `label` is None for an unconditional model. `count` is None for one image. Otherwise
    `seed` and `label` are those of the first image, and `seeds` and `labels` those of all images, in order. If `label`
    is set but `labels` is None, only the first label is known, as in a server's large contact sheets.
    """

    model: str
    version: int
    digest: str
    seed: int | None
    label: int | None
    truncation: float
    count: int | None = None
    seeds: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    interpolation: Interpolation | None = None
    attributes: Values | None = field(default=None, hash=False)
    input_seeds: Mapping[str, int] | None = field(default=None, hash=False)

    def __repr__(self) -> str:
        return _shown(self, self.__slots__)

    def to_json(self) -> str:
        """Serialise the provenance as the metadata of a file: ASCII, 60,000 characters at most."""
        content: dict[str, Any] = {
            "model": self.model,
            "version": self.version,
            "digest": self.digest,
            "seed": self.seed,
            "label": self.label,
            "truncation": self.truncation,
        }
        if (way := self.interpolation) is not None:
            content["interpolation"] = {each: getattr(way, each) for each in ("kind", "seed_a", "seed_b", "steps")}
            if way.shown != tuple(range(way.steps)):
                content["interpolation"]["shown"] = _to_runs(way.shown)
        if self.attributes is not None:
            content["attributes"] = dict(self.attributes)
        if self.input_seeds is not None:
            content["input_seeds"] = dict(self.input_seeds)
        if self.count is None:
            return json.dumps(content)
        content["count"] = self.count
        if self.seeds is not None and self.seeds != _consecutive(self.seeds[0], self.count):
            content["seeds"] = _to_runs(self.seeds)
        if self.labels is not None:
            content["labels"] = _to_runs(self.labels)
        text = json.dumps(content)
        if len(text) > _MAX_TEXT:
            lost = ("seed", "seeds", "label", "labels", "interpolation", "attributes")
            text = json.dumps({**content, **dict.fromkeys(lost)})
        return text

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """Read the metadata of a file. Unknown keys are ignored.

        Raises:
            NoProvenanceError: the text is not of the form that `to_json` or a server writes; the error says where.
        """
        # This check protects the parser from hostile files, such as one with a hundred million brackets.
        if len(text) > 2 * _MAX_TEXT:
            raise NoProvenanceError(f"it has {len(text)} characters; ganserve writes {_MAX_TEXT} at most")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise NoProvenanceError("it is not JSON, or it is truncated") from None
        if not isinstance(fields, dict):
            raise NoProvenanceError("it is not a JSON object")
        version = _integer(fields, "version")
        if not version:
            raise NoProvenanceError("its 'version' is not an integer of 1 or more")
        seed, label = _integer(fields, "seed"), _integer(fields, "label")
        count = _integer(fields, "count") if "count" in fields else None
        if count is not None and not 1 <= count <= _MAX_IMAGES:
            raise NoProvenanceError(f"its 'count' is not an integer from 1 to {_MAX_IMAGES}")
        seeds = labels = None
        if count is not None:
            if "seeds" in fields:
                seeds = _from_runs(fields, "seeds", count)
            elif seed is not None:
                seeds = _consecutive(seed, count)
            labels = _from_runs(fields, "labels", count)
        return cls(
            model=_string(fields, "model"),
            version=version,
            digest=_string(fields, "digest"),
            seed=seed,
            label=label,
            truncation=_truncation(fields),
            count=count,
            seeds=seeds,
            labels=labels,
            interpolation=_interpolation(fields, 1 if count is None else count),
            attributes=_attributes(fields, count),
            input_seeds=_input_seeds(fields),
        )


def read_provenance(source: str | Path | bytes | BinaryIO) -> Provenance:
    """Read the provenance in a file. The pixels are neither decoded nor compared.

    >>> client.generate("cdcgan-mnist", count=4, seed=1, label=7).sheet().save("sevens.png")
    >>> read_provenance("sevens.png").seeds
    (1, 2, 3, 4)

    Args:
        source: a path, the file's bytes, or an open binary file.

    Raises:
        NoProvenanceError: the file is not an image, or has no provenance; the text says what the SDK looked for.
        OSError: the file can't be opened.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "this")
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return _read(file, str(source))
    name = getattr(source, "name", None)  # a number or None if the file has no name
    return _read(source, name if isinstance(name, str) else "this")


def _read(file: BinaryIO, name: str) -> Provenance:
    from PIL import Image, UnidentifiedImageError

    from ganserve._formats import PNG_KEYWORD, read_metadata

    try:
        with Image.open(file) as image:
            found = read_metadata(image)
    # Pillow's readers raise nearly any exception on a broken file, and its guard against huge pictures another one.
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        wrong = "is not an image of a format that Pillow knows" if unknown else f"can't be read as an image: {error}"
        raise NoProvenanceError(f"{name} {wrong}") from error
    if found is None:
        raise NoProvenanceError(
            f"{name} doesn't say how it was made: there is no PNG text chunk {PNG_KEYWORD!r}, no EXIF "
            "ImageDescription and no GIF comment; the file was written without provenance, or another program "
            "removed it"
        )
    place, text = found
    try:
        return Provenance.from_json(text)
    except NoProvenanceError as error:
        raise NoProvenanceError(f"{name} doesn't say how it was made: its {place} isn't ganserve's; {error}") from None


def _shown(made: object, names: Sequence[str]) -> str:
    """Format the fields that are set; of long lists, only the first numbers."""
    known = {name: value for name in names if (value := getattr(made, name)) is not None}
    for name, value in known.items():
        long = isinstance(value, tuple) and len(value) > _MOST_SHOWN
        known[name] = f"({', '.join(map(str, value[:_MOST_SHOWN]))}, …)" if long else repr(value)
    return f"{type(made).__name__}({', '.join(f'{name}={value}' for name, value in known.items())})"


def _consecutive(first: int, count: int) -> tuple[int, ...]:
    return tuple(number % _UINT32_LIMIT for number in range(first, first + count))


def _to_runs(numbers: Sequence[int]) -> list[int | list[int]]:
    runs: list[int | list[int]] = []
    start = 0
    while start < len(numbers):
        step = numbers[start + 1] - numbers[start] if start + 1 < len(numbers) else 0
        stop = start + 1
        while step in (0, 1) and stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
            stop += 1
        if stop - start > 2:
            runs.append([numbers[start], stop - start, step])
        else:
            stop = start + 1
            runs.append(numbers[start])
        start = stop
    return runs


def _from_runs(fields: dict[str, Any], key: str, count: int) -> tuple[int, ...] | None:
    runs = fields.get(key)
    if runs is None:
        return None
    broken = NoProvenanceError(f"its {key!r} are not {count} numbers")
    if not isinstance(runs, list):
        raise broken
    numbers: list[int] = []
    for run in runs:
        first, length, step = run if isinstance(run, list) and len(run) == 3 else (run, 1, 0)
        if not (_is_uint32(first) and _is_uint32(length) and _is_uint32(step)):
            raise broken
        # Check before the run is expanded: its length can be any number.
        if step > 1 or length > count - len(numbers) or first + step * length > _UINT32_LIMIT:
            raise broken
        numbers += range(first, first + length) if step else [first] * length
    if len(numbers) < count:
        raise broken
    return tuple(numbers)


def _interpolation(fields: dict[str, Any], count: int) -> Interpolation | None:
    """Return the interpolation of `count` images, or None if there is none."""
    way = fields.get("interpolation")
    if way is None:
        return None
    if not isinstance(way, dict):
        raise NoProvenanceError("its 'interpolation' is not a JSON object")
    kind = _string(way, "kind")
    if kind not in WAYS:
        raise NoProvenanceError("its 'kind' is not slerp or linear")
    seed_a, seed_b, steps = (_integer(way, name) for name in ("seed_a", "seed_b", "steps"))
    if seed_a is None or seed_b is None or steps is None or not 2 <= steps <= _MAX_IMAGES:
        raise NoProvenanceError(f"its 'interpolation' does not go from one seed to another in 2 to {_MAX_IMAGES} steps")
    shown = _from_runs(way, "shown", count) if "shown" in way else tuple(range(steps))
    if shown is None or len(shown) != count or max(shown) >= steps:
        raise NoProvenanceError(f"its 'shown' are not {count} of {steps} steps")
    return Interpolation(kind, seed_a, seed_b, steps, shown)  # type: ignore[arg-type]


def _attributes(fields: dict[str, Any], count: int | None) -> Values | None:
    found = _by_name(fields, "attributes")
    if found is None:
        return None
    for name, value in found.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(map(_is_number, numbers)) or (isinstance(value, list) and len(value) != count):
            raise NoProvenanceError(
                f"its attribute {name[:_LONGEST_SHOWN]!r} is neither a number nor a list of {count or 1} numbers"
            )
    return {
        name: tuple(map(float, value)) if isinstance(value, list) else float(value) for name, value in found.items()
    }


def _input_seeds(fields: dict[str, Any]) -> dict[str, int] | None:
    found = _by_name(fields, "input_seeds")
    if found is not None and not all(map(_is_uint32, found.values())):
        raise NoProvenanceError(f"its 'input_seeds' are not integers from 0 to {_UINT32_LIMIT - 1}")
    return found


def _by_name(fields: dict[str, Any], key: str) -> dict[str, Any] | None:
    found = fields.get(key)
    if found is None or (isinstance(found, dict) and all(name and name.isprintable() for name in found)):
        return found
    raise NoProvenanceError(f"its {key!r} is not a JSON object with names")


def _is_number(value: Any) -> bool:
    # An integer of JSON can be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_uint32(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _UINT32_LIMIT


def _integer(fields: dict[str, Any], key: str) -> int | None:
    value = _field(fields, key)
    if value is not None and not _is_uint32(value):
        raise NoProvenanceError(f"its {key!r} is not an integer from 0 to {_UINT32_LIMIT - 1}")
    return value  # type: ignore[no-any-return]


def _string(fields: dict[str, Any], key: str) -> str:
    value = _field(fields, key)
    # Printable, because these texts come from any file and are shown in terminals.
    if not isinstance(value, str) or not value or not value.isprintable():
        raise NoProvenanceError(f"its {key!r} is not a name")
    return value


def _truncation(fields: dict[str, Any]) -> float:
    value = _field(fields, "truncation")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 2:
        raise NoProvenanceError("its 'truncation' is not a number from 0 to 2")
    return float(value)


def _field(fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise NoProvenanceError(f"it has no {key!r}")
    return fields[key]

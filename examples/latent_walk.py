"""Writes an animation of a walk through the latent space, from picture to picture and back to the first.

python examples/latent_walk.py --label 7 --out walk.gif
"""

import argparse
from itertools import pairwise

from ganserve import Client
from ganserve.images import concatenate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="HOST:PORT of the server; default: GANSERVE_ADDRESS, or 127.0.0.1:50051")
    parser.add_argument("--model", default="cdcgan-mnist")
    parser.add_argument("--label", help="class of a conditional model, as index or name", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4], help="seeds of the pictures on the way")
    parser.add_argument("--steps", type=int, default=16, help="pictures from one seed to the next")
    parser.add_argument("--out", default="walk.gif", help="ending in .gif or .webp")
    options = parser.parse_args()

    with Client(options.address) as client:
        model = client.model(options.model)
        label = None
        if model.conditional:
            given = options.label or "0"
            label = model.label(int(given) if given.isdecimal() else given)
        stages = pairwise([*options.seeds, options.seeds[0]])
        # Each stage ends where the next one starts; keep that picture once.
        walk = concatenate(
            [client.interpolate(model.name, a, b, options.steps + 1, label=label)[:-1] for a, b in stages]
        )
    walk.gif(options.out, bounce=False, scale=max(1, 256 // model.width))
    print(f"{options.out}: {len(walk)} pictures of {model.name} version {model.version}")


if __name__ == "__main__":
    main()

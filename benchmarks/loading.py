"""Measures how long a data set of files takes to load, and how much memory: first, again, by two processes, evaluated.

Each load is a process of its own, which reads the whole training part once, as an epoch does. The cache is a temporary
folder. `decoded` counts the processes that decoded the images. Memory is the largest resident size without the pages of
mapped files, which all processes share and the kernel may drop.

    python benchmarks/loading.py cifar10-jpeg.tar.xz [--image-size 32] [--channels 4]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOAD = """
import json, sys, threading, time
from pathlib import Path
import torch
from ganserve_trainer.data import folders
from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.data.reading import Reading

path, size, channels, parts = json.loads(sys.argv[1])
largest, decoded, build = 0, 0, folders._build

def watch():
    global largest
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        largest = max(largest, sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10)
        time.sleep(0.02)

def counting(*arguments):
    global decoded
    decoded += 1
    return build(*arguments)

folders._build = counting
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
before, started, cpu = largest, time.monotonic(), time.process_time()
for train in parts:
    data = load_dataset(path, Path("data"), train=train, image_size=size, reading=Reading(channels=channels))
    total = sum(int(images.sum(dtype=torch.int64)) for images in data.images.split(1000))
took = time.monotonic() - started
print(json.dumps({"seconds": took, "cpu": time.process_time() - cpu, "mib": largest - before, "decoded": decoded,
                  "images": len(data.images), "digest": data.digest()}))
"""


def load(options: list[Any], cache: str, processes: int = 1) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", LOAD, json.dumps(options)]
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        for _ in range(processes)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--channels", type=int)
    arguments = parser.parse_args()
    options = [str(arguments.data.absolute()), arguments.image_size, arguments.channels]
    print(f"{arguments.data.name}, {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f}")
    print(f"{'what':24}{'seconds':>9}{'CPU s':>8}{'decoded':>9}{'MiB':>7}")
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        for what, parts, folder, processes in (
            ("first start", [True], cache, 1),
            ("second start", [True], cache, 1),
            ("evaluate, both parts", [True, False], cache, 1),
            ("two processes, first", [True], other, 2),
        ):
            found = load([*options, parts], folder, processes)
            seconds, cpu = max(each["seconds"] for each in found), sum(each["cpu"] for each in found)
            decoded, mib = sum(each["decoded"] for each in found), max(each["mib"] for each in found)
            print(f"{what:24}{seconds:9.1f}{cpu:8.1f}{decoded:9}{mib:7}", flush=True)


if __name__ == "__main__":
    main()

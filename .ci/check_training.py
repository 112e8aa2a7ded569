"""Train on real MNIST for a minute or two, evaluate, export: the way of a model, with bars that a fault would miss."""

import json
import subprocess
import sys
from pathlib import Path

IMAGES = 96_000
BARS = {"label_accuracy": 0.95, "classification_accuracy_score": 0.85, "recall": 0.5, "precision": 0.6}

data_root, scratch = Path(sys.argv[1]), Path(sys.argv[2])
program = Path(sys.executable).with_name("ganserve-trainer")
run = scratch / "digits"


def call(*arguments: object) -> None:
    subprocess.run([program, *map(str, arguments)], check=True)


call("train", "--preset", "cdcgan", "--data-root", data_root, "--out", run, "--images", IMAGES)
call("evaluate", run, "--data-root", data_root)
call("export", run, "--repository", scratch / "models", "--name", "digits")
found = {metric["name"]: metric["value"] for metric in json.loads((run / "evaluation.json").read_text())["metrics"]}
missed = {name: found[name] for name, bar in BARS.items() if found[name] < bar}
if missed:
    sys.exit(f"after {IMAGES} images of MNIST: {missed}, the bars are {BARS}")
if b'role="alert"' in (run / "report.html").read_bytes() or not (run / "neighbours.png").exists():
    sys.exit("the run's report has an alarm, or evaluate left no neighbours.png")

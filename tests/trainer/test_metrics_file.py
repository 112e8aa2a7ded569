import json
import math
from pathlib import Path

from ganserve_trainer.report.history import Alarm, History, Measurement, Point
from ganserve_trainer.report.metrics_file import MetricsFile


def point(images_seen: int) -> Point:
    return Point(images_seen, 1.5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, math.nan)


def test_a_line_has_the_documented_keys(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", History())
    file.add(point(20))
    file.add(Alarm(20, "mode collapse", "all the same"))
    file.add(Measurement(20, 1.5, {"fid": 12.5, "recall": math.inf}))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {
            "kind": "point",
            "images_seen": 20,
            "elapsed_s": 1.5,
            "discriminator_loss": 0.1,
            "generator_loss": 0.2,
            "real_accuracy": 0.3,
            "fake_accuracy": 0.4,
            "discriminator_gradient_norm": 0.5,
            "generator_gradient_norm": 0.6,
            "diversity": None,
        },
        {"kind": "alarm", "images_seen": 20, "name": "mode collapse", "message": "all the same"},
        {"kind": "measurement", "images_seen": 20, "elapsed_s": 1.5, "metrics": {"fid": 12.5, "recall": None}},
    ]


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History([point(20)], [Measurement(20, 1.5, {"fid": 1.0})], [Alarm(20, "mode collapse", "")])
    killed = MetricsFile(path, history)
    written = path.read_bytes()
    killed.add(point(40))
    with path.open("a") as torn:
        torn.write('{"kind": "poi')
    resumed = MetricsFile(path, history)
    assert path.read_bytes() == written
    resumed.add(point(60))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line["images_seen"]) for line in lines] == [
        ("point", 20),
        ("alarm", 20),
        ("measurement", 20),
        ("point", 60),
    ]

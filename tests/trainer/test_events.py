import math
import subprocess
import sys
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ganserve_trainer.report.events import TensorBoardWriter
from ganserve_trainer.report.history import Alarm, Measurement, Point


def point(images_seen: int) -> Point:
    return Point(images_seen, 1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, images_seen / 1000)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_gets_points_metrics_alarms_and_sheets(tmp_path: Path) -> None:
    Image.new("L", (12, 8), 200).save(tmp_path / "sheet.png")
    with TensorBoardWriter(tmp_path / "events") as writer:
        writer.point(point(100))
        writer.point(point(200)._replace(generator_loss=math.nan))
        writer.measurement(Measurement(200, 2.0, {"fid": 12.5}))
        writer.alarm(Alarm(200, "mode collapse", "all the same"))
        writer.sheet(tmp_path / "sheet.png", 200)
    events = read(tmp_path / "events")
    assert {name: round(events.Scalars(name)[0].value, 6) for name in events.Tags()["scalars"]} == {
        "loss/discriminator": 0.1,
        "loss/generator": 0.2,
        "accuracy/real": 0.3,
        "accuracy/fake": 0.4,
        "gradient_norm/discriminator": 0.5,
        "gradient_norm/generator": 0.6,
        "diversity": 0.1,
        "metrics/fid": 12.5,
    }
    assert [scalar.step for scalar in events.Scalars("diversity")] == [100, 200]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (200, 12, 8)
    (text,) = events.Tensors("alarms/mode collapse/text_summary")
    assert text.tensor_proto.string_val == [b"all the same"]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    killed = TensorBoardWriter(tmp_path)
    for images_seen in (100, 200, 300):
        killed.point(point(images_seen))
    killed.flush()
    with TensorBoardWriter(tmp_path, resume_at=200) as writer:
        writer.point(point(350))
    assert [scalar.step for scalar in read(tmp_path).Scalars("diversity")] == [100, 200, 350]
    killed.close()


def test_tensorboard_is_imported_only_by_a_writer() -> None:
    code = "import sys, ganserve_trainer.report.events; print([name for name in sys.modules if 'tensorboard' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

import json
import sys
from pathlib import Path

import pytest

from ganserve_trainer.cli import main
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import judge
from ganserve_trainer.report.history import Alarm, History, Point
from ganserve_trainer.train.checkpoints import load_checkpoint
from ganserve_trainer.train.monitoring import MODE_COLLAPSE
from ganserve_trainer.train.run import Run
from ganserve_trainer.train.sweep import combinations, outcome, parse_axis, table


def test_axes_are_read_as_their_settings_types() -> None:
    assert parse_axis("loss=hinge,minimax") == ("loss", ["hinge", "minimax"])
    assert parse_axis("batch-size=32, 64") == ("batch_size", [32, 64])
    assert parse_axis("learning_rate=1e-3,2") == ("learning_rate", [0.001, 2.0])
    assert parse_axis("attention=true,false") == ("attention", [True, False])
    assert parse_axis("image_size=32") == ("image_size", [32])
    for text, message in [
        ("loss", "is not an axis"),
        ("lss=a", "did you mean loss"),
        ("loss=", "is not an axis"),
        ("width=a", "int"),
    ]:
        with pytest.raises(TrainerError, match=message):
            parse_axis(text)


def test_every_combination_comes_once() -> None:
    assert combinations([("width", [8, 16]), ("loss", ["hinge"]), ("seed", [0, 1])]) == [
        {"width": width, "loss": "hinge", "seed": seed} for width in (8, 16) for seed in (0, 1)
    ]


def test_a_table_has_a_column_for_every_figure_and_the_outcome_last() -> None:
    rows = [{"loss": "a|b", "outcome": "no alarm", "fid": 1.23456}, {"loss": "c", "fid": 10.0, "recall": 0.5}]
    assert table(rows).splitlines() == [
        "| loss | fid | recall | outcome |",
        "|---|---|---|---|",
        "| a\\|b | 1.235 |  | no alarm |",
        "| c | 10 | 0.5 |  |",
    ]


def test_the_outcome_is_what_the_alarms_say() -> None:
    late = [Point(20_000, *[1.0] * 8)]
    assert outcome(History()) == "too early to tell"
    assert outcome(History(late)) == "no alarm"
    alarms = [Alarm(1, "discriminator overpowers", ""), Alarm(2, MODE_COLLAPSE, "")]
    assert outcome(History(late, alarms=alarms[:1])) == "discriminator overpowers"
    assert outcome(History(late, alarms=alarms)) == "collapsed"


def test_a_sweep_trains_measures_and_goes_on_where_it_was(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(judge, "_LEAST_STEPS", 2)
    monkeypatch.setattr(judge, "_EPOCHS", 0)
    small = ["--width", "4", "--batch-size", "16", "--images", "64", "--measured-images", "50"]
    command = ["ganserve-trainer", "sweep", "--out", str(tmp_path / "sweep"), "--data-root", str(data_root), *small]
    axes = ["--preset", "cdcgan", "--vary", "loss=hinge,minimax", "--vary", "label_smoothing=0,0.1"]
    monkeypatch.setattr(sys, "argv", [*command, *axes])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "sweep" / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines()]
    assert rows[0][:5] == ["loss", "label_smoothing", "images", "minutes", "images_per_s"]
    assert [row[:3] for row in rows[2:]] == [
        ["hinge", "0", "64"],
        ["hinge", "0.1", ""],
        ["minimax", "0", "64"],
        ["minimax", "0.1", "64"],
    ]
    assert "hinge has none" in rows[3][-1]
    assert rows[2][-1] == "too early to tell"
    assert float(rows[2][rows[0].index("diversity")]) > 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    trained = ["loss=hinge,label_smoothing=0.0", "loss=minimax,label_smoothing=0.0", "loss=minimax,label_smoothing=0.1"]
    assert [name.rpartition(",")[0] for name in sorted(results)] == trained
    assert 0 <= results[min(results)]["label_accuracy"] <= 1
    folder = tmp_path / "sweep" / min(results)
    assert load_checkpoint(folder).settings.conditional

    # What is complete is left alone: the run could not even be read any more.
    for file in (folder / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == printed.out


def test_a_changed_sweep_never_shows_the_figures_of_another_run(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(judge, "_LEAST_STEPS", 2)
    monkeypatch.setattr(judge, "_EPOCHS", 0)
    steps = []
    step = Run.step
    monkeypatch.setattr(Run, "step", lambda run: steps.append(run.settings.width) or step(run))

    def swept(width: int, images: int, measured: int = 50) -> tuple[str, dict[str, dict[str, object]]]:
        """Return the folder, and the figures."""
        steps.clear()
        command = ["ganserve-trainer", "sweep", "--out", str(tmp_path / "sweep"), "--data-root", str(data_root)]
        command += ["--preset", "mlp", "--width", str(width), "--images", str(images), "--batch-size", "16"]
        monkeypatch.setattr(sys, "argv", [*command, "--measured-images", str(measured), "--vary", "loss=hinge"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        capsys.readouterr()
        ((folder, row),) = json.loads((tmp_path / "sweep" / "results.json").read_text()).items()
        return folder, row

    first = swept(4, 64)
    assert (first[1]["images"], steps) == (64, [4] * 4)
    assert swept(4, 64) == first
    assert not steps
    # Another width is another run; a longer run continues; a shorter one is trained anew, beside the longer one.
    wider = swept(8, 64)
    assert (wider[0] != first[0], wider[1]["fid"] != first[1]["fid"], steps) == (True, True, [8] * 4)
    longer = swept(4, 128)
    assert (longer[0], longer[1]["images"], steps) == (first[0], 128, [4] * 4)
    shorter = swept(4, 64)
    assert (shorter[1]["images"], shorter[1]["fid"], steps) == (64, first[1]["fid"], [4] * 4)
    # More images to measure: no step is trained, but the figures are others.
    again = swept(4, 128, measured=60)
    assert (again[1]["images"], again[1]["fid"] != longer[1]["fid"], steps) == (128, True, [])
    assert swept(4, 64)[1] == shorter[1]


def test_a_sweep_in_which_nothing_can_be_trained_says_so(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ganserve-trainer", "sweep", "--out", str(tmp_path / "sweep"), "--data-root", str(data_root)]
    monkeypatch.setattr(sys, "argv", [*command, "--preset", "mlp", "--vary", "batch_size=5000", "--images", "64"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "none of the 1 runs could be trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (["loss=hinge,minmax"], "minmax"),
        (["attention=false,true", "loss=hinge,minimax"], "attention"),
        (["los=hinge,minimax"], "there is no setting 'los'; did you mean loss?"),
        (["loss"], "such as loss=hinge,minimax"),
    ],
)
def test_a_value_that_nothing_can_be_trained_with_is_refused_before_anything_is_trained(
    axes: list[str],
    text: str,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["ganserve-trainer", "sweep", "--out", str(tmp_path / "sweep"), "--data-root", str(data_root)]
    command += ["--preset", "mlp", "--images", "64", *(part for axis in axes for part in ("--vary", axis))]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()

"""How a data set of files is read: which images train, which are kept for testing, and what becomes of their pixels."""

from dataclasses import dataclass

from ganserve_trainer.errors import TrainerError


@dataclass(frozen=True, slots=True)
class Reading:
    """What the settings of a run say about its data; the built-in data sets take the defaults only.

    Raises:
        TrainerError: two of the values contradict each other.
    """

    train_folder: str = ""  # the folder of the training images in the data set; "": found by its name
    test_folder: str = ""  # the folder of the test images, in the data set or elsewhere; "": found by its name
    split: float | None = None  # the share of the images that trains; None: folders decide, otherwise 0.9
    train_on_all: bool = False
    channels: int | None = None  # None: 1 if all pictures are grey, otherwise 3
    background: str = "white"  # the colour behind transparent pixels

    def __post_init__(self) -> None:
        if self.train_on_all and self.split is not None:
            raise TrainerError("train_on_all leaves nothing to split; leave out train_on_all or split")
        if self.split is not None and self.train_folder and self.test_folder:
            raise TrainerError("split has no effect beside train_folder and test_folder; leave it out")
        if self.channels not in {None, 1, 3, 4}:
            raise TrainerError(
                f"channels is {self.channels}; it must be 1 (grey), 3 (colour) or 4 (colour and transparency)"
            )

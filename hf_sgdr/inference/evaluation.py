"""The evaluation of a model on a folder of images, told as a report or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_sgdr.inference.interpretation import ClassifierInterpretation, ImagePrediction
from hf_sgdr.inference.report import Block, Heading, Paragraph, Picture, Table

CLASSES_ONE_BY_ONE = 4  # up to so many, images are shown class by class, as the lesson does
MISTAKES = 20  # kinds of them that are listed
BESIDE_EACH_OTHER = 4  # images of a kind


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, on which images, and how it went.

    Args:
        model (`str`): its id on the Hub, or the name of its folder.
        images (`str`): which, in words.
        folder (`Path`): images are called by their path below it.
        tta (`int`): augmented views beside the plain image.
        found ([`ClassifierInterpretation`]): the predictions.
        metrics (`dict[str, float]`): accuracy, loss, and mean precision, recall and f1.
        unreadable (`dict[str, str]`): the reason for each image that was left out.
        in_training (`int`, *optional*): how many of the images the model was trained on; None where it is not known.
    """

    model: str
    images: str
    folder: Path
    tta: int
    found: ClassifierInterpretation
    metrics: dict[str, float]
    unreadable: dict[str, str]
    in_training: int | None = None

    def seen_before(self) -> str:
        """A sentence about how many of the images the model was trained on."""
        if self.in_training is None:
            return "It is not known whether the model was trained on some of these images."
        if not self.in_training:
            return "None of these images was among those that the model was trained on."
        return (
            f"{self.in_training} of these {len(self.found.labels)} images are among those that the model was trained "
            "on: the figures are better than those of new images."
        )

    def to_json(self) -> str:
        """All figures, schema 1.

        Keys: model, photos, of, in_training, tta, metrics, classes, confusion_matrix, unreadable.
        """
        content: dict[str, Any] = {
            "schema": 1,
            "model": self.model,
            "photos": len(self.found.labels),
            "of": self.images,
            "in_training": self.in_training,
            "tta": self.tta,
            "metrics": self.metrics,
            "classes": [
                {**{name: value for name, value in asdict(one).items() if name != "images"}, "photos": one.images}
                for one in self.found.per_class()
            ],
            "confusion_matrix": self.found.confusion_matrix().tolist(),
            "unreadable": self.unreadable,
        }
        return json.dumps(content) + "\n"

    def blocks(self, with_images: bool) -> list[Block]:
        """The report, block by block; images are shown only where asked for, as they may be private."""
        found = self.found
        views = f" Predictions are the mean over each image and {self.tta} augmented views of it." * bool(self.tta)
        what = {
            "accuracy": "share of images whose likeliest class is theirs",
            "loss": "mean of -log of the probability of the true class",
            "precision": "mean over the classes that occur or are predicted",
            "recall": "mean over these classes",
            "f1": "mean over these classes",
        }
        return [
            Paragraph(f"{len(found.labels)} images ({self.images}), {len(found.names)} classes.{views}"),
            Paragraph(self.seen_before()),
            Table(
                "Figures of all images",
                ["figure", "value", "what it is"],
                [[name, self.metrics[name], words] for name, words in what.items()],
            ),
            *self._mistakes(),
            *self._classes(),
            *(self._shown_images() if with_images else []),
            *self._left_out(),
        ]

    def _mistakes(self) -> list[Block]:
        mistakes = self.found.most_confused()
        some = f" ({MISTAKES} of {len(mistakes)} kinds)" if len(mistakes) > MISTAKES else ""
        listing: Block = Paragraph("No image is taken for another class than its own.")
        if mistakes:
            caption = f"Mistakes, the most frequent first{some}"
            listing = Table(caption, ["truth", "predicted", "images"], mistakes[:MISTAKES])
        description = (
            "Confusion matrix, a row for each true class, a column for each prediction; the tables say it, too."
        )
        axes = self.found.plot_confusion_matrix()
        return [Heading("What is taken for what"), Picture(axes, "confusion-matrix", description), listing]

    def _classes(self) -> list[Block]:
        description = "Precision and recall of each class; the table below has the figures."
        return [
            Heading("Class by class"),
            Picture(self.found.plot_per_class(), "classes", description),
            Paragraph(
                "Precision: of the images predicted as the class, the share that is of it. "
                "Recall: of its images, the share predicted as it."
            ),
            Table(
                "Figures of each class",
                ["class", "images", "precision", "recall", "f1"],
                [[one.name, one.images, one.precision, one.recall, one.f1] for one in self.found.per_class()],
            ),
        ]

    def _shown_images(self) -> list[Block]:
        """The lesson's pictures: most correct and incorrect, class by class where there are few, and most uncertain."""
        found, n = self.found, BESIDE_EACH_OTHER
        classes: list[str | None] = [None] if len(found.names) > CLASSES_ONE_BY_ONE else [*found.names]
        result: list[Block] = []
        for number, name in enumerate(classes):
            of = "" if name is None else f": {name}"
            right, wrong = found.most_correct(n, name), found.most_incorrect(n, name)
            result += [
                Heading(f"Most correct{of}"),
                Picture(found.plot_most_correct(n, name), f"most-correct-{number}", self._described("Right", right)),
                Heading(f"Most incorrect{of}"),
                Picture(
                    found.plot_most_incorrect(n, name),
                    f"most-incorrect-{number}",
                    self._described("Wrong", wrong),
                ),
            ]
        description = self._described("Undecided", found.most_uncertain(n))
        picture = Picture(found.plot_most_uncertain(n), "most-uncertain", description)
        return [*result, Heading("Most uncertain"), picture]

    def _left_out(self) -> list[Block]:
        if not self.unreadable:
            return []
        rows = [[file, reason] for file, reason in self.unreadable.items()]
        return [Heading("Left out"), Table("Images that cannot be read", ["file", "reason"], rows)]

    def _described(self, what: str, chosen: Sequence[ImagePrediction]) -> str:
        files = [Path(one.file).relative_to(self.folder).as_posix() for one in chosen if one.file is not None]
        each = [f"{file}, {one.predicted} {one.probability:.1%}" for file, one in zip(files, chosen, strict=True)]
        return f"{what}: {'; '.join(each) or 'none'}"

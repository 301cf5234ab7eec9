import matplotlib.figure
import numpy as np
import pytest
import torch
from datasets import ClassLabel
from sklearn import metrics
from transformers import Trainer, TrainingArguments

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.inference.interpretation import ClassifierInterpretation, ClassReport

NAMES = ["cats", "dogs", "birds"]
#                 right, sure       wrong              right, unsure      wrong, very         right
PROBABILITIES = [[0.9, 0.05, 0.05], [0.2, 0.5, 0.3], [0.1, 0.44, 0.46], [0.95, 0.03, 0.02], [0.3, 0.6, 0.1]]
LABELS = [0, 0, 2, 1, 1]


@pytest.fixture
def small():
    return ClassifierInterpretation(PROBABILITIES, LABELS, NAMES)


@pytest.fixture(scope="module")
def random_case():
    """2,000 images of seven classes; nobody predicts the sixth, and no image is of the seventh."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 2000)
    logits = rng.normal(size=(2000, 7)) + 2.0 * np.eye(7)[labels]
    logits[:, 5] = -9.0
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return ClassifierInterpretation(probabilities, labels, [f"class {i}" for i in range(7)])


@pytest.fixture
def trainer(make_trainer, tmp_path, make_image_folder, tiny_model):
    folder = make_image_folder(tmp_path / "p", {"train": {"cats": 6, "dogs": 6}, "valid": {"cats": 7, "dogs": 6}})
    return make_trainer(tiny_model, images=folder, per_device_eval_batch_size=4)


# ---- Sums, against scikit-learn ----


def test_sums_equal_those_of_scikit_learn(random_case):
    truth, predicted = random_case.labels, random_case.predicted
    ids = range(7)
    assert random_case.accuracy == metrics.accuracy_score(truth, predicted)
    assert random_case.loss == pytest.approx(metrics.log_loss(truth, random_case.probabilities, labels=ids), rel=1e-12)
    expected = metrics.confusion_matrix(truth, predicted, labels=ids)
    np.testing.assert_array_equal(random_case.confusion_matrix(), expected)
    np.testing.assert_allclose(
        random_case.confusion_matrix(normalize=True),
        metrics.confusion_matrix(truth, predicted, labels=ids, normalize="true"),
    )
    expected = metrics.classification_report(
        truth, predicted, labels=ids, target_names=random_case.names, output_dict=True, zero_division=np.nan
    )
    for report in random_case.per_class():
        theirs = expected[report.name]
        assert report.images == theirs["support"]
        for ours, name in ((report.precision, "precision"), (report.recall, "recall"), (report.f1, "f1-score")):
            np.testing.assert_allclose(np.nan if ours is None else ours, theirs[name], err_msg=f"{report.name} {name}")


def test_what_is_undefined_is_none():
    found = ClassifierInterpretation([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1]], [0, 1], NAMES)
    assert found.per_class() == [
        ClassReport("cats", 1, precision=0.5, recall=1.0, f1=2 / 3),
        ClassReport("dogs", 1, precision=None, recall=0.0, f1=0.0),
        ClassReport("birds", 0, precision=None, recall=None, f1=None),
    ]
    assert found.confusion_matrix(normalize=True)[2].tolist() == [0.0, 0.0, 0.0]


def test_rows_of_the_matrix_are_the_truth(small):
    assert small.confusion_matrix().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert small.confusion_matrix().dtype == np.int64


def test_most_confused_is_a_list_of_mistakes_by_frequency():
    one_hot = np.eye(3)[[1, 1, 2, 0, 0, 1]]
    found = ClassifierInterpretation(one_hot, [0, 0, 1, 2, 0, 1], NAMES)
    assert found.most_confused() == [("cats", "dogs", 2), ("dogs", "birds", 1), ("birds", "cats", 1)]
    assert found.most_confused(min_count=2) == [("cats", "dogs", 2)]
    assert found.most_confused(min_count=3) == []
    with pytest.raises(ValueError, match="min_count=0"):
        found.most_confused(0)


# ---- Single images, as the lesson defines them ----


def test_most_correct_incorrect_and_uncertain(small):
    assert [one.index for one in small.most_correct()] == [0, 4, 2]
    assert [one.index for one in small.most_incorrect()] == [3, 1]
    assert [one.index for one in small.most_uncertain(2)] == [2, 1]
    worst = small.most_incorrect(1)[0]
    assert (worst.truth, worst.predicted, worst.probability, worst.probability_of_truth) == (
        "dogs",
        "cats",
        pytest.approx(0.95),
        pytest.approx(0.03),
    )
    assert worst.loss == pytest.approx(-np.log(0.03))


def test_by_class_means_images_of_that_class(small):
    assert [one.index for one in small.most_correct(of_class="dogs")] == [4]
    assert [one.index for one in small.most_incorrect(of_class="dogs")] == [3]
    assert [one.index for one in small.most_incorrect(of_class=0)] == [1]
    assert small.most_incorrect(of_class="birds") == []


def test_with_two_classes_they_are_those_of_the_lesson():
    rng = np.random.default_rng(1)
    dog, is_dog = rng.random(300), rng.integers(0, 2, 300)
    found = ClassifierInterpretation(np.stack([1 - dog, dog], axis=1), is_dog, ["cats", "dogs"])

    def most_by_correct(y, is_correct):  # the lesson: by class, from the end of its probability that fits
        chosen = np.flatnonzero((((dog > 0.5) == is_dog) == is_correct) & (is_dog == y))
        return chosen[np.argsort((-1 if (y == 1) == is_correct else 1) * dog[chosen])[:4]].tolist()

    for y, name in enumerate(found.names):
        assert [one.index for one in found.most_correct(of_class=name)] == most_by_correct(y, True)
        assert [one.index for one in found.most_incorrect(of_class=name)] == most_by_correct(y, False)
    assert [one.index for one in found.most_uncertain()] == np.argsort(np.abs(dog - 0.5))[:4].tolist()


def test_ties_stay_in_the_order_of_the_images():
    found = ClassifierInterpretation([[0.5, 0.5]] * 6, [0] * 6, ["a", "b"])
    assert [one.index for one in found.most_uncertain(3)] == [0, 1, 2]
    assert [one.index for one in found.most_correct(9)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"of_class": "cat"}, r"of_class='cat': give a class by its name \('cats', 'dogs', 'birds'\) or its id"),
        ({"of_class": 3}, r"of_class=3: give a class by its name .* or its id \(0 to 2\)"),
        ({"of_class": -1}, r"of_class=-1: give a class by its name .* or its id \(0 to 2\)"),
        ({"n": 0}, "n=0"),
        ({"n": 2.5}, "n=2.5"),
    ],
)
def test_a_wrong_class_or_number_is_said(small, words, message):
    for method in (small.most_correct, small.most_incorrect):
        with pytest.raises(ValueError, match=message):
            method(**words)


def test_images_are_read_only_when_looked_at(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"p": {"cats": 1}})
    file = root / "p" / "cats" / "000.jpg"
    found = ClassifierInterpretation([[0.9, 0.1], [0.2, 0.8]], [0, 0], ["a", "b"], [file, tmp_path / "gone.jpg"])
    right, wrong = found.most_correct(1)[0], found.most_incorrect(1)[0]
    assert right.image.size == (56, 84)
    assert right.file == str(file)
    with pytest.raises(ValueError, match=r"gone\.jpg: cannot be read"):
        wrong.image  # noqa: B018
    without = ClassifierInterpretation([[0.9, 0.1]], [0], ["a", "b"]).most_correct()[0]
    assert without.file is None
    with pytest.raises(ValueError, match="no images to show: give ClassifierInterpretation its images="):
        without.image  # noqa: B018


# ---- Wrong input ----


@pytest.mark.parametrize(
    ("probabilities", "labels", "names", "message"),
    [
        ([[2.0, -1.0], [0.1, 0.9]], [0, 1], ["a", "b"], "Row 0 is no probabilities.*its lowest is -1.*softmax"),
        ([[0.5, 0.5], [0.5, np.nan]], [0, 1], ["a", "b"], "Row 1 is no probabilities: it sums to nan"),
        ([[0.0, -0.7]], [0], ["a", "b"], "Row 0 is no probabilities"),  # log-probabilities
        ([0.5, 0.5], [0], ["a", "b"], r"shape \(2,\): give \(images, classes\)"),
        (np.zeros((0, 2)), [], ["a", "b"], r"shape \(0, 2\)"),
        ([[1.0]], [0], ["a"], r"shape \(1, 1\)"),
        ([[0.5, 0.5]], [0, 1], ["a", "b"], r"labels of shape \(2,\) for 1 rows"),
        ([[0.5, 0.5]], [2], ["a", "b"], "from 2 to 2: give class ids from 0 to 1"),
        ([[0.5, 0.5]], [-1], ["a", "b"], "from -1 to -1"),
        ([[0.5, 0.5]], [0.0], ["a", "b"], "labels are float64"),
        ([[0.5, 0.5]], [0], ["a"], "1 names for 2 classes"),
    ],
)
def test_what_does_not_fit_is_refused(probabilities, labels, names, message):
    with pytest.raises(ValueError, match=message):
        ClassifierInterpretation(probabilities, labels, names)


def test_images_are_one_a_row():
    with pytest.raises(ValueError, match="2 images for 1 rows"):
        ClassifierInterpretation([[0.5, 0.5]], [0], ["a", "b"], ["x.jpg", "y.jpg"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_probability_of_zero_has_a_finite_loss(dtype):
    found = ClassifierInterpretation(np.array([[0, 1], [1, 0]], dtype=dtype), [0, 0], ["a", "b"])
    assert 80 < found.losses[0] < 800
    assert found.losses[1] == 0
    assert np.isfinite(found.loss)


# ---- From a trainer ----


def test_accuracy_and_loss_are_those_of_evaluate(trainer):
    expected = trainer.evaluate()
    found = ClassifierInterpretation.from_trainer(trainer)
    assert found.names == ["cats", "dogs"]
    assert found.accuracy == expected["eval_accuracy"]
    assert found.loss == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found.labels.tolist() == trainer.eval_dataset["label"]
    np.testing.assert_allclose(found.probabilities, np.exp(trainer.log_predictions()), atol=1e-7)


def test_also_where_the_loss_is_far_beyond_what_single_precision_holds(trainer):
    with torch.no_grad():
        for parameter in trainer.layer_groups.parameters(-1):
            parameter.mul_(3e5)
    expected = trainer.evaluate()["eval_loss"]
    assert expected > 100
    assert ClassifierInterpretation.from_trainer(trainer).loss == pytest.approx(expected, rel=1e-6)


def test_its_images_are_those_of_the_data_set(trainer):
    found = ClassifierInterpretation.from_trainer(trainer)
    one = (found.most_correct() + found.most_incorrect())[0]
    np.testing.assert_array_equal(np.asarray(one.image), np.asarray(trainer.eval_dataset[one.index]["image"]))
    assert one.truth in one.file


def test_another_data_set_tta_and_precompute(trainer):
    train = ClassifierInterpretation.from_trainer(trainer, trainer.train_dataset)
    assert len(train.labels) == 12
    trainer.precompute = True
    found = ClassifierInterpretation.from_trainer(trainer, tta=2)
    np.testing.assert_array_equal(found.probabilities, trainer.tta(2))
    assert found.images is not None
    transform = trainer.eval_transform
    again = ClassifierInterpretation.from_trainer(trainer, ImageDataset(trainer.eval_dataset, transform))
    np.testing.assert_array_equal(again.probabilities, ClassifierInterpretation.from_trainer(trainer).probabilities)


def test_a_stock_trainer_serves_as_well(tmp_path, trainer):
    images = trainer.eval_dataset
    view = trainer.eval_transform
    shown = images.with_transform(
        lambda rows: {"pixel_values": [view(image) for image in rows["image"]], "labels": rows["label"]}
    )
    args = TrainingArguments(str(tmp_path / "stock"), remove_unused_columns=False, use_cpu=True)
    stock = Trainer(trainer.model, args, eval_dataset=shown)
    found = ClassifierInterpretation.from_trainer(stock)
    assert found.loss == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-6)
    np.testing.assert_allclose(
        found.probabilities, ClassifierInterpretation.from_trainer(trainer).probabilities, atol=1e-6
    )
    assert found.most_correct(1)[0].image.mode == "RGB"
    with pytest.raises(TypeError, match="tta= needs an SGDRTrainer"):
        ClassifierInterpretation.from_trainer(stock, tta=1)


def test_rows_that_are_no_images_have_none(tmp_path, trainer):
    rows = [{"pixel_values": torch.rand(3, 32, 32), "labels": i % 2} for i in range(5)]
    stock = Trainer(trainer.model, TrainingArguments(str(tmp_path / "stock"), use_cpu=True), eval_dataset=rows)
    found = ClassifierInterpretation.from_trainer(stock)
    assert found.images is None
    assert found.names == ["cats", "dogs"]


def test_what_cannot_be_interpreted_is_said_before_any_prediction(trainer, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("predicted")

    monkeypatch.setattr(SGDRTrainer, "predict", never)
    unlabelled = trainer.eval_dataset.remove_columns("label").add_column("label", [-1, None] + [0] * 11)
    with pytest.raises(ValueError, match="2 of 13 images have no label"):
        ClassifierInterpretation.from_trainer(trainer, unlabelled)
    turned = trainer.eval_dataset.cast_column("label", ClassLabel(names=["dogs", "cats"]))
    with pytest.raises(ValueError, match="counts the classes dogs, cats and the model cats, dogs"):
        ClassifierInterpretation.from_trainer(trainer, turned)
    with pytest.raises(ValueError, match="tta=-1"):
        ClassifierInterpretation.from_trainer(trainer, tta=-1)
    trainer.eval_dataset = {"a": turned}
    with pytest.raises(ValueError, match="no single eval_dataset: give dataset="):
        ClassifierInterpretation.from_trainer(trainer)


def test_a_model_without_names_takes_those_of_the_data_set(trainer, tmp_path):
    model = create_image_classifier("test_resnet", labels=["LABEL_0", "LABEL_1"], pretrained=False)
    other = SGDRTrainer(model, SGDRTrainingArguments(str(tmp_path / "o")), eval_dataset=trainer.eval_dataset)
    assert ClassifierInterpretation.from_trainer(other).names == ["cats", "dogs"]


def test_a_module_without_a_configuration_serves_too(tmp_path):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x, labels=None):
            logits = self.layer(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": torch.rand(4), "labels": i % 3} for i in range(7)]
    stock = Trainer(Linear(), TrainingArguments(str(tmp_path / "stock"), use_cpu=True), eval_dataset=rows)
    found = ClassifierInterpretation.from_trainer(stock)
    assert found.names == ["class 0", "class 1", "class 2"]
    assert found.loss == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-6)


# ---- Plots ----


def test_every_plot_takes_and_returns_an_axes(random_case, tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"p": {"cats": 5}})
    small = ClassifierInterpretation(PROBABILITIES, LABELS, NAMES, sorted((root / "p" / "cats").iterdir()))
    for plot in (
        small.plot_confusion_matrix,
        small.plot_per_class,
        small.plot_most_correct,
        small.plot_most_incorrect,
        small.plot_most_uncertain,
        random_case.plot_confusion_matrix,
        random_case.plot_per_class,  # with classes that have neither precision nor recall
    ):
        ax = matplotlib.figure.Figure(figsize=(4, 3)).add_subplot()
        assert plot(ax=ax) is ax
        ax.figure.savefig(tmp_path / "given.png")
        plot().figure.savefig(tmp_path / "own.png")


def test_the_class_that_is_recognised_worst_is_at_the_top(small):
    ax = small.plot_per_class()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cats", "dogs", "birds"]
    assert ax.yaxis_inverted()


def test_captions_say_prediction_probability_and_truth(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"p": {"cats": 5}})
    found = ClassifierInterpretation(PROBABILITIES, LABELS, NAMES, sorted((root / "p" / "cats").iterdir()))
    assert [text.get_text() for text in found.plot_most_incorrect().texts] == [
        "cats 95.0%\ntruth: dogs\n003.jpg",
        "dogs 50.0%\ntruth: cats\n001.jpg",
    ]
    assert [text.get_text() for text in found.plot_most_correct(1).texts] == ["cats 90.0%\n000.jpg"]
    assert [text.get_text() for text in found.plot_most_incorrect(of_class="birds").texts] == ["no such image"]


def test_its_repr_is_one_short_line():
    found = ClassifierInterpretation([[0.75, 0.25], [0.75, 0.25]], [0, 1], ["cats", "dogs"])
    assert repr(found) == "ClassifierInterpretation(2 images of 2 classes, accuracy=0.5000, loss=0.8370)"

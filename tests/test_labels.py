import pytest
from datasets import ClassLabel, Value
from helpers import tiny_resnet
from transformers import PretrainedConfig

from hf_sgdr.data.labels import ClassNames, class_names


def test_class_names_are_in_the_order_of_their_ids():
    assert class_names(PretrainedConfig(id2label={1: "dogs", 0: "cats"})) == ["cats", "dogs"]
    assert class_names(PretrainedConfig(num_labels=3)) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_model_without_names_takes_those_of_the_training_data(images):
    unnamed = PretrainedConfig(num_labels=2)
    assert ClassNames.of(unnamed, images["train"], "label") == ClassNames(["cats", "dogs"], "train_dataset", True)
    assert ClassNames.of(unnamed, None, "label") == ClassNames(["LABEL_0", "LABEL_1"], "the model", False)
    named = PretrainedConfig(id2label={0: "a", 1: "b"})
    assert ClassNames.of(named, images["train"], "label") == ClassNames(["a", "b"], "the model", True)


def test_what_has_no_labels_passes(images):
    names = ClassNames(["a", "b"], "the model", True)
    names.check("test_dataset", images["train"].remove_columns("label"), "label")
    names.check("test_dataset", [{"label": 7}], "label")


def with_names(dataset, names):
    return dataset.cast_column("label", ClassLabel(names=names))


def test_classes_in_another_order_are_refused(make_trainer, images):
    message = (
        r"eval_dataset has the classes 'dogs', 'cats' and the model has 'cats', 'dogs': label 0 is 'dogs' there and "
        r"'cats' here. Give datasets.ClassLabel\(names=...\) the names in that order"
    )
    swapped = with_names(images["validation"], ["dogs", "cats"])
    with pytest.raises(ValueError, match=message):
        make_trainer(eval_dataset=swapped)
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] has the classes"):
        make_trainer(eval_dataset={"a": images["validation"], "b": swapped})
    with pytest.raises(ValueError, match="train_dataset has the classes"):
        make_trainer(train_dataset=with_names(images["train"], ["dogs", "cats"]))
    trainer = make_trainer()
    for call in (trainer.evaluate, trainer.predict, trainer.log_predictions, lambda data: trainer.tta(1, dataset=data)):
        with pytest.raises(ValueError, match=r"has the classes 'dogs', 'cats' and the model has 'cats', 'dogs'"):
            call(swapped)


def test_another_number_of_classes_is_refused_and_names_count_only_where_there_are_any(make_trainer, images):
    four = tiny_resnet(["cats", "dogs", "emus", "foxes"])
    with pytest.raises(ValueError, match=r"and the model has 'cats', 'dogs', 'emus', 'foxes': label 2 is none"):
        make_trainer(four)
    four.config.id2label = {i: f"LABEL_{i}" for i in range(4)}
    with pytest.raises(
        ValueError, match=r"'cats', 'dogs' and the model has 'LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3'"
    ):
        make_trainer(four)
    two = tiny_resnet()
    two.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    trainer = make_trainer(two)
    with pytest.raises(ValueError, match=r"classes 'dogs', 'cats' and train_dataset has 'cats', 'dogs'"):
        trainer.evaluate(with_names(images["validation"], ["dogs", "cats"]))
    plain = images["validation"].cast_column("label", Value("int64"))
    lacking = plain.map(lambda row, i: {"label": row["label"] if i else None}, with_indices=True)
    with pytest.raises(ValueError, match=r"1 of 11 images have no label\. Give each"):
        make_trainer().evaluate(lacking)
    assert make_trainer().evaluate(plain)["eval_loss"] > 0
    wrong = plain.map(lambda row: {"label": row["label"] + 2}, new_fingerprint="wrong")
    with pytest.raises(ValueError, match=r"has the label 3, but the model has 2 classes \('cats', 'dogs'\)"):
        make_trainer(eval_dataset=wrong)

"""`log_predictions`, `evaluate`, `tta` and `save_model`."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import tiny_vit
from transformers import pipeline

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, image_transforms, load_image_folder


def test_log_predictions_are_in_the_data_sets_order(make_trainer, images):
    trainer = make_trainer(per_device_eval_batch_size=4)
    log_predictions = trainer.log_predictions()
    assert log_predictions.shape == (11, 2)
    np.testing.assert_allclose(np.exp(log_predictions).sum(axis=1), 1, rtol=1e-5)
    with torch.inference_mode():
        alone = [
            trainer.model.eval()(trainer.eval_transform(image)[None]).logits.log_softmax(-1)[0].numpy()
            for image in images["validation"]["image"]
        ]
    np.testing.assert_allclose(log_predictions, alone, atol=1e-5)


def test_the_logged_loss_is_the_mean_over_images_also_with_a_short_last_batch(make_trainer, images):
    trainer = make_trainer(per_device_eval_batch_size=4)
    labels = np.asarray(images["validation"]["label"])
    log_predictions = trainer.log_predictions()
    expected = -log_predictions[np.arange(len(labels)), labels].mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_no_image_is_dropped_from_evaluation(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=4, dataloader_drop_last=True)
    assert trainer.log_predictions().shape == (11, 2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(make_trainer().evaluate()["eval_loss"], abs=1e-6)


def test_with_workers_that_stay_evaluation_sees_what_is_given_and_set(make_trainer, images):
    trainer = make_trainer(dataloader_num_workers=1, dataloader_persistent_workers=True)
    sizes = []
    normalize = trainer.images.normalize
    trainer.images.normalize = lambda batch: (sizes.append(batch["pixel_values"].shape), normalize(batch))[1]
    trainer.evaluate()
    trainer.evaluate(images["validation"].select(range(3)))
    trainer.set_transforms(*image_transforms(trainer.model, image_size=48))
    trainer.evaluate()
    assert sizes == [(11, 3, 32, 32), (3, 3, 32, 32), (11, 3, 48, 48)]


def test_tta_averages_logits_or_with_beta_probabilities(make_trainer):
    trainer = make_trainer()
    log_plain = trainer.log_predictions()
    plain, augmented = np.exp(log_plain), trainer.tta(n_aug=1, beta=0.0)
    np.testing.assert_array_equal(trainer.tta(n_aug=0), plain)
    assert np.abs(augmented - plain).max() > 1e-6
    np.testing.assert_allclose(trainer.tta(n_aug=1, beta=0.25), 0.25 * plain + 0.75 * augmented, atol=1e-6)
    np.testing.assert_allclose(trainer.tta(n_aug=1, beta=1.0), plain, atol=1e-6)
    geometric = np.exp(0.5 * log_plain + 0.5 * np.log(augmented))
    by_default = trainer.tta(n_aug=1)
    np.testing.assert_allclose(by_default, geometric / geometric.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(trainer.tta(n_aug=1), by_default)  # the views are seeded


def test_tta_without_a_training_transform_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.train_transform = trainer.eval_transform
    with pytest.raises(ValueError, match="n_aug=4: views need a training transform that augments"):
        trainer.tta()


def test_unlabelled_images_can_be_predicted(make_trainer, tmp_path, make_image_folder):
    root = make_image_folder(
        tmp_path / "with_test", {"train": {"cats": 3, "dogs": 3}, "valid": {"cats": 1, "dogs": 1}, "test": {"": 4}}
    )
    trainer = make_trainer()
    assert trainer.log_predictions(load_image_folder(root)["test"]).shape == (4, 2)


# ---- What is saved ----


def check_stock_pipeline(trainer, folder):
    """transformers' pipeline gives the trainer's probabilities."""
    answers = pipeline("image-classification", model=str(folder), device="cpu")(list(trainer.eval_dataset["image"]))
    for answer, probabilities in zip(answers, np.exp(trainer.log_predictions()), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        np.testing.assert_allclose([scores["cats"], scores["dogs"]], probabilities, atol=1e-4)


def test_a_saved_model_is_stock_and_gives_the_same_probabilities(make_trainer, tmp_path):
    trainer = make_trainer(precompute=True)
    trainer.fit(1e-1, 1)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["hf_sgdr"] == {"augment": "side_on", "max_zoom": 1.1}
    check_stock_pipeline(trainer, folder)


def test_a_vision_transformer_of_transformers_goes_the_whole_way(make_trainer, tmp_path):
    trainer = make_trainer(tiny_vit(), precompute=True)
    trainer.fit(1e-2, 1)
    trainer.unfreeze()
    trainer.fit([1e-4, 1e-3, 1e-2], 1, cycle_len=1)
    trainer.save_model(str(tmp_path / "vit"))
    check_stock_pipeline(trainer, tmp_path / "vit")


def test_what_is_saved_is_the_transform_that_evaluation_uses(make_trainer, tmp_path):
    trainer = make_trainer(precompute=True)
    trainer.fit(1e-2, 1)
    before = trainer.log_predictions()
    _, trainer.eval_transform = image_transforms(trainer.model, image_size=48)
    trainer.train_transform = image_transforms(trainer.model, image_size=48, augment="basic", max_zoom=1.2)[0]
    assert np.abs(trainer.log_predictions() - before).max() > 0
    trainer.fit(1e-2, 1)
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert config["hf_sgdr"] == {"augment": "basic", "max_zoom": 1.2}
    check_stock_pipeline(trainer, tmp_path / "saved")


def test_another_transform_is_saved_with_a_model_of_transformers_too(make_trainer, tmp_path):
    trainer = make_trainer(tiny_vit())
    mean = (0.1, 0.2, 0.3)
    transform = trainer.eval_transform
    trainer.eval_transform = dataclasses.replace(transform, spec=dataclasses.replace(transform.spec, mean=mean))
    trainer.save_model(str(tmp_path / "vit"))
    assert json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())["image_mean"] == list(mean)
    make_trainer().save_model(str(tmp_path / "vit"))  # whose own is all in config.json
    assert not (tmp_path / "vit" / "preprocessor_config.json").exists()


def test_a_trainer_that_only_evaluates_leaves_the_models_configuration_as_it_is(images, tiny_model, tmp_path):
    tiny_model.config.hf_sgdr = {"augment": "side_on", "max_zoom": 1.1}
    before = copy.deepcopy(tiny_model.config.to_dict())
    args = SGDRTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    _, small = image_transforms(tiny_model, image_size=32)
    trainer = SGDRTrainer(tiny_model, args, eval_dataset=images["validation"], eval_transform=small)
    trainer.evaluate()
    after = tiny_model.config.to_dict()
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"use_cache", "problem_type"}  # which transformers' Trainer and its loss set
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["hf_sgdr"] == {"augment": "side_on", "max_zoom": 1.1}
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]

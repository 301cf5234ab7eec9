import pytest


def test_what_is_no_transform_is_refused_also_after_construction(make_trainer):
    trainer = make_trainer()
    for name in ("train_transform", "eval_transform"):
        with pytest.raises(TypeError, match=f"{name} is function: give one of those of image_transforms"):
            setattr(trainer, name, lambda image: image)

from types import SimpleNamespace

import pytest

from hf_sgdr._utils.scoped import attributes


def test_attributes_have_other_values_inside_alone():
    target = SimpleNamespace(a=1, b=2, c=3)
    with attributes(target, a=10, b=20):
        assert vars(target) == {"a": 10, "b": 20, "c": 3}
    assert vars(target) == {"a": 1, "b": 2, "c": 3}


def test_an_error_inside_gives_them_back_and_goes_on():
    target = SimpleNamespace(a=1)
    with pytest.raises(KeyError), attributes(target, a=10):
        raise KeyError
    assert target.a == 1


def test_an_attribute_that_is_not_there_is_refused_before_any_is_set():
    target = SimpleNamespace(a=1)
    with pytest.raises(AttributeError), attributes(target, a=10, b=20):
        pass
    assert vars(target) == {"a": 1}

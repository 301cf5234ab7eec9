import hashlib

from hf_sgdr.hub.card_facts import hub_id, local_origin


def test_hub_ids():
    assert hub_id("timm/resnet34.a1_in1k") == "timm/resnet34.a1_in1k"
    assert hub_id("beans") is None
    assert hub_id("beans", with_user=False) == "beans"
    assert [hub_id(name) for name in ("", "resnet34", "a/b/c", "/a/b", "user/na me", "user/")] == [None] * 6


def test_weights_from_a_file_are_told_by_their_digest_and_not_by_their_place(tmp_path):
    file = tmp_path / "body.pth"
    file.write_bytes(b"weights")
    said = local_origin("resnet34", str(file), True)
    assert "body.pth" in said
    assert f"SHA-256 {hashlib.sha256(b'weights').hexdigest()}" in said
    assert str(tmp_path) not in said
    assert local_origin("resnet34", str(file), False) == said
    assert local_origin("resnet34", None, False) == "It started from random weights."
    assert local_origin(str(tmp_path), None, True) == "It started from a model in a local folder."
    assert local_origin("timm/resnet34.a1_in1k", None, True) is None

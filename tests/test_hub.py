import pickle
import re
import shlex
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from loopback_hub import READ_TOKEN, TOKEN

from hf_sgdr.hub.push import prepare_repository, push_command, push_folder, pushed_files, require_login
from hf_sgdr.hub.retry import HubError, asked_pause, retry

CARD = "---\npipeline_tag: image-classification\n---\n# Cats\n![matrix](confusion-matrix.png)\n"
RUN = {
    "config.json", "model.safetensors", "README.md", "results.json", "recipe.yaml",
    "head-range-test.png", "head-learning-rate.png", "confusion-matrix.png",
}  # fmt: skip


# huggingface_hub's own call, where the storage protocol xet is not used.
by_lfs = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited between tries."""
    seconds: list[float] = []
    monkeypatch.setattr("hf_sgdr.hub.retry.sleep", seconds.append)
    return seconds


@pytest.fixture
def out(tmp_path, tiny_model):
    """What a run leaves: what is to be pushed, and everything that is not."""
    folder = tmp_path / "out"
    tiny_model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "results.json").write_text('{"schema": 1}\n')
    (folder / "recipe.yaml").write_text("augment: side_on\n")
    for name in ("head-range-test.png", "head-learning-rate.png", "confusion-matrix.png"):
        (folder / name).write_bytes(b"\x89PNG")
    return folder


def litter(folder: Path) -> None:
    secret = folder.parent / "secret.txt"
    secret.write_text("secret")
    (folder / "training_args.bin").write_bytes(pickle.dumps({"token": TOKEN}))
    for name in (
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", ".env", "trainer_state.json",
        "most-incorrect.png", "holiday.png", "notes.md", "cache.arrow", "model.safetensors.bak", ".tmp-1-README.md",
        "runs", "events.out.tfevents.1",
    ):  # fmt: skip
        (folder / name).write_text(f"HF_TOKEN={TOKEN}")
    for name in ("checkpoint-3", "_runs/snapshots", "_runs-unfinished", "features/abc", ".git", ".cache"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(TOKEN)
        (folder / name / "model.safetensors").write_text(TOKEN)
    (folder / "head-private-range-test.png").symlink_to(secret)
    (folder / "preprocessor_config.json").symlink_to(secret)


# ---- What is pushed ----


def test_what_arrives_is_exactly_what_is_on_the_list(hub, api, out):
    litter(out)
    commit = push_folder(out, "ann/cats", api=api)
    files = hub.repos["ann/cats"].files()
    assert files.keys() == RUN | {".gitattributes"}
    for name in RUN:
        assert files[name] == (out / name).read_bytes()
    assert not any(TOKEN.encode() in content for content in files.values())
    assert commit.oid == hub.repos["ann/cats"].branches["main"]
    assert len(hub.repos["ann/cats"].commits) == 2  # the repository's own and this one


def test_pictures_go_along_where_the_card_shows_them(out):
    (out / "most-correct.png").write_bytes(b"")
    assert out / "most-correct.png" not in pushed_files(out)
    (out / "README.md").write_text(CARD + "![](most-correct.png) ![](../../etc/secret.png)")
    assert out / "most-correct.png" in pushed_files(out)


def test_what_an_earlier_push_left_is_removed_and_what_somebody_added_stays(hub, api, out):
    (out / "preprocessor_config.json").write_text("{}")
    (out / "README.md").write_text(CARD + "![](most-incorrect.png)")
    (out / "most-incorrect.png").write_bytes(b"an image")
    push_folder(out, "ann/cats", api=api)
    assert "most-incorrect.png" in hub.repos["ann/cats"].files()
    repo = hub.repos["ann/cats"]
    repo.commit("main", {**repo.files(), "notebook.ipynb": b"{}"}, "by hand")
    for name in ("preprocessor_config.json", "head-range-test.png"):
        (out / name).unlink()
    (out / "README.md").write_text(CARD)  # without that picture of images
    push_folder(out, "ann/cats", api=api)
    assert repo.files().keys() == RUN - {"head-range-test.png"} | {".gitattributes", "notebook.ipynb"}


def test_a_card_that_a_person_wrote_stays(hub, api, out):
    push_folder(out, "ann/cats", api=api)
    repo = hub.repos["ann/cats"]
    repo.commit("main", {**repo.files(), "README.md": b"by hand"}, "by hand")
    (out / "README.md").unlink()
    push_folder(out, "ann/cats", api=api)
    assert repo.files()["README.md"] == b"by hand"


def test_pushing_the_same_again_changes_nothing(hub, api, out):
    first = push_folder(out, "ann/cats", api=api)
    again = push_folder(out, "cats", api=api)
    assert (again.oid, len(hub.repos["ann/cats"].commits)) == (first.oid, 2)


def test_a_folder_without_a_model_is_refused(out, tmp_path):
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="no model to push; give a folder that holds"):
            pushed_files(missing)
    (out / "model.safetensors").rename(tmp_path / "elsewhere")
    (out / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"\(not links\)"):
        pushed_files(out)


@pytest.mark.parametrize("name", ["README.md", "results.json", "recipe.yaml", "config.json"])
def test_no_text_tells_a_token_or_a_place_of_this_machine(hub, api, out, monkeypatch, name):
    before = (out / name).read_text()
    for secret, message in (
        (TOKEN, "looks like an access token"),
        (f"data_dir: {Path.home()}/images", "names a folder of this machine"),
        (f'"{Path.cwd()}"', "names a folder of this machine"),
        (str(out), "names a folder of this machine"),
    ):
        (out / name).write_text(before + secret)
        with pytest.raises(ValueError, match=message):
            push_folder(out, "ann/cats", api=api)
    assert hub.requests == []
    home = Path("/home/ann")
    monkeypatch.setattr(Path, "home", lambda: home)
    (out / name).write_text(before + f"https://a.example{home}/images {home}-and-more my{home}")
    assert out / name in pushed_files(out)


def test_the_card_names_the_model_by_its_id(hub, api, out):
    text = CARD + 'pipeline("image-classification", model="user/name")("image.jpg")\n'
    (out / "README.md").write_text(text)
    push_folder(out, "ann/cats", api=api)
    assert 'model="ann/cats")' in hub.repos["ann/cats"].files()["README.md"].decode()
    assert (out / "README.md").read_text() == text


@by_lfs
def test_large_files_go_by_lfs(hub, api, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs = True
    push_folder(out, "ann/cats", api=api)
    assert hub.repos["ann/cats"].files()["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert len(hub.blobs) == 1


def test_branches_and_tags(hub, api, out):
    first = push_folder(out, "ann/cats", tag="v1", api=api)
    (out / "results.json").write_text("{}")
    push_folder(out, "ann/cats", revision="trial", api=api)
    repo = hub.repos["ann/cats"]
    assert repo.files("trial")["results.json"] == b"{}"
    assert repo.files("main")["results.json"] == b'{"schema": 1}\n'
    assert repo.tags == {"v1": first.oid}
    push_folder(out, "ann/cats", revision="trial", tag="v2", api=api)
    with pytest.raises(HubError, match=r"Tagging ann/cats as v1: the tag is there already.*the push itself is done"):
        push_folder(out, "ann/cats", tag="v1", api=api)
    assert repo.files("main")["results.json"] == b"{}"


# ---- Before any work ----


def test_without_a_login_it_says_what_to_do(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(HubError, match="nobody is logged in: run `hf auth login`, or set HF_TOKEN"):
        require_login("cats", HfApi(endpoint=hub.endpoint))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "model_id", "message"),
    [
        ("hf_" + "x" * 34, "ann/cats", "the login does not count, or counts no more: run `hf auth login`"),
        (READ_TOKEN, "ann/cats", "The token of ann may only read: run `hf auth login`"),
        (TOKEN, "bob/cats", "the login may not write there: use a token that may write, or another user/name"),
        (TOKEN, "bob/dogs", "the login may not write there: use a token that may write, or another user/name"),
        (TOKEN, "bob/hidden", "the login may not write there: use a token that may write, or another user/name"),
        (TOKEN, "ann/public", "ann/public is there already and is public"),
    ],
)
def test_what_would_fail_after_training_fails_before_it(hub, waits, token, model_id, message):
    hub.add("bob/cats", {})
    hub.add("bob/hidden", {}, private=True)
    hub.add("ann/public", {})
    with pytest.raises(HubError, match=message):
        prepare_repository(model_id, private=True, api=HfApi(endpoint=hub.endpoint, token=token))
    assert waits == []


def test_an_id_that_is_none_is_refused_before_anything_is_asked(hub, api):
    with pytest.raises(ValueError, match="ann/cats/more"):
        require_login("ann/cats/more", api)
    assert hub.requests == []


def test_a_private_repository_is_made_private(hub, api, out):
    assert prepare_repository("cats", private=True, api=api) == "ann/cats"
    assert hub.repos["ann/cats"].private
    push_folder(out, "ann/cats", private=True, api=api)
    assert "model.safetensors" in hub.repos["ann/cats"].files()


def test_offline_is_said_at_once(api, hub, monkeypatch, waits):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set: unset it"):
        require_login("ann/cats", api)
    assert waits == []


# ---- Broken connections ----


@pytest.mark.parametrize("kind", ["drop", "midway", "late", 500, 502, 503, 504, 408])
def test_a_break_is_tried_again_with_its_reason(hub, api, out, waits, caplog, kind):
    hub.fail("POST", "/commit/", kind, times=2)
    push_folder(out, "ann/cats", api=api)
    assert waits == ([2.0] if kind == "late" else [2.0, 4.0])  # when the commit is there, nothing is left to do
    assert hub.repos["ann/cats"].files().keys() == RUN | {".gitattributes"}
    assert len(hub.repos["ann/cats"].commits) == 2
    said = [record.message for record in caplog.records if record.name == "hf_sgdr.hub.retry"]
    reason = str(kind) if isinstance(kind, int) else "disconnected|reset|closed"
    assert len(said) == len(waits)
    assert said[0].startswith("Pushing to ann/cats, try 1 of 5 failed: ")
    assert re.search(reason, said[0])


@by_lfs
def test_a_break_while_files_are_sent_is_tried_again(hub, api, out, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs = True
    hub.fail("PUT", "/lfs/", 403)  # as a link that is valid no more: the client does not try that again itself
    with pytest.raises(HubError, match="403"):
        push_folder(out, "ann/cats", api=api)
    hub.fail("PUT", "/lfs/", "midway")
    push_folder(out, "ann/cats", api=api)
    assert hub.repos["ann/cats"].files()["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_a_break_leaves_the_old_revision_and_the_command_that_pushes_again(hub, api, tmp_path, tiny_model, waits):
    out = tmp_path / "my out"
    tiny_model.save_pretrained(out)
    push_folder(out, "ann/cats", api=api)
    before = hub.repos["ann/cats"].files()
    (out / "results.json").write_text("{}")
    hub.fail("POST", "/commit/", "midway", times=5)
    with pytest.raises(HubError) as caught:
        push_folder(out, "ann/cats", tag="v1", api=api)
    assert waits == [2.0, 4.0, 8.0, 16.0]
    assert hub.repos["ann/cats"].files() == before
    line = str(caught.value)
    assert "\n" not in line
    assert "Pushing to ann/cats failed 5 times, at last with: " in line
    args = shlex.split(line.split("to push it again: ")[1])
    assert args == ["hf-sgdr", "push", str(out), "ann/cats", "--tag", "v1"]


def test_nothing_listens_there(hub, out, waits):
    api = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(HubError, match=r"Looking up the login on the Hub failed 5 times, .*[Cc]onnection refused"):
        push_folder(out, "ann/cats", api=api)
    assert len(waits) == 4


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry_After": "7"}, 7.0),
        ({"Retry_After": "0"}, 0.0),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"Retry_After": "in a while"}, 2.0),
        ({}, 2.0),
    ],
)
def test_a_rate_limit_is_waited_for_as_the_hub_asks(hub, api, out, waits, headers, expected):
    hub.fail("POST", "/commit/", 429, **headers)
    push_folder(out, "ann/cats", api=api)
    assert waits == [expected]


def test_a_date_counts_as_a_time_to_wait():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert asked_pause({"retry-after": soon}) == pytest.approx(60, abs=2)
    assert asked_pause({"retry-after": format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True)}) == 0.0


def test_nobody_waits_for_an_hour(hub, api, out, waits):
    hub.fail("POST", "/commit/", 429, Retry_After="3600")
    with pytest.raises(HubError, match=r"failed once, at last with: 429 Too Many Requests.*asks to wait 3600 s"):
        push_folder(out, "ann/cats", api=api)
    assert waits == []


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "run `hf auth login`"), (403, "may not write there"), (404, "look at the name"), (413, "413"), (400, "400")],
)
def test_what_will_not_pass_is_not_tried_again(hub, api, out, waits, status, advice):
    hub.fail("POST", "/commit/", status)
    with pytest.raises(HubError, match=advice) as caught:
        push_folder(out, "ann/cats", api=api)
    assert waits == []
    assert "hf-sgdr push" in str(caught.value)


def test_a_card_that_the_hub_refuses_is_said_with_its_reason(hub, api, out):
    (out / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(HubError, match=r"Invalid metadata in README\.md"):
        push_folder(out, "ann/cats", api=api)


def test_a_mistake_in_the_program_is_not_tried_again(waits):
    with pytest.raises(TypeError):
        retry(lambda: len(3), "Counting")
    assert waits == []


def test_the_command_says_the_flags_that_were_given():
    assert push_command("o'ut", "ann/cats", hub_private_repo=True, best=None) == (
        "hf-sgdr push 'o'\"'\"'ut' ann/cats --hub_private_repo"
    )


# ---- Servers that are compatible with the Hub ----


def test_a_server_that_cannot_be_asked_whether_one_may_write_is_pushed_to(hub, api, out, waits):
    hub.fail("GET", "auth-check", 404, times=99)
    commit = push_folder(out, "ann/cats", api=api)
    assert hub.repos["ann/cats"].branches["main"] == commit.oid
    assert waits == []


def test_there_too_whoever_may_not_commit_is_told_so(hub, out, waits):
    hub.add("ann/cats", {})
    hub.fail("GET", "auth-check", 404, times=99)
    hub.fail("POST", "commit", 403, times=99)
    ann = HfApi(endpoint=hub.endpoint, token=TOKEN)
    with pytest.raises(HubError, match=r"the login may not write there: use a token that may write"):
        push_folder(out, "ann/cats", api=ann)

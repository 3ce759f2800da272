"""Lenses on the hub: the real client of huggingface_hub against a small server of our own."""

import base64
import hashlib
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_evaluation, random_lens
from huggingface_hub import constants
from test_cli import FAST

from tunedlens import (
    EvaluateConfig,
    InputError,
    TunedLens,
    evaluate,
    load_lens,
    push_to_hub,
    report,
)
from tunedlens.checkpoint.hub import HubName, hub_name
from tunedlens.cli import doctor_command, evaluate_command, train_command
from tunedlens.evaluation.lens_specs import lens_specs, saved_lenses
from tunedlens.report.card import with_front_matter

ROOT = Path(__file__).parents[1]
LENS = ["config.json", "lens.safetensors"]


class FakeHub(BaseHTTPRequestHandler):
    """The calls of the hub's API that uploads and downloads make, with all files in memory."""

    repos: dict
    """Files by repository and revision."""
    visibility: dict
    log: list
    """Every request, as its method and its path."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.log.append((self.command, path))
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)/(revision|tree)/(.+)", path):
            repo, what, revision = found.groups()
            if (files := self._files(repo, revision)) is None:
                return
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": sha(content)}
                for name, content in files.items()
            ]
            info = {"id": repo, "sha": commit(files), "siblings": [], "tags": [], "private": False}
            self._answer(listed if what == "tree" else info)
        elif found := re.fullmatch(r"/(\w+/[\w-]+)/resolve/(\w+)/(.+)", path):
            repo, revision, name = found.groups()
            content = self._files(repo, revision)[name]
            self._answer(content, ETag=f'"{sha(content)}"', **{"X-Repo-Commit": revision})
        else:
            self._answer({"error": "no such page"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.log.append((self.command, path))
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            found = re.fullmatch(r"/api/models/(\w+/[\w-]+)/(branch|preupload|commit)/(.+)", path)
            repo, what, revision = found.groups()
            getattr(self, f"_{what}")(repo, revision, body)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _create(self, asked):
        if asked["organization"] == "theirs":
            self._answer({"error": "You may not write here"}, 403)
            return
        repo = f"{asked['organization']}/{asked['name']}"
        self.repos.setdefault(repo, {"main": {}})
        self.visibility[repo] = asked.get("visibility")
        self._answer({"url": f"{constants.ENDPOINT}/{repo}"})

    def _branch(self, repo, revision, _body):
        self.repos[repo].setdefault(revision, {})
        self._answer({})

    def _preupload(self, _repo, _revision, body):
        entry = {"uploadMode": "regular", "shouldIgnore": False}
        self._answer({"files": [{"path": f["path"], **entry} for f in json.loads(body)["files"]]})

    def _commit(self, repo, revision, body):
        is_request = "create_pr=1" in self.path
        files = self.repos[repo].setdefault("refs/pr/1" if is_request else revision, {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        page = f"{constants.ENDPOINT}/{repo}"
        answer = {"commitUrl": f"{page}/commit/{commit(files)}", "commitOid": commit(files)}
        self._answer(answer | ({"pullRequestUrl": f"{page}/discussions/1"} if is_request else {}))

    def _files(self, repo, revision):
        """The files of a branch or a commit; None after the answer that there are none."""
        branches = self.repos.get(repo)
        if branches is None:
            return self._answer({}, 404, **{"X-Error-Code": "RepoNotFound"})
        for name, files in branches.items():
            if revision in (name, commit(files)):
                return files
        return self._answer({}, 404, **{"X-Error-Code": "RevisionNotFound"})

    def _answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def sha(content):
    return hashlib.sha1(content).hexdigest()


def commit(files):
    return sha(json.dumps({name: sha(content) for name, content in files.items()}).encode())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, with an empty cache; see `FakeHub`."""
    handler = type("Hub", (FakeHub,), {"repos": {}, "visibility": {}, "log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def stored(hub, lens, tmp_path, repo="me/lens", revision="main", subfolder="."):
    """Put the files of a lens on the hub without `push_to_hub`."""
    lens.save(tmp_path / "stored")
    files = hub.repos.setdefault(repo, {}).setdefault(revision, {})
    for file in (tmp_path / "stored").iterdir():
        files[str(PurePosixPath(subfolder, file.name))] = file.read_bytes()
    return files


def front_matter(card):
    _, text, _ = card.decode().split("---\n", 2)
    return yaml.safe_load(text)


def assert_same_logits(one, other, model):
    hidden = torch.randn(2, 5, model.identity.d_model, generator=torch.manual_seed(0))
    for layer in range(model.identity.n_layers + 1):
        assert torch.equal(one(hidden, layer), other(hidden, layer))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("user/name", HubName(None, "user/name", None, None)),
        ("user/name@v1:a/b", HubName(None, "user/name", "v1", "a/b")),
        ("user/name@refs/pr/1", HubName(None, "user/name", "refs/pr/1", None)),
        ("space:Team/a.b-c:lens/gpt2", HubName("space", "Team/a.b-c", None, "lens/gpt2")),
        ("name", None),
        ("./user/name", None),
        ("../name", None),
        ("/user/name", None),
        ("user/name/", None),
        ("a/b/c", None),
        (Path("user/name"), None),
    ],
)
def test_name_on_the_hub_is_told_from_a_path(source, expected):
    assert hub_name(source) == expected


@pytest.mark.usefixtures("unreachable")
def test_folder_goes_before_a_repository_of_the_same_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lens = random_lens(tiny)
    lens.save("me/lens")
    assert_same_logits(load_lens("me/lens", tiny), lens, tiny)
    with pytest.raises(InputError, match="me/lens is a path; got v1"):
        load_lens("me/lens", tiny, revision="v1")


def test_pushed_lens_is_loaded_by_its_name_with_equal_logits(hub, tiny):
    lens = random_lens(tiny)
    assert "/me/lens/commit/" in lens.push_to_hub("me/lens")
    assert sorted(hub.repos["me/lens"]["main"]) == ["README.md", *LENS]
    assert_same_logits(load_lens("me/lens", tiny), lens, tiny)
    assert_same_logits(TunedLens.load("me/lens", tiny), lens, tiny)


def test_only_the_files_of_the_lens_are_downloaded(hub, tiny, tmp_path):
    files = stored(hub, random_lens(tiny), tmp_path)
    files |= {"README.md": b"card", "model.safetensors": b"big", "other/config.json": b"{}"}
    load_lens("me/lens", tiny)
    got = {path.rpartition("/")[-1] for _, path in hub.log if "/resolve/" in path}
    assert sorted(got) == LENS


def test_revision_and_subfolder_are_arguments_or_part_of_the_name(hub, tiny, tmp_path):
    lens = random_lens(tiny)
    stored(hub, random_lens(tiny, seed=1), tmp_path)
    stored(hub, lens, tmp_path, revision="v1", subfolder="lens/tiny")
    found = load_lens("me/lens", tiny, revision="v1", subfolder="lens/tiny")
    assert_same_logits(found, lens, tiny)
    assert_same_logits(load_lens("me/lens@v1:lens/tiny", tiny), lens, tiny)


def test_lens_that_was_downloaded_is_loaded_without_the_hub(hub, tiny, tmp_path, monkeypatch):
    lens = random_lens(tiny)
    stored(hub, lens, tmp_path)
    load_lens("me/lens", tiny)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_same_logits(load_lens("me/lens", tiny), lens, tiny)


def test_what_cannot_be_loaded_is_one_clear_line(hub, tiny):
    hub.repos |= {
        "me/empty": {"main": {}},
        "me/model": {"main": {"config.json": b"{}", "model.safetensors": b""}},
    }
    cases = {
        "me/nothing": "no folder me/nothing, and no repository me/nothing on the hub",
        "me/model@v9": "me/model on the hub has no revision v9",
        "me/empty": r"me/empty on the hub holds no lens: .* there is no config\.json",
        "me/model": r"me/model on the hub holds no lens: .* there is no lens\.safetensors",
        "me/model:a/b": r"me/model on the hub, in a/b, holds no lens",
        "me--/a": "no folder me--/a, and the hub cannot be read",
    }
    for source, expected in cases.items():
        with pytest.raises(InputError, match=expected) as caught:
            load_lens(source, tiny)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unreachable")
def test_hub_that_cannot_be_reached_is_one_clear_line(tiny, monkeypatch):
    with pytest.raises(InputError, match=r"no folder me/lens, and the hub .* refused"):
        load_lens("me/lens", tiny)
    with pytest.raises(InputError, match=r"cannot upload to me/lens: .*refused"):
        random_lens(tiny).push_to_hub("me/lens")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"the hub cannot be read: .*HF_HUB_OFFLINE"):
        load_lens("me/lens", tiny)


@pytest.mark.usefixtures("hub")
def test_repository_of_others_is_refused_with_what_to_do(tiny):
    with pytest.raises(InputError, match=r"cannot upload to theirs/lens: .*403.*hf auth login"):
        random_lens(tiny).push_to_hub("theirs/lens")


def test_pull_request_and_branch_leave_main_alone(hub, tiny):
    first, second, third = (random_lens(tiny, seed=seed) for seed in range(3))
    first.push_to_hub("me/lens", private=True)
    assert hub.visibility["me/lens"] == "private"
    address = second.push_to_hub("me/lens", create_pr=True)
    assert address.endswith("/me/lens/discussions/1")
    third.push_to_hub("me/lens", revision="v2")
    assert_same_logits(load_lens("me/lens", tiny), first, tiny)
    assert_same_logits(load_lens("me/lens", tiny, revision="refs/pr/1"), second, tiny)
    assert_same_logits(load_lens("me/lens@v2", tiny), third, tiny)


def test_card_of_a_lens_in_memory_has_the_results_that_are_given(hub, tiny):
    evaluation = make_evaluation()
    random_lens(tiny).push_to_hub("me/lens", license="mit", evaluation=evaluation)
    files = hub.repos["me/lens"]["main"]
    card = files["README.md"]
    assert front_matter(card) == {
        "library_name": "tunedlens",
        "tags": ["tuned-lens", "interpretability"],
        "license": "mit",
    }
    assert b"# lens\n" in card
    assert "| mean | 9.000 ± 0.050 | 4.500 ± 0.050 |" in card.decode()
    assert b"(evaluation/overview.png)" in card
    assert files["evaluation/overview.png"].startswith(b"\x89PNG")


def test_card_names_model_and_dataset_of_the_hub(tiny, tmp_path):
    folder = tmp_path / "run"
    config = {"corpus": {"dataset": "Salesforce/wikitext"}}
    random_lens(tiny).save(folder, {"config": config})
    path = folder / "config.json"
    manifest = json.loads(path.read_text())
    manifest["model"] |= {"name": "openai-community/gpt2", "revision": "607a30d"}
    assert yaml.safe_load(with_front_matter("", manifest).split("---")[1]) == {
        "library_name": "tunedlens",
        "base_model": "openai-community/gpt2",
        "datasets": ["Salesforce/wikitext"],
        "tags": ["tuned-lens", "interpretability"],
    }
    manifest["config"]["corpus"]["dataset"] = str(tmp_path / "text.txt")
    assert "datasets" not in with_front_matter("", manifest)


def test_own_words_and_front_matter_of_a_card_are_kept(hub, tiny, tmp_path):
    folder = tmp_path / "run"
    random_lens(tiny).save(folder)
    (folder / "README.md").write_text("---\nlicense: gpl\nlanguage: de\n---\n\nMy own words.\n")
    push_to_hub(folder, "me/lens")
    card = hub.repos["me/lens"]["main"]["README.md"]
    assert card.endswith(b"---\n\nMy own words.\n")
    assert front_matter(card) == {
        "library_name": "tunedlens",
        "tags": ["tuned-lens", "interpretability"],
        "license": "gpl",
        "language": "de",
    }
    push_to_hub(folder, "me/lens", license="mit")
    assert front_matter(hub.repos["me/lens"]["main"]["README.md"])["license"] == "mit"
    (folder / "README.md").write_text("---\n[\n---\n")
    with pytest.raises(InputError, match="front matter of the card is damaged"):
        push_to_hub(folder, "me/lens")


def test_trained_lens_is_pushed_as_it_is_and_evaluated_by_its_name(
    hub, tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    asked = ["--model", str(tiny_folder), "--dataset", str(text_file), *FAST]
    assert train_command(asked) == 0
    (run,) = Path("checkpoints").iterdir()
    assert front_matter((run / "README.md").read_bytes())["library_name"] == "tunedlens"
    push_to_hub(run, "me/lens")
    files = hub.repos["me/lens"]["main"]
    for name in ("README.md", *LENS):
        assert files[name] == (run / name).read_bytes()
    shutil.rmtree(run)

    config = EvaluateConfig(lenses=("me/lens", "other=me/lens@main"), tokens=50)
    sources = evaluate(config).provenance["lenses"]
    assert {name: source["hub"] for name, source in sources.items()} == {
        "tuned": "me/lens",
        "other": "me/lens@main",
    }
    written = []

    def note(*arguments, **_):
        written.append(arguments)
        return Path("report.html")

    monkeypatch.setattr(report, "write_texts", note)
    assert evaluate_command(["--lens", "me/lens", "--prompt", "line 1"]) == 0
    ((reads, folder, _, lenses),) = written
    assert list(reads[0].predictions) == ["tuned", "logit"]
    assert folder == Path("checkpoints/me--lens/prompts")
    assert lenses["tuned"] == "me/lens"
    capsys.readouterr()
    doctor_command(["--lens", "me/lens"])
    assert "pass  the lens was made for this norm and unembedding" in capsys.readouterr().out


def test_lenses_of_the_hub_have_the_last_part_of_their_name(hub, tiny, tmp_path):
    stored(hub, random_lens(tiny), tmp_path)
    stored(hub, random_lens(tiny), tmp_path, repo="me/other", subfolder="lens/tiny")
    specs = saved_lenses(lens_specs(["me/lens", "me/other:lens/tiny"]))
    assert [spec.name for spec in specs] == ["lens", "tiny"]
    folders = [Path("checkpoints/me--lens"), Path("checkpoints/me--other--lens--tiny")]
    assert [spec.results_folder for spec in specs] == folders


@pytest.mark.parametrize("name", ["me/nothing", "me/empty"])
def test_command_says_in_one_line_that_there_is_no_lens(hub, name, capfd):
    hub.repos["me/empty"] = {"main": {"data.bin": b""}}
    assert evaluate_command(["--lens", name]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line


@pytest.mark.slow
def test_python_of_the_page_on_sharing_runs(hub, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "sharing.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    assert list(hub.repos) == ["user/embedded-lens", "user/mine"]
    assert hub.visibility["user/mine"] == "private"
    own = ["card/overview.png", "card/transfer.png"]
    for repo, license_id, pictures in (
        ("user/embedded-lens", "mit", own),
        ("user/mine", None, ["evaluation/overview.png"]),
    ):
        files = hub.repos[repo]["main"]
        assert sorted(files) == sorted(["README.md", *LENS, *pictures])
        assert front_matter(files["README.md"]).get("license") == license_id


def test_results_in_the_card_of_the_folder_are_pushed_with_their_pictures(hub):
    push_to_hub(ROOT / "checkpoints" / "embedded", "me/lens")
    files = hub.repos["me/lens"]["main"]
    pictures = ["card/overview.png", "card/transfer.png"]
    assert sorted(files) == ["README.md", *pictures, "config.json", LENS[1]]
    card = files["README.md"].decode()
    assert "# embedded" in card
    assert card.count("Mean KL(model ‖ lens) over layers") == 1
    assert all(f"({picture})" in card for picture in pictures)


def test_evaluation_of_the_folder_is_in_a_card_without_results(hub, tmp_path):
    folder = shutil.copytree(ROOT / "checkpoints" / "embedded", tmp_path / "lens")
    shutil.rmtree(folder / "card")
    (folder / "README.md").unlink()
    push_to_hub(folder, "me/lens")
    files = hub.repos["me/lens"]["main"]
    assert sorted(files) == ["README.md", "config.json", "evaluation/overview.png", LENS[1]]
    assert "Mean KL(model ‖ lens) over layers" in files["README.md"].decode()


def test_damaged_lens_is_not_pushed(hub, tiny, tmp_path):
    random_lens(tiny).save(tmp_path / "lens")
    path = tmp_path / "lens" / "lens.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="is damaged"):
        push_to_hub(tmp_path / "lens", "me/lens")
    with pytest.raises(InputError, match="holds no lens"):
        push_to_hub(tmp_path, "me/lens")
    assert hub.repos == {}


@pytest.mark.network
def test_the_real_hub_has_no_such_repository_and_no_lens_in_a_model(tiny):
    with pytest.raises(InputError, match="no repository tunedlens-tests/no-such-lens on the hub"):
        load_lens("tunedlens-tests/no-such-lens", tiny)
    with pytest.raises(InputError, match="openai-community/gpt2 on the hub holds no lens"):
        load_lens("openai-community/gpt2", tiny)


@pytest.mark.network
def test_lens_goes_to_the_real_hub_and_back(tiny):
    api = huggingface_hub.HfApi()
    if api.token is None and huggingface_hub.get_token() is None:
        pytest.skip("needs `hf auth login`")
    repo = f"{api.whoami()['name']}/tunedlens-test"
    lens = random_lens(tiny)
    try:
        lens.push_to_hub(repo, private=True, license="mit", evaluation=make_evaluation())
        assert_same_logits(load_lens(repo, tiny), lens, tiny)
    finally:
        api.delete_repo(repo, missing_ok=True)

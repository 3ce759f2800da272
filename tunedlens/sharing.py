"""Uploads lenses to the Hugging Face hub."""

import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from tunedlens.checkpoint import MANIFEST, WEIGHTS, read_manifest, save_lens
from tunedlens.errors import InputError, first_line
from tunedlens.evaluation import Evaluation
from tunedlens.files import write
from tunedlens.lenses import AffineLens
from tunedlens.report import plots, read_evaluation
from tunedlens.report.card import card, evaluation_section, with_front_matter
from tunedlens.report.quality_card import PICTURES

_CARD = "README.md"
_PICTURE = "evaluation/overview.png"


def push_to_hub(
    lens: AffineLens | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    license: str | None = None,  # noqa: A002 - the word of the hub
    evaluation: Evaluation | None = None,
) -> str:
    """Upload a lens with its card to the Hugging Face hub.

    `load_lens` and `--lens` read it by its name. `config.json`, `lens.safetensors` and `README.md`
    are uploaded to the root of the repository. The card is that of the folder, or a new one, with
    front matter and the evaluation added.

    Args:
        lens: the folder of a saved lens, which includes a record of its training, or a lens in
            memory, of which only the translators are known.
        repo_id: `user/name`, or `name` for your own account; it is created if it does not exist.
        private: whether a new repository is private; by default the setting of your account.
        create_pr: whether to open a pull request instead of committing.
        revision: a branch to commit to, which is created if it does not exist.
        license: the license in the card, such as `mit`.
        evaluation: the evaluation in the card; by default that in the folder's `evaluation/`, if
            there is one.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        InputError: there is no lens in the folder, it is damaged, or the hub refuses it or cannot
            be reached.
    """
    with TemporaryDirectory() as temporary:
        staged = Path(temporary)
        if isinstance(lens, AffineLens):
            save_lens(lens, staged)
        else:
            _copy(Path(lens), staged)
            has_results = (staged / PICTURES).is_dir()  # in its card
            if evaluation is None and not has_results and (Path(lens) / "evaluation").is_dir():
                evaluation = read_evaluation(Path(lens) / "evaluation")
        _write_card(staged, repo_id, license, evaluation)
        return _upload(staged, repo_id, private, create_pr, revision)


def _copy(folder: Path, staged: Path) -> None:
    """Copy the files of a lens.

    Raises:
        InputError: there is no lens, or it is damaged.
    """
    expected = read_manifest(folder)["lens_sha256"]
    try:
        for name in (MANIFEST, WEIGHTS, _CARD):
            if name != _CARD or (folder / name).exists():
                shutil.copyfile(folder / name, staged / name)
        for picture in (folder / PICTURES).glob("*.png"):
            (staged / PICTURES).mkdir(exist_ok=True)
            shutil.copyfile(picture, staged / PICTURES / picture.name)
    except OSError as error:
        raise InputError(f"cannot read the lens in {folder}: {error}") from error
    if hashlib.sha256((staged / WEIGHTS).read_bytes()).hexdigest() != expected:
        raise InputError(f"{folder / WEIGHTS} is damaged: it is not what {MANIFEST} describes")


def _write_card(
    staged: Path, repo_id: str, license_id: str | None, evaluation: Evaluation | None
) -> None:
    """Complete the card, or make one, and draw its picture."""
    manifest, path = read_manifest(staged), staged / _CARD
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        text = card(repo_id.rpartition("/")[-1], manifest)
    text = with_front_matter(text, manifest, license_id)
    if evaluation is not None:
        figure = plots.DRAWINGS["overview"].draw(evaluation)
        write(staged / _PICTURE, plots.rendered(figure, "png"))
        if _PICTURE not in text:
            text += evaluation_section(evaluation, _PICTURE)
    write(path, text)


def _upload(
    staged: Path, repo_id: str, private: bool | None, create_pr: bool, revision: str | None
) -> str:
    api = HfApi()
    paths = sorted(path for path in staged.rglob("*") if path.is_file())
    files = [CommitOperationAdd(path.relative_to(staged).as_posix(), path) for path in paths]
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = "Upload a lens with tunedlens"
        commit = api.create_commit(
            repo_id, files, commit_message=message, revision=revision, create_pr=create_pr
        )
    except Exception as error:  # huggingface_hub raises many kinds of exception
        hint = ""
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            hint = "; log in with `hf auth login` as a user with write access"
        raise InputError(f"cannot upload to {repo_id}: {first_line(error)}{hint}") from error
    return commit.pr_url or commit.commit_url

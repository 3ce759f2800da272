"""The paper's figures as one command: `benchmarks/paper.py`."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
TINY = ["--tokens", "300", "--transfer-tokens", "100", "--sequences", "2", "--seq-len", "24"]
TINY += ["--k", "4", "--layers", "2", "6", "--span", "2", "--device", "cpu"]
NAMES = ("by-layer", "bias", "transfer", "fidelity", "alignment", "depth")


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.slow
@pytest.mark.renders
def test_report_has_every_figure_and_agrees_with_the_evaluation(tmp_path, capsys):
    from paper import main

    main([*TINY, "--output", str(tmp_path)])
    assert re.match(r"the figures take about \d+ minutes\n", capsys.readouterr().out)
    report, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for name in NAMES:
        assert f"({name}.png)" in report
        assert f'id="{name}"' in page
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    of_lens = ("tuned", None, "kl_nats")
    mean = next(r["value"] for r in results if (r["lens"], r["layer"], r["metric"]) == of_lens)
    said = re.search(r"The mean KL over layers is ([\d.]+)", report)[1]
    assert float(said) == pytest.approx(mean, rel=0.05)
    assert len(re.findall(r"^\| \d+ \| [\d.e-]+ ± ", report, re.MULTILINE)) >= 4


@pytest.mark.network
@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-410m"])
def test_published_lenses_show_what_the_paper_shows(name, tmp_path):
    from paper import main

    lens = f"space:AlignmentResearch/tuned-lens:lens/{name}"
    sizes = ["--tokens", "2000", "--transfer-tokens", "50", "--sequences", "8", "--k", "16"]
    text = ["--dataset", str(ROOT / "README.md"), "--block", "256"]
    main(["--model", name, "--lens", lens, *text, *sizes, "--output", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    tuned, _, logit, _ = numbers(re.search(r"The mean KL over layers is .*", report)[0])[:4]
    assert tuned < logit / 2
    assert numbers(re.search(r"ρ is .*", report)[0])[0] > 0.5

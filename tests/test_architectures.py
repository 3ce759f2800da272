"""Every architecture of the table in docs/architectures.md passes the checks that it shows."""

import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, CHECKS, Architecture, make_model, run_checks
from conftest import make_gpt2

from tunedlens import FrozenModel, InputError

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(one, id=one.name, marks=[] if one.is_quick else pytest.mark.slow)
        for one in ARCHITECTURES
    ],
)
def test_architecture_passes_every_check_of_the_table(architecture, tokenizer, tmp_path):
    results = run_checks(architecture, tokenizer, tmp_path)
    failures = {name: result for name, result in results.items() if result not in (True, None)}
    assert not failures
    skipped = {name for name, result in results.items() if result is None}
    assert skipped == ({"terms"} if architecture.terms is None else set())


def test_page_shows_every_architecture_and_every_check_as_passed():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| ([✓—✗ |]+) \|$", PAGE.read_text(), re.M)
    found = {(name, peculiar): marks.split(" | ") for name, peculiar, marks in rows}
    expected = {
        (one.name, one.peculiar): [
            "—" if name == "terms" and one.terms is None else "✓" for name in CHECKS
        ]
        for one in ARCHITECTURES
    }
    assert found == expected


def test_model_that_is_not_causal_is_refused(tokenizer):
    bert = make_model(Architecture("bert", "", None, "bert"))
    with pytest.raises(InputError, match="bert is not causal: a token changes the states before"):
        FrozenModel(bert, tokenizer, name="bert")


class Halved(torch.nn.Linear):
    def forward(self, hidden):
        return 0.5 * super().forward(hidden)


class Capped(torch.nn.Linear):
    def forward(self, hidden):
        return 30 * torch.tanh(super().forward(hidden) / 30)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (Halved, r"multiplies its logits by 0\.5, which its config does not declare"),
        (Capped, "caps its logits at 30, which its config does not declare"),
    ],
)
def test_function_of_the_logits_that_the_config_does_not_declare_is_refused(
    tokenizer, head, reason
):
    gpt2 = make_gpt2()
    gpt2.lm_head.__class__ = head
    with pytest.raises(InputError, match=reason):
        FrozenModel(gpt2, tokenizer)

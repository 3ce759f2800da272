import math

import pytest
import torch
from conftest import make_gpt2, random_lens

from tunedlens import (
    ConstantLens,
    ExitRule,
    FrozenModel,
    InputError,
    LogitLens,
    ScoringConfig,
    TunedLens,
    early_exits,
)
from tunedlens.early_exit import SIGNALS

LENGTH = 12
LAYERS = [1, 3]
"""Those of the translators, at which a lens without any is read too."""


@pytest.fixture(scope="module")
def measured(tokenizer):
    """A small model, two lenses of different layers, five blocks and what was measured on them."""
    gpt2 = make_gpt2(n_layer=4)
    with torch.no_grad():
        gpt2.transformer.ln_f.weight.mul_(6)  # some predictions are sure, others are not
    model = FrozenModel(gpt2, tokenizer, name="tiny")
    torch.manual_seed(1)
    some = TunedLens.from_model(model, layers=LAYERS)
    with torch.no_grad():
        for parameter in some.parameters():
            parameter.normal_(0.0, 0.1)
    lenses = {"logit": LogitLens.from_model(model), "some": some}
    blocks = list(torch.randint(0, 4096, (5, LENGTH)))
    return model, lenses, blocks, early_exits(model, lenses, blocks, ScoringConfig(batch_size=2))


def read_by_hand(model, lens, layers, block):
    """Entropy, confidence, best token and cross-entropy at each layer, then the model's."""
    states = model.residual_stream(block[None])
    logits = [lens(states[layer], layer)[0, :-1] for layer in layers]
    logits.append(model.model(block[None]).logits[0, :-1])
    found = []
    for one in logits:
        p = one.double().softmax(-1)
        own = p[torch.arange(LENGTH - 1), block[1:]]
        entropy = -(p * p.log()).sum(-1)
        found.append([entropy.tolist(), p.amax(-1).tolist(), p.argmax(-1).tolist(),
                      (-own.log()).tolist()])  # fmt: skip
    return found


def exit_by_hand(rule, read, layers, position):
    """The index of the exit at one position; that of the model is the last."""
    run = 0
    for index in range(len(layers)):
        entropy, confidence, best, _ = (read[index][kind][position] for kind in range(4))
        is_same = index > 0 and best == read[index - 1][2][position]
        run = run + 1 if is_same else 1
        if layers[index] < rule.first_layer:
            raise AssertionError("layers before the first are not read")
        if rule.signal == "entropy" and entropy < rule.threshold:
            return index
        if rule.signal == "confidence" and confidence > rule.threshold:
            return index
        if rule.signal == "agreement" and run >= rule.threshold:
            return index
    return len(layers)


@pytest.mark.parametrize("lens", ["logit", "some"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_curves_equal_a_loop_over_tokens(measured, lens, signal):
    model, lenses, blocks, exits = measured
    reads = [read_by_hand(model, lenses[lens], LAYERS, block) for block in blocks]
    curve = exits.curve(lens, signal)
    for half, points in enumerate([curve.first_half, curve.second_half]):
        for point in points:
            rule = ExitRule(signal, point.threshold)
            saved, agreed, nats = [], [], []
            for read in reads[half::2]:
                for position in range(LENGTH - 1):
                    index = exit_by_hand(rule, read, LAYERS, position)
                    saved.append(4 - [*LAYERS, 4][index])
                    agreed.append(read[index][2][position] == read[-1][2][position])
                    nats.append(read[index][3][position])
            count = len(saved)
            assert point.layers_saved.value == pytest.approx(sum(saved) / count, abs=1e-9)
            assert point.agreement.value == pytest.approx(sum(agreed) / count, abs=1e-9)
            assert point.perplexity.value == pytest.approx(math.exp(sum(nats) / count), rel=1e-4)
            of_model = [nats for read in reads[half::2] for nats in read[-1][3]]
            ratio = math.exp((sum(nats) - sum(of_model)) / count)
            assert point.perplexity_ratio.value == pytest.approx(ratio, rel=1e-4)
    assert len({point.layers_saved.value for point in curve.second_half}) > 2


def test_errors_are_clustered_by_block(measured):
    model, lenses, blocks, exits = measured
    reads = [read_by_hand(model, lenses["logit"], LAYERS, block) for block in blocks[::2]]
    points = exits.curve("logit", "entropy").first_half
    point = next(one for one in points if one.layers_saved.standard_error)
    rule = ExitRule("entropy", point.threshold)
    totals = [
        sum(4 - [*LAYERS, 4][exit_by_hand(rule, read, LAYERS, i)] for i in range(LENGTH - 1))
        for read in reads
    ]
    means = torch.tensor(totals, dtype=torch.float64) / (LENGTH - 1)
    assert means.std() > 0
    assert point.layers_saved.standard_error == pytest.approx(float(means.std()) / math.sqrt(3))


def test_first_point_never_exits(measured):
    *_, exits = measured
    for lens in exits.curves:
        for signal in SIGNALS:
            point = exits.curve(lens, signal).second_half[0]
            assert (point.layers_saved.value, point.agreement.value) == (0, 1)
            assert point.perplexity == exits.model_perplexity


def test_early_layers_are_not_read_if_asked(measured):
    model, lenses, blocks, _ = measured
    exits = early_exits(model, lenses, blocks, first_layer=2)
    for lens in lenses:
        laxest = exits.curve(lens, "agreement").second_half[-1]
        assert laxest.layers_saved.value == 1  # layer 3 is the only one from 2 on
    assert exits.choose("logit", "entropy", agreement=0).rule.first_layer == 2


def test_chosen_threshold_saves_most_within_the_limit_on_the_first_half(measured):
    *_, exits = measured
    curve = exits.curve("logit", "confidence")
    rule, chosen, tested = exits.choose("logit", "confidence", agreement=0.5)
    within = [p.layers_saved.value for p in curve.first_half if p.agreement.value >= 0.5]
    assert chosen.layers_saved.value == max(within)
    assert tested == next(p for p in curve.second_half if p.threshold == rule.threshold)
    ratios = [point.perplexity_ratio.value for point in curve.first_half]
    limit = sorted(ratio for ratio in ratios if ratio > 1)[3]
    _, chosen, _ = exits.choose("logit", "confidence", perplexity_ratio=limit)
    saved = [point.layers_saved.value for point in curve.first_half]
    within = [one for one, ratio in zip(saved, ratios, strict=True) if ratio <= limit]
    assert chosen.layers_saved.value == max(within)


def test_table_has_what_was_tested(measured):
    *_, exits = measured
    line = exits.table(agreement=0.5).splitlines()[1].split()
    rule, _, tested = exits.choose("logit", "entropy", agreement=0.5)
    assert line[:3] == ["logit", "entropy", f"{rule.threshold:.4g}"]
    assert float(line[3]) == pytest.approx(tested.layers_saved.value, abs=0.06)


def test_curves_draw_every_lens_in_every_panel(measured):
    *_, exits = measured
    axes = exits.plot().axes
    points = exits.curve("some", "agreement").second_half
    drawn = [container.lines[0].get_xydata().tolist() for container in axes[4].containers] + [
        container.lines[0].get_xydata().tolist() for container in axes[2].containers
    ]
    assert [[p.layers_saved.value, p.agreement.value] for p in points] in drawn


@pytest.mark.parametrize("rule", [
    ExitRule("entropy", 7.5), ExitRule("confidence", 0.012), ExitRule("agreement", 2),
    ExitRule("confidence", 0.012, first_layer=2),
])  # fmt: skip
def test_generation_exits_where_a_loop_does(tiny, rule):
    lens, prompts = random_lens(tiny), ["def f(x):\n    return", "import"]
    found = lens.generate(tiny, prompts, early_exit=rule, max_new_tokens=8, eos_token_id=4095)
    layers = list(range(rule.first_layer, 3))
    for prompt, written in zip(prompts, found, strict=True):
        ids = tiny.encode(prompt)
        start, exited = ids.shape[1], []
        for _ in range(8):
            states = tiny.residual_stream(ids)
            probs = [
                lens(states[layer][0, -1], layer).detach().softmax(-1) for layer in [*layers, 3]
            ]
            read = [[[float(-(p * p.log()).sum())], [float(p.max())], [int(p.argmax())], [0.0]]
                    for p in probs]  # fmt: skip
            index = exit_by_hand(rule, read, layers, 0)
            exited.append([*layers, 3][index])
            ids = torch.cat([ids, probs[index].argmax()[None, None]], 1)
        assert written.text == tiny.tokenizer.decode(ids[0, start:])
        assert written.layers == exited
        assert written.layers_saved == pytest.approx(sum(3 - one for one in exited) / 8)
    assert len({layer for one in found for layer in one.layers}) > 1


def test_layers_end_where_the_text_does(tiny):
    lens, rule = random_lens(tiny), ExitRule("agreement", 2)
    whole = lens.generate(tiny, "import", early_exit=rule, max_new_tokens=8, eos_token_id=4095)
    ids = tiny.encode("import" + whole.text)[0].tolist()
    end = ids[4]
    first = ids.index(end, 1) - 1
    cut = lens.generate(tiny, "import", early_exit=rule, max_new_tokens=8, eos_token_id=end)
    assert cut.layers == whole.layers[:first]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("entropy", -0.1), "entropy must be 0 or more nats; got -0.1"),
        (("entropy", math.nan), "0 or more nats"),
        (("confidence", 1.5), "between 0 and 1; got 1.5"),
        (("agreement", 0), "whole number of layers, 1 or more; got 0"),
        (("agreement", 1.5), "whole number"),
        (("depth", 1), "signal must be one of entropy, confidence, agreement; got 'depth'"),
        (("entropy", 1.0, -1), "first_layer must be 0 or more"),
    ],
)
def test_rule_outside_its_range_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        ExitRule(*arguments)


def test_impossible_wishes_are_refused(measured, tiny):
    model, lenses, blocks, exits = measured
    for options, words in (
        ({}, "either agreement or perplexity_ratio"),
        ({"agreement": 0.9, "perplexity_ratio": 1.1}, "either"),
        ({"agreement": 1.1}, "between 0 and 1, got 1.1"),
        ({"perplexity_ratio": 0.9}, "perplexity_ratio must be 1 or more, got 0.9"),
        ({"perplexity_ratio": math.nan}, "1 or more"),
    ):
        with pytest.raises(InputError, match=words):
            exits.choose("logit", "entropy", **options)
    with pytest.raises(InputError, match="lens must be one of logit, some; got 'tuned'"):
        exits.choose("tuned", "entropy", agreement=0.9)
    with pytest.raises(InputError, match="signal must be one of"):
        exits.choose("logit", "depth", agreement=0.9)
    with pytest.raises(InputError, match="two blocks of text"):
        early_exits(model, lenses, blocks[:1])
    with pytest.raises(InputError, match="no lens reads the residual stream at layer 4"):
        early_exits(model, lenses, blocks, first_layer=4)
    with pytest.raises(InputError, match="was made for"):
        early_exits(tiny, lenses, blocks)
    with pytest.raises(InputError, match="either a layer or early_exit"):
        lenses["logit"].generate(model, "x", 1, early_exit=ExitRule("entropy", 1.0))
    with pytest.raises(InputError, match="reads no layer from 7 to"):
        lenses["logit"].generate(model, "x", early_exit=ExitRule("entropy", 1.0, 7))


def test_constant_lens_exits_at_the_first_layer_or_never(measured):
    model, _, blocks, _ = measured
    constant = ConstantLens(torch.full((4096,), -math.log(4096)), model.identity)
    points = early_exits(model, {"constant": constant}, blocks).curve("constant", "entropy")
    assert {point.layers_saved.value for point in points.second_half} == {0, 4}

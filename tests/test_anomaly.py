import dataclasses
import json
import sys

import pytest
import torch
from conftest import make_gpt2, random_lens

from tunedlens import FrozenModel, InputError, LogitLens, anomaly, trajectory

SKLEARN_METHODS = ("isolation-forest", "local-outlier-factor")


@pytest.fixture(scope="module")
def reads(tokenizer):
    """Twelve random texts, read with two lenses."""
    model = FrozenModel(make_gpt2(), tokenizer, name="tiny")
    lenses = {"tuned": random_lens(model), "logit": LogitLens.from_model(model)}
    return trajectory(model, lenses, torch.randint(0, 4096, (12, 9)).tolist(), k=1)


def by_hand(one, lens, metric, positions):
    predictions = one.predictions[lens]
    values = {
        "kl": predictions.kl_nats[:-1],
        "entropy": predictions.entropy_nats,
        "cross_entropy": -predictions.next_log_probs[:, :-1],
    }[metric].tolist()
    return [sum(row) / len(row) if positions == "mean" else row[-1] for row in values]


@pytest.mark.parametrize("positions", ["mean", "last"])
@pytest.mark.parametrize("metric", ["kl", "entropy", "cross_entropy"])
def test_features_are_a_metric_by_row(reads, metric, positions):
    found = anomaly.features(reads[0], metric, lens="logit", positions=positions)
    assert found.tolist() == pytest.approx(by_hand(reads[0], "logit", metric, positions), rel=1e-6)


def test_features_of_ranks_are_logarithms(reads):
    found = anomaly.features(reads[0], "rank", positions="last")
    ranks = reads[0].values("rank")[:-1, -1]
    assert found.exp().tolist() == pytest.approx(ranks.tolist())
    assert len(found) == 3


def test_mahalanobis_is_the_distance_with_the_covariance_of_scikit_learn(reads):
    covariance = pytest.importorskip("sklearn.covariance")
    normal = torch.tensor([by_hand(one, "tuned", "kl", "mean") for one in reads[:8]]).double()
    mean, deviation = normal.mean(0), normal.std(0, correction=0)
    fitted = covariance.LedoitWolf().fit(((normal - mean) / deviation).numpy())
    other = torch.tensor(by_hand(reads[9], "tuned", "kl", "mean")).double()
    expected = fitted.mahalanobis(((other - mean) / deviation)[None].numpy())[0] ** 0.5
    assert anomaly.fit(reads[:8]).score(reads[9]) == pytest.approx(expected, rel=1e-6)


def test_fewer_texts_than_rows_give_a_score(reads):
    assert 0 < anomaly.fit(reads[:3], "entropy").score(reads[5]) < 1e6


@pytest.mark.parametrize("method", SKLEARN_METHODS)
def test_methods_of_scikit_learn_score_as_it_does(reads, method):
    pytest.importorskip("sklearn")
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor

    normal = torch.stack([anomaly.features(one, "entropy") for one in reads[:8]]).numpy()
    other = torch.stack([anomaly.features(one, "entropy") for one in reads[8:]]).numpy()
    detector = {
        "isolation-forest": IsolationForest(random_state=3),
        "local-outlier-factor": LocalOutlierFactor(n_neighbors=7, novelty=True),
    }[method].fit(normal)
    found = anomaly.fit(reads[:8], "entropy", method=method, seed=3)
    assert found.scores(reads[8:]) == pytest.approx((-detector.score_samples(other)).tolist())


def test_unusual_text_has_the_highest_score(reads):
    normal, other = reads[:11], reads[11]
    one = other.predictions["tuned"]
    odd = dataclasses.replace(one, kl_nats=one.kl_nats + 5 * torch.tensor([[1], [-1], [1], [0]]))
    unusual = dataclasses.replace(other, predictions={"tuned": odd})
    for method in ("mahalanobis", "local-outlier-factor"):
        detector = anomaly.fit(normal, method=method)
        assert detector.score(unusual) > max(detector.scores(normal))


def test_saved_detector_scores_the_same(reads, tmp_path):
    detector = anomaly.fit(reads[:8], "entropy", lens="logit", positions="last")
    detector.save(tmp_path / "detector.json")
    loaded = anomaly.Detector.load(tmp_path / "detector.json")
    assert loaded == detector
    assert loaded.scores(reads[8:]) == detector.scores(reads[8:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "not a saved detector of format 1"),
        ({"normal": [[1.0]]}, "at least three normal texts"),
        ({"normal": [[1.0], [2.0], [1.0, 2.0]]}, "same number of features"),
        ({"normal": "x"}, "normal must be a list"),
        ({"method": "guess"}, "method must be one of"),
    ],
)
def test_damaged_detector_is_refused(reads, tmp_path, change, words):
    path = tmp_path / "detector.json"
    anomaly.fit(reads[:4]).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words):
        anomaly.Detector.load(path)


def test_auroc_equals_scikit_learn_and_all_pairs():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (60,)).double()  # with ties
    labels = torch.rand(60) < 0.3
    found = anomaly.auroc(scores.tolist(), labels.tolist())
    pairs = [
        (one > other) + 0.5 * (one == other) for one in scores[labels] for other in scores[~labels]
    ]
    assert found.value == pytest.approx(float(sum(pairs)) / len(pairs))
    assert found.value == pytest.approx(metrics.roc_auc_score(labels, scores))


def test_interval_is_that_of_the_normal_approximation():
    torch.manual_seed(0)
    normal, odd = torch.randn(400), torch.randn(300) + 1
    found = anomaly.auroc(torch.cat([normal, odd]).tolist(), [False] * 400 + [True] * 300)
    wins = (odd[:, None] > normal).double()  # DeLong's variance
    error = (wins.mean(1).var() / 300 + wins.mean(0).var() / 400).sqrt().item()
    assert found.value - found.low == pytest.approx(1.96 * error, rel=0.12)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.12)


@pytest.mark.parametrize(
    ("scores", "labels", "options", "words"),
    [
        ([1.0, 2.0], [False, False], {}, "got 0 anomalies among 2"),
        ([1.0, 2.0], [True, True], {}, "got 2 anomalies among 2"),
        ([1.0, 2.0], [True], {}, "a label per score; got 2 and 1"),
        ([1.0, float("nan")], [True, False], {}, "got NaN"),
        ([1.0, 2.0], [True, False], {"confidence": 1.0}, "confidence must be between 0 and 1"),
    ],
)
def test_auroc_refuses_what_has_none(scores, labels, options, words):
    with pytest.raises(InputError, match=words):
        anomaly.auroc(scores, labels, **options)


def test_what_cannot_be_fitted_is_refused(reads, monkeypatch):
    for texts, options, words in (
        ([], {}, "got none"),
        (reads[:1], {}, "at least three normal texts"),
        (reads, {"metric": "js"}, "metric must be one of kl_nats"),
        (reads, {"positions": "first"}, "positions must be mean or last"),
        (reads, {"method": "guess"}, "method must be one of mahalanobis"),
        (reads, {"lens": "other"}, "lens must be one of tuned, logit"),
        ([*reads, reads[0][1:]], {}, "same rows: expected 0.resid_pre"),
    ):
        with pytest.raises(InputError, match=words):
            anomaly.fit(texts, **options)
    detector = anomaly.fit(reads)
    with pytest.raises(InputError, match="of one model: expected tiny, got other"):
        detector.score(dataclasses.replace(reads[0], model="other"))
    with pytest.raises(InputError, match="same rows"):
        detector.score(reads[0][:2])
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(InputError, match="isolation-forest needs scikit-learn; install it"):
        anomaly.fit(reads, method="isolation-forest")

"Numbers that end in tables and verdicts, in examples so small that the right one is known."

import math

import pytest
import torch

from csrae_nb import action_units, answers, claims, matched, pressure, results
from csrae_nb.claims import Estimate
from csrae_nb.pressure import Comparison


def row(model="VAE", seeds=3, **fields):
    usual = dict(dataset="mnist", model=model, components=None, latent_dim=20, lam=1.0, samples=None)
    usual |= dict(prior="mog" if model == "MixtureCSRAE" else "normal", epochs=30, command="")
    return results.with_name(usual | dict(seeds=" ".join(map(str, range(seeds)))) | fields)


def test_rows_over_different_seeds_have_the_mean_and_error_of_all_runs():
    "As if the numbers of all runs were in one list: 1, 2, 3 and 10."
    three = row(seeds=3, knn3_mean=2.0, knn3_se=1 / math.sqrt(3))
    one = row(knn3_mean=10.0) | dict(seeds="7")
    (both,) = results.merge([three, one])
    assert both["knn3_mean"] == pytest.approx(4.0)
    assert both["knn3_se"] == pytest.approx(torch.tensor([1.0, 2, 3, 10]).std().item() / 2)


def test_of_rows_that_share_a_seed_that_over_more_seeds_stays():
    one, three = row(seeds=1, knn3_mean=1.0), row(seeds=3, knn3_mean=2.0)
    assert [r["knn3_mean"] for r in results.merge([one], [three])] == [2.0]


def test_each_correlation_has_its_own_verdict():
    like = dict(mnist=(8, 0.0, 1.0), omniglot=(8, 1.0, 0.0))
    assert results.clear_ranks(like) == dict(mnist=[False, True], omniglot=[True, False])


def test_weights_of_shorter_training_are_not_chosen_from():
    found = [row(lam=lam, epochs=e, criterion_mean=1.0) for lam, e in ((1.0, 400), (2.0, 400), (5.0, 30))]
    ((_, weights),) = results.selected_weights(found).values()
    assert weights == [1.0, 2.0]


def test_the_spread_of_seeds_is_a_standard_deviation():
    pool = [row(seeds=4, knn3_mean=10.0, knn3_se=0.5)]
    assert claims.relative_spread(pool, "mnist", "knn3") == pytest.approx(0.1)
    (one,) = claims.with_errors([row(seeds=1, knn3_mean=20.0, knn3_se=None)], pool)
    assert one["knn3_err"] == pytest.approx(2.0)


def test_degrees_of_freedom_are_one_less_than_seeds():
    assert claims.welch(Estimate(1.0, 0.3, 3), Estimate(2.0, 0.3, 3)) == pytest.approx(
        (0.3 * math.sqrt(2), 4)
    )
    assert claims.welch(Estimate(1.0, 0.3, 5), Estimate(2.0, 0.0, 3))[1] == pytest.approx(4)


def test_one_case_of_many_refutes_only_if_chance_does_not_give_it():
    "0.03 in one of two comparisons is 0.06 in both."
    assert claims.judge_all([(-1, 0.03), (1, 0.5)]) == "undecided"
    assert claims.judge_all([(-1, 0.02), (1, 0.5)]) == "does not hold"


def test_no_difference_takes_twice_the_error():
    assert claims.alike([(0.0, 0.02)]) and not claims.alike([(0.0, 0.03)])
    assert claims.alike([(0.0, 0.04)] * 4), "the error of a mean of four is half of each"


def test_the_error_of_a_relative_difference_grows_with_the_ratio():
    a, b = row(knn3_mean=30.0, knn3_se=3.0), row(knn3_mean=10.0, knn3_se=0.0)
    assert claims.difference(a, b, "knn3") == pytest.approx((2.0, 0.3))


def test_of_two_outcomes_the_worse_is_the_middle():
    assert claims.middle([1, -1]) == -1 and claims.middle([1, 0, None]) == 0


def test_a_gain_of_a_few_percent_is_tested_against_the_rival_lowered_by_as_much():
    gain = claims.Gain(Estimate(9.7, 0.05, 3), Estimate(10.0, 0.05, 3), "mnist")
    assert gain.beyond()[1] < 0.02 < 0.3 < gain.beyond(2.65)[1]


def figure4(**of):
    return dict(figure4=[row("MixtureCSRAE", criterion_se=0.1, **r) for r in of.values()])


def test_a_mog_prior_half_a_nat_above_vamp_is_similar():
    "Clearly above, and within the nat that counts as similar."
    found = [
        row("MixtureCSRAE", prior=p, components=100, criterion_mean=c, criterion_se=0.1)
        for p, c in (("mog", 90.6), ("vamp", 90.0))
    ]
    claim = claims.prior_claim(dict(figure4=found))
    assert claim.verdict == "holds" and "1 for, 0 against" in claim.measured


def test_more_than_400_components_are_none_of_the_claim():
    found = [
        row("MixtureCSRAE", components=K, criterion_mean=c, criterion_se=0.1)
        for K, c in ((100, 95.0), (400, 90.0), (1000, 99.0))
    ]
    assert claims.components_claim(dict(figure4=found)).verdict == "holds"


def test_every_data_set_has_to_be_pure():
    found = [
        row("MixtureCSRAE", dataset=d, components=100, latent_dim=40, cluster_purity_mean=p)
        for d, p in (("mnist", 0.97), ("caltech101", 0.5))
    ]
    assert claims.classes_claim(dict(all=found)).verdict == "holds in part"


def test_the_weight_between_two_is_geometric():
    cs = [row("CSRAE", lam=lam, reconstruction_mean=r) for lam, r in ((1.0, 70.0), (4.0, 80.0))]
    assert claims.matching_weight(cs, row(reconstruction_mean=75.0)) == pytest.approx(2.0)


# at equal pressure


def test_the_best_samples_keep_their_own_error():
    found = {"samples": (9.0, 0.9), "samples_refit15": (4.0, 0.4), "samples_expost": (5.0, 0.5)}
    r = {f"frechet_classifier_{k}_{s}": v for k, pair in found.items() for s, v in zip(("mean", "se"), pair)}
    best = pressure.with_best(r)
    assert (best["best_mean"], best["best_se"]) == (4.0, 0.4)


def test_between_two_weights_the_error_has_that_of_the_reconstructions():
    ends = [
        row(seeds=n, reconstruction_mean=r, reconstruction_se=0.0, knn3_mean=k, knn3_se=0.0)
        for n, r, k in ((2, 70.0, 1.0), (5, 80.0, 6.0))
    ]
    found = pressure.at_reconstruction(ends, Estimate(74.0, 0.2, 3), "knn3")
    assert (found.mean, found.se, found.n) == (pytest.approx(3.0), pytest.approx(0.5 * 0.2), 2)


def compared_with(ours, rival, metric="knn3", n=3):
    return Comparison(("mnist", 20), metric, Estimate(*ours, n), Estimate(*rival, n))


def test_a_margin_is_a_part_of_the_rivals_number():
    assert compared_with((30.0, 0.1), (10.0, 0.1)).margin == pytest.approx(0.5)
    assert compared_with((30.0, 0.1), (10.0, 0.1), "criterion").margin == 1


def test_equivalence_takes_two_tests_of_one_side_each():
    "With four degrees of freedom the bound is 2.13 errors; that of a test of both sides is 2.78."
    se = 0.5 / 2.5 / math.sqrt(2)
    assert compared_with((10.0, se), (10.0, se)).equivalent
    assert not compared_with((10.0, 1.3 * se), (10.0, 1.3 * se)).equivalent


def test_a_higher_likelihood_leads():
    for metric in ("log_likelihood", "recall_samples", "coverage_samples", "precision_samples"):
        assert compared_with((-80.0, 0.1), (-90.0, 0.1), metric).is_lead, metric
    assert not compared_with((9.0, 0.1), (8.0, 0.1)).is_lead


def test_the_same_weight_is_the_rivals():
    found = [
        row(m, lam=lam, reconstruction_mean=70.0, reconstruction_se=0.1, knn3_mean=k, knn3_se=0.1)
        for m, lam, k in (("CSRAE", 1.0, 1.0), ("CSRAE", 0.5, 2.0), ("VAE", 0.5, 3.0), ("VAE", 1.0, 4.0))
    ]
    for weight, pair in ((0.5, (2.0, 3.0)), (1.0, (1.0, 4.0))):
        (c,) = pressure.compared(found, "CSRAE", "VAE", False, ("knn3",), weight)
        assert (c.ours.mean, c.rival.mean) == pair


# priors matched to the aggregate


def fitted(K, asked, **of):
    values = {f"frechet_classifier_{k}": v for k, v in of.items()}
    means = {f"{k}_mean": v for k, v in values.items()} | {f"{k}_se": 0.1 for k in values}
    return row("MixtureCSRAE", components=K, command=f"train -p expost_components {asked}") | means


def test_only_a_fitted_mixture_as_large_is_compared_with():
    of = dict(samples=5.0, samples_expost=6.0)
    assert [len(matched.cooled([fitted(K, 100, **of)])) for K in (100, 10, 400)] == [1, 0, 0]


def test_samples_are_compared_at_their_best_temperature():
    of = dict(samples=5.0, samples_t85=4.0, samples_t70=4.5, samples_expost=6.0, samples_expost_t70=3.0)
    ((c,), (warm,)) = (matched.cooled([fitted(100, 100, **of)], **kw) for kw in ({}, dict(theirs=("",))))
    assert (c.ours.mean, c.rival.mean, warm.rival.mean) == (4.0, 3.0, 6.0)


@pytest.fixture
def matched_rows(monkeypatch):
    "A matched prior and VampPriorVAEs around its reconstruction, as `matched_prior` reads them."

    def read(ours, vamps):
        rows = dict(aggregate=[ours], aggregate_400=vamps)
        for module in (matched, pressure):
            monkeypatch.setattr(module, "read_results", lambda name, folder: rows.get(name, []))
        ((_, _, versus),) = matched.matched_prior()
        return versus

    return read


def vamps(bound, **fields):
    how = dict(components=100, command="train -p expost_components 100", reconstruction_se=0.0)
    how |= {"frechet_classifier_samples_mean": 10.0, "frechet_classifier_samples_se": 0.1} | fields
    how |= {"frechet_classifier_reconstructions_mean": bound, "frechet_classifier_reconstructions_se": 0.1}
    return [row("VampPriorVAE", prior="vamp", reconstruction_mean=r, **how) for r in (70.0, 80.0)]


def ours():
    r = fitted(100, 100, samples=20.0, reconstructions=2.0)
    return r | dict(settings="prior_objective=aggregate", reconstruction_mean=75.0, reconstruction_se=0.1)


def test_a_vamp_prior_nearer_than_its_reconstructions_wins_nothing(matched_rows):
    assert pressure.verdicts([matched_rows(ours(), vamps(2.0))]) == ["worse"]
    assert pressure.verdicts([matched_rows(ours(), vamps(12.0))]) == ["undecided"]


def test_a_vamp_prior_that_was_trained_longer_is_no_rival(matched_rows):
    assert matched_rows(ours(), vamps(2.0, epochs=30)) and not matched_rows(ours(), vamps(2.0, epochs=100))


# answers


def test_mostly_takes_four_times_as_many_wins_as_losses():
    said = {n: ["better"] * n + ["worse"] * 2 for n in (8, 9)}
    assert [answers.in_words(some) for some in said.values()] == ["mixed", "mostly"]


def test_verdicts_are_corrected_for_all_metrics_of_a_pair(monkeypatch):
    asked = []
    monkeypatch.setattr(
        answers, "compared", lambda rows, a, b, equal, metrics, weight: asked.append([*metrics]) or []
    )
    answers.judged([], [("CSRAE", "VAE")], True, ("knn3",))
    assert asked == [[*pressure.AXES]]


def test_the_error_of_a_mean_over_seeds():
    assert answers._seeds([1.0, 2.0, 3.0, 4.0]).se == pytest.approx(torch.arange(4.0).std().item() / 2)


def test_smaller_weights_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(answers, "judged", lambda *a, weight=1.0: asked.append(weight) or {})
    answers._mixtures([])
    assert asked == [1.0, 0.5, 0.25]


# action units


def of_model(model, f1, seeds="0 1 2", folds=3, se=0.1):
    return dict(model=model, labels=1.0, network="faces", seeds=seeds, folds=folds, f1_mean=f1, f1_se=se)


def test_models_of_other_folds_or_seeds_are_not_told_apart():
    a, b = of_model("MixtureCSRAE", 50.0), of_model("VampPriorVAE", 40.0)
    assert action_units.compared_models([a, b], 1.0).endswith("MixtureCSRAE more than VampPriorVAE")
    for other in (dict(folds=2), dict(seeds="3 4 5")):
        assert action_units.compared_models([a, b | other], 1.0).endswith("not told apart")


def test_pairs_of_models_are_corrected_for_their_number():
    "0.025 in each of three comparisons."
    a, b, c = (
        of_model(m, f1, se=1.0)
        for m, f1 in (("MixtureCSRAE", 45.0), ("VampPriorVAE", 40.0), ("Supervised", 40.0))
    )
    assert 0.02 < action_units._f1_p(a, b) < 0.03
    assert action_units.compared_models([a, b], 1.0).endswith("more than VampPriorVAE")
    assert action_units.compared_models([a, b, c], 1.0).count("not told apart") == 3


def test_frames_that_nobody_coded_are_no_part_of_chance():
    assert action_units.chance_f1(torch.tensor([[1], [0], [-1], [-1]])) == pytest.approx([200 * 1 / 3])


def test_an_answer_that_no_frame_has_is_no_part_of_the_mean():
    counts = dict(tp_a_mean=1.0, fp_a_mean=0.0, fn_a_mean=0.0, tp_b_mean=0.0, fp_b_mean=3.0, fn_b_mean=0.0)
    assert action_units.pooled_f1([counts]) == dict(pooled_f1=100.0, pooled_f1_a=100.0, pooled_f1_b=None)


def test_of_folds_as_many_those_that_most_seeds_have_are_averaged_over():
    found = (("0", 0, 10.0), ("1", 1, 20.0), ("2", 1, 30.0))
    key = dict(model="VAE", labels=1.0, network="faces", command="train -p labels 1.0", f1_se=None)
    (r,) = action_units.over_folds(key | dict(seeds=s, fold=k, f1_mean=v) for s, k, v in found)
    assert (r["seeds"], r["f1_mean"]) == ("1 2", 25.0)

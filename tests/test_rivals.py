"Autoencoders whose codes are points, as `fit` and the evaluation take them."

import pytest
import torch
from csrae_nb.config import Config
from csrae_nb.evaluation import complete_run
from csrae_nb.fleet import stackable
from csrae_nb.config import resolve
from csrae_nb.mixtures import GMM
from csrae_nb.rivals import MMD, squared_distances
from csrae_nb.runs import fit, load_run


def rival(model, **fields):
    usual = dict(dataset="digits", latent_dim=6, epochs=3, fid_images=100)
    return Config(model=model, **usual | fields)


@pytest.mark.parametrize("model, beta, epochs", [("WAE", 50.0, 3), ("CWAE", 5.0, 3), ("RAE", 0.1, 8)])
def test_a_rival_trains_and_is_evaluated(model, beta, epochs, own_runs):
    "The RAE's pictures are all alike after three epochs, whatever codes are drawn."
    how = dict(beta=beta, epochs=epochs)
    metrics = complete_run(rival(model, **how), progress=False)
    assert metrics["log_likelihood"] is None and 0 < metrics["knn3"] < 60
    assert metrics["frechet_classifier_samples_expost"] < metrics["frechet_classifier_samples"]
    run = fit(rival(model, **how), progress=False)
    again, x = load_run(run.path), torch.rand(5, 8, 8)
    torch.testing.assert_close(again.model.reconstruct(x), run.model.reconstruct(x))
    assert stackable(resolve(rival(model)))


def test_the_weight_draws_codes_to_the_prior(own_runs):
    apart = [
        fit(rival("WAE", beta=beta), progress=False).history[-1]["val_divergence"] for beta in (0.0, 1000.0)
    ]
    assert apart[1] < apart[0] / 2


@pytest.mark.parametrize("model", ["WAE", "CWAE", "RAE"])
def test_labels_are_refused(model, own_runs):
    with pytest.raises(ValueError, match=f"labels have no {model}: its codes are points"):
        fit(rival(model, labels=100), progress=False)


def test_distances_of_codes_far_from_the_origin():
    z = 100 + torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    exact = torch.cdist(z.double(), z.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(squared_distances(z).double(), exact, atol=2e-4, rtol=1e-4)


def test_a_single_code_has_no_discrepancy():
    one, normal = GMM.gaussian(torch.ones(1, 8), 1.0), GMM.gaussian(torch.zeros(8), 1.0)
    with pytest.raises(ValueError, match="batch_size of 2 or more"):
        MMD()(one, normal)
    assert MMD().eval()(one, normal).isnan()

"EM with full covariances after training: of codes in a plane, in an evaluation, where memory is too small."

import pytest
import torch

from csrae_nb.evaluation import evaluate, run_codes, sample_sources
from csrae_nb.kernels import NotEnoughMemory
from csrae_nb.mixtures import GMM, FullGMM
from csrae_nb.priors import full_em, full_em_step
from csrae_nb.runs import prepare_data
from csrae_nb.trained import refitted_prior

from small_runs import ROWS, tiny

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("D, K", [(2, 1), (20, 1), (20, 5)])
def test_codes_in_a_plane_of_fewer_dimensions_have_a_density(dtype, scale, D, K):
    "Such as those of an autoencoder without noise: in single precision their covariance has no inverse."
    g, plane = torch.Generator().manual_seed(0), 1 + D // 4
    codes = torch.randn(3000, plane, generator=g) @ torch.randn(plane, D, generator=g)
    codes = codes.to(dtype) * scale
    mu = codes[:K].clone()
    start = GMM(torch.zeros(K, dtype=dtype).log_softmax(0), mu, torch.full_like(mu, 1e-10 * scale**2))
    found = full_em(start, codes[:2000], codes[2000:])
    assert isinstance(found, FullGMM)
    assert found.log_prob(codes).isfinite().all() and found.rsample(g).isfinite().all()


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-3), (torch.float64, 1e-12)])
@pytest.mark.parametrize("widest", [1.0, 1e2, 1e4])
def test_other_covariances_stay_as_they_are(dtype, close, widest):
    "Also those of axes of different scales, whose factors exist."
    g, D = torch.Generator().manual_seed(0), 20
    codes = (
        torch.randn(3000, D, generator=g) @ (torch.eye(D) + 0.1 * torch.randn(D, D, generator=g))
    ).double()
    codes[:, 0] *= widest
    one = GMM(torch.zeros(1), torch.zeros(1, D), codes.var(0)[None])
    one = GMM(*(t.to(dtype) for t in (one.logw, one.mu, one.var)))
    d = codes - codes.mean(0)
    plain = (d.T @ d + 10 * codes.var(0).diag()) / 3010
    scale = plain.diagonal().sqrt()
    found = full_em_step(one, codes.to(dtype)).cov[0].double()
    torch.testing.assert_close(
        found / scale / scale[:, None], plain / scale / scale[:, None], rtol=0, atol=close
    )
    assert isinstance(full_em(one, codes[:2000].to(dtype), codes[2000:].to(dtype)), FullGMM)


@pytest.fixture
def run(own_runs):
    return tiny("run", model="MixtureCSRAE")


def test_an_evaluation_draws_from_what_refit_gives(run):
    data = prepare_data(run.cfg, dict(x=ROWS))
    codes = (run_codes(run, data, part) for part in ("train", "val"))
    found, again = sample_sources(run, *codes)["samples_full"], refitted_prior(run, data=dict(x=ROWS))
    assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(again).values()))


def test_covariances_that_do_not_fit_into_memory_are_left_out(run, monkeypatch):
    data = prepare_data(run.cfg, dict(x=ROWS))
    whole = evaluate(run, data, progress=False)
    monkeypatch.setattr("csrae_nb.kernels.free_memory", lambda device: 2**20)
    D = 20_000
    wide = GMM(torch.zeros(2).log_softmax(-1), torch.zeros(2, D), torch.ones(2, D))
    with pytest.raises(
        NotEnoughMemory, match="2 covariances of 20000 dimensions need about 36 GiB.*; use fewer components"
    ):
        full_em_step(wide, torch.zeros(3, D))

    def too_small(*_):
        raise NotEnoughMemory("2 covariances need about 18 GiB")

    monkeypatch.setattr("csrae_nb.evaluation.full_em", too_small)
    with pytest.warns(UserWarning, match="no samples_full: 2 covariances need"):
        rest = evaluate(run, data, progress=False)
    assert whole["log_prior_full"] is not None and rest["log_prior_full"] is None
    assert {k for k in whole if whole[k] != rest.get(k)} <= {k for k in whole if k.endswith("_full")} | {
        "log_prior_full"
    }

"""RQ-VAE against its equations in plain steps, and against residual k-means."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from friendrec.errors import FriendrecError
from friendrec.models.rqvae import Coder, RqVae, Training, continue_rqvae, fit_rqvae
from friendrec.models.rqvae_config import RqVaeConfig
from friendrec.models.tokenizer import Vectors, fit_residual_kmeans

SMALL = RqVaeConfig(latent_dim=6, hidden=16, steps=60, batch_size=128)


def curved(num: int = 600, dim: int = 8) -> Vectors:
    """Vectors near a surface of two dimensions that is no plane."""
    rng = np.random.default_rng(0)
    place = rng.uniform(-2, 2, (num, 2))
    surface = np.tanh(place @ rng.standard_normal((2, 16))) @ rng.standard_normal((16, dim))
    return (surface + 0.05 * rng.standard_normal((num, dim)) + 3).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> RqVae:
    return fit_rqvae(curved(), 3, 16, 0, SMALL)


def used(model: RqVae, vectors: Vectors) -> list[float]:
    """Share of each level's tokens that some vector has."""
    return [len(np.unique(column)) / size for column, size in zip(model.encode(vectors).T, model.sizes, strict=True)]


def error(vectors: Vectors, decoded: Vectors) -> float:
    return float(np.square(vectors - decoded).sum() / np.square(vectors - vectors.mean(0)).sum())


def test_a_code_is_the_greedy_one_in_the_latent_space_and_decodes_to_its_sum(fitted: RqVae) -> None:
    vectors = curved()[:50]
    codes = fitted.encode(vectors)
    for vector, code in zip(vectors, codes, strict=True):
        with torch.no_grad():
            residual = fitted.encoder(torch.from_numpy((vector - fitted.mean) / np.float32(fitted.scale)))
        total = torch.zeros(6)
        for level, token in zip(fitted.codebooks.levels, code, strict=True):
            places = torch.from_numpy(level)
            assert token == (places - residual).square().sum(1).argmin()
            residual, total = residual - places[token], total + places[token]
        with torch.no_grad():
            decoded = fitted.decoder(total).numpy() * fitted.scale + fitted.mean
        np.testing.assert_allclose(fitted.decode(code[None])[0], decoded, rtol=1e-4, atol=1e-4)


def test_distances_choose_the_token_that_follows_a_prefix(fitted: RqVae) -> None:
    vectors = curved()[:40]
    prefix = np.random.default_rng(1).integers(0, 16, (40, 1)).astype(np.int32)
    codes = fitted.encode(vectors, prefix)
    assert (codes[:, :1] == prefix).all()
    for level in (1, 2):
        assert (fitted.distances(vectors, codes[:, :level]).argmin(1) == codes[:, level]).all()


@pytest.mark.parametrize("codebooks", ["ema", "gradient"])
def test_a_step_has_the_gradient_of_the_loss_in_the_papers(codebooks: str) -> None:
    config = RqVaeConfig(codebooks=codebooks, commitment=0.3, revival=0)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder, decoder = Coder(torch.randn(4, 8), 16), Coder(torch.randn(8, 4), 16)
    for network in (encoder, decoder):
        torch.nn.init.normal_(network.mlp[2].weight)
    levels = [rng.standard_normal((5, 4)).astype(np.float32) for _ in range(2)]
    batch = torch.from_numpy(rng.standard_normal((32, 8)).astype(np.float32))
    twins, places = copy.deepcopy((encoder, decoder)), [torch.from_numpy(level).requires_grad_() for level in levels]
    training = Training(encoder, decoder, levels, config, 0)
    training.step(batch, 0, None)

    latent = twins[0](batch)
    residual, quantised, loss = latent, torch.zeros(32, 4), torch.zeros(())
    for place in places:
        chosen = place[torch.cdist(residual, place).argmin(1)]
        loss = loss + 0.3 * (residual - chosen.detach()).square().mean()
        if codebooks == "gradient":
            loss = loss + (residual.detach() - chosen).square().mean()
        residual, quantised = residual - chosen.detach(), quantised + chosen.detach()
    (loss + F.mse_loss(twins[1](latent + (quantised - latent).detach()), batch)).backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip((encoder, decoder), twins, strict=True):
        for parameter, twin in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-4, atol=1e-6)
    if codebooks == "gradient":
        for ours, place in zip(training.codebooks, places, strict=True):
            torch.testing.assert_close(ours.grad, place.grad, rtol=1e-4, atol=1e-6)


def test_running_means_are_the_recurrence_of_counts_and_sums() -> None:
    config = RqVaeConfig(decay=0.9, revival=0)
    levels = [np.array([[0.0, 0.0], [10.0, 0.0]], np.float32)]
    training = Training(Coder(torch.eye(2), 4), Coder(torch.eye(2), 4), levels, config, 0)
    training.step(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0], [12.0, 0.0]]), 0, None)
    # loads: 3 and 1 of 4 where 2 would be even, so 1.5 and 0.5
    first = (0.9 * 1 * 0 + 0.1 * 1.5 * 2) / (0.9 + 0.15), (0.1 * 1.5 * 1) / (0.9 + 0.15)
    second = (0.9 * 10 + 0.1 * 0.5 * 12) / (0.9 + 0.05), 0.0
    torch.testing.assert_close(training.codebooks[0], torch.tensor([first, second]))


@pytest.mark.parametrize(("codebooks", "size"), [("ema", 256), ("gradient", 64)])
def test_a_collapsed_start_comes_back_to_life(codebooks: str, size: int) -> None:
    vectors = curved(2000)
    standard = torch.from_numpy((vectors - vectors.mean(0)) / vectors.std())
    shares = {}
    for revival in (0.0, 0.1):
        config = RqVaeConfig(codebooks=codebooks, revival=revival, steps=300, batch_size=512)  # type: ignore[arg-type]
        torch.manual_seed(0)
        encoder, decoder = Coder(torch.eye(8), 16), Coder(torch.eye(8), 16)
        everything_far = [np.full((size, 8), 30.0, np.float32) for _ in range(2)]  # one place for all tokens
        levels = Training(encoder, decoder, everything_far, config, 0).run(standard, None, lambda: None)
        model = RqVae(encoder, decoder, levels, np.zeros(8, np.float32), 1.0)
        shares[revival] = used(model, standard.numpy())
    assert max(shares[0.0]) < 0.1
    assert min(shares[0.1]) >= 0.95


def test_training_lowers_the_error_of_residual_kmeans_and_uses_all_tokens() -> None:
    vectors = curved()
    model = fit_rqvae(vectors, 2, 8, 0, RqVaeConfig(steps=300, batch_size=256))
    codebooks, codes = fit_residual_kmeans(vectors, 2, 8, 0)
    assert error(vectors, model.decode(model.encode(vectors))) < 0.9 * error(vectors, codebooks.decode(codes))
    assert min(used(model, vectors)) == 1


def test_the_seed_decides_and_the_callers_generator_is_left_alone(fitted: RqVae) -> None:
    state = torch.get_rng_state()
    calls: list[None] = []
    again = fit_rqvae(curved(), 3, 16, 0, SMALL, lambda: calls.append(None))
    assert len(calls) == SMALL.steps and torch.equal(state, torch.get_rng_state())
    for ours, theirs in zip(fitted.codebooks.levels, again.codebooks.levels, strict=True):
        assert np.array_equal(ours, theirs)
    other = fit_rqvae(curved(), 3, 16, 1, SMALL)
    assert not np.array_equal(other.codebooks.levels[0], fitted.codebooks.levels[0])


def test_what_is_saved_encodes_and_decodes_the_same(fitted: RqVae, tmp_path: Path) -> None:
    fitted.save(tmp_path / "codebooks.npz")
    opened = RqVae.load(tmp_path / "codebooks.npz")
    codes = fitted.encode(curved())
    assert opened.sizes == (16, 16, 16) and np.array_equal(opened.encode(curved()), codes)
    assert np.array_equal(opened.decode(codes), fitted.decode(codes))


def test_trained_on_it_takes_turned_vectors_to_the_codes_they_had(fitted: RqVae) -> None:
    vectors = curved()
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))[0].astype(np.float32)
    moved, old = vectors @ turn + 1, fitted.encode(vectors)
    before = [weight.clone() for weight in fitted.encoder.parameters()]
    given = old.copy()
    given[:100] = -1  # new users
    config = RqVaeConfig(steps=600, batch_size=256)
    continued = continue_rqvae(fitted, moved, given, 0, config)
    assert all(map(torch.equal, before, fitted.encoder.parameters()))
    assert (fitted.encode(moved)[:, 0] == old[:, 0]).mean() < 0.3
    assert (continued.encode(moved)[:, 0] == old[:, 0]).mean() > 0.8
    assert error(moved, continued.decode(continued.encode(moved))) < 0.02


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"decay": 1.0}, {"revival": -0.1}, {"commitment": -1.0}])
def test_a_config_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FriendrecError, match=next(iter(wrong))):
        RqVaeConfig(**wrong)  # type: ignore[arg-type]

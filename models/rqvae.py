"""RQ-VAE: residual quantization between an encoder and a decoder that are trained with it.

    z = encode(x),   r_0 = z,   t_l = argmin_k |r_l − C_l[k]|²,   r_{l+1} = r_l − C_l[t_l],   ẑ = Σ_l C_l[t_l]
    loss = |decode(z + sg(ẑ − z)) − x|² + Σ_l β |r_l − sg(C_l[t_l])|²  (+ |sg(r_l) − C_l[t_l]|² with gradient codebooks)

(Zeghidour et al. 2021; Lee et al. 2022; sg stops the gradient, which passes straight through the quantization.) Encoder
and decoder begin as the projection on principal components and back, the codebooks as residual k-means of all encoded
vectors, so training starts where residual k-means ends.

B vectors in the batch, N vectors, K tokens of a level, Z latent dimensions, D dimensions of a vector.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from friendrec.models.rqvae_config import RqVaeConfig
from friendrec.models.tokenizer import Codebooks, Tokens, Vectors, fit_residual_kmeans, standard_units

BLOCK = 1 << 16
"""Vectors that pass a network at a time."""


class Coder(nn.Module):
    """x ↦ A x + MLP(x), with an MLP that is 0 at first."""

    def __init__(self, projection: Tensor, hidden: int) -> None:
        super().__init__()
        out, into = projection.shape
        self.skip = nn.Linear(into, out)
        self.mlp = nn.Sequential(nn.Linear(into, hidden), nn.GELU(), nn.Linear(hidden, out))
        with torch.no_grad():
            self.skip.weight.copy_(projection)
        for parameter in (self.skip.bias, *self.mlp[2].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, vectors: Tensor) -> Tensor:
        coded: Tensor = self.skip(vectors) + self.mlp(vectors)
        return coded


@dataclass(frozen=True)
class RqVae:
    """A `Tokenizer`: codebooks in the latent space of an encoder; vectors are in units of `scale` around `mean`."""

    encoder: Coder
    decoder: Coder
    codebooks: Codebooks
    mean: Vectors  # [D]
    scale: float

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.codebooks.sizes

    def latent(self, vectors: Vectors) -> Vectors:
        """Encoded vectors `[N, Z]`."""
        return _through(self.encoder, (vectors - self.mean) / np.float32(self.scale))

    def encode(self, vectors: Vectors, prefix: Tokens | None = None) -> Tokens:
        """See `Tokenizer`."""
        return self.codebooks.encode(self.latent(vectors), prefix)

    def distances(self, vectors: Vectors, prefix: Tokens) -> Vectors:
        """See `Tokenizer`; squared distances in the latent space."""
        return self.codebooks.distances(self.latent(vectors), prefix)

    def decode(self, tokens: Tokens) -> Vectors:
        """See `Tokenizer`."""
        return self.mean + np.float32(self.scale) * _through(self.decoder, self.codebooks.decode(tokens))

    def save(self, path: Path) -> None:
        """See `Tokenizer`."""
        networks = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder}).state_dict()
        levels = {f"level_{level}": codebook for level, codebook in enumerate(self.codebooks.levels)}
        weights = {name: weight.numpy() for name, weight in networks.items()}
        arrays: dict[str, Any] = {"mean": self.mean, "scale": np.float64(self.scale), **levels, **weights}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Tokenizer`."""
        with np.load(path) as arrays:
            levels = tuple(arrays[f"level_{i}"] for i in range(sum(name.startswith("level_") for name in arrays.files)))
            weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files if "." in name}
            mean, scale = arrays["mean"], float(arrays["scale"])
        hidden = len(weights["encoder.mlp.0.bias"])
        encoder, decoder = (Coder(weights[f"{name}.skip.weight"], hidden) for name in ("encoder", "decoder"))
        nn.ModuleDict({"encoder": encoder, "decoder": decoder}).load_state_dict(weights)
        return cls(encoder, decoder, Codebooks(levels, np.zeros(levels[0].shape[1], np.float32), 1.0), mean, scale)


def fit_rqvae(
    vectors: Vectors,
    num_codebooks: int,
    codebook_size: int,
    seed: int,
    config: RqVaeConfig,
    after_step: Callable[[], object] = lambda: None,
) -> RqVae:
    """Train on `vectors` `[N, D]`, N ≥ codebook_size. `after_step` is called `config.steps` times."""
    mean, scale, standard_ND = _standardised(vectors)
    encoder, decoder = _first_coders(standard_ND, seed, config)
    codebooks = fit_residual_kmeans(_through(encoder, standard_ND.numpy()), num_codebooks, codebook_size, seed)[0]
    levels = [level * np.float32(codebooks.scale) for level in codebooks.levels]
    levels[0] += codebooks.mean
    training = Training(encoder, decoder, levels, config, seed)
    return RqVae(encoder, decoder, training.run(standard_ND, None, after_step), mean, scale)


def continue_rqvae(
    start: RqVae,
    vectors: Vectors,
    given: Tokens,
    seed: int,
    config: RqVaeConfig,
    after_step: Callable[[], object] = lambda: None,
) -> RqVae:
    """Train an earlier one on with new `vectors` `[N, D]`; its shape stays, whatever `config` says.

    A vector whose code is `given` `[N, ≥ L]`, and not -1, counts as having it wherever it lies: so the encoder learns
    to take it there, and the codebooks to lie where it is.
    """
    mean, scale, standard_ND = _standardised(vectors)
    encoder, decoder = copy.deepcopy(start.encoder), copy.deepcopy(start.decoder)
    training = Training(encoder, decoder, start.codebooks.levels, config, seed)
    given_NL = torch.from_numpy(given.astype(np.int64))
    return RqVae(encoder, decoder, training.run(standard_ND, given_NL, after_step), mean, scale)


class Training:
    """Encoder, decoder and codebooks with what their training keeps: optimizer, running counts and sums of tokens."""

    def __init__(
        self, encoder: Coder, decoder: Coder, levels: Sequence[Vectors], config: RqVaeConfig, seed: int
    ) -> None:
        self.encoder, self.decoder, self.config = encoder, decoder, config
        self.generator = torch.Generator().manual_seed(seed)
        self.codebooks = [torch.from_numpy(level.copy()) for level in levels]  # of each level: [K, Z]
        self.counts = [torch.ones(len(level)) for level in levels]  # 1 is an even load
        self.sums = [level.clone() for level in self.codebooks]
        weights: list[Tensor] = [*encoder.parameters(), *decoder.parameters()]
        if config.codebooks == "gradient":
            weights += [level.requires_grad_() for level in self.codebooks]
        self.optimizer = torch.optim.Adam(weights, config.learning_rate)

    def run(self, standard_ND: Tensor, given_NL: Tensor | None, after_step: Callable[[], object]) -> Codebooks:
        """All steps; the codebooks that come out."""
        for step in range(self.config.steps):
            rows = torch.randperm(len(standard_ND), generator=self.generator)[: self.config.batch_size]
            self.step(standard_ND[rows], step, None if given_NL is None else given_NL[rows])
            after_step()
        levels = tuple(level.detach().numpy() for level in self.codebooks)
        return Codebooks(levels, np.zeros(levels[0].shape[1], np.float32), 1.0)

    def step(self, batch_BD: Tensor, step: int, given_BL: Tensor | None) -> None:
        """One batch: loss, gradients, running means, revival."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 - step / self.config.steps)
        latent_BZ = self.encoder(batch_BD)
        residual_BZ, loss = latent_BZ, torch.zeros(())
        for level, codebook_KZ in enumerate(self.codebooks):
            tokens_B = _nearest(residual_BZ.detach(), codebook_KZ.detach())
            if given_BL is not None:
                tokens_B = torch.where(given_BL[:, level] >= 0, given_BL[:, level], tokens_B)
            chosen_BZ = F.embedding(tokens_B, codebook_KZ)
            loss = loss + self.config.commitment * F.mse_loss(residual_BZ, chosen_BZ.detach())
            if self.config.codebooks == "gradient":
                loss = loss + F.mse_loss(chosen_BZ, residual_BZ.detach())
            self._count(level, tokens_B, residual_BZ.detach())
            residual_BZ = residual_BZ - chosen_BZ.detach()
        decoded_BD = self.decoder(latent_BZ - residual_BZ.detach())  # ẑ = z − residual, with the gradient of z
        loss = loss + F.mse_loss(decoded_BD, batch_BD)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def _count(self, level: int, tokens_B: Tensor, residual_BZ: Tensor) -> None:
        """Advance the running counts and sums, move the means, put dead tokens where vectors of the batch are."""
        counts_K, sums_KZ, size = self.counts[level], self.sums[level], len(self.counts[level])
        fresh = (1 - self.config.decay) * size / len(tokens_B)
        counts_K.mul_(self.config.decay).index_add_(0, tokens_B, torch.full(tokens_B.shape, fresh))
        sums_KZ.mul_(self.config.decay).index_add_(0, tokens_B, residual_BZ, alpha=fresh)
        dead = torch.nonzero(counts_K < self.config.revival).squeeze(1)
        lively = residual_BZ[torch.randint(len(residual_BZ), (len(dead),), generator=self.generator)]
        counts_K[dead], sums_KZ[dead] = 1.0, lively
        if self.config.codebooks == "ema":
            self.codebooks[level] = sums_KZ / counts_K[:, None].clamp(min=1e-9)
        else:
            self.codebooks[level][dead] = lively


def _standardised(vectors: Vectors) -> tuple[Vectors, float, Tensor]:
    """Mean, scale and the vectors in these units, in which a component has a variance of 1 on average."""
    mean, spread = standard_units(vectors)
    scale = spread / vectors.shape[1] ** 0.5
    return mean, scale, torch.from_numpy((vectors - mean) / np.float32(scale))


def _first_coders(standard_ND: Tensor, seed: int, config: RqVaeConfig) -> tuple[Coder, Coder]:
    """Projection on the principal components, and back."""
    values, vectors = np.linalg.eigh(standard_ND.numpy().T @ standard_ND.numpy())
    components = torch.from_numpy(np.ascontiguousarray(vectors[:, np.argsort(-values)[: config.latent_dim]].T))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Coder(components, config.hidden), Coder(components.T, config.hidden)


def _nearest(vectors_BZ: Tensor, codebook_KZ: Tensor) -> Tensor:
    return (codebook_KZ.square().sum(1) - 2 * vectors_BZ @ codebook_KZ.T).argmin(1)


@torch.no_grad()
def _through(network: Coder, vectors: Vectors) -> Vectors:
    """A network's output for all vectors, `[N, ·]`."""
    blocks = torch.from_numpy(np.ascontiguousarray(vectors)).split(BLOCK)
    coded: Vectors = torch.cat([network(block) for block in blocks]).numpy()
    return coded

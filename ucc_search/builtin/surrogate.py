"""A Gaussian process small enough to read, for a few hundred points. NumPy only.

Suffixes: N points, M queries, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Surrogate:
    """y = linear + smooth (Matern 5/2) + noise, with one length scale per group of features.

    Hyperparameters live on grids of factors of two; `fit` climbs the marginal likelihood from where it
    stood, one step per hyperparameter and call. The overall scale is integrated out.

    Args:
        groups: for every feature the number of its group, from 0 on.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        self._groups = np.array(groups, dtype=np.int64)
        count = max(groups, default=-1) + 1  # none where nothing is searched
        # Base-2 logarithms: length scales, then the variances of the linear part and of the noise.
        self._setting = [1.0] * count + [-2.0, -6.0]
        self._fits = 0
        self._bounds = [(-3.0, 5.0)] * count + [(-10.0, 4.0), (-12.0, 0.0)]

    def fit(self, x_ND: Floats, y_N: Floats) -> None:
        """Learn from all points; at least two."""
        self._x_ND, self._center_D = x_ND, x_ND.mean(axis=0)
        self._mean, self._spread = float(y_N.mean()), float(y_N.std()) or 1.0
        self._y_N = (y_N - self._mean) / self._spread
        best = self._evidence(self._setting)
        every = range(len(self._bounds))
        self._fits += 1
        # Beyond a hundred points a fit takes long, and hyperparameters hardly move: one at a time.
        for place in every if len(y_N) <= 128 else (self._fits % len(every),):
            low, high = self._bounds[place]
            for step in (1.0, -1.0):
                other = list(self._setting)
                other[place] = min(max(other[place] + step, low), high)
                value = self._evidence(other)
                if value > best:
                    best, self._setting = value, other
                    break
        self._condition(self._y_N)

    def extend(self, x_MD: Floats) -> None:
        """Pretend that these points were measured and gave what is expected of them."""
        y_M = (self.predict(x_MD)[0] - self._mean) / self._spread
        self._x_ND = np.concatenate([self._x_ND, x_MD])
        self._condition(np.concatenate([self._y_N, y_M]))

    def predict(self, x_MD: Floats) -> tuple[Floats, Floats]:
        """(mean, standard deviation) of the value without its noise."""
        cross_MN = self._kernel(x_MD, self._x_ND, self._setting)
        mean_M = cross_MN @ self._weights_N
        solved_NM = np.linalg.solve(self._factor_NN, cross_MN.T)
        linear = 2.0 ** self._setting[-2]
        prior_M = 1.0 + linear * ((x_MD - self._center_D) ** 2).sum(axis=1)
        variance_M = np.maximum(prior_M - (solved_NM**2).sum(axis=0), 1e-12) * self._scale
        return self._mean + self._spread * mean_M, self._spread * np.sqrt(variance_M)

    def _kernel(self, a_MD: Floats, b_ND: Floats, setting: Sequence[float]) -> Floats:
        lengths_D = 2.0 ** np.array(setting)[self._groups]
        a, b = a_MD / lengths_D, b_ND / lengths_D
        squared_MN = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
        r_MN = np.sqrt(5 * np.maximum(squared_MN, 0.0))
        smooth_MN = (1 + r_MN + r_MN**2 / 3) * np.exp(-r_MN)
        linear_MN = (a_MD - self._center_D) @ (b_ND - self._center_D).T
        return np.asarray(smooth_MN + 2.0 ** setting[-2] * linear_MN)

    def _covariance(self, setting: Sequence[float]) -> Floats:
        kernel_NN = self._kernel(self._x_ND, self._x_ND, setting)
        kernel_NN[np.diag_indices_from(kernel_NN)] += 2.0 ** setting[-1]
        return kernel_NN

    def _evidence(self, setting: Sequence[float]) -> float:
        """Log marginal likelihood, up to a constant, at the best scale; with a mild pull to smoothness."""
        try:
            factor_NN = np.linalg.cholesky(self._covariance(setting))
        except np.linalg.LinAlgError:
            return -math.inf
        half_N = np.linalg.solve(factor_NN, self._y_N)
        count = len(self._y_N)
        log_det = 2 * float(np.log(np.diag(factor_NN)).sum())
        pull = sum((s - 1.5) ** 2 for s in setting[:-2]) / 16
        return -0.5 * (count * math.log(float(half_N @ half_N) / count + 1e-12) + log_det) - pull

    def _condition(self, y_N: Floats) -> None:
        self._factor_NN = np.linalg.cholesky(self._covariance(self._setting))
        half_N = np.linalg.solve(self._factor_NN, y_N)
        self._weights_N: Any = np.linalg.solve(self._factor_NN.T, half_N)
        self._scale = float(half_N @ half_N) / len(y_N) + 1e-12


def expected_improvement(mean_M: Floats, deviation_M: Floats, best: float) -> Floats:
    """How far below `best` a value is expected to fall (Jones et al. 1998)."""
    z_M = (best - mean_M) / deviation_M
    below_M = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in z_M])
    density_M = np.exp(-0.5 * z_M**2) / math.sqrt(2 * math.pi)
    return np.asarray(deviation_M * (z_M * below_M + density_M))

"""The interaction sums `envsum`, `sensesum`, `featsum` on CSR pairs, closed under autograd.

    envsum(sense (n_pair, n_nu), features (n_send, n_feat), pairs)      -> (n_recv, n_nu, n_feat)
    sensesum(env (n_recv, n_nu, n_feat), features (n_send, n_feat), pairs) -> (n_pair, n_nu)
    featsum(env (n_recv, n_nu, n_feat), sense (n_pair, n_nu), pairs)    -> (n_send, n_feat)

Equations: `reference`. Derivatives: `closure`. Who computes them: `registry`.
"""

from torch import Tensor

from md_plugin.kernels.registry import (
    Backend,
    BackendError,
    backend_choice,
    get_backend,
    list_backends,
    resolve,
    use_backend,
)
from md_plugin.pairs import Pairs

__all__ = [
    "Backend",
    "BackendError",
    "backend_choice",
    "envsum",
    "featsum",
    "get_backend",
    "list_backends",
    "resolve",
    "sensesum",
    "use_backend",
]


def envsum(sense: Tensor, features: Tensor, pairs: Pairs, backend: str | None = None) -> Tensor:
    """env[i, nu, a] = sum over row i of sense[p, nu] features[sender(p), a]."""
    return resolve(backend, None, pairs.device).envsum(sense, features, pairs)


def sensesum(env: Tensor, features: Tensor, pairs: Pairs, backend: str | None = None) -> Tensor:
    """sense[p, nu] = sum_a env[receiver(p), nu, a] features[sender(p), a]."""
    return resolve(backend, None, pairs.device).sensesum(env, features, pairs)


def featsum(env: Tensor, sense: Tensor, pairs: Pairs, backend: str | None = None) -> Tensor:
    """features[j, a] = sum over pairs sent by j, and over nu, of env[receiver(p), nu, a] sense."""
    return resolve(backend, None, pairs.device).featsum(env, sense, pairs)

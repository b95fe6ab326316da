"""The three sums in plain torch: the reference by which every backend is judged.

    envsum    env[i, nu, a]   = sum_{p in row i} sense[p, nu] features[sender(p), a]
    sensesum  sense[p, nu]    = sum_a env[receiver(p), nu, a] features[sender(p), a]
    featsum   features[j, a]  = sum_{p: sender(p) = j} sum_nu env[receiver(p), nu, a] sense[p, nu]

and the product that makes tensor sensitivities (HIP-NN-TS), its contractions, and its derivative:

    stack       stacked[p, (c, nu)] = components[p, c] sense[p, nu]
    fold        components[p, c]    = sum_nu stacked[p, (c, nu)] sense[p, nu]
                sense[p, nu]        = sum_c  stacked[p, (c, nu)] components[p, c]
    stack_along stacked[p, (c, nu)] = components[p, c] d_sense[p, nu]
                                    + d_components[p, c] sense[p, nu]

Reads like the equations and is never optimised: it stores an (n_pair, n_nu, n_feat) array.
"""

from torch import Tensor

from md_plugin.pairs import Pairs


def envsum(sense: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_pair, n_nu), (n_send, n_feat) -> env (n_recv, n_nu, n_feat)."""
    terms = sense[:, :, None] * features[pairs.sender_long][:, None, :]
    env = terms.new_zeros(pairs.n_recv, sense.shape[1], features.shape[1])
    return env.index_add_(0, pairs.receiver, terms)


def sensesum(env: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_send, n_feat) -> sense (n_pair, n_nu)."""
    return (env[pairs.receiver] * features[pairs.sender_long][:, None, :]).sum(dim=2)


def featsum(env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_pair, n_nu) -> features (n_send, n_feat)."""
    terms = (env[pairs.receiver] * sense[:, :, None]).sum(dim=1)
    features = terms.new_zeros(pairs.n_send, env.shape[2])
    return features.index_add_(0, pairs.sender_long, terms)


def stack(components: Tensor, sense: Tensor) -> Tensor:
    """(n_pair, n_comp), (n_pair, n_nu) -> (n_pair, n_comp n_nu), components outermost."""
    return (components[:, :, None] * sense[:, None, :]).flatten(1)


def fold(stacked: Tensor, components: Tensor, sense: Tensor) -> tuple[Tensor, Tensor]:
    """(n_pair, n_comp n_nu), (n_pair, n_comp), (n_pair, n_nu) -> the shapes of the last two."""
    g = stacked.view(*components.shape, sense.shape[1])
    return (g * sense[:, None, :]).sum(dim=2), (g * components[:, :, None]).sum(dim=1)


def stack_along(components: Tensor, sense: Tensor, d_components: Tensor, d_sense: Tensor) -> Tensor:
    """Derivative of `stack` along (d_components, d_sense) -> (n_pair, n_comp n_nu)."""
    return stack(components, d_sense) + stack(d_components, sense)

"""Several terms from one read: every backend, held to the reference by budget.py.

The natural scale of a sum is the sum of all.
"""

import itertools
from typing import NamedTuple

import budget
import cases
import pytest
import torch
from parametrize import first, first_dtypes

import r2kernels as r2
from r2kernels import ops

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")


class Terms(NamedTuple):
    draws: list

    @property
    def weights(self):
        return self.draws[0].weights

    @property
    def dtype(self):
        return self.draws[0].dtype

    def to(self, dtype):
        return Terms([one.to(dtype) for one in self.draws])


def drawn(names, inputs, seed, bits, dtype, device):
    """The terms of these names, with these bits where they have any, over the same weights."""
    return Terms(
        [
            budget.draw(cases.BY_LABEL[name], inputs, dtype, device, seed, bits=b)
            for name, b in zip(names, bits, strict=True)
        ]
    )


def evaluate(terms):
    """One result: the losses and parameters of all, one after the other."""
    names = [one.op.function for one in terms.draws]
    grads, tensors = zip(*[budget.contract(one) for one in terms.draws], strict=True)
    arguments = (
        terms.weights,
        names,
        [t for given in tensors for t in given],
        [one.bits for one in terms.draws],
        [n == "soft_min_max" for n in names],
    )
    losses, saved = ops.call["terms_fwd"](*arguments)
    gradients, learned = ops.call["terms_bwd"](list(grads), *arguments, saved)
    return budget.Result(
        torch.cat(losses), list(gradients), torch.cat([g.reshape(-1) for g in learned]) if learned else None
    )


def truth(terms):
    exact, scale = zip(*[budget.truth(one) for one in terms.draws], strict=True)

    def joined(results):
        learned = [r.parameter for r in results if r.parameter is not None]
        return budget.Result(
            torch.cat([r.loss for r in results]),
            [sum(parts) for parts in zip(*[r.weights for r in results], strict=True)],
            torch.cat(learned) if learned else None,
        )

    return joined(exact), joined(scale)


ALL = ("l_inf", "margin", "soft_min_max", "kure", "bin_reg", "msqe", "partial_l2")
SUBSETS = [
    *itertools.combinations(ALL, 1),
    *itertools.combinations(ALL, 2),
    ("soft_min_max", "kure", "msqe", "bin_reg", "margin"),
    ALL,
    ALL[::-1],
]


@first("names", SUBSETS[-2:], SUBSETS, "+".join)
def test_terms(names, device, variants):
    inputs = ["below a vector", "unaligned", "transposed", "two elements"]
    bits = [2 + i % 3 for i in range(len(names))]
    sets = [drawn(names, of, seed, bits, torch.float32, device) for of in inputs for seed in range(13)]
    budget.hold(sets[::3] if len(names) < 3 else sets, variants, evaluate, truth)


@first_dtypes(torch.bfloat16)
def test_terms_of_lists(dtype, device, variants):
    sets = [drawn(ALL, "mixed list", seed, range(1, len(ALL) + 1), dtype, device) for seed in range(8)]
    budget.hold(sets, variants, evaluate, truth)


def test_terms_have_the_same_bits(device, variant):
    terms = drawn(ALL, "mixed list", 5, [3] * len(ALL), torch.float32, device)
    expected = evaluate(terms)
    for threads in (1, 2, 3) if variant.backend == "cpu" else (1,):
        torch.set_num_threads(threads)
        assert expected.equals(evaluate(terms))


def test_weight_terms_and_their_functions(device, variant):
    """Also through autograd: a learned alpha, M and step, a term that is not used, one that is used twice."""
    w = [x.detach().requires_grad_() for x in cases.make("mixed list", torch.float32, device)]
    alpha, M, step = (torch.tensor(v, device=device, requires_grad=True) for v in (10.0, 0.05, 0.02))
    terms = {
        "soft_min_max": {"alpha": alpha},
        "margin": {"M": M, "k": 0.1},
        "msqe": {"step": step, "bits": 3},
        "bin_reg": {"step": 0.03, "bits": 2},
        "partial_l2": {"fraction": 0.3},
        "kure": {},
    }
    results = []
    for losses in (
        r2.weight_terms(w, terms),
        {name: getattr(r2, name)(w, **options) for name, options in terms.items()},
    ):
        total = (
            sum((i + 1) * losses[name].sum() for i, name in enumerate(terms) if name != "kure")
            + losses["msqe"].square().sum()
        )
        results.append([*losses.values(), *torch.autograd.grad(total, [*w, alpha, M, step])])
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)

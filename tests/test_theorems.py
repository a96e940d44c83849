"""What the KTO paper proves (Ethayarajh et al. 2024, section 4) in small discrete worlds, in float64, by our losses."""

from __future__ import annotations

import math

import pytest
import torch

from halos_pl.losses import dpo_loss, kto_loss
from halos_pl.value import implied_value

BETAS = [0.1, 0.5, 2.0]


def f64(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# Proposition 4.1: KTO learns nothing from a completion whose implied reward is far from the reference point.


def kto_slope(logratio: torch.Tensor, desirable: bool, *, beta: float, weight: float, z0: float) -> torch.Tensor:
    r = logratio.clone().requires_grad_()
    labels = torch.full(r.shape, desirable)
    kto_loss(r, labels, z0, beta=beta, desirable_weight=weight, undesirable_weight=weight).sum().backward()
    return r.grad


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("weight", "z0"), [(1.0, 0.0), (1.5, 3.0)])
def test_proposition_4_1_kto_passes_over_what_is_too_easy_or_too_hard(desirable, beta, weight, z0):
    away = torch.linspace(0, 30, 301, dtype=torch.float64) / beta
    for side in (-1, 1):
        slope = kto_slope(z0 + side * away, desirable, beta=beta, weight=weight, z0=z0)
        assert (slope < 0).all() if desirable else (slope > 0).all()
        size = slope.abs()
        assert (size.diff() < 0).all()
        assert size[0].item() == pytest.approx(weight * beta / 4, rel=1e-12)
        assert size[-1] < 1e-12 * size[0]
        assert kto_slope(f64([side * 1e5]), desirable, beta=beta, weight=weight, z0=z0).abs() < 1e-300


@pytest.mark.parametrize("beta", BETAS)
def test_proposition_4_1_dpo_pulls_hardest_where_the_pair_is_most_wrong(beta):
    chosen = (torch.linspace(-30, 30, 301, dtype=torch.float64) / beta).requires_grad_()
    dpo_loss(chosen, torch.zeros_like(chosen), beta=beta).sum().backward()
    size = -chosen.grad
    assert (size.diff() < 0).all()
    assert size[0].item() == pytest.approx(beta, rel=1e-12)
    assert size[-1] < 1e-12 * beta


# Theorem 4.2: rewards that differ by h(x) share optimal policy and preferences, and not the distribution of values.


class World:
    """Three prompts, four answers each."""

    beta = 0.4
    prompts = f64([0.2, 0.5, 0.3])  # D
    reward = f64([[1.0, -0.5, 2.0, 0.0], [0.3, 0.7, -1.0, 1.5], [-2.0, 0.1, 0.4, 3.0]])
    reference = f64([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.4, 0.1]])
    h = f64([[1.5], [-2.0], [0.25]])

    def policy(self, reward: torch.Tensor) -> torch.Tensor:
        """π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β)."""
        return (self.reference.log() + reward / self.beta).softmax(-1)

    def per_prompt(self, reward: torch.Tensor) -> torch.Tensor:
        """E_y′[r(x, y′)] of each x, under π*."""
        return (self.policy(reward) * reward).sum(-1, keepdim=True)

    def averaged(self, reward: torch.Tensor) -> torch.Tensor:
        """The same averaged over x′ ∼ D."""
        return self.prompts @ self.per_prompt(reward)

    def values(self, reward: torch.Tensor, reference_point: torch.Tensor | float) -> torch.Tensor:
        return implied_value("kto", reward - reference_point, beta=1.0)

    def share_below(self, values: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
        """The distribution function of human values, for x ∼ D and y ∼ π*."""
        weight = self.prompts[:, None] * self.policy(reward)
        grid = torch.linspace(0, 1, 401, dtype=torch.float64)
        return (weight.flatten() * (values.flatten() <= grid[:, None])).sum(-1)


def test_theorem_4_2_equivalent_rewards_have_one_optimal_policy_and_the_same_preferences():
    world = World()
    other = world.reward + world.h
    policy = world.policy(world.reward)
    torch.testing.assert_close(world.policy(other), policy, rtol=1e-13, atol=0)
    logratio = (policy / world.reference).log()
    for a in range(4):
        for b in range(4):
            preferred = (-dpo_loss(logratio[:, a], logratio[:, b], beta=world.beta)).exp()
            for reward in (world.reward, other):
                expected = torch.sigmoid(reward[:, a] - reward[:, b])
                torch.testing.assert_close(preferred, expected, rtol=1e-12, atol=0)
    changed = world.reward + world.h * f64([1.0, 0.0, 0.0, 0.0])
    assert (world.policy(changed) - policy).abs().max() > 0.01


@pytest.mark.parametrize("reference_point", ["held fixed", "averaged"])
def test_theorem_4_2_human_values_are_distributed_otherwise(reference_point):
    world = World()

    def distribution(reward):
        point = 0.5 if reference_point == "held fixed" else world.averaged(reward)
        return world.share_below(world.values(reward, point), reward)

    distance = (distribution(world.reward) - distribution(world.reward + world.h)).abs()
    assert distance.mean() > 0.05
    by_a_constant = (distribution(world.reward) - distribution(world.reward + 1.5)).abs()
    assert (by_a_constant.max() < 1e-9) == (reference_point == "averaged")


def test_theorem_4_2_a_reference_point_for_each_prompt_cancels_h():
    world = World()
    one, other = (world.values(r, world.per_prompt(r)) for r in (world.reward, world.reward + world.h))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


# Theorem 4.3: of contradictory preferences DPO may choose the minority's answer, KTO chooses the majority's.

P_BETA_REF = [
    (0.6, 2.0, 0.1),
    (0.6, 1.0, 0.3),
    (0.51, 0.1, 0.3),
    (0.9, 4.0, 0.05),
    (0.6, 2.0, 0.5),
    (0.6, 2.0, 0.9),
    (0.6, 0.1, 0.1),
    (0.51, 0.1, 0.5),
    (0.9, 4.0, 0.6),
]
IN_REGION = [True, True, True, True, False, False, False, False, False]


def logratios(logit: torch.Tensor, reference: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of y_a and y_b, under the policy π(y_a) = σ(logit)."""
    logsigmoid = torch.nn.functional.logsigmoid
    return logsigmoid(logit) - math.log(reference), logsigmoid(-logit) - math.log1p(-reference)


def expected_dpo(logit: torch.Tensor, p: float, beta: float, reference: float) -> torch.Tensor:
    a, b = logratios(logit, reference)
    return p * dpo_loss(a, b, beta=beta) + (1 - p) * dpo_loss(b, a, beta=beta)


def expected_kto(logit: torch.Tensor, p: float, beta: float, reference: float, z0) -> torch.Tensor:
    """Every preference is two rows: the chosen answer desirable, the other one undesirable."""
    up = torch.ones(logit.shape, dtype=torch.bool)
    a, b = logratios(logit, reference)
    rows = [(p, a, up), (p, b, ~up), (1 - p, b, up), (1 - p, a, ~up)]
    return sum(share * kto_loss(r, label, z0, beta=beta) for share, r, label in rows)


def slope_of(loss, logit: torch.Tensor) -> torch.Tensor:
    logit = logit.clone().requires_grad_()
    return torch.autograd.grad(loss(logit).sum(), logit)[0]


def minimum(loss, low: float = -60.0, high: float = 60.0) -> float:
    """Where the slope changes sign; the loss must be quasi-convex."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if slope_of(loss, f64([middle])) > 0 else (middle, high)
    return (low + high) / 2


@pytest.mark.parametrize(("p", "beta", "reference"), P_BETA_REF)
def test_theorem_4_3_dpo(p, beta, reference):
    logit = minimum(lambda x: expected_dpo(x, p, beta, reference))
    weights = [reference * (p / (1 - p)) ** (1 / beta), 1 - reference]
    assert 1 / (1 + math.exp(-logit)) == pytest.approx(weights[0] / sum(weights), rel=1e-9)
    around = torch.linspace(-60, 60, 2401, dtype=torch.float64)
    assert expected_dpo(around, p, beta, reference).min() >= expected_dpo(f64(logit), p, beta, reference) - 1e-12
    minority = p ** (1 / beta) * reference < (1 - p) ** (1 / beta) * (1 - reference)
    assert minority == IN_REGION[P_BETA_REF.index((p, beta, reference))]
    assert (logit < 0) == minority


@pytest.mark.parametrize(("p", "beta", "reference"), P_BETA_REF)
@pytest.mark.parametrize("z0", [0.0, 0.5, 4.0])
def test_theorem_4_3_kto_takes_the_majority_all_the_way(p, beta, reference, z0):
    """loss = 1 − (2p − 1)·(σ(β(r_a − z0)) − σ(β(r_b − z0))): it falls as long as the policy moves towards y_a, so its
    infimum is at π(y_a) = 1, and no finite logit attains it."""
    logit = torch.linspace(-8, 8, 161, dtype=torch.float64)
    loss = expected_kto(logit, p, beta, reference, z0)
    assert (loss.diff() < 0).all()
    assert (slope_of(lambda x: expected_kto(x, p, beta, reference, z0), logit) < 0).all()
    certain = expected_kto(f64(700.0 / min(beta, 1)), p, beta, reference, z0)
    r_a = -math.log(reference)
    by_hand = 1 - (2 * p - 1) / (1 + math.exp(-beta * (r_a - z0)))
    assert certain.item() == pytest.approx(by_hand, rel=1e-12)
    assert (loss > certain).all()


@pytest.mark.parametrize(("p", "beta", "reference"), P_BETA_REF)
def test_theorem_4_3_kto_with_the_reference_point_at_the_policy_s_own_divergence(p, beta, reference):
    """z0 = KL(π‖π_ref) moves with the policy, detached as in training: every step still goes towards the majority."""
    logit = torch.linspace(-8, 8, 161, dtype=torch.float64)
    a, b = logratios(logit, reference)
    z0 = torch.sigmoid(logit) * a + torch.sigmoid(-logit) * b
    assert (z0 > -1e-12).all()
    assert (slope_of(lambda x: expected_kto(x, p, beta, reference, z0), logit) < 0).all()
    undecided = slope_of(lambda x: expected_kto(x, 0.5, beta, reference, z0), logit)
    assert (undecided.abs() < 1e-15).all()


def test_theorem_4_3_the_grid_has_both_kinds():
    assert {True, False} == set(IN_REGION)
    assert len(IN_REGION) == len(P_BETA_REF)

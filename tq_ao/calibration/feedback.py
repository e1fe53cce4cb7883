"""Maps for error feedback: pairs of directions of which the second makes up for the rounding of the first.

In coordinates that are white (covariance I) a reader hears direction i with strength mu_i, the eigenvalues of
stored @ reader.  Dims rounded one by one cost (sum sqrt(mu))**2 / D at best (see `transforms`).  With feedback they
are rounded in two halves, and an error e of the first is answered in the second by -e @ F.  Of a metric H of errors
that leaves e H' e^T with H' = H11 - H12 H22^-1 H21 at F = H12 H22^-1, as GPTQ (arXiv 2210.17323) and LDLQ (arXiv
2307.13304) do for weights.  A strong direction a and a weak one b, turned by an angle, have H' H22 = mu_a mu_b at
every angle; where both are equal the pair costs 2 sqrt(mu_a mu_b) instead of mu_a + mu_b.  If the products of all
pairs are alike, that is D (mu_1 ... mu_D)**(1 / D), the least that rounding in any basis can cost.

But the answer is noise to the half that gives it, so where rounding is coarse the angles stop short of that; and
coordinates are balanced part of the way before (with T = TEMPER they have variance mu**(T / 2), and are heard with
mu**(1 - T / 2)), which leaves less to be answered.
"""

import math

import torch

from tq_ao.calibration.symmetric import matrix_power, regularized
from tq_ao.rotation import rotations

# Chosen by Fisher KL on windows of SmolLM2 that the statistics did not see, 1 to 4 bits.
NOISE = 0.2  # error of rounding that angles are made for, of the variance; alone it is 0.12 at 2 bits and 0.035 at 3
TEMPER = 0.7  # of the way from white coordinates (0) to balanced ones (1), before pairs are turned
ANGLES = 181


def fed_back(stored: torch.Tensor, reader: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Map and feedback for vectors with second moment `stored`, read with second moment `reader`.

    Args:
        stored, reader: [H, D, D], D even.

    Returns:
        map float64 [H, D, D], whose even columns are quantised first, and feedback float32 [H, D / 2, D / 2] with
        entries that bfloat16 has, both on the CPU.
    """
    stored, reader = regularized(stored.double().cpu()), regularized(reader.double().cpu())
    half = matrix_power(stored, 0.5)
    strength, basis = torch.linalg.eigh(half @ reader @ half)
    strength = strength.clamp_min(strength.amax(-1, keepdim=True) * 1e-14)
    white = matrix_power(stored, -0.5) @ basis  # columns are directions, weakest first
    heads, dim = strength.shape
    weak, strong = strength[:, : dim // 2], strength[:, dim // 2 :].flip(-1)
    cosine, sine, answer, even_scale, odd_scale = _angles(strong, weak)
    first, second = white[..., dim // 2 :].flip(-1), white[..., : dim // 2]
    a, b = (columns * mu.pow(TEMPER / 4)[:, None] for columns, mu in ((first, strong), (second, weak)))
    mix = rotations("hadamard", heads, dim // 2, 0).double()
    map = torch.empty_like(stored)
    map[..., 0::2] = even_scale * (a * cosine[:, None] + b * sine[:, None]) @ mix
    map[..., 1::2] = odd_scale * (b * cosine[:, None] - a * sine[:, None]) @ mix
    feedback = mix.mT @ ((answer * (odd_scale / even_scale)[..., 0]).unsqueeze(-1) * mix)
    return map, feedback.to(torch.bfloat16).float()


def _angles(strong: torch.Tensor, weak: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Angles of all pairs [H, n] that together cost little, by alternating steps: each takes the means as they were.

    Returns:
        cosine, sine and answer f (the odd dim makes up for the even one's error e by -f e) [H, n], and factors
        [H, 1, 1] for both halves, 1 over their deviation, with the answers counted as independent noise.
    """
    a, b = strong.pow(1 - TEMPER / 2), weak.pow(1 - TEMPER / 2)  # how strongly scaled coordinates are heard,
    va, vb = strong.pow(TEMPER / 2), weak.pow(TEMPER / 2)  # and their variances
    t = torch.linspace(0, math.pi / 2, ANGLES, dtype=strong.dtype)[:, None, None]
    cosine, sine = t.cos(), t.sin()
    odd_heard = a * sine**2 + b * cosine**2
    even_heard = a * b / odd_heard
    answer = (b - a) * sine * cosine / odd_heard
    even_var, odd_var = va * cosine**2 + vb * sine**2, va * sine**2 + vb * cosine**2
    options = torch.broadcast_tensors(even_heard, odd_heard, even_var, odd_var, answer, cosine, sine)
    even_mean = odd_mean = heard = answered = torch.ones(strong.shape[0], 1, dtype=strong.dtype)
    for _ in range(20):  # cost = mean even_var * sum even_heard + mean odd (variance + noise) * sum odd_heard
        noisy = odd_var + NOISE * even_mean * answer**2
        cost = even_mean * even_heard + odd_mean * odd_heard + heard * even_var + answered * noisy
        best = cost.argmin(0, keepdim=True)
        even, odd, even_v, odd_v, f, c, s = (x.gather(0, best)[0] for x in options)
        even_mean = even_v.mean(-1, keepdim=True)
        odd_mean = odd_v.mean(-1, keepdim=True) + NOISE * even_mean * f.square().mean(-1, keepdim=True)
        heard, answered = even.mean(-1, keepdim=True), odd.mean(-1, keepdim=True)
    return c, s, f, even_mean.rsqrt()[..., None], odd_mean.rsqrt()[..., None]

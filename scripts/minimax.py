"""Derives the polynomial coefficients of csrc/math/elementary.h: Remez exchange for the relative error, in mpmath.

python scripts/minimax.py          prints every polynomial with the relative error of the exact polynomial
"""

from collections.abc import Callable

import mpmath as mp

mp.mp.dps = 60


def remez(f: Callable, lo: float, hi: float, degree: int, weight: Callable) -> tuple[list, mp.mpf]:
    """Polynomial p (ascending) that minimizes max |p - f| * weight over [lo, hi]; also that maximum."""
    n = degree + 2
    lo, hi = mp.mpf(lo), mp.mpf(hi)
    nodes = [(lo + hi) / 2 - (hi - lo) / 2 * mp.cos(mp.pi * i / (n - 1)) for i in range(n)]
    for _ in range(30):
        a = mp.matrix(n, n)
        b = mp.matrix(n, 1)
        for i, t in enumerate(nodes):
            for j in range(degree + 1):
                a[i, j] = t**j
            a[i, degree + 1] = (-1) ** i / weight(t)
            b[i] = f(t)
        solution = mp.lu_solve(a, b)
        coefficients = [solution[j] for j in range(degree + 1)]

        def error(t, c=coefficients):
            return (mp.polyval(c[::-1], t) - f(t)) * weight(t)

        grid = [lo + (hi - lo) * i / 1500 for i in range(1501)]
        values = [error(t) for t in grid]
        # one extremum per run of equal sign
        extrema, run = [], [0]
        for i in range(1, len(grid)):
            if values[i] * values[run[-1]] < 0:
                extrema.append(max(run, key=lambda j: abs(values[j])))
                run = []
            run.append(i)
        extrema.append(max(run, key=lambda j: abs(values[j])))
        if len(extrema) < n:
            break
        while len(extrema) > n:
            extrema.pop(0 if abs(values[extrema[0]]) < abs(values[extrema[-1]]) else -1)
        nodes = [grid[i] for i in extrema]
        largest = max(abs(values[i]) for i in extrema)
        if largest / min(abs(values[i]) for i in extrema) < 1.01:
            break
    return coefficients, max(abs(error(lo + (hi - lo) * i / 4000)) for i in range(4001))


def quotient(f: Callable, subtract: list, power: int) -> Callable:
    """(f(t) - sum_i subtract_i t^i) / t^power, by series near 0."""
    taylor = mp.taylor(f, 0, 40)
    for i, c in enumerate(subtract):
        taylor[i] -= c
    tail = taylor[power:]

    def g(t):
        if abs(t) < mp.mpf("0.02"):
            return mp.polyval(tail[::-1], t)
        return (f(t) - sum(c * t**i for i, c in enumerate(subtract))) / t**power

    return g


def show(name: str, f: Callable, lo, hi, degree: int, weight: Callable, digits: int) -> None:
    coefficients, error = remez(f, lo, hi, degree, weight)
    print(f"{name}  on [{mp.nstr(mp.mpf(lo), 6)}, {mp.nstr(mp.mpf(hi), 6)}]  relative error {mp.nstr(error, 3)}")
    print("   ", ", ".join(mp.nstr(c, digits, min_fixed=-99, max_fixed=-99) for c in coefficients))


TINY = mp.mpf(10) ** -30  # keeps a weight from vanishing at 0


def atanh_tail(w):
    """(2 atanh(s) - 2 s) / s^3 with w = s^2; log(1 + f) = 2 atanh(s) for s = f / (2 + f)."""
    w = mp.mpf(w)
    if w < mp.mpf("1e-3"):
        return sum(2 * w**k / (2 * k + 3) for k in range(20))
    s = mp.sqrt(w)
    return (2 * mp.atanh(s) - 2 * s) / s**3


def sin_tail(w):
    s = mp.sqrt(w)
    return mp.sin(2 * mp.pi * s) / s if w > 0 else 2 * mp.pi


def cos_tail(w):
    s = mp.sqrt(w)
    return (mp.cos(2 * mp.pi * s) - 1) / w if w > 0 else -2 * mp.pi**2


def stirling(v):
    """a S(a) with a = 1 / v, S(a) = lgamma(a) - (a - 1/2) log a + a - 1/2 log 2 pi."""
    if v < mp.mpf("1e-9"):
        return mp.mpf(1) / 12 - v**2 / 360
    a = 1 / mp.mpf(v)
    return a * (mp.loggamma(a) - (a - mp.mpf(1) / 2) * mp.log(a) + a - mp.log(2 * mp.pi) / 2)


def digamma_tail(v):
    """a^2 D(a) with a = 1 / v, D(a) = log a - 1 / (2 a) - digamma(a) = -S'(a)."""
    if v < mp.mpf("1e-9"):
        return mp.mpf(1) / 12 - v**2 / 120
    a = 1 / mp.mpf(v)
    return a**2 * (mp.log(a) - v / 2 - mp.digamma(a))


def lgamma1p(x):
    """lgamma(1 + x) / (x (x - 1)); at the roots, its limits."""
    if abs(x) < mp.mpf("1e-12"):
        return mp.euler
    if abs(x - 1) < mp.mpf("1e-12"):
        return 1 - mp.euler
    return mp.loggamma(1 + x) / (x * (x - 1))


if __name__ == "__main__":
    reach = mp.log(2) / 2 * mp.mpf("1.0001")
    exp_tail = quotient(mp.exp, [1, 1], 2)
    for degree, digits in ((4, 10), (9, 19)):
        show(f"exp: 1 + r + r^2 P{degree}", exp_tail, -reach, reach, degree, lambda t: t**2 / mp.exp(t) + TINY, digits)

    log1p_unit = quotient(mp.log1p, [0], 1)
    show("log(1 + e), float: e P8(e)", log1p_unit, 0, 1, 8, lambda t: 1 / log1p_unit(t), 10)
    show("log(1 + e), double: 2 s + s^3 P10(s^2)", atanh_tail, 0, mp.mpf(1) / 9, 10, lambda w: w / 2 + TINY, 19)

    log_tail = quotient(mp.log1p, [0, 1, mp.mpf(-1) / 2], 3)
    low, high = mp.sqrt(mp.mpf(1) / 2) - 1, mp.sqrt(2) - 1
    show("log, float: f - f^2/2 + f^3 P7(f)", log_tail, low, high, 7, lambda t: t**2, 10)
    widest = (high / (2 + high)) ** 2 * mp.mpf("1.001")
    show("log, double: 2 s + s^3 P7(s^2)", atanh_tail, 0, widest, 7, lambda w: w / 2 + TINY, 19)

    for degree, digits in ((7, 10), (14, 19)):
        show(f"exp(t) - 1 - t: t^2 P{degree}(t)", exp_tail, -1, 1, degree, lambda t: 1 / exp_tail(t), digits)

    show("sin(2 pi t): t P4(t^2)", sin_tail, 0, mp.mpf(1) / 16, 4, lambda w: 1 / sin_tail(w), 10)
    show("cos(2 pi t): 1 + t^2 P3(t^2), absolute", cos_tail, 0, mp.mpf(1) / 16, 3, lambda w: w + TINY, 10)

    half = mp.mpf(1) / 2
    show("S(a), float: v P7(v), v = 1 / a", stirling, 0, 1, 7, lambda v: 1 / stirling(v), 10)
    show("D(a), float: v^2 P8(v), v = 1 / a", digamma_tail, 0, 1, 8, lambda v: 1 / digamma_tail(v), 10)
    for name, f, degree in (("S(a), double: v P22", stirling, 22), ("D(a), double: v^2 P24", digamma_tail, 24)):
        # around the middle, where the coefficients are small
        show(f"{name}(v - 1/2)", lambda t: f(t + half), -half, half, degree, lambda t: 1 / f(t + half), 19)  # noqa: B023
    for degree, digits in ((9, 10), (20, 19)):
        name = f"lgamma(1 + x): x (x - 1) P{degree}(x - 1/2)"
        show(name, lambda t: lgamma1p(t + half), -half, half, degree, lambda t: 1 / lgamma1p(t + half), digits)

"""Draws docs/fairness.png: two tenants in simulation, one of which sends ten times as much.

    PYTHONPATH=tests python -m fairness_figure docs/fairness.png

The small tenant's times to the first token, cumulated. Workload and replica are those of
tests/sim/test_fairness.py.
"""

from __future__ import annotations

import sys

import matplotlib as mpl

from sim.test_fairness import RATE_PER_NS, SMALL, draw_arrivals, list_small, list_ttfts_ns


def main(path: str) -> None:
    """Write the figure."""
    mpl.use("agg")
    from matplotlib import pyplot

    arrivals = draw_arrivals(RATE_PER_NS, 200)
    runs = (
        ("first come, first served", list_ttfts_ns(arrivals, "first-come")),
        ("fair", list_ttfts_ns(arrivals, "fair")),
        ("alone", list_ttfts_ns(list_small(arrivals), "first-come")),
        ("alone at half the speed", list_ttfts_ns(list_small(arrivals), "first-come", slower=2)),
    )
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name, ordered in runs:
        shares = [100 * (place + 1) / len(ordered) for place in range(len(ordered))]
        axes.plot([time_ns / 1e3 for time_ns in ordered], shares, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("time to first token in µs of simulated time")
    axes.set_ylabel(f"% of the {SMALL} tenant's requests")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=2)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1])

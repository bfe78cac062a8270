"""The trials of `time_to_target.py --tune`: as many for each optimizer on each problem.

They were chosen in turn, each in view of those before it, and are kept in
`time_to_target_trials.json` in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import models  # finds the examples
from time_to_target_methods import AdamW, Constants, KFac, Nesterov

# Everything by the quadratic model; lambda falls by half every 5 steps.
MODELLED = KFac(
    batch=500,
    rate=None,
    momentum=None,
    damping=0.3,
    damping_factor=0.5,
    l2=models.autoencoder_model.L2,
)

CONVNET = KFac(batch=128, rate=0.1, damping=0.1, constraint=1e-2, warm_up=20)

LANGUAGE = KFac(batch=8, rate=0.1, damping=3e-3, constraint=1e-3, warm_up=50)

TRIALS: Mapping[str, Mapping[str, Sequence[Constants]]] = {
    "autoencoder": {
        "kfac": [
            replace(MODELLED, batch=900, quadratic_fraction=0.125),
            MODELLED,
            replace(MODELLED, inverse_every=50),
            replace(MODELLED, damping=0.1, statistics_fraction=1 / 16),
        ],
        "adamw": [
            AdamW(batch=100, rate=2e-3, warm_up=100, horizon=1500),
            AdamW(batch=100, rate=1e-3, warm_up=100, horizon=1500),
        ],
        "nesterov": [
            Nesterov(batch=100, rate=0.01, warm_up=50, momentum=0.98, period=50),
            Nesterov(batch=100, rate=0.01, warm_up=50, momentum=0.99, period=50),
        ],
    },
    "convnet": {
        "kfac": [
            CONVNET,
            replace(CONVNET, constraint=3e-2),
        ],
        "adamw": [
            AdamW(batch=64, rate=2e-3, warm_up=20),
            AdamW(batch=64, rate=4e-3, warm_up=40, horizon=250),
        ],
        "nesterov": [
            Nesterov(batch=64, rate=0.03, warm_up=20, momentum=0.9),
            Nesterov(batch=64, rate=0.1, warm_up=40, momentum=0.9, horizon=250),
        ],
    },
    "language model": {
        "kfac": [
            LANGUAGE,
            replace(LANGUAGE, constraint=3e-3),
        ],
        "adamw": [
            AdamW(batch=8, rate=3e-3, warm_up=50, decay=0.1),
            AdamW(batch=8, rate=5e-3, warm_up=100, decay=0.1, horizon=300),
        ],
        "nesterov": [
            Nesterov(batch=8, rate=0.1, warm_up=50, momentum=0.9),
            Nesterov(batch=8, rate=0.3, warm_up=50, momentum=0.9),
        ],
    },
}

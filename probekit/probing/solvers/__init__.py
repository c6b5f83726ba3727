"""Solvers: each fits a batch of probes at once.

Those of classes have `fit(X, y, classes, X_validation, y_validation)` and `log_probabilities(X)`, that of
numbers has `fit(X, y, X_validation, y_validation)` and `predict(X)`.
"""

from probekit.probing.solvers.closed_form import LDAProbes, MeanDifferenceProbes, Moments, RidgeProbes
from probekit.probing.solvers.l1 import L1Probes
from probekit.probing.solvers.mlp import MLPProbes
from probekit.probing.solvers.regression import RegressionProbes
from probekit.probing.solvers.softmax import SoftmaxProbes

__all__ = [
    "L1Probes",
    "LDAProbes",
    "MLPProbes",
    "MeanDifferenceProbes",
    "Moments",
    "RegressionProbes",
    "RidgeProbes",
    "SoftmaxProbes",
]

"""Solvers: each fits a batch of probes at once.

All have `fit(X, y, classes, X_validation, y_validation)` and `log_probabilities(X)`.
"""

from probekit.probing.solvers.closed_form import LDAProbes, Moments, RidgeProbes
from probekit.probing.solvers.mlp import MLPProbes
from probekit.probing.solvers.softmax import SoftmaxProbes

__all__ = ["LDAProbes", "MLPProbes", "Moments", "RidgeProbes", "SoftmaxProbes"]

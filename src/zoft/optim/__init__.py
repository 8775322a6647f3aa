"""The core of zoft: subspaces, estimators, updates, and the optimizer made of them. Needs torch and numpy only."""

from zoft.optim.counters import EstimateWarning
from zoft.optim.estimator import Estimate, Probes
from zoft.optim.kept import NotRepeatable
from zoft.optim.layers import LinearMap, NoLinearLayers
from zoft.optim.loss import Loss, cross_entropy
from zoft.optim.methods import AGZO, AIMZO, LOZO, METHODS, Guided, MeZO, ZOAct
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.products import float32_is_quicker, widen
from zoft.optim.stream import NoStream
from zoft.optim.subspace import Activation, Full, Maintained, RandomLowRank
from zoft.optim.trace import Trace, obstacle, replay
from zoft.optim.update import SGD, Adam

__all__ = [
    "AGZO",
    "AIMZO",
    "LOZO",
    "METHODS",
    "SGD",
    "Activation",
    "Adam",
    "Estimate",
    "EstimateWarning",
    "Full",
    "Guided",
    "LinearMap",
    "Loss",
    "Maintained",
    "MeZO",
    "NoLinearLayers",
    "NoStream",
    "NotRepeatable",
    "Probes",
    "RandomLowRank",
    "Trace",
    "ZOAct",
    "ZeroOrder",
    "cross_entropy",
    "float32_is_quicker",
    "obstacle",
    "replay",
    "widen",
]

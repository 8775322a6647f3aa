"""The published methods, each a preset of the three axes."""

from zoft.optim.methods.agzo import AGZO
from zoft.optim.methods.lozo import LOZO, LOZOM
from zoft.optim.methods.mezo import MeZO
from zoft.optim.methods.zoact import ZOAct
from zoft.optim.optimizer import ZeroOrder

METHODS: dict[str, type[ZeroOrder]] = {
    "mezo": MeZO,
    "lozo": LOZO,
    "lozo-m": LOZOM,
    "agzo": AGZO,
    "zo-act": ZOAct,
}

__all__ = ["AGZO", "LOZO", "LOZOM", "METHODS", "MeZO", "ZOAct"]
